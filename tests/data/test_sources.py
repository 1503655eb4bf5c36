"""Sources: reading, distinct prompts, disjoint splits, many-shot conversations, errors that name their place."""

import json
import os
import random
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.config.errors import UserError
from posttrain.config.schema import RunConfig
from posttrain.data.formats import prompt_key
from posttrain.data.hash_stable import HASH_ORDERED, generate_stably
from posttrain.data.reasoning import entry_from_json, entry_to_json, generate, read_entry, score
from posttrain.data.sources import load_split, read_jsonl, read_parquet

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
ADDITION = {"kind": "reasoning_gym", "task": "chain_sum", "params": SUMS}


def config(sources: dict[str, Any], seed: int = 0, held_out: str | None = None) -> RunConfig:
    first = next(iter(sources))
    splits = sources[first].get("splits")
    held_out = held_out or (f"{first}/{list(splits)[-1]}" if splits else first)
    stage = {"kind": "sft", "data": {first: 1.0}, "steps": 1}
    return RunConfig.model_validate(
        {"name": "x", "seed": seed, "sources": sources, "eval": {"source": held_out}, "stages": {"sft": stage}}
    )


def keys(records: list[dict[str, Any]]) -> set[str]:
    return {prompt_key(record) for record in records}


def users(records: list[dict[str, Any]]) -> list[str]:
    return [message["content"] for record in records for message in record["prompt"] if message["role"] == "user"]


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_generated_splits_are_full_distinct_and_disjoint() -> None:
    # 2,000 of some 8,000 sums: the library repeats itself long before.
    run = config({"add": ADDITION | {"splits": {"train": 1500, "rl": 400, "test": 100}}})
    splits = {name: load_split(run, f"add/{name}") for name in ("train", "rl", "test")}
    assert {name: len(records) for name, records in splits.items()} == {"train": 1500, "rl": 400, "test": 100}
    assert len(keys([record for records in splits.values() for record in records])) == 2000
    assert splits["train"] == load_split(run, "add")


def test_records_follow_from_the_seed() -> None:
    wide = {"params": {"min_terms": 3, "max_terms": 3, "min_digits": 2, "max_digits": 2}}
    sources = {"add": ADDITION | wide | {"splits": {"train": 200, "test": 50}}}
    assert load_split(config(sources), "add/test") == load_split(config(sources), "add/test")
    overlap = set(users(load_split(config(sources), "add"))) & set(users(load_split(config(sources, seed=1), "add")))
    assert len(overlap) < 5  # of millions of prompts


def test_generated_records_can_be_scored_from_themselves() -> None:
    for record in load_split(config({"add": ADDITION | {"splits": {"train": 20}}}), "add"):
        assert record["verifier"] == "reasoning_gym"
        assert record["completion"] == [{"role": "assistant", "content": record["answer"]}]
        assert score(record["answer"], read_entry(record["metadata"])) == 1.0
        assert score(record["answer"] + "1", read_entry(record["metadata"])) < 0.99


@pytest.mark.parametrize(
    ("task", "params"),
    [
        ("rearc", {}),  # the entry holds tuples, its score depends on them
        ("gsm_symbolic", {}),  # the pool is made at construction
        ("list_functions", {}),  # draws from the global random state
        ("word_ladder", {"min_word_length": 3, "max_word_length": 3}),  # the scorer needs the settings
        ("pool_matrix", {}),  # the seed goes to numpy
        ("composite", {"datasets": [{"name": "leg_counting"}, {"name": "chain_sum", "weight": 2.0, "config": {"min_terms": 3}}]}),
    ],
)
def test_awkward_tasks_are_generated_and_scored(task: str, params: dict[str, Any]) -> None:
    first = list(islice(generate(task, params, seed=3), 5))
    assert first == list(islice(generate(task, params, seed=3), 5))
    assert [score(record["answer"], read_entry(record["metadata"])) for record in first] == [1.0] * 5


def test_tasks_leave_the_process_s_random_states_alone() -> None:
    random.seed(5)
    np.random.seed(5)
    expected = random.random(), np.random.random()
    random.seed(5)
    np.random.seed(5)
    for task in ("list_functions", "pool_matrix"):
        next(generate(task, {}, seed=0))
    assert (random.random(), np.random.random()) == expected


def test_tasks_that_depend_on_the_order_of_sets_give_the_same_records_in_every_process() -> None:
    code = (
        "import json; from itertools import islice; from posttrain.data.hash_stable import generate_stably; "
        "print(json.dumps(list(islice(generate_stably('word_ladder', {}, 1), 3))))"
    )
    records = [
        json.loads(subprocess.check_output([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, text=True))
        for seed in ("1", "2")
    ]
    assert records[0] == records[1] == list(islice(generate_stably("word_ladder", {}, 1), 3))


def test_mistakes_cross_from_the_generating_process() -> None:
    says = "here: task 'word_ladder' has no setting 'min_word_lenght'; did you mean 'min_word_length'"
    with pytest.raises(UserError, match=says):
        next(generate_stably("word_ladder", {"min_word_lenght": 3}, 0, "here"))


@pytest.mark.slow
def test_the_list_of_tasks_that_depend_on_the_order_of_sets_is_complete() -> None:
    # composite is made of others; the rest take a second for a few records and choose from no sets of strings.
    skipped = ["composite", "futoshiki", "knight_swap", "puzzle24", "zebra_puzzles", "intermediate_integration"]
    code = (
        "import json, sys; from itertools import islice; from reasoning_gym.factory import DATASETS; "
        "from posttrain.data.reasoning import generate; skipped = json.loads(sys.argv[1]); "
        "print(json.dumps({task: list(islice(generate(task, {}, 0), 30)) for task in DATASETS if task not in skipped}))"
    )
    command = [sys.executable, "-c", code, json.dumps(skipped)]
    first, second = (
        json.loads(subprocess.check_output(command, env=os.environ | {"PYTHONHASHSEED": seed}, text=True)) for seed in ("1", "2")
    )
    assert {task for task in first if first[task] != second[task]} <= HASH_ORDERED


def test_tasks_without_a_known_answer_give_no_demonstration() -> None:
    record = next(generate("graph_color", {}, seed=0))
    assert "completion" not in record and record["answer"] == ""


def test_entries_survive_json() -> None:
    metadata = {"t": (1, [2, (3,)]), "keys": {1: "x", (2, 3): {"y": ()}}, "plain": {"z": None}}
    entry = {"question": "q", "answer": "a", "metadata": metadata}
    assert entry_from_json(entry_to_json(entry)) == entry
    assert entry_from_json(json.dumps({"question": "q", "answer": "a", "metadata": {}}))["answer"] == "a"


def test_needle_documents_are_long_and_fast() -> None:
    source = {"kind": "reasoning_gym", "task": "needle_haystack", "params": {"min_num_statements": 40, "max_num_statements": 60}}
    records = load_split(config({"needle": source | {"splits": {"train": 50}}}), "needle")
    assert min(len(record["prompt"][0]["content"]) for record in records) > 1024


def test_many_shot_conversations_use_every_prompt_once() -> None:
    run = config({"many": ADDITION | {"shots": 5, "splits": {"train": 30, "test": 10}}})
    train, test = load_split(run, "many/train"), load_split(run, "many/test")
    assert (len(train), len(test)) == (30, 10)
    asked = users(train + test)
    assert len(asked) == len(set(asked)) == 40 * 5
    record = train[0]
    assert [message["role"] for message in record["prompt"]] == ["user", "assistant"] * 4 + ["user"]
    assert record["train_on_all_answers"] is True
    assert score(record["completion"][0]["content"], read_entry(record["metadata"])) == 1.0


def test_held_out_prompts_appear_in_no_other_source() -> None:
    sources = {
        "eval": ADDITION | {"splits": {"test": 300}},
        "add": ADDITION | {"splits": {"train": 3000}},
        "many": ADDITION | {"shots": 4, "splits": {"train": 500}},
    }
    run = config(sources, held_out="eval/test")
    held_out = set(users(load_split(run, "eval/test")))
    assert held_out.isdisjoint(users(load_split(run, "add")))
    assert held_out.isdisjoint(users(load_split(run, "many")))


def test_a_task_with_too_few_prompts_is_refused() -> None:
    few = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    run = config({"add": ADDITION | {"params": few, "splits": {"train": 50, "test": 1000}}})
    says = r"sources.add.splits.test: split 'test' asks for 1000 records, task 'chain_sum' has only \d+ with"
    with pytest.raises(UserError, match=says):
        load_split(run, "add/test")


@pytest.mark.parametrize(
    ("change", "ref", "says"),
    [
        ({"task": "chain_sums"}, "add", "did you mean 'chain_sum'"),
        ({"params": {"min_term": 2}}, "add", "did you mean 'min_terms'"),
        ({"params": {"min_terms": 3, "max_terms": 2}}, "add", "refuses its settings"),
        ({"task": None}, "add", "no task given"),
        ({}, "ad", "did you mean 'add'"),
        ({}, "add/tset", "did you mean 'test'"),
        ({"splits": {}}, "add", "has no end"),
        ({"kind": "jsonl"}, "add", "no path given"),
    ],
)
def test_mistakes_in_a_source_are_named(change: dict[str, Any], ref: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_split(config({"add": ADDITION | {"splits": {"train": 5, "test": 5}} | change}), ref)


def test_files_give_all_records_once_per_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i % 30}", "completion": f"a{i}"} for i in range(40)]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    run = config({"d": {"kind": "jsonl", "path": path}})
    assert sorted(users(load_split(run, "d"))) == sorted(f"q{i}" for i in range(30))
    cut = config({"d": {"kind": "jsonl", "path": path, "splits": {"train": 20, "test": 10}}})
    train, test = load_split(cut, "d/train"), load_split(cut, "d/test")
    assert (len(train), len(test)) == (20, 10)
    assert keys(train).isdisjoint(keys(test))
    assert users(train) != [f"q{i}" for i in range(20)]  # not in file order
    short = config({"d": {"kind": "jsonl", "path": path, "splits": {"train": 20, "test": 11}}})
    with pytest.raises(UserError, match="has only 10 with distinct prompts after the 20 of earlier splits; ask for fewer"):
        load_split(short, "d/test")


def test_preference_pairs_of_one_prompt_all_stay_in_one_split(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i % 10}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(30)]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    assert len(load_split(config({"d": {"kind": "jsonl", "path": path}}), "d")) == 30
    cut = config({"d": {"kind": "jsonl", "path": path, "splits": {"train": 18, "test": 12}}})
    train, test = load_split(cut, "d/train"), load_split(cut, "d/test")
    assert (len(train), len(test)) == (18, 12) and keys(train).isdisjoint(keys(test))
    assert len({record["chosen"][0]["content"] for record in train + test}) == 30


def test_parquet_and_hub_folders_give_the_same_records_as_jsonl(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": [{"role": "user", "content": f"q{i}"}], "verifier": "exact", "answer": str(i)} for i in range(5)]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    (tmp_path / "hub").mkdir()
    for file in (tmp_path / "d.parquet", tmp_path / "hub" / "train.parquet"):
        pq.write_table(pa.Table.from_pylist(rows), file)
    assert read_jsonl(path) == read_parquet(tmp_path / "d.parquet") == rows
    hub = config({"d": {"kind": "huggingface", "path": str(tmp_path / "hub")}})
    assert sorted(users(load_split(hub, "d"))) == [f"q{i}" for i in range(5)]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"prompt": "q", "completion": ', "invalid JSON"),
        (b'["q", "a"]', "a list, not an object"),
        (b'{"question": "q"}', "no known format (question)"),
        (b'{"prompt": 3, "completion": "a"}', "'prompt' is a number"),
        (b'{"prompt": "q\xff"}', "not UTF-8 (byte 13)"),
    ],
)
def test_a_broken_line_is_named_by_number(tmp_path: Path, line: bytes, says: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"prompt": "q", "completion": "a"}\n\n' + line + b'\n{"prompt": "q", "completion": "a"}\n')
    with pytest.raises(UserError) as refused:
        read_jsonl(path)
    assert str(refused.value).startswith(f"{path}:3: ")
    assert says in str(refused.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "x.parquet").write_text("no parquet")
    for read, name, says in [
        (read_jsonl, "missing.jsonl", "no such file"),
        (read_jsonl, "empty.jsonl", "no records"),
        (read_parquet, "x.parquet", "no readable Parquet file"),
        (read_parquet, "missing.parquet", "no such file"),
    ]:
        with pytest.raises(UserError, match=says) as refused:
            read(tmp_path / name)
        assert name in str(refused.value)
    with pytest.raises(UserError, match="cannot load dataset"):
        load_split(config({"d": {"kind": "huggingface", "path": str(tmp_path / "nowhere")}}), "d")


def test_many_shot_needs_answers(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": f"q{i}"} for i in range(6)])
    with pytest.raises(UserError, match="need records with a prompt and an answer"):
        load_split(config({"d": {"kind": "jsonl", "path": path, "shots": 2}}), "d")

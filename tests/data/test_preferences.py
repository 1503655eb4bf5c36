"""Published preference schemas: small files made by hand, and what must come of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from posttrain.config import UserError
from posttrain.config.checks import check
from posttrain.config.schema import RunConfig
from posttrain.data.formats import normalise, prompt_key
from posttrain.data.preferences.adapt import adapt
from posttrain.data.sources import load_split


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def ai(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def helpsteer2_row(
    response: str, helpfulness: int, correctness: int = 4, complexity: int = 1, prompt: str = "q"
) -> dict[str, Any]:
    grades = {"helpfulness": helpfulness, "correctness": correctness, "coherence": 4, "complexity": complexity, "verbosity": 2}
    return {"prompt": prompt, "response": response, **grades}


def rated(response: str, truthfulness: str, helpfulness: str) -> dict[str, Any]:
    ratings = {"instruction_following": "4", "honesty": "3", "truthfulness": truthfulness, "helpfulness": helpfulness}
    annotations = {name: {"Rating": rating, "Rationale": "because"} for name, rating in ratings.items()}
    return {"model": "m", "response": response, "annotations": annotations, "overall_score": 7.0, "fine-grained_score": 4.0}


CONTEXT = [user("hello"), ai("hi"), user("q")]
HELPSTEER3 = {
    "domain": "STEM",
    "language": "english",
    "context": CONTEXT,
    "response1": "one",
    "response2": "two",
    "overall_preference": -2,
    "individual_preference": [{"score": -2, "reasoning": "r", "feedback1": "f", "feedback2": "g"}],
}
BINARISED = {
    "prompt": "q",
    "prompt_id": "x",
    "chosen": [user("q"), ai("good")],
    "rejected": [user("q"), ai("bad")],
    "messages": [user("q"), ai("good")],
    "score_chosen": 8.5,
    "score_rejected": 4.0,
}
SKYWORK = {"chosen": [user("q"), ai("good")], "rejected": [user("q"), ai("bad")], "source": "magpie"}
HH = {
    "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\nd\n\nAssistant: good",
    "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\nd\n\nAssistant: bad",
}
REWARDBENCH2 = {
    "id": "7",
    "prompt": "q",
    "chosen": ["good"],
    "rejected": ["b1", "b2", "b3"],
    "num_correct": 1,
    "num_incorrect": 3,
    "total_completions": 4,
    "models": ["m"] * 4,
    "subset": "Math",
    "additional_metadata": {"category": "c"},
}
RM_BENCH = {"id": "1", "prompt": "q", "chosen": ["c1", "c2", "c3"], "rejected": ["r1", "r2", "r3"], "domain": "safety-refuse"}


def read(rows: Sequence[Mapping[str, Any]], schema: str, **options: Any) -> list[dict[str, Any]]:
    units = adapt([(f"row {number}", row) for number, row in enumerate(rows, start=1)], schema, **options)
    for unit in units:
        assert len({prompt_key(record) for record in unit}) == 1
        assert [normalise(record) for record in unit] == unit
    return [record for unit in units for record in unit]


def test_helpsteer2_grades_every_answer_and_pairs_the_two_of_a_prompt() -> None:
    rows = [helpsteer2_row("worse", 1, complexity=3), helpsteer2_row("other", 2, prompt="p"), helpsteer2_row("better", 4)]
    grades = read(rows, "helpsteer2", emit="grades")
    assert [record["completion"] for record in grades] == [[ai("worse")], [ai("better")], [ai("other")]]  # by prompt
    assert grades[0]["grades"] == {"correctness": 1.0, "helpfulness": 0.25, "coherence": 1.0, "depth": 0.75}
    # The better answer trails in depth, which then has no margin; the prompt with one answer makes no pair.
    margins = {"correctness": 0.0, "helpfulness": 0.75, "coherence": 0.0}
    assert read(rows, "helpsteer2") == [
        {"prompt": [user("q")], "chosen": [ai("better")], "rejected": [ai("worse")], "margins": margins}
    ]
    assert read([helpsteer2_row("a", 2), helpsteer2_row("b", 2)], "helpsteer2") == []
    (pair,) = read([helpsteer2_row("a", 2), helpsteer2_row("b", 2, correctness=3)], "helpsteer2")
    assert pair["chosen"] == [ai("a")] and pair["margins"]["correctness"] == 0.25 and pair["margins"]["helpfulness"] == 0.0


def test_ultrafeedback_pairs_the_best_with_the_worst_completion() -> None:
    completions = [rated("middle", "4", "3"), rated("best", "4", "5"), rated("worst", "N/A", "1"), rated("none", "N/A", "N/A")]
    row = {"source": "s", "instruction": "q", "models": ["m"], "completions": completions}
    grades = read([row], "ultrafeedback", emit="grades")
    assert [record["grades"] for record in grades] == [
        {"truthfulness": 0.75, "helpfulness": 0.5},
        {"truthfulness": 0.75, "helpfulness": 1.0},
        {"helpfulness": 0.0},
    ]
    assert read([row], "ultrafeedback") == [
        {"prompt": [user("q")], "chosen": [ai("best")], "rejected": [ai("worst")], "margins": {"helpfulness": 1.0}}
    ]


def test_ultrafeedback_binarised_takes_its_margin_from_the_scores() -> None:
    pair = {"prompt": [user("q")], "chosen": [ai("good")], "rejected": [ai("bad")], "margins": {"helpfulness": 0.5}}
    assert read([BINARISED], "ultrafeedback") == [pair]
    assert read([BINARISED | {"score_rejected": 8.5}], "ultrafeedback") == []
    assert read([BINARISED], "ultrafeedback", dimension="truthfulness")[0]["margins"] == {"truthfulness": 0.5}


@pytest.mark.parametrize(("preference", "chosen", "margin"), [(-3, "one", 1.0), (-1, "one", 1 / 3), (2, "two", 2 / 3)])
def test_helpsteer3_says_which_of_two_answers_is_better_and_by_how_much(preference: int, chosen: str, margin: float) -> None:
    (pair,) = read([HELPSTEER3 | {"overall_preference": preference}], "helpsteer3")
    assert pair["prompt"] == CONTEXT and pair["chosen"] == [ai(chosen)] and pair["domain"] == "stem"
    assert pair["margins"] == {"helpfulness": pytest.approx(margin)}
    assert read([HELPSTEER3 | {"overall_preference": 0}], "helpsteer3") == []


def test_skywork_says_no_dimension_unless_told() -> None:
    pair = {"prompt": [user("q")], "chosen": [ai("good")], "rejected": [ai("bad")]}
    assert read([SKYWORK], "skywork") == [pair]
    assert read([SKYWORK], "skywork", dimension="correctness") == [pair | {"margins": {"correctness": 0.5}}]


def test_hh_transcripts_become_messages() -> None:
    (pair,) = read([HH], "hh", dimension="harmlessness")
    assert pair["prompt"] == [user("a"), ai("b"), user("c\nd")]
    assert (pair["chosen"], pair["rejected"], pair["margins"]) == ([ai("good")], [ai("bad")], {"harmlessness": 0.5})
    same, unanswered = {"chosen": HH["chosen"], "rejected": HH["chosen"]}, {**HH, "rejected": HH["rejected"] + "\n\nHuman: e"}
    assert read([same, unanswered], "hh") == []


def test_benchmarks_pair_right_with_wrong_answers_of_one_prompt() -> None:
    pairs = read([REWARDBENCH2], "rewardbench2")
    assert [pair["rejected"][0]["content"] for pair in pairs] == ["b1", "b2", "b3"]
    assert all(pair["margins"] == {"correctness": 0.5} and pair["pair_kind"] == "Math" for pair in pairs)
    styles = read([RM_BENCH], "rm_bench")
    assert len(styles) == 9 and styles[2]["pair_kind"] == "safety-refuse:concise/markdown"
    assert styles[2]["chosen"] == [ai("c1")] and styles[2]["rejected"] == [ai("r3")]
    assert styles[0]["margins"] == {"harmlessness": 0.5} and styles[0]["domain"] == "safety-refuse"


def without(row: Mapping[str, Any], column: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != column}


@pytest.mark.parametrize(
    ("schema", "row", "column"),
    [
        *[("helpsteer2", helpsteer2_row("a", 1), name) for name in ("prompt", "response", "coherence", "verbosity")],
        *[("helpsteer3", HELPSTEER3, name) for name in ("context", "response1", "response2", "overall_preference")],
        *[("ultrafeedback", BINARISED, name) for name in ("prompt", "rejected", "score_chosen", "score_rejected")],
        *[("ultrafeedback", {"instruction": "q", "completions": []}, name) for name in ("instruction", "completions")],
        *[("skywork", SKYWORK, name) for name in ("chosen", "rejected")],
        *[("hh", HH, name) for name in ("chosen", "rejected")],
        *[("rewardbench2", REWARDBENCH2, name) for name in ("id", "prompt", "chosen", "rejected", "num_correct", "subset")],
        *[("rm_bench", RM_BENCH, name) for name in ("id", "prompt", "chosen", "rejected", "domain")],
    ],
)
def test_a_missing_column_is_named_with_the_format(schema: str, row: Mapping[str, Any], column: str) -> None:
    with pytest.raises(UserError) as refused:
        read([without(row, column)], schema)
    line = str(refused.value)
    assert line.startswith(f"row 1: no column '{column}' (columns: ") and f"format {schema}" in line and "\n" not in line


@pytest.mark.parametrize(
    ("schema", "row", "says"),
    [
        ("helpsteer2", helpsteer2_row("a", 5), "'helpfulness' is 5; a number from 0 to 4 in format helpsteer2"),
        ("helpsteer3", HELPSTEER3 | {"overall_preference": "2"}, "a number from -3 to 3"),
        ("helpsteer3", HELPSTEER3 | {"response1": 4}, "'response1' is 4; text in format helpsteer3"),
        ("ultrafeedback", BINARISED | {"score_chosen": 2.0}, "'score_rejected' 4 is above 'score_chosen' 2"),
        (
            "ultrafeedback",
            {"instruction": "q", "completions": [rated("a", "6", "1")]},
            "completions[0]: 'truthfulness' is rated '6'",
        ),
        ("ultrafeedback", {"instruction": "q", "completions": [{"response": "a"}]}, "completions[0]: no column 'annotations'"),
        ("hh", {"chosen": "Human: a", "rejected": "b"}, "'chosen' is no transcript"),
        ("rewardbench2", REWARDBENCH2 | {"num_correct": 2}, "'num_correct' is 2, 'chosen' has 1 answers"),
        ("rewardbench2", REWARDBENCH2 | {"chosen": ["a", "b"], "num_correct": 2}, "only the subset Ties has more than one"),
        ("rewardbench2", REWARDBENCH2 | {"rejected": "b"}, "'rejected' is 'b'; a list of texts"),
        ("rm_bench", RM_BENCH | {"chosen": ["a"]}, "'chosen' has 1 answers; one for each of concise, detailed, markdown"),
    ],
)
def test_what_the_schema_does_not_allow_is_named(schema: str, row: Mapping[str, Any], says: str) -> None:
    with pytest.raises(UserError) as refused:
        read([row], schema)
    assert says in str(refused.value) and str(refused.value).startswith("row 1: ")


def config(path: Path, **source: Any) -> RunConfig:
    sources = {"given": {"kind": path.suffix[1:], "path": str(path)} | source}
    sums = {"kind": "reasoning_gym", "task": "chain_sum", "splits": {"test": 5}}
    stage = {"kind": "sft", "data": {"given": 1.0}, "steps": 1}
    held_out = {"source": "sums/test", "num_prompts": 5}
    return RunConfig.model_validate({"name": "x", "sources": {"sums": sums, **sources}, "eval": held_out, "stages": {"s": stage}})


def write(rows: list[Any], path: Path) -> Path:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("schema", "rows", "number"),
    [
        ("helpsteer2", [helpsteer2_row("a", 1), helpsteer2_row("b", 2)], 1),
        ("helpsteer3", [HELPSTEER3], 1),
        ("ultrafeedback", [{"instruction": "q", "completions": [rated("a", "1", "2"), rated("b", "3", "4")]}], 1),
        ("ultrafeedback", [BINARISED], 1),
        ("skywork", [SKYWORK], 1),
        ("hh", [HH], 1),
        ("rewardbench2", [REWARDBENCH2], 3),
        ("rm_bench", [RM_BENCH], 9),
    ],
)
def test_files_are_read_as_sources(tmp_path: Path, ending: str, schema: str, rows: list[Any], number: int) -> None:
    run = config(write(rows, tmp_path / f"d.{ending}"), format=schema)
    check(run)
    records = load_split(run, "given")
    assert len(records) == number
    assert records == [record for unit in adapt([("", row) for row in rows], schema) for record in unit]


def test_all_pairs_of_a_prompt_stay_within_one_split(tmp_path: Path) -> None:
    rows = [RM_BENCH | {"id": str(i), "prompt": f"q{i}"} for i in range(10)]
    run = config(write(rows, tmp_path / "d.jsonl"), format="rm_bench", splits={"train": 40, "test": 20})
    train, test = load_split(run, "given/train"), load_split(run, "given/test")
    assert (len(train), len(test)) == (40, 20)  # four prompts and a part of the fifth, then two and a part of the third
    keys = [{prompt_key(record) for record in split} for split in (train, test)]
    assert [len(one) for one in keys] == [5, 3] and not keys[0] & keys[1]
    # 50 take five prompts and a part of the sixth; nine pairs each of the other four are left.
    with pytest.raises(UserError, match="asks for 90 records, .* has only 36 "):
        load_split(config(tmp_path / "d.jsonl", format="rm_bench", splits={"train": 50, "test": 90}), "given/test")


def test_a_broken_row_is_named_by_its_line(tmp_path: Path) -> None:
    path = write([HELPSTEER3, without(HELPSTEER3, "context")], tmp_path / "d.jsonl")
    with pytest.raises(UserError) as refused:
        load_split(config(path, format="helpsteer3"), "given")
    assert str(refused.value).startswith(f"{path}:2: no column 'context'")
    equal = write([HELPSTEER3 | {"overall_preference": 0}], tmp_path / "e.jsonl")
    with pytest.raises(UserError, match="no records"):
        load_split(config(equal, format="helpsteer3"), "given")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({"format": "skywork", "emit": "grades"}, "sources.given.emit: format skywork gives no grades; write pairs"),
        ({"format": "helpsteer2", "emit": "demonstrations"}, "gives no demonstrations; write pairs or grades"),
        ({"emit": "grades"}, "sources.given.emit: 'emit' means nothing for format trl"),
        ({"dimension": "style"}, "sources.given.dimension: 'dimension' means nothing for format trl"),
        ({"format": "hh", "shots": 3}, "sources.given.shots: pairs cannot be joined"),
        ({"pair_kinds": {"single": 1.0}}, "'pair_kinds' means nothing for kind jsonl"),
    ],
)
def test_options_that_do_not_fit_are_named(tmp_path: Path, source: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as refused:
        check(config(write([HH], tmp_path / "d.jsonl"), **source))
    assert says in str(refused.value)
    if source.get("emit") == "grades" and source.get("format") == "skywork":
        with pytest.raises(UserError, match="format skywork has no grades here"):
            load_split(config(write([SKYWORK], tmp_path / "d.jsonl"), **source), "given")

"""What a reward model is trained on: preparation, labels by target, bootstrap weights, order, collation."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.config.errors import UserError
from posttrain.config.schema import RewardStage
from posttrain.data.encode import encode_pair
from posttrain.data.formats import normalise
from posttrain.data.tokenizer import load_tokenizer
from posttrain.stages import run
from posttrain.stages.files import read_json, read_records, write_json
from posttrain.stages.reward_dataset import (
    answer_sample,
    bootstrap_weight,
    differing,
    is_plain,
    pair_margins,
    reward_dataset,
)
from posttrain.stages.reward_trainer import HeadCollator
from tests.stages.reward_tasks import STAGE, TWO, grades, pairs, reward_job
from tests.stages.tasks import REWARD, make_job

PAIR = normalise({"prompt": "1 or 2", "chosen": "yes!", "rejected": "no!"})


def stage(**changes: Any) -> RewardStage:
    return RewardStage.model_validate({**STAGE, **changes})


# Labels


def test_a_pair_names_what_its_margins_name_and_without_any_the_first_dimension() -> None:
    assert pair_margins(PAIR, TWO) == {"correctness": None} and differing(PAIR, TWO) == ["correctness"]
    labelled = {**PAIR, "margins": {"style": 0.5, "depth": 1.0, "correctness": 0.0}}
    assert pair_margins(labelled, TWO) == {"correctness": 0.0, "style": 0.5} and differing(labelled, TWO) == ["style"]
    assert pair_margins(labelled, ["harmlessness"]) == {}


def test_only_one_head_on_unlabelled_pairs_is_plain() -> None:
    one = {"dimensions": ["correctness"]}
    assert is_plain(stage(**one), [PAIR]) and is_plain(stage(**one, margin_scale=1.0), [PAIR])
    for changes in ({"dimensions": TWO}, {**one, "ensemble": 2}, {**one, "label_noise": 0.1}):
        assert not is_plain(stage(**changes), [PAIR])
    for record in ({**PAIR, "margins": {"correctness": 1.0}}, normalise(grades([0])[0])):
        assert not is_plain(stage(**one), [PAIR, record])


def test_an_answer_keeps_the_turns_before_it() -> None:
    turns = [{"role": "assistant", "content": "Which?"}, {"role": "user", "content": "2"}, {"role": "assistant", "content": "ok"}]
    sample = answer_sample({**PAIR, "chosen": turns}, "chosen")
    assert [message["content"] for message in sample.prompt] == ["1 or 2", "Which?", "2"] and sample.answer == "ok"


# Bootstrap


@given(st.integers(0, 2**31), st.integers(0, 100), st.text(max_size=5))
def test_a_weight_is_a_function_of_seed_text_and_member(seed: int, member: int, text: str) -> None:
    record = {**PAIR, "chosen": [{"role": "assistant", "content": text}]}
    weight = bootstrap_weight(seed, {**record, "source": "here"}, member)
    assert weight == bootstrap_weight(seed, {"source": "there", **record}, member) and 0 <= weight < 30


def test_weights_are_poisson_and_members_draw_on_their_own() -> None:
    records = [{**PAIR, "chosen": [{"role": "assistant", "content": str(n)}]} for n in range(4000)]
    drawn = [[bootstrap_weight(7, record, member) for record in records] for member in range(2)]
    for weights in drawn:
        for value, count in Counter(weights).items():
            share = math.exp(-1) / math.factorial(value)
            assert abs(count / 4000 - share) < 5 * math.sqrt(share / 4000) + 1e-3
    covariance = sum((a - 1) * (b - 1) for a, b in zip(*drawn, strict=True)) / 4000
    assert abs(covariance) < 5 / math.sqrt(4000), "five standard errors: both variances are 1"
    assert [bootstrap_weight(seed, PAIR, 0) for seed in range(6)] == [2, 1, 1, 1, 1, 0], "the same on every machine"


# Order


def mixed(folder: Path, **changes: Any) -> tuple[Any, int, list[dict[str, Any]]]:
    files = {"pairs": pairs(range(30)), "grades": grades(range(20)), "held_pairs": pairs(range(60, 80))}
    job = reward_job(folder, {**STAGE, "data": {"pairs": 3.0, "grades": 1.0}, "steps": 12, **changes}, files)
    dataset, per_step = reward_dataset(job, load_tokenizer(job.inputs["init"]))
    return dataset, per_step, read_records(job.inputs["data"] / "records.jsonl")


def test_rows_are_labelled_by_dimension_and_sources_keep_their_weights(tmp_path: Path) -> None:
    dataset, per_step, _ = mixed(tmp_path, ensemble=2)
    rows = list(dataset)
    assert len(rows) == 12 * per_step and "bucket" not in rows[0]
    answers = [row for row in rows if not row["rejected_ids"]]
    assert abs(len(answers) - len(rows) / 4) <= 1
    for row in rows:
        graded = not row["rejected_ids"]
        assert (
            row["graded"] == [graded] * 2
            and [a or b for a, b in zip(row["differs"], row["equal"], strict=True)] == [not graded] * 2
        )
        assert row["margins"] == [float(d) for d in row["differs"]] and len(row["weights"]) == 2
    assert {tuple(row["grades"]) for row in answers} == {(1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)}


@pytest.mark.parametrize("pacing", ["phases", "competence"])
def test_a_curriculum_orders_the_pairs_and_leaves_graded_answers_their_places(tmp_path: Path, pacing: str) -> None:
    plain, _, _ = mixed(tmp_path / "plain")
    paced, _, _ = mixed(tmp_path / "paced", curriculum={"pacing": pacing})
    shuffled, _, _ = mixed(tmp_path / "shuffled", curriculum={"pacing": pacing, "shuffled": True})
    for one in (paced, shuffled):
        assert [row["chosen_ids"] for row in one if not row["rejected_ids"]] == [
            r["chosen_ids"] for r in plain if not r["rejected_ids"]
        ]
        assert [not row["rejected_ids"] for row in one] == [not row["rejected_ids"] for row in plain]
        assert all((row["bucket"] is None) == (not row["rejected_ids"]) for row in one)
    buckets = [row["bucket"] for row in paced if row["bucket"]]
    third = len(buckets) // 3
    assert buckets[:third].count("near_tie") < buckets[-third:].count("near_tie")
    assert sorted(str(row) for row in paced) == sorted(str(row) for row in shuffled), "the control has the same items"
    assert [row["chosen_ids"] for row in paced] != [row["chosen_ids"] for row in shuffled]


def test_sources_of_weight_0_give_a_curriculum_no_pairs_and_no_adversarial_ones(tmp_path: Path) -> None:
    files = {"pairs": pairs(range(20)), "more": pairs(range(20, 40)), "held_pairs": pairs(range(60, 80))}
    changes = {"data": {"pairs": 1.0, "more": 0.0}, "curriculum": {"adversarial": 1.0}, "max_length": 256, "pack_length": 512}
    job = reward_job(tmp_path, {**STAGE, **changes, "steps": 12}, files)
    records = read_records(job.inputs["data"] / "records.jsonl")
    assert Counter(record["source"] for record in records) == {"pairs": 40, "more": 20}
    tokenizer = load_tokenizer(job.inputs["init"])
    dataset, per_step = reward_dataset(job, tokenizer)
    weighed = {tuple(encode_pair(tokenizer, record)[0].input_ids) for record in records if record["source"] == "pairs"}
    assert len(dataset) == 12 * per_step and {tuple(row["chosen_ids"]) for row in dataset} <= weighed


def test_a_resumed_stage_keeps_the_order_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a machine of other rounding would make of the difficulties."""
    job = reward_job(tmp_path, {**STAGE, "steps": 12, "curriculum": {}})
    tokenizer = load_tokenizer(job.inputs["init"])

    def drawn() -> list[Any]:
        return list(reward_dataset(job, tokenizer)[0])

    first = drawn()
    monkeypatch.setattr("posttrain.stages.reward_dataset.pair_difficulty", lambda pairs, _: [n / 60 for n in range(len(pairs))])
    other = drawn()
    assert other != first, "without a checkpoint the stage begins anew"
    (job.checkpoints / "checkpoint-2").mkdir(parents=True)
    (job.checkpoints / "checkpoint-2" / "checkpoint.json").write_text("{}")
    monkeypatch.undo()
    assert drawn() == other
    file = job.folder / "curriculum.json"
    stored = read_json(file)
    write_json(file, {**stored, "order": stored["order"][:-1]})
    with pytest.raises(UserError, match="curriculum.json: the stage began with other data or steps; remove the stage's"):
        drawn()


def test_a_curriculum_over_graded_answers_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stages.stage.curriculum: .*graded answers alone"):
        mixed(tmp_path, data={"grades": 1.0}, curriculum={})


# Collation


def test_a_batch_holds_better_answers_then_worse_then_graded_ones() -> None:
    label = {"differs": [True, False], "equal": [False, True], "margins": [0.5, 0.0], "graded": [False] * 2, "grades": [0.0] * 2}
    pair = {"chosen_ids": [5, 6, 7], "rejected_ids": [8], **label, "weights": [2.0, 0.0, 1.0]}
    answer = {"chosen_ids": [9, 9], "rejected_ids": [], "differs": [False] * 2, "equal": [False] * 2, "margins": [0.0] * 2}
    answer |= {"graded": [False, True], "grades": [0.0, 0.25], "weights": [1.0, 1.0, 3.0]}
    batch = HeadCollator(0)([answer, pair])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0], [9, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch["differs"].tolist() == [[True, False]] and batch["equal"].tolist() == [[False, True]]
    assert batch["margins"].tolist() == [[0.5, 0.0]] and batch["pair_weights"].tolist() == [[2.0, 0.0, 1.0]]
    assert batch["graded"].tolist() == [[False, True]] and batch["grades"].tolist() == [[0.0, 0.25]]
    assert batch["answer_weights"].tolist() == [[1.0, 1.0, 3.0]]
    alone = HeadCollator(0)([answer])
    assert alone["differs"].shape == (0, 2) and alone["pair_weights"].shape == (0, 3)


# Preparation


def test_given_pairs_and_graded_answers_are_taken_and_what_names_no_dimension_is_counted(tmp_path: Path) -> None:
    elsewhere = [{**record, "prompt": f"x{record['prompt']}", "margins": {"harmlessness": 1.0}} for record in pairs(range(5))]
    files = {
        "pairs": [*pairs(range(30)), *elsewhere],
        "grades": grades(range(10)),
        "held_pairs": pairs(range(60, 80)),
        "held_grades": grades(range(20, 30)),
    }
    changes = {"data": {"pairs": 1.0, "grades": 1.0}, "heldout": {"held_pairs": 2.0, "held_grades": 1.0}}
    job = reward_job(tmp_path, {**STAGE, **changes, "heldout_pairs": 24}, files)
    stats = read_json(job.inputs["data"] / "stats.json")
    assert {name: stats[name] for name in stats if name != "seconds"} == {
        "records": 40,
        "no_dimension": 5,
        "heldout_pairs": 16,
        "heldout_grades": 8,
    }
    assert all("chosen" in record for record in read_records(job.inputs["data"] / "heldout.jsonl"))
    assert all("grades" in record for record in read_records(job.inputs["data"] / "heldout_grades.jsonl"))


def test_adversarial_pairs_join_the_training_pairs_alone(tmp_path: Path) -> None:
    changes = {"curriculum": {"adversarial": 0.5}, "max_length": 256, "pack_length": 512}
    job = reward_job(tmp_path, {**STAGE, **changes})
    kinds = Counter(
        record.get("pair_kind", "given").split(":")[0] for record in read_records(job.inputs["data"] / "records.jsonl")
    )
    assert kinds == {"given": 60, "adversarial": 30}
    assert not any("pair_kind" in record for record in read_records(job.inputs["data"] / "heldout.jsonl"))


def test_held_out_pairs_that_are_all_equal_are_refused(tmp_path: Path) -> None:
    ties = [{**record, "margins": dict.fromkeys(TWO, 0.0)} for record in pairs(range(60, 80))]
    with pytest.raises(UserError, match="stages.stage.heldout: no held-out pair has a better answer"):
        reward_job(tmp_path, STAGE, {"pairs": pairs(range(30)), "held_pairs": ties})


def test_sampled_pairs_are_labelled_where_the_stage_has_more_than_correctness(tmp_path: Path) -> None:
    stages: dict[str, dict[str, Any]] = {
        "plain": {},
        "several": {"dimensions": ["style", "correctness"]},
        "scaled": {"margin_scale": 1.0},
        "paced": {"curriculum": {}},
    }
    plain, several, scaled, paced = (
        read_records(make_job(tmp_path / name, {**REWARD, **changes}).inputs["data"] / "records.jsonl")
        for name, changes in stages.items()
    )
    assert not any("margins" in record or "success_rate" in record for record in plain)
    assert all(record["margins"] == {"correctness": 1.0} for record in several + scaled)
    # An untrained model answers nothing rightly.
    assert all(record["success_rate"] == 0.0 and "margins" not in record for record in paced)
    job = make_job(tmp_path / "plain", REWARD)
    job.config.stages["stage"] = RewardStage.model_validate({**REWARD, "dimensions": ["style"]})
    with pytest.raises(UserError, match="stages.stage.dimensions: .*no dimension 'correctness'"):
        run.prepare(job, tmp_path / "refused")

"""Data of stages: what is sampled, kept, dropped and refused. A scripted engine stands for the model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from posttrain.config.errors import UserError
from posttrain.config.reward_schema import RewardSection
from posttrain.data.encode import encode_pair
from posttrain.data.tokenizer import load_tokenizer
from posttrain.reward.guards.provenance import folder_hash
from posttrain.reward.types import LevelScore, Sample
from posttrain.rollout.types import LogprobSemantics, RolloutEngine, RolloutOutput, RolloutRequest, WeightSource
from posttrain.stages import engines, run
from posttrain.stages.files import read_json, read_records
from posttrain.stages.job import StageJob
from posttrain.stages.rewards import load_reward
from posttrain.stages.sampling import FOREIGN, answer_text, as_sample, require_prompts
from tests.stages.tasks import DPO, REWARD, RL, SAMPLING, SFT, make_job

Script = Callable[[str, int], str]


def scripted(job: StageJob, script: Script, finish: bool = True) -> Callable[..., RolloutEngine]:
    """An engine whose sample n to the prompt "a+b" is `script("a+b", n)`."""
    tokenizer = load_tokenizer(job.inputs["init"])

    class Engine:
        logprob_semantics: LogprobSemantics = "processed"
        weight_version = 0

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def generate(self, requests: Sequence[RolloutRequest]) -> list[RolloutOutput]:
            outputs = []
            for request in requests:
                question = str(tokenizer.decode(list(request.prompt_ids))).split("name=user\n")[1].split("<")[0].split("\n")[0]
                ids = tokenizer(script(question, int(request.request_id.split("-")[1])), add_special_tokens=False)["input_ids"]
                tokens = (*ids, tokenizer.eos_token_id) if finish else tuple(ids)
                count = len(tokens)
                outputs.append(
                    RolloutOutput(request.request_id, tokens, (0.0,) * count, (0,) * count, "stop" if finish else "length")
                )
            return outputs

        def update_weights(self, source: WeightSource) -> None: ...
        def cancel(self, request_ids: Iterable[str]) -> None: ...
        def close(self) -> None: ...

    return Engine


def solve(question: str) -> int:
    first, second = question.split("+")
    return int(first) + int(second)


def prepared(
    tmp_path: Path,
    stage: dict[str, Any],
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
    finish: bool = True,
    sources: dict[str, Any] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any], Path]:
    job = make_job(tmp_path / "made", SFT if stage["kind"] != "rl" else RL)
    job = StageJob(job.name, _with(job, stage, sources or {}), job.folder, job.inputs, job.metrics_path)
    monkeypatch.setattr(engines, "EmbeddedEngine", scripted(job, script, finish))
    folder = tmp_path / "prepared"
    run.prepare(job, folder)
    return read_records(folder / "records.jsonl"), read_json(folder / "stats.json"), folder


def _with(job: StageJob, stage: dict[str, Any], sources: dict[str, Any]) -> Any:
    config = job.config.model_dump()
    return type(job.config).model_validate({**config, "sources": {**config["sources"], **sources}, "stages": {job.name: stage}})


def test_rejection_sampling_keeps_distinct_right_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = {**SFT, "sampling": {**SAMPLING, "num_prompts": 10}, "demonstrations": False}
    answers = ["{0}", "{0}", " {0}", "no"]
    records, stats, _ = prepared(tmp_path, stage, lambda q, n: answers[n].format(solve(q)), monkeypatch)
    assert len(records) == 20, "two distinct right texts of each of ten prompts"
    assert all(record["completion"][0]["content"].strip() == record["answer"] for record in records)
    assert stats["prompts_sampled"] == 10 and stats["answers_drawn"] == 40 and stats["answers_accepted"] == 20
    assert stats["seconds"] > 0


def test_an_answer_that_was_cut_off_is_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = {**SFT, "sampling": SAMPLING}
    records, stats, _ = prepared(tmp_path, stage, lambda q, _: str(solve(q)), monkeypatch, finish=False)
    assert len(records) == 60 and stats["answers_accepted"] == 0


def test_nothing_left_to_train_on_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = {**SFT, "sampling": SAMPLING, "demonstrations": False}
    with pytest.raises(UserError, match="no usable records of sums/train .*answers_accepted 0"):
        prepared(tmp_path, stage, lambda *_: "no", monkeypatch)


def test_documents_of_unfitting_length_are_dropped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything, _, _ = prepared(tmp_path / "all", SFT, lambda *_: "", monkeypatch)
    with pytest.raises(UserError, match="too_long 60"):
        prepared(tmp_path / "none", {**SFT, "max_length": 3}, lambda *_: "", monkeypatch)
    assert len(everything) == 60


def open_source(folder: Path, constraints: list[dict[str, Any]] | None) -> dict[str, Any]:
    """A source of prompts that no verifier belongs to."""
    extra = {} if constraints is None else {"constraints": json.dumps(constraints)}
    lines = [json.dumps({"prompt": f"{a}+{b}", **extra}) + "\n" for a in range(4) for b in range(5)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open.jsonl").write_text("".join(lines))
    return {"open": {"kind": "jsonl", "path": str(folder / "open.jsonl"), "splits": {"train": 12}}}


OPEN = {**SFT, "data": {"open/train": 1.0}, "sampling": SAMPLING, "demonstrations": False}


def test_open_prompts_keep_the_best_of_n_by_the_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = open_source(tmp_path, [{"rule": "punctuation:no_comma"}, {"rule": "keywords:existence", "keywords": ["b"]}])
    answers = ["a,a", "b,b", "b", "a"]
    records, stats, _ = prepared(tmp_path, OPEN, lambda _, n: answers[n], monkeypatch, sources=sources)
    assert [record["completion"][0]["content"] for record in records] == ["b"] * 12
    assert stats["answers_accepted"] == 12


def test_open_prompts_that_nothing_scores_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="nothing scores an answer to a record without a verifier; give it a field"):
        prepared(tmp_path, OPEN, lambda *_: "a", monkeypatch, sources=open_source(tmp_path, None))


def test_a_reward_model_may_choose_among_answers_to_open_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = {**OPEN, "reward": {"model": "judge"}}
    answers = ["7", "12", "9", "3"]
    records, _, _ = prepared(tmp_path, stage, lambda _, n: answers[n], monkeypatch, sources=open_source(tmp_path, None))
    learned = load_reward(tmp_path / "made" / "judge", RewardSection(model="judge"))
    for record in records:
        scored = learned.score([as_sample(record, text) for text in answers])
        best = max(range(4), key=lambda n: scored[n].total)
        assert record["completion"][0]["content"] == answers[best]
    note = read_json(tmp_path / "made" / "stages" / "stage" / "reward.json")
    assert note["model"] == folder_hash(tmp_path / "made" / "judge") and note["section"]["model"] == "judge"


JUDGES = {"manners": {"kind": "constitution", "dimension": "harmlessness", "url": "http://127.0.0.1:1/v1", "model": "none"}}


class Manners:
    """A judge of harmlessness: even numbers are harmless, odd ones are not, and of 8 it has no opinion."""

    name, dimension = "judge:manners", "harmlessness"

    def judge(self, samples: Sequence[Sample]) -> list[LevelScore]:
        return [LevelScore(self.name, self._score(sample.answer), 0.0, 0.0) for sample in samples]

    def _score(self, answer: str) -> float | None:
        return None if answer == "8" else float(answer.isdigit() and int(answer) % 2 == 0)


@pytest.fixture
def manners(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.reward.judges.build_judges", lambda sections: [Manners() for _ in sections])


def test_right_answers_that_a_gate_stops_are_not_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manners: None
) -> None:
    gated = {"judges": JUDGES, "gates": {"harmlessness": 0.5}, "no_verdict": "drop"}
    stage = {**SFT, "sampling": SAMPLING, "demonstrations": False, "reward": gated}
    records, stats, _ = prepared(tmp_path, stage, lambda q, _: str(solve(q)), monkeypatch)
    accepted = {int(record["answer"]) for record in records}
    assert accepted and all(number % 2 == 0 and number != 8 for number in accepted)
    everything, _, _ = prepared(tmp_path / "all", SFT, lambda *_: "", monkeypatch)
    eights = sum(record["answer"] == "8" for record in everything)
    assert stats["no_verdict"] == 4 * eights > 0 and stats["stopped_by_gate"] > 0


def test_pairs_leave_out_answers_without_a_verdict_and_say_how_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manners: None
) -> None:
    stage = {**DPO, "data": {"sums/train": 1.0}, "sampling": SAMPLING, "reward": {"judges": JUDGES, "no_verdict": "drop"}}
    records, stats, _ = prepared(tmp_path, stage, lambda q, n: ["8", "8", "x", str(solve(q))][n], monkeypatch)
    assert stats["no_verdict"] >= 2 * 60
    assert {record["rejected"][0]["content"] for record in records} == {"x"}
    assert "8" not in {record["chosen"][0]["content"] for record in records}
    everything, counted, _ = prepared(
        tmp_path / "kept", {**stage, "reward": {"judges": JUDGES}}, lambda q, n: ["8", "8", "x", str(solve(q))][n], monkeypatch
    )
    assert "no_verdict" not in counted and len(everything) >= len(records)


def test_an_answer_that_a_gate_stops_is_never_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manners: None) -> None:
    """Demonstrations compete with samples that were cut off; a stopped one ties with an open wrong one."""
    gated = {"judges": JUDGES, "gates": {"harmlessness": 0.5}, "learned_weight": 0.0}
    stage = {**DPO, "data": {"sums/train": 1.0}, "sampling": SAMPLING, "demonstrations": True, "min_margin": 0.0, "reward": gated}
    records, stats, _ = prepared(tmp_path, stage, lambda *_: "20", monkeypatch, finish=False)
    assert len(records) + stats["margin_too_small"] == 60 and records
    assert all(int(record["chosen"][0]["content"]) % 2 == 0 for record in records)


def test_preference_pairs_are_best_against_worst(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = {**DPO, "data": {"sums/train": 1.0}, "sampling": SAMPLING}

    def script(question: str, number: int) -> str:
        if solve(question) % 2:
            return "no"  # all alike: no pair
        return [str(solve(question)), "x", "y", "z"][number]

    records, stats, _ = prepared(tmp_path, stage, script, monkeypatch)
    assert len(records) + stats["margin_too_small"] == 60
    for record in records:
        assert record["chosen"][0]["content"] == record["answer"] and record["rejected"][0]["content"] == "x"
        assert record["margin"] == 1.0 and "completion" not in record


def test_a_demonstration_competes_where_all_samples_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = {**DPO, "data": {"sums/train": 1.0}, "sampling": SAMPLING, "demonstrations": True}

    def script(question: str, number: int) -> str:
        return str(solve(question)) if solve(question) % 2 else "no"

    records, stats, _ = prepared(tmp_path, stage, script, monkeypatch)
    assert len(records) + stats["margin_too_small"] == 60 and all(int(record["answer"]) % 2 == 0 for record in records)
    assert {record["rejected"][0]["content"] for record in records} == {"no"}
    assert all(record["chosen"][0]["content"] == record["answer"] and "completion" not in record for record in records)


def test_reward_pairs_set_right_against_wrong_and_borrow_a_neighbours_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def script(question: str, number: int) -> str:
        return str(solve(question)) if solve(question) > 9 else ["a", "b", "a", str(solve(question))][number]

    records, stats, folder = prepared(tmp_path, REWARD, script, monkeypatch)
    easy = [record for record in records if int(record["answer"]) > 9]
    hard = [record for record in records if int(record["answer"]) <= 9]
    assert all(record["chosen"][0]["content"] == record["answer"] != record["rejected"][0]["content"] for record in records)
    assert all(record["rejected"][0]["content"].isdigit() for record in easy) and stats["answers_of_neighbours"] == len(easy)
    assert {record["rejected"][0]["content"] for record in hard} == {"a", "b"}
    heldout = read_records(folder / "heldout.jsonl")
    prompts = [record["prompt"][0]["content"] for record in heldout]
    assert len(heldout) == 10 == len(set(prompts))
    assert not set(prompts) & {record["prompt"][0]["content"] for record in records}


def test_too_few_heldout_pairs_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="24 held-out pairs of sums/rl could be made, 30 are asked for"):
        prepared(tmp_path, {**REWARD, "heldout_pairs": 30}, lambda q, n: str(n), monkeypatch)


def test_heldout_pairs_keep_to_the_weights_and_are_not_bounded_by_num_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = {**REWARD, "heldout": {"sums/rl": 3.0, "sums/test": 1.0}, "heldout_pairs": 12}
    stage |= {"sampling": {**SAMPLING, "num_prompts": 5}}
    records, stats, folder = prepared(tmp_path, stage, lambda q, n: ["x", str(solve(q))][n % 2], monkeypatch)
    heldout = read_records(folder / "heldout.jsonl")
    assert Counter(record["source"] for record in heldout) == {"sums/rl": 9, "sums/test": 3}
    assert len({record["prompt"][0]["content"] for record in heldout}) == 12
    assert stats["prompts_sampled"] == 5 == len({record["prompt"][0]["content"] for record in records})


def test_shortest_length_holds_for_reward_pairs_and_rl_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = {**REWARD, "heldout_pairs": 4}
    tokenizer = load_tokenizer(make_job(tmp_path / "any" / "made", SFT).inputs["init"])

    def lengths(records: list[dict[str, Any]]) -> list[int]:
        return [max(map(len, encode_pair(tokenizer, record))) for record in records]

    def script(question: str, _: int) -> str:
        return "xxx" if solve(question) % 4 else "x"

    records, _, _ = prepared(tmp_path / "any", stage, script, monkeypatch)
    longest = max(lengths(records))
    assert min(lengths(records)) < longest
    records, stats, folder = prepared(tmp_path / "long", {**stage, "min_length": longest}, script, monkeypatch)
    assert set(lengths(records + read_records(folder / "heldout.jsonl"))) == {longest} and stats["too_short"] > 0
    with pytest.raises(UserError, match="'sums/rl' has no documents left.*min_length"):
        prepared(tmp_path / "rl", {**RL, "min_length": 64}, lambda *_: "", monkeypatch)


def test_prompts_that_leave_no_room_for_an_answer_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="prompt_too_long 60.* too_long 60"):
        prepared(tmp_path, {**SFT, "max_length": 8, "sampling": SAMPLING}, lambda *_: "", monkeypatch)


def test_rl_prompts_come_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records, _, _ = prepared(tmp_path / "few", RL, lambda *_: "", monkeypatch)
    prompts = [record["prompt"][0]["content"] for record in records]
    assert len(prompts) == 16 == len(set(prompts))
    with pytest.raises(UserError, match="28 prompts of sums/rl are needed, it has 24"):
        prepared(tmp_path / "many", {**RL, "steps": 7}, lambda *_: "", monkeypatch)


def test_a_special_token_inside_an_answer_is_shown(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_job(tmp_path, SFT).inputs["init"])
    (seven,) = tokenizer("7", add_special_tokens=False)["input_ids"]
    assert answer_text(tokenizer, [seven, tokenizer.eos_token_id]) == "7"
    assert answer_text(tokenizer, [tokenizer.bos_token_id, seven, tokenizer.eos_token_id]) == FOREIGN + "7"
    assert answer_text(tokenizer, []) == ""
    spelled = [token for text in ("<end_of", "_sentence>") for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert answer_text(tokenizer, [*spelled, seven]) == FOREIGN + "7"


def test_records_without_a_prompt_cannot_be_answered() -> None:
    with pytest.raises(UserError, match="chats/train: a record has no prompt"):
        require_prompts([{"prompt": []}, {"messages": []}], "chats/train")

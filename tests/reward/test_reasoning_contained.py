"""Tasks of reasoning-gym whose scorers evaluate text: all are known, hostile answers score 0, honest ones as in the library."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from posttrain.config.errors import UserError
from posttrain.config.tasks import quick_names
from posttrain.data.reasoning import entry_from_json, entry_to_json, generate
from posttrain.reward.types import LevelScore, Sample
from posttrain.reward.verifiers import is_right, verify
from posttrain.reward.verifiers import reasoning_contained as contained
from posttrain.reward.verifiers.reasoning_contained import EVALUATED_RECORDS, EVALUATING, Evaluates, refusal
from posttrain.sandbox import running

needs_sandbox = pytest.mark.skipif(running.available() is not None, reason=f"no sandbox: {running.available()}")

_EVALUATES = re.compile(
    r"(?<![.\w])(?:eval|exec|sympify|parse_expr|S)\s*\(|\.(?:sympify|parse_expr|eval)\s*\(|\bpickle\.|yaml\.(?:unsafe_)?load\s*\("
)
_OWN_TEXTS = {
    "arithmetic/basic_arithmetic.py",  # what it generated
    "arithmetic/gsm_symbolic/generators_00_49.py",
    "arithmetic/gsm_symbolic/generators_50_99.py",
    "code/codeio.py",  # programs of the package, where a problem is made
    "logic/propositional_logic.py",  # its own parse_expr, which splits text
}


def generated(task: str, answer: str | None = None) -> Sample:
    record = next(generate(task, {}, seed=1))
    return Sample(record["prompt"], record["answer"] if answer is None else answer, record)


def evidence_of(level: LevelScore) -> str:
    return level.evidence["reason"]


def test_every_task_that_evaluates_is_known() -> None:
    import reasoning_gym

    folder = Path(reasoning_gym.__file__).parent
    found = {
        str(file.relative_to(folder)) for file in folder.rglob("*.py") if _EVALUATES.search(file.read_text(encoding="utf-8"))
    }
    known = {str(quick_names()[task].relative_to(folder)) for task in (*EVALUATING, *EVALUATED_RECORDS)}
    assert known <= found, "these evaluate nothing any more"
    assert found - known == _OWN_TEXTS, "look at what these evaluate, and add their tasks to EVALUATING where it is the answer"


@pytest.mark.parametrize("task", ["n_queens", "countdown"])
@pytest.mark.parametrize(
    "answer",
    [
        "__import__('os').system('touch {}')",
        "exit()",
        "exit ()",
        "(exit)()",
        "[exit][0]()",
        "(lambda: 0)()",
        "[f'{open(1)}']",
        "(exit #\n())",
        "exit\\\n()",
        " exit()",
        "ｅxit()",
        "\U0001d4aexit()",
    ],
)
def test_calls_are_refused_before_anything_is_evaluated(task: str, answer: str) -> None:
    reason = refusal(answer, EVALUATING[task])
    assert reason is not None


@pytest.mark.parametrize(
    "answer",
    ["sin('9')", "x.y", "sin(__doc__[0])", "sin(x.__doc__)", "chr(40)", "eval(x)", "xsin(2)", "x.sin(2)", "sin(2)(3)", "π(2)"],
)
def test_formulas_hold_no_text_and_only_known_functions(answer: str) -> None:
    assert refusal(answer, Evaluates.FORMULA) is not None


@pytest.mark.parametrize(
    "answer", ["(1+2)*3", "((4) - 2)**2 / 1.5", "x**2*sin(x) + C_1", "exp (2*x)/2", "-(x)", "5!", "sqrt(2)", "", "7"]
)
def test_honest_formulas_are_not_refused(answer: str) -> None:
    assert refusal(answer, Evaluates.FORMULA) is None


@pytest.mark.parametrize("text", [" ", "a", "\n ", "x ", ".", "sin("])
def test_long_monotonous_answers_are_read_quickly(text: str) -> None:
    began = time.process_time()
    for evaluates in Evaluates:
        refusal(text * (60_000 // len(text)) + "x", evaluates)
    assert time.process_time() - began < 2


@pytest.mark.parametrize("answer", ["[[1, 2], [3, 4]]", "['A', 'B']", "((1, 2), (3,))", "0 1\n1 0", "no list"])
def test_honest_values_are_not_refused(answer: str) -> None:
    assert refusal(answer, Evaluates.VALUE) is None


@needs_sandbox
@pytest.mark.parametrize("task", ["n_queens", "simple_integration"])
def test_scores_equal_those_of_the_library(task: str) -> None:
    import reasoning_gym

    sample = generated(task)
    entry = entry_from_json(sample.reference["metadata"])
    board = repr([line.split() for line in sample.answer.splitlines()])
    scorer = reasoning_gym.create_dataset(task, seed=0, size=1).score_answer
    for answer in (sample.answer, board, "7"):
        level = verify(Sample(sample.prompt, answer, sample.reference))
        assert level.score == scorer(answer, entry)
        assert is_right(level) is (answer == sample.answer)


@needs_sandbox
@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(EVALUATING))
def test_every_task_starts_in_the_sandbox_and_knows_its_own_answer(task: str) -> None:
    assert is_right(verify(generated(task)))


@needs_sandbox
def test_a_hostile_answer_scores_0_and_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    level = verify(generated("binary_matrix", f"[[open({str(mark)!r}, 'w')]]"))
    assert level.score == 0.0 and evidence_of(level) == "the answer calls something" and not mark.exists()


@needs_sandbox
def test_an_answer_that_takes_for_ever_scores_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contained, "SCORING_SECONDS", 0.5)
    level = verify(generated("countdown", "9**9**9**9"))
    assert level.score == 0.0 and evidence_of(level) == "takes more than 0.5 s of processor time"


def test_without_a_sandbox_nothing_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "available", lambda: "no namespaces")
    with pytest.raises(UserError, match="scoring task 'countdown' evaluates the answer, as a formula.*; no namespaces"):
        verify(generated("countdown"))
    assert is_right(verify(generated("number_sorting")))


def test_composite_does_not_hide_the_task_within() -> None:
    entry = entry_from_json(generated("countdown").reference["metadata"])
    hidden: dict[str, Any] = entry | {"task": "composite", "params": {"datasets": [{"name": "countdown", "config": {}}]}}
    reference = {"verifier": "reasoning_gym", "metadata": entry_to_json(hidden)}
    level = verify(Sample([{"role": "user", "content": "q"}], "exit()", reference))
    assert level.score == 0.0 and "mathematical function" in evidence_of(level)


@pytest.mark.parametrize("task", sorted(EVALUATED_RECORDS))
def test_records_that_want_to_run_a_program_are_refused(task: str) -> None:
    sample = generated(task)
    assert is_right(verify(sample))
    entry = json.loads(sample.reference["metadata"])
    entry["answer"] = entry["metadata"]["problem"] = "[exit()]"
    reference = {**sample.reference, "metadata": json.dumps(entry)}
    with pytest.raises(UserError, match="calls something where its scorer evaluates it"):
        verify(Sample(sample.prompt, "[1]", reference))


def test_a_number_that_would_take_all_memory_is_refused() -> None:
    assert evidence_of(verify(generated("coin_flip", "1e999_999_999"))) == "the answer names a huge number"
    assert is_right(verify(generated("coin_flip")))

"""Generated graded answers: texts say what their labels say, judged by a reader that knows nothing of how they were written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import islice
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.config import UserError
from posttrain.config.checks import check
from posttrain.config.dimensions import ATTRIBUTES, DIMENSIONS, TARGETS
from posttrain.config.schema import RunConfig
from posttrain.data.encode import encode_answer, encode_prompt
from posttrain.data.formats import normalise, prompt_key
from posttrain.data.graded.answers import Traits, draw_details, grade, margins, write
from posttrain.data.graded.generate import Emitted, generate_graded
from posttrain.data.graded.worked import far_number, is_near, near_number, take_apart
from posttrain.data.sources import load_split
from posttrain.data.tokenizer import train_tokenizer
from posttrain.reward.types import Sample
from posttrain.reward.verifiers import is_right, verify

SUMS = {"min_terms": 3, "max_terms": 5, "min_digits": 1, "max_digits": 1, "operators": ["+"], "allow_parentheses": False}
KINDS = {"contrastive": 0.3, "single": 0.4, "near_tie": 0.15, "adversarial": 0.15}
STEP = re.compile(r"(-?\d+)([+-])(-?\d+)=(-?\d+)")


def records(emit: Emitted, number: int, kinds: dict[str, float] = KINDS, task: str = "basic_arithmetic") -> list[dict[str, Any]]:
    params = SUMS if task == "basic_arithmetic" else {"min_terms": 3, "max_terms": 4, "min_digits": 1, "max_digits": 2}
    return list(islice(generate_graded(task, params, 0, emit, kinds), number))


def text(record: dict[str, Any], field: str) -> str:
    return record[field][0]["content"]


def read(record: dict[str, Any], answer: str) -> dict[str, float]:
    """Grades of a text, read from the text and the question alone; the independent judge of these tests."""
    expression = re.search(r"-?\d+(?: [+-] -?\d+)+", record["prompt"][0]["content"])
    assert expression
    right = eval(expression.group())  # of our own generator: digits, signs and spaces
    loud = answer == answer.upper() and answer.startswith("HEY!!! ")
    low = answer.lower()
    number = re.search(r"answer: (-?\d+)", low)
    given = int(number.group(1)) if number else None
    correctness = 0.0 if given is None else 1.0 if given == right else 0.5 if _near(given, right) else 0.0
    steps = [(int(a), op, int(b), int(c)) for a, op, b, c in STEP.findall(answer)]
    refuses = number is None
    first, *terms = re.findall(r"[+-] -?\d+|-?\d+", expression.group())
    wanted = Counter((term[0], int(term[2:])) for term in terms)
    own = Counter((op, b) for _, op, b, _ in steps) == wanted
    starts_right = not steps or any(a == int(first) for a, _, _, _ in steps)
    chained = all(after[0] == before[3] for before, after in zip(steps, steps[1:], strict=False))
    # False steps out of order may chain by chance (14-2=9, 9+5=14), but then not from the first term on.
    ordered = chained and (not own or not steps or steps[0][0] == int(first))
    chats = any(said in low for said in ("tea", "rain", "asleep"))
    padded = any(said in low for said in ("let me see", "at last", "step by step"))
    harmful = any(said in low for said in ("fool", "stupid", "drunk", "skip your"))
    grades = {
        "correctness": correctness,
        "coherence": float(ordered),
        "depth": float(bool(steps)),
        "relevance": 0.0 if refuses or not (own and starts_right) and steps else 0.5 if chats else 1.0,
        "style": float(not (loud or padded)),
        "harmlessness": float(not harmful),
    }
    grades["helpfulness"] = 0.0 if refuses else sum(grades[name] for name in ATTRIBUTES) / 4
    if steps:
        grades["truthfulness"] = float(all((a + b if op == "+" else a - b) == c for a, op, b, c in steps))
    return grades


def _near(number: int, right: int) -> bool:
    same = len(str(number)) == len(str(right)) and sum(a != b for a, b in zip(str(number), str(right), strict=True)) == 1
    return abs(number - right) == 1 or same


@pytest.mark.parametrize("task", ["basic_arithmetic", "chain_sum"])
def test_grades_can_be_read_off_the_text(task: str) -> None:
    for record in records("grades", 300, task=task):
        assert record["grades"] == read(record, text(record, "completion")), text(record, "completion")


@pytest.mark.parametrize("task", ["basic_arithmetic", "chain_sum"])
def test_margins_can_be_read_off_the_two_texts(task: str) -> None:
    for record in records("pairs", 500, task=task):
        better, worse = (read(record, text(record, field)) for field in ("chosen", "rejected"))
        leads = {target: better.get(target, 1.0) - worse.get(target, 1.0) for target in TARGETS}
        assert record["margins"] == {target: lead for target, lead in leads.items() if lead >= 0}, record
        assert any(record["margins"].values())
        missing = set(TARGETS) - set(record["margins"])
        assert not missing or record["pair_kind"] == "adversarial:harmful_help"


def test_a_demonstration_is_right_and_works_every_step() -> None:
    record = next(generate_graded("basic_arithmetic", SUMS | {"max_terms": 3}, 3, "demonstrations", KINDS))
    a, b, c = (int(n) for n in re.findall(r"\d+", record["prompt"][0]["content"]))
    assert text(record, "completion") == f"{a}+{b}={a + b}, {a + b}+{c}={a + b + c}. Answer: {a + b + c}"
    for record in records("demonstrations", 300):
        assert set(read(record, text(record, "completion")).values()) == {1.0}


def test_the_verifier_reads_the_answers() -> None:
    graded = records("grades", 60) + records("grades", 40, task="chain_sum")
    for record in graded + records("demonstrations", 20):
        sample = Sample(record["prompt"], text(record, "completion"), record)
        right = record.get("grades", {"correctness": 1.0})["correctness"] == 1.0
        assert is_right(verify(sample)) == right, sample.answer


def test_single_pairs_differ_in_one_dimension_or_attribute_alone() -> None:
    found = Counter[str]()
    for record in records("pairs", 600, {"single": 1.0}):
        kind, target = record["pair_kind"].split(":")
        found[target] += 1
        led = {name for name, margin in record["margins"].items() if margin}
        assert kind == "single" and {name for name in led if name in DIMENSIONS} == {
            "helpfulness" if target in ATTRIBUTES else target
        }
        if target in ATTRIBUTES:
            assert led == {target, "helpfulness"}
            assert record["margins"]["helpfulness"] == record["margins"][target] / 4
        elif target == "helpfulness":
            assert len(led) >= 3  # itself and several attributes
        else:
            assert led == {target}
    # Eight targets of equal chance: 75 each, within 5 standard deviations of sqrt(600 * 1/8 * 7/8) = 8.1.
    assert set(found) == set(TARGETS) and all(abs(number - 75) < 41 for number in found.values())


def test_kinds_of_pairs_keep_to_their_definitions() -> None:
    kinds = Counter[str]()
    for record in records("pairs", 1000):
        kind, led = record["pair_kind"], record["margins"]
        kinds[kind] += 1
        better, worse = text(record, "chosen"), text(record, "rejected")
        assert better != worse
        if kind == "contrastive":
            assert led["correctness"] == 1.0 and sum(led[name] > 0 for name in DIMENSIONS) >= 3
        elif kind == "near_tie":
            assert led["correctness"] == 0.5
        elif kind == "adversarial:longer":
            assert len(worse) > len(better) + 40 and worse.endswith(better[-10:])
        elif kind == "adversarial:confident_wrong":
            assert "I am certain." in worse.replace("CERTAIN", "certain").replace("I AM", "I am") or "I AM CERTAIN" in worse
            assert led["correctness"] == 1.0
        elif kind == "adversarial:wrong_reason":
            assert {name for name in led if led[name]} == {"truthfulness"}
        elif kind == "adversarial:refusal":
            assert led["harmlessness"] == 0 and led["helpfulness"] > 0 and led["correctness"] == 1.0
        elif kind == "adversarial:harmful_help":
            assert led["harmlessness"] == 1.0 and not {"correctness", "helpfulness", "relevance"} & set(led)
    families = Counter(kind.split(":")[0] for kind in kinds.elements())
    for family, weight in KINDS.items():  # 5 standard deviations of a binomial
        assert abs(families[family] / 1000 - weight) < 5 * (weight * (1 - weight) / 1000) ** 0.5
    assert len([kind for kind in kinds if kind.startswith("adversarial:")]) == 5


def test_length_alone_does_not_tell_the_better_answer() -> None:
    lengths = [(len(text(r, "chosen")), len(text(r, "rejected"))) for r in records("pairs", 800)]
    unequal = [better > worse for better, worse in lengths if better != worse]
    assert 0.3 < sum(unequal) / len(unequal) < 0.6


def test_records_pass_through_normalise_unchanged() -> None:
    for emit in ("pairs", "grades", "demonstrations"):
        for record in records(emit, 50):
            assert normalise(json.loads(json.dumps(record))) == record


def test_a_pair_s_kind_must_be_text() -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "pair_kind": "near_tie"}
    assert normalise(pair)["pair_kind"] == "near_tie"
    assert "pair_kind" not in normalise({"prompt": "q", "completion": "a", "pair_kind": "near_tie"})
    with pytest.raises(UserError, match="'pair_kind' is a number"):
        normalise(pair | {"pair_kind": 3})


def test_sums_of_three_terms_fit_96_tokens_of_a_small_vocabulary() -> None:
    params = SUMS | {"max_terms": 3}
    made = [
        record
        for emit in ("pairs", "grades", "demonstrations")
        for record in islice(generate_graded("basic_arithmetic", params, 0, emit, KINDS), 300)
    ]
    fields = [field for field in ("prompt", "chosen", "rejected", "completion")]
    tokenizer = train_tokenizer((text(r, field) for r in made for field in fields if field in r), 512)
    longest = max(
        len(encode_prompt(tokenizer, r["prompt"])) + len(encode_answer(tokenizer, text(r, field)))
        for r in made
        for field in fields[1:]
        if field in r
    )
    assert longest < 96


def test_records_are_the_same_in_every_process() -> None:
    code = (
        "import json, sys; from itertools import islice; from posttrain.data.graded.generate import generate_graded; "
        "sums, kinds = json.loads(sys.argv[1]); "
        "print(json.dumps([list(islice(generate_graded('basic_arithmetic', sums, 0, emit, kinds), 40)) "
        "for emit in ('pairs', 'grades', 'demonstrations')]))"
    )
    command = [sys.executable, "-c", code, json.dumps([SUMS, dict(reversed(KINDS.items()))])]
    made = json.loads(subprocess.check_output(command, env=os.environ | {"PYTHONHASHSEED": "1"}, text=True))
    assert made == [records(emit, 40) for emit in ("pairs", "grades", "demonstrations")]


@given(first=st.integers(-99, 99), rest=st.lists(st.tuples(st.sampled_from("+-"), st.integers(0, 99)), min_size=2, max_size=5))
def test_steps_end_at_the_answer(first: int, rest: list[tuple[str, int]]) -> None:
    expression = str(first) + "".join(f" {sign} {term}" for sign, term in rest)
    problem = take_apart("q", expression)
    assert problem == take_apart("q", expression.replace(" ", ""))
    assert problem.answer == eval(expression)
    for step in problem.steps(problem.totals):
        left, _, right = step.partition("=")
        assert eval(left) == int(right)


@settings(max_examples=300)
@given(right=st.integers(-999, 9999), seed=st.integers(0, 1000))
def test_near_and_far_numbers_are_wrong_and_of_the_same_sign(right: int, seed: int) -> None:
    near, far = near_number(right, Random(seed)), far_number(right, Random(seed))
    assert is_near(near, right) and _near(near, right)
    assert far != right and not is_near(far, right) and (far >= 0) == (right >= 0)
    assert right < 0 or near >= 0


@given(seed=st.integers(0, 10_000))
def test_texts_follow_from_traits_alone(seed: int) -> None:
    problem, neighbour = take_apart("q", "3 + 4 + 8"), take_apart("r", "20 + 20 + 9")
    details = draw_details(problem, neighbour, Random(seed))
    assert write(problem, Traits(), details) == "3+4=7, 7+8=15. Answer: 15"
    assert write(problem, Traits(shown=False), details) == "Answer: 15"
    assert write(problem, Traits(ordered=False, style="shouting"), details) == "HEY!!! 7+8=15, 3+4=7. ANSWER: 15"
    assert write(problem, Traits(subject="neighbour", final="wrong"), details) == "20+20=40, 40+9=49. Answer: 49"
    false = write(problem, Traits(true_steps=False), details)
    total = 7 + details.slip
    assert false == f"3+4={total}, {total}+8=15. Answer: 15"
    wrong = write(problem, Traits(final="wrong", true_steps=False), details)
    assert wrong.endswith(f"={details.wrong}. Answer: {details.wrong}")


def test_impossible_traits_are_refused() -> None:
    for impossible in ({"shown": False, "ordered": False}, {"shown": False, "true_steps": False}, {"subject": "neighbour"}):
        with pytest.raises(ValueError):
            Traits(**impossible)


def test_a_refusal_is_harmless_and_does_not_help() -> None:
    refusal = grade(Traits(refuses=True, final="wrong", shown=False))
    assert refusal["harmlessness"] == 1.0 and refusal["helpfulness"] == 0.0 and refusal["correctness"] == 0.0
    assert "truthfulness" not in refusal
    assert margins(Traits(), Traits(refuses=True, final="wrong", shown=False))["helpfulness"] == 1.0


def config(**source: Any) -> RunConfig:
    pairs = {
        "kind": "graded_pairs",
        "task": "basic_arithmetic",
        "params": SUMS,
        "splits": {"train": 200, "heldout": 100},
    } | source
    sums = {"kind": "reasoning_gym", "task": "basic_arithmetic", "params": SUMS, "splits": {"test": 150}}
    return RunConfig.model_validate(
        {
            "name": "x",
            "sources": {"sums": sums, "pairs": pairs},
            "eval": {"source": "sums/test", "num_prompts": 10},
            "stages": {"sft": {"kind": "sft", "data": {"pairs": 1.0}, "steps": 1}},
        }
    )


def test_as_a_source_splits_are_disjoint_and_leave_out_held_out_prompts() -> None:
    run = config()
    check(run, on_this_machine=False)
    splits = [load_split(run, ref) for ref in ("pairs/train", "pairs/heldout", "sums/test")]
    keys = [{prompt_key(record) for record in split} for split in splits]
    assert [len(key) for key in keys] == [200, 100, 150] == [len(split) for split in splits]
    assert not keys[0] & keys[1] and not keys[2] & (keys[0] | keys[1])
    assert all("margins" in record for record in splits[0])
    assert all("grades" in record for record in load_split(config(emit="grades"), "pairs/train"))
    many = load_split(config(emit="demonstrations", shots=3, splits={"train": 20}), "pairs/train")
    assert [message["role"] for message in many[0]["prompt"]] == ["user", "assistant"] * 2 + ["user"]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({"task": "leg_counting", "params": {}}, "sources.pairs.task: no steps are known of task 'leg_counting'; write one of"),
        ({"pair_kinds": {"single": 0.0}}, "sources.pairs.pair_kinds: all weights are 0"),
        ({"format": "hh"}, "sources.pairs.format: 'format' means nothing for kind graded_pairs"),
        ({"splits": {}}, "sources.pairs.splits: a generator has no end"),
        (
            {"shots": 2},
            "sources.pairs.shots: pairs cannot be joined to conversations of 2 turns; write 1, or emit: demonstrations",
        ),
        (
            {"kind": "reasoning_gym", "emit": "pairs"},
            "'emit' means nothing for kind reasoning_gym (value 'pairs'); take it out, or",
        ),
    ],
)
def test_options_that_do_not_fit_are_named(source: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as refused:
        check(config(**source), on_this_machine=False)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("params", "says"),
    [
        (SUMS | {"operators": ["*"]}, "works sums of + and - in steps, not"),
        (SUMS | {"min_terms": 2, "max_terms": 2}, "has one step, which cannot be out of order; set min_terms: 3"),
    ],
)
def test_sums_that_cannot_be_worked_are_refused(params: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as refused:
        next(generate_graded("basic_arithmetic", params, 0, "pairs", KINDS, "here"))
    assert says in str(refused.value) and str(refused.value).startswith("here: ")


def test_unknown_tasks_and_empty_mixtures_are_refused() -> None:
    with pytest.raises(UserError, match="knows no steps of task 'gcd'"):
        next(generate_graded("gcd", {}, 0, "pairs", KINDS))
    with pytest.raises(UserError, match="no kind of pair has a weight above 0"):
        next(generate_graded("chain_sum", {}, 0, "pairs", {"single": 0.0}))

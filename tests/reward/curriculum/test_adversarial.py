"""Adversarial pairs keep what is true about the pair they are made from, and claim nothing that is not known."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.formats import normalise
from posttrain.reward.curriculum import adversarial_pairs, buckets

Record = dict[str, Any]
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=40)


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def pair(better: str = "4", worse: str = "5", number: int = 0, **fields: Any) -> Record:
    prompt = [{"role": "user", "content": f"2+2? ({number})"}]
    return {"prompt": prompt, "chosen": said(better), "rejected": said(worse), "source": "s", **fields}


PAIRS = st.lists(
    st.builds(
        lambda better, worse, fields: pair(better, worse, **fields),
        TEXT,
        TEXT,
        st.fixed_dictionaries(
            {},
            optional={
                "margins": st.dictionaries(
                    st.sampled_from(["correctness", "harmlessness", "style", "helpfulness", "depth"]),
                    st.sampled_from([0.0, 0.5, 1.0]),
                ),
                "verifier": st.just("exact"),
                "disagreement": st.just(0.5),
                "pair_kind": st.sampled_from(["contrastive", "adversarial:longer"]),
            },
        ),
    ),
    max_size=12,
)


@given(PAIRS, st.floats(0, 1), st.integers(0, 3))
def test_new_pairs_are_few_enough_noted_and_a_function_of_the_seed(pairs: list[Record], share: float, seed: int) -> None:
    before = copy.deepcopy(pairs)
    made = adversarial_pairs(pairs, share, seed)
    assert pairs == before and made == adversarial_pairs(pairs, share, seed)
    assert len(made) <= round(share * len(pairs))
    assert set(buckets(made, [0.5] * len(made))) <= {"adversarial"}
    for record in made:
        assert record["pair_kind"] in ("adversarial:longer", "adversarial:confident", "adversarial:refusal")
        assert record["chosen"] != record["rejected"] and "disagreement" not in record
        # Any reader of pairs takes them.
        assert normalise(record)["rejected"] == record["rejected"]
        origin = [p for p in pairs if p["chosen"] == record["chosen"] and p.get("verifier") == record.get("verifier")]
        assert origin and all(p["prompt"] == record["prompt"] for p in origin)


@given(PAIRS, st.integers(0, 3))
def test_no_pair_claims_what_is_not_known(pairs: list[Record], seed: int) -> None:
    numbered = [{**p, "prompt": [{"role": "user", "content": str(i)}]} for i, p in enumerate(pairs)]
    for record in adversarial_pairs(numbered, 1.0, seed):
        origin = numbered[int(record["prompt"][0]["content"])]
        known = origin.get("margins") or ({"correctness": 1.0} if origin.get("verifier") else {})
        if record["pair_kind"] == "adversarial:longer":
            assert origin["chosen"][0]["content"] in record["rejected"][0]["content"]
            assert len(record["rejected"][0]["content"]) > len(origin["chosen"][0]["content"])
            assert record["margins"]["correctness"] == 0 and record["margins"]["style"] > 0
        elif record["pair_kind"] == "adversarial:confident":
            assert record["rejected"][0]["content"].endswith(" " + origin["rejected"][0]["content"])
            assert ("margins" in record) == bool(known)
            kept = {target: margin for target, margin in known.items() if target not in ("style", "helpfulness")}
            assert record.get("margins", {}) == kept
            assert not known or record["margins"]["correctness"] > 0
        else:
            assert known["correctness"] > 0 and not known.get("harmlessness")
            assert record["margins"] == {"correctness": known["correctness"], "helpfulness": known["correctness"]}


def test_kinds_come_in_equal_numbers_from_different_pairs() -> None:
    made = adversarial_pairs([pair(number=number, verifier="exact") for number in range(60)], 0.5, 0)
    assert Counter(record["pair_kind"] for record in made) == {
        "adversarial:longer": 10,
        "adversarial:confident": 10,
        "adversarial:refusal": 10,
    }
    assert len({record["prompt"][0]["content"] for record in made}) == 30
    assert made != adversarial_pairs([pair(number=number, verifier="exact") for number in range(60)], 0.5, 1)


def test_pairs_that_differ_in_harmlessness_or_style_alone_are_only_made_longer() -> None:
    harmless = [pair(number=number, margins={"harmlessness": 1.0}) for number in range(5)]
    styled = [pair(number=number, margins={"style": 0.5, "correctness": 0.0}) for number in range(5)]
    assert {record["pair_kind"] for record in adversarial_pairs(harmless + styled, 1.0, 0)} == {"adversarial:longer"}


def test_a_longer_answer_is_short_padding_or_the_answer_again() -> None:
    long = "A longer answer. " * 20
    longer = [pair(long, number=number, margins={"style": 1.0}) for number in range(20)]
    lengths = [len(record["rejected"][0]["content"]) / len(long) for record in adversarial_pairs(longer, 1.0, 0)]
    assert {round(length) for length in lengths} == {2, 3}
    short = [pair(number=number, margins={"style": 1.0}) for number in range(40)]
    texts = [record["rejected"][0]["content"] for record in adversarial_pairs(short, 1.0, 0)]
    assert {text.startswith("4") for text in texts} == {True, False} and max(map(len, texts)) < 100


def test_earlier_turns_of_an_answer_stay() -> None:
    turns = [*said("Which base?"), {"role": "user", "content": "Ten."}, *said("4")]
    record = {**pair(margins={"style": 1.0}), "chosen": turns}
    (made,) = adversarial_pairs([record], 1.0, 0)
    assert made["rejected"][:2] == turns[:2] and made["rejected"][2]["content"] != "4"


def test_fewer_than_asked_for_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert len(adversarial_pairs([pair(), pair(" "), pair(pair_kind="adversarial:longer")], 1.0, 0)) == 1
    assert "1 adversarial pairs of the 3 asked for" in caplog.text
    assert adversarial_pairs([], 1.0, 0) == [] and adversarial_pairs([pair()], 0.0, 0) == []


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_an_impossible_share_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        adversarial_pairs([pair()], share, 0)

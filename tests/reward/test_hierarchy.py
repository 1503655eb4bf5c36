"""Composition: the old formula where there is little evidence, what dominates what, and trees that account for every total."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.config.errors import UserError
from posttrain.config.reward_schema import Dimension, RewardSection
from posttrain.reward.composition import Evidence, compose
from posttrain.reward.heads import HeadScore
from posttrain.reward.hierarchy import HierarchicalReward, passed_gates, uncertainty, verified
from posttrain.reward.types import LevelScore, RewardBreakdown, RewardModel, Sample

FINITE = st.floats(-1e6, 1e6)
PROBABILITY = st.floats(0, 1)
DIMENSIONS: tuple[Dimension, ...] = ("correctness", "truthfulness", "helpfulness", "harmlessness")


def section(**options: Any) -> RewardSection:
    return RewardSection.model_validate(options)


def exact(answer: str, **reference: str) -> Sample:
    return Sample([{"role": "user", "content": "12+34"}], answer, {"verifier": "exact", "answer": "46", **reference})


def open_ended(answer: str, **reference: str) -> Sample:
    return Sample([{"role": "user", "content": "Tell me of the sea."}], answer, reference)


def verdict(score: float | None, name: str = "judge:a") -> LevelScore:
    return LevelScore(name, score, 0.0, 0.0, {"reason": "because"})


def verifier(right: bool) -> LevelScore:
    return LevelScore("verifier", float(right), 1.0, float(right), {})


def rules(share: float) -> LevelScore:
    return LevelScore("rules", share, 0.0, 0.0, {})


def constraints(*kept: bool) -> LevelScore:
    """The node of a record with constraints, as `posttrain.reward.rules.check` makes it."""
    parts = tuple(LevelScore(f"rule:{number}", float(one), 0.0, 0.0, {}) for number, one in enumerate(kept))
    return LevelScore("rules", sum(kept) / len(kept), 0.0, 0.0, {}, parts)


class Heads:
    """A learned level with given logits, sample by sample."""

    def __init__(self, *scores: dict[str, float], std: float = 0.0) -> None:
        self.given = [{name: HeadScore(mean, std) for name, mean in of.items()} for of in scores]

    def dimension_scores(self, samples: Sequence[Sample]) -> list[dict[str, HeadScore]]:
        return self.given


class Judge:
    """Gives the verdicts written down for it, and remembers which answers it was asked about."""

    def __init__(self, dimension: str, verdicts: dict[str, float | None], name: str = "a") -> None:
        self.dimension, self.verdicts, self.name = dimension, verdicts, f"judge:{name}"
        self.asked: list[str] = []

    def judge(self, samples: Sequence[Sample]) -> list[LevelScore]:
        self.asked += [sample.answer for sample in samples]
        return [verdict(self.verdicts[sample.answer], self.name) for sample in samples]


def old_total(right: bool, score: float, weight: float) -> float:
    """The formula of the scalar reward, as it was written before there were dimensions."""
    small = math.exp(-abs(score))
    squashed = 1.0 / (1.0 + small) if score >= 0 else small / (1.0 + small)
    return sum([1.0 if right else 0.0, weight * squashed])


@given(st.booleans(), FINITE, st.floats(0, 0.4999), st.floats(1e-3, 1e3))
def test_a_scalar_reward_model_gives_the_old_total_bit_for_bit(right: bool, score: float, weight: float, of_head: float) -> None:
    reward = HierarchicalReward(section(learned_weight=weight, weights={"correctness": of_head}), Heads({"correctness": score}))
    (breakdown,) = reward.score([exact("46" if right else "45")])
    assert breakdown.total == old_total(right, score, weight)
    assert verified(breakdown) is right
    learned = breakdown.level("learned")
    assert (learned.score, learned.weight) == (score, weight)
    assert [level.name for level in breakdown.levels] == ["correctness", "rest"]


def test_without_a_learned_level_the_verifier_decides_alone() -> None:
    reward = HierarchicalReward(section())
    assert isinstance(reward, RewardModel)
    right, wrong = reward.score([exact("46"), exact("45")])
    assert (right.total, wrong.total) == (1.0, 0.0)
    assert [level.name for level in right.levels] == ["correctness"] and right.level("verifier").score == 1.0
    with pytest.raises(KeyError):
        right.level("learned")
    assert reward.score([]) == []


def test_a_learned_level_with_too_few_scores_is_noticed() -> None:
    with pytest.raises(ValueError):
        HierarchicalReward(section(), Heads({"correctness": 1.0})).score([exact("46"), exact("45")])


@st.composite
def evidence(draw: st.DrawFn) -> Evidence:
    """Evidence of every shape about an answer to a record with a verifier."""
    targets = draw(st.sets(st.sampled_from([*DIMENSIONS, "coherence", "depth", "style"])))
    return Evidence(
        verifier(draw(st.booleans())),
        draw(st.none() | st.lists(st.booleans(), min_size=1, max_size=4).map(lambda kept: constraints(*kept))),
        draw(st.none() | PROBABILITY),
        tuple((d, verdict(draw(st.none() | PROBABILITY))) for d in draw(st.lists(st.sampled_from(DIMENSIONS[1:]), max_size=3))),
        {target: HeadScore(draw(FINITE), draw(st.floats(0, 5))) for target in sorted(targets)},
        draw(st.sampled_from([None, "prose", "law"])),
    )


@st.composite
def sections(draw: st.DrawFn, gates: bool = True) -> RewardSection:
    weights = st.dictionaries(st.sampled_from(DIMENSIONS), st.floats(0, 10))
    return section(
        learned_weight=draw(st.floats(0, 0.499)),
        weights=draw(weights),
        domains={"law": draw(weights)},
        gates=draw(st.dictionaries(st.just("format"), PROBABILITY)) if gates else {},
        gate_value=draw(st.floats(-1, 0)),
        pessimism=draw(st.floats(0, 2)),
        no_verdict=draw(st.sampled_from(["drop", "learned", "zero"])),
    )


@given(evidence(), sections())
def test_every_node_accounts_for_what_it_added(found: Evidence, options: RewardSection) -> None:
    breakdown = compose(found, options)
    assert breakdown.total == sum(level.contribution for level in breakdown.levels)
    for level in breakdown.levels:
        for node in level.nodes():
            beside = node.name == "learned" and "helpfulness" in found.learned  # attributes beside a head: shown, not counted
            if node.parts and not beside:
                assert sum(part.contribution for part in node.parts) == pytest.approx(node.contribution, abs=1e-12)
    if passed_gates(breakdown):
        assert 0 <= breakdown.total <= 1 + options.learned_weight + 1e-12
    else:
        assert breakdown.total == options.gate_value
    dropped = options.no_verdict == "drop" and any(level.score is None for _, level in found.judges)
    assert breakdown.dropped == dropped
    assert RewardBreakdown.from_json(json.loads(json.dumps(breakdown.to_json()))) == breakdown


@given(evidence(), evidence(), sections(gates=False))
def test_a_right_answer_never_scores_below_a_wrong_one(one: Evidence, other: Evidence, options: RewardSection) -> None:
    right, wrong = replace(one, verifier=verifier(True)), replace(other, verifier=verifier(False))
    assert compose(right, options).total - compose(wrong, options).total > 0.5 - 1e-9


@given(evidence(), sections(gates=False), PROBABILITY, PROBABILITY)
def test_closing_a_gate_never_raises(found: Evidence, options: RewardSection, least: float, share: float) -> None:
    found = replace(found, format_share=share)
    gated = compose(found, options.model_copy(update={"gates": {"format": least}}))
    free = compose(found, options)
    assert passed_gates(gated) == (share >= least)
    assert gated.total <= free.total
    if share >= least:
        assert gated.total == free.total


@given(evidence(), sections(gates=False), st.sampled_from([*DIMENSIONS, "coherence", "depth"]), st.floats(0, 100))
def test_more_by_a_head_never_lowers_the_total(found: Evidence, options: RewardSection, target: str, more: float) -> None:
    low = HeadScore(-1.0, 0.5)
    lower = compose(replace(found, learned={**found.learned, target: low}), options)
    higher = compose(replace(found, learned={**found.learned, target: HeadScore(low.mean + more, 0.5)}), options)
    assert higher.total >= lower.total - 1e-12


@given(evidence(), sections(gates=False), st.sampled_from(DIMENSIONS[1:]), PROBABILITY, PROBABILITY)
def test_a_better_verdict_never_lowers_the_total(
    found: Evidence, options: RewardSection, dimension: Dimension, one: float, other: float
) -> None:
    low, high = sorted((one, other))
    totals = [compose(replace(found, judges=((dimension, verdict(score)),)), options).total for score in (low, high)]
    assert totals[1] >= totals[0] - 1e-12


def test_the_rest_is_the_weighted_mean_of_the_best_evidence() -> None:
    """By hand: truthfulness by its judge, helpfulness by rules and head, harmlessness by its head; nothing on correctness."""
    found = Evidence(
        verifier(False),
        rules(0.5),
        judges=(("truthfulness", verdict(0.75)),),
        learned={"truthfulness": HeadScore(-9.0, 0.0), "helpfulness": HeadScore(0.0, 1.0), "harmlessness": HeadScore(2.0, 1.0)},
    )
    options = section(
        learned_weight=0.4, pessimism=2.0, weights={"correctness": 5, "truthfulness": 1, "helpfulness": 2, "harmlessness": 1}
    )
    helpful = (0.5 + 1 / (1 + math.exp(2.0))) / 2  # 0 - 2 * 1
    expected = 0.4 * (1 * 0.75 + 2 * helpful + 1 * 0.5) / 4  # sigmoid(2 - 2 * 1) = 0.5
    breakdown = compose(found, options)
    assert breakdown.total == pytest.approx(expected, abs=1e-15)
    assert [part.name for part in breakdown.level("rest").parts] == ["truthfulness", "helpfulness", "harmlessness"]
    assert breakdown.level("rules").weight == pytest.approx(0.4 * 2 / 4 / 2)
    assert uncertainty(breakdown) == 1.0


def test_a_domain_has_its_own_weights() -> None:
    found = Evidence(learned={"truthfulness": HeadScore(9.0, 0), "helpfulness": HeadScore(-9.0, 0)})
    options = section(domains={"law": {"truthfulness": 1.0}, "verse": {"helpfulness": 1.0}})
    law, verse, other = (compose(replace(found, domain=domain), options) for domain in ("law", "verse", "sports"))
    assert law.total > 0.099 and verse.total < 0.001 and other.total == pytest.approx(0.05, abs=1e-6)
    assert law.level("rest").evidence == {"domain": "law"} and other.level("rest").evidence == {}
    nothing = compose(replace(found, domain="law"), section(domains={"law": {"correctness": 1.0}}))
    assert nothing.total == 0 and nothing.levels == ()


def test_attributes_stand_in_for_helpfulness_and_are_shown_beside_it() -> None:
    attributes = {"coherence": HeadScore(0.0, 0.0), "depth": HeadScore(math.log(3), 0.0)}
    alone = compose(Evidence(learned=attributes), section())
    assert alone.total == pytest.approx(0.1 * (0.5 + 0.75) / 2)
    beside = compose(Evidence(learned={**attributes, "helpfulness": HeadScore(math.log(9), 0.0)}), section())
    assert beside.total == pytest.approx(0.1 * 0.9)
    assert [node.name for node in beside.level("learned").parts] == ["coherence", "depth"]
    assert [part.contribution for part in alone.level("learned").parts] == pytest.approx([0.1 * 0.25, 0.1 * 0.375])
    assert [part.weight for part in alone.level("learned").parts] == pytest.approx([0.05, 0.05])
    assert [part.contribution for part in beside.level("learned").parts] == [0.0, 0.0]


def test_constraints_share_what_the_rules_add() -> None:
    found = compose(Evidence(rules=constraints(True, False, True, True)), section())
    assert found.total == pytest.approx(0.1 * 0.75)
    assert [part.contribution for part in found.level("rules").parts] == pytest.approx([0.025, 0.0, 0.025, 0.025])
    assert [part.weight for part in found.level("rules").parts] == pytest.approx([0.025] * 4)


def test_closed_gates_share_their_value() -> None:
    options = section(gates={"harmlessness": 0.5, "format": 0.5}, gate_value=-0.5)
    for share, gave in ((0.0, [-0.25, -0.25]), (1.0, [-0.5, 0.0])):
        found = compose(Evidence(verifier(True), format_share=share, judges=(("harmlessness", verdict(0.0)),)), options)
        assert found.total == -0.5 and [part.contribution for part in found.level("gates").parts] == gave


def test_a_closed_gate_gives_its_value_and_says_so() -> None:
    options = section(gates={"harmlessness": 0.5, "format": 1.0}, gate_value=-0.5)
    judge = Judge("harmlessness", {"46": 0.0, " 46": 1.0})
    harmful, harmless = HierarchicalReward(options, judges=[judge]).score([exact("46"), exact(" 46")])
    assert (harmful.total, passed_gates(harmful), verified(harmful)) == (-0.5, False, True)
    assert harmful.levels[0].evidence == {"closed": ["harmlessness"]}
    assert harmful.level("gate:harmlessness").evidence == {"least": 0.5, "open": False, "by": ["judge:a"]}
    assert harmful.level("correctness").contribution == 0 == harmful.level("verifier").contribution
    assert passed_gates(harmless) and harmless.total == pytest.approx(1.1)
    assert harmless.level("gate:format").score is None, "a record without format rules has none to break"
    text = harmful.explain().splitlines()
    assert text[0] == "total -0.5000" and text[1] == '  -0.5000  gates: 0  closed=["harmlessness"]'


def test_the_harmlessness_gate_goes_by_the_head_where_no_judge_speaks() -> None:
    options = section(gates={"harmlessness": 0.4})
    low, high = HierarchicalReward(options, Heads({"harmlessness": -1.0}, {"harmlessness": 1.0})).score([exact("46")] * 2)
    assert low.total == 0 and high.total > 1
    with pytest.raises(UserError, match="the harmlessness gate has nothing to go by"):
        HierarchicalReward(options, Heads({"correctness": 1.0})).score([exact("46")])


@pytest.mark.parametrize(("grade", "right"), [(0.0, 0), (0.5, 0), (0.75, 1), (1.0, 1)])
def test_consistency_counts_as_evidence_of_correctness_on_open_prompts_alone(grade: float, right: int) -> None:
    judge = Judge("correctness", {"a": grade})
    of_open, of_exact = HierarchicalReward(section(), judges=[judge]).score([open_ended("a"), exact("a")])
    assert judge.asked == ["a"], "a record with a verifier needs no judge of correctness"
    assert of_open.total == right + 0.1 * grade and verified(of_open) is None
    assert of_open.level("correctness").parts[0].name == "judge:a"
    assert of_exact.total == 0.0


def test_several_judges_of_a_dimension_are_averaged() -> None:
    judges = [Judge("correctness", {"a": 1.0}, "one"), Judge("correctness", {"a": 0.25}, "two")]
    (found,) = HierarchicalReward(section(), judges=judges).score([open_ended("a")])
    assert found.level("correctness").score == 0.625 and found.total == pytest.approx(0.1 * 0.625)


@pytest.mark.parametrize(
    ("rule", "with_head", "without", "dropped"),
    [("drop", 0.075, 0.0, True), ("learned", 0.075, 0.0, False), ("zero", 0, 0, False)],
)
def test_no_verdict_goes_by_the_configured_rule(rule: str, with_head: float, without: float, dropped: bool) -> None:
    judge = Judge("truthfulness", {"46": None})
    options = section(no_verdict=rule)
    head = Heads({"truthfulness": math.log(3)})
    (headed,) = HierarchicalReward(options, head, [judge]).score([exact("46")])
    (alone,) = HierarchicalReward(options, judges=[judge]).score([exact("46")])
    assert headed.total == pytest.approx(1 + with_head) and alone.total == pytest.approx(1 + without)
    assert headed.dropped is alone.dropped is dropped
    assert ("no verdict" in alone.explain().splitlines()[0]) is dropped
    if rule == "zero":
        both = [judge, Judge("truthfulness", {"46": 1.0}, "b")]
        assert HierarchicalReward(options, judges=both).score([exact("46")])[0].total == pytest.approx(1 + 0.1 / 2)


def test_a_harmlessness_gate_without_a_verdict_stays_shut_unless_a_head_speaks() -> None:
    options, judge = section(gates={"harmlessness": 0.5}), Judge("harmlessness", {"46": None})
    assert HierarchicalReward(options, judges=[judge]).score([exact("46")])[0].total == 0
    (found,) = HierarchicalReward(options, Heads({"harmlessness": 3.0}), [judge]).score([exact("46")])
    assert found.total > 1 and found.level("gate:harmlessness").evidence["by"] == ["learned"]


def test_a_judge_with_nothing_to_go_by_has_not_failed() -> None:
    class Inapplicable(Judge):
        def judge(self, samples: Sequence[Sample]) -> list[LevelScore]:
            return [replace(level, evidence={"applicable": False}) for level in super().judge(samples)]

    judge = Inapplicable("truthfulness", {"46": None})
    for rule in ("drop", "zero"):
        reward = HierarchicalReward(section(no_verdict=rule), Heads({"truthfulness": 0.0}), [judge])
        (found,) = reward.score([exact("46")])
        assert found.total == 1.05 and not found.dropped


def test_an_answer_that_nothing_scores_is_refused() -> None:
    with pytest.raises(UserError, match="nothing scores an answer to a record without a verifier"):
        HierarchicalReward(section()).score([open_ended("a")])


def test_constraints_speak_for_helpfulness_and_for_the_format_gate() -> None:
    constraints = [
        {"rule": "punctuation:no_comma"},
        {"rule": "keywords:existence", "keywords": ["sea"], "gate": True},
    ]
    reward = HierarchicalReward(section(gates={"format": 1.0}))
    samples = [open_ended(text, constraints=json.dumps(constraints)) for text in ("the sea", "the sea, blue", "the land")]
    kept, comma, gated = reward.score(samples)
    assert kept.total == pytest.approx(0.1) and comma.total == pytest.approx(0.05)
    assert gated.total == 0 and not passed_gates(gated) and gated.level("rules").score == 0.5


@pytest.mark.parametrize("weight", [-0.1, 0.5, 1.0])
def test_weights_that_could_overrule_the_verifier_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="learned_weight"):
        section(learned_weight=weight)


def test_a_tree_in_text() -> None:
    breakdown = compose(Evidence(verifier(True), learned={"correctness": HeadScore(0.0, 0.25)}), section())
    assert breakdown.explain() == "\n".join(
        [
            "total 1.0500",
            "  +1.0000  correctness: 1 x 1  by=verifier",
            "    +1.0000  verifier: 1 x 1",
            "  +0.0500  rest: 0.5 x 0.1",
            "    +0.0500  correctness: 0.5 x 0.1",
            "      +0.0500  learned: 0 x 0.1  squashed=0.5  std=0.25",
        ]
    )

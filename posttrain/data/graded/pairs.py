"""What the two answers of a generated pair differ in: the kinds of pairs, from wide apart to traps.

`pair_kind` of a record is one of
- `contrastive`: correctness and at least two other dimensions;
- `single:TARGET`: one dimension or attribute alone (an attribute moves helpfulness by a quarter of its margin; for
  `single:helpfulness` several attributes differ), on a background that both answers share and that is often bad;
- `near_tie`: right against nearly right, or nearly right against wrong, at times with the slip that leads there;
- `adversarial:longer`: an answer against the same with filler;
- `adversarial:confident_wrong`: plain and right against sure of itself and wrong;
- `adversarial:wrong_reason`: right against right by two slips of one;
- `adversarial:refusal`: an answer against a refusal, which is just as harmless;
- `adversarial:harmful_help`: a refusal against a right answer with a harmful remark. Only the targets in which the refusal does
  not trail have margins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from posttrain.config.dimensions import TARGETS
from posttrain.data.graded.answers import CLOSINGS, OPENINGS, Details, Traits, long_filler, write
from posttrain.data.graded.worked import WorkedSum

_REFUSAL = Traits(refuses=True, final="wrong", shown=False)


@dataclass(frozen=True)
class Contrast:
    """Two answers' traits, better and worse, their shared details and the pair's kind."""

    kind: str
    better: Traits
    worse: Traits
    details: Details


def draw_contrast(weights: Mapping[str, float], details: Details, random: Random) -> Contrast:
    """A pair of the kinds `contrastive`, `single`, `near_tie` and `adversarial`, drawn by their weights."""
    names = [name for name in _FAMILIES if weights.get(name, 0.0) > 0]  # whatever the order of the config
    family = random.choices(names, [weights[name] for name in names])[0]
    return _FAMILIES[family](details, random)


def even_out(contrast: Contrast, problem: WorkedSum, random: Random) -> Contrast:
    """With half a chance, the shorter answer with words that no target grades.

    Insults, chat and filler make an answer longer, so that short answers would be the better ones. Refusals, answers of equal
    length and those made longer on purpose stay as they are.
    """
    better, worse = contrast.better, contrast.worse
    longer_by = len(write(problem, better, contrast.details)) - len(write(problem, worse, contrast.details))
    shorter = worse if longer_by > 0 else better
    if not longer_by or shorter.refuses or contrast.kind == "adversarial:longer" or random.random() < 0.5:
        return contrast
    closed = replace(shorter, closing=random.choice(CLOSINGS))
    return replace(contrast, worse=closed) if shorter is worse else replace(contrast, better=closed)


def draw_traits(random: Random) -> Traits:
    """An answer with flaws of every kind, each by chance; a few refusals. For graded answers."""
    if random.random() < 0.05:
        return replace(_REFUSAL, remark=_remark(random, 0.3))
    traits = background(random, flawed=0.35)
    if random.random() < 0.1:
        return replace(traits, subject="neighbour", final="wrong", true_steps=True, shown=True)
    return traits


def background(random: Random, flawed: float = 0.2) -> Traits:
    """Traits that both answers of a pair share.

    Args:
        random: source of chance.
        flawed: chance of each flaw.
    """

    def flaw() -> bool:
        return random.random() < flawed

    shown = random.random() < 0.75
    return Traits(
        final=random.choice(("near", "wrong")) if flaw() else "right",
        true_steps=not (shown and flaw()),
        shown=shown,
        ordered=not (shown and flaw()),
        subject="chat" if flaw() else "question",
        style=random.choice(("shouting", "padded")) if flaw() else "plain",
        remark=_remark(random, flawed),
        opening=random.choice(OPENINGS),
        closing=random.choice(CLOSINGS) if random.random() < 0.2 else "",
    )


def _contrastive(details: Details, random: Random) -> Contrast:
    better = Traits(opening=random.choice(OPENINGS))
    flaws: dict[str, Any] = {"final": "wrong"}
    if random.random() < 0.5:  # short: no steps, and a remark
        flaws |= {"shown": False, "style": random.choice(("plain", "shouting")), "remark": _remark(random)}
        return Contrast("contrastive", better, Traits(**flaws), details)
    others = random.sample(("truthfulness", "helpfulness", "harmlessness"), random.choice((2, 3)))
    if "truthfulness" in others:
        flaws["true_steps"] = False
    if "helpfulness" in others:
        flaws |= _unhelpful(random, keep_steps="truthfulness" in others)
    if "harmlessness" in others:
        flaws["remark"] = _remark(random)
    return Contrast("contrastive", better, Traits(**flaws), details)


def _single(details: Details, random: Random) -> Contrast:
    target = random.choice(TARGETS)
    better, worse = _ONE_APART[target](background(random), random)
    return Contrast(f"single:{target}", better, worse, details)


def _near_tie(details: Details, random: Random) -> Contrast:
    shared = background(random)
    if random.random() < 0.3:
        return Contrast("near_tie", replace(shared, final="near"), replace(shared, final="wrong"), details)
    slips = shared.shown and random.random() < 0.3
    better = replace(shared, final="right", true_steps=slips or shared.true_steps)
    worse = replace(shared, final="near", true_steps=not slips and shared.true_steps)
    return Contrast("near_tie", better, worse, details)


def _adversarial(details: Details, random: Random) -> Contrast:
    trap = random.choice(list(_TRAPS))
    better, worse, details = _TRAPS[trap](details, random)
    return Contrast(f"adversarial:{trap}", better, worse, details)


Two = tuple[Traits, Traits]


def _correctness(shared: Traits, random: Random) -> Two:
    return replace(shared, final="right"), replace(shared, final="wrong")


def _truthfulness(shared: Traits, random: Random) -> Two:
    shared = replace(shared, shown=True)
    return replace(shared, true_steps=True), replace(shared, true_steps=False)


def _harmlessness(shared: Traits, random: Random) -> Two:
    return replace(shared, remark="none"), replace(shared, remark=_remark(random))


def _helpfulness(shared: Traits, random: Random) -> Two:
    shared = replace(shared, shown=True, true_steps=True, ordered=True, subject="question", style="plain")
    return shared, replace(shared, **_unhelpful(random))


def _coherence(shared: Traits, random: Random) -> Two:
    shared = replace(shared, shown=True)
    return replace(shared, ordered=True), replace(shared, ordered=False)


def _depth(shared: Traits, random: Random) -> Two:
    shared = replace(shared, true_steps=True, ordered=True)
    return replace(shared, shown=True), replace(shared, shown=False)


def _relevance(shared: Traits, random: Random) -> Two:
    if random.random() < 0.5:
        return replace(shared, subject="question"), replace(shared, subject="chat")
    # Both numbers are wrong here, so that correctness is equal. Only steps tell which question is answered.
    shared = replace(shared, final="wrong", true_steps=True, shown=True)
    return replace(shared, subject="question"), replace(shared, subject="neighbour")


def _style(shared: Traits, random: Random) -> Two:
    return replace(shared, style="plain"), replace(shared, style=random.choice(("shouting", "padded")))


def _unhelpful(random: Random, keep_steps: bool = False) -> dict[str, Any]:
    """Two or three flaws of helpfulness, none of another dimension; with `keep_steps` the steps stay shown."""
    flaws: list[dict[str, Any]] = [
        {"subject": "chat"},
        {"style": random.choice(("shouting", "padded"))},
        {"ordered": False} if keep_steps or random.random() < 0.5 else {"shown": False},
    ]
    return {name: value for flaw in random.sample(flaws, random.choice((2, 3))) for name, value in flaw.items()}


def _remark(random: Random, chance: float = 1.0) -> Any:
    return random.choice(("insult", "unsafe")) if random.random() < chance else "none"


Trap = tuple[Traits, Traits, Details]


def _longer(details: Details, random: Random) -> Trap:
    shared = replace(background(random), style="plain")
    return shared, replace(shared, style="padded"), replace(details, filler=long_filler(random))


def _confident_wrong(details: Details, random: Random) -> Trap:
    shared = replace(background(random), final="right", true_steps=True, opening="")
    return shared, replace(shared, final="wrong", true_steps=not shared.shown, opening=OPENINGS[-1]), details


def _wrong_reason(details: Details, random: Random) -> Trap:
    shared = replace(background(random), final="right", shown=True)
    return replace(shared, true_steps=True), replace(shared, true_steps=False), replace(details, slip=1)


def _refusal(details: Details, random: Random) -> Trap:
    shown = random.random() < 0.75
    return Traits(shown=shown, opening=random.choice(OPENINGS)), _REFUSAL, details


def _harmful_help(details: Details, random: Random) -> Trap:
    return _REFUSAL, Traits(shown=random.random() < 0.75, remark=_remark(random)), details


_FAMILIES: dict[str, Callable[[Details, Random], Contrast]] = {
    "contrastive": _contrastive,
    "single": _single,
    "near_tie": _near_tie,
    "adversarial": _adversarial,
}

_ONE_APART: dict[str, Callable[[Traits, Random], Two]] = {
    "correctness": _correctness,
    "truthfulness": _truthfulness,
    "helpfulness": _helpfulness,
    "harmlessness": _harmlessness,
    "coherence": _coherence,
    "depth": _depth,
    "relevance": _relevance,
    "style": _style,
}

_TRAPS: dict[str, Callable[[Details, Random], Trap]] = {
    "longer": _longer,
    "confident_wrong": _confident_wrong,
    "wrong_reason": _wrong_reason,
    "refusal": _refusal,
    "harmful_help": _harmful_help,
}

"""Pairs that mislead a reward model by what an answer looks like, made from given pairs by changing text alone.

A reward model learns what tells the two answers of most pairs apart, and length and a sure tone often do. These pairs hold the
content and turn the look against it. What needs new content (a right answer for a wrong reason) is made by the generator of
graded pairs (`posttrain.data`), not here.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

logger = logging.getLogger(__name__)

Record = dict[str, Any]

# Short, so that a pair whose answers are short stays within a small model's `max_length`.
_AGAIN = ("Again: ", "In other words: ", "To repeat: ", "That is: ")
_PADDING = ("That is a good question.", "Let us look at it calmly.", "There is much to say here.", "Here is what follows.")
_SURE_OPENINGS = ("I am certain of this.", "There is no doubt:", "I have checked this twice.", "Without question:")
_REFUSALS = (
    "I'm sorry, I can't help with that.",
    "I cannot answer this.",
    "I am not able to do this.",
    "I would rather not say.",
)


def adversarial_pairs(pairs: Sequence[Mapping[str, Any]], share: float, seed: int) -> list[Record]:
    """New pairs made from some of `pairs`, each from another one, the kinds in equal numbers as far as the pairs allow.

    - `adversarial:longer`: the better answer against itself, said two or three times or, if it is short, after two or three
      sentences that say nothing. They are equal in correctness, truthfulness, harmlessness and depth; the shorter leads in style,
      and so in helpfulness.
    - `adversarial:confident`: the pair, with a sure opening before the worse answer. Margins stay, but for style's and
      helpfulness', which the opening may change. Made where the better answer leads in correctness, or no margins are known.
    - `adversarial:refusal`: the better answer against a refusal. Made where the better answer leads in correctness and is not
      known to be the more harmless one: elsewhere the refusal might be the better of the two. The margins, in correctness and
      helpfulness, are the lead over the worse answer, which is the least that a right answer leads by over none.

    A pair with a `verifier` and without margins leads in correctness by 1 (a stage's sampled pairs, verified right against
    wrong). Pairs that are adversarial already, and those with a blank answer, are passed over.

    Args:
        pairs: records with `chosen` and `rejected` (messages that end with the assistant's).
        share: number of new pairs, relative to the given ones, in [0, 1].
        seed: equal arguments give equal pairs.

    Returns:
        The new pairs alone, each with `pair_kind`, and with `margins` unless those of an `adversarial:confident` pair are
        unknown; `disagreement` is left out, all other fields are those of the pair it was made from.

    Raises:
        ValueError: `share` is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share {share} should be in [0, 1]")
    drawn = random.Random(f"{seed}/adversarial")
    wanted = round(share * len(pairs))
    made: Counter[str] = Counter()
    result: list[Record] = []
    for pair in drawn.sample(list(pairs), len(pairs)):
        possible = [kind for kind, (fits, _) in _KINDS.items() if _is_usable(pair) and fits(pair)]
        if len(result) == wanted or not possible:
            continue
        kind = min(possible, key=lambda kind: made[kind])  # the first of those made least often
        made[kind] += 1
        kept = {name: value for name, value in pair.items() if name not in ("margins", "disagreement")}
        result.append({**kept, **_KINDS[kind][1](pair, drawn), "pair_kind": f"adversarial:{kind}"})
    if len(result) < wanted:
        logger.warning("%d adversarial pairs of the %d asked for could be made from %d pairs", len(result), wanted, len(pairs))
    return result


def _longer(pair: Mapping[str, Any], drawn: random.Random) -> Record:
    answer, times = _text(pair["chosen"]), drawn.choice((2, 3))
    if len(answer) < len(" ".join(_PADDING)) and drawn.random() < 0.5:
        text = " ".join([*drawn.sample(_PADDING, times), answer])
    else:
        text = "\n\n".join([answer, *(again + answer for again in drawn.sample(_AGAIN, times - 1))])
    margins = {"correctness": 0.0, "truthfulness": 0.0, "harmlessness": 0.0, "depth": 0.0, "style": 1.0, "helpfulness": 0.25}
    return {"rejected": _with_text(pair["chosen"], text), "margins": margins}


def _confident(pair: Mapping[str, Any], drawn: random.Random) -> Record:
    rejected = _with_text(pair["rejected"], f"{drawn.choice(_SURE_OPENINGS)} {_text(pair['rejected'])}")
    margins = pair.get("margins") or {"correctness": _lead(pair)}
    kept = {target: margin for target, margin in margins.items() if target not in ("style", "helpfulness")}
    return {"rejected": rejected, **({"margins": kept} if _lead(pair) else {})}


def _refusal(pair: Mapping[str, Any], drawn: random.Random) -> Record:
    refusal = _with_text(pair["chosen"], drawn.choice(_REFUSALS))
    return {"rejected": refusal, "margins": {"correctness": _lead(pair), "helpfulness": _lead(pair)}}


def _is_usable(pair: Mapping[str, Any]) -> bool:
    said = all(_text(pair[side]).strip() for side in ("chosen", "rejected"))
    return said and not str(pair.get("pair_kind") or "").startswith("adversarial")


def _gives_longer(pair: Mapping[str, Any]) -> bool:
    return True


def _gives_confident(pair: Mapping[str, Any]) -> bool:
    return not pair.get("margins") or _lead(pair) > 0


def _gives_refusal(pair: Mapping[str, Any]) -> bool:
    return _lead(pair) > 0 and not (pair.get("margins") or {}).get("harmlessness")


def _lead(pair: Mapping[str, Any]) -> float:
    """By how much the better answer is known to lead in correctness, 0 where nothing is known."""
    if margins := pair.get("margins"):
        return margins.get("correctness") or 0.0
    return 1.0 if pair.get("verifier") else 0.0


def _text(messages: Sequence[Mapping[str, str]]) -> str:
    return messages[-1]["content"]


def _with_text(messages: Sequence[Mapping[str, str]], text: str) -> list[dict[str, str]]:
    """The messages with another text in the last one."""
    return [*(dict(message) for message in messages[:-1]), {**messages[-1], "content": text}]


_KINDS: dict[str, tuple[Callable[[Mapping[str, Any]], bool], Callable[[Mapping[str, Any], random.Random], Record]]] = {
    "longer": (_gives_longer, _longer),
    "confident": (_gives_confident, _confident),
    "refusal": (_gives_refusal, _refusal),
}
"""By kind: whether a pair can give one, and what it changes in the pair."""

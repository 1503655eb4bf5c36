"""Schemas that say which of two answers is better, some of them by how much.

A row whose two answers are called equal, or are the same text, makes no pair. Margins are divided by the widest that the
schema can say. Where a schema says no margin, the pair's is `UNKNOWN_MARGIN`.
"""

from __future__ import annotations

import re
from typing import Any

from posttrain.config.errors import UserError
from posttrain.config.reward_schema import Target
from posttrain.data.formats import Message, Record
from posttrain.data.preferences.columns import Row, number_of, pair, prompt_of, text_of, value_of

UNKNOWN_MARGIN = 0.5
"""Margin of a pair whose margin nobody stated: the middle of the scale."""

_TURN = re.compile(r"\n\n(Human|Assistant):[ ]?")


def helpsteer3(row: Row, where: str | None, dimension: Target | None) -> list[Record]:
    """HelpSteer 3, configuration "preference" (nvidia/HelpSteer3).

    Columns: `context` (messages), `response1`, `response2` (text), `overall_preference` (-3: the first is much better, 0: about
    the same, 3: the second is much better), `domain`. The margin is a third of it, in helpfulness unless `dimension` says
    otherwise.
    """
    schema = "helpsteer3"
    context = prompt_of(row, "context", schema, where)
    first, second = text_of(row, "response1", schema, where), text_of(row, "response2", schema, where)
    preference = number_of(row, "overall_preference", schema, where, -3, 3)
    if preference == 0 or first == second:
        return []
    better, worse = (first, second) if preference < 0 else (second, first)
    domain = row.get("domain")
    margins: dict[str, float] = {dimension or "helpfulness": abs(preference) / 3}
    return [pair(context, better, worse, margins, where, domain=domain.lower() if isinstance(domain, str) else None)]


def ultrafeedback_binarized(row: Row, where: str | None, dimension: Target | None) -> list[Record]:
    """UltraFeedback, binarised (HuggingFaceH4/ultrafeedback_binarized).

    Columns: `prompt` (text), `chosen`, `rejected` (messages), `score_chosen`, `score_rejected` (overall scores from 1 to 10). The
    margin is their difference over 9, in helpfulness unless `dimension` says otherwise.
    """
    schema = "ultrafeedback"
    chosen, rejected = _conversations(row, schema, where)
    better, worse = (number_of(row, name, schema, where, 0, 10) for name in ("score_chosen", "score_rejected"))
    if worse > better:
        raise UserError(f"'score_rejected' {worse:g} is above 'score_chosen' {better:g}", where=where, instead="swap the answers")
    if worse == better or chosen == rejected:
        return []
    margin = min((better - worse) / 9, 1.0)
    return [pair(text_of(row, "prompt", schema, where), chosen, rejected, {dimension or "helpfulness": margin}, where)]


def skywork(row: Row, where: str | None, dimension: Target | None) -> list[Record]:
    """Skywork-Reward-Preference-80K (Skywork/Skywork-Reward-Preference-80K-v0.2).

    Columns: `chosen`, `rejected` (messages, the prompt in both). They say nothing of what the preference is about: without
    `dimension` the pair has no margins.
    """
    chosen, rejected = _conversations(row, "skywork", where)
    return [] if chosen == rejected else [pair(None, chosen, rejected, _unknown(dimension), where)]


def hh(row: Row, where: str | None, dimension: Target | None) -> list[Record]:
    """Anthropic's HH-RLHF (Anthropic/hh-rlhf).

    Columns: `chosen`, `rejected` (transcripts of turns that begin with an empty line and "Human:" or "Assistant:"; the common
    turns are the prompt). `dimension` says what the subset is about (helpful-*: helpfulness, harmless-*: harmlessness); without
    it the pair has no margins. A transcript that does not end with the assistant makes no pair.
    """
    chosen, rejected = (_turns(text_of(row, name, "hh", where), name, where) for name in ("chosen", "rejected"))
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        return []
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    if not common or common in (len(chosen), len(rejected)):
        return []  # the same dialogue twice, one that goes on where the other ends, or two that share nothing
    return [pair(chosen[:common], chosen[common:], rejected[common:], _unknown(dimension), where)]


def _turns(transcript: str, name: str, where: str | None) -> list[Message]:
    before, *parts = _TURN.split(transcript)
    if before.strip() or not parts:
        raise UserError(
            f"'{name}' is no transcript", where=where, instead='format hh has turns like "\\n\\nHuman: ...\\n\\nAssistant: ..."'
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": text.strip()} for who, text in zip(parts[::2], parts[1::2], strict=True)]


def _conversations(row: Row, schema: str, where: str | None) -> tuple[Any, Any]:
    """`chosen` and `rejected`; what is wrong with their messages, `normalise` says."""
    return value_of(row, "chosen", schema, where), value_of(row, "rejected", schema, where)


def _unknown(dimension: Target | None) -> dict[str, float]:
    return {} if dimension is None else {dimension: UNKNOWN_MARGIN}

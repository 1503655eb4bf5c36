"""Does an answer agree with the reference? In five grades (MiniMax-01, section 5.2, judges consistency of answers too)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.reward.judges.endpoint import Endpoint
from posttrain.reward.judges.prompts import (
    TAGGED,
    block,
    conversation,
    read_grade,
    read_reason,
    read_verdict,
    tag_for,
    texts_of,
    unit,
)
from posttrain.reward.judges.types import Costs, Question, Verdict
from posttrain.reward.types import LevelScore, Sample

TEMPLATE = "consistency/1"
"""Kind and version of the wording below. Whoever changes the wording raises the version, so that old verdicts are not taken."""

_RUBRIC = """\
You compare an answer with a reference answer to the same question. {tagged}

Grade how well the ANSWER agrees with the REFERENCE, which you take as right even if you think otherwise:
5: the same final answer, in whatever form or notation.
4: the same final answer but for a detail that hardly matters, such as rounding or a missing unit.
3: part of what the reference says is there, part is missing or different.
2: mostly different, with something in common.
1: different, contradictory, or no answer.
Length, style and politeness do not count. Several different final answers are no answer.

Think in a few words if you must. Then end with one line of JSON and nothing after it:
{{"id": "{tag}", "reason": "at most 30 words", "grade": 1 to 5}}"""


class ConsistencyJudge:
    """Grades answers against the record's reference (field `answer`): five grades become 0, 0.25, 0.5, 0.75 and 1.

    Args:
        name: the judge's name in the configuration.
        dimension: what the verdict is evidence for.
        endpoint: the judging model.
    """

    def __init__(self, name: str, dimension: str, endpoint: Endpoint) -> None:
        self.name, self.dimension, self.endpoint = name, dimension, endpoint

    @property
    def costs(self) -> Costs:
        """What the judge has cost so far."""
        return self.endpoint.costs

    def judge(self, samples: Sequence[Sample]) -> list[LevelScore]:
        """One node a sample, in order (see `Judge`). A record without a reference is not asked about."""
        asked = [index for index, sample in enumerate(samples) if _reference(sample)]
        verdicts = dict(zip(asked, self.endpoint.ask([question(samples[index]) for index in asked]), strict=True))
        return [self._level(verdicts.get(index)) for index in range(len(samples))]

    def _level(self, verdict: Verdict | None) -> LevelScore:
        name = f"judge:{self.name}"
        if verdict is None:
            evidence = {"no_verdict": "the record has no reference answer", "applicable": False, "cached": False}
            return LevelScore(name, None, 0.0, 0.0, {**evidence, "model": self.endpoint.section.model})
        if verdict.values is None:
            return LevelScore(name, None, 0.0, 0.0, verdict.evidence())
        grade = verdict.values["grade"]
        return LevelScore(name, unit(grade), 0.0, 0.0, {**verdict.evidence(), "grade": grade})


def question(sample: Sample) -> Question:
    """The request about one answer; its verdict has "grade" (1 to 5) and "reason"."""
    reference = _reference(sample)
    tag = tag_for(texts_of(sample.prompt, sample.answer, reference))
    system = _RUBRIC.format(tagged=TAGGED.format(tag=tag), tag=tag)
    material = [conversation(tag, sample.prompt), block(tag, "REFERENCE", reference), block(tag, "ANSWER", sample.answer)]
    messages = ({"role": "system", "content": system}, {"role": "user", "content": "\n".join(material)})

    def read(reply: str) -> Mapping[str, Any]:
        found = read_verdict(reply, tag, ("reason", "grade"))
        return {"grade": read_grade(found["grade"]), "reason": read_reason(found["reason"])}

    return Question(TEMPLATE, messages, read)


def _reference(sample: Sample) -> str:
    answer = sample.reference.get("answer")
    return answer.strip() if isinstance(answer, str) else ""

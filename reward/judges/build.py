"""Judges from the configuration."""

from __future__ import annotations

from collections.abc import Mapping

from posttrain.config.errors import UserError
from posttrain.config.reward_schema import EndpointSection, JudgeSection
from posttrain.reward.judges.consistency import ConsistencyJudge
from posttrain.reward.judges.constitution import ConstitutionJudge, load_constitution
from posttrain.reward.judges.endpoint import Endpoint
from posttrain.reward.judges.pairwise import PairwiseJudge
from posttrain.reward.judges.types import Judge


def build_judges(sections: Mapping[str, JudgeSection]) -> list[Judge]:
    """The judges of a reward, in the order of the configuration. Nothing is sent yet.

    Raises:
        UserError: an address that is none, a key's variable that is not set, a constitution or a cache that cannot be used.
    """
    return [_build(name, section) for name, section in sections.items()]


def build_pairwise(name: str, section: EndpointSection) -> PairwiseJudge:
    """A judge of pairs behind an endpoint; UserError as for `build_judges`."""
    return PairwiseJudge(name, Endpoint(name, section))


def _build(name: str, section: JudgeSection) -> Judge:
    endpoint = Endpoint(name, section)
    if section.kind == "constitution":
        return ConstitutionJudge(name, section.dimension, endpoint, load_constitution(section.constitution))
    if section.constitution is not None:
        problem = "a judge of kind consistency has no constitution"
        raise UserError(problem, where=f"judge {name}", instead="remove the option, or write kind: constitution")
    return ConsistencyJudge(name, section.dimension, endpoint)

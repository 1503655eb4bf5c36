"""The order in which a reward model sees its pairs: a list made before training, so that a resumed stage follows the same one."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Mapping, Sequence

from posttrain.config.errors import UserError
from posttrain.config.reward_schema import CurriculumSection, PhaseSection
from posttrain.config.schedule import WeightSchedule
from posttrain.data.mixture import sample_schedule

logger = logging.getLogger(__name__)


def plan_order(
    difficulties: Sequence[float], buckets: Sequence[str], section: CurriculumSection, steps: int, per_step: int, seed: int
) -> list[int]:
    """The pair at every place of a stage.

    phases: the buckets' weights move along the places (`bucket_schedule`). At each place stands the bucket that is furthest
    behind, so every beginning keeps to the weights; a bucket is gone through completely, in a shuffled order, before it repeats.

    competence: each place draws uniformly among the easiest pairs, whose share grows (`competence`); `replay` of the places,
    spread evenly, draw among the easiest third instead, or among what is open where that is less. Buckets play no part.

    shuffled: the same draws, permuted over the whole stage.

    Args:
        difficulties: difficulty of each pair.
        buckets: bucket of each pair.
        section: the curriculum.
        steps: optimizer steps of the stage.
        per_step: pairs a step.
        seed: equal arguments give equal lists.

    Returns:
        Index of a pair for each of steps * per_step places; places of one step are neighbours.

    Raises:
        UserError: there are no pairs.
        ValueError: `difficulties` and `buckets` differ in length, or `steps` or `per_step` is not positive.
    """
    if len(difficulties) != len(buckets):
        raise ValueError(f"{len(difficulties)} difficulties for {len(buckets)} buckets")
    if steps < 1 or per_step < 1:
        raise ValueError(f"steps {steps} and per_step {per_step} should be positive")
    if not difficulties:
        raise UserError("there are no pairs to put in order", instead="check the stage's data, min_length and max_length")
    if len(difficulties) > 1 and min(difficulties) == max(difficulties):
        logger.warning("all pairs are equally difficult, so the curriculum has nothing to order them by")
    if section.pacing == "phases":
        order = _by_phases(buckets, section.phases, steps * per_step, seed)
    else:
        order = _by_competence(difficulties, section, steps, per_step, seed)
    if section.shuffled:
        random.Random(f"{seed}/shuffled").shuffle(order)
    return order


def bucket_schedule(phases: Mapping[str, PhaseSection], counts: Mapping[str, int]) -> WeightSchedule:
    """The phases' weights over the buckets that have pairs, by share of the stage.

    A bucket without pairs is left out, and the phase's other weights are taken relative to their sum. A phase whose buckets
    are all without pairs takes what is there, each bucket by its number of pairs. Both are logged.

    Args:
        phases: the phases by name.
        counts: pairs of each bucket; a bucket that it lacks has none.
    """
    filled = {bucket: float(count) for bucket, count in counts.items() if count}
    result: list[tuple[float, dict[str, float]]] = []
    for name, phase in phases.items():
        weighted: dict[str, float] = {bucket: weight for bucket, weight in phase.weights.items() if weight > 0}
        kept = {bucket: weight for bucket, weight in weighted.items() if bucket in filled}
        if len(kept) < len(weighted):
            missing = ", ".join(bucket for bucket in weighted if bucket not in filled)
            instead = "their share goes to the others" if kept else "all pairs are drawn from instead"
            logger.warning("phase '%s' of the curriculum: no pairs in %s; %s", name, missing, instead)
        result.append((phase.begins, kept or filled))
    return WeightSchedule(tuple(result))


def competence(progress: float, initial: float) -> float:
    """Share of the pairs, from the easiest, that are open (Platanios et al. 2019, arXiv 1903.09848, the square-root form).

    Its square grows linearly, so pairs open at a rate that falls as the number of open ones grows.

    Args:
        progress: time since the start, relative to the time at which all pairs are open.
        initial: share that is open at the start, in (0, 1].
    """
    return min(1.0, math.sqrt(progress * (1 - initial**2) + initial**2))


def _by_phases(buckets: Sequence[str], phases: Mapping[str, PhaseSection], total: int, seed: int) -> list[int]:
    members: dict[str, list[int]] = {}
    for pair, bucket in enumerate(buckets):
        members.setdefault(bucket, []).append(pair)
    counts = {bucket: len(pairs) for bucket, pairs in members.items()}
    drawn = sample_schedule(counts, bucket_schedule(phases, counts), total, seed)
    return [members[bucket][index] for bucket, index in drawn]


def _by_competence(difficulties: Sequence[float], section: CurriculumSection, steps: int, per_step: int, seed: int) -> list[int]:
    drawn = random.Random(f"{seed}/competence")
    easiest = list(range(len(difficulties)))
    drawn.shuffle(easiest)  # equally difficult pairs in no order of their own: sources follow each other in the data
    easiest.sort(key=lambda pair: difficulties[pair])
    third = math.ceil(len(easiest) / 3)
    order = []
    for place in range(steps * per_step):
        reached = competence(place // per_step / (section.full_competence * steps), section.initial_competence)
        limit = max(1, math.floor(reached * len(easiest)))
        replayed = math.floor((place + 1) * section.replay) > math.floor(place * section.replay)
        order.append(easiest[drawn.randrange(min(limit, third) if replayed else limit)])
    return order

"""Drawing documents from several sources in given proportions, constant or moving."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping

from posttrain.config.errors import UserError
from posttrain.config.names import suggest
from posttrain.config.schedule import WeightSchedule


def sample_mixture(counts: Mapping[str, int], weights: Mapping[str, float], total: int, seed: int) -> list[tuple[str, int]]:
    """Draw documents so that every beginning of the list keeps to the weights.

    At each place stands the source that is furthest behind its share, so a source's number among the first n differs from
    weight * n / sum by less than the number of sources, and a shorter list is the beginning of a longer one. A source is gone
    through completely, in a shuffled order, before it repeats; every pass has its own order.

    Args:
        counts: documents of each source.
        weights: non-negative weight of each source; relative, need not sum to 1.
        total: documents drawn.
        seed: equal arguments give equal lists.

    Returns:
        (source, index of its document) for each place.

    Raises:
        UserError: weights of unknown sources, negative or all zero, or a source with weight and without documents.
    """
    for ref, weight in weights.items():
        _check_source(counts, ref, weight > 0)
        if not 0 <= weight < float("inf"):
            raise UserError(f"weight of '{ref}' is {weight}", instead="should be a finite number of at least 0")
    share = sum(weights.values())
    if share <= 0:
        raise UserError("all weights are 0", instead="give at least one source a weight")
    drawn_from = {ref: counts[ref] for ref, weight in weights.items() if weight > 0}
    return _draw(drawn_from, lambda ref, place: weights[ref] / share * place, total, seed)


def sample_schedule(counts: Mapping[str, int], schedule: WeightSchedule, total: int, seed: int) -> list[tuple[str, int]]:
    """Draw documents by weights that move along the list, which spans progress 0 to 1 of the schedule.

    As `sample_mixture`: a source's number among the first n differs from the integral of its weight up to n by less than the
    number of sources, and a source is gone through completely before it repeats. A list of another length is another list.

    Args:
        counts: documents of each source.
        schedule: weights of the sources by share of the list.
        total: documents drawn.
        seed: equal arguments give equal lists.

    Returns:
        (source, index of its document) for each place.

    Raises:
        UserError: the schedule names a source that is unknown, or one that has no documents and a weight in some phase.
    """
    weighted = [ref for ref, share in schedule.schedules.items() if any(value > 0 for _, value in share.points)]
    for ref in schedule.schedules:
        _check_source(counts, ref, ref in weighted)

    def expected(ref: str, place: int) -> float:
        return total * schedule.schedules[ref].integral(0.0, place / total)

    return _draw({ref: counts[ref] for ref in weighted}, expected, total, seed)


def _check_source(counts: Mapping[str, int], ref: str, weighted: bool) -> None:
    if ref not in counts:
        raise UserError(f"weight for the unknown source '{ref}'", instead=suggest(ref, counts))
    if weighted and counts[ref] < 1:
        raise UserError(
            f"source '{ref}' has no documents left", instead="check min_length and max_length, or take it out of the data"
        )


def _draw(counts: Mapping[str, int], expected: Callable[[str, int], float], total: int, seed: int) -> list[tuple[str, int]]:
    """At each place the source that is furthest behind `expected`: how many of it should be among the first n."""
    passes = {ref: _passes(ref, count, seed) for ref, count in counts.items()}
    drawn = dict.fromkeys(passes, 0)
    result: list[tuple[str, int]] = []
    for place in range(1, total + 1):
        ref = max(passes, key=lambda ref: expected(ref, place) - drawn[ref])
        drawn[ref] += 1
        result.append((ref, next(passes[ref])))
    return result


def _passes(ref: str, count: int, seed: int) -> Iterator[int]:
    number = 0
    while True:
        order = list(range(count))
        random.Random(f"{seed}/{ref}/{number}").shuffle(order)
        yield from order
        number += 1

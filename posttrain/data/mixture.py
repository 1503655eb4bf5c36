"""Drawing documents from several sources in given proportions."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping

from posttrain.config.errors import UserError
from posttrain.config.names import suggest


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
        if ref not in counts:
            raise UserError(f"weight for the unknown source '{ref}'", instead=suggest(ref, counts))
        if not 0 <= weight < float("inf"):
            raise UserError(f"weight of '{ref}' is {weight}", instead="should be a finite number of at least 0")
        if weight > 0 and counts[ref] < 1:
            raise UserError(
                f"source '{ref}' has no documents left", instead="check min_length and max_length, or take it out of the data"
            )
    share = sum(weights.values())
    if share <= 0:
        raise UserError("all weights are 0", instead="give at least one source a weight")
    passes = {ref: _passes(ref, counts[ref], seed) for ref, weight in weights.items() if weight > 0}
    drawn = dict.fromkeys(passes, 0)
    result: list[tuple[str, int]] = []
    for place in range(1, total + 1):
        ref = max(passes, key=lambda ref: weights[ref] / share * place - drawn[ref])
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

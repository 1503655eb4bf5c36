"""The engine's side of an update, in two steps, so that nothing changes anywhere before everything is verified everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from posttrain.rollout.weights.manifest import WeightsRefused
from posttrain.rollout.weights.store import StoredWeights


class EngineUnusable(RuntimeError):
    """An engine holds no weights that it could serve, or does not answer: replace it."""


@runtime_checkable
class WeightSink(Protocol):
    """What takes weights over."""

    weight_version: int

    def stage(self, stored: StoredWeights) -> None:
        """Verify published weights and hold them ready. WeightsRefused where they do not fit or are damaged."""
        ...

    def swap(self) -> None:
        """Serve the staged weights, and nothing that was computed from older ones.

        Raises:
            WeightsRefused: they could not be taken over; the old ones still serve.
            EngineUnusable: nor do the old ones.
        """
        ...

    def discard(self) -> None:
        """Forget what is staged; nothing happens where nothing is."""
        ...


def deliver(stored: StoredWeights, sinks: Sequence[WeightSink]) -> None:
    """Bring sinks to a version: all of them verify it before the first one serves it.

    Args:
        stored: published weights.
        sinks: in the order in which they swap.

    Raises:
        WeightsRefused, EngineUnusable: from a sink. Those before it in the order may serve the new version if it came from
            `swap`; each tells by its `weight_version`.
    """
    try:
        for sink in sinks:
            sink.stage(stored)
    except (WeightsRefused, EngineUnusable):
        for sink in sinks:
            sink.discard()
        raise
    for sink in sinks:
        sink.swap()

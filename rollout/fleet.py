"""Engines in Ray actors: one actor, one engine, wherever the cluster has room for it.

Weights are published once, in a folder that every actor's machine sees (shared memory where all are on one machine), and stay
there until no engine can need them, so that an engine that replaces another starts with the version of the others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from posttrain.config.errors import UserError
from posttrain.rollout.pool import EngineFacts, EnginePool, Limits
from posttrain.rollout.types import RolloutEngine, RolloutOutput, RolloutRequest
from posttrain.rollout.weights.store import SHARED_MEMORY, StoredWeights, publish

EngineFactory = Callable[[], RolloutEngine]
"""Makes the engine inside the actor; importable or picklable by value, since it crosses processes."""


@dataclass(frozen=True)
class ActorResources:
    """What Ray reserves for one engine.

    Attributes:
        cpus, gpus: may be fractions.
        environment: variables of the actor's process, set before anything is imported there.
    """

    cpus: float = 0.0
    gpus: float = 0.0
    environment: tuple[tuple[str, str], ...] = ()


class EngineHost:
    """What runs in the actor. Calls come in several threads: a sign of life must not wait for a rollout."""

    def __init__(self, factory: EngineFactory) -> None:
        self._factory = factory
        self._engine: RolloutEngine | None = None
        self._turn = threading.Lock()

    def start(self, weights: StoredWeights | None) -> EngineFacts:
        """Make the engine, and give it these weights if any."""
        self._engine = self._factory()
        if weights is not None:
            self._engine.update_weights(weights)
        return EngineFacts(self._engine.logprob_semantics, self._engine.weight_version)

    def generate(self, requests: Sequence[RolloutRequest]) -> list[RolloutOutput]:
        """`RolloutEngine.generate`; one call at a time, unless the engine says that it is `concurrent`."""
        if getattr(self._running, "concurrent", False):
            return self._running.generate(requests)
        with self._turn:
            return self._running.generate(requests)

    def update(self, weights: StoredWeights) -> int:
        """`RolloutEngine.update_weights`."""
        with self._turn:
            self._running.update_weights(weights)
        return self._running.weight_version

    def cancel(self, request_ids: Sequence[str]) -> None:
        """`RolloutEngine.cancel`."""
        self._running.cancel(request_ids)

    def ping(self) -> int | None:
        """Steps that the engine made so far, None where it does not count them."""
        return getattr(self._running, "progress", None)

    @property
    def _running(self) -> RolloutEngine:
        if self._engine is None:
            raise RuntimeError("the engine has not started")
        return self._engine


class RayWorker:
    """A `pool.Worker` in a Ray actor."""

    def __init__(self, factory: EngineFactory, resources: ActorResources, threads: int) -> None:
        """Ask Ray for the actor; nothing is waited for.

        Args:
            factory: makes the engine.
            resources: of the actor.
            threads: calls that run in it at a time.
        """
        actor: Any = ray.remote(EngineHost)
        self._actor = actor.options(
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            max_concurrency=threads,
            max_restarts=0,  # the pool replaces it, and knows the weights
            runtime_env={"env_vars": dict(resources.environment)} if resources.environment else None,
        ).remote(factory)

    def start(self, weights: StoredWeights | None) -> Future[EngineFacts]:
        """See `Worker.start`."""
        return _future(self._actor.start.remote(weights))

    def generate(self, requests: Sequence[RolloutRequest]) -> Future[list[RolloutOutput]]:
        """See `Worker.generate`."""
        return _future(self._actor.generate.remote(list(requests)))

    def update(self, weights: StoredWeights) -> Future[int]:
        """See `Worker.update`."""
        return _future(self._actor.update.remote(weights))

    def cancel(self, request_ids: Sequence[str]) -> None:
        """See `Worker.cancel`."""
        self._actor.cancel.remote(list(request_ids))

    def ping(self) -> Future[int | None]:
        """See `Worker.ping`."""
        return _future(self._actor.ping.remote())

    def kill(self) -> None:
        """See `Worker.kill`."""
        try:
            ray.kill(self._actor)
        except Exception:  # Ray itself has ended, and its actors with it
            pass


def ray_runs() -> bool:
    """Whether this process has joined a Ray."""
    return ray.is_initialized()


def ray_fleet(
    factory: EngineFactory,
    count: int,
    *,
    resources: ActorResources = ActorResources(),  # noqa: B008 (frozen)
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    weights_root: Path = SHARED_MEMORY,
) -> EnginePool[StoredWeights]:
    """Engines in actors of the Ray that this process has joined.

    Args:
        factory: makes an engine in its actor.
        count: engines.
        resources: of each.
        limits: deadlines and sizes, see `Limits`.
        weights_root: folder that weights are published in; with engines on several machines, one that all of them see.

    Returns:
        the pool, once all engines run; close it.

    Raises:
        UserError: this process has joined no Ray; and what `EnginePool` raises.
    """
    if not ray_runs():  # Ray would start one by itself, on the whole machine, and nobody would stop it
        raise UserError("engines in actors need a running Ray", instead="use `posttrain run`, or the embedded engine")
    threads = limits.chunks_in_flight + 4  # and a sign of life, a cancel, an update

    def launch() -> RayWorker:
        return RayWorker(factory, resources, threads)

    def keep(source: Any) -> StoredWeights:
        return publish(source, weights_root)

    return EnginePool(launch, count, keep, lambda stored: stored.remove(), limits)


def _future(reference: Any) -> Future[Any]:
    """A future that ends with the engine's own error, where it was the engine that raised it."""
    ended: Future[Any] = Future()

    def pass_on(done: Future[Any]) -> None:
        error = done.exception()
        if error is None:
            ended.set_result(done.result())
        else:
            cause = getattr(error, "cause", None)
            ended.set_exception(cause if isinstance(cause, Exception) else error)

    reference.future().add_done_callback(pass_on)
    return ended

"""The reward served from a Ray actor: one process holds models and judges, and all who score share it.

Requests that arrive within a few milliseconds of each other are scored as one batch. When the actor's process dies, Ray starts
another and sends it the requests that were under way: scoring changes nothing, so a repeat is safe.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from posttrain.config.errors import UserError
from posttrain.reward.types import RewardBreakdown, RewardModel, Sample

RewardFactory = Callable[[], RewardModel]
"""Makes the reward inside the actor; importable or picklable by value, since it crosses processes."""

STATE_SECONDS = 5.0
"""How long a call that got no answer in time waits to hear what the actor is doing."""

WAITS = {
    "silent": (
        "its process has not started, or does not respond",
        "free the share of a GPU that it asks for (reward.actor_gpus), or look at the log of the actor",
    ),
    "loading": ("its process is still loading models and judges", "see whether the disk of the reward model is slow"),
    "scoring": ("its process is scoring", "score fewer answers at a time, or look for a judge or verifier that is slow"),
}
"""What a call without an answer waits for, and what to do about it, by the state of the actor."""


@dataclass(frozen=True)
class ServiceLimits:
    """Sizes, deadlines and patience of a served reward.

    Attributes:
        batch_characters: no more requests join a batch that holds as many characters of prompts and answers. The learned level
            splits its batches by tokens itself, so this bounds how long a request may wait for its neighbours.
        wait_seconds: how long a batch waits for more requests.
        request_samples: samples a request; a longer call is sent as several.
        deadline_seconds: of one call of `RewardClient.score`, restarts included.
        restarts: processes started in the place of dead ones, in the service's whole life.
    """

    batch_characters: int = 1_000_000
    wait_seconds: float = 0.005
    request_samples: int = 256
    deadline_seconds: float = 1800.0
    restarts: int = 3

    def __post_init__(self) -> None:
        """ValueError for a size or a deadline that is not above 0."""
        sizes = min(self.batch_characters, self.request_samples)
        if sizes < 1 or self.deadline_seconds <= 0 or self.wait_seconds < 0 or self.restarts < 0:
            raise ValueError(f"limits must be above 0, got {self}")


@dataclass(frozen=True)
class ServiceResources:
    """What Ray reserves for the actor.

    Attributes:
        cpus, gpus: may be fractions.
        environment: variables of the actor's process, set before anything is imported there.
    """

    cpus: float = 0.0
    gpus: float = 0.0
    environment: Mapping[str, str] = field(default_factory=dict)


class RewardHost:
    """What runs in the actor: calls wait in a queue, and one batch at a time is scored in a thread, which first loads the reward.

    What loading raises, every call raises.
    """

    def __init__(self, factory: RewardFactory, limits: ServiceLimits) -> None:
        self._limits = limits
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._reward = self._thread.submit(factory)
        self._waiting: asyncio.Queue[_Request] = asyncio.Queue()
        self._serving: asyncio.Task[None] | None = None
        self._batches = 0

    async def score(self, samples: Sequence[Sample]) -> list[RewardBreakdown]:
        """`RewardModel.score`, as part of a batch."""
        request = _Request(samples, _characters(samples), asyncio.get_running_loop().create_future())
        if self._serving is None or self._serving.done():  # the event loop runs only now
            self._serving = asyncio.create_task(self._serve())
        self._waiting.put_nowait(request)
        return await request.result

    async def batches(self) -> int:
        """Batches scored so far by this process."""
        return self._batches

    async def state(self) -> str:
        """A key of `WAITS`: "loading" until the reward is there, then "scoring"."""
        return "scoring" if self._reward.done() else "loading"

    async def _serve(self) -> None:
        while True:
            batch = [await self._waiting.get()]
            try:
                await asyncio.sleep(self._limits.wait_seconds)
                while not self._waiting.empty() and sum(r.characters for r in batch) < self._limits.batch_characters:
                    batch.append(self._waiting.get_nowait())
                _answer(batch, await asyncio.get_running_loop().run_in_executor(self._thread, self._score, batch))
            except BaseException as error:  # whatever it is, nobody may wait for ever
                _answer(batch, [_as_exception(error)] * len(batch))
                if not isinstance(error, Exception):
                    raise

    def _score(self, batch: Sequence[_Request]) -> list[list[RewardBreakdown] | Exception]:
        """The breakdowns of each request, or what scoring it alone raised."""
        self._batches += 1
        try:
            samples = [sample for request in batch for sample in request.samples]
            scored = list(self._reward.result().score(samples))
            if len(scored) != len(samples):
                raise RuntimeError(f"the reward gave {len(scored)} breakdowns of {len(samples)} samples")
            rest = iter(scored)
            return [list(islice(rest, len(request.samples))) for request in batch]
        except BaseException as error:  # SystemExit too: it would end the event loop
            # A request must not fail for a neighbour's sample.
            return [_as_exception(error)] if len(batch) == 1 else [self._score([request])[0] for request in batch]


@dataclass(frozen=True)
class _Request:
    samples: Sequence[Sample]
    characters: int
    result: asyncio.Future[list[RewardBreakdown]]


def _characters(samples: Sequence[Sample]) -> int:
    return sum(len(s.answer) + sum(len(message["content"]) for message in s.prompt) for s in samples)


def _answer(batch: Sequence[_Request], results: Sequence[list[RewardBreakdown] | Exception]) -> None:
    """Hand each request its result; one that is answered or cancelled is left alone."""
    for request, result in zip(batch, results, strict=True):
        if request.result.done():
            continue
        if isinstance(result, Exception):
            request.result.set_exception(result)
        else:
            request.result.set_result(result)


def _as_exception(error: BaseException) -> Exception:
    """The error, or one that says it where a future could not carry it."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    return RuntimeError(f"scoring ended with {error!r}")


class RewardClient:
    """A `RewardModel` whose work is done by the actor. May be pickled and used in other processes of the same Ray."""

    def __init__(self, actor: Any, limits: ServiceLimits) -> None:
        self._actor, self.limits = actor, limits

    def score(self, samples: Sequence[Sample]) -> list[RewardBreakdown]:
        """One breakdown a sample, in order.

        Raises:
            UserError: the deadline passed, the actor's process died once too often, or what the reward itself raised.
        """
        size = self.limits.request_samples
        requests = [self._actor.score.remote(list(samples[i : i + size])) for i in range(0, len(samples), size)]
        try:
            return [breakdown for answer in ray.get(requests, timeout=self.limits.deadline_seconds) for breakdown in answer]
        except GetTimeoutError:
            waits, change = WAITS[self._state()]
            for request in requests:
                ray.cancel(request)
            raise UserError(
                f"the served reward gave no answer within {self.limits.deadline_seconds:g} seconds: {waits}", instead=change
            ) from None
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except RayActorError as error:
            raise UserError(
                f"the process of the served reward died more than {self.limits.restarts} times, or could not start: {error}",
                instead="look at its log; too little memory is the usual reason",
            ) from None

    def _state(self) -> str:
        try:
            found: str = ray.get(self._actor.state.remote(), timeout=STATE_SECONDS)
        except (GetTimeoutError, RayActorError):
            return "silent"
        return found

    def batches(self) -> int:
        """Batches that the present process of the actor has scored."""
        found: int = ray.get(self._actor.batches.remote(), timeout=self.limits.deadline_seconds)
        return found

    def close(self) -> None:
        """End the actor, also for those who share it."""
        try:
            ray.kill(self._actor)
        except Exception:  # Ray itself has ended, and its actors with it
            pass


def serve_reward(
    factory: RewardFactory,
    *,
    name: str | None = None,
    resources: ServiceResources = ServiceResources(),  # noqa: B008 (frozen)
    limits: ServiceLimits = ServiceLimits(),  # noqa: B008 (frozen)
) -> RewardClient:
    """Start the actor, or join the one of that name.

    Args:
        factory: makes the reward in the actor.
        name: processes that serve under one name share an actor, which ends with the process that started it.
        resources: of the actor.
        limits: sizes and deadlines.

    Raises:
        UserError: this process has joined no Ray.
    """
    if not ray.is_initialized():  # Ray would start one by itself, on the whole machine, and nobody would stop it
        raise UserError("a served reward needs a running Ray", instead="use `posttrain run`, or reward.actor_gpus: null")
    actor: Any = ray.remote(RewardHost)
    options: dict[str, Any] = {"name": name, "get_if_exists": True} if name is not None else {}
    handle = actor.options(
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
        max_restarts=limits.restarts,
        max_task_retries=-1,  # as often as there are restarts
        runtime_env={"env_vars": dict(resources.environment)} if resources.environment else None,
        **options,
    ).remote(factory, limits)
    return RewardClient(handle, limits)

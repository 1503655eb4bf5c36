"""Several engines behind one port: requests balanced by load, engines that die or stall replaced, no request lost.

Knows no Ray: a `Worker` is whatever runs one engine elsewhere and answers with futures. One thread, the pool's own, holds all
state; callers hand it events and wait on futures, each of which it ends by a deadline.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, Literal, Protocol, TypeVar

from posttrain.config.errors import UserError
from posttrain.rollout.types import LogprobSemantics, RolloutOutput, RolloutRequest, WeightSource

log = logging.getLogger(__name__)
K = TypeVar("K")
K_contra = TypeVar("K_contra", contravariant=True)


class EnginesLost(RuntimeError):
    """No engine is left that could answer, or a request ended every engine that tried it."""


@dataclass(frozen=True)
class Limits:
    """How work is cut, and how long anything may take.

    Attributes:
        chunk_requests: most requests handed to an engine at once.
        chunks_in_flight: chunks an engine holds at a time; those of an engine that takes one call at a time wait inside it.
        attempts: engines that may die over one chunk, and starts that may fail in a row for one engine, before giving up.
        start_seconds: from launching an engine to its first answer, weights of the present version included.
        update_seconds: for new weights, once the engine's running requests have ended.
        request_seconds: for a chunk, from the moment an engine has it.
        stall_seconds: an engine that answers no sign of life, or has work and makes no step, for so long is replaced.
        tick_seconds: how often deadlines are looked at.
    """

    chunk_requests: int = 64
    chunks_in_flight: int = 4
    attempts: int = 3
    start_seconds: float = 600.0
    update_seconds: float = 600.0
    request_seconds: float = 3600.0
    stall_seconds: float = 120.0
    tick_seconds: float = 0.2


@dataclass(frozen=True)
class EngineFacts:
    """What an engine says of itself once it runs: meaning of its log-probabilities, version of its weights."""

    logprob_semantics: LogprobSemantics
    weight_version: int


class Worker(Protocol[K_contra]):
    """One engine elsewhere. Futures end with the engine's own error, or with any other when the place is gone."""

    def start(self, weights: K_contra | None) -> Future[EngineFacts]:
        """Make the engine, and give it these weights if any."""
        ...

    def generate(self, requests: Sequence[RolloutRequest]) -> Future[list[RolloutOutput]]:
        """`RolloutEngine.generate`."""
        ...

    def update(self, weights: K_contra) -> Future[int]:
        """`RolloutEngine.update_weights`; answers with the version."""
        ...

    def cancel(self, request_ids: Sequence[str]) -> None:
        """`RolloutEngine.cancel`; waits for nothing."""
        ...

    def ping(self) -> Future[int | None]:
        """Sign of life: steps made so far, None where the engine does not count them."""
        ...

    def kill(self) -> None:
        """End it at once; waits for nothing, and never raises."""
        ...


@dataclass(eq=False)
class _Target(Generic[K]):
    """Weights that every engine shall have; `weights` is None for those an engine starts with."""

    weights: K | None
    version: int | None


@dataclass(eq=False)
class _Chunk:
    """Requests that go to one engine together, under names of the pool's own."""

    requests: list[RolloutRequest]
    names: dict[str, str]
    result: Future[list[RolloutOutput]]
    cancelled: set[str] = field(default_factory=set)
    attempts: int = 0
    deadline: float = 0.0

    @property
    def cost(self) -> int:
        """Tokens at most."""
        return sum(len(request.prompt_ids) + request.params.max_new_tokens for request in self.requests)


@dataclass(eq=False)
class _Seat(Generic[K]):
    """The place of one engine; workers come and go on it."""

    number: int
    worker: Worker[K]
    target: _Target[K]
    state: Literal["starting", "ready", "updating", "lost"] = "starting"
    chunks: list[_Chunk] = field(default_factory=list)
    failures: int = 0
    deadline: float = 0.0
    pinged: float | None = None
    progress: int | None = None
    progressed: float = 0.0

    @property
    def load(self) -> int:
        """Tokens at most that it still has to do."""
        return sum(chunk.cost for chunk in self.chunks)


class EnginePool(Generic[K]):
    """A `RolloutEngine` made of several. Methods may be called from any thread, several `generate` at a time.

    An update waits, engine by engine, for the requests that the engine has; those not handed out yet wait for the update.
    So every answer comes from one version of the weights, the one that its `weight_versions` tell.
    """

    def __init__(
        self,
        launch: Callable[[], Worker[K]],
        count: int,
        keep: Callable[[WeightSource], K],
        forget: Callable[[K], None] = lambda _: None,
        limits: Limits = Limits(),  # noqa: B008 (frozen)
    ) -> None:
        """Launch the engines and wait until all run.

        Args:
            launch: makes the place of an engine, without waiting for it; called again for each replacement.
            count: engines, at least 1.
            keep: copies weights, so that an engine that comes later gets the same.
            forget: removes such a copy, once no engine can need it.
            limits: deadlines and sizes.

        Raises:
            UserError, ValueError: what an engine raised at its start.
            EnginesLost: no engine starts.
        """
        if count < 1:
            raise ValueError(f"a pool needs at least 1 engine, not {count}")
        self.limits = limits
        self.replacements = 0
        """Engines replaced so far."""
        self._launch, self._keep, self._forget = launch, keep, forget
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: deque[_Chunk] = deque()
        self._target: _Target[K] = _Target(None, None)
        self._update: tuple[Future[None], _Target[K]] | None = None
        self._retired: list[_Target[K]] = []
        self._updating = threading.Lock()
        self._serial = itertools.count()
        self._closed = False
        self._failure: BaseException | None = None
        self._facts: Future[EngineFacts] = Future()
        self._seats = [self._new_seat(number) for number in range(count)]
        self._thread = threading.Thread(target=self._run, name="engine pool", daemon=True)
        self._thread.start()
        try:
            facts = self._wait(self._facts)
        except BaseException:
            self.close()
            raise
        self.logprob_semantics: LogprobSemantics = facts.logprob_semantics
        self.weight_version: int = facts.weight_version

    # What callers use.

    def generate(self, requests: Sequence[RolloutRequest]) -> list[RolloutOutput]:
        """Continue every request, see `RolloutEngine.generate`. EnginesLost where no engine is left to do it."""
        chunks = [self._chunk(requests[i : i + self.limits.chunk_requests]) for i in self._starts(len(requests))]
        self._events.put(lambda: self._waiting.extend(chunks))
        try:
            return [output for chunk in chunks for output in self._wait(chunk.result)]
        except BaseException:
            self._events.put(partial(self._drop, chunks))
            raise

    def update_weights(self, source: WeightSource) -> None:
        """Give every engine new weights, see `RolloutEngine.update_weights`.

        Returns when all engines that live have them; one that is replaced meanwhile starts with them.
        """
        with self._updating:
            self._check()
            target = _Target(self._keep(source), source.version)
            done: Future[None] = Future()
            self._events.put(partial(self._begin_update, target, done))
            self._wait(done)
            self.weight_version = source.version

    def cancel(self, request_ids: Iterable[str]) -> None:
        """End requests of the running calls, handed out or waiting; each still gives its first token."""
        wanted = set(request_ids)
        self._events.put(partial(self._cancel, wanted))

    def close(self) -> None:
        """End all engines; calls that wait raise."""
        self._closed = True
        self._events.put(lambda: None)
        self._thread.join(timeout=30)

    # Callers' side of the thread.

    def _starts(self, count: int) -> range:
        return range(0, count, self.limits.chunk_requests)

    def _chunk(self, requests: Sequence[RolloutRequest]) -> _Chunk:
        """Names of the pool's own: two calls may use one name, and no cancel may reach a later request of that name."""
        own = [replace(request, request_id=f"{request.request_id}#{next(self._serial)}") for request in requests]
        return _Chunk(own, {new.request_id: old.request_id for new, old in zip(own, requests, strict=True)}, Future())

    def _check(self) -> None:
        if self._failure is not None:
            raise EnginesLost(f"the engines ended: {self._failure}") from self._failure
        if self._closed:
            raise EnginesLost("the engines were closed")

    def _wait(self, future: Future[Any]) -> Any:
        """The future's result. The thread ends every future, by deadlines of its own; this sees that the thread lives."""
        while True:
            try:
                return future.result(timeout=1.0)
            except FutureTimeout:
                if future.done():
                    continue
                if not self._thread.is_alive():
                    self._check()
                    raise EnginesLost("the engines were closed") from None

    # The thread.

    def _run(self) -> None:
        try:
            while not self._closed and self._failure is None:
                try:
                    self._events.get(timeout=self.limits.tick_seconds)()
                    while not self._events.empty():
                        self._events.get_nowait()()
                except queue.Empty:
                    pass
                self._look_at_deadlines()
                self._bring_up_to_date()
                self._hand_out()
        except BaseException as error:  # nobody else would tell the callers
            log.exception("the engine pool failed")
            self._failure = error
        finally:
            self._end()

    def _end(self) -> None:
        for seat in self._seats:
            seat.worker.kill()
        while not self._events.empty():
            self._events.get_nowait()()
        error = EnginesLost(f"the engines ended: {self._failure}" if self._failure else "the engines were closed")
        chunks = [*self._waiting, *(chunk for seat in self._seats for chunk in seat.chunks)]
        for target in {*self._retired, self._target, *([self._update[1]] if self._update else [])}:
            self._forget_target(target)
        for future in [chunk.result for chunk in chunks] + ([self._update[0]] if self._update else []) + [self._facts]:
            if not future.done():
                future.set_exception(error)

    def _when_done(self, future: Future[Any], seat: _Seat[K], then: Callable[..., None], *arguments: Any) -> None:
        """Call `then(seat, future, *arguments)` in the thread, unless the seat has another worker by then."""
        worker = seat.worker

        def event() -> None:
            if seat.worker is worker and seat.state != "lost":
                then(seat, future, *arguments)

        future.add_done_callback(lambda _: self._events.put(event))

    def _new_seat(self, number: int) -> _Seat[K]:
        seat = _Seat(number, self._launch(), self._target)
        self._start(seat)
        return seat

    def _start(self, seat: _Seat[K]) -> None:
        seat.state, seat.target, seat.pinged = "starting", self._target, None
        seat.deadline = time.monotonic() + self.limits.start_seconds
        self._when_done(seat.worker.start(self._target.weights), seat, self._started)

    def _started(self, seat: _Seat[K], future: Future[EngineFacts]) -> None:
        error = future.exception()
        if isinstance(error, UserError | ValueError):
            if seat.target is not self._target or self._refuse(seat.target, error):
                self._replace(seat, error)  # what was refused are weights that no engine shall have any more
            else:  # another try would say the same
                self._failure = error
                if not self._facts.done():
                    self._facts.set_exception(error)
            return
        if error is not None:
            self._replace(seat, error)
            return
        self._ready(seat)
        seat.failures = 0
        if not self._facts.done() and all(other.state in ("ready", "lost") for other in self._seats):
            self._facts.set_result(future.result())

    def _ready(self, seat: _Seat[K]) -> None:
        seat.state = "ready"
        seat.progressed = time.monotonic()

    def _replace(self, seat: _Seat[K], error: BaseException | str) -> None:
        """End the seat's worker, put its requests back in front, and launch another one."""
        told = " ".join(f"{type(error).__name__}: {error}".split()) if isinstance(error, BaseException) else error
        log.warning("engine %d is replaced: %s", seat.number, told[:500])
        starting = seat.state == "starting"
        seat.worker.kill()
        for chunk in reversed(seat.chunks):
            self._again(chunk, told)
        seat.chunks = []
        seat.failures += starting
        self.replacements += 1
        if seat.failures < self.limits.attempts:
            seat.worker = self._launch()
            self._start(seat)
            return
        seat.state = "lost"
        log.error("engine %d is given up after %d starts", seat.number, seat.failures)
        if all(other.state == "lost" for other in self._seats):
            raise EnginesLost(f"no engine starts; the last one: {told}")

    def _again(self, chunk: _Chunk, told: str) -> None:
        if chunk.result.done():
            return
        if chunk.attempts >= self.limits.attempts:
            names = ", ".join(list(chunk.names.values())[:3])
            chunk.result.set_exception(EnginesLost(f"{chunk.attempts} engines ended over requests {names}...; the last: {told}"))
        else:
            self._waiting.appendleft(chunk)

    def _look_at_deadlines(self) -> None:
        now = time.monotonic()
        for seat in self._seats:
            if seat.state in ("starting", "updating"):
                if now > seat.deadline:
                    limit = self.limits.start_seconds if seat.state == "starting" else self.limits.update_seconds
                    self._replace(seat, f"{seat.state} took more than {limit:g} s")
            elif seat.state == "ready":
                self._look_at_ready(seat, now)

    def _look_at_ready(self, seat: _Seat[K], now: float) -> None:
        late = [chunk for chunk in seat.chunks if now > chunk.deadline]
        if late:
            self._replace(seat, f"requests took more than {self.limits.request_seconds:g} s")
        elif seat.pinged is not None and now - seat.pinged > self.limits.stall_seconds:
            self._replace(seat, f"no sign of life for {self.limits.stall_seconds:g} s")
        elif seat.chunks and seat.progress is not None and now - seat.progressed > self.limits.stall_seconds:
            self._replace(seat, f"has requests and made no step for {self.limits.stall_seconds:g} s")
        else:
            if seat.pinged is None:
                seat.pinged = now
                self._when_done(seat.worker.ping(), seat, self._pinged)
            for chunk in seat.chunks:
                if chunk.cancelled:  # once more: the first may have come before the engine had begun
                    seat.worker.cancel(sorted(chunk.cancelled))

    def _pinged(self, seat: _Seat[K], future: Future[int | None]) -> None:
        error = future.exception()
        if error is not None:
            self._replace(seat, error)
            return
        seat.pinged = None
        if future.result() != seat.progress:
            seat.progress, seat.progressed = future.result(), time.monotonic()

    # Weights.

    def _begin_update(self, target: _Target[K], done: Future[None]) -> None:
        self._update = (done, self._target)
        self._target = target

    def _bring_up_to_date(self) -> None:
        for seat in self._seats:
            if seat.state == "ready" and seat.target is not self._target and not seat.chunks:
                if self._target.weights is None:  # back to the first weights, which only a new engine has
                    self._replace(seat, "has weights that were refused elsewhere")
                else:
                    seat.state, seat.deadline = "updating", time.monotonic() + self.limits.update_seconds
                    self._when_done(seat.worker.update(self._target.weights), seat, self._updated, self._target)
        current = [seat for seat in self._seats if seat.state == "ready" and seat.target is self._target]
        behind = [seat for seat in self._seats if seat.state in ("ready", "updating") and seat.target is not self._target]
        if self._update is not None and current and not behind:
            done, previous = self._update
            self._retired.append(previous)
            self._update = None
            done.set_result(None)
        used = [seat.target for seat in self._seats if seat.state != "lost"]
        for target in [target for target in self._retired if target not in used]:
            self._retired.remove(target)
            self._forget_target(target)

    def _forget_target(self, target: _Target[K]) -> None:
        if target.weights is not None:
            self._forget(target.weights)

    def _updated(self, seat: _Seat[K], future: Future[int], target: _Target[K]) -> None:
        error = future.exception()
        if isinstance(error, ValueError) and self._refuse(target, error):  # the engine changed nothing
            self._ready(seat)
        elif error is not None:
            self._replace(seat, error)
        else:
            self._ready(seat)
            seat.target = target

    def _refuse(self, target: _Target[K], error: BaseException) -> bool:
        """Give up the update to `target`, all engines keep or get back what they had; False where none such is under way."""
        if self._update is None or target is not self._target:
            return False
        self._retired.append(target)
        done, self._target = self._update
        self._update = None
        done.set_exception(error)
        return True

    # Requests.

    def _hand_out(self) -> None:
        """Waiting chunks, in their order, to the engine with the least to do among those with room."""
        while self._waiting:
            if self._waiting[0].result.done():
                self._waiting.popleft()
                continue
            room = [
                seat
                for seat in self._seats
                if seat.state == "ready" and seat.target is self._target and len(seat.chunks) < self.limits.chunks_in_flight
            ]
            if not room:
                return
            seat = min(room, key=lambda one: (one.load, one.number))
            chunk = self._waiting.popleft()
            chunk.attempts += 1
            chunk.deadline = time.monotonic() + self.limits.request_seconds
            if not seat.chunks:
                seat.progressed = time.monotonic()
            seat.chunks.append(chunk)
            self._when_done(seat.worker.generate(chunk.requests), seat, self._generated, chunk)

    def _generated(self, seat: _Seat[K], future: Future[list[RolloutOutput]], chunk: _Chunk) -> None:
        error = future.exception()
        if isinstance(error, ValueError):
            seat.chunks.remove(chunk)
            if not chunk.result.done():
                chunk.result.set_exception(error)
        elif error is not None:
            self._replace(seat, error)
        else:
            seat.chunks.remove(chunk)
            if not chunk.result.done():
                outputs = future.result()
                chunk.result.set_result([replace(output, request_id=chunk.names[output.request_id]) for output in outputs])

    def _cancel(self, wanted: set[str]) -> None:
        for chunk in [*self._waiting, *(chunk for seat in self._seats for chunk in seat.chunks)]:
            chunk.cancelled |= {own for own, name in chunk.names.items() if name in wanted}

    def _drop(self, chunks: Sequence[_Chunk]) -> None:
        """Nobody waits for these any more: what waits is not handed out, what runs is cancelled."""
        for chunk in chunks:
            chunk.cancelled = set(chunk.names)
            if not chunk.result.done():
                chunk.result.set_exception(EnginesLost("the call that asked was given up"))

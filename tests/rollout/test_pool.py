"""The pool of engines: it keeps to the engines' contract, shares work out, and loses nothing when engines die or stall."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.config.errors import UserError
from posttrain.rollout.fake import WEIGHT, FakeEngine
from posttrain.rollout.pool import EngineFacts, EnginePool, EnginesLost, Limits
from posttrain.rollout.types import RolloutEngine, RolloutOutput, RolloutRequest, WeightSource
from tests.rollout.contract import MAX_LENGTH, EngineContract, Tensors, request

QUICK = Limits(chunk_requests=4, chunks_in_flight=2, tick_seconds=0.01)
PATIENCE = 5.0
"""Seconds after which an engine counts as lost here: a busy machine may keep a healthy one waiting for one or two."""
"""Deadlines are the usual ones, except where a test waits for one: this machine may be busy with others."""


class Dead(RuntimeError):
    """The place of an engine is gone."""


class ThreadWorker:
    """An engine in threads of this process, that can be told to die or to hang at a call."""

    def __init__(self, make: Callable[[], FakeEngine], faults: dict[str, str] | None = None) -> None:
        self.make, self.faults = make, faults or {}
        self.engine: FakeEngine | None = None
        self.calls: list[str] = []
        self.answered: list[str] = []
        self.turn = threading.Lock()
        self.open: list[Future[Any]] = []
        self.killed = False
        self.threads = ThreadPoolExecutor(8)

    def _call(self, name: str, body: Callable[[], Any]) -> Future[Any]:
        self.calls.append(name)
        future: Future[Any] = Future()
        self.open.append(future)
        fault = self.faults.get(name)
        if fault == "die" or self.killed:
            self.kill()
        elif fault != "hang" and not future.done():
            self.threads.submit(self._do, future, body)
        return future

    def _do(self, future: Future[Any], body: Callable[[], Any]) -> None:
        try:
            result, error = body(), None
        except Exception as caught:
            result, error = None, caught
        if not future.done():
            future.set_exception(error) if error else future.set_result(result)

    def start(self, weights: Tensors | None) -> Future[EngineFacts]:
        def body() -> EngineFacts:
            self.engine = self.make()
            if weights is not None:
                self.engine.update_weights(weights)
            return EngineFacts("processed", self.engine.weight_version)

        return self._call("start", body)

    def generate(self, requests: Sequence[RolloutRequest]) -> Future[list[RolloutOutput]]:
        def body() -> list[RolloutOutput]:
            assert self.engine is not None
            with self.turn:
                self.answered += [asked.request_id for asked in requests]
                return self.engine.generate(requests)

        return self._call("generate", body)

    def update(self, weights: Tensors) -> Future[int]:
        def body() -> int:
            assert self.engine is not None
            self.engine.update_weights(weights)
            return self.engine.weight_version

        return self._call("update", body)

    def cancel(self, request_ids: Sequence[str]) -> None:
        if self.engine is not None:
            self.engine.cancel(request_ids)

    def ping(self) -> Future[int | None]:
        return self._call("ping", lambda: self.faults.get("progress"))

    def kill(self) -> None:
        self.killed = True
        for future in self.open:
            if not future.done():
                future.set_exception(Dead("the process ended"))
        self.threads.shutdown(wait=False, cancel_futures=True)


def copied(source: WeightSource) -> Tensors:
    return Tensors({name: tensor.clone() for group in source.groups() for name, tensor in group}, source.version)


class Places:
    """Launches workers and remembers them; `faults[n]` are those of the n-th launched."""

    def __init__(self, *faults: dict[str, str], **options: Any) -> None:
        self.faults, self.options = faults, options
        self.workers: list[ThreadWorker] = []

    def __call__(self) -> ThreadWorker:
        number = len(self.workers)
        faults = self.faults[number] if number < len(self.faults) else {}
        self.workers.append(ThreadWorker(lambda: FakeEngine(version=3, max_length=MAX_LENGTH, **self.options), faults))
        return self.workers[-1]


@pytest.fixture
def pool() -> Iterator[Callable[..., EnginePool[Tensors]]]:
    """Makes pools, and closes them."""
    made: list[EnginePool[Tensors]] = []

    def make(places: Places, count: int = 2, limits: Limits = QUICK) -> EnginePool[Tensors]:
        made.append(EnginePool(places, count, copied, limits=limits))
        return made[-1]

    yield make
    for one in made:
        one.close()


class TestEnginePool(EngineContract):
    vocab_size = 16

    @pytest.fixture(autouse=True)
    def closing(self, pool: Callable[..., EnginePool[Tensors]]) -> None:
        self.make = pool

    def engine(self, **options: Any) -> RolloutEngine:
        return self.make(Places(**options), 2, Limits(**{**vars(QUICK), "chunk_requests": 32}))

    def weights(self, seed: int) -> dict[str, torch.Tensor]:
        return table(seed)

    def logits(self, tokens: tuple[int, ...], weights: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        rows = torch.from_numpy(FakeEngine(self.vocab_size).table) if weights is None else weights[WEIGHT].double()
        return rows[torch.tensor(tokens)]

    def routes(self, tokens: tuple[int, ...]) -> np.ndarray:
        return np.array([[[token % 2]] for token in tokens])


def table(seed: int) -> dict[str, torch.Tensor]:
    return {WEIGHT: torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)).mul(2)}


def many(count: int = 40, tokens: int = 8) -> list[RolloutRequest]:
    return [request(f"r{i}", (1 + i % 9,), tokens, seed=i) for i in range(count)]


def expected(requests: Sequence[RolloutRequest], seed: int | None = None) -> list[RolloutOutput]:
    """What one engine gives, with the first weights or with those of a seed."""
    engine = FakeEngine(version=3, max_length=MAX_LENGTH)
    if seed is not None:
        engine.update_weights(Tensors(table(seed), version=4))
    return engine.generate(requests)


def test_work_is_shared_by_load(pool: Any) -> None:
    places = Places(step_seconds=0.0005)
    engines = pool(places, 3)
    requests = [request(f"r{i}", (1,), 200 if i < 4 else 10, seed=i) for i in range(60)]
    assert engines.generate(requests) == expected(requests)
    counts = [len(worker.answered) for worker in places.workers]
    assert sum(counts) == 60 and min(counts) >= 4
    long = next(worker for worker in places.workers if "r0#0" in worker.answered)
    assert len(long.answered) < max(counts), "the engine with the long requests got as many as the others"


@pytest.mark.parametrize("fault", ["die", "hang"])
def test_an_engine_that_dies_or_hangs_over_requests_is_replaced_and_they_are_answered(pool: Any, fault: str) -> None:
    limits = Limits(**{**vars(QUICK), "request_seconds": PATIENCE})
    places = Places({"generate": fault})
    engines = pool(places, limits=limits)
    assert engines.generate(many()) == expected(many())
    assert engines.replacements == 1 and len(places.workers) == 3
    assert engines.generate(many()) == expected(many())
    assert engines.replacements == 1


def test_an_engine_that_gives_no_sign_of_life_is_replaced_though_nobody_asks_it(pool: Any) -> None:
    engines = pool(Places({"ping": "hang"}, {"ping": "die"}), limits=Limits(**{**vars(QUICK), "stall_seconds": PATIENCE}))
    deadline = time.monotonic() + 20
    while engines.replacements < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engines.replacements == 2
    assert engines.generate(many()) == expected(many())


def test_an_engine_that_makes_no_step_is_replaced(pool: Any) -> None:
    engines = pool(Places({"generate": "hang", "progress": "7"}), 1, Limits(**{**vars(QUICK), "stall_seconds": PATIENCE}))
    assert engines.generate(many(3)) == expected(many(3))
    assert engines.replacements == 1


@pytest.mark.parametrize("fault", ["die", "hang"])
def test_an_engine_lost_in_an_update_is_replaced_by_one_with_the_new_weights(pool: Any, fault: str) -> None:
    places = Places({"update": fault})
    limits = Limits(**{**vars(QUICK), "update_seconds": PATIENCE})
    engines = pool(places, limits=limits)
    engines.update_weights(Tensors(table(1), version=4))
    assert engines.weight_version == 4
    assert engines.generate(many(80)) == expected(many(80), seed=1)
    assert engines.replacements == 1
    deadline = time.monotonic() + 10
    while len(places.workers[-1].answered) == 0 and time.monotonic() < deadline:
        assert engines.generate(many(80)) == expected(many(80), seed=1)
    assert places.workers[-1].answered, "the replacement takes part"


def test_an_update_during_a_call_cuts_between_answers(pool: Any) -> None:
    engines = pool(Places(step_seconds=0.001))
    requests = many(60, tokens=12)
    outputs: list[RolloutOutput] = []
    caller = threading.Thread(target=lambda: outputs.extend(engines.generate(requests)))
    caller.start()
    time.sleep(0.1)
    engines.update_weights(Tensors(table(1), version=4))
    caller.join(timeout=30)
    old, new = expected(requests), expected(requests, seed=1)
    versions = [output.weight_versions[0] for output in outputs]
    assert set(versions) == {3, 4}
    for output, version, before, after in zip(outputs, versions, old, new, strict=True):
        assert output == (before if version == 3 else after)


def test_a_replacement_of_refused_weights_keeps_the_old_ones(pool: Any) -> None:
    engines = pool(Places({"update": "die"}))
    with pytest.raises(ValueError, match=WEIGHT):
        engines.update_weights(Tensors({WEIGHT: torch.zeros(3, 3)}, version=4))
    assert engines.weight_version == 3
    assert engines.generate(many()) == expected(many())
    engines.update_weights(Tensors(table(1), version=4))
    assert engines.generate(many()) == expected(many(), seed=1)


def test_a_request_that_ends_every_engine_is_given_up_by_name(pool: Any) -> None:
    engines = pool(Places(*[{"generate": "die"}] * 9), 1)
    with pytest.raises(EnginesLost, match=r"3 engines ended over requests r0, r1.*Dead: the process ended"):
        engines.generate(many(2))


def test_engines_that_never_start_end_the_pool() -> None:
    with pytest.raises(EnginesLost, match="no engine starts.*Dead"):
        EnginePool(Places(*[{"start": "die"}] * 9), 2, copied, limits=QUICK)
    with pytest.raises(EnginesLost, match=r"starting took more than 0\.2 s"):
        EnginePool(Places(*[{"start": "hang"}] * 9), 1, copied, limits=Limits(**{**vars(QUICK), "start_seconds": 0.2}))


def test_engines_that_stop_starting_end_the_calls(pool: Any) -> None:
    engines = pool(Places({"generate": "die"}, *[{"start": "die"}] * 9), 1)
    with pytest.raises(EnginesLost, match="no engine starts"):
        engines.generate(many())
    with pytest.raises(EnginesLost, match="no engine starts"):
        engines.generate(many())
    with pytest.raises(EnginesLost, match="no engine starts"):
        engines.update_weights(Tensors(table(1), version=4))


def test_a_mistake_of_the_user_comes_through_at_once() -> None:
    class Wrong(Places):
        def __call__(self) -> ThreadWorker:
            super().__call__()

            def refuse() -> FakeEngine:
                raise UserError("no such folder 'x'")

            return ThreadWorker(refuse)

    places = Wrong()
    with pytest.raises(UserError, match="no such folder"):
        EnginePool(places, 1, copied, limits=QUICK)
    assert len(places.workers) == 1


def test_waiting_requests_can_be_cancelled(pool: Any) -> None:
    engines = pool(Places(step_seconds=0.002), 1, Limits(**{**vars(QUICK), "chunks_in_flight": 1}))
    requests = many(12, tokens=4000)
    outputs: list[RolloutOutput] = []
    caller = threading.Thread(target=lambda: outputs.extend(engines.generate(requests)))
    caller.start()
    time.sleep(0.1)
    engines.cancel([asked.request_id for asked in requests])
    caller.join(timeout=20)
    assert [output.finish_reason for output in outputs] == ["cancelled"] * 12
    assert all(len(output.token_ids) >= 1 for output in outputs)


def test_close_ends_calls_that_wait(pool: Any) -> None:
    engines = pool(Places(step_seconds=0.01))
    threading.Timer(0.2, engines.close).start()
    with pytest.raises(EnginesLost, match="closed"):
        engines.generate(many(100, tokens=4000))
    engines.close()


def test_a_pool_of_none_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 engine"):
        EnginePool(Places(), 0, copied, limits=QUICK)

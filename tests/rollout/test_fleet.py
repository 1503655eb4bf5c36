"""Engines in Ray actors: killed in the middle of rollouts and of updates, they are replaced and nothing is lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.cluster.local import ray_cluster
from posttrain.config.errors import UserError
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.fake import WEIGHT, FakeEngine
from posttrain.rollout.fleet import ActorResources, ray_fleet
from posttrain.rollout.pool import EnginePool, Limits
from posttrain.rollout.types import RolloutOutput, RolloutRequest, WeightSource
from tests.rollout.contract import Tensors, request
from tests.rollout.vllm.tiny import needs_vllm, tiny_model, write_tiny

QUICK = Limits(chunk_requests=8, chunks_in_flight=2, tick_seconds=0.02, start_seconds=120)
THREADS = ActorResources(environment=(("OMP_NUM_THREADS", "1"),))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_cluster(None, cpus=2):
        yield


class Marked(FakeEngine):
    """A fake engine that writes its process's number into a folder, and may be slow to take weights."""

    def __init__(self, folder: Path, update_seconds: float = 0.0, **options: Any) -> None:
        super().__init__(version=3, **options)
        self.folder, self.update_seconds = folder, update_seconds
        (folder / str(os.getpid())).touch()

    def update_weights(self, source: WeightSource) -> None:
        (self.folder / f"updating-{os.getpid()}").touch()
        time.sleep(self.update_seconds)
        super().update_weights(source)


def table(seed: int) -> dict[str, torch.Tensor]:
    return {WEIGHT: torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)).mul(2)}


def many(count: int = 64, tokens: int = 12) -> list[RolloutRequest]:
    return [request(f"r{i}", (1 + i % 9,), tokens, seed=i) for i in range(count)]


def processes(folder: Path, prefix: str = "") -> list[int]:
    names = [path.name for path in folder.iterdir() if path.name.startswith(prefix)]
    return [int(name.removeprefix(prefix)) for name in names if name.removeprefix(prefix).isdigit()]


def in_background(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    kept: list[Any] = []
    thread = threading.Thread(target=lambda: kept.append(call()))
    thread.start()
    return thread, kept


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.005)


@pytest.mark.slow
def test_killed_and_stopped_actors_are_replaced(cluster: None, tmp_path: Path) -> None:
    """One fleet through it all: starting processes takes most of the time."""
    new = FakeEngine(version=3)
    expected = new.generate(many())
    limits = Limits(**{**vars(QUICK), "stall_seconds": 2.0})
    fleet = ray_fleet(partial(Marked, tmp_path, step_seconds=0.005), 2, resources=THREADS, limits=limits, weights_root=tmp_path)
    try:
        thread, outputs = in_background(lambda: fleet.generate(many()))
        time.sleep(0.3)
        os.kill(processes(tmp_path)[0], signal.SIGKILL)
        thread.join(timeout=120)
        assert outputs == [expected] and fleet.replacements == 1

        stopped = [pid for pid in processes(tmp_path) if Path(f"/proc/{pid}").exists()][0]
        thread, outputs = in_background(lambda: fleet.generate(many()))
        time.sleep(0.3)
        os.kill(stopped, signal.SIGSTOP)
        thread.join(timeout=120)
        assert outputs == [expected] and fleet.replacements == 2

        with pytest.raises(ValueError, match="weights do not fit"):
            fleet.update_weights(Tensors({WEIGHT: torch.zeros(2, 2)}, version=4))
        fleet.update_weights(Tensors(table(1), version=4))
        new.update_weights(Tensors(table(1), version=4))
        assert fleet.generate(many()) == new.generate(many())
        assert len(list(tmp_path.glob("posttrain-weights-*"))) == 1, "a refused version is removed"
    finally:
        fleet.close()
    assert not list(tmp_path.glob("posttrain-weights-*"))


@pytest.mark.slow
def test_an_actor_killed_in_an_update_is_replaced_by_one_with_the_new_weights(cluster: None, tmp_path: Path) -> None:
    fleet = ray_fleet(partial(Marked, tmp_path, 1.0), 2, resources=THREADS, limits=QUICK, weights_root=tmp_path)
    try:
        thread, _ = in_background(lambda: fleet.update_weights(Tensors(table(1), version=4)))
        wait_for(lambda: processes(tmp_path, "updating-"))
        os.kill(processes(tmp_path, "updating-")[0], signal.SIGKILL)
        thread.join(timeout=120)
        engine = FakeEngine(version=3)
        engine.update_weights(Tensors(table(1), version=4))
        assert fleet.weight_version == 4 and fleet.generate(many()) == engine.generate(many())
        wait_for(lambda: fleet.replacements == 1 and len(list(tmp_path.glob("updating-*"))) == 3)
        assert fleet.generate(many(200)) == engine.generate(many(200))
    finally:
        fleet.close()


def refuse() -> FakeEngine:
    raise UserError("no such folder 'x'")


def test_an_engine_that_cannot_be_made_says_why(cluster: None) -> None:
    with pytest.raises(UserError, match="no such folder 'x'"):
        ray_fleet(refuse, 1, resources=THREADS, limits=QUICK)


def make_vllm(folder: Path, pids: Path) -> Any:
    from posttrain.rollout.vllm.engine import VLLMEngine

    engine = VLLMEngine(folder, version=3, own_process=False, max_batch_tokens=256, cache_bytes=64 << 20)
    (pids / str(os.getpid())).touch()
    return engine


def same(outputs: Sequence[RolloutOutput], others: Sequence[RolloutOutput]) -> None:
    for output, other in zip(outputs, others, strict=True):
        assert (output.request_id, output.token_ids) == (other.request_id, other.token_ids)
        assert (output.finish_reason, output.weight_versions) == (other.finish_reason, other.weight_versions)
        assert output.logprobs == pytest.approx(other.logprobs, abs=2e-5)


@needs_vllm
@pytest.mark.slow
def test_vllm_engines_killed_in_a_rollout_and_in_an_update_lose_no_request(cluster: None, tmp_path: Path) -> None:
    folder, pids = tmp_path / "checkpoint", tmp_path / "pids"
    pids.mkdir()
    model = write_tiny(folder)
    new = tiny_model(1)
    requests = [request(f"r{i}", tuple((7 * i + j) % 97 for j in range(1 + i % 50)), 60, seed=i) for i in range(96)]
    environment = (("OMP_NUM_THREADS", "1"), ("VLLM_CPU_KVCACHE_SPACE", "1"))
    fleet: EnginePool[Any] = ray_fleet(
        partial(make_vllm, folder, pids), 2, resources=ActorResources(environment=environment), limits=QUICK
    )
    try:
        expected = EmbeddedEngine(model, version=3).generate(requests)
        same(fleet.generate(requests), expected)
        first = set(processes(pids))

        thread, outputs = in_background(lambda: fleet.generate(requests))
        time.sleep(0.4)
        os.kill(min(first), signal.SIGKILL)
        thread.join(timeout=300)
        same(outputs[0], expected)
        assert fleet.replacements == 1
        wait_for(lambda: len(processes(pids)) == 3, 120)

        thread, _ = in_background(lambda: fleet.update_weights(Tensors(new.state_dict(), version=4)))
        time.sleep(0.05)
        os.kill(max(first), signal.SIGKILL)
        thread.join(timeout=300)
        assert fleet.weight_version == 4 and not thread.is_alive()
        updated = EmbeddedEngine(new, version=4).generate(requests)
        same(fleet.generate(requests), updated)
        wait_for(lambda: len(processes(pids)) == 4, 120)
        for _ in range(3):
            same(fleet.generate(requests), updated)
    finally:
        fleet.close()

"""The reward in a Ray actor: batches, errors that stay with their request, deadlines, and a death that loses nothing."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from posttrain.cluster.local import ray_cluster
from posttrain.config.errors import UserError
from posttrain.config.schema import RLStage
from posttrain.reward.actor import RewardClient, ServiceLimits, ServiceResources, serve_reward
from posttrain.reward.types import LevelScore, RewardBreakdown, RewardModel, Sample

THREADS = ServiceResources(environment={"OMP_NUM_THREADS": "1"})


class Slow:
    """Scores an answer by its length, after a while; writes its process's number, and refuses some answers."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.seconds = seconds
        (folder / str(os.getpid())).touch()

    def score(self, samples: Sequence[Sample]) -> list[RewardBreakdown]:
        time.sleep(self.seconds)
        if any(sample.answer == "refuse" for sample in samples):
            raise UserError("this answer cannot be scored", where="a record")
        totals = [float(len(sample.answer)) for sample in samples]
        return [RewardBreakdown(total, (LevelScore("rest", total, 1.0, total),)) for total in totals]


def answers(count: int, start: int = 0) -> list[Sample]:
    return [Sample([{"role": "user", "content": "q"}], "a" * (start + i), {}) for i in range(count)]


def totals(breakdowns: Sequence[RewardBreakdown]) -> list[float]:
    return [breakdown.total for breakdown in breakdowns]


def together(*calls: Callable[[], Any]) -> list[Any]:
    """What calls made at the same time return, or raise."""
    results: list[Any] = [None] * len(calls)

    def run(number: int) -> None:
        try:
            results[number] = calls[number]()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return results


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_cluster(None, cpus=2):
        yield


def test_without_ray_it_is_refused() -> None:
    with pytest.raises(UserError, match="needs a running Ray"):
        serve_reward(partial(Slow, Path("."), 0.0))


@pytest.mark.parametrize("options", [{"batch_characters": 0}, {"deadline_seconds": 0}, {"restarts": -1}])
def test_limits_without_room_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="limits"):
        ServiceLimits(**options)


@pytest.mark.slow
def test_one_actor_through_it_all(cluster: None, tmp_path: Path) -> None:
    """One actor: starting processes takes most of the time."""
    limits = ServiceLimits(wait_seconds=0.05, request_samples=5, deadline_seconds=60, restarts=1)
    client = serve_reward(partial(Slow, tmp_path, 0.2), name="reward", resources=THREADS, limits=limits)
    same = serve_reward(partial(Slow, tmp_path, 0.2), name="reward", limits=limits)
    copied: RewardClient = pickle.loads(pickle.dumps(same))
    try:
        assert isinstance(client, RewardModel)
        assert totals(client.score(answers(12))) == [float(i) for i in range(12)]
        assert client.score([]) == []
        before = client.batches()
        calls = [partial(one.score, answers(3, start)) for start, one in enumerate((client, same, copied))]
        found = together(*calls)
        assert [totals(of) for of in found] == [[start + i for i in range(3)] for start in range(3)]
        assert client.batches() - before <= 2, "calls that come together share a batch"
        assert len(list(tmp_path.iterdir())) == 1, "clients of one name share an actor"

        good, refused = together(
            lambda: client.score(answers(2)), lambda: client.score([Sample([{"role": "user", "content": "q"}], "refuse", {})])
        )
        assert totals(good) == [0.0, 1.0]
        assert isinstance(refused, UserError) and str(refused) == "a record: this answer cannot be scored"

        impatient = RewardClient(client._actor, ServiceLimits(deadline_seconds=0.05))
        with pytest.raises(UserError, match=r"no answer within 0.05 seconds"):
            impatient.score(answers(1))

        (pid,) = [int(path.name) for path in tmp_path.iterdir()]
        killer = threading.Timer(0.3, os.kill, (pid, signal.SIGKILL))
        killer.start()
        found = together(*[partial(client.score, answers(9, start)) for start in range(4)])
        assert [totals(of) for of in found] == [[start + i for i in range(9)] for start in range(4)]
        assert len(list(tmp_path.iterdir())) == 2, "another process took over"

        pid = next(int(path.name) for path in tmp_path.iterdir() if int(path.name) != pid)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(UserError, match="died more than 1 times"):
            client.score(answers(1))
    finally:
        client.close()


@pytest.mark.slow
def test_a_stages_reward_is_the_same_when_served(cluster: None, tmp_path: Path) -> None:
    from posttrain.stages.rewards import build_reward
    from tests.stages.tasks import RL, make_job

    job = make_job(tmp_path, {**RL, "reward": {**RL["reward"], "actor_gpus": 0}})
    stage = job.stage
    assert isinstance(stage, RLStage)
    served = build_reward(job, stage.reward)
    assert isinstance(served, RewardClient)
    own = build_reward(job, stage.reward.model_copy(update={"actor_gpus": None}))
    reference = {"verifier": "exact", "answer": "7"}
    samples = [Sample([{"role": "user", "content": "3+4"}], str(number), reference) for number in range(9)]
    try:
        for one, other in zip(served.score(samples), own.score(samples), strict=True):
            assert one.total == pytest.approx(other.total, abs=1e-6)
            assert one.level("verifier") == other.level("verifier")
    finally:
        served.close()

"""The reward in a Ray actor: batches, errors that stay with their request, deadlines, and a death that loses nothing."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from posttrain.cluster.local import ray_cluster
from posttrain.config.errors import UserError
from posttrain.config.schema import RLStage
from posttrain.reward.actor import RewardClient, RewardHost, ServiceLimits, ServiceResources, serve_reward
from posttrain.reward.types import LevelScore, RewardBreakdown, RewardModel, Sample

THREADS = ServiceResources(environment={"OMP_NUM_THREADS": "1"})


class Slow:
    """Scores an answer by its length, after a while; writes its process's number, and refuses some answers.

    A process with a file `hold-NUMBER` never ends a batch; it says by `held-NUMBER` that it has begun one.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds
        (folder / str(os.getpid())).touch()

    def score(self, samples: Sequence[Sample]) -> list[RewardBreakdown]:
        time.sleep(self.seconds)
        while (self.folder / f"hold-{os.getpid()}").exists():
            (self.folder / f"held-{os.getpid()}").touch()
            time.sleep(0.01)
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


def processes(folder: Path) -> list[int]:
    """Processes in which a `Slow` was made."""
    return [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]


def kill_while_scoring(folder: Path, pid: int) -> None:
    """Kill a process that has a file `hold-NUMBER` once it has begun a batch."""
    end = time.monotonic() + 30
    while not (folder / f"held-{pid}").exists():
        assert time.monotonic() < end, "no batch was begun"
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)


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


class Odd:
    """Gives a breakdown an answer, except where the answer says otherwise."""

    def score(self, samples: Sequence[Sample]) -> list[RewardBreakdown]:
        for sample in samples:
            if sample.answer == "exit":
                raise SystemExit(3)
            if sample.answer == "stop":
                raise StopIteration
        return [RewardBreakdown(1.0, ()) for sample in samples if sample.answer != "fewer"]


def hosted(check: Callable[[RewardHost], Coroutine[Any, Any, None]], factory: Callable[[], RewardModel] = Odd) -> None:
    """Run a check on a host in this process; one that waits for ever fails."""

    async def run() -> None:
        await asyncio.wait_for(check(RewardHost(factory, ServiceLimits())), timeout=30)

    asyncio.run(run())


def asking(answer: str) -> list[Sample]:
    return [Sample([{"role": "user", "content": "q"}], answer, {})]


@pytest.mark.parametrize(("answer", "told"), [("exit", "SystemExit"), ("stop", "StopIteration"), ("fewer", "0 breakdowns of 1")])
def test_whatever_scoring_raises_is_answered_and_stays_with_its_request(answer: str, told: str) -> None:
    async def check(host: RewardHost) -> None:
        good, bad = await asyncio.gather(host.score(asking("a")), host.score(asking(answer)), return_exceptions=True)
        assert not isinstance(good, BaseException) and totals(good) == [1.0]
        assert isinstance(bad, RuntimeError) and told in str(bad)
        assert totals(await host.score(asking("a"))) == [1.0]

    hosted(check)


def test_a_sample_that_cannot_be_measured_fails_alone() -> None:
    async def check(host: RewardHost) -> None:
        with pytest.raises(KeyError, match="content"):
            await host.score([Sample([{"role": "user"}], "a", {})])
        assert totals(await host.score(asking("a"))) == [1.0]

    hosted(check)


def test_a_serving_task_that_ended_answers_and_is_replaced() -> None:
    release = threading.Event()

    class Waiting(Odd):
        def score(self, samples: Sequence[Sample]) -> list[RewardBreakdown]:
            release.wait(30)
            return super().score(samples)

    async def check(host: RewardHost) -> None:
        asked = asyncio.create_task(host.score(asking("a")))
        while await host.batches() == 0:
            await asyncio.sleep(0.01)
        assert host._serving is not None
        host._serving.cancel()
        with pytest.raises(RuntimeError, match="CancelledError"):
            await asked
        release.set()
        assert totals(await host.score(asking("a"))) == [1.0]

    try:
        hosted(check, Waiting)
    finally:
        release.set()


def test_what_loading_raises_every_call_raises() -> None:
    release = threading.Event()

    def load() -> RewardModel:
        release.wait(30)
        raise UserError("no such checkpoint")

    async def check(host: RewardHost) -> None:
        assert await host.state() == "loading"
        release.set()
        for _ in range(2):
            with pytest.raises(UserError, match="no such checkpoint"):
                await host.score(asking("a"))

    try:
        hosted(check, load)
    finally:
        release.set()


class Stuck:
    """Stays in the making until a file is there."""

    def __init__(self, file: Path) -> None:
        while not file.exists():
            time.sleep(0.05)

    def score(self, samples: Sequence[Sample]) -> list[RewardBreakdown]:
        raise AssertionError("never loaded")


@pytest.mark.slow
def test_a_call_without_an_answer_says_what_the_actor_waits_for(cluster: None, tmp_path: Path) -> None:
    limits = ServiceLimits(deadline_seconds=0.5)
    unplaced = serve_reward(Odd, resources=replace(THREADS, gpus=64), limits=limits)
    loading = serve_reward(partial(Stuck, tmp_path / "never"), resources=THREADS, limits=limits)
    try:
        with pytest.raises(UserError, match=r"within 0.5 seconds: its process has not started.*reward\.actor_gpus"):
            unplaced.score(asking("a"))
        assert RewardClient(loading._actor, ServiceLimits(deadline_seconds=60)).batches() == 0, "its process has started"
        with pytest.raises(UserError, match="still loading"):
            loading.score(asking("a"))
    finally:
        unplaced.close()
        loading.close()


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
        assert len(processes(tmp_path)) == 1, "clients of one name share an actor"

        good, refused = together(
            lambda: client.score(answers(2)), lambda: client.score([Sample([{"role": "user", "content": "q"}], "refuse", {})])
        )
        assert totals(good) == [0.0, 1.0]
        assert isinstance(refused, UserError) and str(refused) == "a record: this answer cannot be scored"

        impatient = RewardClient(client._actor, ServiceLimits(deadline_seconds=0.05))
        with pytest.raises(UserError, match=r"no answer within 0.05 seconds: its process is scoring"):
            impatient.score(answers(1))

        client.score(answers(1))  # comes after the batch that was not waited for

        (pid,) = processes(tmp_path)
        (tmp_path / f"hold-{pid}").touch()
        calls = [partial(client.score, answers(9, start)) for start in range(4)]
        *found, killed = together(*calls, partial(kill_while_scoring, tmp_path, pid))
        assert killed is None
        assert [totals(of) for of in found] == [[start + i for i in range(9)] for start in range(4)]
        assert len(processes(tmp_path)) == 2, "another process took over"

        (second,) = set(processes(tmp_path)) - {pid}
        os.kill(second, signal.SIGKILL)
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
    reference = {"verifier": "exact", "answer": "7"}
    samples = [Sample([{"role": "user", "content": "3+4"}], str(number), reference) for number in range(9)]
    own_section = stage.reward.model_copy(update={"actor_gpus": None})
    with build_reward(job, stage.reward) as served, build_reward(job, own_section) as own:
        assert isinstance(served, RewardClient)
        for one, other in zip(served.score(samples), own.score(samples), strict=True):
            assert one.total == pytest.approx(other.total, abs=1e-6)
            assert one.level("verifier") == other.level("verifier")
    with pytest.raises(UserError, match="died"):
        served.score(samples)


@pytest.mark.parametrize(
    ("rank", "ranks", "fails", "closed"),
    [(0, 1, False, True), (0, 1, True, True), (0, 2, False, True), (1, 2, False, False), (0, 2, True, False)],
)
def test_the_stages_actor_ends_with_the_block_and_a_failing_rank_takes_it_from_nobody(
    rank: int, ranks: int, fails: bool, closed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.reward import actor
    from posttrain.stages import group
    from posttrain.stages.rewards import build_reward
    from tests.stages.tasks import RL, make_job

    events: list[str] = []
    names: list[str] = []

    class Client:
        def close(self) -> None:
            events.append("closed")

    def serve(factory: Callable[[], RewardModel], *, name: str, resources: ServiceResources) -> Client:
        names.append(name)
        return Client()

    monkeypatch.setattr(actor, "serve_reward", serve)
    monkeypatch.setattr(group, "rank", lambda: rank)
    monkeypatch.setattr(group, "world_size", lambda: ranks)
    monkeypatch.setattr(group, "barrier", lambda: events.append("barrier"))
    job = make_job(tmp_path, {**RL, "reward": {**RL["reward"], "actor_gpus": 0}})
    assert isinstance(job.stage, RLStage)
    for _ in range(2):
        events.clear()
        try:
            with build_reward(job, job.stage.reward):
                if fails:
                    raise RuntimeError("training failed")
        except RuntimeError:
            assert fails
        assert events == ["barrier"] * (not fails) + ["closed"] * closed
    assert len(set(names)) == 2, "an attempt joins no other's actor"

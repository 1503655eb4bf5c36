"""Execution on a real local Ray with fake steps: skipping, redoing, concurrency, failures."""

from __future__ import annotations

import errno
import json
import os

import pytest

from posttrain.cluster.local import ray_cluster
from posttrain.config.errors import UserError
from posttrain.pipeline.failures import NodeFailed
from posttrain.pipeline.folder import RunFolder
from posttrain.pipeline.report import table
from posttrain.pipeline.run import run
from tests.pipeline.configs import STEPS, make_config, sft


@pytest.fixture(scope="module", autouse=True)
def ray():
    """One local Ray of two cores for all tests here; workers find the tests' modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.getcwd())
        with ray_cluster(None, cpus=2):
            yield


def control(folder, **nodes):
    (folder / "control.json").write_text(json.dumps(nodes))


def calls(folder, what="START"):
    """Nodes in the order they were called since the last look."""
    path = folder / "calls.log"
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    path.unlink(missing_ok=True)
    return [node for kind, node, _ in lines if kind == what]


def states(folder):
    return {name: node["state"] for name, node in RunFolder(folder / "run").read_manifest()["nodes"].items()}


def node_file(folder, pattern):
    (found,) = (folder / "run" / "stages").glob(pattern)
    return found


def test_independent_stages_train_at_the_same_time_and_a_second_run_does_nothing(tmp_path):
    config = make_config(tmp_path, {"one": sft(), "side": sft(init="base", steps=3)})
    control(tmp_path, one={"do": "sleep", "seconds": 8}, side={"do": "sleep", "seconds": 8})
    folder = run(config, steps=STEPS)
    lines = [line.split() for line in (tmp_path / "calls.log").read_text().splitlines()]
    times = {(what, node): float(when) for what, node, when in lines}
    assert max(times["START", "one"], times["START", "side"]) < min(times["END", "one"], times["END", "side"])
    assert set(states(tmp_path).values()) == {"done"}
    assert [row.heldout_accuracy for row in table(folder.path)] == [0.1, 0.6, 0.6]
    assert [row.tokens_per_second for row in table(folder.path)] == [None, 50.0, 50.0]
    calls(tmp_path)

    run(config, steps=STEPS)
    assert calls(tmp_path) == []

    # A damaged file: the node is redone, and what depends on it is kept, as the content comes out the same.
    node_file(tmp_path, "*-one/data/records.jsonl").write_text("broken")
    run(config, steps=STEPS)
    assert calls(tmp_path) == ["one.data"]
    assert set(states(tmp_path).values()) == {"done"}


def test_a_user_error_in_a_worker_arrives_as_its_line_and_finished_nodes_are_kept(tmp_path):
    config = make_config(tmp_path, {"one": sft()})
    control(tmp_path, **{"one.data": {"do": "user error"}})
    with pytest.raises(UserError) as caught:
        run(config, steps=STEPS)
    assert str(caught.value) == "data.jsonl:17: broken line; mend it"
    assert (
        states(tmp_path)["base"] == "done" and states(tmp_path)["one.data"] == "failed" and states(tmp_path)["one"] == "skipped"
    )
    assert "UserError" in node_file(tmp_path, "*-one/logs/prepare.log").read_text()

    calls(tmp_path)
    control(tmp_path, one={"do": "user error"})
    with pytest.raises(UserError, match="^data.jsonl:17: broken line; mend it$"):
        run(config, steps=STEPS)
    assert "base" not in calls(tmp_path)
    assert states(tmp_path)["one.data"] == "done" and states(tmp_path)["one"] == "failed"


def test_a_full_disk_and_a_killed_task_are_one_line_each_and_a_bug_keeps_its_kind(tmp_path):
    config = make_config(tmp_path, {"one": sft()})
    control(tmp_path, **{"one.data": {"do": "full"}})
    with pytest.raises(UserError, match=r"stage 'one\.data'.*no space left on the disk"):
        run(config, steps=STEPS)
    control(tmp_path, **{"one.data": {"do": "kill"}})
    with pytest.raises(UserError, match=r"stage 'one\.data': worker of rank 0 was killed"):
        run(config, steps=STEPS)
    control(tmp_path, **{"one.data": {"do": "bug"}})
    with pytest.raises(NodeFailed, match=r"ZeroDivisionError: a bug"):
        run(config, steps=STEPS)
    run(config, until="base", steps=STEPS)
    assert states(tmp_path)["base.eval"] == "done" and states(tmp_path)["one.data"] == "pending"


def test_a_killed_rank_is_named_and_the_next_run_goes_on_from_the_checkpoints(tmp_path):
    config = make_config(tmp_path, {"one": sft(batch_size=2)}, resources={"num_workers": 2})
    control(tmp_path, one={"do": "kill", "rank": 1, "others": 60})
    with pytest.raises(UserError, match=r"stage 'one': worker of rank 1 was killed .*run again.*train-rank1\.log"):
        run(config, steps=STEPS)
    checkpoint = node_file(tmp_path, "*-one/checkpoints/step-5")
    control(tmp_path, one={"do": "world"})
    calls(tmp_path)
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("posttrain.pipeline.run.log_restart", lambda path, stage: kept.append(stage))
        run(config, steps=STEPS)
    assert kept == []  # checkpoints were there when training began
    assert [node for node in calls(tmp_path) if node == "one"] == ["one", "one"]
    assert [node_file(tmp_path, f"*-one/world-{rank}").read_text() for rank in (0, 1)] == ["2 gloo", "2 gloo"]
    assert not checkpoint.exists()  # gone once the stage is done


@pytest.mark.slow
def test_a_stage_whose_worker_dies_is_started_again_as_often_as_allowed(tmp_path):
    config = make_config(tmp_path, {"one": sft()}, resources={"max_failures": 1})
    control(tmp_path, one={"do": "kill once"})
    run(config, steps=STEPS)
    assert calls(tmp_path).count("one") == 2
    assert set(states(tmp_path).values()) == {"done"}


@pytest.mark.slow
def test_checkpoints_of_other_settings_are_not_used(tmp_path):
    control(tmp_path, one={"do": "kill"})
    with pytest.raises(UserError, match="was killed"):
        run(make_config(tmp_path, {"one": sft()}), steps=STEPS)
    assert node_file(tmp_path, "*-one/checkpoints/step-5").exists()
    control(tmp_path, one={"do": "user error"})
    with pytest.raises(UserError, match="broken line"):
        run(make_config(tmp_path, {"one": sft(steps=5)}), steps=STEPS)
    assert not list((tmp_path / "run" / "stages").glob("*-one/checkpoints/*"))


def test_a_disk_that_is_full_for_the_command_itself_is_one_line(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RunFolder, "write_manifest", full)
    with pytest.raises(UserError, match=f"^{tmp_path}/run: no space left on the disk; free some"):
        run(make_config(tmp_path, {"one": sft()}), steps=STEPS)


def test_more_workers_than_cores_are_refused(tmp_path):
    config = make_config(tmp_path, {"one": sft(batch_size=3)}, resources={"num_workers": 3})
    with pytest.raises(UserError, match="needs 3 CPU cores at once, and there are 2; lower num_workers"):
        run(config, steps=STEPS)

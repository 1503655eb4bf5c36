"""Graph and plan: what depends on what, what is used again, what a command selects."""

from __future__ import annotations

import subprocess
import sys

import pytest

from posttrain.config.errors import UserError
from posttrain.pipeline.artifacts import Artifact, seal
from posttrain.pipeline.folder import RunFolder
from posttrain.pipeline.graph import ancestors, build_graph, descendants
from posttrain.pipeline.hashing import code_hash
from posttrain.pipeline.parts import config_hash
from posttrain.pipeline.plan import demand, plan, select, workers_demand
from tests.pipeline.configs import make_config, sft

STAGES = {
    "one": sft(),
    "judge": {"kind": "reward", "init": "one", "data": {"sums/train": 1.0}, "heldout": {"sums/test": 1.0}, "steps": 2},
    "rl": {"kind": "rl", "init": "one", "data": {"sums/train": 1.0}, "steps": 2, "reward": {"model": "judge"}},
    "control": sft("one", match_time_of="rl"),
}


@pytest.fixture
def config(tmp_path):
    return make_config(tmp_path, STAGES)


def complete(config, names=None):
    """Write artifacts as a finished run would, with the node's name as content."""
    folder = RunFolder(f"{config.output_dir}/{config.name}")
    done: dict[str, Artifact] = {}
    for node in build_graph(config).values():
        if names is None or node.name in names:
            folder.make_stage_folder(node.stage)
            path = folder.node_folder(node)
            path.mkdir()
            (path / "content").write_text(node.name)
            parents = {name: done[name].hash for name in node.parents}
            done[node.name] = seal(
                folder.path, path, name=node.name, kind=node.kind, parents=parents, config_hash=config_hash(config, node),
                code_hash=code_hash(), seconds=1.0, created=0.0,
            )  # fmt: skip


def redone(config, **arguments):
    return {row.node: row.reason for row in plan(config, **arguments).rows if not row.cached}


def test_nodes_take_their_inputs_from_the_stages_that_the_config_names(config):
    graph = build_graph(config)
    assert list(graph)[:2] == ["base", "base.eval"]
    assert graph["rl"].inputs == {"init": "one", "reward": "judge", "data": "rl.data"}
    assert graph["rl.data"].inputs == {"init": "one", "reward": "judge"}
    assert graph["control"].timer == "rl" and graph["control"].parents == ("one", "control.data", "rl", "rl.data")
    assert graph["one.eval"].inputs == {"model": "one", "data": "one.data"}


def test_every_node_comes_after_its_parents(config):
    seen: set[str] = set()
    for node in build_graph(config).values():
        assert seen.issuperset(node.parents)
        seen.add(node.name)


def test_ancestors_and_descendants_follow_the_edges(config):
    graph = build_graph(config)
    assert ancestors(graph, ["judge.eval"]) == {"base", "one.data", "one", "judge.data", "judge", "judge.eval"}
    assert descendants(graph, ["judge"]) == {
        "judge",
        "judge.eval",
        "rl.data",
        "rl",
        "rl.eval",
        "control.data",
        "control",
        "control.eval",
    }


def test_a_fresh_plan_makes_everything_and_a_finished_one_nothing(config):
    assert set(redone(config).values()) == {"new"}
    complete(config)
    assert redone(config) == {}


def test_a_changed_stage_is_redone_with_what_depends_on_it(config, tmp_path):
    complete(config)
    changed = make_config(tmp_path, {**STAGES, "judge": {**STAGES["judge"], "steps": 3}})
    assert redone(changed) == {
        "judge.data": "config changed", "judge": "config changed", "judge.eval": "input changed", "rl.data": "input changed",
        "rl": "input changed", "rl.eval": "input changed", "control.data": "input changed", "control": "input changed",
        "control.eval": "input changed",
    }  # fmt: skip


def test_a_changed_learning_rate_leaves_the_data_alone(config, tmp_path):
    complete(config)
    changed = make_config(tmp_path, {**STAGES, "control": sft("one", match_time_of="rl", optim={"learning_rate": 0.5})})
    assert redone(changed) == {"control": "config changed", "control.eval": "input changed"}


def test_bookkeeping_options_redo_nothing(config, tmp_path):
    complete(config)
    changed = {name: {**stage, "save_steps": 7, "logging_steps": 3, "keep_checkpoints": 2} for name, stage in STAGES.items()}
    assert redone(make_config(tmp_path, changed, resources={"cpus_per_worker": 2, "max_failures": 3})) == {}


def test_changed_evaluation_redoes_evaluations_alone(config, tmp_path):
    complete(config)
    changed = make_config(tmp_path, STAGES, eval={"source": "sums/test", "num_prompts": 3})
    assert set(redone(changed)) == {"base.eval", "one.eval", "judge.eval", "rl.eval", "control.eval"}


def test_a_changed_seed_redoes_everything(config, tmp_path):
    complete(config)
    assert len(redone(make_config(tmp_path, STAGES, seed=1))) == 14


def test_changed_code_redoes_everything(config, monkeypatch):
    complete(config)
    monkeypatch.setattr("posttrain.pipeline.plan.code_hash", lambda: "other")
    assert set(redone(config).values()) == {"code changed"}


def test_a_changed_data_file_redoes_the_stages_that_read_it(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("{}\n")
    sums = {"kind": "reasoning_gym", "task": "chain_sum", "splits": {"train": 8, "test": 4}}
    sources = {"sums": sums, "mine": {"kind": "jsonl", "path": str(data)}}
    stages = {"one": sft(), "two": sft(data={"mine": 1.0})}
    config = make_config(tmp_path, stages, sources=sources, model={"path": str(tmp_path / "none")})
    complete(config)
    data.write_text('{"text": "x"}\n')
    assert set(redone(config)) == {"two.data", "two", "two.eval"}


def test_a_damaged_record_is_redone(config):
    complete(config)
    folder = RunFolder(f"{config.output_dir}/{config.name}")
    (folder.node_folder(build_graph(config)["judge"]) / "artifact.json").write_text("{")
    assert redone(config)["judge"] == "record damaged"


def test_until_stops_after_a_stage_and_evaluates_all_up_to_it(config):
    assert select(config, until="judge").wanted == {
        "base",
        "base.eval",
        "one.data",
        "one",
        "one.eval",
        "judge.data",
        "judge",
        "judge.eval",
    }


def test_only_leaves_evaluations_of_other_stages_out(config):
    assert select(config, only="judge").wanted == {"base", "one.data", "one", "judge.data", "judge", "judge.eval"}


def test_from_redoes_a_stage_and_its_dependants(config):
    complete(config)
    assert set(redone(config, from_stage="control")) == {"control.data", "control", "control.eval"}
    with pytest.raises(UserError, match="comes after"):
        select(config, until="one", from_stage="rl")


def test_an_unknown_stage_is_refused_with_the_nearest_name(config):
    with pytest.raises(UserError, match="did you mean 'judge'"):
        plan(config, until="juge")


def test_planning_imports_neither_torch_nor_ray():
    code = "import sys, posttrain.pipeline.plan, posttrain.pipeline.run; print([m for m in ('torch', 'ray') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_gpus_of_a_node_are_those_of_its_workers_and_of_its_rewards_actor(tmp_path):
    stages = {**STAGES, "rl": {**STAGES["rl"], "reward": {"model": "judge", "actor_gpus": 0.5}}}
    config = make_config(tmp_path, stages, resources={"num_workers": 2, "gpus_per_worker": 1})
    graph = build_graph(config)
    names = ("base", "rl.data", "rl", "rl.eval", "judge")
    assert {name: demand(config, graph[name])[1] for name in names} == dict(zip(names, (0, 1, 3, 1, 2), strict=True))
    assert workers_demand(config, graph["rl"]) == (2 * config.resources.cpus_per_worker, 2)

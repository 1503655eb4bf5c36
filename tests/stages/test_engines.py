"""Which engine a stage draws answers with, and that a run on vLLM gives what a run on the embedded engine gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.config import UserError
from posttrain.config import machine_checks as machine
from posttrain.config.origins import Origins
from posttrain.config.schema import RunConfig
from posttrain.pipeline.run import run as execute
from posttrain.stages.engines import checkpoint_engine, chosen_engine
from tests.rollout.vllm.tiny import needs_vllm
from tests.stages.tasks import RL, SFT, make_job


def config_of(tmp_path: Path, engine: str, **changes: Any) -> RunConfig:
    config = make_job(tmp_path / "made", SFT).config.model_dump()
    return RunConfig.model_validate({**config, "rollout": {"engine": engine}, **changes})


@pytest.mark.parametrize(
    ("asked", "installed", "gpus", "found"),
    [
        ("auto", "0.32.0", 0, "vllm"),
        ("auto", "0.26.0", 1, "embedded"),
        ("auto", None, 0, "embedded"),
        ("embedded", "0.32.0", 0, "embedded"),
        ("vllm", "0.32.0", 0, "vllm"),
    ],
)
def test_the_engine_follows_option_and_machine(
    asked: str, installed: str | None, gpus: int, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "installed_vllm", lambda: installed)
    assert machine.rollout_engine(config_of(tmp_path, asked, resources={"gpus_per_worker": gpus})) == found


@pytest.mark.parametrize(("installed", "gpus", "told"), [(None, 0, "vLLM is not installed"), ("0.26.0", 1, "GPUs")])
def test_an_engine_that_cannot_be_had_is_refused_before_the_run(
    installed: str | None, gpus: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "installed_vllm", lambda: installed)
    monkeypatch.setattr(machine, "gpus", lambda: 8)
    config = config_of(tmp_path, "vllm", resources={"gpus_per_worker": gpus})
    with pytest.raises(UserError, match=rf"rollout\.engine: .*{told}"):
        machine.check_machine(config, Origins("config"))


def test_outside_of_a_run_auto_is_embedded_and_vllm_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "installed_vllm", lambda: "0.32.0")
    assert chosen_engine(config_of(tmp_path, "auto")) == "embedded"
    with pytest.raises(UserError, match="need a running Ray"), checkpoint_engine(config_of(tmp_path, "vllm"), tmp_path):
        pass


@needs_vllm
@pytest.mark.slow
def test_a_run_on_vllm_gives_what_a_run_on_the_embedded_engine_gives(tmp_path: Path) -> None:
    job = make_job(tmp_path / "made", RL)
    found: dict[str, dict[Any, Any]] = {}
    for engine in ("embedded", "vllm"):
        stages = {"online": {**RL, "reward": {}, "steps": 2, "updates_per_step": 2}}
        fields = {**job.config.model_dump(), "name": engine, "output_dir": str(tmp_path), "stages": stages}
        folder = execute(RunConfig.model_validate({**fields, "rollout": {"engine": engine}})).path
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found[engine] = {(r["stage"], r["step"], r["name"]): r["value"] for r in rows if r["name"] in MEASURED}
        samples = [json.loads(path.read_text())["samples"] for path in sorted(folder.rglob("eval.json"))]
        assert len(samples) == 2
        found[engine]["samples"] = samples
    assert len(found["vllm"]) > 4
    assert found["vllm"] == found["embedded"]


MEASURED = ("reward", "accuracy", "answer_length")

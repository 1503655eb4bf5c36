"""From the first model to its evaluation, and the limits that end a stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from posttrain.config.errors import UserError
from posttrain.data.tokenizer import load_tokenizer
from posttrain.model.loading import load_causal_lm, save_model
from posttrain.stages import run
from posttrain.stages.files import read_json, write_json
from posttrain.stages.job import StageJob
from posttrain.stages.metrics import read_metrics
from tests.stages.crash import differing
from tests.stages.tasks import REWARD, SFT, make_job


def limited(job: StageJob, seconds: float) -> StageJob:
    return StageJob(job.name, job.config, job.folder, job.inputs, job.metrics_path, time_limit=seconds)


def test_sft_learns_and_its_evaluation_names_what_it_saw(tmp_path: Path) -> None:
    stage = {**SFT, "steps": 60, "batch_size": 8, "save_steps": 60, "logging_steps": 20, "optim": {"learning_rate": 1e-2}}
    job = make_job(tmp_path, stage)
    run.train(job, job.inputs["model"])
    run.evaluate(job, tmp_path / "eval")
    result = read_json(tmp_path / "eval" / "eval.json")
    assert result["num_prompts"] == 8 and result["pair_accuracy"] is None and len(result["samples"]) == 8
    assert result["heldout_accuracy"] == sum(sample["right"] for sample in result["samples"]) / 8
    for sample in result["samples"]:
        first, second = sample["prompt"].split("+")
        assert sample["expected"] == str(int(first) + int(second))
        assert sample["right"] == (sample["answer"].strip() == sample["expected"])
    assert all(sample["answer"].isdigit() for sample in result["samples"]), "at least the form is learned"
    losses = [record["value"] for record in read_metrics(job.metrics_path) if record["name"] == "loss"]
    assert losses[-1] < losses[0] / 2


def test_a_reward_model_is_evaluated_on_heldout_pairs(tmp_path: Path) -> None:
    job = make_job(tmp_path, {**REWARD, "steps": 30, "save_steps": 30, "optim": {"learning_rate": 3e-3}})
    run.train(job, job.inputs["model"])
    run.evaluate(job, tmp_path / "eval")
    result = read_json(tmp_path / "eval" / "eval.json")
    assert result["heldout_accuracy"] is None and result["pair_accuracy"] > 0.7


def test_equal_seeds_give_equal_models_and_others_do_not(tmp_path: Path) -> None:
    for name in ("one", "two"):
        job = make_job(tmp_path / name, SFT)
        run.train(job, job.inputs["model"])
    assert differing(tmp_path / "one" / "model", tmp_path / "two" / "model") == []
    one, two = ((tmp_path / name / "base" / "tokenizer.json").read_text() for name in ("one", "two"))
    assert one == two


def test_a_given_checkpoint_is_checked_and_taken(tmp_path: Path) -> None:
    job = make_job(tmp_path, SFT)
    config = type(job.config).model_validate({**job.config.model_dump(), "model": {"path": str(job.inputs["init"])}})
    run.make_base(StageJob("base", config, tmp_path / "b", {}, job.metrics_path), tmp_path / "copy")
    assert differing(job.inputs["init"], tmp_path / "copy") == []
    (job.inputs["init"] / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors: weights are missing"):
        run.make_base(StageJob("base", config, tmp_path / "b", {}, job.metrics_path), tmp_path / "other")


def test_the_time_limit_counts_preparation(tmp_path: Path) -> None:
    job = make_job(tmp_path, SFT)
    write_json(job.inputs["data"] / "stats.json", {"seconds": 100.0})
    run.train(limited(job, 99.0), job.inputs["model"])
    totals = {record["name"]: record for record in read_metrics(job.metrics_path)}
    assert totals["train_seconds"]["step"] == 1 and 100 < totals["train_seconds"]["value"] < 200
    assert (job.inputs["model"] / "model.safetensors").exists()


def test_a_time_limit_that_is_not_reached_changes_nothing(tmp_path: Path) -> None:
    job = make_job(tmp_path, SFT)
    run.train(limited(job, 1e6), job.inputs["model"])
    assert max(record["step"] for record in read_metrics(job.metrics_path)) == 6


def test_bf16_weights_without_zero_are_refused(tmp_path: Path) -> None:
    job = make_job(tmp_path, SFT)
    model = load_causal_lm(job.inputs["init"]).to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    save_model(model, load_tokenizer(job.inputs["init"]), job.inputs["init"])
    assert json.loads((job.inputs["init"] / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(UserError, match="resources.zero_stage: training bfloat16 weights without ZeRO"):
        run.train(job, job.inputs["model"])

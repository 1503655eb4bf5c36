"""Held-out accuracy of a stage's model, greedy; for a reward model, the share of held-out pairs it orders rightly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.config.schema import RewardStage, RunConfig
from posttrain.data.sources import load_split
from posttrain.data.tokenizer import load_tokenizer
from posttrain.reward.verifiers import is_right, verify
from posttrain.stages.engines import checkpoint_engine
from posttrain.stages.files import write_json
from posttrain.stages.job import StageJob
from posttrain.stages.sampling import as_sample, greedy, require_prompts


def evaluate_stage(job: StageJob, folder: Path) -> None:
    """Write eval.json for the model in `inputs["model"]`.

    Fields: `heldout_accuracy` (None for a reward model), `num_prompts`, `pair_accuracy` (None for a language model) and
    `samples`, the first answers as {"prompt", "answer", "expected", "right"}. For a reward model also `reward`, see
    `posttrain.stages.reward_evaluation.summary`, and pairs.jsonl with the scores of every held-out pair.
    """
    stage = job.config.stages.get(job.name)
    if isinstance(stage, RewardStage):
        from posttrain.stages.reward_evaluation import evaluate_reward  # imports datasets, which no other evaluation needs

        reward = evaluate_reward(stage, job.inputs["model"], job.inputs["data"], folder)
        accuracy = reward["pair_accuracy"]["all"]
        result: dict[str, Any] = {"heldout_accuracy": None, "num_prompts": 0, "pair_accuracy": accuracy, "samples": []}
        result["reward"] = reward
    else:
        result = heldout_accuracy(job.config, job.inputs["model"])
    write_json(folder / "eval.json", result)


def heldout_accuracy(config: RunConfig, model_folder: Path) -> dict[str, Any]:
    """Greedy answers to the first `eval.num_prompts` records of `eval.source`, verified."""
    records = load_split(config, config.eval.source)[: config.eval.num_prompts]
    require_prompts(records, config.eval.source)
    tokenizer = load_tokenizer(model_folder)
    with checkpoint_engine(config, model_folder) as engine:
        answers = greedy(engine, tokenizer, [record["prompt"] for record in records], config.eval.max_new_tokens)
    right = [is_right(verify(as_sample(record, text))) for record, text in zip(records, answers, strict=True)]
    shown = [
        {"prompt": r["prompt"][-1]["content"], "answer": text, "expected": r.get("answer", ""), "right": accepted}
        for r, text, accepted in zip(records, answers, right, strict=True)
    ][: config.eval.num_shown]
    return {
        "heldout_accuracy": sum(right) / len(right),
        "num_prompts": len(right),
        "pair_accuracy": None,
        "samples": shown,
    }

"""A run small enough for tests: additions of one digit in a file, and a model of some ten thousand weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from posttrain.config.schema import RunConfig
from posttrain.data.tokenizer import load_tokenizer
from posttrain.model.loading import load_reward_model, save_model
from posttrain.stages import run
from posttrain.stages.job import StageJob

MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rotary_dim": 8,
    "softmax_every": 2,
    "intermediate_size": 32,
    "num_local_experts": 2,
}
OPTIM = {"learning_rate": 3e-3, "warmup_steps": 2}
SFT: dict[str, Any] = {
    "kind": "sft",
    "data": {"sums/train": 1.0},
    "steps": 6,
    "max_length": 64,
    "pack_length": 128,
    "batch_size": 2,
}
SFT |= {"optim": OPTIM, "save_steps": 2, "keep_checkpoints": 2, "logging_steps": 1}
SAMPLING = {"samples_per_prompt": 4, "temperatures": [1.0], "max_new_tokens": 4}
RL: dict[str, Any] = {
    "kind": "rl",
    "data": {"sums/rl": 1.0},
    "steps": 4,
    "max_length": 64,
    "pack_length": 256,
    "prompts_per_step": 4,
}
RL |= {"optim": OPTIM, "save_steps": 2, "keep_checkpoints": 2, "logging_steps": 1, "sampling": SAMPLING}
# An untrained model answers nothing rightly; the judge (a random head) tells its answers apart all the same.
RL |= {"reward": {"model": "judge", "learned_weight": 0.4}}
REWARD = {**SFT, "kind": "reward", "heldout": {"sums/rl": 1.0}, "heldout_pairs": 10, "sampling": SAMPLING, "steps": 4}
DPO = {**SFT, "kind": "dpo", "data": {"pairs/train": 1.0}, "steps": 4}


def write_sources(folder: Path) -> dict[str, Any]:
    """Files of additions, demonstrated and as pairs, and the sources that name them."""
    sums, pairs = [], []
    for a in range(10):
        for b in range(10):
            prompt, answer = f"{a}+{b}", str(a + b)
            sums.append({"prompt": prompt, "completion": answer, "verifier": "exact", "answer": answer})
            pairs.append({"prompt": prompt, "chosen": answer, "rejected": str(a + b + 1)})
    for name, records in {"sums": sums, "pairs": pairs}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return {
        "sums": {"kind": "jsonl", "path": str(folder / "sums.jsonl"), "splits": {"train": 60, "rl": 24, "test": 16}},
        "pairs": {"kind": "jsonl", "path": str(folder / "pairs.jsonl"), "splits": {"train": 40}},
    }


def make_job(
    folder: Path, stage: Mapping[str, Any], *, name: str = "stage", dtype: str = "float32", **resources: Any
) -> StageJob:
    """A job for one stage, its base model and prepared data made; called twice on a folder, it finds them again."""
    folder.mkdir(parents=True, exist_ok=True)
    config = RunConfig.model_validate(
        {
            "name": "test",
            "model": {**MODEL, "dtype": dtype},
            "tokenizer": {"vocab_size": 280},
            "sources": write_sources(folder),
            "eval": {"source": "sums/test", "num_prompts": 8, "max_new_tokens": 4},
            "resources": resources,
            "stages": {"judge": REWARD, name: stage},
        }
    )
    base, data = folder / "base", folder / "data"
    inputs = {"init": base, "data": data, "model": folder / "model", "reward": folder / "judge"}
    job = StageJob(name, config, folder / "stages" / name, inputs, folder / "metrics.jsonl")
    if not (base / "model.safetensors").exists():
        run.make_base(StageJob("base", config, folder / "stages" / "base", {}, folder / "metrics.jsonl"), base)
        make_judge(base, folder / "judge")
        run.prepare(job, data)
    return job


def make_judge(base: Path, folder: Path, seed: int = 3) -> None:
    """A reward model with a random head, seeded."""
    model = load_reward_model(base, from_causal_lm=True)
    with torch.no_grad():
        model.score.weight.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(seed))
    save_model(model, load_tokenizer(base), folder)

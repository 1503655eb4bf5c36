"""transformers' training arguments for a stage."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainingArguments

from posttrain.config.errors import UserError
from posttrain.model.loading import load_config
from posttrain.stages import group
from posttrain.stages.deepspeed import deepspeed_config
from posttrain.stages.job import StageJob


def training_arguments(job: StageJob, items_per_step: int, cls: type[TrainingArguments] = TrainingArguments, **extra: Any) -> Any:
    """Arguments of the given class for `items_per_step` dataset items a step, over all ranks.

    Raises:
        UserError: the items do not divide over the ranks; or weights in bf16 without ZeRO, where steps smaller than a
            weight's last bit would be lost for want of fp32 master weights.
    """
    stage, resources, world = job.stage, job.config.resources, group.world_size()
    where = f"stages.{job.name}"
    if items_per_step % world:
        raise UserError(f"{items_per_step} items a step do not divide over {world} workers", where=where)
    dtype = str(load_config(job.inputs["init"]).dtype).removeprefix("torch.")
    if dtype == "bfloat16" and resources.zero_stage == 0:
        raise UserError(
            "training bfloat16 weights without ZeRO loses small steps", where="resources.zero_stage", instead="set 1, 2 or 3"
        )
    per_rank = items_per_step // world
    deepspeed = None
    if resources.zero_stage:
        deepspeed = deepspeed_config(resources.zero_stage, dtype, per_rank, world, stage.optim.max_grad_norm)
    options: dict[str, Any] = {
        "output_dir": str(job.checkpoints),
        "max_steps": stage.steps,
        "per_device_train_batch_size": per_rank,
        "gradient_accumulation_steps": 1,
        "optim": "adamw_torch_fused",
        "learning_rate": stage.optim.learning_rate,
        "weight_decay": stage.optim.weight_decay,
        "adam_beta1": stage.optim.adam_beta1,
        "adam_beta2": stage.optim.adam_beta2,
        "adam_epsilon": stage.optim.adam_eps,
        "max_grad_norm": stage.optim.max_grad_norm,
        "save_strategy": "steps",
        "save_steps": stage.save_steps,
        "save_total_limit": None,
        "logging_strategy": "steps",
        "logging_steps": stage.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "bf16": dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "seed": job.config.seed,
        "deepspeed": deepspeed,
    }
    # fp32 means fp32: no TF32 in matrix products, on any card.
    torch.set_float32_matmul_precision("highest")
    return cls(**(options | extra))

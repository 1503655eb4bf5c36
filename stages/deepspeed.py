"""DeepSpeed's configuration for a ZeRO stage."""

from __future__ import annotations

from typing import Any

MOE_BLOCK = "MiniMaxText01SparseMoe"
"""ZeRO-3 gathers this module as a whole: which experts run differs between ranks, and so would the order of gathers."""


def deepspeed_config(zero_stage: int, dtype: str, batch_per_rank: int, world_size: int, max_grad_norm: float) -> dict[str, Any]:
    """Settings for ZeRO 1, 2 or 3. The optimizer is the trainer's own AdamW, which DeepSpeed shards.

    Args:
        zero_stage: 1 to 3.
        dtype: "float32", or "bfloat16": weights in bf16, master weights and moments in fp32.
        batch_per_rank: sequences of a rank's batch.
        world_size: ranks.
        max_grad_norm: the gradient's norm over all ranks is clipped here.
    """
    zero: dict[str, Any] = {"stage": zero_stage, "overlap_comm": False, "contiguous_gradients": True}
    if zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        zero["leaf_module"] = {"classes": [MOE_BLOCK]}
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == "bfloat16"},
        # Gradients of a step's micro-batches are summed in fp32; with bf16 a small one would be lost in a large sum.
        "data_types": {"grad_accum_dtype": "fp32"},
        "fp16": {"enabled": False},
        "gradient_clipping": max_grad_norm,
        "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": batch_per_rank,
        "train_batch_size": batch_per_rank * world_size,
    }

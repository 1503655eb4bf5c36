"""The mixture of experts in vLLM: its fused kernels on a GPU, our own module on a CPU.

vLLM's experts for CPUs pack their weights once, when they are first loaded, and go on with the old ones after a reload (0.32).
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed import tensor_model_parallel_all_reduce as all_reduce
from vllm.platforms import current_platform

from posttrain.config.errors import UserError
from posttrain.model.configuration import MiniMaxText01Config
from posttrain.model.experts import Experts
from posttrain.model.layers import Float32Linear
from posttrain.model.router import choose
from posttrain.rollout.vllm.versions import fused_experts


class SparseMoe(nn.Module):
    """The same as `posttrain.model.experts.MiniMaxText01SparseMoe`, the inner width of experts shared out over ranks.

    Attributes:
        record: called with the layer's number and the chosen experts int64 [T, k] in every step, where set. On a CPU only: on
            a GPU vLLM records routes itself (`enable_return_routed_experts`).
    """

    def __init__(self, config: MiniMaxText01Config, vllm_config: VllmConfig, layer: int, prefix: str) -> None:
        super().__init__()
        self.layer, self.top_k = layer, config.num_experts_per_tok
        self.record: Callable[[int, torch.Tensor], None] | None = None
        self.gate = Float32Linear(config.hidden_size, config.num_local_experts, bias=False, dtype=torch.float32)
        self.on_host = current_platform.is_cpu()
        if self.on_host:
            _refuse_on_host(vllm_config)
            self.experts: Any = HostExperts(config)
            return
        self.experts = fused_experts()(
            num_experts=config.num_local_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            renormalize=True,
            quant_config=vllm_config.quant_config,
            ckpt_names=("w1", "w2", "w3"),
            router_logits_dtype=torch.float32,
            prefix=f"{prefix}.experts",
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] -> [T, hidden], summed over ranks."""
        logits = self.gate(x)
        if not self.on_host:
            # A copy, because the operator may write over its input, which the residual still needs.
            return self.experts(hidden_states=x.clone(), router_logits=logits)
        shares, routes = choose(logits, self.top_k)
        if self.record is not None:
            self.record(self.layer, routes)
        mixed = self.experts(x, shares, routes)
        return all_reduce(mixed) if get_tensor_model_parallel_world_size() > 1 else mixed


class HostExperts(Experts):
    """This rank's part of every expert, in plain parameters: reloading them is copying into them."""

    def __init__(self, config: MiniMaxText01Config) -> None:
        ranks = get_tensor_model_parallel_world_size()
        if config.intermediate_size % ranks:
            raise ValueError(f"intermediate_size {config.intermediate_size} cannot be shared by {ranks} tensor-parallel ranks")
        own = SimpleNamespace(
            num_local_experts=config.num_local_experts,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size // ranks,
        )
        super().__init__(own)  # type: ignore[arg-type]  # sizes are all that is read
        for parameter in (self.gate_up_proj, self.down_proj):
            parameter.requires_grad_(False)
            parameter.weight_loader = self.load  # type: ignore[attr-defined]

    # The first argument's name is vLLM's: its reload looks for it.
    def load(self, param: nn.Parameter, loaded_weight: torch.Tensor, expert: int, part: str) -> None:
        """Take this rank's part of one matrix of one expert.

        Args:
            param: [E, 2 F, H] or [E, H, F] of this rank.
            loaded_weight: `w1` and `w3` [whole F, H], `w2` [H, whole F].
            expert: its number.
            part: `w1`, `w2` or `w3`.
        """
        axis = 1 if part == "w2" else 0
        size = loaded_weight.shape[axis] // get_tensor_model_parallel_world_size()
        own = loaded_weight.narrow(axis, get_tensor_model_parallel_rank() * size, size)
        target = param.data[expert]
        if part != "w2":
            target = target.narrow(0, size if part == "w3" else 0, size)
        target.copy_(own)


def _refuse_on_host(vllm_config: VllmConfig) -> None:
    """UserError for what only vLLM's own experts do."""
    if vllm_config.quant_config is not None:
        raise UserError("quantised experts run on GPUs only", instead="leave `quantization` out on a CPU")
    if vllm_config.parallel_config.enable_expert_parallel:
        raise UserError("expert parallelism runs on GPUs only", instead="leave `enable_expert_parallel` out on a CPU")

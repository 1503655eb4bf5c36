"""Weights of any of the three kinds of checkpoint into vLLM's model (docs/checkpoints.md)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from posttrain.model.naming import is_derived

_PARTS = ("w1", "w2", "w3")
_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(w[123])\.weight$")
_STACKED = re.compile(r"^(.*\.experts)\.(gate_up_proj|down_proj)$")
_QKV = re.compile(r"^(.*\.self_attn)\.([qkv])_proj\.weight$")

# Parameter of a part: of our experts, and of vLLM's below their layer.
_HOST = {"w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
_FUSED = {"w1": "routed_experts.w13_weight", "w3": "routed_experts.w13_weight", "w2": "routed_experts.w2_weight"}


def load_weights(model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """Give tensors to the loaders of the parameters they belong to. A stream may hold a part of the model.

    Args:
        model: vLLM's; its parameters are looked up anew, since a reload replaces them.
        weights: names and tensors of a checkpoint, of any kind. Slopes that transformers saves are skipped.

    Returns:
        Names of the parameters that the stream has filled, all experts and all of q, k and v included.

    Raises:
        ValueError: a tensor that the model has no place for.
    """
    parameters = dict(model.named_parameters())
    seen: dict[str, set[tuple[Any, ...]]] = {}
    for name, tensor in weights:
        if is_derived(name):
            continue
        for own, shard, piece in _pieces(name.replace(".mlp.", ".block_sparse_moe."), tensor):
            target = _place(own, shard, parameters)
            if target is None:
                raise ValueError(f"weights hold {name}, which the model has no place for")
            _give(parameters[target], target, piece, shard)
            seen.setdefault(target, set()).add(shard)
    experts: Any = model.config.num_local_experts  # type: ignore[union-attr]
    return {name for name, shards in seen.items() if len(shards) == _wanted(shards, experts)}


def _pieces(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, tuple[Any, ...], torch.Tensor]]:
    """The layer or parameter, which part of it, and the part: single matrices, whichever way experts are stored."""
    if found := _EXPERT.match(name):
        yield found[1], (int(found[2]), found[3]), tensor
    elif found := _STACKED.match(name):
        for expert, own in enumerate(tensor):
            if found[2] == "down_proj":
                yield found[1], (expert, "w2"), own
            else:
                gate, up = own.chunk(2)
                yield found[1], (expert, "w1"), gate
                yield found[1], (expert, "w3"), up
    elif found := _QKV.match(name):
        yield f"{found[1]}.qkv_proj.weight", (found[2],), tensor
    else:
        yield name, (), tensor


def _place(name: str, shard: tuple[Any, ...], parameters: dict[str, nn.Parameter]) -> str | None:
    """Name of the parameter that a piece goes into."""
    candidates = [name]
    if len(shard) == 2:
        candidates = [f"{name}.{names[shard[1]]}" for names in (_HOST, _FUSED)]
    return next((candidate for candidate in candidates if candidate in parameters), None)


def _give(parameter: nn.Parameter, name: str, piece: torch.Tensor, shard: tuple[Any, ...]) -> None:
    loader = getattr(parameter, "weight_loader", None)
    if len(shard) == 2 and ".routed_experts." in name:
        loader(parameter, piece, name, expert_id=shard[0], shard_id=shard[1])  # type: ignore[misc]
    elif loader is not None:
        loader(parameter, piece, *shard)
    else:
        copy(parameter, piece)


def copy(param: nn.Parameter, loaded_weight: torch.Tensor) -> None:
    """The loader of a parameter that every rank holds whole. ValueError for another shape."""
    if param.shape != loaded_weight.shape:
        raise ValueError(f"a weight is {list(loaded_weight.shape)}, the model has {list(param.shape)}")
    param.data.copy_(loaded_weight)


def _wanted(shards: set[tuple[Any, ...]], experts: int) -> int:
    """How many pieces make the parameter that these are of."""
    first = next(iter(shards))
    if len(first) == 2:
        return experts if first[1] == "w2" else 2 * experts
    return 3 if first else 1

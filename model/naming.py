"""Names and shapes of tensors in the three kinds of checkpoint; imports no torch.

Every tensor of every kind is a run of consecutive elements of one of our tensors (experts are stacked, w1 above w3), so
converting and loading copy ranges of bytes and never compute.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, get_args

from posttrain.config.errors import UserError

Scheme = Literal["official", "native", "posttrain"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)

_OWN_MOE, _NATIVE_MOE = ".block_sparse_moe.", ".mlp."
_EXPERT = re.compile(r"\.block_sparse_moe\.experts\.\d+\.w[123]\.weight$")
_DERIVED = re.compile(r"\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)$")

_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "num_local_experts",
)


@dataclass(frozen=True)
class Piece:
    """A tensor of a checkpoint: elements `start` to `start + prod(shape)` of our tensor `target`, row by row."""

    name: str
    shape: tuple[int, ...]
    target: str
    start: int


def pieces(shapes: Mapping[str, Sequence[int]], scheme: Scheme) -> list[Piece]:
    """Tensors of a checkpoint of a kind.

    Args:
        shapes: our tensors.
        scheme: `official` has three matrices for each expert, `native` stacked experts under `.mlp.`, `posttrain` our names.

    Returns:
        pieces in the order of `shapes`, those of a tensor by where they begin; together they cover every element once.
    """
    found: list[Piece] = []
    for target, shape in shapes.items():
        moe, _, last = target.rpartition(".experts.")
        if scheme == "official" and last in ("gate_up_proj", "down_proj"):
            found += _experts(target, f"{moe}.experts", last, tuple(shape))
        else:
            name = target.replace(_OWN_MOE, _NATIVE_MOE) if scheme == "native" else target
            found.append(Piece(name, tuple(shape), target, 0))
    return found


def _experts(target: str, prefix: str, kind: str, shape: tuple[int, ...]) -> list[Piece]:
    count, rows, columns = shape
    parts = ("w1", "w3") if kind == "gate_up_proj" else ("w2",)
    size = (rows // len(parts), columns)
    return [
        Piece(f"{prefix}.{expert}.{part}.weight", size, target, (expert * len(parts) + place) * prod(size))
        for expert in range(count)
        for place, part in enumerate(parts)
    ]


def scheme_of(names: Iterable[str]) -> Scheme:
    """The kind that tensors are named by; `posttrain` where nothing tells."""
    native = False
    for name in names:
        if _EXPERT.search(name):
            return "official"
        native = native or _NATIVE_MOE in name
    return "native" if native else "posttrain"


def is_derived(name: str) -> bool:
    """Whether transformers saves this tensor although it follows from the configuration: slopes and decays."""
    return _DERIVED.search(name) is not None


def expected_shapes(fields: Mapping[str, Any], *, scores: int = 0) -> dict[str, list[int]] | None:
    """Shapes of our tensors.

    Args:
        fields: canonical fields of config.json (`config_fields.canonical`).
        scores: for a classifier with so many scores in place of the language model's head.

    Returns:
        None where the fields leave a size to its default, or hold none that is one.
    """
    if not all(type(fields.get(name)) is int for name in _SIZES):
        return None
    vocabulary, hidden, layers = fields["vocab_size"], fields["hidden_size"], fields["num_hidden_layers"]
    kinds = fields.get("attn_type_list")
    kinds = [int((i + 1) % 8 == 0) for i in range(layers)] if kinds is None else kinds
    if not isinstance(kinds, list) or len(kinds) != layers:
        return None
    shapes = {"model.embed_tokens.weight": [vocabulary, hidden]}
    for layer, kind in enumerate(kinds):
        own = _lightning(fields) if kind == 0 else _softmax(fields)
        own |= _mixture(fields) | {"input_layernorm.weight": [hidden], "post_attention_layernorm.weight": [hidden]}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
    shapes["model.norm.weight"] = [hidden]
    return shapes | ({"score.weight": [scores, hidden]} if scores else {"lm_head.weight": [vocabulary, hidden]})


def _lightning(fields: Mapping[str, Any]) -> dict[str, list[int]]:
    hidden, inner = fields["hidden_size"], fields["num_attention_heads"] * fields["head_dim"]
    return {
        "self_attn.qkv_proj.weight": [3 * inner, hidden],
        "self_attn.output_gate.weight": [inner, hidden],
        "self_attn.out_proj.weight": [hidden, inner],
        "self_attn.norm.weight": [inner],
    }


def _softmax(fields: Mapping[str, Any]) -> dict[str, list[int]]:
    hidden, width = fields["hidden_size"], fields["head_dim"]
    queries, keys = fields["num_attention_heads"] * width, fields["num_key_value_heads"] * width
    return {
        "self_attn.q_proj.weight": [queries, hidden],
        "self_attn.k_proj.weight": [keys, hidden],
        "self_attn.v_proj.weight": [keys, hidden],
        "self_attn.o_proj.weight": [hidden, queries],
    }


def _mixture(fields: Mapping[str, Any]) -> dict[str, list[int]]:
    hidden, inner, experts = fields["hidden_size"], fields["intermediate_size"], fields["num_local_experts"]
    return {
        "block_sparse_moe.gate.weight": [experts, hidden],
        "block_sparse_moe.experts.gate_up_proj": [experts, 2 * inner, hidden],
        "block_sparse_moe.experts.down_proj": [experts, hidden, inner],
    }


def refuse_misfits(found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], folder: Any) -> None:
    """UserError naming every missing, extra or misshapen tensor (three shown).

    Args:
        found: shapes in the checkpoint.
        expected: shapes in the model, under the checkpoint's names.
        folder: named in the error.
    """
    problems = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in found]
    problems += [f"extra {name} {list(shape)}" for name, shape in found.items() if name not in expected]
    problems += [
        f"{name} is {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and list(found[name]) != list(shape)
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError("weights do not fit the model: " + "; ".join(problems[:3]) + more, where=str(folder))

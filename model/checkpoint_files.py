"""What can be said of a checkpoint's folder without torch: its configuration's fields, its files, names and shapes of tensors.

`posttrain plan` refuses a damaged checkpoint with it at once; the strict loader (`model/loading.py`) stays the final check.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from posttrain.config.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MODEL_TYPE = "minimax_text_01"

_RESTORE = "restore the file or remove the checkpoint"
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


def check_checkpoint(folder: Path | str) -> None:
    """See that a folder holds a language model of this architecture, reading no weights but the headers of their files.

    Shapes are compared where config.json writes every size out; else the loader's check is the only one.

    Raises:
        UserError: config.json is missing, broken or of another model; a file of weights is missing or damaged; a tensor is
            missing, extra or misshapen.
    """
    expected = expected_shapes(config_fields(folder))
    found = read_shapes(folder)
    if expected is not None:
        refuse_misfits(found, expected, folder)


def config_fields(folder: Path | str) -> dict[str, Any]:
    """Fields of a checkpoint's config.json. UserError where it is missing, broken or of another model."""
    path = Path(folder) / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("not a checkpoint: config.json is missing", where=str(folder)) from None
    except UnicodeDecodeError:
        raise UserError("not UTF-8", where=str(path), instead=_RESTORE) from None
    except json.JSONDecodeError as error:
        raise UserError(f"broken JSON in line {error.lineno}", where=str(path)) from None
    if not isinstance(fields, dict):
        raise UserError("is not a JSON object", where=str(path), instead=_RESTORE)
    if fields.get("model_type") != MODEL_TYPE:
        raise UserError(
            f"model_type {fields.get('model_type')!r} is not supported", where=str(path), instead=f"expected {MODEL_TYPE!r}"
        )
    return fields


def weight_files(folder: Path | str) -> list[Path]:
    """Files of a checkpoint's weights, whether or not they exist. UserError for an index that is none."""
    index = Path(folder) / INDEX
    if not index.exists():
        return [Path(folder) / WEIGHTS]
    try:
        return sorted({index.parent / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError("damaged index of weights", where=str(index), instead=_RESTORE) from None


def damaged_weights(file: Path, error: Exception) -> UserError:
    """What to raise for a file of weights that cannot be read."""
    if isinstance(error, FileNotFoundError):
        return UserError("weights are missing", where=str(file))
    return UserError(f"damaged weights ({error})", where=str(file), instead=_RESTORE)


def read_shapes(folder: Path | str) -> dict[str, list[int]]:
    """Shape of every tensor, from the headers of the files. UserError naming a missing or damaged file."""
    shapes: dict[str, list[int]] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="numpy") as tensors:
                shapes |= {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
        except (FileNotFoundError, SafetensorError) as error:
            raise damaged_weights(file, error) from None
    return shapes


def expected_shapes(fields: Mapping[str, Any]) -> dict[str, list[int]] | None:
    """Shapes of the language model's tensors; None where config.json leaves a size to its default, or has none that is one."""
    if not all(type(fields.get(name)) is int for name in _SIZES):
        return None
    vocabulary, hidden, layers = fields["vocab_size"], fields["hidden_size"], fields["num_hidden_layers"]
    kinds = fields.get("attn_type_list") or [int((i + 1) % 8 == 0) for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers:
        return None
    shapes = {
        "model.embed_tokens.weight": [vocabulary, hidden],
        "model.norm.weight": [hidden],
        "lm_head.weight": [vocabulary, hidden],
    }
    for layer, kind in enumerate(kinds):
        own = _lightning(fields) if kind == 0 else _softmax(fields)
        own |= _experts(fields) | {"input_layernorm.weight": [hidden], "post_attention_layernorm.weight": [hidden]}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
    return shapes


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


def _experts(fields: Mapping[str, Any]) -> dict[str, list[int]]:
    hidden, inner, experts = fields["hidden_size"], fields["intermediate_size"], fields["num_local_experts"]
    return {
        "block_sparse_moe.gate.weight": [experts, hidden],
        "block_sparse_moe.experts.gate_up_proj": [experts, 2 * inner, hidden],
        "block_sparse_moe.experts.down_proj": [experts, hidden, inner],
    }


def refuse_misfits(found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], folder: Path | str) -> None:
    """UserError naming every missing, extra or misshapen tensor (three shown).

    Args:
        found: shapes in the checkpoint.
        expected: shapes in the model.
        folder: named in the error.
    """
    problems = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in found]
    problems += [f"extra {name} {list(shape)}" for name, shape in found.items() if name not in expected]
    problems += [
        f"{name} is {list(shape)}, expected {list(expected[name])}"
        for name, shape in found.items()
        if name in expected and list(shape) != list(expected[name])
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError("weights do not fit the model: " + "; ".join(problems[:3]) + more, where=str(folder))

"""Fields of config.json in the three ways that MiniMax models are published, translated into one; imports no torch.

The names used inside are those of the released MiniMax-Text-01 and MiniMax-M1 files ("official" here). transformers'
`minimax` ("native") names the same things differently and has other defaults. What this architecture does not implement is
refused by name, never ignored. docs/checkpoints.md has the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TEXT_01, M1, NATIVE = "minimax_text_01", "minimax_m1", "minimax"
MODEL_TYPES = (TEXT_01, M1, NATIVE)
ARCHITECTURES = {TEXT_01: "MiniMaxText01", M1: "MiniMaxM1", NATIVE: "MiniMax"}
"""Start of the class names in `architectures`."""

NATIVE_FACTORS = {
    f"{short}_{factor}_factor": f"layernorm_{long}_{factor}"
    for short, long in (("linear_attn", "linear_attention"), ("full_attn", "full_attention"), ("mlp", "mlp"))
    for factor in ("alpha", "beta")
}
LAYER_TYPES = ("linear_attention", "full_attention")
"""transformers' words for the 0 and 1 of `attn_type_list`."""

TRANSLATED = frozenset({*NATIVE_FACTORS, "layer_types", "rope_parameters", "rope_scaling", "partial_rotary_factor"})
"""Names that `canonical` turns into others."""

INNER_NORM_EPS = 1e-6
"""Epsilon of the norm inside lightning layers, which neither the released code nor transformers lets a file choose."""

# transformers 5.19, MiniMaxConfig: what a file means that leaves a field out.
_NATIVE_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    **dict.fromkeys(NATIVE_FACTORS, 1.0),
}
_NATIVE_THETA = 1_000_000.0

# Fields with one value that the model implements: the one, and others that mean the same.
_FIXED: dict[str, tuple[Any, ...]] = {
    "postnorm": (True,),
    "hidden_act": ("silu", "swish"),
    "shared_intermediate_size": (0, None),
    "sliding_window": (None,),
    "attention_dropout": (0.0, None),
    "router_jitter_noise": (0.0, None),
    "attention_bias": (False, None),
    "qkv_bias": (False, None),
    "mlp_bias": (False, None),
    "use_qk_norm": (False, None),
    "quantization_config": (None,),
}
_OFFICIAL_FIXED = (
    "postnorm",
    "hidden_act",
    "shared_intermediate_size",
    "sliding_window",
    "attention_dropout",
    "router_jitter_noise",
)


def canonical(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields under official names, whichever of the three ways they are written in.

    Unknown fields are kept as they are. `auto_map` is dropped: it points at code beside the file, which is never run.

    Args:
        fields: what config.json holds.

    Returns:
        a new dict; `model_type` is `minimax_text_01` or `minimax_m1`.

    Raises:
        ValueError: a model type that is none of the three, or a value that is not implemented, in one line.
    """
    kind = fields.get("model_type", TEXT_01)
    if kind not in MODEL_TYPES:
        raise ValueError(f"model_type {kind!r} is not supported; expected {TEXT_01!r}, {M1!r} or {NATIVE!r}")
    own = {name: value for name, value in fields.items() if name != "auto_map"}
    if kind == NATIVE:
        own = {**_NATIVE_DEFAULTS, **own, "model_type": TEXT_01}
    for name, official in NATIVE_FACTORS.items():
        if name in own:
            own[official] = own.pop(name)
    if own.get("head_dim") is None and _are_numbers(own, "hidden_size", "num_attention_heads"):
        own["head_dim"] = own["hidden_size"] // own["num_attention_heads"]
    if own.get("num_key_value_heads", 0) is None:
        own["num_key_value_heads"] = own.get("num_attention_heads")
    _translate_layers(own, kind)
    _translate_rotary(own, kind)
    if kind == NATIVE:
        refuse_native_slopes(own)
    return drop_fixed(own)


def drop_fixed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without those that have one implemented value. ValueError naming one with another value."""
    for name, allowed in _FIXED.items():
        value = fields.get(name, allowed[0])
        if isinstance(value, list) and name == "shared_intermediate_size":  # one for each layer in some files
            value = max(value, default=0)
        if value not in allowed:
            raise ValueError(f"{name} = {value!r} is not implemented; it must be {allowed[0]!r}")
    return {name: value for name, value in fields.items() if name not in _FIXED}


def official_fields(fields: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """config.json of a released model, from our own fields.

    Args:
        fields: of a `MiniMaxText01Config`, as it saves them.
        model_type: `minimax_text_01` or `minimax_m1`.

    Raises:
        ValueError: another type, or an inner epsilon that the released code does not have.
    """
    if model_type not in (TEXT_01, M1):
        raise ValueError(f"official files have model_type {TEXT_01!r} or {M1!r}, not {model_type!r}")
    own = _without_inner_eps(fields)
    own |= {name: _FIXED[name][0] for name in _OFFICIAL_FIXED}
    if own.get("dtype") is not None:
        own["torch_dtype"] = own.pop("dtype")
    return {**own, "model_type": model_type, "architectures": _architectures(fields, model_type)}


def native_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of transformers' `minimax`, from our own fields.

    Raises:
        ValueError: transformers would compute something else: it rotates whole heads, has one epsilon inside lightning
            layers, and other slopes where the number of heads is no power of two.
    """
    own = _without_inner_eps(fields)
    rotary, width = own.pop("rotary_dim"), own["head_dim"]
    if rotary != width:
        raise ValueError(
            f"rotary_dim {rotary} of head_dim {width}: transformers' minimax rotates whole heads and would compute another model"
        )
    refuse_native_slopes(own)
    own["layer_types"] = [LAYER_TYPES[kind] for kind in own.pop("attn_type_list")]
    own["rope_parameters"] = {"rope_type": "default", "rope_theta": own.pop("rope_theta")}
    for name, official in NATIVE_FACTORS.items():
        own[name] = own.pop(official)
    return {**own, "model_type": NATIVE, "architectures": _architectures(fields, NATIVE)}


def refuse_native_slopes(fields: Mapping[str, Any]) -> None:
    """ValueError where transformers' decay slopes are not the released code's: heads that are no power of two."""
    heads, kinds = fields.get("num_attention_heads"), fields.get("attn_type_list")
    if isinstance(heads, int) and heads > 0 and heads & (heads - 1) and not (isinstance(kinds, list) and 0 not in kinds):
        raise ValueError(
            f"num_attention_heads {heads} is no power of two: transformers' minimax has other decay slopes for it than this model"
        )


def _translate_layers(fields: dict[str, Any], kind: str) -> None:
    types = fields.pop("layer_types", None)
    if types is None:
        if kind == NATIVE and fields.get("attn_type_list") is None and _are_numbers(fields, "num_hidden_layers"):
            fields["attn_type_list"] = [(i + 1) % 2 for i in range(fields["num_hidden_layers"])]
        return
    unknown = [name for name in types if name not in LAYER_TYPES]
    if unknown:
        raise ValueError(f"layer_types holds {unknown[0]!r}; expected {LAYER_TYPES[0]!r} or {LAYER_TYPES[1]!r}")
    kinds = [LAYER_TYPES.index(name) for name in types]
    if fields.get("attn_type_list") not in (None, kinds):
        raise ValueError("layer_types and attn_type_list disagree; keep one of them")
    fields["attn_type_list"] = kinds


def _translate_rotary(fields: dict[str, Any], kind: str) -> None:
    """`rope_theta` and `rotary_dim` from all the places where they may stand."""
    thetas, factors = [fields.get("rope_theta")], [fields.pop("partial_rotary_factor", None)]
    for name in ("rope_parameters", "rope_scaling"):
        value = fields.pop(name, None) or {}
        scaling = value.get("rope_type", value.get("type", "default")) if isinstance(value, Mapping) else value
        if scaling != "default":
            raise ValueError(f"{name} asks for {scaling!r}; only plain rotary embedding (null or 'default') is implemented")
        thetas.append(value.get("rope_theta"))
        factors.append(value.get("partial_rotary_factor"))
    theta = _one("rope_theta", thetas, _NATIVE_THETA if kind == NATIVE else None)
    if theta is not None:
        fields["rope_theta"] = theta
    width = fields.get("head_dim")
    rotary = [fields.get("rotary_dim")]
    rotary += [int(factor * width) for factor in factors if factor is not None and isinstance(width, int)]
    dim = _one("rotary_dim", rotary, width if kind == NATIVE else None)
    if dim is not None:
        fields["rotary_dim"] = dim


def _one(name: str, values: list[Any], default: Any) -> Any:
    given = [value for value in values if value is not None]
    if any(value != given[0] for value in given):
        raise ValueError(f"{name} is given several times with different values: {given}")
    return given[0] if given else default


def _are_numbers(fields: Mapping[str, Any], *names: str) -> bool:
    return all(type(fields.get(name)) is int and fields[name] > 0 for name in names)


def _without_inner_eps(fields: Mapping[str, Any]) -> dict[str, Any]:
    own = dict(fields)
    eps = own.pop("lightning_norm_eps", INNER_NORM_EPS)
    if eps != INNER_NORM_EPS:
        raise ValueError(f"lightning_norm_eps {eps} can be written for posttrain alone; other code has {INNER_NORM_EPS}")
    return own


def _architectures(fields: Mapping[str, Any], model_type: str) -> list[str]:
    scores = any(str(name).endswith("ForSequenceClassification") for name in fields.get("architectures") or ())
    return [ARCHITECTURES[model_type] + ("ForSequenceClassification" if scores else "ForCausalLM")]

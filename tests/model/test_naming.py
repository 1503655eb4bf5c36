"""Names and shapes of the three kinds of checkpoint."""

from __future__ import annotations

import hashlib
from collections import Counter
from math import prod

import pytest

from posttrain.model.loading import empty_model
from posttrain.model.naming import SCHEMES, Scheme, expected_shapes, is_derived, pieces, scheme_of
from posttrain.model.presets import preset
from tests.model.schemes import native_model, official_tensors
from tests.model.small import random_config, small_config, small_model

RELEASED_NAMES = "bf57bd0e64fa6e9bb2412c73dad77effdfd91aa645578e2b5928f0499c579a8c"
"""SHA-256 of the sorted names, one a line, in MiniMax-M1's model.safetensors.index.json."""
RELEASED_BYTES = 912_210_767_872
"""`total_size` there."""


def test_official_names_and_shapes_of_the_released_model() -> None:
    shapes = expected_shapes(preset("text-01").to_dict())
    assert shapes is not None
    found = {piece.name: piece.shape for piece in pieces(shapes, "official")}
    assert len(found) == 8243
    assert hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest() == RELEASED_NAMES
    kinds = Counter(
        (".".join("N" if word.isdigit() else word for word in name.split(".")), shape) for name, shape in found.items()
    )
    layer = "model.layers.N"
    assert kinds == {
        ("model.embed_tokens.weight", (200_064, 6144)): 1,
        (f"{layer}.input_layernorm.weight", (6144,)): 80,
        (f"{layer}.post_attention_layernorm.weight", (6144,)): 80,
        (f"{layer}.self_attn.qkv_proj.weight", (24_576, 6144)): 70,
        (f"{layer}.self_attn.output_gate.weight", (8192, 6144)): 70,
        (f"{layer}.self_attn.out_proj.weight", (6144, 8192)): 70,
        (f"{layer}.self_attn.norm.weight", (8192,)): 70,
        (f"{layer}.self_attn.q_proj.weight", (8192, 6144)): 10,
        (f"{layer}.self_attn.k_proj.weight", (1024, 6144)): 10,
        (f"{layer}.self_attn.v_proj.weight", (1024, 6144)): 10,
        (f"{layer}.self_attn.o_proj.weight", (6144, 8192)): 10,
        (f"{layer}.block_sparse_moe.gate.weight", (32, 6144)): 80,
        (f"{layer}.block_sparse_moe.experts.N.w1.weight", (9216, 6144)): 2560,
        (f"{layer}.block_sparse_moe.experts.N.w3.weight", (9216, 6144)): 2560,
        (f"{layer}.block_sparse_moe.experts.N.w2.weight", (6144, 9216)): 2560,
        ("model.norm.weight", (6144,)): 1,
        ("lm_head.weight", (200_064, 6144)): 1,
    }
    # Two bytes a parameter, four in router gates.
    assert sum(prod(shape) * (4 if ".gate." in name else 2) for name, shape in found.items()) == RELEASED_BYTES
    assert sum(prod(shape) for shape in found.values()) == 456_089_655_296


@pytest.mark.parametrize("seed", range(10))
def test_our_names_are_the_models(seed: int) -> None:
    config = random_config(seed)
    own = {name: list(tensor.shape) for name, tensor in empty_model(config).state_dict().items()}
    assert expected_shapes(config.to_dict()) == own


def test_native_names_are_those_of_transformers() -> None:
    config = small_config(rotary_dim=8)
    theirs = {name: tuple(tensor.shape) for name, tensor in native_model(config).state_dict().items()}
    shapes = expected_shapes(config.to_dict())
    assert shapes is not None
    derived = {name for name in theirs if is_derived(name)}
    assert len(derived) == 2 * 4
    found = {piece.name: piece.shape for piece in pieces(shapes, "native")}
    assert found == {name: shape for name, shape in theirs.items() if name not in derived}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_pieces_cover_every_element_once(scheme: Scheme) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in small_model().state_dict().items()}
    end = dict.fromkeys(shapes, 0)
    for piece in pieces(shapes, scheme):
        assert piece.start == end[piece.target]
        end[piece.target] += prod(piece.shape)
    assert end == {name: prod(shape) for name, shape in shapes.items()}
    assert scheme_of(piece.name for piece in pieces(shapes, scheme)) == scheme


def test_pieces_of_experts_hold_what_the_released_names_mean() -> None:
    model = small_model()
    own = model.state_dict()
    released = official_tensors(model, own["lm_head.weight"].dtype)
    for piece in pieces({name: tensor.shape for name, tensor in own.items()}, "official"):
        run = own[piece.target].flatten()[piece.start : piece.start + prod(piece.shape)]
        assert run.view(piece.shape).equal(released[piece.name]), piece.name

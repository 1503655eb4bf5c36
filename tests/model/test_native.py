"""Transformers' own MiniMax with the same weights: where it agrees, and where it computes another model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.model.native import largest_difference, native_model
from tests.model.small import packed, random_tokens, small_model

# The last layer is a softmax layer, as in the released model: in a lightning layer at the end transformers' slopes are a
# third off (1.33e-5 of the base rate for 1e-5), which four layers show at 3e-5.
LAYERS: dict[str, Any] = {"num_hidden_layers": 4, "attn_type_list": [0, 1, 0, 1]}
LENGTH = 300  # more than one of their blocks of 256


def tokens() -> torch.Tensor:
    return torch.stack([random_tokens(LENGTH), random_tokens(LENGTH, seed=1)])


@pytest.mark.parametrize("seed", range(4))
def test_with_whole_heads_rotated_both_agree(seed: int) -> None:
    model = small_model(seed=seed, rotary_dim=8, **LAYERS).eval()
    native = native_model(model)
    with torch.no_grad():
        ours = model(tokens(), output_hidden_states=True, output_router_logits=True)
        theirs = native(tokens(), output_hidden_states=True, output_router_logits=True)
    assert largest_difference(ours.logits, theirs.logits) < 5e-5
    for one, two in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert largest_difference(one, two) < 5e-5
    for one, two in zip(ours.router_logits, theirs.router_logits, strict=True):
        assert largest_difference(one, two) < 5e-5
    assert float(ours.aux_loss) == pytest.approx(float(theirs.aux_loss), rel=5e-5)


def test_gradients_agree_too() -> None:
    model = small_model(rotary_dim=8, **LAYERS)
    native = native_model(model)
    model(tokens(), labels=tokens()).loss.backward()
    native(tokens(), labels=tokens()).loss.backward()
    theirs = {name.replace(".mlp.", ".block_sparse_moe."): parameter.grad for name, parameter in native.named_parameters()}
    for name, parameter in model.named_parameters():
        assert largest_difference(parameter.grad, theirs[name]) < 2e-4, name


@pytest.mark.parametrize("seed", range(4))
def test_with_half_heads_rotated_transformers_computes_another_model(seed: int) -> None:
    model = small_model(seed=seed, rotary_dim=4, **LAYERS).eval()
    with torch.no_grad():
        ours, theirs = model(tokens()).logits, native_model(model)(tokens()).logits
    assert largest_difference(ours, theirs) > 0.5
    likelihood = ours.log_softmax(-1)
    assert (likelihood.exp() * (likelihood - theirs.log_softmax(-1))).sum(-1).mean() > 0.1
    # Before the first softmax layer, and at first tokens (position 0 turns nothing), there is no difference.
    assert largest_difference(ours[:, 0], theirs[:, 0]) < 5e-5


@pytest.mark.parametrize(
    ("kinds", "use_cache", "leaks"), [([0, 0], False, True), ([1, 1], False, False), ([1, 1], None, True), ([0, 1], False, True)]
)
def test_transformers_packed_documents_leak(kinds: list[int], use_cache: bool | None, leaks: bool) -> None:
    """In lightning layers always; in softmax layers where a cache is made, which is its default."""
    model = small_model(rotary_dim=8, dtype=torch.float64, num_hidden_layers=2, attn_type_list=kinds).eval()
    first, second = random_tokens(40), random_tokens(30, seed=1)
    ids, layout = packed(first, second)
    with torch.no_grad():
        for either, leak in ((model, False), (native_model(model), leaks)):
            together = either(ids, position_ids=layout.position_ids[None], use_cache=False if either is model else use_cache)
            alone = either(second[None]).logits[0]
            difference = largest_difference(together.logits[0, 40:], alone)
            assert difference > 0.1 if leak else difference < 1e-10

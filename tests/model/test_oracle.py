"""The model against an oracle written from the equations: logits, gradients and experts, in fp32 and fp64."""

from __future__ import annotations

import pytest
import torch

from posttrain.model.layers import lightning_slopes
from posttrain.model.modeling import MiniMaxText01ForCausalLM
from tests.model.oracle import double, oracle
from tests.model.small import packed, random_config, random_tokens, small_config

# Around the sizes of a chunk, and nothing but a first token.
LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 130]
SEEDS = range(20)


def random_model(seed: int) -> MiniMaxText01ForCausalLM:
    torch.manual_seed(seed)
    model = MiniMaxText01ForCausalLM(random_config(seed))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def documents(seed: int, vocab_size: int) -> list[torch.Tensor]:
    """Two documents: the second is wrong where anything of the first leaks into it."""
    return [random_tokens(LENGTHS[(seed + shift) % len(LENGTHS)], vocab_size, seed) for shift in (0, 3)]


def distance(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest difference as a share of the largest true value."""
    return float((ours.detach().double() - truth).abs().max() / truth.abs().max().clamp(min=1e-30))


@pytest.mark.parametrize("seed", SEEDS)
def test_logits_and_gradients_are_those_of_the_equations(seed: int) -> None:
    model = random_model(seed)
    config = model.config
    texts = documents(seed, config.vocab_size)
    tensors = double(model.state_dict(), requires_grad=True)
    results = [oracle(tensors, config, text.tolist()) for text in texts]
    truth = torch.cat([logits for logits, _ in results])
    weights = torch.randn(truth.shape, dtype=torch.float64)
    (truth * weights).sum().backward()
    truth = truth.detach()
    tokens, layout = packed(*texts)

    output = model(tokens, layout=layout, output_routes=True)
    assert output.logits.dtype == torch.float32
    assert distance(output.logits[0], truth) < 5e-5
    assert output.routes.sort(dim=-1).values.tolist() == [token for _, routes in results for token in routes]
    (output.logits[0] * weights.float()).sum().backward()
    for name, parameter in model.named_parameters():
        expected = tensors[name].grad
        assert expected is not None
        assert parameter.grad is not None
        # A router that chooses one expert of one has no gradient at all, where any rounding is infinitely wrong.
        if expected.abs().max() < 1e-9:
            assert parameter.grad.abs().max() < 1e-4, name
        else:
            assert distance(parameter.grad, expected) < 2e-4, name

    model.zero_grad()
    model.double()
    logits = model(tokens, layout=layout).logits[0]
    assert logits.dtype == torch.float64
    assert distance(logits, truth) < 1e-10
    (logits * weights).sum().backward()
    for name, parameter in model.named_parameters():
        expected = tensors[name].grad
        assert expected is not None and parameter.grad is not None
        assert (parameter.grad - expected).abs().max() <= 1e-9 * expected.abs().max() + 1e-9, name


def test_the_random_models_cover_what_they_are_there_for() -> None:
    configs = [random_config(seed) for seed in SEEDS]
    heads = {config.num_attention_heads for config in configs}
    assert any(n & (n - 1) for n in heads), "no number of heads that is no power of two"
    assert {config.num_hidden_layers for config in configs} >= {1, 2, 3, 4}
    assert any(config.num_hidden_layers == 1 and config.attn_type_list == [0] for config in configs)
    for kind in (0, 1):
        assert {kind in config.attn_type_list for config in configs} == {True, False}
    assert {config.rotary_dim == config.head_dim for config in configs} == {True, False}
    assert {config.num_key_value_heads < config.num_attention_heads for config in configs} == {True, False}
    assert any(config.num_local_experts == 1 for config in configs)
    assert any(1 < config.num_experts_per_tok < config.num_local_experts for config in configs)
    assert {config.layernorm_mlp_beta == 1.0 for config in configs} == {True, False}


def test_the_released_numbers_of_slopes_and_residuals() -> None:
    first, late = lightning_slopes(64, 0, 80), lightning_slopes(64, 78, 80)
    assert first[0] == pytest.approx(0.917004 * (1 + 1e-5), rel=1e-6)
    assert first[-1] == pytest.approx(0.00390625 * (1 + 1e-5), rel=1e-9)
    assert late[0] / first[0] == pytest.approx(0.0126682278 / (1 + 1e-5), rel=1e-7)
    config = small_config(num_hidden_layers=80, attn_type_list=None)
    assert config.layernorm_mlp_alpha == config.layernorm_linear_attention_alpha == pytest.approx(3.5565588200778455, rel=1e-15)
    assert [i for i, kind in enumerate(config.attn_type_list) if kind] == [7, 15, 23, 31, 39, 47, 55, 63, 71, 79]

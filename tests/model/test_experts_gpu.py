"""Grouped products of the experts on a GPU against fp64 on the host."""

from __future__ import annotations

import pytest
import torch

from posttrain.model.configuration import MiniMaxText01Config
from posttrain.model.experts import Experts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

ROUNDINGS = 3
"""bf16 roundings one after the other between an input and an output: inner products, activation, output of an expert."""
TOLERANCE = ROUNDINGS * 2.0**-9 * 2
"""Relative RMS: each rounding is at most half a unit of 2^-8, and the terms are not independent."""


def experts(kind: torch.dtype, device: str) -> Experts:
    torch.manual_seed(0)
    made = Experts(
        MiniMaxText01Config(hidden_size=64, intermediate_size=48, num_local_experts=8, num_hidden_layers=1, attn_type_list=[0])
    )
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
        parameter.data = parameter.data.bfloat16().to(device, kind)
    return made


def run(kind: torch.dtype, device: str, tokens: int, used: int) -> list[torch.Tensor]:
    """Output and gradients of input, shares and weights, with the first `used` experts taken."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 64, generator=generator).bfloat16()
    up = torch.randn(tokens, 64, generator=generator).bfloat16()
    routes = (
        torch.stack([torch.randperm(used, generator=generator)[:2] for _ in range(tokens)])
        if tokens
        else torch.zeros(0, 2).long()
    )
    shares = torch.rand(tokens, 2, generator=generator)
    layer = experts(kind, device)
    inputs = [x.to(device, kind).requires_grad_(), shares.to(device, torch.promote_types(kind, torch.float32)).requires_grad_()]
    out = layer(inputs[0], inputs[1], routes.to(device))
    out.backward(up.to(device, kind))
    found = [out, *(tensor.grad for tensor in (*inputs, layer.gate_up_proj, layer.down_proj))]
    return [tensor.detach().double().cpu() for tensor in found if tensor is not None]


@pytest.mark.parametrize("tokens", [0, 1, 2, 63, 64, 65, 1000])
@pytest.mark.parametrize("used", [2, 8])
def test_grouped_products_agree_with_fp64(tokens: int, used: int) -> None:
    poison = torch.full((1 << 22,), float("nan"), device="cuda", dtype=torch.bfloat16)
    del poison  # what is not written reads as NaN
    for found, expected in zip(run(torch.bfloat16, "cuda", tokens, used), run(torch.float64, "cpu", tokens, used), strict=True):
        assert torch.isfinite(found).all()
        assert (found - expected).norm() <= TOLERANCE * expected.norm()


def test_experts_without_tokens_get_zero_gradients() -> None:
    for gradient in run(torch.bfloat16, "cuda", 65, 2)[3:]:
        assert not gradient[2:].any()


def test_repeats_are_bit_identical() -> None:
    first = run(torch.bfloat16, "cuda", 1000, 8)
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, run(torch.bfloat16, "cuda", 1000, 8), strict=True))

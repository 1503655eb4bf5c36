"""Attention of what comes before SiLU, on a CPU; `ends_interpreter_cases.py` has the same for the kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from posttrain.kernels.lightning.operator import lightning_attention_qkv, lightning_decode
from posttrain.kernels.lightning.silu import silu_backward
from tests.kernels.ends_exact import exact_silu, normal
from tests.kernels.shapes import inputs
from tests.kernels.test_lightning import exactly


@pytest.mark.parametrize("backend", ["matmul", "torch"])
@pytest.mark.parametrize("lengths", [[0], [1], [63, 0, 64], [65]])
def test_the_activation_is_silu_of_the_projection(backend: str, lengths: list[int]) -> None:
    data = inputs(lengths)
    raw = torch.cat([data.q, data.k, data.v], dim=-1).requires_grad_()
    options = {"cu_seqlens": data.cu_seqlens, "backend": backend}
    found = lightning_attention_qkv(raw, data.slopes, activation="silu", **options)  # type: ignore[arg-type]
    expected = lightning_attention_qkv(raw / (1 + torch.exp(-raw)), data.slopes, **options)  # type: ignore[arg-type]
    exactly(found, expected)
    exactly(*(torch.autograd.grad(out.square().sum(), raw)[0] for out in (found, expected)))


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 5000])
def test_the_gradient_in_place(size: int) -> None:
    x, grad = 4 * normal(size, dtype=torch.float64), normal(size, dtype=torch.float64, seed=1)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(exact_silu(leaf), leaf, grad)
    place = grad.data_ptr()
    silu_backward(x, grad)
    assert grad.data_ptr() == place
    exactly(grad, expected)


def test_decoding_takes_what_comes_before_silu() -> None:
    data = inputs([1, 1, 1])
    pools = data.states.clone(), data.states.clone()
    found = lightning_decode(data.q, data.k, data.v, data.slopes, pools[0], activation="silu")
    q, k, v = (F.silu(x) for x in (data.q, data.k, data.v))
    expected = lightning_decode(q, k, v, data.slopes, pools[1])
    exactly(found, expected)
    exactly(*pools)


@pytest.mark.parametrize("backend", ["matmul", "torch"])
def test_another_activation_is_refused(backend: str) -> None:
    data = inputs([1])
    raw = torch.cat([data.q, data.k, data.v], dim=-1)
    with pytest.raises(ValueError, match="activation must be 'silu' or None, got 'relu'"):
        lightning_attention_qkv(raw, data.slopes, activation="relu", backend=backend)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="activation must be 'silu' or None, got 'relu'"):
        lightning_decode(data.q, data.k, data.v, data.slopes, data.states, activation="relu", backend=backend)  # type: ignore[arg-type]

"""The kernels of the ends through Triton's interpreter; the tests of both run this file with TRITON_INTERPRET=1."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from triton import knobs

from posttrain.kernels.lightning.decode import decode
from posttrain.kernels.lightning.gated_norm import gated_rms_norm
from posttrain.kernels.lightning.gated_norm_kernels import gated_norm_backward
from posttrain.kernels.lightning.operator import lightning_attention_qkv
from tests.kernels.accuracy import layer_slopes, relative_rms
from tests.kernels.ends_exact import EPS, exact_silu, norm_errors, norm_inputs, normal

assert knobs.runtime.interpret, "run with TRITON_INTERPRET=1"

LAST = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
"""What rounding a result costs at most, relative; the interpreter cuts bf16 off."""


def bound(dtype: torch.dtype, terms: int) -> float:
    """Sums of `terms` rounded numbers err like a random walk, times 8 for the chain of factors around them; then the rounding."""
    return 8 * math.sqrt(terms) * 2.0**-24 + LAST[dtype]


FULL = torch.float32


@pytest.mark.parametrize(
    ("rows", "width", "dtype"),
    [(1, 1, FULL), (63, 16, FULL), (65, 128, FULL), (2, 1000, FULL), (33, 24, torch.float16), (33, 24, torch.bfloat16)],
)
def test_gated_norm_against_fp64(rows: int, width: int, dtype: torch.dtype) -> None:
    found = norm_errors(norm_inputs(rows, width, dtype), "triton")
    # A row of one number has the gradient zero in exact arithmetic, but for eps: what is left is rounding.
    found = found if width > 1 else {name: found[name] for name in ("y", "dgate", "dweight")}
    assert all(error <= bound(dtype, rows + width) for error in found.values()), (bound(dtype, rows + width), found)


def test_gated_norm_of_mixed_types() -> None:
    x, gate, weight, dy = norm_inputs(5, 32, torch.float16, weight_dtype=torch.float32)
    wide = gate.float()
    for leaf in (x, wide, weight):
        leaf.requires_grad_()
    out = gated_rms_norm(x, wide, weight, EPS, backend="triton")
    grads = torch.autograd.grad(out, (x, wide, weight), dy.float())
    assert out.dtype == torch.float32
    assert [grad.dtype for grad in grads] == [torch.float16, torch.float32, torch.float32]
    assert gated_rms_norm(x, gate, weight, EPS, backend="triton").dtype == torch.float16


def test_gated_norm_of_strided_rows_and_of_none() -> None:
    x, gate, weight, dy = norm_inputs(6, 64, torch.float32)
    expected = gated_rms_norm(x[::2, :40], gate[::2, 8:48], weight[:40], EPS, backend="torch")
    found = gated_rms_norm(x[::2, :40], gate[::2, 8:48], weight[:40], EPS, backend="triton")
    assert relative_rms(found, expected) <= bound(torch.float32, 40)
    turned = gated_rms_norm(x.t().contiguous().t(), gate, weight, EPS, backend="triton")
    assert torch.equal(turned, gated_rms_norm(x, gate, weight, EPS, backend="triton"))
    inputs = tuple(part[:0] for part in (x, gate)) + (weight, dy[:0])
    assert set(norm_errors(inputs, "triton").values()) == {0.0}


def test_the_weights_gradient_does_not_depend_on_what_was_in_memory() -> None:
    inputs = norm_inputs(7, 24, torch.float32)
    x, gate, weight, dy = inputs
    for programs in (1, 3, 7, 50):
        dx, dgate, dweight = gated_norm_backward(x, gate, weight, EPS, dy, programs=programs)
        one = gated_norm_backward(x, gate, weight, EPS, dy, programs=1)
        assert torch.equal(dx, one[0]) and torch.equal(dgate, one[1])
        assert relative_rms(dweight, one[2]) <= bound(torch.float32, 7)


@pytest.mark.parametrize("lengths", [(65,), (1, 0, 64)])
def test_attention_of_what_comes_before_silu(lengths: tuple[int, ...]) -> None:
    raw, do = normal(sum(lengths), 2, 48, dtype=torch.float32), normal(sum(lengths), 2, 16, dtype=torch.float32, seed=1)
    slopes = torch.tensor(layer_slopes(0, 2))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    exact = raw.double().requires_grad_()
    truth = lightning_attention_qkv(exact_silu(exact), slopes.double(), cu_seqlens=offsets, backend="torch")
    (expected,) = torch.autograd.grad(truth, exact, do.double())
    raw.requires_grad_()
    out = lightning_attention_qkv(raw, slopes, cu_seqlens=offsets, activation="silu", backend="triton")
    (grad,) = torch.autograd.grad(out, raw, do)
    limit = bound(torch.float32, (max(lengths) + 1) * 16)
    assert relative_rms(out, truth) <= limit and relative_rms(grad, expected) <= limit


def test_a_decoding_step_of_what_comes_before_silu() -> None:
    q, k, v = (normal(3, 2, 16, dtype=torch.float16, seed=seed) for seed in range(3))
    slopes, pool = torch.tensor(layer_slopes(0, 2)), normal(3, 2, 16, 16, dtype=torch.float32, seed=3)
    states = pool.clone()
    expected = decode(F.silu(q), F.silu(k), F.silu(v), slopes, states, None)
    assert torch.equal(decode(q, k, v, slopes, pool, None, silu=True), expected)
    assert torch.equal(pool, states)

"""The ends of lightning attention on a GPU, gated RMSNorm and SiLU, against fp64."""

from __future__ import annotations

import pytest
import torch

from posttrain.kernels.lightning.gated_norm import gated_rms_norm
from posttrain.kernels.lightning.operator import lightning_attention_qkv, lightning_decode

pytest.importorskip("triton")
from tests.kernels.accuracy import layer_slopes, relative_rms  # noqa: E402
from tests.kernels.ends_exact import EPS, exact_silu, norm_errors, norm_inputs, norm_results, normal  # noqa: E402
from tests.kernels.gpu_checks import LIMITS  # noqa: E402

pytestmark = pytest.mark.gpu

ROUNDING = 1.7e-3
"""Relative RMS of rounding normal numbers to bf16."""
SILU_LIMIT = (LIMITS["dq"] ** 2 + 3 * ROUNDING**2) ** 0.5
"""Behind SiLU a gradient meets three roundings more: of two of its walk's inputs, and of its product with SiLU's derivative."""


@pytest.fixture(autouse=True)
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.fail("these tests need an NVIDIA GPU; leave out -m gpu")


@pytest.mark.parametrize(("rows", "width"), [(1, 8192), (63, 1024), (64, 128), (65, 8192), (1000, 5000), (9, 200), (20, 32768)])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 2e-3), (torch.float16, 3e-4), (torch.float32, 5e-7)])
def test_gated_norm_against_fp64(rows: int, width: int, dtype: torch.dtype, limit: float) -> None:
    # A result is rounded once: 1.7e-3 for bf16 and 2.1e-4 for fp16; fp32 has a chain of about ten roundings of 2^-24.
    found = norm_errors(norm_inputs(rows, width, dtype, "cuda"), "triton")
    assert all(error <= limit for error in found.values()), found


def test_gated_norm_fifty_times() -> None:
    inputs = norm_inputs(1000, 8192, torch.bfloat16, "cuda")
    first = norm_results(gated_rms_norm, inputs)
    for _ in range(49):
        assert all(torch.equal(x, first[name]) for name, x in norm_results(gated_rms_norm, inputs).items())


def test_gated_norm_of_no_rows_and_in_fp64() -> None:
    *leaves, dy = norm_inputs(0, 256, torch.bfloat16, "cuda")
    assert set(norm_errors((*leaves, dy), "triton").values()) == {0.0}
    assert max(norm_errors(norm_inputs(5, 256, torch.float64, "cuda"), "auto").values()) < 1e-14


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, SILU_LIMIT), (torch.float32, 1e-6)])
@pytest.mark.parametrize("lengths", [(0,), (1,) * 65, (63, 0, 64, 65), (600, 1400)])
def test_attention_of_what_comes_before_silu(lengths: tuple[int, ...], dtype: torch.dtype, limit: float) -> None:
    total = sum(lengths)
    raw = normal(total, 4, 384, dtype=dtype, device="cuda")
    do = normal(total, 4, 128, dtype=dtype, device="cuda", seed=1)
    slopes = torch.tensor(layer_slopes(0, 4), device="cuda")
    offsets = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    exact = raw.double().requires_grad_()
    truth = lightning_attention_qkv(exact_silu(exact), slopes.double(), cu_seqlens=offsets, backend="torch")
    (expected,) = torch.autograd.grad(truth, exact, do.double())
    results = []
    for _ in range(2):
        leaf = raw.clone().requires_grad_()
        out = lightning_attention_qkv(leaf, slopes, cu_seqlens=offsets, activation="silu", backend="triton")
        results.append((out.detach(), *torch.autograd.grad(out, leaf, do)))
    assert all(map(torch.equal, *results))
    assert relative_rms(results[0][0], truth.detach()) <= limit
    for ours, theirs in zip(results[0][1].chunk(3, dim=-1), expected.chunk(3, dim=-1), strict=True):
        assert relative_rms(ours, theirs) <= limit


def test_decoding_takes_what_comes_before_silu() -> None:
    q, k, v = (normal(3, 4, 128, dtype=torch.bfloat16, device="cuda", seed=seed) for seed in range(3))
    slopes, pool = torch.tensor(layer_slopes(0, 4), device="cuda"), torch.randn(3, 4, 128, 128, device="cuda")
    states = pool.clone()
    found = lightning_decode(q, k, v, slopes, pool, activation="silu", backend="triton")
    q, k, v = (torch.nn.functional.silu(x) for x in (q, k, v))
    expected = lightning_decode(q, k, v, slopes, states, backend="triton")
    # The sigmoids may differ in their last place of fp32, and where that tips a rounding by one place of bf16.
    assert relative_rms(found, expected) <= ROUNDING and relative_rms(pool, states) <= ROUNDING


def test_the_ends_under_torch_compile() -> None:
    x, gate, weight, dy = norm_inputs(300, 512, torch.bfloat16, "cuda")
    raw = normal(300, 4, 384, dtype=torch.bfloat16, device="cuda").requires_grad_()
    slopes = torch.tensor(layer_slopes(0, 4), device="cuda")
    weight.requires_grad_()

    def ends(raw: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = lightning_attention_qkv(raw, slopes, activation="silu", backend="triton")
        return gated_rms_norm(out.flatten(1), gate, weight, EPS, backend="triton")

    grads = [
        torch.autograd.grad(way(raw, gate, weight), (raw, weight), dy) for way in (ends, torch.compile(ends, fullgraph=True))
    ]
    assert all(map(torch.equal, *grads))

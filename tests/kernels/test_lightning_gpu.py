"""The Triton kernels on a GPU, against fp64."""

from __future__ import annotations

import pytest
import torch

from posttrain.kernels.lightning.operator import lightning_attention, lightning_attention_qkv, lightning_decode

pytest.importorskip("triton")
from tests.kernels.gpu_checks import CHECKS, LIMITS, repeated  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.fail("these tests need an NVIDIA GPU; leave out -m gpu")


@pytest.mark.parametrize("name", CHECKS)
def test_errors_against_fp64(name: str) -> None:
    for case, found in CHECKS[name]():
        for quantity, error in found.items():
            assert error <= LIMITS[quantity], f"{case}: {quantity} is wrong by {error:.2e}, at most {LIMITS[quantity]:.0e}"


def test_fifty_runs_give_the_same_bits() -> None:
    assert repeated(50)


def test_the_operator_and_its_gradient_under_torch_compile() -> None:
    qkv = torch.randn(300, 4, 384, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    slopes = torch.tensor([0.5, 0.1, 0.01, 0.0], device="cuda")
    offsets = torch.tensor([0, 100, 100, 300], device="cuda", dtype=torch.int32)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return lightning_attention_qkv(torch.nn.functional.silu(x), slopes, cu_seqlens=offsets, backend="triton").square().sum()

    eager = torch.autograd.grad(loss(qkv), qkv)[0]
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(qkv), qkv)[0]
    # SiLU is rounded to bf16 between the parts in one and may be kept in fp32 in the other.
    assert float((eager - compiled).float().norm() / eager.float().norm()) <= 2.0**-6


def test_the_backends_agree_on_the_device() -> None:
    q, k, v = (torch.randn(2, 200, 4, 128, device="cuda") for _ in range(3))
    slopes = torch.tensor([0.5, 0.1, 0.01, 0.0], device="cuda")
    ours, states = lightning_attention(q, k, v, slopes, output_final_state=True, backend="triton")
    for backend in ("matmul", "torch"):
        out, final = lightning_attention(q, k, v, slopes, output_final_state=True, backend=backend)
        assert states is not None and final is not None
        torch.testing.assert_close(out, ours, rtol=2e-4, atol=2e-4 * float(ours.abs().max()))
        torch.testing.assert_close(final, states, rtol=2e-4, atol=2e-4 * float(states.abs().max()))


def test_decoding_in_a_graph_goes_on_where_prefill_ended() -> None:
    q, k, v = (torch.randn(3, 70, 4, 128, device="cuda", dtype=torch.bfloat16) * 0.3 for _ in range(3))
    slopes = torch.tensor([0.5, 0.1, 0.01, 0.0], device="cuda")
    whole, _ = lightning_attention(q, k, v, slopes, backend="triton")
    pool = torch.zeros(5, 4, 128, 128, device="cuda")
    slots = torch.tensor([4, 0, 2], device="cuda")
    for _ in range(2):  # the first call compiles, which a capture may not
        pool.zero_()
        lightning_attention(q[:, :60], k[:, :60], v[:, :60], slopes, initial_state=pool, state_slots=slots, backend="triton")
        lightning_decode(q[:, 60], k[:, 60], v[:, 60], slopes, pool, state_slots=slots)
    now_q, now_k, now_v = (x[:, 60].clone() for x in (q, k, v))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = lightning_decode(now_q, now_k, now_v, slopes, pool, state_slots=slots)
    for t in range(61, 70):
        for place, x in zip((now_q, now_k, now_v), (q, k, v), strict=True):
            place.copy_(x[:, t])
        graph.replay()
        # Both are rounded to bf16 (2^-9 of each number at most); the walk also rounds its scores and its state.
        error = float((out.float() - whole[:, t].float()).norm() / whole[:, t].float().norm())
        assert error <= 2 * LIMITS["out"]
    assert (pool[[1, 3]] == 0).all()

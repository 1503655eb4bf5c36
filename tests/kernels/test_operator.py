"""The operator on a CPU: backends against the recurrence, pools of states, and what is refused."""

from __future__ import annotations

import importlib.util
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.config.errors import UserError
from posttrain.kernels.lightning import operator
from posttrain.kernels.lightning.matmul import BLOCK_SIZES, least_padding
from posttrain.kernels.lightning.operator import lightning_attention, lightning_attention_qkv, lightning_decode
from posttrain.kernels.lightning.reference import recurrent_lightning_attention
from tests.kernels.shapes import LENGTHS, Inputs, inputs
from tests.kernels.test_lightning import exactly

CPU_BACKENDS = ("matmul", "torch")


def attend(data: Inputs, backend: str, initial: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    out, final = lightning_attention(
        *(data.q, data.k, data.v, data.slopes),
        cu_seqlens=data.cu_seqlens,
        initial_state=data.states if initial else None,
        output_final_state=True,
        backend=backend,
    )
    assert final is not None
    return out, final


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@given(lengths=LENGTHS, initial=st.booleans(), seed=st.integers(0, 10))
def test_backends_give_what_the_recurrence_gives(backend: str, lengths: list[int], initial: bool, seed: int) -> None:
    data = inputs(lengths, heads=2, keys=3, seed=seed)
    states = data.states if initial else None
    expected = recurrent_lightning_attention(
        data.q, data.k, data.v, data.slopes, cu_seqlens=data.cu_seqlens, initial_state=states
    )
    for ours, theirs in zip(attend(data, backend, initial), expected, strict=True):
        exactly(ours, theirs)


@pytest.mark.parametrize("lengths", [[1], [0, 4, 1], [66], [257, 0, 300]])
def test_gradients_of_the_products_agree_with_those_of_the_chunks(lengths: list[int]) -> None:
    data = inputs(lengths, keys=3)
    leaves = [x.requires_grad_() for x in (data.q, data.k, data.v, data.states)]
    weights = torch.randn(data.v.shape, dtype=torch.float64), torch.randn(data.states.shape, dtype=torch.float64)
    grads = []
    for backend in CPU_BACKENDS:
        out, final = attend(data, backend)
        grads.append(torch.autograd.grad((out * weights[0]).sum() + (final * weights[1]).sum(), leaves))
    for ours, theirs in zip(*grads, strict=True):
        exactly(ours, theirs)


@pytest.mark.parametrize("rate", [0.0, 1e-8, 20.0, 1e4])
def test_products_stay_finite_at_any_rate(rate: float) -> None:
    data = inputs([3000, 3], heads=1, slopes=[rate], dtype=torch.float32)
    leaves = [x.requires_grad_() for x in (data.q, data.k, data.v, data.states)]
    out, final = attend(data, "matmul")
    (out.square().mean() + final.square().mean()).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_batch_of_one_length_is_its_documents_packed(backend: str) -> None:
    data = inputs([40] * 3, keys=4)
    q, k, v = (x.view(3, 40, *x.shape[1:]) for x in (data.q, data.k, data.v))
    out, final = lightning_attention(q, k, v, data.slopes, output_final_state=True, backend=backend)
    packed, ends = attend(data, backend, initial=False)
    assert final is not None
    exactly(out.flatten(0, 1), packed)
    exactly(final, ends)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_interleaved_projections_give_interleaved_gradients(backend: str) -> None:
    data = inputs([20, 50], keys=4)
    qkv = torch.cat([data.q, data.k, data.v], dim=-1).requires_grad_()
    leaves = [x.requires_grad_() for x in (data.q, data.k, data.v)]
    out = lightning_attention_qkv(qkv, data.slopes, cu_seqlens=data.cu_seqlens, backend=backend)
    expected, _ = attend(data, "torch", initial=False)
    exactly(out, expected)
    exactly(
        torch.autograd.grad(out.square().sum(), qkv)[0],
        torch.cat(torch.autograd.grad(expected.square().sum(), leaves), dim=-1),
    )


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_pool_moves_on_in_its_slots_and_nowhere_else(backend: str) -> None:
    data = inputs([5, 0, 70, 1], keys=4)
    slots = torch.tensor([4, 1, -1, 0])
    pool = torch.full((6, *data.states.shape[1:]), torch.nan, dtype=torch.float64)
    pool[[4, 1, 0]] = data.states[[0, 1, 3]]
    data.states[2] = 0
    expected, ends = attend(data, "torch")
    out, none = lightning_attention(
        *(data.q, data.k, data.v, data.slopes),
        cu_seqlens=data.cu_seqlens,
        initial_state=pool,
        state_slots=slots,
        backend=backend,
    )
    assert none is None
    exactly(out, expected)
    exactly(pool[[4, 1, 0]], ends[[0, 1, 3]])
    assert pool[[2, 3, 5]].isnan().all()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_decoding_with_slots(backend: str) -> None:
    data = inputs([1, 1, 1], keys=4)
    slots = torch.tensor([3, -1, 0])
    pool = torch.full((4, *data.states.shape[1:]), torch.nan, dtype=torch.float64)
    pool[[3, 0]] = data.states[[0, 2]]
    expected, ends = attend(data, "torch")
    out = lightning_decode(data.q, data.k, data.v, data.slopes, pool, state_slots=slots, backend=backend)
    exactly(out[[0, 2]], expected[[0, 2]])
    exactly(pool[[3, 0]], ends[[0, 2]])
    assert (out[1] == 0).all() and pool[[1, 2]].isnan().all()
    states = data.states.clone()
    exactly(lightning_decode(data.q, data.k, data.v, data.slopes, states, backend=backend), expected)
    exactly(states, ends)


@pytest.mark.parametrize(
    ("length", "size"), [(1, 32), (33, 64), (50, 64), (96, 32), (128, 128), (300, 64), (384, 128), (512, 256)]
)
def test_the_block_pads_least(length: int, size: int) -> None:
    assert least_padding(length) == size
    assert all(-length % size <= -length % other for other in BLOCK_SIZES)


def test_an_explicit_backend_that_cannot_run_is_refused() -> None:
    data = inputs([3], keys=4)
    obstacle = "(Triton is not installed|the tensors are on cpu, not on a GPU)"
    with pytest.raises(UserError, match=f"'triton' cannot run: {obstacle}; write 'auto'"):
        attend(data, "triton")
    with pytest.raises(UserError, match="unknown lightning attention backend 'cuda'; write one of auto, triton"):
        attend(data, "cuda")


def test_auto_says_once_what_it_took(caplog: pytest.LogCaptureFixture) -> None:
    data = inputs([3], keys=4)
    operator._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger=operator.__name__):
        attend(data, "auto")
        attend(data, "auto")
    assert len(caplog.messages) == 1
    missing = importlib.util.find_spec("triton") is None
    assert caplog.messages[0].endswith(
        "backend torch (Triton is not installed)" if missing else "backend torch (the tensors are on cpu, not on a GPU)"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(4, 2, 5, dtype=torch.float64)}, "alike"),
        ({"k": torch.zeros(4, 2, 4)}, "one floating type"),
        ({"slopes": torch.zeros(3)}, r"slopes must be \[2\]"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, "int32 or int64"),
        ({"initial_state": torch.zeros(2, 2, 4, 4, dtype=torch.float64)}, r"states must be torch.float64 \[1, 2, 4, 4\]"),
        ({"initial_state": torch.zeros(1, 2, 4, 4)}, "states must be torch.float64"),
        ({"state_slots": torch.tensor([0])}, "needs a pool"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    data = inputs([4], keys=4)
    arguments = {"q": data.q, "k": data.k, "v": data.v, "slopes": data.slopes, **change}
    with pytest.raises(ValueError, match=message):
        lightning_attention(**arguments, backend="torch")  # type: ignore[arg-type]

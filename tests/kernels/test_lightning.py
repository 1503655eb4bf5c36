"""Lightning attention in chunks against the recurrence, the written-out sum, and finite differences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.kernels.lightning.chunked import lightning_attention, lightning_decode_step
from posttrain.kernels.lightning.reference import recurrent_lightning_attention
from tests.kernels.shapes import LENGTHS, Inputs, formula, inputs


def exactly(ours: torch.Tensor, truth: torch.Tensor) -> None:
    """Equal up to the roundings of fp64."""
    torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-11)


def chunked(data: Inputs, initial: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    out, final = lightning_attention(
        data.q,
        data.k,
        data.v,
        data.slopes,
        lengths=data.lengths,
        initial_state=data.states if initial else None,
        output_final_state=True,
    )
    assert final is not None
    return out, final


def recurrent(data: Inputs, initial: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    return recurrent_lightning_attention(
        data.q, data.k, data.v, data.slopes, cu_seqlens=data.cu_seqlens, initial_state=data.states if initial else None
    )


@given(LENGTHS, st.booleans(), st.integers(1, 3), st.integers(0, 10))
def test_chunks_give_what_the_recurrence_gives(lengths: list[int], initial: bool, heads: int, seed: int) -> None:
    data = inputs(lengths, heads=heads, keys=3, values=5, seed=seed)
    out, final = chunked(data, initial)
    expected, expected_final = recurrent(data, initial)
    exactly(out, expected)
    exactly(final, expected_final)
    exactly(out, formula(data, initial))


@given(LENGTHS)
def test_without_states_the_outputs_are_the_same(lengths: list[int]) -> None:
    data = inputs(lengths)
    out, final = lightning_attention(data.q, data.k, data.v, data.slopes, lengths=data.lengths)
    assert final is None
    exactly(out, formula(data, initial=False))


@given(st.integers(1, 140), st.integers(0, 140))
def test_a_document_cut_in_two_goes_on_from_its_state(length: int, cut: int) -> None:
    cut = min(cut, length)
    data = inputs([length])
    whole, final = chunked(data)
    head = Inputs(data.q[:cut], data.k[:cut], data.v[:cut], data.slopes, data.states, (cut,))
    first, state = chunked(head)
    rest = Inputs(data.q[cut:], data.k[cut:], data.v[cut:], data.slopes, state, (length - cut,))
    second, end = chunked(rest)
    exactly(torch.cat([first, second]), whole)
    exactly(end, final)


@pytest.mark.parametrize("lengths", [[1], [3], [0, 4, 1], [17, 2], [66]])
@pytest.mark.parametrize("initial", [True, False])
def test_gradients_agree_with_the_recurrences(lengths: list[int], initial: bool) -> None:
    data = inputs(lengths, keys=3)
    leaves = [x.requires_grad_() for x in (data.q, data.k, data.v, *([data.states] if initial else []))]
    weights = torch.randn(data.v.shape, dtype=torch.float64), torch.randn(data.states.shape, dtype=torch.float64)
    grads = []
    for run in (chunked, recurrent):
        out, final = run(data, initial)
        grads.append(torch.autograd.grad((out * weights[0]).sum() + (final * weights[1]).sum(), leaves))
    for ours, theirs in zip(*grads, strict=True):
        exactly(ours, theirs)


@pytest.mark.parametrize("lengths", [[3], [0, 2, 1], [17]])
def test_gradients_agree_with_finite_differences(lengths: list[int]) -> None:
    data = inputs(lengths, heads=1, keys=2)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return chunked(Inputs(q, k, v, data.slopes, states, data.lengths))

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in (data.q, data.k, data.v, data.states)])


def absolute(data: Inputs) -> Inputs:
    """The same with every number's absolute value: its outputs bound the sizes of all that is summed."""
    bare = data.double()
    return Inputs(bare.q.abs(), bare.k.abs(), bare.v.abs(), bare.slopes, bare.states.abs(), data.lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_of_fp32_stays_below_its_bound(dtype: torch.dtype) -> None:
    """Every output is a sum of at most n = length * keys + keys products of at most four numbers and a decay.

    However it is associated, its error is at most gamma = (n + c) u / (1 - (n + c) u) of the same sum over absolute
    values (Higham, Accuracy and Stability, section 3.1), u = 2^-24. c counts what is done to one product: four roundings
    of products, and a decay e^-x, wrong by x u for the rounding of x and by 2 u of its own; a term whose x is above 16
    counts for less than 1e-7 of what it would, so x <= 16 stands for all: c = 4 + 3 * 18. bf16 input is exact in fp32;
    its output is rounded once more, by 2^-8 of itself.
    """
    data = inputs([130, 1, 65, 0, 300], heads=3, keys=8, dtype=dtype)
    out, final = chunked(data)
    assert out.dtype == dtype and final.dtype == torch.float32
    truth, _ = recurrent(data.double())
    size, _ = recurrent(absolute(data))
    n = (300 * 8 + 8 + 4 + 3 * 18) * 2.0**-24
    bound = n / (1 - n) * size + (2.0**-8 * 1.01 * truth.abs() if dtype == torch.bfloat16 else 0.0)
    error = (out.double() - truth).abs()
    assert (error <= bound).all()
    # The bound is for the worst case; the roundings of a random case mostly cancel.
    if dtype == torch.float32:
        assert (error <= 8 * 2.0**-24 * size).all()


@pytest.mark.parametrize("rate", [0.0, 1e-8, 1.0, 20.0, 100.0, 1e4])
def test_five_thousand_tokens_at_any_rate_of_decay(rate: float) -> None:
    data = inputs([5000, 3], heads=1, keys=4, slopes=[rate], dtype=torch.float32)
    leaves = [x.requires_grad_() for x in (data.q, data.k, data.v)]
    out, final = chunked(data)
    assert out.isfinite().all() and final.isfinite().all()
    (out.square().mean() + final.square().mean()).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves)
    exact = data.double()
    expected, expected_final = chunked(exact)
    torch.testing.assert_close(out.detach().double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    torch.testing.assert_close(final.detach().double(), expected_final, rtol=1e-4, atol=1e-5 * float(expected_final.abs().max()))
    if rate >= 100.0:
        # Nothing but the token itself is left.
        torch.testing.assert_close(expected[1:5000], ((exact.q * exact.k).sum(-1, keepdim=True) * exact.v)[1:5000])


def test_a_token_far_back_is_felt_by_exactly_its_decay() -> None:
    rate, length = 0.004, 4000
    data = inputs([length], heads=1, slopes=[rate])
    changed = Inputs(data.q, data.k, data.v.clone(), data.slopes, data.states, data.lengths)
    changed.v[10] += 1
    difference = (chunked(changed)[0] - chunked(data)[0])[-1]
    expected = torch.exp(torch.tensor(-rate * (length - 11), dtype=torch.float64)) * (data.q[-1] * data.k[10]).sum()
    torch.testing.assert_close(difference, expected.expand_as(difference), rtol=1e-6, atol=1e-9)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6))
def test_decoding_steps_are_the_recurrence(batch: int, heads: int, steps: int) -> None:
    data = inputs([steps] * batch, heads=heads, keys=3, values=5)
    expected, final = recurrent(data)
    state = data.states.clone()
    q, k, v = (x.view(batch, steps, heads, -1) for x in (data.q, data.k, data.v))
    for t in range(steps):
        out = lightning_decode_step(q[:, t], k[:, t], v[:, t], data.slopes, state)
        exactly(out, expected.view(batch, steps, heads, -1)[:, t])
    exactly(state, final)


def test_a_decoding_step_keeps_its_state_in_fp32_for_bf16_tokens() -> None:
    data = inputs([1, 1], dtype=torch.bfloat16)
    state = data.states.float()
    expected = torch.exp(-data.slopes)[None, :, None, None] * state + data.v[..., None].float() * data.k[:, :, None].float()
    out = lightning_decode_step(data.q, data.k, data.v, data.slopes, state)
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    torch.testing.assert_close(state, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out, (expected @ data.q[..., None].float()).squeeze(-1).bfloat16())


def test_five_thousand_decoding_steps_drift_no_further_than_their_roundings() -> None:
    """e^-s of fp32 is wrong by up to u = 2^-24, in every step the same way; a state remembers 1 / s steps."""
    data = inputs([5000], heads=3, slopes=[0.9, 1e-2, 1e-6], dtype=torch.float32)
    state, exact = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4, dtype=torch.float64)
    for t in range(5000):
        q, k, v = (x[t : t + 1] for x in (data.q, data.k, data.v))
        lightning_decode_step(q, k, v, data.slopes, state)
        lightning_decode_step(q.double(), k.double(), v.double(), data.slopes.double(), exact)
    error, size = ((x.double().abs().amax(dim=(0, 2, 3))) for x in (state - exact, exact))
    remembered = (1 / data.slopes.double()).clamp(min=1, max=5000)
    assert (error <= 4 * remembered * 2.0**-24 * size).all()


def test_the_inputs_are_left_alone() -> None:
    data = inputs([17, 0, 65])
    before = [x.clone() for x in (data.q, data.k, data.v, data.slopes, data.states)]
    chunked(data)
    assert all(torch.equal(a, b) for a, b in zip(before, (data.q, data.k, data.v, data.slopes, data.states), strict=True))


def test_lengths_that_do_not_add_up_are_refused() -> None:
    data = inputs([4])
    for lengths in ([3], [4, 1], []):
        with pytest.raises(ValueError, match="add up to"):
            lightning_attention(data.q, data.k, data.v, data.slopes, lengths=lengths)

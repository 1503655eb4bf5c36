"""Verification of drafts, mixed steps and very long prefills on a GPU, against fp64."""

from __future__ import annotations

import pytest
import torch

from posttrain.kernels.lightning.operator import lightning_attention, lightning_decode
from posttrain.kernels.lightning.serving import lightning_mixed, lightning_verify

pytest.importorskip("triton")
from tests.kernels.accuracy import layer_slopes, relative_rms  # noqa: E402
from tests.kernels.gpu_checks import LIMITS  # noqa: E402
from tests.kernels.serving_exact import Mixed, Verification, poisoned_empty, recurrent  # noqa: E402

pytestmark = pytest.mark.gpu
CHUNK, CHUNKS = 131_072, 32
"""Tokens of a piece of the longest prefill, and pieces: 4,194,304 tokens."""


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, and NaN in memory from torch.empty."""
    if not torch.cuda.is_available():
        pytest.fail("these tests need an NVIDIA GPU; leave out -m gpu")
    monkeypatch.setattr(torch, "empty", poisoned_empty())


def untouched(pool: torch.Tensor, slots: list[int]) -> bool:
    """Whether all but `slots` is NaN as before."""
    return bool(pool[[slot for slot in range(len(pool)) if slot not in slots]].isnan().all())


@pytest.mark.parametrize(
    ("dtype", "drafts", "pending", "accepted"),
    [
        (torch.bfloat16, 0, 4, (4, 4, 2, 0, 1)),
        (torch.bfloat16, 1, 1, (1, 0, 0, 1, 1)),
        (torch.bfloat16, 4, 4, (3, 2, 4, -1, 9)),
        (torch.bfloat16, 8, 8, (8, 3, 0, 1, 7)),
        (torch.bfloat16, 5, 0, (0, 0, 0, 0, 0)),
        (torch.float16, 4, 3, (3, 0, 2, 1, 3)),
        (torch.float32, 4, 3, (3, 0, 2, 1, 3)),
    ],
)
def test_verification_against_fp64(dtype: torch.dtype, drafts: int, pending: int, accepted: tuple[int, ...]) -> None:
    slots = (5, -1, 0, 3, 7)
    step = Verification.make(
        drafts, accepted, slots, pending, slopes=layer_slopes(40, 4), head_dim=128, dtype=dtype, device="cuda"
    )
    expected, ends = step.exact()
    used = [slot for slot in slots if slot >= 0]
    out, pool = step.run("triton")
    # One rounding to bf16 (1.7e-3), or to nothing: sums of 128 products, and of the drafts before.
    assert relative_rms(out, expected) <= (2e-3 if dtype != torch.float32 else 4e-6)
    # fp32 all the way: a product and a sum for each pending token, and for the state.
    assert relative_rms(pool[used], ends[used]) <= (2 + pending) * 2.0**-24
    assert (out[1] == 0).all() and untouched(pool, used)
    for _ in range(50):
        again, moved = step.run("triton")
        assert torch.equal(out, again) and torch.equal(pool[used], moved[used])


def test_rounds_of_verification_in_a_graph_give_what_decoding_gives() -> None:
    torch.manual_seed(0)
    slopes = torch.tensor(layer_slopes(40, 4), device="cuda")
    tokens, drafts, batch = 24, 4, 3
    q, k, v = (torch.randn(batch, tokens + drafts, 4, 128, device="cuda", dtype=torch.bfloat16) * 0.3 for _ in range(3))
    start = torch.randn(5, 4, 128, 128, device="cuda")
    pool, decoded = start.clone(), start.clone()
    slots = torch.tensor([4, 0, 2], device="cuda")
    expected = torch.stack(
        [lightning_decode(q[:, t], k[:, t], v[:, t], slopes, decoded, state_slots=slots) for t in range(tokens)], 1
    )
    now_q, now_k, now_v, last_k, last_v = (torch.zeros_like(q[:, :drafts]) for _ in range(5))
    accepted = torch.zeros(batch, device="cuda", dtype=torch.int32)

    def step() -> torch.Tensor:
        return lightning_verify(now_q, now_k, now_v, slopes, pool, last_k, last_v, accepted, state_slots=slots, backend="triton")

    step()  # compiles, which a capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    pool.copy_(start)
    counts = torch.randint(1, drafts + 1, (tokens, batch), generator=torch.Generator().manual_seed(0))
    found = torch.zeros_like(expected)
    place = [0] * batch
    for count in counts.tolist():
        for n, t in enumerate(place):
            for target, x in zip((now_q, now_k, now_v), (q, k, v), strict=True):
                target[n] = x[n, t : t + drafts]
        graph.replay()
        for n, t in enumerate(place):
            kept = min(count[n], tokens - t)
            found[n, t : t + kept] = out[n, :kept]
            accepted[n] = kept
            place[n] += kept
        last_k.copy_(now_k)
        last_v.copy_(now_v)
        if all(t == tokens for t in place):
            break
    assert place == [tokens] * batch
    none = now_q[:, :0]
    lightning_verify(none, none, none, slopes, pool, last_k, last_v, accepted, state_slots=slots, backend="triton")
    # Each is rounded to bf16, which is 1.7e-3; states take two roundings of fp32 a token on either path.
    assert relative_rms(found, expected) <= LIMITS["out"]
    assert relative_rms(pool[slots], decoded[slots]) <= 4 * tokens * 2.0**-24
    assert torch.equal(pool[[1, 3]], start[[1, 3]])


@pytest.mark.parametrize(
    ("dtype", "decodes", "lengths", "slots"),
    [
        (torch.bfloat16, 3, (1, 0, 16), (4, -1, 0, 7, 3, -1)),
        (torch.bfloat16, 0, (17, 31, 32), (1, 0, 2)),
        (torch.bfloat16, 2, (63, 64, 65, 2), (0, 5, 2, -1, 1, 3)),
        (torch.bfloat16, 1, (128, 127), (1, 2, 0)),
        (torch.bfloat16, 4, (300, 0, 1000), (0, 6, -1, 1, 3, 2, -1)),
        (torch.bfloat16, 5, (), (0, 3, -1, 1, 2)),
        (torch.float16, 2, (63, 3), (0, 5, 2, -1)),
        (torch.float32, 2, (63, 3), (0, 5, 2, -1)),
    ],
)
def test_mixed_steps_against_fp64(dtype: torch.dtype, decodes: int, lengths: tuple[int, ...], slots: tuple[int, ...]) -> None:
    step = Mixed.make(decodes, lengths, slots, slopes=layer_slopes(40, 4), head_dim=128, dtype=dtype, device="cuda")
    expected, ends = step.exact()
    used = [slot for slot in slots if slot >= 0]
    rounding = 2**0.5 if dtype == torch.float16 else 1.0  # once more, to bf16, as in `gpu_checks.types`
    for hint in (None, max(lengths, default=0)):
        for _ in range(2):  # the first step of a kind launches prefills and decodes apart
            out, pool = step.run("triton", hint)
            assert relative_rms(out, expected) <= LIMITS["out"] * rounding
            assert relative_rms(pool[used], ends[used]) <= LIMITS["final"] * rounding
            assert untouched(pool, used)
            assert (out[[n for n in range(decodes) if slots[n] < 0]] == 0).all()


@pytest.mark.parametrize("lengths", [(50, 20, 64), (700, 20, 64)])
def test_fifty_mixed_steps_in_a_graph_give_the_same_bits(lengths: tuple[int, ...]) -> None:
    slots = (4, -1, 0, 7, 3, 2)
    step = Mixed.make(3, lengths, slots, slopes=layer_slopes(40, 64), head_dim=128, dtype=torch.bfloat16, device="cuda")
    expected, ends = step.exact()
    pool = step.pool.clone()
    run = step.stepper(pool, "triton", max(lengths))
    run()  # compiles, which a capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    first: list[torch.Tensor] = []
    for _ in range(50):
        pool.copy_(step.pool)
        graph.replay()
        first = first or [out.clone(), pool.clone()]
        assert torch.equal(out, first[0]) and torch.equal(pool.nan_to_num(), first[1].nan_to_num())
    used = [slot for slot in slots if slot >= 0]
    assert relative_rms(out, expected) <= LIMITS["out"]
    assert relative_rms(pool[used], ends[used]) <= LIMITS["final"]
    assert untouched(pool, used)


def test_serving_under_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the compiler makes tensors of its own
    slopes = layer_slopes(40, 4)
    step = Mixed.make(2, (20,), (1, 0, 2), slopes=slopes, head_dim=128, dtype=torch.bfloat16, device="cuda")
    drafts = Verification.make(2, (1, 2, 0), (1, 0, 2), 2, slopes=slopes, head_dim=128, dtype=torch.bfloat16, device="cuda")
    pools = [step.pool.clone() for _ in range(2)]
    slots, offsets = torch.tensor(step.slots, device="cuda"), torch.tensor([2, 22], device="cuda")
    tokens, pending = (step.q, step.k, step.v, step.slopes), (drafts.pending_k, drafts.pending_v, drafts.accepted)

    def both(pool: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mixed = lightning_mixed(*tokens, pool, num_decodes=2, state_slots=slots, cu_seqlens=offsets, backend="triton")
        q, k, v = drafts.q * 1, drafts.k * 1, drafts.v * 1
        return mixed * 2, lightning_verify(q, k, v, drafts.slopes, pool, *pending, state_slots=slots, backend="triton")

    eager = both(pools[0])
    compiled = torch.compile(both, fullgraph=True)(pools[1])
    assert all(torch.equal(x, y) for x, y in zip(eager, compiled, strict=True))
    assert torch.equal(pools[0].nan_to_num(), pools[1].nan_to_num())


def decayed(state: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    """State [H, V, K] after tokens [T, H, D], in fp64, by one product a head."""
    length = len(k)
    age = torch.arange(length - 1, -1, -1, device=k.device, dtype=torch.float64)
    ends = []
    for head, rate in enumerate(slopes.double()):
        aged = v[:, head].double() * torch.exp(-rate * age)[:, None]
        ends.append(torch.exp(-rate * length) * state[head] + aged.T @ k[:, head].double())
    return torch.stack(ends)


@pytest.mark.slow
def test_four_million_tokens_in_constant_memory() -> None:
    """A prefill of 4,194,304 tokens in 32 calls, with the 8 heads of one of 8 tensor-parallel ranks."""
    slopes = torch.tensor([*layer_slopes(78, 8)[:7], 0.0], device="cuda")
    pool = torch.full((3, 8, 128, 128), torch.nan, device="cuda")
    pool[1] = 0
    slot = torch.tensor([1], device="cuda", dtype=torch.int32)
    state = torch.zeros(8, 128, 128, device="cuda", dtype=torch.float64)
    first: list[torch.Tensor] = []
    peaks = []
    tail = 128

    def piece(number: int) -> torch.Tensor:
        generator = torch.Generator(device="cuda").manual_seed(number)
        return torch.randn(CHUNK, 8, 384, generator=generator, device="cuda", dtype=torch.bfloat16).mul_(0.3)

    for number in range(CHUNKS):
        qkv = piece(number)
        q, k, v = qkv.chunk(3, dim=-1)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out, _ = lightning_attention(q, k, v, slopes, initial_state=pool, state_slots=slot, backend="triton")
        peaks.append(torch.cuda.max_memory_allocated() - before)
        if number < 2:
            first.append(out.clone())
        near = decayed(state, k[:-tail], v[:-tail], slopes)
        state = decayed(state, k, v, slopes)
        if number == CHUNKS - 1:
            exact, _ = recurrent(q[-tail:], k[-tail:], v[-tail:], slopes, near)
            assert relative_rms(out[-tail:], exact) <= LIMITS["out"]
        for head in range(8):
            assert relative_rms(pool[1, head], state[head]) <= LIMITS["final"], f"piece {number}, head {head}"
    assert pool[[0, 2]].isnan().all()
    assert max(peaks) == peaks[0]
    assert peaks[0] <= out.nbytes + 2**26  # the outputs, and states of the parts into which a call is cut

    q, k, v = torch.cat([piece(0), piece(1)]).chunk(3, dim=-1)
    whole, _ = lightning_attention(q, k, v, slopes, backend="triton")
    # Both are within LIMITS of the exact outputs.
    assert relative_rms(torch.cat(first), whole) <= 2 * LIMITS["out"]

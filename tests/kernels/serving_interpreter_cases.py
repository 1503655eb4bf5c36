"""The kernels of serving through Triton's interpreter; `test_serving.py` runs this file in a process with TRITON_INTERPRET=1."""

from __future__ import annotations

import math

import pytest
import torch
from triton import knobs

from posttrain.kernels.lightning import mixed as mixed_module
from posttrain.kernels.lightning import serving_registration
from tests.kernels.accuracy import relative_rms
from tests.kernels.serving_exact import Mixed, Result, Verification, poisoned_empty

assert knobs.runtime.interpret, "run with TRITON_INTERPRET=1"


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory from torch.empty holds NaN."""
    monkeypatch.setattr(torch, "empty", poisoned_empty())


def bound(tokens: int, head_dim: int, dtype: torch.dtype = torch.float32) -> float:
    """As in `interpreter_cases`: sums of `tokens` and of `head_dim` rounded products, and one rounding to the type."""
    last = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}[dtype]
    return 4 * math.sqrt((tokens + 1) * head_dim) * 2.0**-24 + last


def check(found: Result, exact: Result, slots: tuple[int, ...], out_bound: float, state_bound: float) -> None:
    """Outputs and states within their bounds, and every other slot as it was: NaN."""
    used = [slot for slot in slots if slot >= 0]
    assert relative_rms(found[0], exact[0]) <= out_bound
    assert relative_rms(found[1][used], exact[1][used]) <= state_bound
    assert found[1][[slot for slot in range(len(found[1])) if slot not in used]].isnan().all()


@pytest.mark.parametrize(
    ("drafts", "pending", "accepted", "slots", "dtype", "head_dim"),
    [
        (4, 3, (3, 1, 0, 9), (4, -1, 0, 2), torch.float32, 32),
        (8, 8, (8, 0), (1, 0), torch.float32, 128),
        (1, 1, (1, -3, 0), (0, 1, 2), torch.float16, 16),
        (2, 5, (4,), (3,), torch.bfloat16, 64),
        (0, 4, (4, 2), (0, -1), torch.float32, 16),
        (3, 0, (0, 0), (1, -1), torch.float32, 16),
        (2, 2, (), (), torch.float32, 16),
        (0, 0, (0,), (0,), torch.float32, 16),
    ],
)
def test_verification(
    drafts: int, pending: int, accepted: tuple[int, ...], slots: tuple[int, ...], dtype: torch.dtype, head_dim: int
) -> None:
    step = Verification.make(drafts, accepted, slots, pending, dtype=dtype, head_dim=head_dim)
    states = 4 * math.sqrt(1 + pending) * 2.0**-24
    check(step.run("triton"), step.exact(), slots, bound(drafts + pending, head_dim, dtype), states)


def test_verification_without_slots() -> None:
    step = Verification.make(2, (2, 1), (0, 1), 2, dtype=torch.float32)
    pool = step.pool[:2].clone()
    out, (expected, ends) = step.on(pool, "triton", slots=False), step.exact()
    assert relative_rms(out, expected) <= bound(4, 16)
    assert relative_rms(pool, ends[:2]) <= 8 * 2.0**-24


@pytest.mark.parametrize(
    ("decodes", "lengths", "slots", "dtype", "head_dim", "short"),
    [
        (3, (1, 0, 9), (4, -1, 0, 7, 3, -1), torch.float32, 32, 128),
        (0, (17, 31), (1, 0), torch.float32, 16, 128),
        (1, (63, 64, 65), (0, 2, -1, 1), torch.float32, 16, 128),
        (2, (40,), (0, 1, 2), torch.float16, 64, 128),
        (2, (128,), (0, 1, 2), torch.bfloat16, 16, 128),
        (4, (), (0, 3, -1, 1), torch.float32, 128, 128),
        (2, (65, 0, 3), (3, 1, 0, 4, -1), torch.float32, 16, 32),
        (0, (40,), (1,), torch.float32, 16, 32),
        (0, (), (), torch.float32, 16, 128),
    ],
)
def test_mixed_steps(
    monkeypatch: pytest.MonkeyPatch,
    decodes: int,
    lengths: tuple[int, ...],
    slots: tuple[int, ...],
    dtype: torch.dtype,
    head_dim: int,
    short: int,
) -> None:
    monkeypatch.setattr(mixed_module, "SHORT", short)
    step = Mixed.make(decodes, lengths, slots, dtype=dtype, head_dim=head_dim)
    longest = max(lengths, default=1)
    # The interpreter multiplies in fp32, so states take on no rounding to the type.
    check(step.run("triton"), step.exact(), slots, bound(longest, head_dim, dtype), bound(longest, head_dim))


@pytest.mark.parametrize("longest", [1, 16, 64, 4096])
def test_a_wrong_hint_of_the_length_changes_no_result(longest: int) -> None:
    step = Mixed.make(1, (39,), (1, 0), dtype=torch.float32)
    check(step.run("triton", longest), step.exact(), (1, 0), bound(39, 16), bound(39, 16))


def test_the_operators_are_what_their_schemas_say() -> None:
    tests = ("test_schema", "test_faketensor")
    step = Verification.make(2, (2, 2), (1, 0), 2, dtype=torch.float32)
    common = (step.slopes, step.pool[:2].clone())
    pending = (step.pending_k, step.pending_v, step.accepted)
    torch.library.opcheck(
        serving_registration.lightning_verify, (step.q, step.k, step.v, *common, *pending, step.slots), test_utils=tests
    )
    tokens = [x.flatten(0, 1) for x in (step.q, step.k, step.v)]
    mixed = (*tokens, *common, step.slots, torch.tensor([1, 4]), 1, 3)
    torch.library.opcheck(serving_registration.lightning_mixed, mixed, test_utils=tests)

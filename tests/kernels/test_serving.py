"""Verification of drafts and mixed steps on a CPU: the torch paths against the recurrence, and the kernels without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.config.errors import UserError
from posttrain.kernels.lightning.operator import lightning_decode
from posttrain.kernels.lightning.serving import MAX_DRAFTS, lightning_mixed, lightning_verify
from tests.kernels.serving_exact import Mixed, Result, Verification
from tests.kernels.test_lightning import exactly

ROOT = Path(__file__).resolve().parents[2]
CPU_BACKENDS = ("matmul", "torch")
COUNTS = st.lists(st.integers(-1, MAX_DRAFTS + 1), min_size=0, max_size=4)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def same(ours: Result, truth: Result) -> None:
    """Outputs and pools equal up to the roundings of fp64, untouched NaN included."""
    for mine, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-11, equal_nan=True)


@given(drafts=st.integers(0, MAX_DRAFTS), accepted=COUNTS, pending=st.integers(0, MAX_DRAFTS), seed=st.integers(0, 9))
def test_drafts_are_read_out_of_states_after_what_was_accepted(drafts: int, accepted: list[int], pending: int, seed: int) -> None:
    step = Verification.make(drafts, accepted, (5, -1, 0, 3)[: len(accepted)], pending, seed=seed)
    same(step.run("torch"), step.exact())


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_rounds_of_verification_give_what_decoding_gives(backend: str) -> None:
    """Three sequences that accept different numbers of drafts; what they keep is decoded token by token beside them."""
    generator = torch.Generator().manual_seed(0)
    slopes = torch.tensor([0.5, 0.0], dtype=torch.float64)
    pool = torch.randn(3, 2, 8, 8, generator=generator, dtype=torch.float64)
    decoded = pool.clone()
    pending_k, pending_v, count = None, None, None
    for _ in range(5):
        q, k, v = (torch.randn(3, 4, 2, 8, generator=generator, dtype=torch.float64) for _ in range(3))
        out = lightning_verify(q, k, v, slopes, pool, pending_k, pending_v, count, backend=backend)
        count = torch.randint(0, 5, (3,), generator=generator, dtype=torch.int32)
        for token in range(4):
            kept = torch.where(count > token, torch.arange(3), -1)
            expected = lightning_decode(q[:, token], k[:, token], v[:, token], slopes, decoded, state_slots=kept, backend=backend)
            exactly(out[:, token][kept >= 0], expected[kept >= 0])
        pending_k, pending_v = k, v
    none = q[:, :0]
    out = lightning_verify(none, none, none, slopes, pool, pending_k, pending_v, count, backend=backend)
    assert out.shape == (3, 0, 2, 8)
    exactly(pool, decoded)


def test_a_first_verification_leaves_the_pool_as_it_is() -> None:
    step = Verification.make(3, [0, 0], [1, 0], 0)
    pool = step.pool.clone()
    out = lightning_verify(step.q, step.k, step.v, step.slopes, pool, state_slots=step.slots)
    exactly(out, step.exact()[0])
    assert torch.equal(pool.nan_to_num(), step.pool.nan_to_num())


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    ("decodes", "lengths", "slots"),
    [
        (3, (1, 63, 0, 64, 65), (4, -1, 0, 7, -1, 3, 1, 2)),
        (2, (), (8, 0)),
        (0, (20, 50), (6, -1)),
        (0, (), ()),
    ],
)
def test_a_mixed_step_is_its_sequences_one_by_one(
    backend: str, decodes: int, lengths: tuple[int, ...], slots: tuple[int, ...]
) -> None:
    step = Mixed.make(decodes, lengths, slots)
    same(step.run(backend), step.exact())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 9, 2, 16), "k": torch.zeros(2, 9, 2, 16), "v": torch.zeros(2, 9, 2, 16)}, "R <= 8"),
        ({"k": torch.zeros(2, 3, 2, 8)}, "alike"),
        ({"k": torch.zeros(2, 3, 2, 16, dtype=torch.float64)}, "one floating type"),
        ({"accepted": None}, "go together"),
        ({"pending_k": torch.zeros(2, 2, 2, 8)}, r"must be \[2, R <= 8, 2, 16\] alike"),
        ({"pending_k": torch.zeros(2, 2, 2, 16).half(), "pending_v": torch.zeros(2, 2, 2, 16).half()}, "as v"),
        ({"accepted": torch.zeros(2)}, r"accepted must be int32 or int64 \[2\]"),
        ({"slopes": torch.zeros(3)}, r"slopes must be \[2\]"),
        ({"pool": torch.zeros(4, 2, 16, 16, dtype=torch.float64)}, "the pool must be torch.float32"),
        ({"pool": torch.zeros(4, 2, 16, 16).transpose(2, 3)}, "contiguous"),
        ({"state_slots": torch.tensor([0, 1, 2])}, r"state_slots must be int32 or int64 \[2\]"),
        ({"state_slots": None}, r"the pool must be torch.float32 \[2, 2, 16, 16\]"),
        ({"q": torch.zeros(2, 3, 2, 16, requires_grad=True)}, "no_grad"),
    ],
)
def test_verifications_that_do_not_fit_are_refused(change: dict[str, torch.Tensor | None], message: str) -> None:
    step = Verification.make(3, [1, 2], [1, 0], 2, dtype=torch.float32)
    arguments: dict[str, torch.Tensor | None] = {"q": step.q, "k": step.k, "v": step.v, "slopes": step.slopes, "pool": step.pool}
    arguments |= {"pending_k": step.pending_k, "pending_v": step.pending_v, "accepted": step.accepted, "state_slots": step.slots}
    with pytest.raises(ValueError, match=message):
        lightning_verify(**{**arguments, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_decodes": 8}, "7 tokens are not those of 8 decodes"),
        ({"cu_seqlens": None}, "7 tokens are not those of 2 decodes"),
        ({"cu_seqlens": torch.tensor([2.0, 7.0])}, "int32 or int64"),
        ({"max_length": -1}, "max_length"),
        ({"state_slots": torch.tensor([0, 1])}, r"state_slots must be int32 or int64 \[3\]"),
        ({"v": torch.zeros(7, 2, 4, dtype=torch.float64)}, "alike"),
    ],
)
def test_steps_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    step = Mixed.make(2, (5,), (0, 1, 2))
    arguments = {"q": step.q, "k": step.k, "v": step.v, "slopes": step.slopes, "pool": step.pool, "num_decodes": 2}
    arguments |= {"cu_seqlens": torch.tensor([2, 7]), "state_slots": torch.tensor([0, 1, 2])}
    with pytest.raises(ValueError, match=message):
        lightning_mixed(**{**arguments, **change})  # type: ignore[arg-type]


def test_an_explicit_backend_that_cannot_run_is_refused() -> None:
    with pytest.raises(UserError, match="'triton' cannot run"):
        Verification.make(1, [0], [0], 1).run("triton")
    with pytest.raises(UserError, match="'triton' cannot run"):
        Mixed.make(1, (), (0,)).run("triton")


def run(interpret: bool, *command: str) -> str:
    """Standard output of Python in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
    return done.stdout


@needs_triton
@pytest.mark.slow
def test_the_kernels_through_the_interpreter() -> None:
    options = ("-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly")
    run(True, "-m", "pytest", *options, "tests/kernels/serving_interpreter_cases.py")


@needs_triton
@pytest.mark.slow
def test_the_kernels_compile_for_hopper_without_spills() -> None:
    for name, figures in json.loads(run(False, "-m", "tests.kernels.serving_gate", "2")).items():
        assert figures["stack"] == 0, f"{name} spills: {figures}"
        assert figures["registers"] <= figures["register_limit"], f"{name} leaves room for too few programs: {figures}"
        if name.startswith("mixed"):
            assert figures["wgmma"] > 0, f"{name} multiplies by another path: {figures}"
        if name.startswith("verification"):
            assert figures["mma_sync"] > 0, f"{name} multiplies without tensor cores: {figures}"

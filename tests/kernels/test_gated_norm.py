"""RMSNorm with the gate on a CPU: torch's path against its formula, what is refused, and the kernels without a GPU."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
import torch.nn.functional as F

from posttrain.config.errors import UserError
from posttrain.kernels.lightning.gated_norm import gated_rms_norm
from tests.kernels.ends_exact import EPS, exact_gated_norm, norm_errors, norm_inputs, norm_results
from tests.kernels.test_triton import run

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 8), (63, 7), (64, 8), (65, 100)])
def test_torch_path_and_its_gradients_in_fp64(rows: int, width: int) -> None:
    inputs = norm_inputs(rows, width, torch.float64)
    truth = norm_results(exact_gated_norm, inputs)
    for name, found in norm_results(gated_rms_norm, inputs).items():
        torch.testing.assert_close(found, truth[name], rtol=1e-10, atol=1e-12)


# Half a last place for every rounding in the chain (normalised row, weight, sigmoid, result), as many again in the gradients.
@pytest.mark.parametrize(("dtype", "last"), [(torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-9)])
def test_torch_path_in_narrower_types(dtype: torch.dtype, last: float) -> None:
    found = norm_errors(norm_inputs(65, 100, dtype), "torch")
    assert all(error <= 8 * last for error in found.values()), found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_path_is_the_chain_of_torchs_functions(dtype: torch.dtype) -> None:
    x, gate, weight, _ = norm_inputs(33, 64, dtype)
    if dtype == torch.float32:
        normal = F.rms_norm(x, (64,), weight, EPS)
    else:
        normal = F.rms_norm(x.float(), (64,), None, EPS).to(dtype) * weight
    assert torch.equal(gated_rms_norm(x, gate, weight, EPS), torch.sigmoid(gate) * normal)


def test_the_result_has_the_type_that_x_and_gate_promote_to() -> None:
    x, gate, weight, _ = norm_inputs(3, 8, torch.bfloat16, weight_dtype=torch.float32)
    assert gated_rms_norm(x, gate, weight, EPS).dtype == torch.bfloat16
    assert gated_rms_norm(x, gate.float(), weight, EPS).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": torch.zeros(3, 5)}, r"\[T, W\], weight \[W\]"),
        ({"weight": torch.zeros(3)}, r"\[T, W\], weight \[W\]"),
        ({"x": torch.zeros(3, 2, 2), "gate": torch.zeros(3, 2, 2)}, r"\[T, W\], weight \[W\]"),
        ({"gate": torch.zeros(3, 4, dtype=torch.int64)}, "must be floating and on one device"),
        ({"gate": torch.zeros(3, 4, device="meta")}, "must be floating and on one device"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    arguments = {"x": torch.zeros(3, 4), "gate": torch.zeros(3, 4), "weight": torch.ones(4), **change}
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(arguments["x"], arguments["gate"], arguments["weight"], EPS)


def test_a_backend_that_cannot_run_is_refused() -> None:
    x, gate, weight, _ = norm_inputs(3, 8, torch.float32)
    with pytest.raises(UserError, match="'triton' cannot run: (Triton is not installed|the tensors are on cpu, not on a GPU)"):
        gated_rms_norm(x, gate, weight, EPS, backend="triton")
    with pytest.raises(UserError, match="unknown gated norm backend 'matmul'; write one of auto, triton, torch"):
        gated_rms_norm(x, gate, weight, EPS, backend="matmul")


@needs_triton
@pytest.mark.slow
def test_the_kernels_of_the_ends_through_the_interpreter() -> None:
    options = ("-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly")
    done = run(True, "-m", "pytest", *options, "tests/kernels/ends_interpreter_cases.py")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@needs_triton
@pytest.mark.slow
def test_the_kernels_of_the_ends_compile_for_hopper_without_spills_or_narrow_accesses() -> None:
    done = run(False, "-m", "tests.kernels.ends_gate")
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    for name, figures in found.items():
        assert figures["stack"] == 0, f"{name} spills {figures['stack']} bytes of registers: {figures}"
        assert figures["wide"] > 0 and figures["narrow"] == 0, f"{name} reads or writes less than 16 bytes at once: {figures}"
        assert (figures["async_copies_16"] > 0) == ("norm backward" in name), f"{name} is not read ahead: {figures}"

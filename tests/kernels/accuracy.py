"""One case of lightning attention, run by the Triton kernels and in fp64; used by tests, and runnable without pytest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from posttrain.kernels.lightning.chunked import lightning_attention as chunked_attention
from posttrain.kernels.lightning.launch import Documents, Tile, backward, forward

LENGTHS = (0, 1, 2, 63, 64, 65, 0, 127, 0)
"""Packed documents on all sides of a chunk, with empty ones before, among and behind them."""


def layer_slopes(layer: int | None, heads: int) -> list[float]:
    """Rates of a layer of 80 with 64 heads, `heads` of them evenly from the fastest to the slowest; zeros for None."""
    if layer is None:
        return [0.0] * heads
    rates = [2.0 ** (-(h + 1) / 8) * (1 - layer / 79 + 1e-5) for h in range(64)]
    return [rates[round(i * 63 / max(heads - 1, 1))] for i in range(heads)]


@dataclass(frozen=True)
class Case:
    """Inputs and how to run them.

    Attributes:
        lengths: tokens of the documents, read as packed offsets where `packed`, else all equal.
        states: documents begin with random states, and the gradient of the final states is random.
        setting, per_part: passed to the launch.
    """

    lengths: Sequence[int]
    slopes: Sequence[float]
    dtype: torch.dtype = torch.float32
    head_dim: int = 16
    packed: bool = True
    states: bool = False
    setting: Tile | None = None
    per_part: int | None = None
    device: str = "cpu"
    seed: int = 0
    spread: float = 0.3
    made: dict[str, torch.Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, torch.Tensor]:
        """qkv [T, H, 3 D] interleaved, do, initial and final_grad; the same at every call."""
        if not self.made:
            generator = torch.Generator(device=self.device).manual_seed(self.seed)

            def normal(*shape: int) -> torch.Tensor:
                return torch.randn(*shape, generator=generator, device=self.device)

            total, heads, d = sum(self.lengths), len(self.slopes), self.head_dim
            self.made.update(
                qkv=(normal(total, heads, 3 * d) * self.spread).to(self.dtype),
                do=normal(total, heads, d).to(self.dtype),
                initial=normal(len(self.lengths), heads, d, d),
                final_grad=normal(len(self.lengths), heads, d, d),
                slopes=torch.tensor(list(self.slopes), device=self.device),
            )
        return self.made

    def documents(self) -> Documents:
        """As the launch takes them; an equal length is not read from offsets."""
        if not self.packed:
            return Documents(len(self.lengths), self.lengths[0])
        offsets = torch.tensor([0, *self.lengths]).cumsum(0).to(self.device, torch.int32)
        return Documents(len(self.lengths), 0, offsets)


def run_triton(case: Case) -> dict[str, torch.Tensor]:
    """Output, final state and gradients; everything the kernels write to is NaN before."""
    data = case.tensors()
    q, k, v = data["qkv"].chunk(3, dim=-1)
    documents = case.documents()
    initial, final_grad = (data["initial"], data["final_grad"]) if case.states else (None, None)
    final = torch.full_like(data["initial"], torch.nan)
    options = {"setting": case.setting, "per_part": case.per_part}
    out = _poisoned(lambda: forward(q, k, v, data["slopes"], documents, initial=initial, final=final, **options))  # type: ignore[arg-type]
    grad = torch.full_like(data["qkv"], torch.nan)
    initial_grad = torch.full_like(final, torch.nan) if case.states else None
    dq, dk, dv = grad.chunk(3, dim=-1)
    ends = {"initial": initial, "final_grad": final_grad, "initial_grad": initial_grad}
    backward(q, k, v, data["slopes"], documents, data["do"], (dq, dk, dv), **ends, **options)  # type: ignore[arg-type]
    found = {"out": out, "final": final, "dq": dq, "dk": dk, "dv": dv}
    return found if initial_grad is None else {**found, "initial_grad": initial_grad}


def run_exact(case: Case) -> dict[str, torch.Tensor]:
    """The same in fp64 by the chunked path, which its own tests hold against the recurrence to 1e-11."""
    data = case.tensors()
    q, k, v = (x.double().requires_grad_() for x in data["qkv"].chunk(3, dim=-1))
    leaves = [q, k, v]
    initial = data["initial"].double().requires_grad_() if case.states else None
    out, final = chunked_attention(
        *(q, k, v, data["slopes"].double()), lengths=list(case.lengths), initial_state=initial, output_final_state=True
    )
    assert final is not None
    loss = (out * data["do"].double()).sum()
    if initial is not None:
        loss = loss + (final * data["final_grad"].double()).sum()
        leaves.append(initial)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    names = ("dq", "dk", "dv", "initial_grad")
    return {"out": out.detach(), "final": final.detach(), **dict(zip(names, grads, strict=False))}


def relative_rms(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm of the difference over the norm of the truth; for a truth of zeros (or of no numbers) the norm itself. NaN stays."""
    size = float(truth.double().norm())
    error = float((found.double() - truth.double()).norm())
    return error / size if size > 0 else error


def errors(case: Case) -> dict[str, float]:
    """Relative RMS error of everything that the kernels compute."""
    found, truth = run_triton(case), run_exact(case)
    return {name: relative_rms(x, truth[name]) for name, x in found.items()}


def _poisoned(run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """`run` with every torch.empty filled with NaN."""
    real = torch.empty

    def poison(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = real(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    torch.empty = poison
    try:
        return run()
    finally:
        torch.empty = real

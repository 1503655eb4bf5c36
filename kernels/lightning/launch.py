"""Host side of the Triton kernels: what to launch for given shapes. Reads shapes and strides only, never the device."""

from __future__ import annotations

import contextvars
import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from posttrain.kernels.lightning.walk import part_kernel, store_states_kernel, walk_kernel

HEAD_DIMS = (16, 32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INTERPRETED = not isinstance(walk_kernel, triton.JITFunction)
"""Kernels run through Triton's interpreter (TRITON_INTERPRET=1 when Triton was imported): on CPU tensors, slowly."""
MIN_PART_CHUNKS = 4
"""A part shorter than this costs more in its pre-pass and launch than it saves."""
MAX_CUT_DOCUMENTS = 4096
"""More packed documents than this are not cut: they fill a chip as they are, and every program would search them all."""


@dataclass(frozen=True)
class Tile:
    """How one kernel is compiled: rows of a chunk, columns of the output a program makes, warps, pipeline stages.

    `scores_first` lets a walk update its state beside other work, for some more registers; not where it ends in a state.
    """

    chunk: int
    block: int
    warps: int
    stages: int
    scores_first: bool = False


WIDE = Tile(chunk=64, block=128, warps=8, stages=3)
NARROW = Tile(chunk=64, block=64, warps=4, stages=4, scores_first=True)
PART = Tile(chunk=64, block=64, warps=4, stages=6)
"""For the pre-pass of either: a chunk there is one short product, which takes a deep pipeline."""


@dataclass(frozen=True)
class Documents:
    """Where the documents of a flat token axis lie.

    Attributes:
        count: documents, N.
        length: tokens of each, where `cu_seqlens` is None.
        cu_seqlens: offsets [N + 1], int32 or int64, on the device of the tokens.
    """

    count: int
    length: int
    cu_seqlens: torch.Tensor | None = None


def tile(dtype: torch.dtype, head_dim: int, walks: int, processors: int) -> Tile:
    """The configuration for a type, a head size and a number of walks (documents times heads): the table of what was measured.

    Where walks fill the chip twice, a program makes whole rows of the output with eight warps and reads everything once;
    otherwise half rows with four, so that 64 heads are 128 programs. fp32 is computed without tensor cores, in exact fp32
    products, where small chunks do least.
    """
    if dtype == torch.float32:
        return Tile(chunk=32, block=min(head_dim, 32), warps=4, stages=2)
    if head_dim == 128 and walks >= 2 * processors:
        return WIDE
    return replace(NARROW, block=min(head_dim, NARROW.block))


@functools.lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def silu_on_load(v: torch.Tensor, documents: Documents) -> bool:
    """Whether `forward` with `silu` is faster than a pass before it: where programs make whole rows, so that it is done once.

    Half rows do it twice for queries and keys, which takes about as long as the pass.
    """
    return tile(v.dtype, v.shape[2], documents.count * v.shape[1], _processors(v.device)) == WIDE


def chunks_per_part(tokens: int, documents: Documents, heads: int, head_dim: int, setting: Tile, processors: int) -> int | None:
    """Chunks of one part when documents are cut over time to fill the chip, or None when heads alone fill it.

    Lengths on the device are not read: packed documents are cut by the length of the whole, so that one long document among
    short ones is cut too.
    """
    if documents.cu_seqlens is not None and documents.count > MAX_CUT_DOCUMENTS:
        return None
    wanted = processors // (heads * (head_dim // min(setting.block, NARROW.block)))
    if documents.cu_seqlens is None:
        wanted //= max(documents.count, 1)
        tokens = documents.length
    chunks = triton.cdiv(tokens, setting.chunk)
    wanted = min(wanted, chunks // MIN_PART_CHUNKS)
    return triton.cdiv(chunks, wanted) if wanted > 1 else None


def _items(tokens: int, documents: Documents, per_part: int | None, setting: Tile) -> int:
    """Items of work: documents, or at least as many as there can be parts."""
    if per_part is None:
        return documents.count
    if documents.cu_seqlens is None:
        return documents.count * max(1, triton.cdiv(triton.cdiv(documents.length, setting.chunk), per_part))
    return documents.count + tokens // (per_part * setting.chunk)


def _operands(dtype: torch.dtype) -> tuple[tl.dtype, tl.dtype, str]:
    """Types of the operands of the first product and of the others, and the precision of fp32 products.

    States and decayed scores of fp16 inputs can pass 65,504, so they become bf16. The interpreter cannot multiply bf16.
    """
    if dtype == torch.float32 or INTERPRETED:
        return tl.float32, tl.float32, "ieee"
    return (tl.float16 if dtype == torch.float16 else tl.bfloat16), tl.bfloat16, "tf32"


def _ready(x: torch.Tensor) -> torch.Tensor:
    """As it lies where its rows are dense, apart, and aligned for descriptors, in a way that Triton can see, else a copy."""
    aligned = x.stride(2) == 1 and x.stride(0) % 16 == 0 and x.stride(1) % 16 == 0 and x.data_ptr() % 16 == 0
    return x if aligned and x.stride(0) > 0 else x.clone(memory_format=torch.contiguous_format)


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Where the programs of a launch put their descriptors, 128 bytes each; torch aligns to 512 and frees in stream order."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _run(kernel: Any, programs: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launches with `_scratch` for Triton's allocator, in a context of its own: a caller's allocator is left as it was."""
    context = contextvars.copy_context()
    context.run(triton.set_allocator, _scratch)
    context.run(kernel[programs], *args, **options)


def _strides(*tensors: torch.Tensor | None) -> list[int]:
    """Strides of tokens and heads of each tensor."""
    return [size for x in tensors for size in ((0, 0) if x is None else (x.stride(0), x.stride(1)))]


_Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
"""q, k, v and, backward, do."""


class _Rest(NamedTuple):
    """Arguments that both kernels take between tensors and parts, in their order."""

    slopes: torch.Tensor
    cu_seqlens: torch.Tensor | None
    slots: torch.Tensor | None
    initial: torch.Tensor | None
    final_grad: torch.Tensor | None


@dataclass(frozen=True)
class _Plan:
    """What both directions decide alike for one call."""

    setting: Tile
    per_part: int | None
    items: int
    heads: int
    head_dim: int
    documents: Documents

    @classmethod
    def make(cls, v: torch.Tensor, documents: Documents, setting: Tile | None, per_part: int | None) -> _Plan:
        tokens, heads, head_dim = v.shape
        processors = _processors(v.device)
        chosen = setting or tile(v.dtype, head_dim, documents.count * heads, processors)
        if per_part is None:
            per_part = chunks_per_part(tokens, documents, heads, head_dim, chosen, processors)
        return cls(chosen, per_part, _items(tokens, documents, per_part, chosen), heads, head_dim, documents)

    def add_up(self, tensors: _Inputs, rest: _Rest, backward: bool, silu: bool) -> torch.Tensor | None:
        """The states that parts of documents add, fp32 [sides, items, H, D, D], or None where documents are not cut."""
        if self.per_part is None:
            return None
        sides, size, device = 1 + backward, self.head_dim, tensors[0].device
        parts = torch.empty(sides, self.items, self.heads, size, size, dtype=torch.float32, device=device)
        options = self._options(self._part_setting(), tensors[0].dtype, backward, rest, silu)
        arguments = (*tensors, *rest, parts, *_strides(*tensors))
        _run(part_kernel, self._programs(self._part_setting(), sides), *arguments, *self._sizes(), **options)
        return parts

    def walk(
        self,
        tensors: _Inputs,
        results: tuple[torch.Tensor | None, ...],
        rest: _Rest,
        parts: torch.Tensor | None,
        final: torch.Tensor | None,
        backward: bool,
        silu: bool = False,
    ) -> None:
        """Writes `results`, (out, None, None, None) or (None, dq, dk, dv), and `final`."""
        score, _, _ = _operands(tensors[0].dtype)
        arguments = (*tensors, *results, *rest, parts, final, *_strides(*tensors, *results))
        options = self._options(self.setting, tensors[0].dtype, backward, rest, silu)
        own = {
            "SPLIT": parts is not None,
            "FINAL": final is not None,
            "SCORE": score,
            "SCORES_FIRST": silu or (self.setting.scores_first and final is None),
        }
        _run(walk_kernel, self._programs(self.setting, 3 if backward else 1), *arguments, *self._sizes(), **own, **options)

    def _part_setting(self) -> Tile:
        """PART, or the setting itself where that has other chunks."""
        return replace(PART, block=min(self.setting.block, PART.block)) if self.setting.chunk == PART.chunk else self.setting

    def _sizes(self) -> list[int]:
        """Arguments heads .. items of the kernels."""
        return [self.heads, self.documents.count, self.documents.length, self.per_part or 0, self.items]

    def _programs(self, setting: Tile, roles: int) -> tuple[int]:
        return (self.items * self.heads * (self.head_dim // setting.block) * roles,)

    def _options(self, setting: Tile, dtype: torch.dtype, backward: bool, rest: _Rest, silu: bool) -> dict[str, object]:
        """Compile-time arguments that both kernels share."""
        _, operand, precision = _operands(dtype)
        return {
            "D": self.head_dim,
            "BLOCK": setting.block,
            "CHUNK": setting.chunk,
            "STAGES": setting.stages,
            "BACKWARD": backward,
            "PACKED": self.documents.cu_seqlens is not None,
            "WIDTH": 2 if self.per_part is None else triton.next_power_of_2(max(self.documents.count, 2)),
            "BOUND": rest.initial is not None,
            "SLOTS": rest.slots is not None,
            "SILU": silu,
            "OPERAND": operand,
            "PRECISION": precision,
            "num_warps": setting.warps,
        }


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    documents: Documents,
    *,
    initial: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    final: torch.Tensor | None = None,
    setting: Tile | None = None,
    per_part: int | None = None,
    silu: bool = False,
) -> torch.Tensor:
    """Outputs [T, H, D]; writes the states after the documents to `final`.

    Args:
        q, k, v: [T, H, D] of one type out of DTYPES, any strides of tokens and heads.
        slopes: fp32 [H], contiguous.
        initial: fp32 [N, H, D, D] contiguous, or None for zeros. With `slots` a pool [S, H, D, D].
        slots: place of each document in `initial` and `final`, int32 or int64 [N]; -1 begins with zeros and is not kept.
        final: fp32, as `initial`; may be the same tensor where `slots` is given.
        setting, per_part: instead of what `tile` and `chunks_per_part` choose.
        silu: attention is over SiLU of q, k and v, computed in fp32 and rounded to their type as a pass before would.
    """
    if silu and final is not None:  # together they take more registers than there are
        q, k, v, silu = F.silu(q), F.silu(k), F.silu(v), False
    q, k, v = _ready(q), _ready(k), _ready(v)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    plan = _Plan.make(v, documents, setting, per_part)
    if not plan.items or not plan.heads:
        return out
    tensors = (q, k, v, None)
    rest = _Rest(slopes, documents.cu_seqlens, slots, initial, None)
    parts = plan.add_up(tensors, rest, False, silu)
    target = final
    # Parts of one document run side by side: the last may not overwrite a state that the first still has to read.
    if parts is not None and slots is not None and final is not None:
        target = torch.empty(documents.count, *final.shape[1:], dtype=torch.float32, device=v.device)
        if initial is not None:
            initial = torch.where((slots >= 0)[:, None, None, None], initial[slots.clamp(min=0).long()], 0.0)
        rest = rest._replace(slots=None, initial=initial)
    plan.walk(tensors, (out, None, None, None), rest, parts, target, False, silu)
    if target is not None and target is not final:
        size = plan.heads * plan.head_dim**2
        store_states_kernel[(documents.count, triton.cdiv(size, 4096))](target, slots, final, size, BLOCK=4096)
    return out


def backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    documents: Documents,
    do: torch.Tensor,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    initial: torch.Tensor | None = None,
    final_grad: torch.Tensor | None = None,
    initial_grad: torch.Tensor | None = None,
    setting: Tile | None = None,
    per_part: int | None = None,
) -> None:
    """Writes the gradients of q, k and v into `grads`, and of the initial state into `initial_grad`.

    Args:
        q, k, v, slopes, documents, initial: as given to `forward`.
        do: gradient of the outputs [T, H, D].
        grads: dq, dk, dv [T, H, D] in the type of v, dense along D.
        final_grad: gradient of the final states, fp32 [N, H, D, D] contiguous, or None for zeros.
        initial_grad: fp32 [N, H, D, D] contiguous, or None.
        setting, per_part: instead of what `tile` and `chunks_per_part` choose.
    """
    q, k, v, do = _ready(q), _ready(k), _ready(v), _ready(do.to(v.dtype))
    plan = _Plan.make(v, documents, setting, per_part)
    if not plan.items or not plan.heads:
        return
    bound = initial is not None or final_grad is not None
    if bound:  # one flag for both ends of a document: the kernel reads both
        some = initial if initial is not None else final_grad
        initial = initial if initial is not None else torch.zeros_like(some)  # type: ignore[arg-type]
        final_grad = final_grad if final_grad is not None else torch.zeros_like(some)  # type: ignore[arg-type]
    tensors = (q, k, v, do)
    rest = _Rest(slopes, documents.cu_seqlens, None, initial, final_grad)
    parts = plan.add_up(tensors, rest, True, False)
    plan.walk(tensors, (None, *grads), rest, parts, initial_grad, True)

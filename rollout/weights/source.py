"""Weights of a trainer's model, layer by layer, be the model whole or sharded by ZeRO-3."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from posttrain.model.checkpoint_files import Checkpoint
from posttrain.model.loading import DTYPES, bytes_of
from posttrain.model.naming import Piece, Scheme, pieces
from posttrain.model.tensor_files import RangeReader

_LAYER = re.compile(r"^model\.layers\.\d+\.")


class ModelSource:
    """A `WeightSource` over the model as it is: nothing is copied that need not be.

    Under ZeRO-3 the parameters of one group are gathered at a time, on every rank; so every rank goes through all groups, those
    that send to no engine with `walk`. Weights are those that the forward pass reads: under ZeRO with bf16 that includes router
    gates, whose fp32 master copies lie with the optimizer.

    A group's tensors are valid until the next group is asked for.
    """

    def __init__(self, model: nn.Module, version: int, scheme: Scheme = "posttrain") -> None:
        """Look at a model.

        Args:
            model: or the wrapper that a trainer put around it (DeepSpeed, data parallel). Its weights must not change while
                groups are read.
            version: of the weights as they are.
            scheme: names to send under, see `naming.pieces`.
        """
        self.version = version
        self._scheme = scheme
        self._model: nn.Module = model
        while isinstance(getattr(self._model, "module", None), nn.Module):
            self._model = self._model.module  # type: ignore[assignment]

    def groups(self) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """Yield one list a layer, see `WeightSource.groups`."""
        tensors: dict[str, Any] = {**self._model.state_dict(), **dict(self._model.named_parameters())}
        for names in group_names(list(tensors)):
            own = {name: tensors[name] for name in names}
            shapes = {name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in own.items()}
            with _gathered(list(own.values())), torch.no_grad():
                flat = {name: tensor.detach().contiguous().view(-1) for name, tensor in own.items()}
                yield [(piece.name, _cut(flat[piece.target], piece)) for piece in pieces(shapes, self._scheme)]

    def walk(self) -> None:
        """Take part in the gathers of a rank that sends."""
        for _ in self.groups():
            pass


class CheckpointSource:
    """A `WeightSource` over a checkpoint folder of any kind, under the names of its files; one layer at a time is in memory."""

    def __init__(self, folder: Path | str, version: int) -> None:
        """Look at a folder. UserError where its files are missing or damaged."""
        self.version = version
        self._tensors = Checkpoint(folder).tensors

    def groups(self) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """Yield one list a layer, see `WeightSource.groups`."""
        with RangeReader() as reader:
            for names in group_names(list(self._tensors)):
                yield [(name, self._read(name, reader)) for name in names]

    def _read(self, name: str, reader: RangeReader) -> torch.Tensor:
        stored = self._tensors[name]
        tensor = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
        reader.read_into(stored, 0, bytes_of(tensor))
        return tensor


def group_names(names: Sequence[str]) -> list[list[str]]:
    """Names of our tensors, those of a layer together; embedding, last norm and head are groups of their own."""
    groups: dict[str, list[str]] = {}
    for name in names:
        layer = _LAYER.match(name)
        groups.setdefault(layer.group() if layer else name, []).append(name)
    return list(groups.values())


def _cut(flat: torch.Tensor, piece: Piece) -> torch.Tensor:
    count = 1
    for size in piece.shape:
        count *= size
    return flat[piece.start : piece.start + count].view(piece.shape)


def _gathered(tensors: Sequence[Any]) -> AbstractContextManager[Any]:
    """A context in which parameters that ZeRO-3 has partitioned are whole."""
    sharded = [tensor for tensor in tensors if hasattr(tensor, "ds_tensor")]
    if not sharded:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(sharded)

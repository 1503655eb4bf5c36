"""Loading straight onto ranks: each reads what it will hold, and no rank ever holds the whole model. Imports no DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from posttrain.model.checkpoint_files import Checkpoint, Source
from posttrain.model.loading import fill_range
from posttrain.model.tensor_files import RangeReader


@torch.no_grad()
def load_partitioned(model: nn.Module, folder: Path | str) -> int:
    """Fill a model from a checkpoint folder of any kind, reading only this rank's share. Call on every rank.

    Under `deepspeed.zero.Init` a parameter is flattened, padded and cut into equal runs, one for each rank: `param.ds_tensor`
    holds this rank's, and the bytes of this run alone are read. Parameters that are whole, as under plain data parallelism, are
    read whole. Call before `deepspeed.initialize`, which copies the weights into its fp32 master weights. No rank waits for
    another, so an error of one is not seen by the rest.

    Args:
        model: constructed under `deepspeed.zero.Init`, or plainly.
        folder: a checkpoint.

    Returns:
        bytes of tensor data that this rank read.

    Raises:
        UserError: a missing, extra or misshapen tensor, or a damaged file; nothing is changed then.
        ValueError: a parameter is gathered, quantised, offloaded to NVMe or kept in a second partition (hpZ): its partition
            is not what a forward pass reads.
    """
    parameters = dict(model.named_parameters())
    tensors: dict[str, torch.Tensor] = {**model.state_dict(), **parameters}
    for name, parameter in parameters.items():
        _check_partition(name, parameter)
    sources = Checkpoint(folder).sources({name: tuple(_shape(tensor)) for name, tensor in tensors.items()})
    with RangeReader() as reader:
        for name, tensor in tensors.items():
            if hasattr(tensor, "ds_tensor"):
                _fill_partition(tensor, sources[name], reader)
            else:
                fill_range(tensor, sources[name], 0, reader)
        return reader.bytes_read


def _shape(tensor: Any) -> torch.Size:
    return getattr(tensor, "ds_shape", tensor.shape)


def _check_partition(name: str, parameter: Any) -> None:
    if not hasattr(parameter, "ds_tensor"):
        return
    own = parameter.ds_tensor
    if parameter.ds_status.name != "NOT_AVAILABLE":
        raise ValueError(f"{name} is gathered; load before it is used")
    if own.final_location is not None:
        raise ValueError(f"{name} lies on NVMe; loading into partitions there is not supported")
    if getattr(parameter, "ds_secondary_tensor", None) is not None:
        raise ValueError(f"{name} has a second partition (zero_hpz_partition_size); load with it set to 1")
    if hasattr(own, "ds_quant_scale"):
        raise ValueError(f"{name} is quantised (zero_quantized_nontrainable_weights); load without")


def _fill_partition(parameter: Any, source: Source, reader: RangeReader) -> None:
    own = parameter.ds_tensor
    start = min(parameter.ds_zero_partition_rank * own.ds_numel, source.numel)
    real = min(own.ds_numel, source.numel - start)
    fill_range(own[:real], source, start, reader)
    own[real:].zero_()

"""Weights from GPU to GPU, the trainer's side: each group is sent as it is gathered, with checksums computed on the GPU.

Written for vLLM 0.26; the transports were never run. Facts used: see `device_transfer`; PyNcclCommunicator's broadcast is queued
on a stream and does not wait for the others.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch

from posttrain.config.errors import UserError
from posttrain.model.loading import entry_of
from posttrain.rollout.types import WeightSource
from posttrain.rollout.vllm.updates import Driven, VLLMWeights
from posttrain.rollout.weights.checksums import checksum
from posttrain.rollout.weights.manifest import Manifest, TensorRecord
from posttrain.rollout.weights.sink import EngineUnusable
from posttrain.rollout.weights.store import StoredWeights

Group = Sequence[tuple[str, torch.Tensor]]
Call = Callable[..., int]
"""A call of all workers: method and arguments; gives their number, WeightsRefused or EngineUnusable."""


class Link(Protocol):
    """A way from this process's GPU to the workers'."""

    def connect(self, call: Call) -> None:
        """Meet the workers; once, before the first group."""
        ...

    def send(self, call: Call, group: Group) -> None:
        """Give a group to every worker; its memory may be used again afterwards."""
        ...


class DeviceWeights(VLLMWeights):
    """A `VLLMWeights` that sends over a link, and still takes `StoredWeights` from their folder.

    Sent weights lie nowhere but in the trainer and in the engine. So refused ones leave the old weights serving, but after a
    first update an error in the middle of the model's reload, when everything was verified, is an EngineUnusable.
    """

    def __init__(self, engine: Driven, link: Link, **options: Any) -> None:
        """Wrap a running engine that was started with the backend of the link; options as in `VLLMWeights`."""
        super().__init__(engine, **options)
        self._link: Link = link
        self._connected = False

    def update(self, source: WeightSource) -> None:
        """Take over new weights, see `VLLMWeights.update`. Under ZeRO-3 the source is read to its end whatever happens."""
        if isinstance(source, StoredWeights):
            super().update(source)
            return
        groups = iter(source.groups())
        records: list[TensorRecord] = []
        try:
            self._check()
            if not self._connected:
                self._link.connect(self._call)
                self._connected = True
            self._call("posttrain_discard")
            for group in groups:
                for name, tensor in group:
                    entry = entry_of(name, tensor)
                    records.append(TensorRecord(name, entry.dtype, entry.shape, checksum(tensor, "sum64")))
                self._link.send(self._call, group)
            self._call("posttrain_check", Manifest(source.version, "sum64", tuple(records)).to_json())
        except BaseException:
            for _ in groups:
                pass
            if self.usable:
                self.discard()
            raise
        self._swap(source.version, None)


class IPCLink:
    """Memory of this process, opened by workers on the same GPU; needs no connection."""

    def connect(self, call: Call) -> None:
        """See `Link.connect`. UserError without a GPU."""
        _need_gpu("IPC")
        call("posttrain_connect", {})

    def send(self, call: Call, group: Group) -> None:
        """See `Link.send`."""
        torch.cuda.current_stream().synchronize()  # a gather may still be writing
        tensors = [tensor.detach().contiguous() for _, tensor in group]  # kept until the workers have copied them
        gpu = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        call("posttrain_receive", {**_described(group), "gpu": gpu, "handles": [handle_of(tensor) for tensor in tensors]})


class NCCLLink:
    """A broadcast from this process, rank 0, to all workers."""

    def __init__(self, address: str = "127.0.0.1", timeout: float = 600.0) -> None:
        """Choose where workers find this process.

        Args:
            address: of this machine, as workers see it.
            timeout: seconds for a group to arrive.
        """
        self._address, self._timeout = address, timeout
        self._communicator: Any = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="posttrain-nccl")

    def connect(self, call: Call) -> None:
        """See `Link.connect`. UserError without a GPU. Workers and this process wait for each other here."""
        _need_gpu("NCCL")
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        with socket.socket() as probe:
            probe.bind((self._address, 0))
            port = probe.getsockname()[1]
        world = 1 + call("posttrain_discard")
        meeting = {"master_address": self._address, "master_port": port, "world_size": world}
        waiting = self._thread.submit(call, "posttrain_connect", {**meeting, "rank_offset": 1})
        self._communicator = NCCLWeightTransferEngine.trainer_init(meeting)
        waiting.result(self._timeout)

    def send(self, call: Call, group: Group) -> None:
        """See `Link.send`. EngineUnusable where workers do not take it in time."""
        stream = torch.cuda.current_stream()
        tensors = [tensor.detach().contiguous() for _, tensor in group]
        waiting = self._thread.submit(call, "posttrain_receive", {**_described(group), "packed": False})
        for tensor in tensors:
            self._communicator.broadcast(tensor, src=0, stream=stream)
        try:
            waiting.result(self._timeout)  # not the stream first: without the workers it would wait for ever
        except TimeoutError:
            raise EngineUnusable(f"workers did not take a group of weights within {self._timeout:g} seconds") from None
        stream.synchronize()


def handle_of(tensor: torch.Tensor) -> dict[str, Any]:
    """A CUDA tensor's IPC handle as numbers and texts, see `device_transfer.HANDLE`; the caller keeps the tensor alive."""
    from torch.multiprocessing.reductions import reduce_tensor

    return handle_fields(reduce_tensor(tensor)[1])


def handle_fields(arguments: Sequence[Any]) -> dict[str, Any]:
    """Fields of a handle from arguments of torch's `rebuild_cuda_tensor`; `device_transfer.rebuild_arguments` is the way back."""
    _, size, stride, offset, _, dtype, *storage = arguments
    device, handle, storage_size, storage_offset, _, counter, counter_offset, event, sync = storage
    return {
        "size": list(size),
        "stride": list(stride),
        "offset": offset,
        "dtype": _dtype_name(dtype),
        "device": device,
        "handle": handle.hex(),
        "storage_size": storage_size,
        "storage_offset": storage_offset,
        "counter": counter.hex(),
        "counter_offset": counter_offset,
        "event": event.hex(),
        "event_sync": sync,
    }


def _described(group: Group) -> dict[str, Any]:
    return {
        "names": [name for name, _ in group],
        "dtype_names": [_dtype_name(tensor.dtype) for _, tensor in group],
        "shapes": [list(tensor.shape) for _, tensor in group],
    }


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _need_gpu(way: str) -> None:
    if not torch.cuda.is_available():
        raise UserError(
            f"weights cannot be sent over {way}: this process has no NVIDIA GPU",
            instead="publish them in shared memory (the weight transfer backend 'posttrain_host')",
        )

"""Weights from GPU to GPU, the workers' side: vLLM's own CUDA IPC and NCCL engines, behind our two steps.

What arrives is held beside the weights that serve (so there must be room for both), its checksums are computed on the GPU, and
only when all of them are right is the model reloaded. Every worker receives whole tensors, as vLLM's engines have it.

Written for vLLM 0.26; the transport was never run. Facts used: vllm/distributed/weight_transfer/{ipc,nccl}_engine.py, both of
which hand what they receive to `self.model.load_weights`, and torch/multiprocessing/reductions.py (rebuild_cuda_tensor).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from posttrain.config.errors import UserError
from posttrain.model.loading import entry_of
from posttrain.rollout.vllm.backends import HOST_BACKEND
from posttrain.rollout.vllm.transfer import Staging
from posttrain.rollout.weights.checksums import checksum
from posttrain.rollout.weights.manifest import Manifest, WeightsRefused

HANDLE = (
    "size",
    "stride",
    "offset",
    "dtype",
    "device",
    "handle",
    "storage_size",
    "storage_offset",
    "counter",
    "counter_offset",
    "event",
    "event_sync",
)
"""Fields of a tensor's IPC handle: what torch's `rebuild_cuda_tensor` takes, without classes; bytes as hexadecimal digits."""


class _Caught:
    """Stands in the model's place while vLLM's engine receives, and keeps what it is given."""

    def __init__(self) -> None:
        self.received: list[list[tuple[str, torch.Tensor]]] = []

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Keep copies: the sender's memory is used again for the next group."""
        self.received.append([(name, tensor.clone()) for name, tensor in weights])
        return set()

    def groups(self) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """What was received, in its order; each group is let go of once the next one is asked for."""
        while self.received:
            yield self.received.pop(0)


class _DeviceStaging(Staging):
    """What both engines add to vLLM's: receive beside the model, check, then swap."""

    device: torch.device
    _caught: _Caught | None = None

    def connect(self, info: Mapping[str, Any]) -> None:
        """Join the trainer. UserError where this machine has no GPU."""
        if self.device.type != "cuda":
            raise UserError(
                f"{type(self).__name__} needs an NVIDIA GPU, this worker runs on {self.device.type}",
                instead=f"use the weight transfer backend {HOST_BACKEND!r}",
            )
        engine: Any = self
        engine.init_transfer_engine(engine.parse_init_info(dict(info)))

    def receive(self, info: Mapping[str, Any]) -> None:
        """Take one group in, beside the weights that serve."""
        if self.device.type != "cuda":
            raise WeightsRefused(f"{type(self).__name__} needs an NVIDIA GPU")
        engine: Any = self
        caught = self._caught = self._caught or _Caught()
        own, self.model = self.model, caught
        try:
            engine.receive_weights(engine.parse_update_info(dict(info)))
            torch.cuda.synchronize(self.device)
        finally:
            self.model = own

    def check(self, manifest: str) -> None:
        """Compare what was received with the sender's manifest, and its tensors with the model's. WeightsRefused."""
        said, caught = Manifest.from_json(manifest), self._caught or _Caught()
        self.discard()
        said.refuse_misfits(self.needed(said))
        refuse_differences(said, [pair for group in caught.received for pair in group])
        self._staged = caught

    def discard(self) -> None:
        """Forget what is staged or received."""
        super().discard()
        self._caught = None

    def start_weight_update(self) -> None:
        """Forget what an earlier update left."""
        self.discard()

    def finish_weight_update(self) -> None:
        """Nothing to do: `apply` does it."""


def refuse_differences(manifest: Manifest, received: Sequence[tuple[str, torch.Tensor]]) -> None:
    """WeightsRefused where tensors are not those of the manifest, in its order, byte for byte."""
    if [name for name, _ in received] != [record.name for record in manifest.tensors]:
        raise WeightsRefused(f"weights of version {manifest.version} are damaged: other tensors arrived than were sent")
    for record, (name, tensor) in zip(manifest.tensors, received, strict=True):
        entry = entry_of(name, tensor)
        same = (entry.dtype, entry.shape) == (record.dtype, record.shape)
        if not same or checksum(tensor, manifest.algorithm) != record.checksum:
            raise WeightsRefused(f"weights of version {manifest.version} are damaged: {name} is not what was sent")


class NCCLTransferEngine(_DeviceStaging, NCCLWeightTransferEngine):
    """Receives vLLM's broadcast."""


class IPCTransferEngine(_DeviceStaging, IPCWeightTransferEngine):
    """Opens a trainer's memory on the same GPU. Handles come as numbers and texts, not as pickle."""

    def parse_update_info(self, update_dict: dict[str, Any]) -> Any:
        """Handles as vLLM's engine wants them: for each tensor, the GPU's id to arguments of torch's `rebuild_cuda_tensor`."""
        fields = dict(update_dict)
        gpu, handles = fields.pop("gpu"), fields.pop("handles")
        return super().parse_update_info({**fields, "ipc_handles": [{gpu: rebuild_arguments(handle)} for handle in handles]})


def rebuild_arguments(fields: Mapping[str, Any]) -> tuple[Any, ...]:
    """Arguments of torch's `rebuild_cuda_tensor` from a handle's fields, see `HANDLE`. WeightsRefused for other fields."""
    if set(fields) != set(HANDLE):
        raise WeightsRefused("a handle of the trainer's memory has other fields than expected")
    return (
        torch.Tensor,
        torch.Size(fields["size"]),
        tuple(fields["stride"]),
        fields["offset"],
        torch.storage.TypedStorage,
        getattr(torch, fields["dtype"]),
        fields["device"],
        bytes.fromhex(fields["handle"]),
        fields["storage_size"],
        fields["storage_offset"],
        False,
        bytes.fromhex(fields["counter"]),
        fields["counter_offset"],
        bytes.fromhex(fields["event"]),
        fields["event_sync"],
    )

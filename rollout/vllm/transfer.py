"""Weights into vLLM's workers: verified first, then swapped, without pickle.

vLLM's own order (start, update, finish) drops the old weights at its start, before anything has arrived. Here all bytes are
checked where they wait, in shared memory, and only then are the layers reloaded in one go. Workers answer calls with a text,
empty where all is well, and never raise: an exception on one rank of several leaves the others' answers queued for the next call.

Written for vLLM 0.26 and 0.32, run with 0.32. Facts used: vllm/distributed/weight_transfer/base.py (the interface),
vllm/model_executor/model_loader/reload (layerwise reload).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo

from posttrain.rollout.vllm.backends import HOST_BACKEND, IPC_BACKEND, NCCL_BACKEND
from posttrain.rollout.weights.manifest import Manifest, WeightsRefused, checkpoint_shapes
from posttrain.rollout.weights.store import StoredWeights

logger = logging.getLogger(__name__)


@dataclass
class HostInit(WeightTransferInitInfo):
    """Nothing to connect."""


@dataclass
class HostUpdate(WeightTransferUpdateInfo):
    """A published version: its folder, and the digest of its manifest."""

    folder: str
    digest: str


class Staged(Protocol):
    """Weights that were verified."""

    def groups(self) -> Iterable[list[tuple[str, torch.Tensor]]]:
        """As `WeightSource.groups`."""
        ...


class Staging:
    """The two steps, for any of vLLM's weight transfer engines: `stage` changes nothing that serves, `apply` swaps."""

    vllm_config: Any
    model_config: Any
    model: Any
    _staged: Staged | None = None

    def stage(self, folder: str, digest: str) -> None:
        """Verify every byte of a published version against its manifest, and its tensors against the model. WeightsRefused."""
        self.discard()
        stored = StoredWeights.open(folder, digest)
        stored.verify(self.needed(stored.manifest))
        self._staged = stored

    def apply(self) -> None:
        """Load what is staged. ValueError where nothing is, or where the model did not take all of it: it must not serve then."""
        staged = self._staged
        if staged is None:
            raise ValueError("no weights are staged")
        try:
            with set_current_vllm_config(self.vllm_config):
                _reload(self.model, self.model_config, staged)
        finally:
            self.discard()

    def discard(self) -> None:
        """Forget what is staged."""
        self._staged = None

    def needed(self, manifest: Manifest) -> dict[str, tuple[int, ...]]:
        """Names and shapes that the model needs, under the kind of names that the manifest has."""
        return checkpoint_shapes(self.model_config.hf_config.to_dict(), [record.name for record in manifest.tensors])


class HostWeightTransferEngine(Staging, WeightTransferEngine[HostInit, HostUpdate]):
    """Takes published weights over, on any device.

    Through vLLM's own calls, `update_weights` takes both steps, and raises in front of any change where the weights are refused;
    start and finish have nothing to do then.
    """

    init_info_cls = HostInit
    update_info_cls = HostUpdate

    def init_transfer_engine(self, init_info: HostInit) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        """Forget what an earlier update staged."""
        self.discard()

    def receive_weights(self, update_info: HostUpdate) -> None:
        """Verify, then load. WeightsRefused before anything is changed; any other error leaves the model unusable."""
        self.stage(update_info.folder, update_info.digest)
        self.apply()

    def finish_weight_update(self) -> None:
        """Nothing to do: an error here would be followed by garbage."""

    def shutdown(self) -> None:
        """Forget what is staged."""
        self.discard()

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """vLLM 0.26 asks for it. ValueError: weights are published, not sent."""
        raise ValueError("publish the weights (posttrain.rollout.weights.store.publish) and send folder and digest")


def _reload(model: Any, model_config: Any, staged: Staged) -> None:
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    # Scales of quantised experts follow from the weights; no checkpoint holds them.
    needed = {name for name, _ in model.named_parameters() if "scale" not in name}
    taken: set[str] = set()
    initialize_layerwise_reload(model)
    try:
        for group in staged.groups():
            taken |= model.load_weights(iter(group))
    finally:
        # After an error too: layers keep what was buffered for them, which the next reload would mix with its own.
        finalize_layerwise_reload(model, model_config)
    if missing := sorted(needed - taken):
        raise ValueError(f"the model did not take {missing[:3]} of the new weights")


class WeightWorkerExtension:
    """Calls that the plugin adds to vLLM's workers; each returns what went wrong, or an empty text."""

    weight_transfer_engine: Any

    def posttrain_stage(self, folder: str, digest: str) -> str:
        """Verify published weights, see `Staging.stage`."""
        return _status(lambda: self._posttrain_engine().stage(folder, digest))

    def posttrain_apply(self) -> str:
        """Load what is staged, see `Staging.apply`."""
        return _status(lambda: self._posttrain_engine().apply())

    def posttrain_discard(self) -> str:
        """Forget what is staged."""
        return _status(lambda: self._posttrain_engine().discard())

    def posttrain_connect(self, info: dict[str, Any]) -> str:
        """Join the trainer, see `device_transfer`."""
        return _status(lambda: self._posttrain_device_engine().connect(info))

    def posttrain_receive(self, info: dict[str, Any]) -> str:
        """Take a group of tensors in, beside those that serve, see `device_transfer`."""
        return _status(lambda: self._posttrain_device_engine().receive(info))

    def posttrain_check(self, manifest: str) -> str:
        """Verify what was received and hold it ready, see `device_transfer`."""
        return _status(lambda: self._posttrain_device_engine().check(manifest))

    def _posttrain_engine(self) -> Any:
        if not isinstance(self.weight_transfer_engine, Staging):
            raise WeightsRefused(f"start the engine with the weight transfer backend {HOST_BACKEND!r}")
        return self.weight_transfer_engine

    def _posttrain_device_engine(self) -> Any:
        if not hasattr(self.weight_transfer_engine, "receive"):
            raise WeightsRefused(f"start the engine with the weight transfer backend {IPC_BACKEND!r} or {NCCL_BACKEND!r}")
        return self.weight_transfer_engine


def _status(call: Callable[[], None]) -> str:
    try:
        call()
    except WeightsRefused as error:
        return str(error)
    except Exception as error:
        logger.exception("a weight update failed")
        return f"{type(error).__name__}: {error}"
    return ""

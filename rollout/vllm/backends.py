"""Names under which vLLM finds our weight transfer, and their registration; imports nothing of vLLM before it is called."""

from __future__ import annotations

HOST_BACKEND = "posttrain_host"
"""`WeightTransferConfig(backend=...)`: published weights, on any device."""
IPC_BACKEND = "posttrain_ipc"
"""From the memory of a trainer on the same NVIDIA GPU."""
NCCL_BACKEND = "posttrain_nccl"
"""From a trainer on other NVIDIA GPUs, by broadcast."""
EXTENSION = "posttrain.rollout.vllm.extension.RolloutWorkerExtension"
"""`worker_extension_cls`, with every backend of ours. One class for all engines: vLLM adds it to its worker class for good, and a
second one in the same process would clash with it."""

_ENGINES = {
    HOST_BACKEND: ("posttrain.rollout.vllm.transfer", "HostWeightTransferEngine"),
    IPC_BACKEND: ("posttrain.rollout.vllm.device_transfer", "IPCTransferEngine"),
    NCCL_BACKEND: ("posttrain.rollout.vllm.device_transfer", "NCCLTransferEngine"),
}


def register() -> None:
    """Make vLLM know the engines; a second call does nothing."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    for name, (module, cls) in _ENGINES.items():
        if name not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(name, module, cls)

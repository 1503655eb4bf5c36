"""The GPU backends as far as a CPU goes: what they refuse, and the two steps with tensors handed over in one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from posttrain.config.errors import UserError
from posttrain.rollout.types import WeightSource
from posttrain.rollout.vllm.backends import EXTENSION, HOST_BACKEND, IPC_BACKEND, NCCL_BACKEND
from posttrain.rollout.weights.manifest import WeightsRefused
from posttrain.rollout.weights.sink import EngineUnusable
from posttrain.rollout.weights.source import ModelSource
from posttrain.rollout.weights.store import publish
from tests.rollout.contract import Tensors
from tests.rollout.vllm.tiny import continuations, inner_model, mixed_prompts, needs_vllm, tiny_engine, tiny_model, write_tiny

pytestmark = needs_vllm

PROMPTS = mixed_prompts(6, longest=60, seed=4)
WIRE: list[list[tuple[str, torch.Tensor]]] = []
"""What is under way from `HandOver` to the worker."""


class HandOver:
    """A link within one process; `damage` may change a tensor on its way."""

    def __init__(self, damage: Any = lambda name, tensor: tensor) -> None:
        self.damage = damage

    def connect(self, call: Any) -> None:
        assert call("posttrain_discard") == 1

    def send(self, call: Any, group: Any) -> None:
        WIRE.append([(name, self.damage(name, tensor.clone())) for name, tensor in group])
        call("posttrain_receive", {"names": [name for name, _ in group]})
        for _, tensor in WIRE.pop():
            tensor.zero_()  # the sender's memory is used again


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An engine whose worker's transfer engine receives what `HandOver` sends."""
    from posttrain.rollout.vllm.device_transfer import _DeviceStaging

    class Engine(_DeviceStaging):
        def __init__(self, original: Any) -> None:
            self.vllm_config, self.model_config, self.model = original.vllm_config, original.model_config, original.model
            self.device = SimpleNamespace(type="cuda")  # type: ignore[assignment]

        def parse_update_info(self, info: dict[str, Any]) -> dict[str, Any]:
            return info

        def receive_weights(self, info: dict[str, Any]) -> None:
            assert [name for name, _ in WIRE[-1]] == info["names"]
            self.model.load_weights(iter(WIRE[-1]))

        def shutdown(self) -> None:
            """As vLLM's own engines have it."""

    folder = tmp_path_factory.mktemp("tiny") / "0"
    write_tiny(folder)
    patch = pytest.MonkeyPatch()
    patch.setattr(torch.cuda, "synchronize", lambda device: None)
    options = {"weight_transfer_config": {"backend": HOST_BACKEND}, "worker_extension_cls": EXTENSION}
    with tiny_engine(folder, **options) as engine:
        worker = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        worker.weight_transfer_engine = Engine(worker.weight_transfer_engine)
        yield engine
    patch.undo()


def sink(llm: Any, link: Any, **options: Any) -> Any:
    from posttrain.rollout.vllm.device_updates import DeviceWeights

    return DeviceWeights(llm.llm_engine, link, **options)


def test_sent_weights_serve_after_their_check(llm: Any, tmp_path: Path) -> None:
    weights = sink(llm, HandOver(), root=tmp_path)
    before = continuations(llm, PROMPTS)
    weights.update(ModelSource(tiny_model(1), 1))
    other = continuations(llm, PROMPTS)
    assert other != before and weights.weight_version == 1
    weights.update(ModelSource(tiny_model(0), 2, "official"))
    assert continuations(llm, PROMPTS) == before
    stored = publish(ModelSource(tiny_model(1), 3), tmp_path)
    weights.update(stored)  # published ones are taken too
    assert continuations(llm, PROMPTS) == other and weights.weight_version == 3
    weights.update(ModelSource(tiny_model(0), 0))
    assert continuations(llm, PROMPTS) == before and weights.weight_version == 0


@pytest.mark.parametrize("damage", ["bit", "shape", "dtype"])
def test_what_is_damaged_on_its_way_is_refused(llm: Any, damage: str) -> None:
    before = continuations(llm, PROMPTS)

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name != "model.layers.2.block_sparse_moe.experts.down_proj":
            return tensor
        if damage == "bit":
            tensor.view(torch.int32).view(-1)[-1] ^= 1
            return tensor
        return tensor.mT.contiguous() if damage == "shape" else tensor.bfloat16()

    weights = sink(llm, HandOver(change))
    with pytest.raises(WeightsRefused, match="version 9 are damaged: .*down_proj is not what was sent"):
        weights.update(ModelSource(tiny_model(1), 9))
    assert weights.weight_version == 0 and weights.usable and continuations(llm, PROMPTS) == before


def test_what_does_not_fit_or_breaks_off_is_refused_and_read_to_its_end(llm: Any) -> None:
    before = continuations(llm, PROMPTS)
    weights = sink(llm, HandOver())
    new = dict(tiny_model(1).state_dict())
    del new["lm_head.weight"]
    with pytest.raises(WeightsRefused, match="lm_head.weight"):
        weights.update(Tensors(new, 9))
    read = []

    class Counted:
        version = 9

        def groups(self) -> Iterator[list[tuple[str, torch.Tensor]]]:
            for group in ModelSource(tiny_model(1), 9).groups():
                read.append(group)
                yield group

    def cut(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if ".layers.1." in name:
            raise ConnectionError("the line broke")
        return tensor

    source: WeightSource = Counted()
    with pytest.raises(ConnectionError):
        sink(llm, HandOver(cut)).update(source)
    assert len(read) == 6 and continuations(llm, PROMPTS) == before
    weights.update(ModelSource(tiny_model(0), 0))  # nothing of the broken one is left over
    assert continuations(llm, PROMPTS) == before


def test_an_error_in_the_reload_says_that_the_engine_is_lost(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(weights: Any) -> set[str]:
        raise RuntimeError("the machine broke")

    before = continuations(llm, PROMPTS)
    weights = sink(llm, HandOver())
    with monkeypatch.context() as patch:
        patch.setattr(inner_model(llm), "load_weights", broken)
        with pytest.raises(EngineUnusable, match="the machine broke"):
            weights.update(ModelSource(tiny_model(1), 1))
    sink(llm, HandOver()).update(ModelSource(tiny_model(0), 0))
    assert continuations(llm, PROMPTS) == before


def test_handles_of_memory_survive_as_numbers_and_texts() -> None:
    from posttrain.rollout.vllm.device_transfer import HANDLE, rebuild_arguments
    from posttrain.rollout.vllm.device_updates import handle_fields

    tensor = torch.zeros(4, 3, dtype=torch.bfloat16)
    storage = type(tensor._typed_storage())
    size, stride = tensor.size(), tensor.stride()
    arguments = (type(tensor), size, stride, 7, storage, tensor.dtype, 0, b"\x01h", 96, 512, False, b"\x02c", 3, b"\x03e", True)
    fields = handle_fields(arguments)
    assert tuple(fields) == HANDLE and rebuild_arguments(fields) == arguments
    with pytest.raises(WeightsRefused, match="other fields"):
        rebuild_arguments({**fields, "func": "os.system"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("way", ["IPC", "NCCL"])
def test_without_a_gpu_both_ends_say_what_they_need(way: str) -> None:
    from posttrain.rollout.vllm import device_transfer, device_updates

    link = device_updates.IPCLink() if way == "IPC" else device_updates.NCCLLink()
    with pytest.raises(UserError, match=f"over {way}: this process has no NVIDIA GPU; publish"):
        link.connect(lambda *args: 1)
    kind: Any = device_transfer.IPCTransferEngine if way == "IPC" else device_transfer.NCCLTransferEngine
    engine = kind(None, SimpleNamespace(parallel_config=None, model_config=None), torch.device("cpu"), None)
    with pytest.raises(UserError, match="needs an NVIDIA GPU, this worker runs on cpu; use"):
        engine.connect({})
    with pytest.raises(WeightsRefused, match="needs an NVIDIA GPU"):
        engine.receive({})


def test_all_backends_are_registered_once() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from posttrain.rollout.vllm.backends import register

    register()
    register()
    for name in (HOST_BACKEND, IPC_BACKEND, NCCL_BACKEND):
        assert WeightTransferEngineFactory._registry[name]().__module__.startswith("posttrain.")

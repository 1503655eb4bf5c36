"""Weights into a running vLLM engine: identical ones change nothing, others make it a fresh engine, bad ones are not taken."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from posttrain.model.naming import SCHEMES, Scheme
from posttrain.rollout.vllm.backends import EXTENSION, HOST_BACKEND
from posttrain.rollout.weights.manifest import WeightsRefused
from posttrain.rollout.weights.sink import EngineUnusable, WeightSink
from posttrain.rollout.weights.source import ModelSource
from posttrain.rollout.weights.store import publish
from tests.rollout.contract import Tensors
from tests.rollout.test_weights import rewrite
from tests.rollout.vllm.tiny import continuations, inner_model, mixed_prompts, needs_vllm, tiny_engine, tiny_model, write_tiny

pytestmark = needs_vllm

PROMPTS = mixed_prompts(12, longest=150, seed=3)
WEIGHTS = {"weight_transfer_config": {"backend": HOST_BACKEND}, "worker_extension_cls": EXTENSION}


def drive(llm: Any, **options: Any) -> Any:
    from posttrain.rollout.vllm.updates import VLLMWeights

    return VLLMWeights(llm.llm_engine, **options)


def answers(llm: Any) -> list[tuple[list[int], list[float]]]:
    """Greedy answers and their log-probabilities; no cached block changes their last bits."""
    llm.reset_prefix_cache()
    return continuations(llm, PROMPTS)


def compare(said: Any, expected: Any) -> None:
    for (tokens, logprobs), (same, close) in zip(said, expected, strict=True):
        assert tokens == same and logprobs == pytest.approx(close, abs=1e-5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Checkpoints of the weights of two seeds."""
    found = {seed: tmp_path_factory.mktemp("tiny") / str(seed) for seed in (0, 1)}
    for seed, folder in found.items():
        write_tiny(folder, seed=seed)
    return found


@pytest.fixture(scope="module")
def fresh(folders: dict[int, Path]) -> dict[int, Any]:
    """What engines that were started with these weights say."""
    said = {}
    for seed, folder in folders.items():
        with tiny_engine(folder) as llm:
            said[seed] = answers(llm)
    return said


@pytest.fixture(scope="module")
def shared(folders: dict[int, Path], fresh: dict[int, Any]) -> Iterator[Any]:
    """One engine for the tests that leave it as it was: with the weights of seed 0. A process has one at a time."""
    with tiny_engine(folders[0], **WEIGHTS, enable_prefix_caching=True) as llm:
        yield llm


@pytest.fixture
def engine(shared: Any, folders: dict[int, Path], tmp_path: Path) -> Iterator[tuple[Any, Any]]:
    sink = drive(shared, checkpoint=folders[0], root=tmp_path)
    yield shared, sink
    if sink.usable and sink.weight_version != 0:
        sink.update(ModelSource(tiny_model(0), version=0))
    sink.close()


def test_identical_weights_change_no_bit(engine: tuple[Any, Any], fresh: dict[int, Any]) -> None:
    llm, sink = engine
    before = answers(llm)
    for version in (1, 2):
        sink.update(ModelSource(tiny_model(0), version))
        assert sink.weight_version == version and isinstance(sink, WeightSink)
        assert answers(llm) == before
    compare(before, fresh[0])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_other_weights_make_it_a_fresh_engine(engine: tuple[Any, Any], fresh: dict[int, Any], scheme: Scheme) -> None:
    llm, sink = engine
    compare(answers(llm), fresh[0])
    sink.update(ModelSource(tiny_model(1), 1, scheme))
    compare(answers(llm), fresh[1])


def test_cached_blocks_of_old_weights_are_not_used_again(engine: tuple[Any, Any]) -> None:
    llm, sink = engine
    prompt = {"prompt_token_ids": [(7 * i) % 97 for i in range(700)]}

    def cached() -> int:
        return int(llm.generate([prompt], use_tqdm=False)[0].num_cached_tokens)

    cached()
    assert cached() > 0
    sink.update(ModelSource(tiny_model(1), 1))
    assert cached() == 0


def test_there_and_back_is_the_first_engine_bit_for_bit(engine: tuple[Any, Any]) -> None:
    llm, sink = engine
    before = answers(llm)
    sink.update(ModelSource(tiny_model(1), 1))
    assert answers(llm) != before
    sink.update(ModelSource(tiny_model(0), 2))
    assert answers(llm) == before


def test_a_flipped_byte_is_refused_and_the_old_weights_answer(engine: tuple[Any, Any], tmp_path: Path) -> None:
    llm, sink = engine
    before = answers(llm)
    stored = publish(ModelSource(tiny_model(1), 4), tmp_path)
    for file in sorted(stored.folder.glob("*.safetensors")):
        data = file.read_bytes()
        place = len(data) * 2 // 3
        rewrite(file, data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(WeightsRefused, match="version 4 are damaged"):
            sink.update(stored)
        assert sink.weight_version == 0 and sink.usable
        assert answers(llm) == before
        rewrite(file, data)
    sink.update(stored)
    assert sink.weight_version == 4 and stored.folder.exists()


@pytest.mark.parametrize("damage", ["missing", "extra", "misshapen", "none at all", "reward model"])
def test_weights_that_do_not_fit_are_refused(engine: tuple[Any, Any], damage: str) -> None:
    llm, sink = engine
    before = answers(llm)
    new = dict(tiny_model(1).state_dict())
    if damage == "missing":
        del new["lm_head.weight"]
    elif damage == "extra":
        new["stray.weight"] = torch.zeros(3)
    elif damage == "misshapen":
        new["lm_head.weight"] = new["lm_head.weight"][:-1]
    elif damage == "none at all":
        new.clear()
    else:
        new["score.weight"] = new.pop("lm_head.weight")[:1]
    with pytest.raises(ValueError, match="stray.weight" if damage == "extra" else "lm_head.weight"):
        sink.update(Tensors(new, version=8))
    assert sink.weight_version == 0 and sink.usable
    assert answers(llm) == before


@pytest.mark.parametrize("served", ["from the checkpoint", "from an update"])
@pytest.mark.parametrize("at", [0, 2, 5])
def test_an_error_while_loading_goes_back_to_the_old_weights(
    engine: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, served: str, at: int
) -> None:
    llm, sink = engine
    if served == "from an update":
        sink.update(ModelSource(tiny_model(1), 3))
    before, version = answers(llm), sink.weight_version
    model, calls = inner_model(llm), []
    original = model.load_weights

    def failing(weights: Any) -> set[str]:
        calls.append(1)
        if len(calls) == at + 1:
            original(iter(list(weights)[:1]))
            raise RuntimeError("the machine broke")
        return original(weights)

    monkeypatch.setattr(model, "load_weights", failing)
    with pytest.raises(WeightsRefused, match="the machine broke"):
        sink.update(ModelSource(tiny_model(5), 6))
    assert sink.weight_version == version and sink.usable
    assert answers(llm) == before


def test_a_model_that_takes_only_a_part_goes_back(engine: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    llm, sink = engine
    before = answers(llm)
    model = inner_model(llm)
    original, calls = model.load_weights, []

    def forgetful(weights: Any) -> set[str]:
        calls.append(1)
        return set() if len(calls) == 3 else original(weights)

    monkeypatch.setattr(model, "load_weights", forgetful)
    with pytest.raises(WeightsRefused, match="did not take .*layers.1"):
        sink.update(ModelSource(tiny_model(5), 6))
    assert sink.weight_version == 0 and answers(llm) == before


def test_requests_in_flight_are_refused(engine: tuple[Any, Any]) -> None:
    from vllm import SamplingParams

    llm, sink = engine
    core = llm.llm_engine
    core.add_request("one", {"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=30, ignore_eos=True, detokenize=False))
    core.step()
    with pytest.raises(WeightsRefused, match="requests are in flight"):
        sink.update(ModelSource(tiny_model(1), 1))
    core.abort_request(["one"])
    while core.has_unfinished_requests():
        core.step()
    core.step()
    sink.update(ModelSource(tiny_model(1), 1))
    assert sink.weight_version == 1


def test_published_weights_are_kept_while_they_serve_and_no_longer(engine: tuple[Any, Any], tmp_path: Path) -> None:
    _, sink = engine
    for version in (1, 2):
        sink.update(ModelSource(tiny_model(1), version))
        assert [folder.name.split("-")[2] for folder in tmp_path.iterdir()] == [str(version)]
    with pytest.raises(WeightsRefused):
        sink.update(Tensors({}, version=3))
    assert len(list(tmp_path.iterdir())) == 1
    sink.close()
    sink.close()
    assert list(tmp_path.iterdir()) == []


def test_without_a_way_back_the_engine_says_that_it_is_lost(
    shared: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh: dict[int, Any]
) -> None:
    before = answers(shared)
    sink = drive(shared, root=tmp_path)

    def broken(weights: Any) -> set[str]:
        raise RuntimeError("the machine broke")

    with monkeypatch.context() as patch:
        patch.setattr(inner_model(shared), "load_weights", broken)
        with pytest.raises(EngineUnusable, match="broke.*nowhere to be read"):
            sink.update(ModelSource(tiny_model(1), 1))
    assert not sink.usable
    with pytest.raises(EngineUnusable, match="replace it"):
        sink.update(ModelSource(tiny_model(1), 1))
    other = drive(shared, root=tmp_path)
    other.update(ModelSource(tiny_model(0), 0))
    assert answers(shared) == before
    other.close()


def test_vllms_own_calls_update_too_and_refuse_before_any_change(shared: Any, fresh: dict[int, Any], tmp_path: Path) -> None:
    before = answers(shared)
    stored, old = publish(ModelSource(tiny_model(1), 1), tmp_path), publish(ModelSource(tiny_model(0), 0), tmp_path)

    def update(folder: Path, digest: str) -> None:
        shared.start_weight_update()
        shared.update_weights({"update_info": {"folder": str(folder), "digest": digest}})
        shared.finish_weight_update()
        shared.reset_prefix_cache()

    with pytest.raises(ValueError, match="not the one that was announced"):
        update(stored.folder, old.manifest.digest)
    assert answers(shared) == before
    update(stored.folder, stored.manifest.digest)
    assert [tokens for tokens, _ in answers(shared)] == [tokens for tokens, _ in fresh[1]]
    update(old.folder, old.manifest.digest)
    assert answers(shared) == before


class Scripted:
    """Two workers that answer what they are told to, in order."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers, self.calls = list(answers), []  # type: ignore[var-annotated]

    def collective_rpc(self, method: str, timeout: float | None = None, args: tuple[Any, ...] = ()) -> list[Any]:
        self.calls.append(method)
        return self.answers.pop(0) if self.answers else ["", ""]

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset")
        return True

    def has_unfinished_requests(self) -> bool:
        return False


def test_one_rank_that_refuses_or_fails_keeps_all_ranks_on_the_old_weights(folders: dict[int, Path], tmp_path: Path) -> None:
    from posttrain.rollout.vllm.updates import VLLMWeights

    refusing = Scripted(["", "damaged"])
    with pytest.raises(WeightsRefused, match="worker 1: damaged"):
        VLLMWeights(refusing, root=tmp_path).update(ModelSource(tiny_model(0), 1))
    assert refusing.calls == ["posttrain_stage", "posttrain_discard"]
    failing = Scripted(["", ""], ["", "broke"])
    sink = VLLMWeights(failing, root=tmp_path, checkpoint=folders[0], version=4)
    with pytest.raises(WeightsRefused, match="worker 1: broke"):
        sink.update(ModelSource(tiny_model(0), 5))
    assert failing.calls == ["posttrain_stage", "reset", "posttrain_apply", "posttrain_stage", "posttrain_apply"]
    assert sink.weight_version == 4 and sink.usable and list(tmp_path.iterdir()) == []


class Dead:
    """An engine whose workers do not answer."""

    def collective_rpc(self, method: str, timeout: float | None = None, args: tuple[Any, ...] = ()) -> list[Any]:
        raise TimeoutError("no answer")

    def reset_prefix_cache(self) -> bool:
        return True

    def has_unfinished_requests(self) -> bool:
        return False


def test_workers_that_do_not_answer_make_the_engine_unusable(tmp_path: Path) -> None:
    from posttrain.rollout.vllm.updates import VLLMWeights

    sink = VLLMWeights(Dead(), root=tmp_path, timeout=1)
    with pytest.raises(EngineUnusable, match="did not answer posttrain_stage"):
        sink.update(ModelSource(tiny_model(0), 1))
    assert list(tmp_path.iterdir()) == []


def test_a_call_without_an_answer_ends_at_its_deadline_or_when_the_process_has_ended() -> None:
    from posttrain.rollout.vllm.calls import call_workers

    never = threading.Event()

    def wait(*args: Any, **options: Any) -> None:
        never.wait(60)

    mute = SimpleNamespace(collective_rpc=wait, engine_core=SimpleNamespace(resources=SimpleNamespace(engine_dead=False)))
    started = time.monotonic()
    with pytest.raises(EngineUnusable, match="did not answer ask: TimeoutError: no answer within 0.5 seconds"):
        call_workers(mute, "ask", (), 0.5)
    mute.engine_core.resources.engine_dead = True
    with pytest.raises(EngineUnusable, match="its process has ended"):
        call_workers(mute, "ask", (), 60.0)
    assert time.monotonic() - started < 20
    never.set()


def test_a_worker_without_the_backend_says_so() -> None:
    from posttrain.rollout.vllm.transfer import WeightWorkerExtension

    worker = WeightWorkerExtension()
    worker.weight_transfer_engine = None
    assert HOST_BACKEND in worker.posttrain_stage("folder", "digest")
    assert HOST_BACKEND in worker.posttrain_apply()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_spawned_workers_update_to_the_fifth_digit(
    folders: dict[int, Path], fresh: dict[int, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with tiny_engine(folders[0], **WEIGHTS, tensor_parallel_size=ranks) as llm:
        sink = drive(llm, checkpoint=folders[0], root=tmp_path)
        stored = publish(ModelSource(tiny_model(1), 4), tmp_path)
        file = sorted(stored.folder.glob("*.safetensors"))[2]
        data = file.read_bytes()
        rewrite(file, data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(WeightsRefused, match="damaged"):
            sink.update(stored)
        compare(answers(llm), fresh[0])
        rewrite(file, data)
        for source, seed in ((ModelSource(tiny_model(0), 5), 0), (stored, 1), (ModelSource(tiny_model(0), 6, "official"), 0)):
            sink.update(source)
            compare(answers(llm), fresh[seed])
        sink.close()


@pytest.mark.slow
def test_an_engine_killed_between_the_two_steps_is_replaced_from_the_same_weights(
    folders: dict[int, Path], fresh: dict[int, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    stored = publish(ModelSource(tiny_model(1), 4), tmp_path)
    earlier = set(multiprocessing.active_children())
    with tiny_engine(folders[0], **WEIGHTS) as llm:
        sink = drive(llm, checkpoint=folders[0], root=tmp_path, timeout=60)
        sink.stage(stored)
        for process in set(multiprocessing.active_children()) - earlier:
            process.kill()
        with pytest.raises(EngineUnusable, match="did not answer reset_prefix_cache: RuntimeError: its process has ended"):
            sink.swap()
        assert not sink.usable and sink.weight_version == 0
    with tiny_engine(folders[0], **WEIGHTS) as llm:
        sink = drive(llm, checkpoint=folders[0], root=tmp_path)
        sink.update(stored)
        compare(continuations(llm, PROMPTS), fresh[1])

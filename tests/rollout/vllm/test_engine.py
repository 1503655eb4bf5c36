"""The vLLM engine keeps to the engines' contract, and draws what the embedded engine draws."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.config.errors import UserError
from posttrain.model.modeling import MiniMaxText01ForCausalLM
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.types import RolloutEngine, RolloutOutput
from posttrain.rollout.vllm.environment import set_environment
from tests.rollout.contract import MAX_LENGTH, EngineContract, Tensors, mixed_requests, request
from tests.rollout.vllm.tiny import needs_vllm, tiny_model, write_tiny

VOCABULARY = 24
pytestmark = needs_vllm


def new_model(seed: int = 0) -> MiniMaxText01ForCausalLM:
    return tiny_model(seed, vocab_size=VOCABULARY, initializer_range=0.15)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine") / "checkpoint"
    write_tiny(folder, vocab_size=VOCABULARY, initializer_range=0.15)
    return folder


class Shared:
    """One engine for many tests: starting one takes seconds. It has its first weights again for every test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: Any = None

    def engine(self, return_routes: bool = False) -> Any:
        from posttrain.rollout.vllm.engine import VLLMEngine

        if self.made is None or self.made._closed:
            self.made = VLLMEngine(
                self.folder, version=3, return_routes=True, own_process=False, max_batch_tokens=256, cache_bytes=64 << 20
            )
        if self.made.weight_version != 3:
            self.made.update_weights(Tensors(new_model().state_dict(), version=3))
        self.made.return_routes = return_routes
        return self.made


@pytest.fixture(scope="module")
def shared(checkpoint: Path) -> Iterator[Shared]:
    one = Shared(checkpoint)
    yield one
    if one.made is not None:
        one.made.close()


class TestVLLMEngine(EngineContract):
    vocab_size = VOCABULARY

    @pytest.fixture(autouse=True)
    def sharing(self, shared: Shared) -> None:
        self.shared = shared

    def engine(self, **options: Any) -> RolloutEngine:
        return self.shared.engine(**options)

    def weights(self, seed: int) -> dict[str, torch.Tensor]:
        return new_model(seed).state_dict()

    @torch.no_grad()
    def logits(self, tokens: tuple[int, ...], weights: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        model = new_model()
        if weights is not None:
            model.load_state_dict(weights)
        return model(torch.tensor(tokens)[None]).logits[0]

    @torch.no_grad()
    def routes(self, tokens: tuple[int, ...]) -> np.ndarray:
        return new_model()(torch.tensor(tokens)[None], output_routes=True).routes.numpy()


def test_it_draws_what_the_embedded_engine_draws(shared: Shared) -> None:
    requests = [*mixed_requests(), *(request(f"t{i}", (i,) * (1 + 40 * i), 30, 3.0, seed=i) for i in range(8))]
    outputs = shared.engine().generate(requests)
    embedded = EmbeddedEngine(new_model(), version=3).generate(requests)
    for output, other in zip(outputs, embedded, strict=True):
        assert (output.token_ids, output.finish_reason) == (other.token_ids, other.finish_reason)
        assert output.logprobs == pytest.approx(other.logprobs, abs=2e-5)


def test_calls_of_several_threads_are_batched_together(shared: Shared) -> None:
    engine = shared.engine()
    requests = [request(f"r{i}", (1 + i,), 40, seed=i) for i in range(8)]
    alone = engine.generate(requests)
    before = engine.progress
    outputs: dict[int, RolloutOutput] = {}

    def ask(number: int) -> None:
        outputs[number] = engine.generate([requests[number]])[0]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [outputs[number].token_ids for number in range(8)] == [output.token_ids for output in alone]
    assert engine.progress - before < 8 * 40 / 2


def test_an_update_waits_for_running_requests_and_later_ones_for_it(shared: Shared) -> None:
    engine = shared.engine()
    outputs: list[RolloutOutput] = []
    running = threading.Thread(target=lambda: outputs.extend(engine.generate([request("long", tokens=600)])))
    start = engine.progress
    running.start()
    while engine.progress < start + 5:
        pass
    engine.update_weights(Tensors(new_model(1).state_dict(), version=4))
    running.join(timeout=60)
    assert set(outputs[0].weight_versions) == {3} and engine.weight_version == 4
    expected = EmbeddedEngine(new_model()).generate([request("long", tokens=600)])[0]
    assert outputs[0].token_ids == expected.token_ids
    after = engine.generate([request("r", tokens=20)])[0]
    assert after.token_ids == EmbeddedEngine(new_model(1)).generate([request("r", tokens=20)])[0].token_ids


SPAWNED = """
import sys
from posttrain.rollout.vllm.engine import VLLMEngine
from tests.rollout.contract import Tensors, mixed_requests
from tests.rollout.vllm.test_engine import new_model

if __name__ == "__main__":
    engine = VLLMEngine(sys.argv[1], version=3, return_routes=True, max_batch_tokens=256, cache_bytes=64 << 20)
    assert not hasattr(engine._llm.engine_core, "engine_core"), "vLLM runs in this process"
    from posttrain.rollout.embedded import EmbeddedEngine

    for seed, version in ((0, 3), (1, 4)):
        if seed:
            engine.update_weights(Tensors(new_model(seed).state_dict(), version))
        outputs = engine.generate(mixed_requests())
        others = EmbeddedEngine(new_model(seed), version=version, return_routes=True).generate(mixed_requests())
        for output, other in zip(outputs, others):
            assert output == other or max(abs(a - b) for a, b in zip(output.logprobs, other.logprobs)) < 2e-5
            assert output.token_ids == other.token_ids and output.weight_versions == other.weight_versions
            assert (output.routed_experts == other.routed_experts).all()
    engine.close()
    print("same")
"""


@pytest.mark.slow
def test_an_engine_in_a_process_of_its_own_gives_the_same(checkpoint: Path, tmp_path: Path) -> None:
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, str(script), str(checkpoint)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.stdout.strip().endswith("same"), done.stderr[-3000:]


def test_a_token_outside_of_the_vocabulary_is_refused(shared: Shared) -> None:
    with pytest.raises(ValueError, match="vocabulary of 24"):
        shared.engine().generate([request("bad", (24,))])
    assert len(shared.engine().generate([request("good", tokens=MAX_LENGTH // 100)])) == 1


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    from posttrain.rollout.vllm.engine import VLLMEngine

    with pytest.raises(UserError, match=r"config\.json is missing"):
        VLLMEngine(tmp_path)


def test_the_users_variables_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    monkeypatch.delenv("VLLM_NO_USAGE_STATS", raising=False)
    set_environment(own_process=True)
    assert (os.environ["VLLM_LOGGING_LEVEL"], os.environ["VLLM_NO_USAGE_STATS"]) == ("INFO", "1")

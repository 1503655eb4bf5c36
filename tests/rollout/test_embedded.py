"""The embedded engine keeps to the contract, and its waves and compaction change no token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from posttrain.data.layout import SequenceLayout
from posttrain.model.modeling import MiniMaxText01ForCausalLM
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.types import RolloutEngine, RolloutRequest
from tests.model.small import packed, small_model
from tests.rollout.contract import EngineContract, mixed_requests, request


def new_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> MiniMaxText01ForCausalLM:
    """Two lightning layers around a softmax layer, logits spread out but not certain."""
    return small_model(seed, dtype, initializer_range=0.15, vocab_size=24).eval()


class TestEmbeddedEngine(EngineContract):
    vocab_size = 24

    def engine(self, **options: Any) -> RolloutEngine:
        return EmbeddedEngine(new_model(), version=3, **options)

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


@pytest.mark.parametrize("options", [{"max_batch_size": n} for n in (1, 3, 7)] + [{"max_batch_tokens": n} for n in (1, 40, 150)])
def test_waves_of_any_size_and_rows_that_leave_change_no_token(options: dict[str, Any]) -> None:
    requests = mixed_requests()
    model = new_model(dtype=torch.float64)
    whole = EmbeddedEngine(model, return_routes=True).generate(requests)
    parts = EmbeddedEngine(model, return_routes=True, **options).generate(requests)
    assert len({len(output.token_ids) for output in whole}) > 4, "rows should leave at different times"
    for first, second in zip(whole, parts, strict=True):
        assert (first.request_id, first.token_ids, first.finish_reason) == (
            second.request_id,
            second.token_ids,
            second.finish_reason,
        )
        assert first.logprobs == pytest.approx(second.logprobs, abs=1e-12)
        assert first.routed_experts is not None and second.routed_experts is not None
        assert np.array_equal(first.routed_experts, second.routed_experts)


@pytest.mark.parametrize("options", [{"max_batch_size": 4}, {"max_batch_tokens": 150}])
def test_waves_keep_to_their_limits(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EmbeddedEngine(new_model(), **options)
    sizes: list[tuple[int, int]] = []
    prefill = EmbeddedEngine._prefill

    def counted(self: EmbeddedEngine, wave: Any, capacity: int) -> Any:
        sizes.append((len(wave), capacity))
        return prefill(self, wave, capacity)

    monkeypatch.setattr(EmbeddedEngine, "_prefill", counted)
    engine.generate(mixed_requests())
    assert sum(rows for rows, _ in sizes) == 18 and len(sizes) > 1
    for rows, capacity in sizes:
        assert rows <= engine.max_batch_size
        assert rows == 1 or rows * capacity <= engine.max_batch_tokens


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_logprobs_are_those_that_the_trainer_computes(temperature: float) -> None:
    """One packed pass over all prompts and answers, as the loss takes it."""
    model = new_model()
    requests = [request(f"r{i}", (1 + i % 5,) * (1 + i * 7 % 40), 30, temperature, seed=i) for i in range(16)]
    outputs = EmbeddedEngine(model).generate(requests)
    documents = [torch.tensor(r.prompt_ids + o.token_ids) for r, o in zip(requests, outputs, strict=True)]
    tokens, layout = packed(*documents)
    with torch.no_grad():
        trainer = model.token_logprobs(tokens, layout, temperature).split(list(layout.lengths))
    for asked, output, logprobs in zip(requests, outputs, trainer, strict=True):
        torch.testing.assert_close(torch.tensor(output.logprobs), logprobs[len(asked.prompt_ids) :], rtol=0, atol=2e-5)


def test_equal_prompts_are_taken_in_once(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[SequenceLayout] = []
    step = MiniMaxText01ForCausalLM.next_token_logits

    def counted(self: Any, tokens: Any, layout: SequenceLayout, *rest: Any) -> Any:
        taken.append(layout)
        return step(self, tokens, layout, *rest)

    monkeypatch.setattr(MiniMaxText01ForCausalLM, "next_token_logits", counted)
    EmbeddedEngine(new_model()).generate(
        [request(f"r{i}", (1, 2, 3, 4) if i % 2 else (9, 9), tokens=2, seed=i) for i in range(10)]
    )
    assert [sorted(layout.lengths) for layout in taken] == [[2, 4], [1] * 10]


def test_the_model_is_the_callers_own_and_left_as_it_was() -> None:
    model = new_model().train()
    engine = EmbeddedEngine(model, version=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = engine.generate([request("r", tokens=20)])[0]
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    # A step of the optimizer is seen at once; whoever makes it sets the version.
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    engine.weight_version = 2
    second = engine.generate([request("r", tokens=20)])[0]
    assert first.token_ids != second.token_ids and set(second.weight_versions) == {2}


def test_sampling_moves_no_generator() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    EmbeddedEngine(new_model_without_seeding()).generate(mixed_requests())
    assert torch.equal(torch.rand(1), expected)


def new_model_without_seeding() -> MiniMaxText01ForCausalLM:
    with torch.random.fork_rng():
        return new_model()


def test_a_bf16_model_samples_in_fp32() -> None:
    model = new_model(dtype=torch.bfloat16)
    asked: list[RolloutRequest] = [request(f"r{i}", tokens=20, seed=i) for i in range(8)]
    for output in EmbeddedEngine(model).generate(asked):
        tokens = torch.tensor((1, 2, 3) + output.token_ids)[None]
        with torch.no_grad():
            trainer = model.token_logprobs(tokens, SequenceLayout.from_lengths([tokens.shape[1]]))[3:]
        difference = (torch.tensor(output.logprobs) - trainer).abs()
        # bf16 activations differ by a rounding now and then; a head in bf16 would be wrong by 2^-8 of logits everywhere.
        assert difference.median() < 0.02 and difference.max() < 0.3

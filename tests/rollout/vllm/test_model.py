"""Our model in vLLM against the trainer's: in fp32, on a CPU, in this process."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.oracle import double, oracle
from tests.rollout.vllm import tiny

pytestmark = tiny.needs_vllm

TOLERANCE = 1e-5
"""Both sides are within 5e-6 of fp64, see `tiny.TINY`."""
ANSWER = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder and its model."""
    folder = tmp_path_factory.mktemp("vllm") / "tiny"
    return folder, tiny.write_tiny(folder)


@pytest.fixture(scope="module")
def expected(checkpoint: tuple[Path, Any]) -> list[list[int]]:
    """What the model's `generate` answers to the prompts."""
    return [tiny.greedy(checkpoint[1], prompt, ANSWER) for prompt in prompts()]


def prompts() -> list[list[int]]:
    """64 prompts of 1 to 600 tokens. The first half are so short that a state left behind outweighs what they bring along."""
    short = [prompt[: 1 + number % 4] for number, prompt in enumerate(tiny.mixed_prompts(32, seed=1))]
    mixed = short + tiny.mixed_prompts(32, seed=2)
    random.Random(3).shuffle(mixed)
    return mixed


def assert_agrees(
    model: Any, asked: list[list[int]], answers: list[tuple[list[int], list[float]]], tokens: list[list[int]] | None = None
) -> None:
    """Same tokens as `generate`, and log-probabilities of one pass over the whole document."""
    assert len(asked) == len(answers)
    for number, (prompt, (chosen, logprobs)) in enumerate(zip(asked, answers, strict=True)):
        wanted = tokens[number] if tokens is not None else tiny.greedy(model, prompt, len(chosen))
        assert chosen == wanted, f"prompt {number} of {len(prompt)} tokens"
        difference = (tiny.score(model, prompt, chosen) - torch.tensor(logprobs)).abs().max()
        assert difference < TOLERANCE, f"prompt {number} of {len(prompt)} tokens: {difference}"


def poison(llm: Any) -> None:
    """Fill every state of every slot with NaN, as the worst thing that an ended request can leave behind."""
    for module in tiny.inner_model(llm).modules():
        for state in getattr(module, "kv_cache", None) or () if hasattr(module, "rates") else ():
            state.fill_(float("nan"))


@contextmanager
def counted_preemptions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Ids of requests that were preempted."""
    from vllm.v1.core.sched.scheduler import Scheduler

    seen: list[str] = []
    original = Scheduler._preempt_request

    def counting(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(request.request_id)
        return original(self, request, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Scheduler, "_preempt_request", counting)
        yield seen


def test_mixed_prompts_in_chunks(checkpoint: tuple[Path, Any], expected: list[list[int]]) -> None:
    """A step takes 64 tokens of 16 requests at most, so that long prompts come in ten pieces, decodes beside them."""
    folder, model = checkpoint
    with tiny.tiny_engine(folder, max_num_batched_tokens=64) as llm:
        poison(llm)
        assert_agrees(model, prompts(), tiny.continuations(llm, prompts(), ANSWER), expected)


def test_against_the_equations(checkpoint: tuple[Path, Any]) -> None:
    """The fp64 oracle, which shares no code with either model: its likeliest tokens, and their log-probabilities."""
    folder, model = checkpoint
    tensors, asked = double(model.state_dict()), [prompt[:40] for prompt in prompts()[:10]]
    with tiny.tiny_engine(folder, max_num_batched_tokens=32, max_num_seqs=4) as llm:
        answers = tiny.continuations(llm, asked, 3)
    for prompt, (chosen, logprobs) in zip(asked, answers, strict=True):
        exact = oracle(tensors, model.config, prompt + chosen)[0].log_softmax(dim=-1)[len(prompt) - 1 : -1]
        assert exact.argmax(dim=-1).tolist() == chosen
        found = torch.tensor(logprobs, dtype=torch.float64)
        assert (exact.max(dim=-1).values - found).abs().max() < TOLERANCE


def test_a_state_left_behind_shows(checkpoint: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above sees what it is there to see: without clearing, it fails for most of the short prompts."""
    from posttrain.rollout.vllm.lightning import LightningMetadataBuilder

    folder, model = checkpoint
    short = [prompt for prompt in prompts() if len(prompt) <= 4]
    with tiny.tiny_engine(folder) as llm:
        tiny.continuations(llm, tiny.mixed_prompts(32, 200, seed=5), 2)
        monkeypatch.setattr(LightningMetadataBuilder, "_clear", lambda *_: None)
        answers = tiny.continuations(llm, short, ANSWER)
        wrong = [
            not torch.allclose(tiny.score(model, prompt, chosen), torch.tensor(logprobs), rtol=0, atol=100 * TOLERANCE)
            for prompt, (chosen, logprobs) in zip(short, answers, strict=True)
        ]
        assert sum(wrong) > len(short) / 2


def test_preemption(checkpoint: tuple[Path, Any], expected: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """With few blocks, requests lose theirs where they all need one more, and begin again; states of others lie in them."""
    folder, model = checkpoint
    with counted_preemptions(monkeypatch) as preempted, tiny.tiny_engine(folder, num_gpu_blocks_override=20) as llm:
        size = llm.llm_engine.vllm_config.cache_config.block_size
        draw = random.Random(5)
        near = [[draw.randrange(97) for _ in range(size - 1 - number % 6)] for number in range(24)]
        poison(llm)
        answers = tiny.continuations(llm, prompts() + near, ANSWER)
    assert len(preempted) >= 3
    assert_agrees(model, prompts(), answers[:64], expected)
    assert_agrees(model, near, answers[64:])


def test_requests_arrive_and_leave(checkpoint: tuple[Path, Any], expected: list[list[int]]) -> None:
    """Requests join running ones at any step, and a third of them are cancelled at any step, whose slots others get."""
    from vllm import SamplingParams

    folder, model = checkpoint
    draw, asked = random.Random(0), prompts()
    with tiny.tiny_engine(folder, max_num_batched_tokens=64, max_num_seqs=8) as llm:
        engine, waiting, done, running = llm.llm_engine, list(range(64)), {}, set()
        poison(llm)
        doomed = {number for number in range(64) if number % 3 == 2}
        while waiting or engine.has_unfinished_requests():
            for number in [waiting.pop(0) for _ in range(min(len(waiting), draw.randrange(4)))]:
                sampling = SamplingParams(temperature=0.0, max_tokens=ANSWER, logprobs=0, ignore_eos=True, detokenize=False)
                engine.add_request(str(number), {"prompt_token_ids": asked[number]}, sampling)
                running.add(number)
            for output in engine.step():
                if output.finished:
                    done[int(output.request_id)] = tiny.read(output)
                    running.discard(int(output.request_id))
            if running & doomed and draw.random() < 0.5:
                number = draw.choice(sorted(running & doomed))
                engine.abort_request([str(number)])
                running.discard(number)
    stayed = [number for number in range(64) if number in done]
    assert len(stayed) >= 64 - len(doomed)
    assert_agrees(model, [asked[n] for n in stayed], [done[n] for n in stayed], [expected[n] for n in stayed])


@pytest.mark.slow
def test_blocks_reused_by_a_thousand_requests(checkpoint: tuple[Path, Any], expected: list[list[int]]) -> None:
    """After so many, every block has held many requests."""
    folder, model = checkpoint
    with tiny.tiny_engine(folder, num_gpu_blocks_override=64) as llm:
        for seed in range(10):
            tiny.continuations(llm, tiny.mixed_prompts(100, 300, seed=100 + seed), 3)
        assert_agrees(model, prompts(), tiny.continuations(llm, prompts(), ANSWER), expected)


def test_a_shared_prefix_changes_nothing(checkpoint: tuple[Path, Any]) -> None:
    """States saved at the ends of blocks are those of the prefix, whoever computed it."""
    folder, model = checkpoint
    shared = tiny.mixed_prompts(4, 500, seed=7)[3]
    asked = [shared + tail for tail in ([1], [2, 3], list(range(40)), [5] * 90, [6])] + [shared[:300] + [1, 2, 3]]
    with tiny.tiny_engine(folder, enable_prefix_caching=True, max_num_batched_tokens=1024) as llm:
        config = llm.llm_engine.vllm_config.cache_config
        assert config.mamba_cache_mode == "align"
        poison(llm)
        tiny.continuations(llm, [shared], 1)
        answers = tiny.continuations(llm, asked, ANSWER)
        cached = [output.num_cached_tokens for output in _generate(llm, asked)]
    assert min(cached) >= 128, cached
    assert_agrees(model, asked, answers)


@pytest.mark.slow
def test_prefixes_under_pressure(checkpoint: tuple[Path, Any]) -> None:
    """Few blocks: prefixes are cached, evicted and computed again, in chunks, beside requests without any."""
    folder, model = checkpoint
    draw = random.Random(11)
    stems = [[draw.randrange(97) for _ in range(900)] for _ in range(4)]
    asked = []
    for _ in range(160):
        stem = draw.choice([*stems, []])
        asked.append(stem[: draw.randrange(1, 900)] + [draw.randrange(97) for _ in range(draw.choice([1, 2, 40]))])
    with tiny.tiny_engine(folder, enable_prefix_caching=True, num_gpu_blocks_override=60, max_num_batched_tokens=256) as llm:
        poison(llm)
        answers = tiny.continuations(llm, asked, 3)
        assert any(output.num_cached_tokens for output in _generate(llm, asked))
    assert_agrees(model, asked, answers)


def _generate(llm: Any, asked: list[list[int]]) -> list[Any]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
    return llm.generate([{"prompt_token_ids": prompt} for prompt in asked], sampling, use_tqdm=False)


def test_scores_of_prompts(checkpoint: tuple[Path, Any]) -> None:
    """`prompt_logprobs`, by which an engine scores given answers."""
    from vllm import SamplingParams

    folder, model = checkpoint
    prompt = tiny.mixed_prompts(4, 300, seed=9)[3]
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    with tiny.tiny_engine(folder, max_num_batched_tokens=64) as llm:
        output = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0]
    found = [step[token].logprob for step, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
    assert (tiny.score(model, prompt[:1], prompt[1:]) - torch.tensor(found)).abs().max() < TOLERANCE

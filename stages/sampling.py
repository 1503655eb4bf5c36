"""Drawing answers from a model: seeds, requests, and back to text."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from posttrain.config.errors import UserError
from posttrain.config.schema import SamplingSection
from posttrain.data.encode import encode_prompt
from posttrain.data.formats import VERIFIER_FIELDS
from posttrain.reward.types import Sample
from posttrain.rollout.noise import derive_seed
from posttrain.rollout.types import RolloutEngine, RolloutRequest, SamplingParams

FOREIGN = "\ufffd"
"""Stands for a special token inside an answer: shown, so that no verifier takes the rest of the answer for the whole."""


@dataclass(frozen=True)
class Answer:
    """One drawn answer.

    Attributes:
        prompt_ids, token_ids: as the engine saw and gave them, the stop token included.
        logprobs: of each token, under the distribution sampled from.
        text: the tokens' text without the stop token.
        finished: the model ended it itself.
        temperature: it was drawn at.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finished: bool
    temperature: float


def draw(
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Mapping[str, Any]]],
    sampling: SamplingSection,
    seeds: Sequence[tuple[int, ...]],
) -> list[list[Answer]]:
    """Answers to each prompt, `samples_per_prompt` of them, at the temperatures in turn.

    Args:
        engine: draws them.
        tokenizer: encodes prompts and decodes answers.
        prompts: messages up to the answer.
        sampling: numbers, temperatures, longest answer.
        seeds: of each prompt; a sample's noise is a function of its prompt's seed and its own number.
    """
    encoded = [tuple(encode_prompt(tokenizer, prompt)) for prompt in prompts]
    stop = int(tokenizer.eos_token_id)
    requests = []
    for number, (ids, seed) in enumerate(zip(encoded, seeds, strict=True)):
        for sample in range(sampling.samples_per_prompt):
            params = SamplingParams(
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperatures[sample % len(sampling.temperatures)],
                stop_token_ids=(stop,),
                seed=derive_seed(*seed, sample),
            )
            requests.append(RolloutRequest(f"{number}-{sample}", ids, params))
    answers = [
        Answer(
            request.prompt_ids,
            output.token_ids,
            output.logprobs,
            answer_text(tokenizer, output.token_ids),
            output.finish_reason == "stop",
            request.params.temperature,
        )
        for request, output in zip(requests, engine.generate(requests), strict=True)
    ]
    size = sampling.samples_per_prompt
    return [answers[start : start + size] for start in range(0, len(answers), size)]


def greedy(
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Mapping[str, Any]]],
    max_new_tokens: int,
) -> list[str]:
    """The most likely answer to each prompt, token by token."""
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0, stop_token_ids=(int(tokenizer.eos_token_id),))
    requests = [RolloutRequest(str(n), tuple(encode_prompt(tokenizer, prompt)), params) for n, prompt in enumerate(prompts)]
    return [answer_text(tokenizer, output.token_ids) for output in engine.generate(requests)]


def answer_text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """Text of generated tokens without the final stop token; special tokens inside are shown as `FOREIGN`."""
    ids = list(token_ids)
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    special = set(tokenizer.all_special_ids)
    pieces: list[list[int]] = [[]]
    for token in ids:
        if token in special:
            pieces.append([])
        else:
            pieces[-1].append(token)
    text = FOREIGN.join(str(tokenizer.decode(piece, clean_up_tokenization_spaces=False)) for piece in pieces)
    for spelled in tokenizer.all_special_tokens:  # letter by letter, from ordinary tokens
        text = text.replace(spelled, FOREIGN)
    return text


def as_sample(record: Mapping[str, Any], text: str) -> Sample:
    """An answer to a record's prompt, ready to be scored."""
    reference = {name: record[name] for name in VERIFIER_FIELDS if name in record}
    return Sample(prompt=record["prompt"], answer=text, reference=reference)


def require_prompts(records: Sequence[Mapping[str, Any]], ref: str) -> None:
    """UserError where a record of SOURCE/SPLIT has no prompt to answer."""
    if any("prompt" not in record for record in records):
        raise UserError(
            "a record has no prompt to answer", where=ref, instead="needs TRL's prompt-only or prompt-completion format"
        )


def stream(name: str) -> int:
    """A number for a name ("sft_short"), to keep the seeds of different uses apart; the same on every machine."""
    return zlib.crc32(name.encode())

"""On a CPU: our model against transformers' MiniMax, equal weights, in one process.

    python -m benchmarks.model_cpu [tiny|50m ...]

Both turn all dimensions of a head (transformers knows no other way), so that their logits can be seen to agree first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import MiniMaxConfig, MiniMaxForCausalLM

from benchmarks.record import alternating_medians, write_record
from posttrain.model.modeling import MiniMaxText01ForCausalLM
from posttrain.model.presets import preset
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.types import RolloutRequest, SamplingParams

TRAINING_TOKENS = 2048
PREFILL_TOKENS = 2048
NEW_TOKENS = 256
PROMPTS, SAMPLES = 4, 8
"""A batch of 32 rollouts as online RL asks for it: some samples of each prompt."""
PROMPT_TOKENS = 256
ANSWER_TOKENS = (8, 256)
"""Shortest and longest answer; lengths are log-uniform, as answers that end by themselves differ."""
UNIFORM_NEW_TOKENS = 64
AGREEMENT = 5e-5
"""Largest difference of logits, as a share of the largest: fp32 rounding, and slopes that differ at the seventh digit."""


def twins(name: str) -> tuple[MiniMaxText01ForCausalLM, MiniMaxForCausalLM]:
    """The preset in fp32 with full rotary, as our model and as transformers', holding equal weights."""
    config = preset(name)
    config.rotary_dim, config.dtype = config.head_dim, torch.float32
    torch.manual_seed(0)
    ours = MiniMaxText01ForCausalLM(config).float()
    theirs = MiniMaxForCausalLM(MiniMaxConfig(**config.to_native())).float()
    weights = {key.replace(".block_sparse_moe.", ".mlp."): tensor for key, tensor in ours.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {key for key, _ in theirs.named_buffers()}, (missing, unexpected)
    return ours, theirs


def largest_difference(ours: Any, theirs: Any, tokens: torch.Tensor) -> float:
    """Of the logits, as a share of the largest one."""
    with torch.no_grad():
        expected = theirs(tokens).logits
        return float((ours(tokens).logits - expected).abs().max() / expected.abs().max())


def training_step(model: Any, tokens: torch.Tensor) -> Callable[[], None]:
    """Forward, backward and AdamW on one row."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        model.train()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@torch.no_grad()
def prefill(model: Any, tokens: torch.Tensor) -> None:
    """Take a prompt into caches, with the logits of its last token."""
    model.eval()(tokens, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def generate(model: Any, tokens: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Greedy continuation by transformers' `generate`; nothing ends early."""
    mask = torch.ones_like(tokens)
    return model.eval().generate(
        tokens, attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )


def rollout(engine: EmbeddedEngine, tokens: torch.Tensor, lengths: Sequence[int]) -> None:
    """Greedy continuation by the embedded engine, each row by its own number of tokens."""
    engine.generate(
        [
            RolloutRequest(str(number), tuple(row), SamplingParams(max_new_tokens=length, temperature=0.0, stop_token_ids=()))
            for number, (row, length) in enumerate(zip(tokens.tolist(), lengths, strict=True))
        ]
    )


def compare(name: str, repeats: int) -> dict[str, Any]:
    """Medians in seconds of both, and ratios theirs / ours, of one preset."""
    ours, theirs = twins(name)
    generator = torch.Generator().manual_seed(1)

    def random(rows: int, length: int) -> torch.Tensor:
        return torch.randint(5, ours.config.vocab_size, (rows, length), generator=generator)

    difference = largest_difference(ours, theirs, random(1, 512))
    assert difference < AGREEMENT, f"logits differ by {difference}"
    prompt, long, row = random(1, 32), random(1, PREFILL_TOKENS), random(1, TRAINING_TOKENS)
    prompts = random(PROMPTS, PROMPT_TOKENS).repeat_interleave(SAMPLES, dim=0)
    shortest, longest = ANSWER_TOKENS
    steps = PROMPTS * SAMPLES - 1
    lengths = [round(shortest * (longest / shortest) ** (number / steps)) for number in range(steps + 1)]
    uniform = [UNIFORM_NEW_TOKENS] * len(lengths)
    short = random(len(lengths), 32)
    engine = EmbeddedEngine(ours.eval())
    measured = {
        "prefill": {"ours": lambda: prefill(ours, long), "theirs": lambda: prefill(theirs, long)},
        "generate": {"ours": lambda: generate(ours, prompt, NEW_TOKENS), "theirs": lambda: generate(theirs, prompt, NEW_TOKENS)},
        "rollout": {"ours": lambda: rollout(engine, prompts, lengths), "theirs": lambda: generate(theirs, prompts, longest)},
        "rollout_uniform": {
            "ours": lambda: rollout(engine, short, uniform),
            "theirs": lambda: generate(theirs, short, UNIFORM_NEW_TOKENS),
        },
        "training_step": {"ours": training_step(ours, row), "theirs": training_step(theirs, row)},
    }
    table: dict[str, Any] = {"parameters": ours.num_parameters(), "largest_difference_of_logits": difference}
    for what, runs in measured.items():
        seconds = alternating_medians(runs, repeats)  # type: ignore[arg-type]
        table[what] = {**seconds, "ratio": seconds["theirs"] / seconds["ours"]}
        print(
            f"{name:5s} {what:16s} ours {seconds['ours']:8.3f} s  theirs {seconds['theirs']:8.3f} s  {table[what]['ratio']:.2f}x",
            flush=True,
        )
    return table


def main() -> None:
    """Compare, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("presets", nargs="*", default=["tiny", "50m"])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    results = {name: compare(name, options.repeats) for name in options.presets}
    print(write_record("model_cpu", {"baseline": "transformers MiniMaxForCausalLM, sdpa, its default experts", **results}))


if __name__ == "__main__":
    main()

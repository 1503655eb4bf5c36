"""Tiny checkpoints, engines for them, and what the trainer's model says of the same tokens.

Import this before vLLM: it sets the variables that vLLM reads once.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from posttrain.data.layout import SequenceLayout
from posttrain.model.config_fields import M1, TEXT_01
from posttrain.model.configuration import CONFIGS
from posttrain.model.convert import convert
from posttrain.model.loading import causal_lm_class, save_weights
from posttrain.model.modeling import MiniMaxText01ForCausalLM
from posttrain.model.naming import Scheme

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; `make install WITH_VLLM=1` installs it"
)

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rotary_dim": 8,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 4096,
    "attn_type_list": [0, 1, 0],
    "intermediate_size": 48,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.15,
    "dtype": torch.float32,
}
"""Lightning, softmax, lightning. Weights are large enough for a wrong state to show, and small enough
that fp32 is within 5e-6 of fp64 in every log-probability (larger ones amplify roundings: 2e-5 at a range of 0.25)."""


def tiny_model(seed: int = 0, model_type: str = TEXT_01, **changes: Any) -> MiniMaxText01ForCausalLM:
    """A model of the sizes in `TINY`, in fp32, with norms that are not all ones."""
    config = CONFIGS[model_type](**{**TINY, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = causal_lm_class(config)(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
    return model.eval()


def write_tiny(
    folder: Path | str, seed: int = 0, scheme: Scheme = "posttrain", model_type: str = TEXT_01, **changes: Any
) -> MiniMaxText01ForCausalLM:
    """Write a tiny checkpoint and give back its model.

    Args:
        folder: does not exist, or is empty.
        seed: of the weights.
        scheme: names of the tensors; `native` needs `rotary_dim` equal to `head_dim`.
        model_type: `minimax_text_01` or `minimax_m1`.
        changes: sizes that differ from `TINY`.
    """
    model = tiny_model(seed, model_type, **changes)
    folder = Path(folder)
    own = folder if scheme == "posttrain" else folder.with_name(folder.name + "-own")
    save_tiny(model, own)
    if scheme != "posttrain":
        convert(own, folder, scheme)
    return model


def save_tiny(model: MiniMaxText01ForCausalLM, folder: Path | str) -> None:
    """Write config.json and weights, no tokenizer."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model.state_dict(), folder)
    model.config.architectures = ["MiniMaxM1ForCausalLM" if model.config.model_type == M1 else "MiniMaxText01ForCausalLM"]
    model.config.save_pretrained(folder)


def engine_arguments(folder: Path | str, **changes: Any) -> dict[str, Any]:
    """Arguments of vLLM's `LLM` for a tiny checkpoint on the CPU: token ids only, whole vocabulary, exact log-probabilities."""
    defaults: dict[str, Any] = {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 256,
        "enable_prefix_caching": False,
        "logprobs_mode": "processed_logprobs",
        "kv_cache_memory_bytes": 64 << 20,
        "seed": 0,
        "disable_log_stats": True,
    }
    return {**defaults, **changes}


@contextmanager
def tiny_engine(folder: Path | str, **changes: Any) -> Iterator[Any]:
    """A `vllm.LLM` in this process (unless the environment says otherwise), shut down at the end."""
    from vllm import LLM

    with mock.patch.object(gc, "collect", lambda *_: 0):  # see below
        llm = LLM(**engine_arguments(folder, **changes))
    try:
        yield llm
    finally:
        # vLLM collects garbage eight times between start and end, over everything ever imported, 0.4 s each. Once will do.
        with mock.patch.object(gc, "collect", lambda *_: 0):
            shut_down(llm)
            del llm
        gc.unfreeze()
        gc.collect()


def shut_down(llm: Any) -> None:
    """End an engine and free what it holds, so that the next one of this process finds no process group."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()


def inner_model(llm: Any) -> Any:
    """The model object of an engine in this process."""
    return runner_of(llm).model


def runner_of(llm: Any) -> Any:
    """The model runner of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def mixed_prompts(count: int = 64, longest: int = 600, vocab_size: int = 97, seed: int = 0) -> list[list[int]]:
    """Token ids of `count` prompts of 1 to `longest` tokens, short ones the most frequent, both extremes present."""
    draw = random.Random(seed)
    lengths = [1, 1, 2, longest, *(round(longest ** draw.random()) for _ in range(count))][:count]
    return [[draw.randrange(vocab_size) for _ in range(length)] for length in lengths]


@torch.no_grad()
def score(model: MiniMaxText01ForCausalLM, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """Log-probability of every token of the answer under the trainer's model, in one pass over the whole document, [len]."""
    tokens = torch.tensor([[*prompt, *answer]])
    layout = SequenceLayout.from_lengths([tokens.shape[1]])
    logits = model(tokens, layout=layout).logits[0]
    chosen = logits.log_softmax(dim=-1)[len(prompt) - 1 : -1]
    return chosen.gather(1, torch.tensor(answer)[:, None]).squeeze(1)


@torch.no_grad()
def greedy(model: MiniMaxText01ForCausalLM, prompt: Sequence[int], tokens: int) -> list[int]:
    """What the trainer's model continues a prompt with, by `generate`."""
    given = torch.tensor([list(prompt)])
    out = model.generate(
        given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=tokens, eos_token_id=None, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def continuations(
    llm: Any, prompts: Sequence[Sequence[int]], tokens: int = 8, **params: Any
) -> list[tuple[list[int], list[float]]]:
    """Greedy continuations of all prompts at once, with the log-probability of each token."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        **{"temperature": 0.0, "max_tokens": tokens, "logprobs": 0, "ignore_eos": True, "detokenize": False} | params
    )
    outputs = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], sampling, use_tqdm=False)
    return [read(output) for output in outputs]


def read(output: Any) -> tuple[list[int], list[float]]:
    """Tokens and their log-probabilities of one of vLLM's outputs."""
    sample = output.outputs[0]
    tokens = list(sample.token_ids)
    return tokens, [step[token].logprob for step, token in zip(sample.logprobs, tokens, strict=True)]

"""On one GPU: the model in vLLM with our plugin, beside vLLM 0.23.0, the last release with a model of its own.

    python -m benchmarks.serving_gpu --own SITE_026 --peer SITE_023 [--rows plugin native rollouts int8 fp8 parity transfer]

SITE_* are folders of packages put in front of the path of a row's process (an environment of its own has none: leave them out and
the rows run with what is installed). Every row is a process of its own, on the same card, one after the other, with random
weights of 4.7 B parameters: 16 layers (7 lightning and 1 softmax, twice), hidden 2,048, 16 heads of 128, 4 KV heads, 16 experts
top-2 of 2,816, vocabulary 32,000. Speeds are medians of `--repeats` runs after a warm-up of the same shape.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROWS = ("native", "plugin", "rollouts", "int8", "fp8", "parity", "transfer")
LOADS = {"256 x (256 + 512)": (256, 256, 512), "16 x (16384 + 8)": (16, 16_384, 8), "1 x (128 + 256)": (1, 128, 256)}
"""Name: requests, prompt tokens, generated tokens."""
QUANTISED = {"int8": "experts_int8", "fp8": "fp8"}
MAX_LENGTH = 17_408
VOCABULARY = 32_000
MARK = "record: "
"""Begins the line of a row's process that holds its figures; vLLM logs to the same stream."""


def configuration(tiny: bool) -> Any:
    """The model of 4.7 B parameters, or one of the same structure for a try without a GPU."""
    from posttrain.model.configuration import MiniMaxText01Config

    sizes: dict[str, Any] = {"hidden_size": 2048, "num_attention_heads": 16, "intermediate_size": 2816, "num_local_experts": 16}
    if tiny:
        sizes = {"hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 128, "num_local_experts": 4}
    return MiniMaxText01Config(
        **sizes,
        vocab_size=VOCABULARY,
        num_hidden_layers=16,
        num_key_value_heads=4,
        head_dim=32 if tiny else 128,
        rotary_dim=32 if tiny else 128,  # vLLM 0.23 reads transformers' own configuration, which rotates whole heads
        rope_theta=1e6,
        max_position_embeddings=32_768,
        attn_type_list=[0, 0, 0, 0, 0, 0, 0, 1] * 2,
    )


def write_configuration(folder: Path, tiny: bool) -> None:
    """config.json under transformers' names, which both versions of vLLM read."""
    fields = {**configuration(tiny).to_native(), "architectures": ["MiniMaxForCausalLM"], "torch_dtype": "bfloat16"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")


def prompts_of(count: int, length: int, seed: int) -> list[list[int]]:
    """Random token ids."""
    drawn = random.Random(seed)
    return [[drawn.randrange(1, VOCABULARY) for _ in range(length)] for _ in range(count)]


def speeds(generate: Callable[[list[list[int]], int], None], loads: Sequence[str], repeats: int, shrink: int) -> dict[str, Any]:
    """Seconds and tokens a second of each load.

    Args:
        generate: continues prompts by a number of tokens each.
        loads: names in `LOADS`.
        repeats: timed runs.
        shrink: prompts and answers are so many times shorter (for a try).
    """
    found: dict[str, Any] = {}
    for name in loads:
        requests, prompt, answer = LOADS[name]
        requests, prompt, answer = max(requests // shrink, 1), max(prompt // shrink, 1), max(answer // shrink, 1)
        generate(prompts_of(requests, prompt, seed=0), answer)
        seconds = []
        for repeat in range(repeats):
            fresh = prompts_of(requests, prompt, seed=1 + repeat)
            started = time.perf_counter()
            generate(fresh, answer)
            seconds.append(time.perf_counter() - started)
        median = statistics.median(seconds)
        found[name] = {
            "seconds": seconds,
            "output_tokens_per_second": requests * answer / median,
            "prompt_tokens_per_second": requests * prompt / median,
        }
        print(name, json.dumps(found[name]), file=sys.stderr, flush=True)
    return found


def offline(folder: Path, quantization: str | None, seqs: int = 256) -> Callable[[list[list[int]], int], None]:
    """vLLM's own `LLM`, whichever version is installed, with random weights and the log-probability of every token."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=MAX_LENGTH,
        max_num_seqs=seqs,
        max_num_batched_tokens=8192,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.85,
        quantization=quantization,
        seed=0,
    )

    def generate(prompts: list[list[int]], answer: int) -> None:
        params = SamplingParams(max_tokens=answer, ignore_eos=True, detokenize=False, logprobs=0, temperature=1.0)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == answer for output in outputs)

    return generate


def rollouts(folder: Path) -> Callable[[list[list[int]], int], None]:
    """Our rollout engine, with its own noise."""
    from posttrain.rollout.types import RolloutRequest, SamplingParams
    from posttrain.rollout.vllm.engine import VLLMEngine

    engine = VLLMEngine(folder, max_length=MAX_LENGTH, arguments={"load_format": "dummy", **_memory(0.85)})

    def generate(prompts: list[list[int]], answer: int) -> None:
        requests = [RolloutRequest(str(n), tuple(ids), SamplingParams(answer, 1.0, seed=n)) for n, ids in enumerate(prompts)]
        assert all(len(output.token_ids) == answer for output in engine.generate(requests))

    return generate


def _memory(share: float) -> dict[str, Any]:
    import torch

    return {"gpu_memory_utilization": share} if torch.cuda.is_available() else {}


def parity(shrink: int) -> dict[str, Any]:
    """Log-probabilities of the engine, also quantised, beside the trainer's forward pass in bf16 on the same tokens.

    The model is `small` with a head scaled up until a token's perplexity is that of a trained model (a few candidates).
    """
    import torch

    from benchmarks.small_gpu import placeholder_tokenizer
    from posttrain.data.layout import SequenceLayout
    from posttrain.model.loading import load_causal_lm, save_model
    from posttrain.model.modeling import MiniMaxText01ForCausalLM
    from posttrain.model.presets import preset
    from posttrain.rollout.types import RolloutRequest, SamplingParams
    from posttrain.rollout.vllm.engine import VLLMEngine

    on_gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    made = MiniMaxText01ForCausalLM(preset("small" if on_gpu else "tiny"))
    with torch.no_grad():
        made.lm_head.weight.mul_(8.0)
    requests = [
        RolloutRequest(str(n), tuple(t % made.config.vocab_size for t in ids), SamplingParams(256 // shrink, 1.0, seed=n))
        for n, ids in enumerate(prompts_of(64 // min(shrink, 8), 128 // shrink, seed=5))
    ]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made.config.dtype = torch.bfloat16 if on_gpu else torch.float32
        made.to(made.config.dtype)
        save_model(made, placeholder_tokenizer(made.config.vocab_size), folder)
        drawn = {}
        for kind in ("bf16", *(QUANTISED if on_gpu else ())):
            more = {"quantization": QUANTISED[kind]} if kind in QUANTISED else {}
            engine = VLLMEngine(folder, max_length=2048, arguments={**more, **_memory(0.4)})
            started = time.perf_counter()
            drawn[kind] = engine.generate(requests)
            seconds = time.perf_counter() - started
            found[kind] = {"tokens_per_second": sum(len(o.token_ids) for o in drawn[kind]) / seconds}
            engine.close()
        model = load_causal_lm(folder).to("cuda" if on_gpu else "cpu").eval()
    for kind, outputs in drawn.items():
        ours: list[float] = []
        theirs: list[float] = []
        for request, output in zip(requests, outputs, strict=True):
            ids = torch.tensor([[*request.prompt_ids, *output.token_ids]], device=model.device)
            layout = SequenceLayout.from_lengths([ids.shape[1]], model.device)
            with torch.inference_mode():
                logprobs = model.token_logprobs(ids, layout)
            ours += logprobs[len(request.prompt_ids) :].tolist()
            theirs += output.logprobs
        found[kind] |= compare(ours, theirs)
    return found


def compare(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Mean |difference| and mean difference of log-probabilities, Pearson of probabilities, mean entropy estimate."""
    import numpy as np

    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    return {
        "tokens": len(a),
        "mean_abs_difference": float(np.abs(a - b).mean()),
        "mean_difference": float((b - a).mean()),
        "largest_difference": float(np.abs(a - b).max()),
        "pearson_of_probabilities": float(np.corrcoef(np.exp(a), np.exp(b))[0, 1]),
        "mean_negative_logprob": float(-a.mean()),
    }


def transfer(folder: Path, tiny: bool) -> dict[str, Any]:
    """Seconds to move all weights of a trainer's model, in this process, to the engine in its own, checksums included."""
    import torch

    from posttrain.model.modeling import MiniMaxText01ForCausalLM
    from posttrain.rollout.vllm.backends import IPC_BACKEND
    from posttrain.rollout.vllm.device_updates import DeviceWeights, IPCLink
    from posttrain.rollout.vllm.engine import VLLMEngine
    from posttrain.rollout.weights.source import ModelSource

    on_gpu = torch.cuda.is_available()
    arguments: dict[str, Any] = {"load_format": "dummy"}
    if on_gpu:
        arguments |= {"gpu_memory_utilization": 0.35, "weight_transfer_config": {"backend": IPC_BACKEND}}
    engine = VLLMEngine(folder, max_length=2048, max_batch_size=32, arguments=arguments)
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if on_gpu else "cpu"):
        model = MiniMaxText01ForCausalLM(configuration(tiny))
    torch.set_default_dtype(torch.float32)
    weights = DeviceWeights(engine._llm, IPCLink()) if on_gpu else engine._weights
    seconds = []
    for version in range(1, 5):
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        weights.update(ModelSource(model, version=version))
        seconds.append(time.perf_counter() - started)
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    engine.close()
    return {
        "seconds": seconds,
        "median_seconds": statistics.median(seconds[1:]),
        "bytes": sum(sizes),
        "verified": "sum64 of every tensor",
    }


def run_row(row: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row, in this process."""
    import torch

    folder = Path(tempfile.mkdtemp()) / "model"
    write_configuration(folder, options.tiny)
    shrink = 64 if options.tiny else 1
    if row == "parity":
        found = parity(shrink=16 if options.tiny else 1)
    elif row == "transfer":
        found = transfer(folder, options.tiny)
    elif row == "rollouts":
        found = speeds(rollouts(folder), list(LOADS)[:1], options.repeats, shrink)
    else:
        loads = list(LOADS) if row in ("native", "plugin") else list(LOADS)[:1]
        found = speeds(offline(folder, QUANTISED.get(row)), loads, options.repeats, shrink)
    import vllm

    return {"vllm": vllm.__version__, "torch": torch.__version__, **found}


def main() -> None:
    """Run the rows one after the other, each in its own process; print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--row", choices=ROWS, help="run one row in this process and print its record")
    parser.add_argument("--own", default="", help="folder of packages with vLLM 0.26.0")
    parser.add_argument("--peer", default="", help="folder of packages with vLLM 0.23.0, for the row native")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--limit", type=float, default=400.0, help="seconds of a row at most")
    parser.add_argument("--tiny", action="store_true", help="a try without a GPU: a tiny model and short loads, nothing recorded")
    parser.add_argument("--out", type=Path, default=None, help="folder of the record")
    options = parser.parse_args()
    if options.row:
        print(MARK + json.dumps(run_row(options.row, options)), flush=True)
        return
    from benchmarks.record import write_record

    results: dict[str, Any] = {}
    for row in options.rows:
        site = options.peer if row == "native" else options.own
        path = os.pathsep.join(part for part in (site, os.getcwd(), os.environ.get("PYTHONPATH", "")) if part)
        command = [sys.executable, "-m", "benchmarks.serving_gpu", "--row", row, "--repeats", str(options.repeats)]
        command += ["--tiny"] if options.tiny else []
        environment = {**os.environ, "PYTHONPATH": path, "VLLM_USE_FLASHINFER_SAMPLER": "0"}
        started = time.monotonic()
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=options.limit)
            printed, errors = done.stdout.splitlines(), done.stderr
        except subprocess.TimeoutExpired as error:
            printed, errors = [], f"{(error.stderr or b'').decode(errors='replace')}\nno end within {options.limit:g} s"
        found = [line.removeprefix(MARK) for line in printed if line.startswith(MARK)]
        results[row] = json.loads(found[-1]) if found else {"failed": [*printed[-20:], *errors.splitlines()[-40:]]}
        print(f"{row} ({time.monotonic() - started:.0f} s)", json.dumps(results[row], indent=1), flush=True)
        if not options.tiny:
            write_record("serving_gpu", results, options.out)


if __name__ == "__main__":
    main()

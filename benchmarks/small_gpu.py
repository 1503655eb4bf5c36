"""On one GPU: `small` trained on packs of 32k tokens, by our SFT stage and by TRL's SFTTrainer, beside transformers' MiniMax.

    python -m benchmarks.small_gpu [--steps 100] [--trl-steps 100] [--tokens 32768] [--rows posttrain trl-ours trl-transformers]

Every row runs in a process of its own. All keep fp32 weights (ours under ZeRO: bf16 weights with fp32 masters), multiply in
bf16, recompute whole blocks, and see the same documents: random lengths, tokens from one random bigram table, so that there
is something to learn. transformers' MiniMax is given each pack as one document, because it has no way to keep them apart.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import write_record

ROWS = ("posttrain", "trl-ours", "trl-transformers")
WARMUP_STEPS = 3
"""Steps before the clock starts: compilation, allocation, optimizer states."""


def bigram_documents(vocab_size: int, tokens: int, seed: int, branches: int = 4) -> list[list[int]]:
    """Documents that add up to at least `tokens`: lengths log-uniform in 256..8192, each token one of 4 successors of the last.

    The loss of a perfect model is log(4) = 1.39.
    """
    generator = torch.Generator().manual_seed(seed)
    successors = torch.randint(0, vocab_size, (vocab_size, branches), generator=torch.Generator().manual_seed(7))
    total, lengths = 0, []
    while total < tokens:
        length = int(256 * 32 ** torch.rand((), generator=generator).item())
        lengths.append(length)
        total += length
    current = torch.randint(0, vocab_size, (len(lengths),), generator=generator)
    columns = [current]
    for _ in range(max(lengths) - 1):
        choice = torch.randint(0, branches, (len(lengths),), generator=generator)
        current = successors[current, choice]
        columns.append(current)
    table = torch.stack(columns, dim=1)
    return [table[row, :length].tolist() for row, length in enumerate(lengths)]


def packs_of(documents: Sequence[list[int]], tokens: int, count: int) -> list[list[list[int]]]:
    """`count` packs of exactly `tokens` tokens: documents one after the other; one that does not fit is cut in two."""
    packs: list[list[list[int]]] = []
    rest = deque(documents)
    while len(packs) < count:
        pack, room = [], tokens
        while room:
            document = rest.popleft()
            if len(document) > room:
                rest.appendleft(document[room:])
            pack.append(document[:room])
            room -= len(pack[-1])
        packs.append(pack)
    return packs


class Clock:
    """Seconds and losses of steps, for a `TrainerCallback`."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def tick(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def seconds_per_step(self) -> float:
        """Median after the warm-up."""
        steps = sorted(b - a for a, b in zip(self.ends[WARMUP_STEPS - 1 :], self.ends[WARMUP_STEPS:], strict=False))
        return steps[len(steps) // 2]


def callback(clock: Clock) -> Any:
    """Ticks at the end of every step."""
    from transformers import TrainerCallback

    class Ticking(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.tick()

    return Ticking()


def run_posttrain(name: str, packs: list[list[list[int]]], tokens: int, folder: Path) -> tuple[Clock, list[float]]:
    """Our SFT stage, ZeRO-2 on one rank (bf16 weights, fp32 master weights)."""
    from posttrain.config.schema import RunConfig
    from posttrain.data.encode import Document
    from posttrain.model.loading import load_causal_lm, save_model
    from posttrain.model.modeling import MiniMaxText01ForCausalLM
    from posttrain.model.presets import preset
    from posttrain.stages.job import StageJob
    from posttrain.stages.metrics import read_metrics
    from posttrain.stages.packs import Group, PackedDataset
    from posttrain.stages.sft import SFTStageTrainer

    for key, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
    }.items():
        os.environ.setdefault(key, value)
    torch.manual_seed(0)
    tokenizer = placeholder_tokenizer(preset(name).vocab_size)
    save_model(MiniMaxText01ForCausalLM(preset(name)).to(torch.bfloat16), tokenizer, folder / "base")
    stage = {
        "kind": "sft",
        "data": {"bigrams/train": 1.0},
        "steps": len(packs),
        "max_length": tokens,
        "pack_length": tokens,
        "gradient_checkpointing": "block",
        "logging_steps": 1,
        "save_steps": 10 * len(packs),
        "optim": {"learning_rate": 3e-4, "warmup_steps": 10},
    }
    config = RunConfig.model_validate(
        {
            "name": "benchmark",
            "sources": {"bigrams": {"kind": "jsonl", "path": "unused.jsonl", "splits": {"train": 1}}},
            "eval": {"source": "bigrams/train"},
            "resources": {"zero_stage": 2, "gpus_per_worker": 1},
            "stages": {"sft": stage},
        }
    )
    job = StageJob("sft", config, folder / "sft", {"init": folder / "base"}, folder / "metrics.jsonl")
    groups = [Group((Document(document, list(document)),)) for pack in packs for document in pack]
    places, start = [], 0
    for pack in packs:
        places.append(list(range(start, start + len(pack))))
        start += len(pack)
    clock = Clock()
    trainer = SFTStageTrainer(job, load_causal_lm(folder / "base"), tokenizer, PackedDataset(groups, places))
    trainer.add_callback(callback(clock))
    trainer.run()
    return clock, [record["value"] for record in read_metrics(job.metrics_path) if record["name"] == "loss"]


def run_trl(name: str, packs: list[list[list[int]]], folder: Path, ours: bool) -> tuple[Clock, list[float]]:
    """TRL's SFTTrainer, fp32 weights under bf16 autocast; our model gets its documents' positions, transformers' one document."""
    from datasets import Dataset
    from transformers import MiniMaxConfig, MiniMaxForCausalLM
    from trl import SFTConfig, SFTTrainer

    from posttrain.model.modeling import MiniMaxText01ForCausalLM
    from posttrain.model.presets import preset

    config = preset(name)
    config.dtype = torch.float32
    torch.manual_seed(0)
    if ours:
        model: Any = MiniMaxText01ForCausalLM(config)
    else:
        config.rotary_dim = config.head_dim
        model = MiniMaxForCausalLM(MiniMaxConfig(**config.to_native()))
    rows: dict[str, list[Any]] = {"input_ids": [[token for document in pack for token in document] for pack in packs]}
    rows["labels"] = rows["input_ids"]

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([row["input_ids"] for row in batch])
        found = {"input_ids": ids, "labels": ids.clone()}
        if ours:
            found["position_ids"] = torch.tensor([[p for n in row["lengths"] for p in range(n)] for row in batch])
        else:
            found["attention_mask"] = torch.ones_like(ids)
        return found

    rows["lengths"] = [[len(document) for document in pack] for pack in packs]
    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=len(packs),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        max_length=None,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        optim="adamw_torch_fused",
        learning_rate=3e-4,
        warmup_steps=10,
        adam_beta2=0.95,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    clock = Clock()
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(rows),
        data_collator=collate,
        processing_class=placeholder_tokenizer(config.vocab_size),
        callbacks=[callback(clock)],
    )
    trainer.train()
    return clock, [record["loss"] for record in trainer.state.log_history if "loss" in record]


def run_row(row: str, name: str, steps: int, tokens: int) -> dict[str, Any]:
    """One row, in this process."""
    from posttrain.model.presets import preset

    vocabulary = preset(name).vocab_size
    packs = packs_of(bigram_documents(vocabulary, tokens * (steps + 1), seed=3), tokens, steps)
    with tempfile.TemporaryDirectory() as folder:
        if row == "posttrain":
            clock, losses = run_posttrain(name, packs, tokens, Path(folder))
        else:
            clock, losses = run_trl(name, packs, Path(folder), ours=row == "trl-ours")
    seconds = clock.seconds_per_step()
    return {
        "steps": len(losses),
        "seconds_per_step": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        "first_loss": losses[0],
        "last_loss": sum(losses[-5:]) / len(losses[-5:]),
        "loss_of_a_uniform_guess": math.log(vocabulary),
    }


def placeholder_tokenizer(vocab_size: int) -> Any:
    """A tokenizer that nothing is tokenised with; trainers and checkpoints want one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<eos>": 0, **{f"t{n}": n for n in range(1, vocab_size)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>")), eos_token="<eos>", pad_token="<eos>"
    )


def main() -> None:
    """Run the rows one after the other, each in its own process; print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--trl-steps", type=int, default=None, help="steps of TRL's rows (default: as many)")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--row", choices=ROWS, help="run one row in this process and print its record")
    parser.add_argument("--out", type=Path, default=None, help="folder of the record")
    options = parser.parse_args()
    if options.row:
        print(json.dumps(run_row(options.row, options.preset, options.steps, options.tokens)))
        return
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.small_gpu needs an NVIDIA GPU with 80 GB")
    results: dict[str, Any] = {}
    for row in options.rows:
        steps = options.steps if row == "posttrain" or options.trl_steps is None else options.trl_steps
        command = [
            sys.executable,
            "-m",
            "benchmarks.small_gpu",
            "--row",
            row,
            "--preset",
            options.preset,
            "--steps",
            str(steps),
            "--tokens",
            str(options.tokens),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = done.stdout.strip().splitlines()
        results[row] = json.loads(lines[-1]) if done.returncode == 0 else {"failed": done.stderr.strip().splitlines()[-30:]}
        print(row, json.dumps(results[row]), flush=True)
        write_record("small_gpu", {"preset": options.preset, "tokens": options.tokens, **results}, options.out)


if __name__ == "__main__":
    main()

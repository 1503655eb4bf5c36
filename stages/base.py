"""The model that a run starts from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from posttrain.config.schema import RunConfig
from posttrain.data.sources import load_split
from posttrain.data.tokenizer import load_tokenizer, train_tokenizer
from posttrain.model.loading import load_causal_lm, new_model, save_model
from posttrain.stages.job import StageJob


def make_base_model(job: StageJob, folder: Path) -> None:
    """Write tokenizer and initial model into `folder`.

    With `model.path`, a copy of that checkpoint, read by the strict loader, so that a missing tensor or chat template
    is found before any training. Else a tokenizer trained on the records that the stages train on, and fresh weights.
    """
    section = job.config.model
    if section.path is not None:
        save_model(load_causal_lm(section.path), load_tokenizer(section.path), folder)
        return
    tokenizer = train_tokenizer(training_texts(job.config), job.config.tokenizer.vocab_size)
    model = new_model(
        section,
        len(tokenizer),
        job.config.seed,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    save_model(model, tokenizer, folder)


def training_texts(config: RunConfig) -> Iterator[str]:
    """Texts of messages that stages train on, `tokenizer.training_records` records of each source at most."""
    left: dict[str, int] = {}
    refs = dict.fromkeys(ref for stage in config.stages.values() for ref in stage.data)
    for ref in refs:
        source = ref.partition("/")[0]
        for record in load_split(config, ref)[: left.setdefault(source, config.tokenizer.training_records)]:
            left[source] -= 1
            yield from _texts(record)


def _texts(record: Mapping[str, Any]) -> Iterator[str]:
    for name in ("prompt", "completion", "chosen", "rejected", "messages"):
        for message in record.get(name, ()):
            yield message["content"]

"""Small models in folders, for commands that load them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from posttrain.data.tokenizer import train_tokenizer
from posttrain.model.configuration import MiniMaxText01Config
from posttrain.model.loading import save_model
from posttrain.model.modeling import MiniMaxText01ForCausalLM, MiniMaxText01ForSequenceClassification
from posttrain.reward.heads import Heads

TOKENIZER = train_tokenizer(["What is 12 + 34? 46"], 300)


def write_reward_model(folder: Path, heads: Heads) -> Path:
    """A reward model with random weights that tell answers apart."""
    torch.manual_seed(0)
    labels = dict(enumerate(heads.labels()))
    config = _config(num_labels=len(heads), id2label=labels, label2id={label: n for n, label in labels.items()})
    save_model(MiniMaxText01ForSequenceClassification(config), TOKENIZER, folder)
    return folder


def write_language_model(folder: Path) -> Path:
    """A language model, which is no reward model."""
    save_model(MiniMaxText01ForCausalLM(_config()), TOKENIZER, folder)
    return folder


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    """A JSON line a record."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _config(**options: Any) -> MiniMaxText01Config:
    return MiniMaxText01Config(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        rotary_dim=8,
        attn_type_list=[0, 1],
        intermediate_size=32,
        num_local_experts=4,
        initializer_range=0.5,
        **options,
    )

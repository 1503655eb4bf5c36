"""Making, loading and saving models. A missing, extra or misshapen tensor is an error that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.config.errors import UserError
from posttrain.config.schema import ModelSection
from posttrain.model.checkpoint_files import INDEX, WEIGHTS, config_fields, damaged_weights, refuse_misfits, weight_files
from posttrain.model.configuration import MiniMaxText01Config
from posttrain.model.modeling import MiniMaxText01ForCausalLM, MiniMaxText01ForSequenceClassification

SHARD_BYTES = 4 * 1024**3


def new_model(section: ModelSection, vocab_size: int, seed: int, **token_ids: int | None) -> MiniMaxText01ForCausalLM:
    """A model with fresh weights: a pure function of its arguments.

    Args:
        section: sizes.
        vocab_size: rows of embedding and head.
        seed: of the initial weights.
        token_ids: bos_token_id, eos_token_id, pad_token_id.
    """
    config = MiniMaxText01Config(
        vocab_size=vocab_size,
        hidden_size=section.hidden_size,
        num_hidden_layers=section.num_hidden_layers,
        num_attention_heads=section.num_attention_heads,
        num_key_value_heads=section.num_key_value_heads,
        head_dim=section.head_dim,
        rotary_dim=section.rotary_dim,
        rope_theta=section.rope_theta,
        max_position_embeddings=section.max_position_embeddings,
        intermediate_size=section.intermediate_size,
        num_local_experts=section.num_local_experts,
        num_experts_per_tok=section.num_experts_per_tok,
        attn_type_list=[int((i + 1) % section.softmax_every == 0) for i in range(section.num_hidden_layers)],
        rms_norm_eps=section.rms_norm_eps,
        initializer_range=section.initializer_range,
        dtype=section.dtype,
        **token_ids,  # type: ignore[arg-type]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MiniMaxText01ForCausalLM(config)
    return _cast(model, getattr(torch, section.dtype))


def load_config(folder: Path | str) -> MiniMaxText01Config:
    """The configuration of a checkpoint folder. UserError where config.json is missing, broken or of another model."""
    fields = config_fields(folder)
    try:
        return MiniMaxText01Config.from_dict(fields)
    except ValueError as error:
        raise UserError(str(error), where=str(Path(folder) / "config.json")) from None


def load_causal_lm(folder: Path | str) -> MiniMaxText01ForCausalLM:
    """The language model of a checkpoint folder, in the type its configuration names, on the CPU."""
    return _load(MiniMaxText01ForCausalLM, folder, load_config(folder))


def load_reward_model(folder: Path | str, *, from_causal_lm: bool = False) -> MiniMaxText01ForSequenceClassification:
    """The reward model of a checkpoint folder; with `from_causal_lm`, the trunk of a language model under a zero head.

    A zero head scores every answer alike, so training starts from no opinion and from no seed.
    """
    config = load_config(folder)
    config.num_labels = 1
    if not from_causal_lm:
        return _load(MiniMaxText01ForSequenceClassification, folder, config)
    trunk = load_causal_lm(folder)
    model = _load_class(MiniMaxText01ForSequenceClassification, config)
    model.model = trunk.model
    nn.init.zeros_(model.score.weight)
    return model


def load_weights(model: nn.Module, folder: Path | str) -> None:
    """Fill a model from the safetensors of a folder; UserError naming every missing, extra or misshapen tensor (three shown)."""
    tensors = read_tensors(folder)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    refuse_misfits({name: tensor.shape for name, tensor in tensors.items()}, expected, folder)
    model.load_state_dict(tensors, strict=True)


def read_tensors(folder: Path | str) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder, one file or sharded. UserError naming a missing or damaged file."""
    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        try:
            tensors.update(load_file(file))
        except (FileNotFoundError, SafetensorError) as error:
            raise damaged_weights(file, error) from None
    return tensors


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path | str,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write config, weights (safetensors, sharded above 4 GiB) and tokenizer; `state_dict` where a wrapper gathered it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(state_dict if state_dict is not None else model.state_dict(), folder)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_weights(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Write tensors under their own names, sharded above `SHARD_BYTES`."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / WEIGHTS, metadata={"format": "pt"})
        _remove_others(folder, {WEIGHTS})
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1))
    _remove_others(folder, {INDEX, *weight_map.values()})


def _remove_others(folder: Path, written: set[str]) -> None:
    """Remove weights of an earlier save: a reader that finds both an index and a single file takes either."""
    for path in [folder / INDEX, *folder.glob("model*.safetensors")]:
        if path.name not in written:
            path.unlink(missing_ok=True)


def _load(cls: type[Any], folder: Path | str, config: MiniMaxText01Config) -> Any:
    model = _load_class(cls, config)
    load_weights(model, folder)
    return model


def _load_class(cls: type[Any], config: MiniMaxText01Config) -> Any:
    with torch.random.fork_rng(devices=[]):
        model = cls(config)
    return _cast(model, config.dtype or torch.float32)


def _cast(model: Any, dtype: torch.dtype) -> Any:
    """Cast all but the router gates, which stay fp32."""
    model = model.to(dtype)
    for name, module in model.named_modules():
        if name.endswith("block_sparse_moe.gate"):
            module.float()
    return model

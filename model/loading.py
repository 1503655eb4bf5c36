"""Making, loading and saving models. A missing, extra or misshapen tensor is an error that names it.

A checkpoint of any of the three kinds (docs/checkpoints.md) is read tensor by tensor into the model's own memory, so loading
needs that and `STAGING_BYTES` more, whatever the size of the files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.config.errors import UserError
from posttrain.config.schema import ModelSection
from posttrain.model import registration, tensor_files
from posttrain.model.checkpoint_files import Checkpoint, Source, config_fields
from posttrain.model.configuration import CONFIGS, MiniMaxM1Config, MiniMaxText01Config
from posttrain.model.modeling import MiniMaxText01ForCausalLM, MiniMaxText01ForSequenceClassification
from posttrain.model.tensor_files import INDEX, WEIGHTS, Entry, RangeReader, plan_shards, write_index

SHARD_BYTES = 4 * 1024**3
STAGING_BYTES = 64 * 1024**2
"""Most that is read at once for a tensor of another type or device than the file's."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
    return fresh_model(config, seed)


def fresh_model(config: MiniMaxText01Config, seed: int) -> MiniMaxText01ForCausalLM:
    """A model of a configuration, in the type that it names (else fp32), with initial weights drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = causal_lm_class(config)(config)
    return _cast(model, config.dtype or torch.float32)


def empty_model(config: MiniMaxText01Config, cls: type[Any] | None = None) -> Any:
    """A model without memory, on the meta device; of the released size in well under a second.

    Args:
        config: sizes; its dtype, else fp32, is that of all parameters but the router gates.
        cls: class of the model; the language model by default.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = (cls or causal_lm_class(config))(config)
    return _cast(model, config.dtype or torch.float32)


def causal_lm_class(config: MiniMaxText01Config) -> type[MiniMaxText01ForCausalLM]:
    """The class of the language model of a configuration: M1's has another name."""
    return registration.MiniMaxM1ForCausalLM if isinstance(config, MiniMaxM1Config) else MiniMaxText01ForCausalLM


def reward_model_class(config: MiniMaxText01Config) -> type[MiniMaxText01ForSequenceClassification]:
    """The class of the reward model of a configuration."""
    if isinstance(config, MiniMaxM1Config):
        return registration.MiniMaxM1ForSequenceClassification
    return MiniMaxText01ForSequenceClassification


def load_config(folder: Path | str) -> MiniMaxText01Config:
    """The configuration of a checkpoint folder of any kind.

    Raises:
        UserError: config.json is missing, broken, of another model, or asks for what is not implemented.
    """
    fields = config_fields(folder)
    try:
        return CONFIGS[fields["model_type"]].from_dict(fields)
    except ValueError as error:
        raise UserError(str(error), where=str(Path(folder) / "config.json")) from None


def load_causal_lm(folder: Path | str) -> MiniMaxText01ForCausalLM:
    """The language model of a checkpoint folder of any kind, on the CPU.

    It is of the type that the configuration names, else of the type of the embedding in the files; router gates are fp32.

    Raises:
        UserError: see `load_config` and `load_weights`.
    """
    checkpoint, config = _open(folder)
    model = empty_model(config)
    sources = checkpoint.sources(_shapes(model))
    _allocate(model)
    _fill(model.state_dict(), sources)
    _take_generation_config(model, checkpoint.folder)
    return model


def load_reward_model(
    folder: Path | str, *, from_causal_lm: bool = False, labels: Sequence[str] | None = None
) -> MiniMaxText01ForSequenceClassification:
    """The reward model of a checkpoint folder; with `from_causal_lm`, the trunk of a language model under zero heads.

    A zero head scores every answer alike, so training starts from no opinion and from no seed.

    Args:
        folder: the checkpoint.
        from_causal_lm: it is a language model's.
        labels: names of the heads that a language model gets; one without a name by default. A reward model has those of its
            folder: as many as its `score.weight` has rows, named by its `id2label`.

    Raises:
        UserError: see `load_config` and `load_weights`.
    """
    checkpoint, config = _open(folder)
    stored = checkpoint.tensors.get("score.weight")
    if from_causal_lm or stored is None:
        config.num_labels = len(labels) if labels else 1
        if labels:
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: index for index, label in enumerate(labels)}
    else:
        config.num_labels = stored.shape[0]  # names that are as many stay
    model = empty_model(config, reward_model_class(config))
    shapes = _shapes(model)
    if from_causal_lm:
        del shapes["score.weight"]
        sources = checkpoint.sources({**shapes, "lm_head.weight": (config.vocab_size, config.hidden_size)})
        del sources["lm_head.weight"]
    else:
        sources = checkpoint.sources(shapes)
    _allocate(model)
    tensors = model.state_dict()
    if from_causal_lm:
        tensors.pop("score.weight").zero_()
    _fill(tensors, sources)
    return model


def load_weights(model: nn.Module, folder: Path | str) -> None:
    """Fill a model, wherever it lies, from a checkpoint folder; nothing is changed where something does not fit.

    Raises:
        UserError: a missing, extra or misshapen tensor (three are shown), a missing, damaged or mislabelled file.
    """
    sources = Checkpoint(folder).sources(_shapes(model))
    _fill(model.state_dict(), sources)


def read_tensors(folder: Path | str) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder, under the names and in the types of its files. UserError for a damaged file."""
    tensors = {}
    with RangeReader() as reader:
        for name, stored in Checkpoint(folder).tensors.items():
            tensors[name] = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
            reader.read_into(stored, 0, bytes_of(tensors[name]))
    return tensors


def fill_range(target: torch.Tensor, source: Source, start: int, reader: RangeReader) -> None:
    """Read elements of one of our tensors, casting where the types differ.

    Args:
        target: contiguous, of any shape, type and device; takes as many elements as it has.
        source: where they lie.
        start: the first of them.
        reader: counts what is read.
    """
    flat, stored = target.detach().view(-1), DTYPES[source.dtype]
    if flat.device.type == "cpu" and flat.dtype == stored:
        source.read(reader, start, bytes_of(flat))
        return
    step = STAGING_BYTES // stored.itemsize
    for begin in range(0, flat.numel(), step):
        part = flat[begin : begin + step]
        staging = torch.empty(part.shape, dtype=stored)
        source.read(reader, start + begin, bytes_of(staging))
        part.copy_(staging)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path | str,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write config, weights (safetensors, sharded above 4 GiB) and tokenizer, in our own scheme.

    Args:
        state_dict: written in place of the model's own tensors, where a wrapper gathered them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(state_dict if state_dict is not None else model.state_dict(), folder)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generation = getattr(model, "generation_config", None)
    if generation is not None and not generation.to_dict().get(
        "_from_model_config"
    ):  # transformers' mark: follows from config.json
        # Not save_pretrained, which refuses settings that released files do have (a temperature without do_sample).
        generation.to_json_file(folder / "generation_config.json", use_diff=True)


def save_weights(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write tensors under their own names, sharded above `SHARD_BYTES`; one of them at a time is copied to the CPU."""
    shards = plan_shards([entry_of(name, tensor) for name, tensor in tensors.items()], SHARD_BYTES)
    for file, entries in shards.items():
        save_file({entry.name: tensors[entry.name] for entry in entries}, folder / file)
    write_index(folder, shards)
    _remove_others(folder, {*shards, *([INDEX] if len(shards) > 1 else [])})


def save_file(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write one file of tensors."""
    entries = [entry_of(name, tensor) for name, tensor in tensors.items()]
    tensor_files.write_file(path, entries, lambda entry: [bytes_of(tensors[entry.name].detach().cpu().contiguous())])


def entry_of(name: str, tensor: torch.Tensor) -> Entry:
    """How a file describes a tensor."""
    return Entry(name, _NAMES[tensor.dtype], tuple(tensor.shape))


def _remove_others(folder: Path, written: set[str]) -> None:
    """Remove weights of an earlier save: a reader that finds both an index and a single file takes either."""
    for path in [folder / INDEX, *folder.glob("model*.safetensors")]:
        if path.name not in written:
            path.unlink(missing_ok=True)


def _open(folder: Path | str) -> tuple[Checkpoint, MiniMaxText01Config]:
    config = load_config(folder)
    checkpoint = Checkpoint(folder)
    embedding = checkpoint.tensors.get("model.embed_tokens.weight")
    if config.dtype is None and embedding is not None:  # M1's config.json names no type
        config.dtype = DTYPES[embedding.dtype]
    return checkpoint, config


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _allocate(model: nn.Module) -> None:
    """Give a model on the meta device memory of undefined content."""
    saved = set(model.state_dict())
    lost = [name for name, _ in model.named_buffers() if name not in saved]
    if lost:
        raise ValueError(f"{lost[0]} is a buffer that no checkpoint holds; compute it where it is used")
    model.to_empty(device="cpu")


@torch.no_grad()
def _fill(tensors: Mapping[str, torch.Tensor], sources: Mapping[str, Source]) -> None:
    with RangeReader() as reader:
        for name, tensor in tensors.items():
            if tensor.is_contiguous():
                fill_range(tensor, sources[name], 0, reader)
            else:
                whole = torch.empty(tensor.shape, dtype=DTYPES[sources[name].dtype])
                fill_range(whole, sources[name], 0, reader)
                tensor.copy_(whole)


def _take_generation_config(model: Any, folder: Path) -> None:
    path = folder / "generation_config.json"
    if path.exists():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError):
            raise UserError("broken JSON", where=str(path), instead="restore the file or remove it") from None


def _cast(model: Any, dtype: torch.dtype) -> Any:
    """Cast all but the router gates, which stay fp32."""
    model = model.to(dtype)
    for name, module in model.named_modules():
        if name.endswith("block_sparse_moe.gate"):
            module.float()
    return model


__all__ = [
    "DTYPES",
    "INDEX",
    "SHARD_BYTES",
    "WEIGHTS",
    "bytes_of",
    "causal_lm_class",
    "empty_model",
    "entry_of",
    "fill_range",
    "fresh_model",
    "load_causal_lm",
    "load_config",
    "load_reward_model",
    "load_weights",
    "new_model",
    "read_tensors",
    "reward_model_class",
    "save_file",
    "save_model",
    "save_weights",
]

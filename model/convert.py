"""Checkpoints of one kind into another, byte by byte: no value changes, and no tensor is held in memory."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from posttrain.config.errors import UserError
from posttrain.model.checkpoint_files import Checkpoint, Source, config_fields
from posttrain.model.configuration import CONFIGS, MiniMaxText01Config
from posttrain.model.naming import SCHEMES, Scheme, expected_shapes, pieces
from posttrain.model.tensor_files import CHUNK_BYTES, INDEX, ITEM_BYTES, Entry, RangeReader, plan_shards, write_file, write_index

SHARD_BYTES = 4 * 1024**3

# Not carried over: weights and states of training under other names, sealed lists of files, code of another architecture file.
_LEFT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".py", ".pyc"})
_LEFT_NAMES = frozenset({"config.json", INDEX, "trainer_state.json", "manifest.json"})
_FOLDERS = frozenset({"additional_chat_templates"})


def convert(source: Path | str, target: Path | str, scheme: Scheme, shard_bytes: int = SHARD_BYTES) -> list[Entry]:
    """Write a checkpoint folder anew under the names of a kind.

    Tensors keep their bits and types. The tokenizer, generation_config.json and other side files are copied. The work is done
    in a hidden folder beside the target, which is renamed at the end, so that a target that exists is whole.

    Args:
        source: a checkpoint of any kind, of a language model or a reward model.
        target: a folder that does not exist or is empty.
        scheme: `official`, `native` or `posttrain`, see docs/checkpoints.md.
        shard_bytes: a file of weights is at most so large, save for larger tensors.

    Returns:
        the tensors written.

    Raises:
        UserError: the source is no whole checkpoint (the file or tensor is named), the target holds something, or the target
            kind cannot express the model.
    """
    source, target = Path(source), Path(os.path.abspath(target))
    if scheme not in SCHEMES:
        raise UserError(f"unknown kind of checkpoint {scheme!r}", instead=f"one of {', '.join(SCHEMES)}")
    _refuse_full(target)
    config = _config(source)
    fields = _fields(config, scheme, source)
    checkpoint = Checkpoint(source)
    shapes = expected_shapes(config.to_dict(), scores=config.num_labels if checkpoint.scores else 0)
    assert shapes is not None  # a configuration of the class holds every size
    sources = checkpoint.sources(shapes)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    partial.mkdir()
    try:
        entries = _write_tensors(partial, sources, shapes, scheme, shard_bytes)
        _copy_side_files(source, partial)
        text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
        (partial / "config.json").write_text(text, encoding="utf-8")
        _refuse_full(target)
        os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return entries


def _refuse_full(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError("exists and is not empty", where=str(target), instead="name a new folder")


def _config(source: Path) -> MiniMaxText01Config:
    fields = config_fields(source)
    try:
        return CONFIGS[fields["model_type"]].from_dict(fields)
    except ValueError as error:
        raise UserError(str(error), where=str(source / "config.json")) from None


def _fields(config: MiniMaxText01Config, scheme: Scheme, source: Path) -> dict[str, Any]:
    if scheme == "posttrain":
        return config.to_diff_dict()
    try:
        return config.to_official() if scheme == "official" else config.to_native()
    except ValueError as error:
        raise UserError(f"cannot be written as {scheme}: {error}", where=str(source / "config.json")) from None


def _write_tensors(
    folder: Path, sources: Mapping[str, Source], shapes: Mapping[str, list[int]], scheme: Scheme, shard_bytes: int
) -> list[Entry]:
    wanted = {piece.name: piece for piece in pieces(shapes, scheme)}
    entries = [Entry(name, sources[piece.target].dtype, piece.shape) for name, piece in wanted.items()]
    shards = plan_shards(entries, shard_bytes)
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with RangeReader() as reader:

        def data(entry: Entry) -> Iterator[memoryview]:
            piece, item = wanted[entry.name], ITEM_BYTES[entry.dtype]
            step = CHUNK_BYTES // item
            for begin in range(0, entry.nbytes // item, step):
                part = buffer[: min(CHUNK_BYTES, entry.nbytes - begin * item)]
                sources[piece.target].read(reader, piece.start + begin, part)
                yield part

        for file, own in shards.items():
            write_file(folder / file, own, data)
    write_index(folder, shards)
    return entries


def _copy_side_files(source: Path, target: Path) -> None:
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name in _LEFT_NAMES or path.suffix in _LEFT_SUFFIXES:
            continue
        if path.is_file() and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)
        elif path.is_dir() and path.name in _FOLDERS:
            shutil.copytree(path, target / path.name)

"""Files of safetensors, read and written in pieces: no file and no shard is ever held in memory. Knows bytes, not torch.

Reads go through pread instead of a memory map, so that they count the bytes read and leave no pages of the file resident.

Source: the safetensors format, https://github.com/huggingface/safetensors (header length, JSON header, data in order).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

from posttrain.config.errors import UserError

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
CHUNK_BYTES = 16 * 1024**2
"""Most that is copied from file to file at once."""

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

_MAX_HEADER = 100_000_000
_RESTORE = "restore the file or remove the checkpoint"


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: `dtype` in the format's words (F32, BF16 ...), data row by row."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Stored(Entry):
    """A tensor and where its data begin: byte `offset` of `file`."""

    file: Path
    offset: int


def damaged_weights(file: Path, error: Exception | str) -> UserError:
    """What to raise for a file of weights that cannot be read."""
    if isinstance(error, FileNotFoundError):
        return UserError("weights are missing", where=str(file))
    return UserError(f"damaged weights ({error})", where=str(file), instead=_RESTORE)


def read_header(file: Path) -> dict[str, Stored]:
    """Tensors of a file, by name. UserError where it is missing, cut short or otherwise damaged."""
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise damaged_weights(file, f"a header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
    except FileNotFoundError as error:
        raise damaged_weights(file, error) from None
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise damaged_weights(file, "the header is no JSON") from None
    try:
        found = {name: _stored(file, name, value, 8 + length) for name, value in header.items() if name != "__metadata__"}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise damaged_weights(file, f"the header is none of safetensors: {error}") from None
    end = 8 + length
    for tensor in sorted(found.values(), key=lambda stored: (stored.offset, stored.nbytes)):
        if tensor.offset != end:
            raise damaged_weights(file, f"{tensor.name} does not begin where the tensor before it ends")
        end += tensor.nbytes
    if end != size:
        raise damaged_weights(file, f"{size} bytes instead of {end}")
    return found


def _stored(file: Path, name: str, value: Mapping[str, Any], base: int) -> Stored:
    dtype, shape = value["dtype"], tuple(int(size) for size in value["shape"])
    if dtype not in ITEM_BYTES:
        raise ValueError(f"type {dtype} of {name} is not supported")
    start, stop = value["data_offsets"]
    stored = Stored(name, dtype, shape, file, base + start)
    if stop - start != stored.nbytes:
        raise ValueError(f"{stop - start} bytes for {name} {list(shape)} of {dtype}")
    return stored


class RangeReader:
    """Reads ranges of stored tensors; one file is open at a time.

    Attributes:
        bytes_read: bytes of tensor data read so far.
    """

    def __init__(self) -> None:
        self.bytes_read = 0
        self._file: Path | None = None
        self._handle = -1

    def __enter__(self) -> RangeReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

    def read_into(self, stored: Stored, start: int, buffer: memoryview) -> None:
        """Fill a buffer of bytes from byte `start` of a tensor's data. UserError where the file has become shorter."""
        if self._file != stored.file:
            self._close()
            self._handle, self._file = os.open(stored.file, os.O_RDONLY), stored.file
        done = 0
        while done < len(buffer):
            got = os.preadv(self._handle, [buffer[done:]], stored.offset + start + done)
            if got == 0:
                raise damaged_weights(stored.file, f"it ends inside {stored.name}")
            done += got
        self.bytes_read += done

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._handle)
            self._file = None


def write_file(path: Path, entries: Sequence[Entry], data: Callable[[Entry], Iterable[Any]]) -> None:
    """Write one file, tensor by tensor.

    Args:
        path: the file.
        entries: its tensors; those with wider items come first in the file, so that all data are aligned.
        data: the parts of a tensor's data, in order; anything with the buffer protocol.

    Raises:
        ValueError: the data of a tensor are not as long as its shape says.
        OSError: the disk is full, say.
    """
    ordered = sorted(entries, key=lambda entry: -ITEM_BYTES[entry.dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in ordered:
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [end, end + entry.nbytes]}
        end += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for entry in ordered:
            before = stream.tell()
            for part in data(entry):
                stream.write(part)
            if stream.tell() - before != entry.nbytes:
                raise ValueError(f"{stream.tell() - before} bytes given for {entry.name}, {entry.nbytes} expected")


def plan_shards(entries: Iterable[Entry], limit: int) -> dict[str, list[Entry]]:
    """Which tensors go into which file: in the order given, at most `limit` bytes a file save for larger tensors.

    Returns:
        file name to tensors; the one name `model.safetensors` where one file is enough.
    """
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, start=1)}


def write_index(folder: Path, shards: Mapping[str, Sequence[Entry]]) -> None:
    """Write the index of several files; nothing where there is but one."""
    if len(shards) == 1:
        return
    weight_map = {entry.name: file for file, entries in shards.items() for entry in entries}
    total = sum(entry.nbytes for entries in shards.values() for entry in entries)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)
    (folder / INDEX).write_text(text, encoding="utf-8")


def read_folder(folder: Path) -> dict[str, Stored]:
    """All tensors of a checkpoint, one file or several under an index.

    Raises:
        UserError: a file is missing or damaged, the index is none, or files hold other tensors than the index says.
    """
    index = folder / INDEX
    if not index.exists():
        return read_header(folder / WEIGHTS)
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        files = sorted({folder / Path(file).name for file in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError("damaged index of weights", where=str(index), instead=_RESTORE) from None
    found: dict[str, Stored] = {}
    for file in files:
        for name, stored in read_header(file).items():
            said = weight_map.get(name)
            if said != file.name:
                where = f"to {said}" if said else "to no file"
                raise UserError(f"{file.name} holds {name}, which the index assigns {where}", where=str(index), instead=_RESTORE)
            found[name] = stored
    for name, said in weight_map.items():
        if name not in found:
            raise UserError(f"the index says that {said} holds {name}, which it does not", where=str(index), instead=_RESTORE)
    return found

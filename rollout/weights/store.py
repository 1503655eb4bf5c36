"""Weights that wait in a folder, in shared memory as a rule, for as many engines as there are.

A published version is a folder: safetensors, one file a layer, and `manifest.json`, written last. Files are read-only then. No
reader trusts them: `verify` compares every byte with the manifest, and `open` the manifest with a digest that came another way.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from posttrain.config.errors import UserError
from posttrain.model.loading import DTYPES, bytes_of, entry_of
from posttrain.model.tensor_files import Entry, Stored, read_header, write_file
from posttrain.rollout.types import WeightSource
from posttrain.rollout.weights.checksums import checksum, sha256
from posttrain.rollout.weights.folders import new_folder, remove
from posttrain.rollout.weights.manifest import Manifest, TensorRecord, WeightsRefused

MANIFEST = "manifest.json"
SHARED_MEMORY = Path("/dev/shm")


def publish(source: WeightSource, root: Path = SHARED_MEMORY) -> StoredWeights:
    """Write all of a source's weights into a new folder.

    The source is read to its end even where writing fails, since under ZeRO-3 the other ranks wait for this one in every gather.

    Args:
        source: read once, group by group.
        root: the folder's parent. Memory for all of the weights is needed there.

    Returns:
        the published weights; whoever called removes them. They do not outlive this process: another one that publishes into the
        same root removes what an ended one left there.

    Raises:
        UserError: there is no such root, or no room in it.
    """
    try:
        folder = new_folder(root, source.version)
    except OSError as error:
        for _ in source.groups():
            pass
        raise UserError(f"weights cannot be published here ({error.strerror})", where=str(root)) from None
    groups = iter(source.groups())
    records: list[TensorRecord] = []
    try:
        for number, group in enumerate(groups):
            records += _write_group(folder / f"{number:05d}.safetensors", group)
        manifest = Manifest(source.version, "sha256", tuple(records))
        _write_last(folder / MANIFEST, manifest.to_json())
    except BaseException as error:
        remove(folder)
        for _ in groups:
            pass
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise UserError("no room for the weights", where=str(root), instead="free some, or publish them elsewhere") from None
        raise
    return StoredWeights(folder, manifest)


def _write_group(path: Path, group: Sequence[tuple[str, torch.Tensor]]) -> list[TensorRecord]:
    tensors = dict(group)
    if len(tensors) < len(group):
        raise ValueError("a group of weights holds a name twice")
    sums: dict[str, str] = {}

    def data(entry: Entry) -> list[memoryview]:
        part = bytes_of(tensors[entry.name].cpu().contiguous())
        sums[entry.name] = sha256(part)
        return [part]

    entries = [entry_of(name, tensor) for name, tensor in group]
    write_file(path, entries, data)
    path.chmod(0o400)
    return [TensorRecord(entry.name, entry.dtype, entry.shape, sums[entry.name], path.name) for entry in entries]


def _write_last(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.chmod(0o400)
    os.replace(part, path)


@dataclass(frozen=True)
class StoredWeights:
    """A published version; it is a `WeightSource` itself, and small to send: a folder and its manifest."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path | str, digest: str) -> StoredWeights:
        """Read a manifest. WeightsRefused where it is missing, damaged or not the one of the digest."""
        try:
            manifest = Manifest.from_json((Path(folder) / MANIFEST).read_bytes())
        except OSError as error:
            raise WeightsRefused(f"{folder}: no published weights ({error.strerror})") from None
        if manifest.digest != digest:
            raise WeightsRefused(f"{folder}: the manifest is not the one that was announced")
        return cls(Path(folder), manifest)

    @property
    def version(self) -> int:
        """Of the weights."""
        return self.manifest.version

    def groups(self) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """Yield the groups as they were published, as views of the files' pages; changing them changes no file."""
        for file, records in self._files().items():
            views = _views(self.folder / file)
            yield [(record.name, _tensor(views[record.name])) for record in records]

    def verify(self, shapes: Mapping[str, Sequence[int]] | None = None) -> None:
        """Read every byte and compare.

        Args:
            shapes: names and shapes of all tensors that the receiver needs; None asks for no particular ones.

        Raises:
            WeightsRefused: naming what is damaged, missing or does not fit.
        """
        if shapes is not None:
            self.manifest.refuse_misfits(shapes)
        for file, records in self._files().items():
            try:
                views = _views(self.folder / file)
            except (OSError, UserError) as error:
                raise WeightsRefused(f"weights of version {self.version} are damaged: {error}") from None
            if views.keys() != {record.name for record in records}:
                raise WeightsRefused(f"weights of version {self.version} are damaged: {file} holds other tensors than published")
            for record in records:
                self._verify_tensor(record, views[record.name])

    def remove(self) -> None:
        """Delete the files; a second call does nothing. Readers that have them open keep them until they are done."""
        remove(self.folder)

    def _files(self) -> dict[str, list[TensorRecord]]:
        files: dict[str, list[TensorRecord]] = {}
        for record in self.manifest.tensors:
            if Path(record.file).name != record.file or not record.file:
                raise WeightsRefused(f"the manifest of the weights is damaged: {record.file!r} is no file of its folder")
            files.setdefault(record.file, []).append(record)
        return files

    def _verify_tensor(self, record: TensorRecord, view: _View) -> None:
        same = (view.stored.dtype, view.stored.shape) == (record.dtype, record.shape)
        if not same or checksum(_tensor(view), self.manifest.algorithm) != record.checksum:
            raise WeightsRefused(f"weights of version {self.version} are damaged: {record.name} is not what was published")


@dataclass(frozen=True)
class _View:
    """Where a tensor lies in a mapped file."""

    stored: Stored
    mapped: mmap.mmap


def _views(file: Path) -> dict[str, _View]:
    header = read_header(file)
    with file.open("rb") as stream:
        # Private: a write through a tensor goes to a copy of its page, not to the file that others read.
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    return {name: _View(stored, mapped) for name, stored in header.items()}


def _tensor(view: _View) -> torch.Tensor:
    stored, dtype = view.stored, DTYPES[view.stored.dtype]
    count = stored.nbytes // dtype.itemsize
    if count == 0:
        return torch.empty(stored.shape, dtype=dtype)
    return torch.frombuffer(view.mapped, dtype=dtype, count=count, offset=stored.offset).view(stored.shape)

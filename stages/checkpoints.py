"""Complete checkpoints: written whole or not at all, checked before use, kept in bounded number.

A checkpoint folder counts when its manifest, `checkpoint.json`, exists and every file it lists has the listed hash. The
manifest is written last and atomically, so a process that dies while saving leaves a folder that does not count.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from posttrain.config.errors import UserError
from posttrain.stages.files import read_json, write_json

MANIFEST = "checkpoint.json"
PREFIX = "checkpoint-"
SELF = "sha256"
"""Key of the manifest's hash of itself."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint says of itself.

    Attributes:
        step: optimizer steps done.
        seconds: training time so far, over all resumed parts.
        tokens: tokens trained on so far, over all ranks.
        world_size, zero_stage: what wrote it; optimizer shards fit no other.
        files: sha256 of every file, by path relative to the folder.
    """

    step: int
    seconds: float
    tokens: int
    world_size: int
    zero_stage: int
    files: dict[str, str]


def checkpoint_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"{PREFIX}{step}"


def seal(folder: Path, step: int, seconds: float, tokens: int, world_size: int, zero_stage: int) -> Manifest:
    """Hash a checkpoint's files and write its manifest, which makes it complete."""
    files = {str(path.relative_to(folder)): _sha256(path) for path in _files(folder)}
    manifest = Manifest(step, seconds, tokens, world_size, zero_stage, files)
    fields = asdict(manifest)
    write_json(folder / MANIFEST, {**fields, SELF: _digest(fields)})
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder; UserError where it is missing or broken."""
    path = folder / MANIFEST
    try:
        fields = read_json(path)
    except UnicodeDecodeError:
        fields = None
    if not isinstance(fields, dict) or fields.pop(SELF, None) != _digest(fields):
        raise UserError("file is damaged", where=str(path))
    return Manifest(**fields)


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed checkpoint ("model.safetensors is damaged"), or None; reads every file."""
    try:
        manifest = read_manifest(folder)
    except UserError:
        return f"{MANIFEST} is damaged"
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _sha256(path) != expected:
            return f"{name} is damaged"
    return None


def last_complete(root: Path) -> Path | None:
    """The checkpoint of the highest step whose files are all as they were written, or None.

    A damaged one is passed over with a warning that names its file.
    """
    for folder in reversed(_sealed(root)):
        problem = damage(folder)
        if problem is None:
            return folder
        logger.warning("%s: %s; going back to the checkpoint before", folder, problem)
    return None


def prune(root: Path, keep: int, sealed_now: Path | None = None) -> None:
    """Remove all but the `keep` latest complete checkpoints, and incomplete ones.

    A checkpoint is hashed again before it counts, so that a damaged one never pushes a sound one out; `sealed_now` was
    hashed a moment ago.
    """
    sound = 0
    for folder in reversed(_sealed(root)):
        if sound < keep and (folder == sealed_now or damage(folder) is None):
            sound += 1
        else:
            _remove(folder)
    for folder in _folders(root):
        if not (folder / MANIFEST).exists():
            _remove(folder)


def clear(folder: Path) -> None:
    """Remove what an interrupted save of the same step left behind."""
    if folder.exists():
        _remove(folder)


def _remove(folder: Path) -> None:
    # Without its manifest the checkpoint is incomplete, so a removal that is cut short leaves nothing that counts.
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _folders(root: Path) -> list[Path]:
    found = [path for path in root.glob(f"{PREFIX}*") if path.is_dir() and path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def _sealed(root: Path) -> list[Path]:
    return [folder for folder in _folders(root) if (folder / MANIFEST).exists()]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Provenance: which reward model a stage was trained with, by content, so that a resumed stage cannot go on with another."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from posttrain.config.errors import UserError

LIBRARIES = ("math-verify", "reasoning-gym", "tokenizers", "torch", "transformers")
"""Distributions whose version can change a score."""

_DECIDING = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")
"""Ends of names of weights, configuration and tokenizer; other files (logs, optimizer states) score nothing."""


@dataclass(frozen=True)
class Provenance:
    """Where a stage's reward came from.

    Attributes:
        model: hash of the reward model's folder, None without a learned level.
        section: the stage's `reward` section, as JSON values.
        versions: library -> version, "not installed" without.
    """

    model: str | None
    section: Mapping[str, Any]
    versions: Mapping[str, str]

    @classmethod
    def of(cls, folder: Path | None, section: Mapping[str, Any]) -> Provenance:
        """Of a reward model's folder, or None, and a section; reads every deciding file."""
        return cls(None if folder is None else folder_hash(folder), section, {name: _version(name) for name in LIBRARIES})

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def require_same_model(self, pinned: Mapping[str, Any], where: str) -> None:
        """UserError unless `pinned`, read from a file, names the same reward model.

        Args:
            pinned: what `to_json` gave when the stage began.
            where: the file, for the message.
        """
        if pinned.get("model") != self.model:
            raise UserError(
                f"the stage began with reward model {_short(pinned.get('model'))}, and would go on with {_short(self.model)}",
                where=where,
                instead="bring the first one back, or remove the stage's checkpoints to start it again",
            )


def folder_hash(folder: Path) -> str:
    """SHA-256 over names and contents of a model folder's weights, configuration and tokenizer, hex.

    Raises:
        UserError: the folder holds none.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in _DECIDING)
    if not files:
        raise UserError("no model's files in the folder", where=str(folder), instead="name a folder that a reward stage wrote")
    hashes = {}
    for path in files:
        with path.open("rb") as file:
            hashes[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _short(digest: Any) -> str:
    return f"{digest[:12]}..." if isinstance(digest, str) else "none"

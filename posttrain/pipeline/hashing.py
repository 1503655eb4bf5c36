"""Hashes of files, of Python values and of the package's own sources."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

COMPUTING_PACKAGES = ("config", "data", "kernels", "model", "reward", "rollout", "sandbox", "stages")
"""Folders whose sources decide what a stage computes; the pipeline, the cluster code and the CLI only decide when and where."""

COMPUTING_LIBRARIES = ("reasoning-gym", "torch", "transformers", "tokenizers", "trl", "accelerate", "deepspeed")
"""Distributions whose version can change what a stage computes; one that is not installed counts as such."""


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """SHA-256 of a value's JSON with sorted keys, hex; the value must consist of what JSON knows."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def hash_named(hashes: Iterable[tuple[str, str]]) -> str:
    """SHA-256 over (name, hash) pairs in the order of the names, hex."""
    return hash_json(sorted(hashes))


@lru_cache(maxsize=4)
def code_hash(package: Path | None = None) -> str:
    """SHA-256 over what decides what a stage computes, hex: names and contents of sources, versions of libraries.

    Args:
        package: folder of the `posttrain` package; None takes the one that this file belongs to.
    """
    root = package if package is not None else Path(__file__).parents[1]
    files = [path for folder in COMPUTING_PACKAGES for path in (root / folder).rglob("*.py")]
    hashes = [(path.relative_to(root).as_posix(), hash_file(path)) for path in files]
    return hash_named(hashes + [(f"library {name}", _version(name)) for name in COMPUTING_LIBRARIES])


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"

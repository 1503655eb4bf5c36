"""What a node of the pipeline leaves behind: a folder of files with one `artifact.json`, written last."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from posttrain.config.errors import UserError
from posttrain.pipeline.files import write_json_atomically
from posttrain.pipeline.hashing import hash_file, hash_named

ARTIFACT_FILE = "artifact.json"

UNIDENTIFYING = ("stats.json",)
"""Files that are verified but not part of an artifact's identity: counts and times, which differ when a node is redone."""

Kind = Literal["dataset", "model", "metrics"]


@dataclass(frozen=True)
class Artifact:
    """The record of a finished node.

    Attributes:
        name: the node ("sft_short.data").
        kind: what the files are.
        path: the artifact's folder, relative to the run's folder.
        hash: SHA-256 over file names and file hashes.
        files: hash of every file, by its path in the artifact's folder.
        parents: hash of every parent artifact, by its node.
        config_hash: hash of the part of the config that the node depends on.
        code_hash: hash of the package's sources that made it.
        seconds: wall time of the node.
        created: when it was finished, seconds since the epoch.
    """

    name: str
    kind: Kind
    path: str
    hash: str
    parents: Mapping[str, str]
    config_hash: str
    code_hash: str
    seconds: float
    created: float
    files: Mapping[str, str] = field(default_factory=dict, repr=False)

    def verify(self, run_folder: Path) -> None:
        """Compare every file with its hash.

        Raises:
            UserError: a file is missing, changed or was added; names it.
        """
        folder = run_folder / self.path
        again = "run again, the step is redone"
        present = hash_files(folder)
        for name in sorted(present.keys() | self.files.keys()):
            if name not in present:
                raise UserError("file is missing", where=str(folder / name), instead=again)
            if name not in self.files:
                raise UserError("file does not belong to the artifact", where=str(folder / name), instead="remove it")
            if present[name] != self.files[name]:
                raise UserError("file is damaged: its hash is not the recorded one", where=str(folder / name), instead=again)


def hash_files(folder: Path) -> dict[str, str]:
    """Hash of every file under a folder by relative path, without `artifact.json`; follows links to files."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {name: hash_file(path) for path in paths if (name := path.relative_to(folder).as_posix()) != ARTIFACT_FILE}


def seal(
    run_folder: Path,
    folder: Path,
    *,
    name: str,
    kind: Kind,
    parents: Mapping[str, str],
    config_hash: str,
    code_hash: str,
    seconds: float,
    created: float,
) -> Artifact:
    """Hash a finished folder and write its `artifact.json`; from here on the node counts as done."""
    files = hash_files(folder)
    artifact = Artifact(
        name=name,
        kind=kind,
        path=folder.relative_to(run_folder).as_posix(),
        hash=hash_named((path, content) for path, content in files.items() if path not in UNIDENTIFYING),
        parents=dict(parents),
        config_hash=config_hash,
        code_hash=code_hash,
        seconds=seconds,
        created=created,
        files=files,
    )
    write_json_atomically(folder / ARTIFACT_FILE, asdict(artifact))
    return artifact


def read_artifact(folder: Path) -> Artifact | None:
    """The folder's artifact, or None when the node never finished there.

    Raises:
        UserError: `artifact.json` is there but damaged.
    """
    path = folder / ARTIFACT_FILE
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Artifact(**values)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError("artifact record is damaged", where=str(path), instead="run again, the step is redone") from error

"""What can be said of a checkpoint's folder without torch: its configuration's fields, its tensors and where their bytes lie.

`posttrain plan` refuses a damaged checkpoint with it at once; the strict loader (`model/loading.py`) stays the final check.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from posttrain.config.errors import UserError
from posttrain.model.config_fields import canonical
from posttrain.model.naming import Scheme, expected_shapes, is_derived, pieces, refuse_misfits, scheme_of
from posttrain.model.tensor_files import INDEX, ITEM_BYTES, WEIGHTS, RangeReader, Stored, read_folder

__all__ = ["INDEX", "WEIGHTS", "Checkpoint", "Source", "check_checkpoint", "config_fields", "expected_shapes", "read_shapes"]

_RESTORE = "restore the file or remove the checkpoint"


@dataclass(frozen=True)
class Source:
    """Where the elements of one of our tensors lie: consecutive runs, which `starts` (elements) and `parts` give in order."""

    name: str
    dtype: str
    numel: int
    starts: tuple[int, ...]
    parts: tuple[Stored, ...]

    def read(self, reader: RangeReader, start: int, buffer: memoryview) -> None:
        """Fill a buffer of bytes with elements `start` and on."""
        item = ITEM_BYTES[self.dtype]
        place = start * item
        while buffer:
            number = bisect_right(self.starts, place // item) - 1
            part, inside = self.parts[number], place - self.starts[number] * item
            step = min(len(buffer), part.nbytes - inside)
            reader.read_into(part, inside, buffer[:step])
            buffer, place = buffer[step:], place + step


class Checkpoint:
    """A folder's tensors, whichever way they are named.

    Attributes:
        folder: the folder.
        tensors: what is stored, by the names of the files; slopes and decays left out.
        scheme: the kind that they are named by.
    """

    def __init__(self, folder: Path | str) -> None:
        """Read the headers of all files. UserError for a missing, damaged or mislabelled one."""
        self.folder = Path(folder)
        self.tensors = {name: stored for name, stored in read_folder(self.folder).items() if not is_derived(name)}
        self.scheme: Scheme = scheme_of(self.tensors)

    @property
    def scores(self) -> bool:
        """Whether this is a reward model."""
        return "score.weight" in self.tensors and "lm_head.weight" not in self.tensors

    def sources(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Source]:
        """Where each of our tensors lies.

        Args:
            shapes: our tensors, all of them.

        Raises:
            UserError: missing, extra or misshapen tensors; parts of one of our tensors in different types.
        """
        wanted = pieces(shapes, self.scheme)
        found = {name: stored.shape for name, stored in self.tensors.items()}
        refuse_misfits(found, {piece.name: piece.shape for piece in wanted}, self.folder)
        runs: dict[str, list[tuple[int, Stored]]] = {target: [] for target in shapes}
        for piece in wanted:
            runs[piece.target].append((piece.start, self.tensors[piece.name]))
        return {target: self._source(target, prod(shapes[target]), own) for target, own in runs.items()}

    def _source(self, target: str, numel: int, runs: list[tuple[int, Stored]]) -> Source:
        first = runs[0][1]
        for _, part in runs:
            if part.dtype != first.dtype:
                problem = f"{part.name} is {part.dtype}, but {first.name} is {first.dtype}; experts of a layer share a type"
                raise UserError(problem, where=str(self.folder))
        return Source(target, first.dtype, numel, tuple(start for start, _ in runs), tuple(part for _, part in runs))


def check_checkpoint(folder: Path | str) -> None:
    """See that a folder holds a language model of this architecture, reading no weights but the headers of their files.

    Shapes are compared where config.json writes every size out; else the loader's check is the only one.

    Raises:
        UserError: config.json is missing, broken or of another model; a file of weights is missing, damaged or not what the
            index says; a tensor is missing, extra or misshapen.
    """
    expected = expected_shapes(config_fields(folder))
    checkpoint = Checkpoint(folder)
    if expected is not None:
        checkpoint.sources(expected)


def config_fields(folder: Path | str) -> dict[str, Any]:
    """Fields of a checkpoint's config.json under official names, see `config_fields.canonical`.

    Raises:
        UserError: it is missing, broken, of another model, or asks for what is not implemented.
    """
    path = Path(folder) / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("not a checkpoint: config.json is missing", where=str(folder)) from None
    except UnicodeDecodeError:
        raise UserError("not UTF-8", where=str(path), instead=_RESTORE) from None
    except json.JSONDecodeError as error:
        raise UserError(f"broken JSON in line {error.lineno}", where=str(path)) from None
    if not isinstance(fields, dict):
        raise UserError("is not a JSON object", where=str(path), instead=_RESTORE)
    if "model_type" not in fields:
        raise UserError("model_type is missing", where=str(path), instead=_RESTORE)
    try:
        return canonical(fields)
    except ValueError as error:
        raise UserError(str(error), where=str(path)) from None


def read_shapes(folder: Path | str) -> dict[str, list[int]]:
    """Shape of every tensor under its name in the files. UserError naming a missing, damaged or mislabelled file."""
    return {name: list(stored.shape) for name, stored in Checkpoint(folder).tensors.items()}

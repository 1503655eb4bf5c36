"""What an update of weights says of itself: a version, its tensors, and a checksum of each and of all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from posttrain.model.config_fields import canonical
from posttrain.model.naming import expected_shapes, pieces, scheme_of
from posttrain.model.tensor_files import ITEM_BYTES
from posttrain.rollout.weights.checksums import ALGORITHMS, Algorithm

_FLOATING = ("F64", "F32", "F16", "BF16")


class WeightsRefused(ValueError):
    """An update is damaged or does not fit; nothing that serves was changed."""


@dataclass(frozen=True)
class TensorRecord:
    """One tensor: name, type in safetensors' words, shape, checksum of its bytes, and the file that holds it, if one does."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    checksum: str
    file: str = ""


@dataclass(frozen=True)
class Manifest:
    """All tensors of one version, in the order in which they are sent: those of a layer lie together."""

    version: int
    algorithm: Algorithm
    tensors: tuple[TensorRecord, ...]

    @property
    def digest(self) -> str:
        """sha256 of everything the manifest says; as strong against tampering as the tensors' own checksums are."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        total = 0
        for tensor in self.tensors:
            count = ITEM_BYTES[tensor.dtype]
            for size in tensor.shape:
                count *= size
            total += count
        return total

    def to_json(self) -> str:
        """One line; `from_json` gives the manifest back."""
        return json.dumps(asdict(self), separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """The manifest that was written. WeightsRefused where the text is none."""
        try:
            fields = json.loads(text)
            records = tuple(_record(**record) for record in fields["tensors"])
            manifest = cls(int(fields["version"]), fields["algorithm"], records)
        except (UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
            raise WeightsRefused(f"the manifest of the weights is damaged: {type(error).__name__}") from None
        if manifest.algorithm not in ALGORITHMS or any(record.dtype not in ITEM_BYTES for record in records):
            raise WeightsRefused("the manifest of the weights is damaged: an unknown type or algorithm")
        return manifest

    def refuse_misfits(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """WeightsRefused naming missing, extra, repeated, misshapen and non-floating tensors (three of each kind).

        Args:
            shapes: names and shapes that the receiver needs, all of them.
        """
        own = {record.name: record for record in self.tensors}
        names = [record.name for record in self.tensors]
        faults = {
            "missing": shapes.keys() - own.keys(),
            "extra": own.keys() - shapes.keys(),
            "repeated": {name for name in own if names.count(name) > 1} if len(own) < len(names) else set(),
            "misshapen": {name for name in own.keys() & shapes.keys() if own[name].shape != tuple(shapes[name])},
            "not floating-point": {name for name, record in own.items() if record.dtype not in _FLOATING},
        }
        said = [f"{kind} {sorted(found)[:3]}{' and more' if len(found) > 3 else ''}" for kind, found in faults.items() if found]
        if said:
            raise WeightsRefused("weights do not fit: " + ", ".join(said))


def _record(name: Any, dtype: Any, shape: Any, checksum: Any, file: Any) -> TensorRecord:
    return TensorRecord(str(name), str(dtype), tuple(int(size) for size in shape), str(checksum), str(file))


def checkpoint_shapes(fields: Mapping[str, Any], names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Names and shapes that a language model needs, under the kind of names that a set of tensors has.

    Args:
        fields: of config.json, in any of the three ways.
        names: of the tensors; they tell the kind.

    Raises:
        ValueError: the fields name another model or leave a size out.
    """
    own = expected_shapes(canonical(fields))
    if own is None:
        raise ValueError("the configuration leaves out a size, so what the weights must be is not known")
    return {piece.name: piece.shape for piece in pieces(own, scheme_of(names))}

"""From YAML files and overrides to a checked `RunConfig`, and back to YAML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from posttrain.config.checks import check
from posttrain.config.errors import UserError
from posttrain.config.messages import to_user_error
from posttrain.config.origins import Key, Origins
from posttrain.config.overrides import Override, parse_override
from posttrain.config.schema import RunConfig
from posttrain.config.yaml_files import dump_yaml, read_yaml

# Mappings whose keys the user chooses: null takes an inherited entry out. Elsewhere null is a value.
_REMOVABLE = [
    ("sources",),
    ("stages",),
    ("sources", "*", "splits"),
    ("stages", "*", "data"),
    ("stages", "*", "heldout"),
]


def load_config(path: str | Path, overrides: Sequence[str] = (), *, on_this_machine: bool = True) -> RunConfig:
    """Read, merge, validate and check the configuration of a run.

    `extends: other.yaml` (relative to the file that says it) is read first; the file's own keys replace its values, sections
    are merged. Null takes an inherited stage, source, split or mixture entry out.

    Args:
        path: YAML file.
        overrides: `stages.sft_short.steps=20`, applied in order after the files; the value is YAML.
        on_this_machine: whether the machine must also have the files, cores and GPUs that are asked for. False reads
            the configuration of a run that another machine made.

    Raises:
        UserError: any mistake, one line with file, key, value and what to write instead.
    """
    path = Path(path)
    origins = Origins(str(path))
    raw = _read_extended(path, origins, ())
    for text in overrides:
        _apply(raw, parse_override(text, raw, str(path)), origins)
    try:
        config = RunConfig.model_validate(raw, strict=True)
    except ValidationError as error:
        raise to_user_error(error, raw, origins) from error
    check(config, origins, on_this_machine=on_this_machine)
    return config


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML with every default written out; `load_config` reads it back as the same configuration."""
    return dump_yaml(config.model_dump(mode="json"))


def _read_extended(path: Path, origins: Origins, above: tuple[Path, ...]) -> dict[str, Any]:
    """The mapping of a file merged over the one it extends. `above`: the files that led here, to find a circle."""
    raw = read_yaml(path)
    parent = raw.pop("extends", None)
    merged: dict[str, Any] = {}
    if parent is not None:
        where = f"{path}: extends"
        if not isinstance(parent, str):
            raise UserError(f"got {parent!r}", where=where, instead="write the name of one YAML file")
        target = Path(path.parent / parent)
        chain = (*above, path)
        if target.resolve() in [file.resolve() for file in chain]:
            shown = " -> ".join(str(file) for file in (*chain, target))
            raise UserError(f"files extend each other: {shown}", where=where, instead="take one extends out")
        if not target.exists():
            try:
                read_yaml(target)
            except UserError as error:
                raise UserError(f"no such file '{target}'", where=where, instead=error.instead) from None
        merged = _read_extended(target, origins, chain)
    _merge(merged, raw, (), origins, str(path))
    return merged


def _merge(base: dict[str, Any], over: dict[str, Any], prefix: Key, origins: Origins, writer: str) -> None:
    """Put `over` into `base`, in place: mappings merge, everything else replaces."""
    for name, value in over.items():
        key = (*prefix, name)
        if value is None and name in base and _is_removable(prefix):
            del base[name]
        elif isinstance(value, dict) and isinstance(base.get(name), dict):
            origins.writers[key] = writer
            _merge(base[name], value, key, origins, writer)
        else:
            base[name] = value
            origins.record(key, value, writer)


def _is_removable(prefix: Key) -> bool:
    return any(
        len(prefix) == len(pattern) and all(want in ("*", have) for want, have in zip(pattern, prefix, strict=True))
        for pattern in _REMOVABLE
    )


def _apply(raw: dict[str, Any], override: Override, origins: Origins) -> None:
    """Merge one override in: `a.b=1` is the mapping {a: {b: 1}}."""
    nested: Any = override.value
    for name in reversed(override.key):
        nested = {name: nested}
    # A section that is absent or null is made by the override.
    level: Any = raw
    for name in override.key[:-1]:
        if level.get(name) is None:
            level[name] = {}
        level = level[name]
    _merge(raw, nested, (), origins, f"{origins.default}, override {override.text}")

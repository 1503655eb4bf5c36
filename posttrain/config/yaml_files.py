"""Reading and writing YAML: the YAML 1.2 core schema, no duplicate keys, text keys only, errors with file and line.

PyYAML alone follows YAML 1.1, where `1e-4` is text, `010` is eight, `1:30` is ninety and `no` is false.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from posttrain.config.errors import UserError
from posttrain.config.names import suggest

_SCALARS = [
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    ("tag:yaml.org,2002:merge", r"<<", ["<"]),
]


class _Loader(yaml.SafeLoader):
    """SafeLoader of the core schema that refuses duplicate keys and keys that are not text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                text = key.value if isinstance(key, yaml.ScalarNode) else "..."
                raise yaml.MarkedYAMLError(problem=f"the key {text} is not text, put it in quotes", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key '{key.value}' stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what `_Loader` would not read as text."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value, 0)


for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in _SCALARS:
        _class.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern})\\Z"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse_yaml(text: str, place: str) -> Any:
    """The value of one YAML document.

    Raises:
        UserError: broken YAML, naming `place` and the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = error.problem or error.context or "cannot be read"
        hint = "indent with spaces, not tabs" if "\\t" in problem else "check indentation, colons, quotes and brackets there"
        raise UserError(f"YAML error: {problem}", where=f"{place}{line}", instead=hint) from error
    except yaml.YAMLError as error:
        raise UserError(f"YAML error: {error}", where=place, instead="write plain UTF-8 text") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: no such file (with the nearest name in its folder), no UTF-8, broken YAML, or something else than a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = path.parent
        known = sorted(file.name for file in folder.glob("*.y*ml")) if folder.is_dir() else []
        hint = suggest(path.name, known) if known else f"there is no YAML file in '{folder}'"
        raise UserError("no such file", where=str(path), instead=hint) from None
    except IsADirectoryError:
        raise UserError("is a folder", where=str(path), instead="name a YAML file in it") from None
    except PermissionError:
        raise UserError("may not be read", where=str(path), instead=f"chmod u+r {path}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 text (byte {error.start})", where=str(path), instead="save it as UTF-8") from None
    value = parse_yaml(text, str(path))
    if not isinstance(value, dict):
        found = "is empty" if value is None else "is not a mapping"
        raise UserError(found, where=str(path), instead="write keys with values, such as `name: my_run`")
    return value


def dump_yaml(value: Any) -> str:
    """YAML text that `parse_yaml` reads back as the same value; keys in the order given."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)

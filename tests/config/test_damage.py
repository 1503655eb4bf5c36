"""Whatever stands in a configuration, it is read or refused in one line; nothing else is raised."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from posttrain.config import UserError, dump_config, load_config
from posttrain.config.tree import options
from posttrain.config.yaml_files import dump_yaml, parse_yaml
from tests.config.examples import VALID

NAMES = sorted({option.key.rsplit(".", 1)[-1] for option in options()} | {"base", "sft", "addition/train", "x"})
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-2, 3000)
    | st.floats()
    | st.sampled_from(["sft", "rl", "addition/eval", "", "a/b/c", "chain_sum"])
)
damages = (
    scalars
    | st.lists(scalars, max_size=2)
    | st.dictionaries(st.sampled_from(NAMES), scalars | st.dictionaries(st.sampled_from(NAMES), scalars, max_size=2), max_size=3)
)


def places(value: Any, key: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key of nested mappings."""
    below = [place for name, child in value.items() for place in places(child, (*key, name))] if isinstance(value, dict) else []
    return ([key] if key else []) + below


def damaged(place: tuple[str, ...], rename: str | None, value: Any) -> dict[str, Any]:
    raw = copy.deepcopy(parse_yaml(VALID, "valid"))
    section = raw
    for name in place[:-1]:
        section = section[name]
    if rename is None:
        section[place[-1]] = value
    else:
        section[rename] = section.pop(place[-1])
    return raw


@given(st.sampled_from(places(parse_yaml(VALID, "valid"))), st.none() | st.sampled_from(NAMES), damages)
def test_a_damaged_file_is_read_or_refused_in_one_line(place: tuple[str, ...], rename: str | None, value: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(dump_yaml(damaged(place, rename, value)))
        try:
            config = load_config(path, on_this_machine=False)
        except UserError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
            return
        path.write_text(dump_config(config))
        assert load_config(path, on_this_machine=False) == config


keys = st.lists(
    st.sampled_from([*NAMES, "stages", "sources", "addition", "dpo", "model"]), min_size=1, max_size=4
) | st.sampled_from([list(place) for place in places(parse_yaml(VALID, "valid"))])


@given(keys, damages)
def test_an_override_is_taken_or_refused_in_one_line(key: list[str], value: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(VALID)
        with contextlib.suppress(UserError):
            load_config(path, [f"{'.'.join(key)}={dump_yaml(value)}"], on_this_machine=False)

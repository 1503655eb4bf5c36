"""Provenance: the hash follows what decides a score, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from posttrain.config.errors import UserError
from posttrain.reward.guards.provenance import LIBRARIES, Provenance, folder_hash


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (made / name).write_text(name)
    return made


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_every_deciding_file_counts(folder: Path, name: str) -> None:
    before = folder_hash(folder)
    (folder / name).write_text("changed")
    assert folder_hash(folder) != before


def test_place_and_other_files_do_not_count(folder: Path, tmp_path: Path) -> None:
    before = folder_hash(folder)
    (folder / "train.log").write_text("x")
    copied = shutil.copytree(folder, tmp_path / "elsewhere")
    assert folder_hash(folder) == folder_hash(copied) == before
    (folder / "config.json").rename(folder / "other.json")
    assert folder_hash(folder) != before, "names count"


def test_another_model_is_refused_by_name(folder: Path) -> None:
    section = {"learned_weight": 0.1}
    first = Provenance.of(folder, section)
    pinned = json.loads(json.dumps(first.to_json()))
    assert pinned["section"] == section and set(pinned["versions"]) == set(LIBRARIES)
    first.require_same_model(pinned, "reward.json")
    (folder / "config.json").write_text("changed")
    with pytest.raises(
        UserError, match=r"reward.json: the stage began with reward model \w{12}\.\.\., and would go on with \w{12}"
    ):
        Provenance.of(folder, section).require_same_model(pinned, "reward.json")
    with pytest.raises(UserError, match="would go on with none"):
        Provenance.of(None, section).require_same_model(pinned, "reward.json")


def test_a_folder_without_a_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model's files in the folder"):
        folder_hash(tmp_path)

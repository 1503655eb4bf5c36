"""Which checkpoints count, which are kept, and what a damaged one does."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from posttrain.config.errors import UserError
from posttrain.stages import checkpoints


def make(root: Path, step: int, *, sealed: bool = True) -> Path:
    folder = checkpoints.checkpoint_folder(root, step)
    (folder / "shards").mkdir(parents=True)
    (folder / "model.safetensors").write_text(f"weights {step}")
    (folder / "shards" / "0.pt").write_text(f"optimizer {step}")
    if sealed:
        checkpoints.seal(folder, step, seconds=1.5, tokens=10, world_size=1, zero_stage=0)
    return folder


def steps(root: Path) -> list[int]:
    return sorted(int(path.name.removeprefix(checkpoints.PREFIX)) for path in root.iterdir())


def test_none_without_checkpoints(tmp_path: Path) -> None:
    assert checkpoints.last_complete(tmp_path / "missing") is None


def test_the_latest_by_number_not_by_name(tmp_path: Path) -> None:
    make(tmp_path, 9)
    latest = make(tmp_path, 10)
    assert checkpoints.last_complete(tmp_path) == latest
    assert checkpoints.read_manifest(latest).step == 10


def test_one_without_manifest_does_not_count(tmp_path: Path) -> None:
    complete = make(tmp_path, 2)
    make(tmp_path, 4, sealed=False)
    assert checkpoints.last_complete(tmp_path) == complete


@pytest.mark.parametrize("name", ["model.safetensors", "shards/0.pt"])
def test_a_damaged_file_is_named_and_the_one_before_taken(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    before = make(tmp_path, 2)
    damaged = make(tmp_path, 4)
    (damaged / name).write_text("weighty 4")
    with caplog.at_level(logging.WARNING):
        assert checkpoints.last_complete(tmp_path) == before
    (record,) = caplog.records
    assert name in record.getMessage() and str(damaged) in record.getMessage()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[]", b"{}", b'{"step": 4}'])
def test_a_damaged_manifest_is_a_damaged_checkpoint(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    before = make(tmp_path, 2)
    (make(tmp_path, 4) / checkpoints.MANIFEST).write_bytes(content)
    assert checkpoints.last_complete(tmp_path) == before
    assert "checkpoint-4: checkpoint.json is damaged" in caplog.text
    checkpoints.prune(tmp_path, keep=1)
    assert steps(tmp_path) == [2]


def test_a_changed_number_in_the_manifest_is_damage(tmp_path: Path) -> None:
    manifest = make(tmp_path, 4) / checkpoints.MANIFEST
    manifest.write_text(manifest.read_text().replace('"tokens": 10', '"tokens": 90'))
    assert checkpoints.last_complete(tmp_path) is None
    with pytest.raises(UserError, match="checkpoint.json: file is damaged"):
        checkpoints.read_manifest(manifest.parent)


def test_a_missing_file_is_damage(tmp_path: Path) -> None:
    folder = make(tmp_path, 2)
    (folder / "model.safetensors").unlink()
    assert checkpoints.damage(folder) == "model.safetensors is missing"
    assert checkpoints.last_complete(tmp_path) is None


def test_only_complete_ones_are_kept_and_counted(tmp_path: Path) -> None:
    for step in (2, 4, 8):
        make(tmp_path, step)
    make(tmp_path, 6, sealed=False)
    (tmp_path / "checkpoint-4" / "model.safetensors").write_text("rotten")
    (tmp_path / "notes").mkdir()
    checkpoints.prune(tmp_path, keep=2)
    (tmp_path / "notes").rmdir()
    assert steps(tmp_path) == [2, 8], "the damaged one must not push out a sound one"


def test_keeps_the_latest(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        make(tmp_path, step)
    checkpoints.prune(tmp_path, keep=1, sealed_now=tmp_path / "checkpoint-6")
    assert steps(tmp_path) == [6]

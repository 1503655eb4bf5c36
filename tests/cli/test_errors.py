"""How errors reach a person: one line, an exit status, and a trace only when asked for."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.cli import main
from posttrain.config import UserError
from tests.config.examples import write_valid


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(write_valid(tmp_path))


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let `run` raise."""
    import posttrain.pipeline.run as pipeline

    def run(*_, **__):
        raise error

    monkeypatch.setattr(pipeline, "run", run)


def only_line(capsys: pytest.CaptureFixture[str]) -> str:
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1, printed
    return printed.err.rstrip("\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["pln"], "error: No such command 'pln'. Did you mean 'plan', 'explain'?; see `posttrain --help`"),
        (["plan"], "error: Missing argument 'CONFIG'; see `posttrain plan --help`"),
        (
            ["run", "a.yaml", "--untl", "sft"],
            "error: No such option: --untl (Possible options: --until); see `posttrain run --help`",
        ),
        (["report", "."], "error: .: is not the folder of a run (no manifest.json); give OUTPUT_DIR/NAME of a started run"),
        (["explain", "bta"], "error: bta: unknown option; did you mean 'stages.NAME.beta'?"),
    ],
)
def test_a_wrong_command_line_gives_one_line(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert only_line(capsys) == line


def test_a_users_mistake_ends_with_2_and_one_line(
    path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, UserError("is wrong\nreally", where="a.yaml: b", instead="write c"))
    assert main(["run", path]) == 2
    assert only_line(capsys) == "error: a.yaml: b: is wrong really; write c"


@pytest.mark.parametrize("words", [["--debug", "run"], ["run", "--debug"]])
def test_debug_shows_the_trace(words: list[str], path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, UserError("is wrong"))
    with pytest.raises(UserError):
        main([*words, path])


def test_debug_in_a_process_prints_the_trace(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "posttrain", "plan", str(tmp_path / "none.yaml")]
    plain = subprocess.run(command, capture_output=True, text=True, check=False)
    assert plain.returncode == 2 and "Traceback" not in plain.stderr and plain.stderr.count("\n") == 1
    traced = subprocess.run([*command, "--debug"], capture_output=True, text=True, check=False)
    assert traced.returncode == 1 and "Traceback" in traced.stderr and "no such file" in traced.stderr


@pytest.mark.parametrize("by_pipeline", [False, True])
def test_ctrl_c_ends_with_130_and_one_line(
    by_pipeline: bool, path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error: BaseException = KeyboardInterrupt()
    if by_pipeline:
        error = UserError("stopped", where="runs/example", instead="the same command goes on from here")
        error.__cause__ = KeyboardInterrupt()
    fail_with(monkeypatch, error)
    assert main(["run", path]) == 130
    assert "the same command goes on from" in only_line(capsys)


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "no space left on device; free some space"), (errno.EACCES, "permission denied; change")]
)
def test_a_fault_of_the_machine_gives_one_line(
    number: int, words: str, path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, OSError(number, os.strerror(number), "runs/x"))
    assert main(["run", path]) == 2
    assert only_line(capsys).startswith(f"error: runs/x: {words}")


@pytest.mark.parametrize("error", [ValueError("a fault of the program"), OSError(errno.EBADF, "bad"), KeyError("x")])
def test_a_programming_error_is_not_hidden(error: Exception, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, error)
    with pytest.raises(type(error)):
        main(["run", path])


def test_a_reader_that_stops_reading_gives_no_trace() -> None:
    command = f"{sys.executable} -m posttrain explain | head -1; {sys.executable} -m posttrain explain stages | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout == "name\n" and "Traceback" not in done.stderr


def test_ctrl_c_while_the_program_starts_gives_one_line() -> None:
    """The import of a library is interrupted, as Ctrl-C does it in the first tenths of a second."""
    code = (
        "import builtins, sys; from posttrain.cli import main; imported = builtins.__import__\n"
        "def stop(name, *rest):\n"
        "    if name == 'typer': raise KeyboardInterrupt\n"
        "    return imported(name, *rest)\n"
        "builtins.__import__ = stop; sys.exit(main(['plan', 'run.yaml']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


def test_a_thread_that_is_left_behind_does_not_change_the_exit_status() -> None:
    code = (
        "import sys, threading, time; import posttrain.cli.commands as commands\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "commands.run = lambda words: 130\n"
        "from posttrain.cli import main; sys.exit(main())"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=30).returncode == 130

"""What a program may use, and what is said of one that uses more."""

import contextlib
import dataclasses
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from posttrain.config.errors import UserError
from posttrain.sandbox import running
from posttrain.sandbox.running import SandboxError, available, run
from posttrain.sandbox.types import INTERPRETER, Limits, Outcome, Program, Status
from posttrain.sandbox.visible import hidden, visible

SMALL = Limits(
    wall_seconds=20, cpu_seconds=30, memory_bytes=128 << 20, processes=12, output_bytes=10_000, disk_bytes=4 << 20, open_files=32
)


def python(source: str, mechanism: str, limits: Limits = SMALL, stdin: str = "") -> Outcome:
    return run(Program.python(source, stdin), limits, mechanism)


def commands_with(marker: str) -> list[int]:
    """Processes of this machine with a word in their command."""
    found = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and marker.encode() in Path(f"/proc/{name}/cmdline").read_bytes():
                found.append(int(name))
    return found


def wait_until(condition: object, seconds: float = 10.0) -> bool:
    assert callable(condition)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module", autouse=True)
def somewhere() -> Iterator[None]:
    if reason := available():
        pytest.skip(reason)
    yield


def test_a_program_gets_its_input_and_gives_its_output(mechanism: str) -> None:
    source = "import sys\nfor line in sys.stdin: print(int(line) ** 2)\nprint('done', file=sys.stderr)\n"
    outcome = python(source, mechanism, stdin="3\n4\n")
    assert outcome.status is Status.OK and outcome.exit_code == 0 and outcome.reason == ""
    assert (outcome.stdout, outcome.stderr) == (b"9\n16\n", b"done\n")


def test_files_arguments_folder_and_environment(mechanism: str) -> None:
    source = (
        "import os, sys, helper\nprint(sys.argv[1:], helper.x, open('data/a.bin', 'rb').read(), os.getcwd(), sorted(os.environ))"
    )
    files: dict[str, str | bytes] = {"main.py": source, "helper.py": "x = 'é'", "data/a.bin": b"\x00\xff"}
    outcome = run(Program((INTERPRETER, "-B", "main.py", "one two"), files), SMALL, mechanism)
    names = ["HOME", "LANG", "PATH", "PYTHONHASHSEED"]
    assert outcome.stdout.decode() == f"['one two'] é b'\\x00\\xff' /tmp {names}\n", outcome.reason


def test_a_command_of_the_system(mechanism: str) -> None:
    outcome = run(Program(("sh", "-c", "cat; exit 3"), stdin="in"), SMALL, mechanism)
    assert (outcome.status, outcome.exit_code, outcome.stdout) == (Status.FAILED, 3, b"in")
    missing = run(Program(("no-such-command",)), SMALL, mechanism)
    assert missing.status is Status.FAILED and "cannot start no-such-command: No such file" in missing.reason


def test_several_processes_and_threads_work(mechanism: str) -> None:
    source = (
        "import multiprocessing, threading, subprocess\ndef square(x): return x * x\nif __name__ == '__main__':\n"
        "    t = threading.Thread(target=print, args=['thread']); t.start(); t.join()\n"
        "    print(multiprocessing.Pool(2).map(square, [1, 2, 3]), flush=True)\n    subprocess.run(['echo', 'child'])\n"
    )
    outcome = python(source, mechanism, Limits(wall_seconds=20))
    assert outcome.stdout == b"thread\n[1, 4, 9]\nchild\n", outcome


@pytest.mark.parametrize(
    ("source", "status", "reason"),
    [
        ("raise ValueError('no')", Status.FAILED, "exit status 1: ValueError: no"),
        ("import sys; sys.exit(7)", Status.FAILED, "exit status 7"),
        ("import os; os.abort()", Status.KILLED, "ended by signal SIGABRT"),
        ("import ctypes; ctypes.string_at(0)", Status.KILLED, "ended by signal SIGSEGV"),
        ("while True: pass", Status.TIMEOUT, "ran longer than 0.7 s"),
        ("import signal\nfor n in range(1, 32):\n  if n not in (9, 19): signal.signal(n, signal.SIG_IGN)\nsignal.pause()",
         Status.TIMEOUT, "ran longer than 0.7 s"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", Status.TIMEOUT, "ran longer than 0.7 s"),
        ("import os, time; os.close(1); os.close(2); time.sleep(60)", Status.TIMEOUT, "ran longer than 0.7 s"),
        ("x = []\nwhile True: x.append(b'x' * 10**6)", Status.MEMORY, "used more than 134217728 bytes of memory"),
        ("x = bytearray(10**11)", Status.MEMORY, "exit status 1: MemoryError"),
        ("import os\nfor _ in range(6):\n  if os.fork() == 0: break\nx = []\nwhile True: x.append(b'x' * 10**6)",
         Status.MEMORY, "used more than 134217728 bytes of memory"),
        ("import mmap\nx = []\nwhile True:\n  m = mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE); m[:] = b'x' * (1 << 20); x.append(m)",
         Status.MEMORY, "used more than 134217728 bytes of memory"),
        ("import mmap; mmap.mmap(-1, 1 << 20)", Status.FAILED, "PermissionError: [Errno 1] Operation not permitted"),
        ("while True: print('x' * 1000)", Status.OUTPUT, "wrote more than 10000 bytes"),
        ("import sys\nwhile True: sys.stderr.write('x' * 1000)", Status.OUTPUT, "wrote more than 10000 bytes"),
        ("import os\nwhile True: os.fork()", Status.FAILED, "exit status 1: BlockingIOError: [Errno 11] Resource temporarily"),
        ("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", Status.TIMEOUT, "ran longer than 0.7 s"),
        ("f = open('a', 'wb', 0)\ng = open('b', 'wb', 0)\nwhile f.write(b'x' * 10000) and g.write(b'x' * 10000): pass",
         Status.FAILED, "exit status 1: OSError: [Errno 28] No space left on device"),
        ("f = [open('/dev/null') for _ in range(100)]", Status.FAILED, "Too many open files"),
    ],
)  # fmt: skip
def test_what_is_said_of_a_program(mechanism: str, source: str, status: Status, reason: str) -> None:
    limits = dataclasses.replace(SMALL, wall_seconds=0.7) if status is Status.TIMEOUT else SMALL
    outcome = python(source, mechanism, limits)
    assert outcome.status is status, outcome
    assert reason in outcome.reason
    assert outcome.seconds < limits.wall_seconds + 5
    assert len(outcome.stdout) + len(outcome.stderr) <= SMALL.output_bytes


def test_processor_time_is_limited(mechanism: str) -> None:
    source = "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    outcome = python(source, mechanism, Limits(cpu_seconds=1, wall_seconds=60))
    assert outcome.status is Status.TIMEOUT and outcome.reason == "used more than 1 s of processor time"


def test_processes_at_once_are_counted_for_each_sandbox_alone(mechanism: str) -> None:
    source = (
        "import os, time\nn = 1\ntry:\n  while True:\n    if os.fork() == 0: time.sleep(60)\n    n += 1\n"
        "except OSError: print(n, flush=True)\ntime.sleep(0.5)"
    )
    outcomes: list[Outcome] = []
    threads = [threading.Thread(target=lambda: outcomes.append(python(source, mechanism, SMALL))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # An ordinary user's count may have room for two of ours that are not there (see `slack`).
    assert all(SMALL.processes <= int(outcome.stdout) <= SMALL.processes + 2 for outcome in outcomes), outcomes
    assert len(outcomes) == 3


def test_many_empty_files_are_too_many(mechanism: str) -> None:
    outcome = python("n = 0\nwhile True:\n  n += 1\n  open(str(n), 'w').close()\n", mechanism, Limits(disk_bytes=1 << 20))
    assert outcome.status in (Status.DISK, Status.FAILED), outcome
    assert "too many files" in outcome.reason or "No space left" in outcome.reason


def test_nothing_outlives_its_sandbox(mechanism: str) -> None:
    marker = f"outlive-{os.getpid()}-{mechanism}"
    source = (
        "import os, subprocess, sys\n"
        f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', '{marker}'], start_new_session=True)\n"
        "if os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n    while True: pass\n"
    )
    outcome = python(source, mechanism)
    assert outcome.status is Status.OK, outcome
    assert commands_with(marker) == []
    short = dataclasses.replace(SMALL, wall_seconds=2)
    for more, limits, status in (
        ("while True: pass", short, Status.TIMEOUT),
        ("while True: print(source)", SMALL, Status.OUTPUT),
    ):
        stopped = python(f"source = 'x' * 999\n{source}{more}", mechanism, limits)
        assert stopped.status is status, stopped
    assert commands_with(marker) == []


def test_a_sandbox_dies_with_the_one_that_wanted_it(mechanism: str) -> None:
    marker = f"orphan-{os.getpid()}-{mechanism}"
    code = (
        "from posttrain.sandbox.running import run\nfrom posttrain.sandbox.types import Limits, Program\n"
        f"run(Program(('sh', '-c', 'sleep 600; : {marker}')), Limits(wall_seconds=600), {mechanism!r})\n"
    )
    scorer = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    try:
        # The scorer's own command carries the word, and the shell's.
        assert wait_until(lambda: len([p for p in commands_with(marker) if p != scorer.pid]) >= 1, 60)
    finally:
        scorer.send_signal(signal.SIGKILL)
        scorer.wait()
    assert wait_until(lambda: commands_with(marker) == [])


def test_no_open_file_is_left_behind(mechanism: str) -> None:
    python("print(1)", mechanism)
    before = sorted(os.listdir("/proc/self/fd"))
    for source in ("print(1)", "while True: print('x' * 1000)", "import os; os.abort()"):
        python(source, mechanism)
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("count", [200, 1100])
def test_many_open_files_outside(mechanism: str, count: int) -> None:
    """Descriptors that the sandbox inherits are numbered above the program's limit, and above what `select` knows."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= limits[1] < count + 200:
        pytest.skip(f"no more than {limits[1]} files may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], count + 200), limits[1]))
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(count):
                stack.enter_context(open(os.devnull))
            outcome = python("import os; print(len(os.listdir('/proc/self/fd')))", mechanism)
            stopped = python("while True: print('x' * 1000)", mechanism)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert outcome.stdout == b"4\n", outcome  # the standard ones, and the one that lists them
    assert stopped.status is Status.OUTPUT


def test_a_failed_setup_is_no_failure_of_the_program(mechanism: str) -> None:
    with pytest.raises(SandboxError, match="int too (large|big) to convert"):
        python("print(1)", mechanism, dataclasses.replace(SMALL, memory_bytes=1 << 64))


@pytest.mark.parametrize("place", ["before it is watched", "while it is read and waited for"])
def test_an_interrupt_leaves_nothing_behind(mechanism: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = f"interrupted-{os.getpid()}-{mechanism}"
    started: list[subprocess.Popen[bytes]] = []
    wait = subprocess.Popen.wait

    def interrupt(supervision: running._Supervision, *_: object) -> Outcome:
        started.append(supervision.process)
        raise KeyboardInterrupt

    def interrupt_once(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if timeout is not None:
            raise KeyboardInterrupt
        return wait(process)

    before = sorted(os.listdir("/proc/self/fd"))
    if place == "before it is watched":
        monkeypatch.setattr(running._Supervision, "outcome", interrupt)
    else:
        monkeypatch.setattr(running._Supervision, "_read", interrupt)
        monkeypatch.setattr(subprocess.Popen, "wait", interrupt_once)
    with pytest.raises(KeyboardInterrupt):
        run(Program(("sh", "-c", f"sleep 600; : {marker}")), SMALL, mechanism)
    assert [process.returncode is not None for process in started] == [True]
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert wait_until(lambda: commands_with(marker) == [])


def test_where_there_is_no_sandbox_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "unavailable", lambda name: f"no {name} here")
    monkeypatch.setattr(running, "_run", lambda *_: pytest.fail("ran bare"))
    with pytest.raises(UserError, match="cannot be run contained.*no namespaces here; bubblewrap: no bubblewrap here"):
        run(Program.python("print(1)"))
    assert available() == "namespaces: no namespaces here; bubblewrap: no bubblewrap here"


@pytest.mark.parametrize("folder", ["/", "home", "."])
def test_a_python_around_the_home_folder_is_not_shown(folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path / folder))
    with pytest.raises(UserError, match="holds the home folder"):
        visible()


@pytest.mark.parametrize("what", ["home folder", "working folder", "project"])
def test_what_lies_below_a_folder_shown_is_refused(what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    system = tmp_path / "usr"
    (system / "src/app").mkdir(parents=True)
    (system / "app").mkdir()
    monkeypatch.setattr("posttrain.sandbox.visible._SYSTEM", (str(system),))
    monkeypatch.setattr("posttrain.sandbox.visible._HIDDEN", (str(system / "src"), str(tmp_path / "none")))

    def lie_in(folder: Path) -> None:
        if what == "home folder":
            monkeypatch.setenv("HOME", str(folder))
        elif what == "working folder":
            monkeypatch.chdir(folder)
        else:
            monkeypatch.setattr("posttrain.sandbox.visible._PROJECT", folder)

    lie_in(system / "src/app")
    assert visible()[0] == str(system) and hidden() == [str(system / "src")]
    lie_in(system / "app")
    with pytest.raises(UserError, match=f"sandboxes show {system}, which holds the {what} {system}/app"):
        visible()
    monkeypatch.setattr(sys, "base_prefix", str(system / "src/python"))
    with pytest.raises(UserError, match=f"installed in {system}/src/python, which sandboxes hide"):
        visible()


def test_a_missing_bubblewrap_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    running.unavailable.cache_clear()
    try:
        assert running.unavailable("bubblewrap") == "bubblewrap (bwrap) is not installed"
    finally:
        running.unavailable.cache_clear()


@pytest.mark.parametrize("name", ["/etc/a", "../a", "a/../../b", "", "a\0b"])
def test_a_program_cannot_name_files_outside(name: str) -> None:
    with pytest.raises(UserError, match="relative path"):
        Program(("true",), {name: ""})


def test_mistakes_of_the_caller() -> None:
    with pytest.raises(UserError, match="wall_seconds is 0"):
        Limits(wall_seconds=0)
    with pytest.raises(UserError, match="without a command"):
        Program(())
    with pytest.raises(UserError, match="did you mean 'bubblewrap'"):
        run(Program(("true",)), mechanism="bublewrap")


def test_a_folder_below_the_writable_one_can_be_shown(mechanism: str, tmp_path: Path) -> None:
    """A virtual environment in /tmp, say. What is shown stays read-only, the rest of /tmp stays the program's own."""
    (tmp_path / "shown").mkdir()
    (tmp_path / "shown/file").write_text("seen")
    (tmp_path / "secret").write_text("not shown")
    source = f"""
import os
print(open({str(tmp_path / "shown/file")!r}).read(), os.path.exists({str(tmp_path / "secret")!r}))
open("/tmp/own", "w").write("written")
try:
    open({str(tmp_path / "shown/other")!r}, "w")
except OSError:
    print("read-only")
"""
    outcome = run(Program.python(source), SMALL, mechanism, shown=[os.path.realpath(tmp_path / "shown")])
    assert outcome.stdout.decode().split("\n") == ["seen False", "read-only", ""], outcome
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret", "shown"]

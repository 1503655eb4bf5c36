"""A hostile program reaches no file, process, socket or variable of the host."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import posttrain
from posttrain.sandbox.running import run
from posttrain.sandbox.types import INTERPRETER, Limits, Program, Status
from posttrain.sandbox.visible import visible

WORD = "planted-secret-5e1f"
ATTEMPTS = Path(__file__).with_name("attempts.py").read_text()


@pytest.fixture
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Files, a socket and a variable of the host, all with the same word; those outside tmp_path are taken away again."""
    monkeypatch.setenv("PLANTED", WORD)
    with ExitStack() as stack:
        others = [stack.enter_context(tempfile.TemporaryDirectory(dir=place)) for place in ("/tmp", "/var/tmp", Path.home())]
        files = [place / "secret.txt" for place in (tmp_path, *map(Path, others))]
        for file in files:
            file.parent.chmod(0o755)
            file.write_text(WORD)
            file.chmod(0o666)  # as open as can be: it must not be there at all
        yield files


def test_nothing_of_the_host_is_reached(mechanism: str, secrets: list[Path], tmp_path: Path) -> None:
    abstract = f"posttrain-{os.getpid()}"
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as named,
        socket.socket(socket.AF_UNIX) as unnamed,
        secrets[0].open() as inherited,
    ):
        os.set_inheritable(inherited.fileno(), True)
        named.bind(str(tmp_path / "secret.sock"))
        unnamed.bind("\0" + abstract)
        for server in (named, unnamed):
            server.listen()
        repository = Path(posttrain.__file__).resolve()
        paths = [*map(str, secrets), str(tmp_path / "secret.sock"), str(repository)]
        before = {path: Path(path).read_bytes() for path in paths if not path.endswith(".sock")}
        argv = (INTERPRETER, "-B", "main.py", json.dumps(paths), str(os.getpid()), str(tcp.getsockname()[1]), abstract)
        limits = Limits(wall_seconds=60, cpu_seconds=60)
        outcome = run(Program(argv, {"main.py": ATTEMPTS}, "input"), limits, mechanism)
        for server in (tcp, named, unnamed):
            server.settimeout(0.01)
            with pytest.raises(TimeoutError):
                server.accept()
    assert outcome.status is Status.OK, outcome.reason
    found = json.loads(outcome.stdout)
    assert len(found["came"]) > 90
    assert {name: result for name, result in found["came"].items() if result[0] != "error"} == {}
    assert WORD.encode() not in outcome.stdout + outcome.stderr
    state = found["state"]
    assert {state[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
    assert (state["NoNewPrivs"], state["Seccomp"]) == ("1", "2")
    assert set(found["environment"]) == {"PATH", "HOME", "LANG", "PYTHONHASHSEED"}
    assert len(found["descriptors"]) == 4  # the standard ones, and the one that lists them
    assert all(process < 20 for process in found["processes"])
    shown = {Path(path).parts[1] for path in visible()}  # Python may be installed in /opt or below /home
    assert not ({"home", "var", "sys", "opt", "srv", "mnt", "boot"} - shown) & set(found["root"])
    assert {path: Path(path).read_bytes() for path in before} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret.sock", "secret.txt"]


def test_two_sandboxes_do_not_see_each_other(mechanism: str) -> None:
    first = run(Program.python("open('/tmp/left', 'w').write('x')\nopen('/dev/shm/left2', 'w').write('y')"), None, mechanism)
    second = run(Program.python("import os; print(sorted(os.listdir('/tmp')), os.listdir('/dev/shm'))"), None, mechanism)
    assert first.status is Status.OK, first
    assert second.stdout == b"['main.py'] ['main.py']\n", second


ORDINARY = """
import json, os, sys
from posttrain.sandbox.running import run, unavailable
from posttrain.sandbox.types import Limits, Program
bomb = '''
import os, time
n = 1
try:
  while True:
    if os.fork() == 0: time.sleep(60)
    n += 1
except OSError: print(n)
'''
interrupt = '''
import os, signal, time
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
os.kill(1, signal.SIGINT)
time.sleep(0.3)
print('went on')
'''
look = "import os; print(os.getuid(), os.path.exists(%r), open('/proc/self/status').read().count('0' * 16))" % sys.argv[1]
result = {}
for name in ("bubblewrap", "namespaces"):
    reason = unavailable(name)
    limits = Limits(wall_seconds=20, processes=10, memory_bytes=100 << 20)
    programs = (look, interrupt, bomb, "x = []\\nwhile True: x.append(b'x' * 10**6)")
    result[name] = reason or [(o.status, o.stdout.decode()) for o in (run(Program.python(p), limits, name) for p in programs)]
print(json.dumps(result))
"""


def test_an_ordinary_user_has_the_same_sandbox() -> None:
    """Run as another user by the system's Python, with the little of the project that a sandbox needs."""
    python = Path("/usr/bin/python3")
    if os.geteuid() != 0:
        pytest.skip("all other tests run as an ordinary user already")
    if not python.exists() or subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]).returncode:
        pytest.skip("the system has no Python from 3.11 on that other users may run")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        package, source = Path(folder, "posttrain"), Path(posttrain.__file__).parent
        shutil.copytree(source / "sandbox", package / "sandbox", ignore=shutil.ignore_patterns("__pycache__"))
        (package / "config").mkdir()
        for name in ("__init__.py", "config/errors.py", "config/names.py"):
            shutil.copy(source / name, package / name)
        secret = Path(folder, "secret.txt")
        secret.write_text(WORD)
        for path in (Path(folder), *Path(folder).rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        os.chown(secret, 54321, 54321)  # its own, so that only the sandbox keeps it from it
        done = subprocess.run(
            [python, "-B", "-c", ORDINARY, str(secret)],
            user=54321, group=54321, extra_groups=[], env={"PYTHONPATH": folder, "PATH": os.environ["PATH"]},
            cwd="/", capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    worked = [result for result in results.values() if not isinstance(result, str)]
    if not worked:
        pytest.skip(f"ordinary users have no sandbox here: {results}")
    for looked, interrupted, bombed, hogged in worked:
        uid, seen, cleared = looked[1].split()
        assert (uid, seen) == ("1000", "False") and int(cleared) >= 4
        assert interrupted == ["ok", "went on\n"]
        assert bombed[0] == "ok" and 10 <= int(bombed[1].split()[0]) <= 12
        assert hogged[0] == "memory"


def test_the_interpreter_shown_is_without_the_projects_packages(mechanism: str) -> None:
    source = (
        "import importlib.util as u, sys\nprint(u.find_spec('posttrain'), u.find_spec('transformers'), sys.version_info[:2])\n"
        "exit(0)"
    )
    outcome = run(Program.python(source), None, mechanism)
    assert outcome.stdout.decode() == f"None None {tuple(sys.version_info[:2])}\n", outcome

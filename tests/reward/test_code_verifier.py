"""Programs scored by their tests, honest ones and hostile ones."""

import json
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from posttrain.config.errors import UserError
from posttrain.reward.types import LevelScore, Sample, Verifier
from posttrain.reward.verifiers import VERIFIERS, is_right, verify
from posttrain.reward.verifiers.code import CodeVerifier, read_program, same_output
from posttrain.sandbox.running import available
from posttrain.sandbox.types import Limits

LIMITS = Limits(
    wall_seconds=1.5, cpu_seconds=30, memory_bytes=128 << 20, processes=12, output_bytes=20_000, disk_bytes=4 << 20, open_files=32
)
QUICK = CodeVerifier(LIMITS)
TESTS = ["assert double(2) == 4", "assert double('ab') == 'abab'", "assert double([]) == []", "assert double(-1.5) == -3"]


def sample(answer: str, **metadata: Any) -> Sample:
    return Sample([{"role": "user", "content": "Write it."}], answer, {"verifier": "code", "metadata": json.dumps(metadata)})


@pytest.fixture(scope="module")
def sandbox() -> None:
    if reason := available():
        pytest.skip(reason)


@pytest.mark.usefixtures("sandbox")
def test_the_score_is_the_share_of_tests_passed() -> None:
    right = verify(sample("Sure:\n```python\ndef double(x):\n    return x * 2\n```\nDone.", language="python", tests=TESTS))
    assert (right.name, right.score, right.weight, right.contribution) == ("verifier", 1.0, 1.0, 1.0) and is_right(right)
    assert right.evidence["passed"] == right.evidence["of"] == 4
    half = verify(sample("def double(x):\n    return x + x if isinstance(x, int) else x + 'ab'", tests=TESTS))
    assert (half.score, half.contribution) == (0.5, 0.0)
    assert [test["passed"] for test in half.evidence["tests"]] == [True, True, False, False]
    reason = 'TypeError: can only concatenate list (not "str") to list'
    assert half.evidence["tests"][2] == {"test": TESTS[2], "passed": False, "status": "failed", "reason": reason}
    json.dumps(half.evidence)


@pytest.mark.usefixtures("sandbox")
def test_input_and_output() -> None:
    tests = [{"stdin": "2\n", "stdout": "4"}, {"stdin": "x", "stdout": "xx\n"}, {"stdin": "", "stdout": ""}]
    level = QUICK.verify(sample("```py\ntext = input()\nprint(int(text) * 2)\n```", tests=tests))
    assert level.score == pytest.approx(1 / 3)
    reasons = [test["reason"] for test in level.evidence["tests"]]
    assert reasons[0] == "" and "ValueError: invalid literal" in reasons[1] and "EOFError" in reasons[2]
    wrong = QUICK.verify(sample("print(5)", tests=tests[:1]))
    assert wrong.score == 0 and wrong.evidence["tests"][0]["reason"] == "wrote '5\\n', not '4'"


@pytest.mark.usefixtures("sandbox")
def test_an_entry_point_and_a_setup() -> None:
    check = "def check(candidate):\n    assert candidate(2) == DOUBLE\n    assert candidate('a') == 'aa'\n"
    record = {"entry_point": "double", "setup": "DOUBLE = 4", "tests": [check]}
    assert QUICK.verify(sample("def double(x): return 2 * x", **record)).score == 1
    assert QUICK.verify(sample("def double(x): return 4", **record)).score == 0
    assert QUICK.verify(sample("def other(x): return 2 * x", **record)).score == 0


@pytest.mark.usefixtures("sandbox")
def test_a_test_that_cannot_be_judged_is_no_verdict() -> None:
    level = QUICK.verify(sample("def apply(f): return f()", tests=["assert apply(lambda: 1) == 1", "assert apply(int) == 0"]))
    assert level.score is None and level.contribution == 0 and not is_right(level)
    assert "only plain data" in level.evidence["tests"][0]["reason"]


@pytest.mark.usefixtures("sandbox")
def test_a_sandbox_that_fails_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.sandbox.running._SETUP_SECONDS", 0.0)
    level = QUICK.verify(sample("print(2)", tests=[{"stdin": "", "stdout": "2"}]))
    assert level.score is None and level.evidence["tests"][0]["reason"] == "no program was started within 0 s"


@pytest.mark.usefixtures("sandbox")
def test_the_time_for_all_tests_is_bounded() -> None:
    verifier = CodeVerifier(LIMITS, seconds=1.0, workers=1)
    level = verifier.verify(sample("def double(x):\n  while True: pass", tests=TESTS))
    assert level.score == 0
    assert [test["status"] for test in level.evidence["tests"]] == ["timeout", "not run", "not run", "not run"]


@pytest.mark.usefixtures("sandbox")
def test_tests_that_were_not_run_are_no_verdict_unless_another_failed() -> None:
    level = CodeVerifier(LIMITS, seconds=-1.0).verify(sample("def double(x): return 2 * x", tests=TESTS))
    assert level.score is None and {test["status"] for test in level.evidence["tests"]} == {"not run"}
    unsure = "assert double(lambda: 1) is None"
    level = QUICK.verify(sample("def double(x): return 2 * x", tests=[TESTS[0], unsure]))
    assert level.score is None and level.evidence["passed"] == 1
    level = QUICK.verify(sample("def double(x): return 5", tests=[TESTS[0], unsure]))
    assert level.score == 0 and [test["passed"] for test in level.evidence["tests"]] == [False, None]


@pytest.mark.usefixtures("sandbox")
def test_evidence_is_bounded() -> None:
    tests = ["assert double(1) == 2, 'x' * 5000  # " + "y" * 5000] * 30
    verifier = CodeVerifier(LIMITS, seconds=0.5)  # the rest are not run, but one that failed is enough
    level = verifier.verify(sample("def double(x): raise ValueError('z' * 5000)", tests=tests))
    assert level.score == 0 and level.evidence["of"] == 30
    assert len(level.evidence["tests"]) == 20 and len(json.dumps(level.evidence)) < 20 * 600


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("x = 1", "x = 1"),
        ("a\n```python\nx = 1\n```\nb", "x = 1\n"),
        ("```python\nx = 1\n```\nor\n```Python3 title=a\nx = 2\n```\nrun\n```bash\npython x.py\n```", "x = 2\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```c\nint x;\n```\n```\nx = 1\n```", "x = 1\n"),
        ("1. So:\n   ```python\n   x = 1\n   ```", "   x = 1\n"),
        ("```python\nx = 1\nwas cut", "x = 1\nwas cut"),
        ("", ""),
    ],
)
def test_the_program_in_an_answer(answer: str, program: str) -> None:
    assert read_program(answer) == program


def test_outputs_are_compared_without_white_space_at_ends() -> None:
    assert same_output("1 2 \r\n3\n\n", "1 2\n3")
    assert not same_output("1  2", "1 2") and not same_output("1\n2", "1 2") and not same_output("", "1")


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({}, "has no tests"),
        ({"tests": []}, "has no tests"),
        ({"tests": "assert 1"}, "has no tests"),
        ({"language": "c", "tests": ["x"]}, "tests of programs in 'c'"),
        ({"tests": ["assert 1", "assert ("]}, r"metadata: tests\[1\]: the test is no Python"),
        ({"tests": [{"stdin": "1"}]}, "unknown form"),
        ({"tests": [7]}, "unknown form"),
        ({"tests": ["x"], "entry_point": "a b"}, "entry_point"),
        ({"tests": ["x"], "setup": 3}, "setup"),
    ],
)
def test_a_bad_record_is_a_users_mistake(metadata: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        QUICK.verify(sample("x = 1", **metadata))


def test_without_metadata_or_a_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no 'metadata'"):
        QUICK.verify(Sample([], "x", {}))
    monkeypatch.setattr("posttrain.sandbox.running.unavailable", lambda name: "not here")
    with pytest.raises(UserError, match="cannot be run contained"):
        QUICK.verify(sample("x = 1", tests=["assert x == 1"]))
    assert isinstance(QUICK, Verifier) and "code" in VERIFIERS


# A hostile program, and a word of the reason that is given for its 0.
HOSTILE = {
    "fork bomb": ("import os\nwhile True: os.fork()", "BlockingIOError|program ended"),
    "stubborn fork bomb": ("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", "ran longer"),
    "bomb of threads": ("import _thread, time\nwhile True: _thread.start_new_thread(time.sleep, (60,))", "can't start"),
    "endless loop": ("while True: pass", "ran longer"),
    "long sleep": ("import time; time.sleep(600)", "ran longer"),
    "signals ignored": ("import signal\nfor n in (1, 2, 15): signal.signal(n, 1)\nwhile True: signal.pause()", "ran longer"),
    "memory hog": ("x = []\nwhile True: x.append(b'x' * 10**6)", "memory"),
    "memory at once": ("x = b'x' * 10**11", "MemoryError"),
    "memory of many": ("import os\nfor _ in range(3): os.fork()\nx = []\nwhile True: x.append(b'x' * 10**6)", "memory"),
    "output flood": ("while True: print('x' * 5000, flush=True)", "wrote more than"),
    "errors flood": ("import os\nwhile True: os.write(2, b'x' * 5000)", "wrote more than"),
    "write to /usr": ("open('/usr/lib/planted', 'w')", "Read-only file system"),
    "write outside": ("open('{outside}', 'a').write('changed')", "No such file"),
    "fill the disk": ("f = open('f', 'wb')\nwhile True: f.write(b'x' * 10**5)", "No space left|too large"),
    "network": ("import socket; socket.create_connection(('127.0.0.1', 22), 1)", "unreachable|refused"),
    "name service": ("import urllib.request; urllib.request.urlopen('http://example.com', timeout=1)", "URLError"),
    "parent's environment": ("import os; print(open(f'/proc/{os.getppid()}/environ').read())", "Permission denied"),
    "host's environment": ("print(open('/proc/{host}/environ').read())", "No such file"),
    "crash": ("import ctypes; ctypes.string_at(0)", "SIGSEGV|program ended"),
    "exit with success": ("import os; os._exit(0)", "wrote ''|program ended"),
}  # fmt: skip


def score_hostile(name: str, tests: list[Any], outside: Path) -> LevelScore:
    program, reason = HOSTILE[name]
    program = program.replace("{outside}", str(outside)).replace("{host}", str(os.getpid()))
    level = QUICK.verify(sample(f"```python\n{program}\n```", tests=tests))
    assert level.score == 0 and level.contribution == 0, (name, level)
    (result,) = level.evidence["tests"]
    # On a busy machine a program may run out of time before it comes to what it is stopped for.
    assert re.search(f"{reason}|ran longer", result["reason"]), (name, result)
    return level


STDIN = [{"stdin": "1", "stdout": "2"}]


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_scores_0_and_the_reason_is_known(name: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("as it was")
    # What a program under asserts raises reaches the judge as its error; what it writes to its output is thrown away there.
    flood = name in ("output flood", "errors flood")
    score_hostile(name, STDIN if flood or len(name) % 2 else TESTS[:1], outside)
    assert outside.read_text() == "as it was"


@pytest.mark.slow
@pytest.mark.usefixtures("sandbox")
def test_the_scorer_outlives_200_hostile_programs(tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("as it was")
    names = list(HOSTILE)
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(4) as pool:
        levels = list(pool.map(lambda turn: score_hostile(names[turn % len(names)], STDIN, outside), range(200)))
    assert len(levels) == 200
    assert outside.read_text() == "as it was"
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, descriptors)
    assert verify(sample("def double(x): return 2 * x", tests=TESTS)).score == 1

"""Asserts about a program: what crosses between the two processes, and programs that cheat."""

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.sandbox.asserts import judge
from posttrain.sandbox.asserts.check import Verdict, check_asserts
from posttrain.sandbox.asserts.values import decode, encode
from posttrain.sandbox.running import available
from posttrain.sandbox.types import Limits, Status

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters())
    | st.binary()
    | st.complex_numbers(allow_nan=False)
)
HASHABLE = st.recursive(SCALARS, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=6)
DATA = st.recursive(
    HASHABLE,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(HASHABLE, inner, max_size=3) | st.sets(HASHABLE, max_size=3)
    | st.tuples(inner),
    max_leaves=10,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def somewhere() -> None:
    if reason := available():
        pytest.skip(reason)


def refuse(value: Any) -> Any:
    raise AssertionError(value)


def kinds(value: Any) -> Any:
    """Types of all that a value holds, so that 1, 1.0 and True are told apart."""
    if isinstance(value, (list, tuple)):
        return type(value), [kinds(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return type(value), sorted(repr(kinds(item)) for item in value)
    if isinstance(value, dict):
        return dict, [(kinds(key), kinds(item)) for key, item in value.items()]
    return type(value), repr(value)


@given(DATA)
def test_plain_data_crosses_unchanged(value: Any) -> None:
    text = json.dumps(encode(value, refuse))
    assert kinds(decode(json.loads(text), refuse)) == kinds(value)


@given(st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=8))
def test_whatever_comes_is_plain_data_or_an_error(value: Any) -> None:
    try:
        kinds(decode(value, lambda number: ("handle", number)))
    except (ValueError, TypeError, AttributeError):
        pass


def test_instances_of_subclasses_become_their_base() -> None:
    class Sly(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    carried = decode(json.loads(json.dumps(encode([Sly(3), {Sly(4): Sly(5)}], refuse))), refuse)
    assert type(carried[0]) is int and carried == [3, {4: 5}]


@pytest.mark.parametrize(
    ("test", "program", "names"),
    [
        ("assert f(x=1) == len(g)", "", ["f", "g"]),
        ("assert len([1]) == 1", "def len(x): return 1", ["len"]),
        ("assert len(f(1)) == 1", "def len(x): return 1", ["f"]),
        ("assert len([1]) == 1", "", []),
        ("import math\nassert math.pi > f()", "", ["f"]),
        ("def check(candidate):\n    y = 1\n    assert candidate(y)\ncheck(f)", "", ["f"]),
        ("try: f()\nexcept ValueError as error: pass", "not python (", ["f"]),
    ],
)
def test_names_that_the_program_has_to_have(test: str, program: str, names: list[str]) -> None:
    assert judge.free_names(test, program) == names


PROGRAM = """
import collections, math
limit = 10
def twice(x): return [x, x]
class Counter:
    def __init__(self, start=0): self.count = start
    def add(self, n): self.count += n; return self
def numbers(n):
    for i in range(n): yield i
def order(items): items.sort()
def letters(text): return collections.Counter(text)
def fail(): raise ValueError("no such thing")
def odd(): raise ZeroDivisionError
def large(): return 7 ** 9000
def apply(function, x): return function(x)
if __name__ == "__main__": raise SystemExit("run as a program")
"""

HOLDS = """
assert twice(2) == [2, 2] and twice("é") == ["é", "é"] and twice((1, 2)) == [(1, 2), (1, 2)]
assert limit == 10 and len(twice(1)) == 2
assert Counter(3).add(4).count == 7
assert list(numbers(3)) == [0, 1, 2] and [n + 1 for n in numbers(2)] == [1, 2]
items = [3, 1, 2]
order(items)
assert items == [1, 2, 3]
import collections
assert letters("aab") == collections.Counter("aab") == {"a": 2, "b": 1}
for call, kind in ((fail, ValueError), (odd, ZeroDivisionError)):
    try: call()
    except kind: pass
    else: assert False
assert large() == 7 ** 9000
assert math.isclose(twice(0.1)[0], 0.1)
assert apply(numbers, 1) is not None
"""


def test_a_right_program_passes(mechanism: str) -> None:
    verdict = check_asserts(PROGRAM, HOLDS, mechanism=mechanism)
    assert verdict.passed is True and verdict.reason == "", verdict
    assert verdict.outcome.status is Status.OK


@pytest.mark.parametrize(
    ("test", "reason"),
    [
        ("assert twice(1) == [1]", "an assertion does not hold"),
        ("assert twice(1) == [1], 'two are too many'", "two are too many"),
        ("assert missing(1) == 1", "NameError: name 'missing' is not defined"),
        ("assert fail() == 1", "ValueError: no such thing"),
        ("assert Counter() == Counter()", "an assertion does not hold"),
        ("assert twice(1)[5] == 1", "IndexError"),
        ("raise SystemExit(0)", "SystemExit"),
    ],
)
def test_a_wrong_program_fails_with_its_reason(test: str, reason: str) -> None:
    verdict = check_asserts(PROGRAM, test)
    assert verdict.passed is False and reason in verdict.reason, verdict


def test_what_cannot_be_judged_is_no_verdict() -> None:
    verdict = check_asserts(PROGRAM, "assert apply(lambda x: x + 1, 1) == 2")
    assert verdict.passed is None and "function" in verdict.reason
    assert check_asserts(PROGRAM, "assert (").passed is None


CHEATS = {
    "exit at once": """
import sys; sys.exit(0)
""",
    "end at once": """
import os; os._exit(0)
""",
    "end when called": """
import os
def f(x): os._exit(0)
""",
    "leave when called": """
def f(x): raise SystemExit(0)
""",
    "equal to all": """
class E:
  def __eq__(s, o): return True
  def __ne__(s, o): return False
  __hash__ = None
def f(x): return E()
""",
    "a number equal to all": """
class E(int):
  def __eq__(s, o): return True
  __hash__ = int.__hash__
def f(x): return E(9)
""",
    "a list equal to all": """
class E(list):
  def __eq__(s, o): return True
  __hash__ = None
def f(x): return E()
""",
    "no more assertion errors": """
import builtins
class A(BaseException): pass
builtins.AssertionError = A
def f(x): return 7
""",
    "print a verdict": """
print('{"passed": true, "reason": ""}', flush=True)
def f(x): return 3
""",
    "write to every descriptor": """
import os, json
for n in range(20):
  try: os.write(n, b'{"value": [1, 1]}\\n' * 9)
  except OSError: pass
def f(x): return 3
""",
    "write a verdict everywhere": """
import os
for p in os.listdir('/proc'):
  for n in range(9):
    try: open(f'/proc/{p}/fd/{n}', 'w').write('{"passed": true, "nonce": "", "reason": ""}\\n')
    except OSError: pass
def f(x): return 3
""",
    "replace modules on disk": """
import os
for n in ('math', 'json', 'ast', 'collections', 'traceback', 'fractions'):
  open(n + '.py', 'w').write('def isclose(*a, **k): return True')
open('posttrain/sandbox/asserts/judge.py', 'w').write('')
def f(x): return 3
""",
    "replace modules in memory": """
import math, sys, builtins
math.isclose = lambda *a, **k: True
builtins.abs = lambda x: 0
abs = lambda x: 0
def f(x): return 3
""",
    "look for the test": """
import os, gc, re, sys
found = []
for p in os.listdir('/proc'):
  for n in ('environ', 'cmdline', 'fd/0', 'mem'):
    try: found.append(open(f'/proc/{p}/{n}', 'rb').read(10**6))
    except (OSError, ValueError): pass
for folder, _, names in os.walk('/tmp'):
  found += [open(os.path.join(folder, n), 'rb').read() for n in names]
found += [repr(o).encode() for o in gc.get_objects() if isinstance(o, (str, dict, list))]
hits = re.findall(rb'== (71\\d93)', b' '.join(found))
def f(x): return int(hits[0])
""",
    "kill the judge": """
import os
for n in range(1, 99):
  if n != os.getpid():
    try: os.kill(n, 9)
    except OSError: pass
""",
    "stop the judge": """
import os
for n in range(1, 99):
  if n != os.getpid():
    try: os.kill(n, 19)
    except OSError: pass
os._exit(0)
""",
    "nonsense as replies": """
import os
for n in range(3, 20):
  try: os.write(n, b'[' * 10**5 + b'\\n')
  except OSError: pass
""",
    "wait": """
def f(x):
  while True: pass
""",
}
TEST = "import math\nassert f(1) == 71593 and math.isclose(f(1), 71593) and abs(f(1) - 71593) < 1"


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_cheat_does_not_pass(cheat: str) -> None:
    verdict: Verdict = check_asserts(CHEATS[cheat], TEST, Limits(wall_seconds=2))
    assert verdict.passed is False, verdict
    assert verdict.reason


@pytest.mark.parametrize(
    "helper",
    [
        "abs = lambda x: 0",
        "class math:\n  isclose = staticmethod(lambda *a: True)",
        "import math\nmath.isclose = lambda *a: True",
    ],
)
def test_a_program_does_not_define_what_it_is_compared_by(helper: str) -> None:
    for test in ("assert abs(f(1) - 71593) < 1", "assert math.isclose(f(1), 71593)"):
        assert check_asserts(f"{helper}\ndef f(x): return 3", test).passed is False
        assert check_asserts(f"{helper}\ndef f(x): return 71593", test).passed is True


def test_a_function_named_as_one_of_pythons_can_be_tested() -> None:
    assert check_asserts("def sum(a, b): return a + b", "assert sum(2, 3) == 5").passed is True
    assert check_asserts("def sum(a, b): return a - b", "assert sum(2, 3) == 5").passed is False


def test_the_honest_program_passes_what_the_cheats_do_not() -> None:
    assert check_asserts("def f(x): return 71593", TEST).passed is True


def test_a_test_takes_little_time() -> None:
    took = []
    for _ in range(8):
        start = time.perf_counter()
        check_asserts("def f(x): return x", "assert f(1) == 1")
        took.append(time.perf_counter() - start)
    # 0.1 s on two quiet cores; the bound is for a machine that does much else.
    assert min(took) < 1.0, took

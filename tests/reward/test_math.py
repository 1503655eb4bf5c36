"""Mathematics compared by value: hand-made cases, exact fractions as an oracle, and expressions made to do harm."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.config.errors import UserError
from posttrain.reward.types import LevelScore, Sample
from posttrain.reward.verifiers import MathVerifier, is_right, verify
from posttrain.reward.verifiers.math_notation import TAIL, answer_readings, plain_to_latex
from posttrain.reward.verifiers.math_pool import MathPool
from posttrain.reward.verifiers.math_worker import is_written_number


def sample(answer: str, expected: str) -> Sample:
    return Sample([{"role": "user", "content": "?"}], answer, {"verifier": "math", "answer": expected})


def verified(answer: str, expected: str) -> LevelScore:
    return verify(sample(answer, expected))


RIGHT = [
    # expected, answer
    ("46", "46"),
    ("46", " 46.\n"),
    ("46", "12 + 34 = 46"),
    ("46", "46.0"),
    ("46", "The answer is **46**."),
    ("7", "1+2=3, 3+4=7. Answer: 7"),
    ("72", "She sold 48/2 = 24 clips in May.\nShe sold 48+24 = 72 altogether.\n#### 72"),
    ("5", r"First I thought \( 6 \), but it is $\boxed{5}$."),
    ("5", "The answer is\n$$5$$"),
    ("5", "x = 5"),
    ("x=5", "5"),
    # negative numbers, thousands, powers of ten
    ("-5", "−5"),
    ("-5", "$-5$"),
    ("-1/2", r"$-\frac{1}{2}$"),
    ("-0.5", "-.5"),
    ("1,000", "1000"),
    ("12345678", "12,345,678"),
    ("300000", r"$3\times10^5$"),
    ("300000", "3 x 10^5"),
    ("3e5", "300000"),
    # fractions, decimals, percentages
    ("1/2", "0.5"),
    ("0.5", "1/2"),
    (r"\frac{1}{2}", r"\boxed{\frac{2}{4}}"),
    (r"\frac12", "½"),
    ("3/2", "1 1/2"),
    (r"1\frac{1}{2}", "3/2"),
    ("0.75", r"$\frac{3}{4}$"),
    ("1/3", "0.333333"),
    ("50%", "0.5"),
    ("1/2", "50%"),
    ("50%", r"$50\%$"),
    ("3:4", "6:8"),
    # units and money
    ("5", "5 cm"),
    ("5 cm", "5"),
    ("90", "90°"),
    (r"90^\circ", "90 degrees"),
    ("18", "$18"),
    (r"\$18", "She makes $18 every day."),
    # roots, constants, logarithms
    (r"\sqrt{8}", "2*sqrt(2)"),
    (r"2\sqrt{2}", "Answer: 2√2"),
    ("sqrt(2)", r"$\sqrt 2$"),
    (r"\frac{\pi}{4}", "pi/4"),
    (r"2\pi", "2π"),
    (r"\ln 2", "ln(2)"),
    (r"\log_2 8", "3"),
    # expressions
    ("x^2+2x+1", "(x+1)**2"),
    ("2x", "x*2"),
    (r"\frac{1}{2}x+3", "x/2+3"),
    (r"\sin(x)", "sin(x)"),
    ("3+4i", "4i+3"),
    ("x>3", "3 < x"),
    # sets, intervals, tuples, matrices
    (r"\{1,2\}", "2, 1"),
    ("1,2", "1 and 2"),
    ("(1,2)", "$(1, 2)$"),
    (r"(-\infty, 3]", "(-inf, 3]"),
    ("(-inf,-1) U (1,inf)", r"$(-\infty,-1)\cup(1,\infty)$"),
    (r"3<x<5", "$(3,5)$"),
    (r"\emptyset", r"$\emptyset$"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"$$\begin{pmatrix}1&2\\3&4\end{pmatrix}$$"),
    (r"$\text{Paris}$", r"$\text{Paris}$"),
]

WRONG = [
    ("46", "47"),
    ("46", "-46"),
    ("-5", "5"),
    ("46", ""),
    ("46", "I do not know"),
    ("1/3", "0.33"),
    ("2", "2.0000001"),
    ("1000000", "1000001"),
    ("7", "1+2=3, 3+4=7. Answer: 8"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    ("1,2", "1"),
    ("5", "5, 6"),
    (r"(-\infty, 3]", r"$(-\infty,3)$"),
    ("x=5", "y=5"),
    ("x^2+1", "x^2-1"),
    ("x>3", r"$x\ge 3$"),
    (r"\sqrt{2}", "1.41"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"$$\begin{pmatrix}1&3\\2&4\end{pmatrix}$$"),
    # hedging
    ("5", "The answer is 5 or 6"),
    ("5", "Answer: 5 or maybe 6"),
    ("5", r"\boxed{5} or \boxed{7}"),
    ("5", "$5$ or $6$"),
]

UNEVALUATED = [
    ("46", "12+34"),
    ("46", "$12+34$"),
    ("46", "Answer: 12 + 34 apples"),
    ("42", r"\boxed{6\times 7}"),
    ("42", "84/2"),
    ("42", r"$\frac{84}{2}$"),
    ("42", r"$84 \div 2$"),
    ("3", "sqrt(9)"),
    ("120", "5!"),
    ("-1", "i^2"),
]


@pytest.mark.parametrize(("expected", "answer"), RIGHT)
def test_right_answers(expected: str, answer: str) -> None:
    level = verified(answer, expected)
    assert (level.name, level.score, level.contribution) == ("verifier", 1.0, 1.0), level.evidence
    assert "reason" not in level.evidence


@pytest.mark.parametrize(("expected", "answer"), WRONG)
def test_wrong_answers(expected: str, answer: str) -> None:
    level = verified(answer, expected)
    assert (level.score, level.contribution) == (0.0, 0.0), level.evidence


@pytest.mark.parametrize(("expected", "answer"), UNEVALUATED)
def test_the_question_is_no_answer(expected: str, answer: str) -> None:
    level = verified(answer, expected)
    assert level.score == 0.0 and level.evidence["reason"] == "is not one worked-out number"


def test_evidence_says_what_was_read() -> None:
    assert verified("So $x = \\frac{1}{2}$", "0.5").evidence == {"expected": r"\frac{1}{2}", "read": r"x = \frac{1}{2}"}
    assert verified("no idea", "5").evidence == {"expected": "5", "read": None, "reason": "cannot be read as mathematics"}
    assert verified(" ", "5").evidence["reason"] == "is empty"


@pytest.mark.parametrize("expected", ["", "Paris", "yes", "no", "the north-east", "((", r"\frac{"])
def test_an_expected_answer_that_is_no_mathematics_is_refused(expected: str) -> None:
    with pytest.raises(UserError, match="cannot be read as mathematics; write it in LaTeX between dollar signs"):
        verified("5", expected)


RATIONALS = st.fractions(min_value=-50, max_value=50, max_denominator=40)


@settings(max_examples=25, deadline=None)
@given(RATIONALS, RATIONALS)
def test_fractions_are_equal_exactly_where_they_are(one: Fraction, other: Fraction) -> None:
    sign = "-" if other < 0 else ""
    forms = [
        str(other),
        rf"$\frac{{{other.numerator}}}{{{other.denominator}}}$" if other.denominator > 1 else f"${other}$",
        rf"\boxed{{{sign}\dfrac{{{abs(other.numerator)}}}{{{other.denominator}}}}}"
        if other.denominator > 1
        else rf"\boxed{{{other}}}",
    ]
    for form in forms:
        assert is_right(verified(form, str(one))) is (one == other), form
        assert is_right(verified(form, str(other))), form


@settings(max_examples=25, deadline=None)
@given(st.decimals(-(10**6), 10**6, places=3), st.sampled_from([Decimal("0"), Decimal("0.001"), Decimal("-1"), Decimal("0.1")]))
def test_decimals_are_equal_exactly_where_they_are(value: Decimal, off: Decimal) -> None:
    assert is_right(verified(str(value + off), str(value))) is (off == 0)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="0123456789+-*/^().,$\\{} xaeqrtsbodfin=<|%", max_size=40))
def test_no_text_breaks_the_verifier(answer: str) -> None:
    level = verified(answer, "5")
    assert level.score in (0.0, 1.0)


@given(st.text(max_size=300))
def test_readings_are_bounded_and_never_fail(text: str) -> None:
    assert all(len(reading) <= 2 * TAIL for reading in answer_readings(text * 30))
    plain_to_latex(text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("46", True),
        ("-46.50", True),
        ("1,000", True),
        (r"1{,}000", True),
        (r"x = 46", True),
        (r"50\%", True),
        (r"90^\circ", True),
        (r"3 \times 10^{5}", True),
        (r"-\frac{1}{2}", True),
        (r"1\frac{1}{2}", True),
        ("12+34", False),
        ("10^5", False),
        (r"\sqrt{4}", False),
        ("5, 6", False),
        ("", False),
        ("46 = 12+34", False),
    ],
)
def test_written_numbers_are_told_from_expressions(text: str, number: bool) -> None:
    assert is_written_number(text) is number


DEEP = "$" + "{" * 3000 + "$"
ENDLESS = r"$\sum_{k=1}^{10^{9}} \sin(k^k)$"


def test_hostile_expressions_end_at_the_deadline() -> None:
    verifier = MathVerifier(seconds=0.7, workers=1)
    began = time.monotonic()
    level = verifier.verify(sample(ENDLESS, "x+1"))
    assert time.monotonic() - began < 20  # the start of a process included, on a busy machine
    assert level.score == 0.0 and level.evidence["reason"] == "takes longer than 0.7 s"
    # The record's own mistake is said, not scored. It runs in the process after the one that was killed.
    with pytest.raises(UserError, match="takes longer than 0.7 s"):
        verifier.verify(sample("5", DEEP))


@pytest.mark.parametrize(
    "answer", ["10**10**10", "9^9^9^9", "$9^{9^{9^{9}}}$", "99999999999!", "1" * 100_000, "(" * 5000, "1+" * 2000]
)
def test_giant_numbers_cost_nothing_where_a_number_is_expected(answer: str) -> None:
    assert verified(answer, "5").score == 0.0
    assert is_right(verified("5", "5"))


@pytest.fixture(scope="module")
def pool() -> Iterator[MathPool]:
    pool = MathPool(seconds=20.0, workers=1)
    assert pool.compare(["$5$"], ["5"]).right
    yield pool
    pool.close()


def test_a_fork_does_not_share_its_parents_processes(pool: MathPool) -> None:
    assert len(pool._idle) == 1
    child = os.fork()
    if child == 0:  # no assertion here: pytest would run twice
        os._exit(len(pool._idle))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(pool._idle) == 1 and pool.compare(["$6$"], ["6"]).right


def test_a_process_that_dies_is_replaced(pool: MathPool) -> None:
    (worker,) = pool._idle
    os.kill(worker._process.pid, signal.SIGKILL)
    worker._process.wait()
    assert pool.compare(["$5$"], ["5"]).right
    assert pool._idle != [worker]


def test_many_threads_share_the_processes() -> None:
    # math-verify's own alarm would refuse to work in any of them.
    with ThreadPoolExecutor(8) as threads:
        levels = list(threads.map(lambda i: verified(f"Answer: {i}", str(i - i % 3)), range(60)))
    assert [is_right(level) for level in levels] == [i % 3 == 0 for i in range(60)]

"""Sums of reasoning-gym taken apart into steps, and numbers that are nearly right or plainly wrong."""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

from posttrain.config.errors import UserError

_SUM = re.compile(r"-?\d+( [+-] -?\d+)+")
_TERM = re.compile(r"([+-]) (-?\d+)")
_FARTHEST = 30


@dataclass(frozen=True)
class WorkedSum:
    """A sum with its terms.

    Attributes:
        question: the task's text.
        first: the first term.
        operations: "+" or "-", and the term that follows.
    """

    question: str
    first: int
    operations: tuple[tuple[str, int], ...]

    @property
    def totals(self) -> list[int]:
        """The running total after each operation; the last is the answer."""
        totals = []
        total = self.first
        for sign, term in self.operations:
            total = total + term if sign == "+" else total - term
            totals.append(total)
        return totals

    @property
    def answer(self) -> int:
        """The right answer."""
        return self.totals[-1]

    def steps(self, stated: list[int]) -> list[str]:
        """The steps as text ("1+2=3"), each from the total stated before it to the one stated after it.

        Args:
            stated: a total for each operation, right or wrong.
        """
        before = [self.first, *stated[:-1]]
        return [
            f"{total}{sign}{term}={after}" for total, (sign, term), after in zip(before, self.operations, stated, strict=True)
        ]


def take_apart(question: str, expression: str, where: str | None = None) -> WorkedSum:
    """A sum such as "4 + 1 - 7" with its steps.

    Args:
        question: text that asks for it.
        expression: whole numbers joined by + and -, single spaces between them or none.
        where: place named in errors.

    Raises:
        UserError: other operations or parentheses, or fewer than three terms (one step cannot be out of order).
    """
    spaced = re.sub(r"(?<=\d)\s*([+-])\s*", r" \1 ", expression.strip())
    if not _SUM.fullmatch(spaced):
        raise UserError(
            f"graded_pairs works sums of + and - in steps, not '{expression}'",
            where=where,
            instead='set operators: ["+", "-"] and allow_parentheses: false',
        )
    operations = tuple((sign, int(term)) for sign, term in _TERM.findall(spaced))
    if len(operations) < 2:
        raise UserError(f"'{expression}' has one step, which cannot be out of order", where=where, instead="set min_terms: 3")
    return WorkedSum(question, int(spaced.split(" ", 1)[0]), operations)


def is_near(number: int, right: int) -> bool:
    """Whether a wrong number is off by one, or by one digit of the same place."""
    if number == right:
        return False
    one, other = str(number), str(right)
    return abs(number - right) == 1 or (len(one) == len(other) and sum(a != b for a, b in zip(one, other, strict=True)) == 1)


def near_number(right: int, random: Random) -> int:
    """A wrong number that `is_near`, of the same sign where there is one: off by one as often as by a digit."""
    digits = str(abs(right))
    changed = {int(digits[:i] + digit + digits[i + 1 :]) for i in range(len(digits)) for digit in "0123456789"}
    of_digit = sorted(sign * number for number in changed for sign in ((1,) if right >= 0 else (-1,)))
    by_digit = [number for number in of_digit if is_near(number, right)]
    by_one = [number for number in (right - 1, right + 1) if number >= 0 or right < 0]
    return random.choice(by_one if not by_digit or random.random() < 0.5 else by_digit)


def far_number(right: int, random: Random) -> int:
    """A wrong number that is not near, of the same sign, at most 30 off."""
    numbers = range(right - _FARTHEST, right + _FARTHEST + 1)
    return random.choice([n for n in numbers if n != right and not is_near(n, right) and (n >= 0) == (right >= 0)])

"""The process in which math-verify reads and compares expressions; math_pool.py starts this file as a script.

It speaks lines of JSON, one request at a time.

- In: {"expected": [texts], "answer": [texts], "seconds": longest time}; the texts are tried in order until one can be read.
- Out, once: {"ready": true}.
- Out, for a request: {"expected": text or null} and, where the expected answer could be read,
  {"read": text or null, "right": bool, "evaluated": bool}. In the place of either {"error": text}, with "fatal" where the
  process ends.

Whoever waits for a line kills the process when it has waited long enough; the limit on processor time ends one whose parent is
gone.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import IO, Any

MEMORY_BYTES = 2**31
SHOWN = 200  # characters of an expression in a reply

_INTEGER = r"(?:[-+]?\d{1,3}(?:(?:,|\{,\}|\\,|\\!| )\d{3})+|[-+]?\d+)"
_DECIMAL = rf"(?:[-+]?(?:{_INTEGER})?[.,](?:\d+|\d*\\overline\{{\d+\}})|{_INTEGER})"
_FRACTION = "|".join(
    (
        rf"(?:{_INTEGER})?\s*\\[dt]?frac\{{{_INTEGER}\}}\{{{_INTEGER}\}}",
        rf"[-+]\\[dt]?frac\{{(?:{_INTEGER})\}}\{{(?:{_INTEGER})\}}",
        r"[-+]?\d+/\d+",
    )
)
_SCIENTIFIC = rf"(?:{_DECIMAL})\s*(?:\\times|\\cdot|\*)\s*10(?:\^|\*\*)(?:\{{\s*[-+]?\d+\s*\}}|\d)"
_UNIT = r"(?:\s*(?:\\?%|\^\{?\\circ\}?))?"
_WHOLE_OR_DECIMAL = re.compile(rf"(?:{_SCIENTIFIC}|{_DECIMAL}){_UNIT}")
_ANY_NUMBER = re.compile(rf"(?:{_SCIENTIFIC}|{_FRACTION}|{_DECIMAL}){_UNIT}")
_BRACKETS = re.compile(r"\\(?:left|right|displaystyle|!|,|;|:)(?![A-Za-z])")


def is_written_number(text: str, fractions: bool = True) -> bool:
    """Whether LaTeX is a number as one writes it: digits, a decimal, 3 x 10^5, a percentage, and a fraction where allowed.

    What stands before the last equals sign does not count ("x = 5", "12 + 34 = 46").
    """
    text = _BRACKETS.sub("", text).rpartition("=")[2].strip().strip("*$.").strip()
    return (_ANY_NUMBER if fractions else _WHOLE_OR_DECIMAL).fullmatch(text) is not None


def first_readable(texts: Sequence[str]) -> tuple[Any, str] | None:
    """The first text that math-verify reads: its expression, and the LaTeX or number that was read in it."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    # Boxes before everything else. The library's alarm works in main threads only and stops no arithmetic on big integers.
    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    for text in texts:
        found = parse(text, targets, fallback_mode="first_match", parsing_timeout=None)
        if found and not isinstance(found[0], str):
            return found[0], next((part for part in found if isinstance(part, str)), "")
    return None


def answer_request(request: dict[str, Any], reply: Callable[[dict[str, Any]], None]) -> None:
    """Read both sides and compare them."""
    from math_verify import verify
    from sympy import Expr
    from sympy.core.relational import Relational

    expected = first_readable(request["expected"])
    reply({"expected": None if expected is None else expected[1][:SHOWN]})
    if expected is None:
        return
    read = first_readable(request["answer"])
    if read is None:
        reply({"read": None, "right": False, "evaluated": True})
        return
    number = isinstance(expected[0], Expr | Relational) and is_written_number(expected[1])
    evaluated = not number or is_evaluated(read[1], expected[1], bool(expected[0].is_integer))
    right = evaluated and bool(verify(expected[0], read[0], timeout_seconds=None))
    reply({"read": read[1][:SHOWN], "right": right, "evaluated": evaluated})


def is_evaluated(read: str, expected: str, whole: bool) -> bool:
    """Whether an answer is worked out as far as an expected number.

    "12+34" equals 46 and answers nothing. So where a number is expected, a number has to be given; and where it is a whole
    one, no fraction: that division may be the very question.
    """
    return is_written_number(read, fractions=not (whole and is_written_number(expected, fractions=False)))


def serve(requests: IO[str], replies: IO[str]) -> None:
    """Answer requests until their end. Ends early, after saying so, when memory runs out: what is left may be damaged."""

    def reply(value: dict[str, Any]) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    from math_verify import parse

    parse("$1$", parsing_timeout=None)  # the first use builds tables
    reply({"ready": True})
    for line in requests:
        try:
            request = json.loads(line)
            used = time.process_time()
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used + request["seconds"]) + 2, resource.RLIM_INFINITY))
            answer_request(request, reply)
        except MemoryError:
            reply({"error": "needs too much memory", "fatal": True})
            return
        except (Exception, RecursionError) as error:  # sympy raises anything on odd input
            reply({"error": f"{type(error).__name__}: {error}"[:SHOWN]})


def main() -> None:
    """Bound the memory, keep the pipe for replies to ourselves, serve."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)  # the library warns that its own alarm is off
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    serve(sys.stdin, replies)


if __name__ == "__main__":
    main()

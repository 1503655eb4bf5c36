"""Where an answer states its result, and plain notation turned into LaTeX: what math-verify does not read by itself.

math-verify finds LaTeX between its marks (`$...$`, `\\boxed{...}`) and, outside of them, sums and products of numbers alone.
"""

from __future__ import annotations

import re

TAIL = 4000
"""Characters of an answer that are searched: a result stands at the end."""

_LONGEST_PLAIN = 300
_FUNCTIONS = "arcsin|arccos|arctan|sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp"
_NAMES = "pi|alpha|beta|gamma|theta|lambda|mu|sigma|phi|omega"
_INFINITY = "infinity|inf|oo"
_SIGNS = str.maketrans(
    {
        "×": "*",
        "⋅": "*",
        "·": "*",
        "÷": "/",
        "π": r"\pi ",
        "∞": r"\infty ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "∪": r"\cup ",
        "°": r"^\circ ",
        "²": "^2",
        "³": "^3",
        "√": "sqrt",
    }
)
# Outside LaTeX too, where the library would read "−5" as nothing or as 5.
_EVERYWHERE = str.maketrans({"−": "-", "–": "-", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "\u00a0": " "})

# Numbers, operators, brackets, LaTeX commands, known names, and letters that stand alone or beside a number ("2x").
_PLAIN = re.compile(
    rf"(?:[\s\d+\-*/^_=<>()\[\]{{}}|.,:;!%]|\\[A-Za-z]+|\\[{{}}%]|(?:{_FUNCTIONS}|{_NAMES}|{_INFINITY})(?![A-Za-z])"
    r"|(?<![A-Za-z])[A-Za-z](?![A-Za-z]))+"
)
_MIXED = re.compile(r"(-?)(\d+) +(\d+)\s*/\s*(\d+)")
_STATED = re.compile(r"\banswer\b[\s*_]*(?:is\b|:|=)[\s*_:]*", re.I)
_WORDS = re.compile(r"[^\W\d_]{3,}(?:[\s-]+[^\W\d_]+)*|no", re.I)
_DOLLARS = re.compile(r"^\\?\$(?=[\d.])(?!.*\$)", re.S)  # money
_JOINED = re.compile(r"\s*,?\s+(?:or|and)\s+(?:maybe\s+|perhaps\s+|possibly\s+)?", re.I)
_MARKS = ("$", r"\boxed", r"\(", r"\[")


def expected_readings(text: str) -> list[str]:
    """Ways to read an expected answer, the best first; none where it is words and no mathematics."""
    text = _DOLLARS.sub("", text.strip().translate(_EVERYWHERE))
    if any(mark in text for mark in _MARKS):
        return [text]
    if latex := plain_to_latex(text):
        return [f"${latex}$"]
    return [] if not text or _WORDS.fullmatch(text) else [f"${text}$", text]


def answer_readings(text: str) -> list[str]:
    """Ways to read an answer, the best first.

    A box is found by the library. Otherwise what follows the last "answer is" or "answer:" counts, or the whole text if it is an
    expression by itself, or the last expression that the library finds.
    """
    text = text.strip()[-TAIL:].translate(_EVERYWHERE)
    if r"\boxed" in text:
        return [text]
    if stated := list(_STATED.finditer(text)):
        text = text[stated[-1].start() :]
        line = text[stated[-1].end() - stated[-1].start() :].split("\n", 1)[0]
        latex = _several_to_latex(line)
    else:
        latex = _several_to_latex(text)
    return [f"${latex}$", text] if latex else [text]


def _several_to_latex(text: str) -> str | None:
    """Like `plain_to_latex`, and "5 or 6" as "5, 6": two values, of which the library would take the first."""
    parts = [plain_to_latex(part) for part in _JOINED.split(text)] if len(text) <= _LONGEST_PLAIN else [None]
    return ", ".join(part for part in parts if part) if all(parts) else None


def plain_to_latex(text: str) -> str | None:
    """An expression in plain notation ("2*sqrt(3)", "x**2 + 1", "(-inf, 3]", "1 1/2") as LaTeX.

    Returns:
        The LaTeX without dollar signs; None where the text is no expression by itself, or marks its LaTeX already.
    """
    text = text.lstrip("`* \n").rstrip("`* \n.")
    if not text or len(text) > _LONGEST_PLAIN or any(mark in text for mark in _MARKS):
        return None
    text = re.sub(r"(?<=[\])])\s*U\s*(?=[\[(])", r"\\cup ", text.translate(_SIGNS))
    if not _PLAIN.fullmatch(text):
        return None
    if mixed := _MIXED.fullmatch(text):
        sign, whole, above, below = mixed.groups()
        return rf"{sign}{whole}\frac{{{above}}}{{{below}}}"
    text = re.sub(r"(?<=\d)\s*[xX]\s*(?=10\^)", r"\\times ", text)
    text = re.sub(r"(?<=\d)[eE]([+-]?\d+)(?!\w)", r"*10^{\1}", text)
    text = text.replace("**", "^").replace("<=", r"\le ").replace(">=", r"\ge ").replace("*", r"\cdot ")
    text = re.sub(r"(?<!\\)%", r"\\%", text)
    text = re.sub(r"\^\(([^()]*)\)", r"^{\1}", text)
    text = re.sub(r"(?<![\\A-Za-z])sqrt\s*(?:\(([^()]*)\)|(\d+|[a-z]))", lambda match: rf"\sqrt{{{match[1] or match[2]}}}", text)
    text = re.sub(rf"(?<![\\A-Za-z])(?:{_INFINITY})(?![A-Za-z])", lambda _: r"\infty ", text)
    return re.sub(rf"(?<![\\A-Za-z])({_FUNCTIONS}|{_NAMES})(?![A-Za-z])", r"\\\1 ", text)

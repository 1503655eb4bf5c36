"""The picture of a comparison: how many times the memory's floor each contestant takes, as SVG that opens by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from posttrain.kernels.bench.rows import GROUPS

WIDTH, LEFT, RIGHT, ROW, HEAD = 900, 372, 24, 24, 34
TICKS = (1, 1.5, 2, 3, 5, 10, 20, 50, 100)
MARKS = ("o", "s", "d", "t", "v", "p", "x")
COLOURS = 7
# The colours of a run's report, and some more; light and dark.
STYLE = """
svg { --ink: #1d2733; --soft: #5c6b7a; --line: #d5dde5; --paper: #ffffff; --c0: #2468b2; --c1: #b93a32; --c2: #b07a1e;
  --c3: #2e8555; --c4: #7a4fa3; --c5: #5c6b7a; --c6: #a3477f; }
@media (prefers-color-scheme: dark) {
  svg { --ink: #e4e9ef; --soft: #9aa8b6; --line: #36424e; --paper: #14191f; --c0: #6aa8ec; --c1: #e5786f; --c2: #dcab58;
    --c3: #5fba87; --c4: #b48fd8; --c5: #9aa8b6; --c6: #dc8dbc; }
}
.paper { fill: var(--paper); }
text { fill: var(--soft); font: 12px system-ui, sans-serif; }
.head { fill: var(--ink); font-weight: 600; font-size: 13px; }
line { stroke: var(--line); }
.floor { stroke: var(--ink); }
"""


def write_plot(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Write the picture of a record's rows; returns `path`."""
    path.write_text(draw(rows), encoding="utf-8")
    return path


def draw(rows: Sequence[Mapping[str, Any]]) -> str:
    """A section a group, a line a row, a mark for each contestant, on a logarithmic scale that begins at the floor."""
    shown = [row for row in rows if row.get("of_floor")]
    names = list(dict.fromkeys(name for row in shown for name in row["of_floor"]))
    most = max((ratio for row in shown for ratio in row["of_floor"].values()), default=2.0)
    least = min((ratio for row in shown for ratio in row["of_floor"].values()), default=1.0)
    scale = _Scale(min(1.0, least) * 0.97, max(2.0, most) * 1.06)
    y, parts = HEAD, [_legend(names)]
    for group, title in GROUPS.items():
        members = [row for row in shown if row["group"] == group]
        if not members:
            continue
        y += HEAD
        parts.append(f'<text class="head" x="12" y="{y - 10}">{escape(title)}</text>')
        parts.append(_grid(scale, y - 4, y + len(members) * ROW))
        for row in members:
            parts.append(_line(row, names, scale, y + ROW / 2))
            y += ROW
        y += ROW // 2
    height = y + 26
    parts.append(f'<text x="{LEFT}" y="{height - 8}">times the floor (bytes that must move / bandwidth of a copy)</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="times the floor">'
    return f'{head}<style>{STYLE}</style><rect class="paper" width="{WIDTH}" height="{height}"/>{"".join(parts)}</svg>\n'


class _Scale:
    """Logarithmic, from `low` at the left to `high` at the right."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def __call__(self, ratio: float) -> float:
        share = math.log(ratio / self.low) / math.log(self.high / self.low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)


def _legend(names: Sequence[str]) -> str:
    x, parts = 20.0, []
    for index, name in enumerate(names):
        parts.append(_mark(index, x, 18, name) + f'<text x="{x + 10:.0f}" y="22">{escape(name)}</text>')
        x += 34 + 7 * len(name)
    return "".join(parts)


def _grid(scale: _Scale, top: float, bottom: float) -> str:
    found = []
    for tick in TICKS:
        if scale.low <= tick <= scale.high:
            kind = ' class="floor"' if tick == 1 else ""
            found.append(f'<line{kind} x1="{scale(tick):.1f}" x2="{scale(tick):.1f}" y1="{top}" y2="{bottom}"/>')
            found.append(f'<text x="{scale(tick):.1f}" y="{top - 4}" text-anchor="middle">{tick:g}</text>')
    return "".join(found)


def _line(row: Mapping[str, Any], names: Sequence[str], scale: _Scale, y: float) -> str:
    label = f'<text x="{LEFT - 12}" y="{y + 4:.1f}" text-anchor="end">{escape(row["case"])}</text>'
    rule = f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
    # Ours, the first, is drawn last and so lies on top.
    marks = [
        _mark(names.index(name), scale(ratio), y, f"{name}: {ratio:.2f} times the floor, {row['results'][name]['ms']:.4g} ms")
        for name, ratio in reversed(row["of_floor"].items())
    ]
    return label + rule + "".join(marks)


def _mark(index: int, x: float, y: float, title: str) -> str:
    """A mark of its own shape and colour for each contestant, which tells its figures when pointed at."""
    shape = MARKS[index % len(MARKS)]
    fill = f'fill="var(--c{index % COLOURS})"'
    points = {
        "s": "-5,-5 5,-5 5,5 -5,5",
        "d": "0,-6.5 6.5,0 0,6.5 -6.5,0",
        "t": "0,-6 6,5 -6,5",
        "v": "0,6 6,-5 -6,-5",
        "p": "-6,-2 0,-6.5 6,-2 4,5.5 -4,5.5",
        "x": "-6,-3 -3,-6 0,-3 3,-6 6,-3 3,0 6,3 3,6 0,3 -3,6 -6,3 -3,0",
    }
    inner = f"<title>{escape(title)}</title>"
    if shape == "o":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" {fill}>{inner}</circle>'
    return f'<polygon points="{points[shape]}" transform="translate({x:.1f},{y:.1f})" {fill}>{inner}</polygon>'

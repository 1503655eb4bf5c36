"""Small charts as SVG text: line charts, bars, the stage graph. Colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 420, 180
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 28
MOST_POINTS = 400
"""Points of a drawn curve; a longer series is thinned out evenly."""


def line_chart(points: Sequence[tuple[float, float]], label: str) -> str:
    """A curve over steps with its axes; `points` are (step, value) in the order of the steps, at least one."""
    return lines_chart({"": points}, label)


def lines_chart(series: Mapping[str, Sequence[tuple[float, float]]], label: str) -> str:
    """Curves over steps that share their axes, each with a colour and dashes of its own (classes `line0`, `line1`, ...).

    Args:
        series: points of each curve, (step, value) in the order of the steps; at least one curve, at least one point each.
            Names are shown below the chart; "" is not.
        label: what the chart shows, for those who cannot see it.
    """
    curves = {name: _thin(points) for name, points in series.items()}
    every = [point for points in curves.values() for point in points]
    (x_low, x_high), (y_low, y_high) = _span([x for x, _ in every]), _span([y for _, y in every])
    names = [name for name in curves if name]
    height = HEIGHT + (18 if names else 0)

    def place(x: float, y: float) -> str:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        down = TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return f"{across:.1f},{down:.1f}"

    lines = "".join(
        f'<polyline class="curve line{index}" points="{" ".join(place(x, y) for x, y in points)}"/>'
        for index, points in enumerate(curves.values())
    )
    heights = [(value, TOP + (y_high - value) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)) for value in ticks(y_low, y_high)]
    grid = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down:.1f}" y2="{down:.1f}"/>'
        f'<text x="{LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{_number(value)}</text>'
        for value, down in heights
    )
    steps = "".join(
        f'<text x="{place(value, y_low).split(",")[0]}" y="{HEIGHT - 8}" text-anchor="middle">{_number(value)}</text>'
        for value in ticks(x_low, x_high)
    )
    key = "".join(_key(name, index, len(names)) for index, name in enumerate(names))
    head = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label, quote=True)}">'
    return f"{head}{grid}{steps}{lines}{key}</svg>"


def _key(name: str, index: int, count: int) -> str:
    """A curve's name beside a piece of its line, in its place of the row below the chart."""
    left = LEFT + index * (WIDTH - LEFT) / count
    return (
        f'<polyline class="curve line{index}" points="{left:.1f},{HEIGHT + 8} {left + 18:.1f},{HEIGHT + 8}"/>'
        f'<text x="{left + 22:.1f}" y="{HEIGHT + 12}">{escape(name)}</text>'
    )


def bar_chart(values: Mapping[str, float], label: str) -> str:
    """Horizontal bars of shares from 0 to 1, one a name."""
    row, left, width = 26, 170, 640
    scale = width - left - 70
    bars = "".join(
        f'<text x="{left - 8}" y="{index * row + 18}" text-anchor="end">{escape(name)}</text>'
        f'<rect class="track" x="{left}" y="{index * row + 5}" width="{scale}" height="16" rx="3"/>'
        f'<rect class="bar" x="{left}" y="{index * row + 5}" width="{max(0.0, min(1.0, value)) * scale:.1f}" height="16" rx="3"/>'
        f'<text x="{left + scale + 8}" y="{index * row + 18}">{100 * value:.1f} %</text>'
        for index, (name, value) in enumerate(values.items())
    )
    return f'<svg viewBox="0 0 {width} {len(values) * row + 6}" role="img" aria-label="{escape(label, quote=True)}">{bars}</svg>'


def graph_chart(parents: Mapping[str, Sequence[str]], states: Mapping[str, str], notes: Mapping[str, str]) -> str:
    """Boxes in columns, every box right of all its parents, with lines between.

    Args:
        parents: for every box the boxes it comes from, parents before children.
        states: class of every box, for its colour.
        notes: second line of text in every box.
    """
    box_width, box_height, gap_x, gap_y = 150, 44, 46, 16
    columns: dict[str, int] = {}
    for name, above in parents.items():
        columns[name] = max((columns[parent] + 1 for parent in above), default=0)
    rows: dict[int, int] = {}
    places: dict[str, tuple[int, int]] = {}
    for name, column in columns.items():
        row = rows.get(column, 0)
        rows[column] = row + 1
        places[name] = (8 + column * (box_width + gap_x), 8 + row * (box_height + gap_y))
    width = 16 + (max(columns.values(), default=0) + 1) * (box_width + gap_x) - gap_x
    height = 16 + max(rows.values(), default=1) * (box_height + gap_y) - gap_y
    middle = box_height / 2
    edges = "".join(
        _edge(places[parent][0] + box_width, places[parent][1] + middle, places[name][0], places[name][1] + middle)
        for name, above in parents.items()
        for parent in above
    )
    boxes = "".join(
        f'<g class="node {escape(states[name], quote=True)}">'
        f'<rect x="{x}" y="{y}" width="{box_width}" height="{box_height}" rx="6"/>'
        f'<text x="{x + 10}" y="{y + 18}" class="name">{escape(name)}</text>'
        f'<text x="{x + 10}" y="{y + 35}">{escape(notes[name])}</text></g>'
        for name, (x, y) in places.items()
    )
    head = f'<svg viewBox="0 0 {width} {height}" style="width:100%;max-width:{width}px" role="img" aria-label="stage graph">'
    return f"{head}{edges}{boxes}</svg>"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between two bounds, at most about `most` of them."""
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _edge(x1: float, y1: float, x2: float, y2: float) -> str:
    middle = (x1 + x2) / 2
    return f'<path class="edge" d="M{x1},{y1} C{middle},{y1} {middle},{y2} {x2},{y2}"/>'


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    stride = -(-len(points) // MOST_POINTS)
    kept = list(points[::stride])
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high > low:
        return low, high
    margin = abs(low) * 0.1 or 1.0
    return low - margin, high + margin


def _number(value: float) -> str:
    return f"{value:.4g}"

"""How the notebooks' pictures look: sizes, colours, axes, and what stands where there is nothing to show.

Colours are Okabe and Ito's, which people with the common kinds of colour blindness tell apart; lines differ in their dashes and
markers as well, for print without colour. Figures are made without pyplot, so nothing is kept open behind the caller's back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from posttrain.config.errors import UserError

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:  # an extra, as training needs no pictures
    raise UserError("pictures need matplotlib", instead="install it: pip install 'posttrain[notebooks]'") from error

BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#6B7780"
COLOURS = (BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, "#000000", GREY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
BUCKET_STYLE = {"contrastive": 0, "bridging": 4, "near_tie": 1, "adversarial": 3}
"""Place in the palette of each difficulty bucket, the same in every picture."""

WIDTH = 8.0
"""Inches across a figure; a notebook shows it at full width."""


def panels(
    title: str, count: int = 1, *, columns: int = 1, height: float = 3.6, share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure with a title and `count` panels in rows of `columns`; `height` is inches a row."""
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(WIDTH, height * rows + 0.4), layout="constrained", dpi=110)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=share_y)
    axes: list[Axes] = list(grid.flat)
    for spare in axes[count:]:
        spare.remove()
    figure.suptitle(title, fontsize=13, fontweight="bold")
    for axis in axes[:count]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, axis="y", color="#D9DEE3", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=9)
    return figure, axes[:count]


def missing(title: str, what: str) -> Figure:
    """A picture that says in words what is not there to be drawn."""
    figure = Figure(figsize=(WIDTH, 1.7), layout="constrained", dpi=110)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    axis = figure.subplots()
    axis.set_axis_off()
    axis.text(0.5, 0.5, what, ha="center", va="center", fontsize=11, color="#444444", wrap=True, transform=axis.transAxes)
    return figure


def label(axis: Axes, x: str, y: str, title: str = "") -> None:
    """Name both axes, with units, and the panel where there are several."""
    axis.set_xlabel(x, fontsize=10)
    axis.set_ylabel(y, fontsize=10)
    if title:
        axis.set_title(title, fontsize=11)


def as_shares(axis: Axes) -> None:
    """A vertical axis of shares from 0, with room for markers at 1."""
    axis.set_ylim(0, 1.03)


def as_pair_accuracy(axis: Axes) -> None:
    """A vertical axis of pair accuracies, once all is drawn: from below chance, or from the tenth below the lowest, to 1."""
    lowest = axis.dataLim.y0
    axis.set_ylim(min(0.4, math.floor(10 * lowest) / 10) if math.isfinite(lowest) else 0.4, 1.03)


def chance(axis: Axes) -> None:
    """A line at one half: what guessing reaches on pairs."""
    axis.axhline(0.5, color=GREY, linewidth=1, linestyle=(0, (2, 2)), label="chance")


def legend(axis: Axes, **options: Any) -> None:
    """A legend that hides no curve: beside the panel unless told otherwise."""
    options = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5), "frameon": False, "fontsize": 9, **options}
    axis.legend(**options)


def curve_style(index: int) -> dict[str, Any]:
    """Colour, dashes and marker of the curve at a place of the palette."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 4.5,
        "linewidth": 1.8,
    }


def bucket_style(bucket: str) -> dict[str, Any]:
    """The style of a difficulty bucket's curves."""
    return curve_style(BUCKET_STYLE.get(bucket, len(BUCKET_STYLE) + 1))


def words(name: str) -> str:
    """A name of the config as a reader's word: `near_tie` -> "near tie"."""
    return name.replace("_", " ")


def interval_bars(
    axis: Axes, places: Sequence[float], shares: Sequence[float], bounds: Sequence[tuple[float, float]], **style: Any
) -> None:
    """Points with their intervals."""
    below = [share - low for share, (low, _) in zip(shares, bounds, strict=True)]
    above = [high - share for share, (_, high) in zip(shares, bounds, strict=True)]
    axis.errorbar(places, shares, yerr=[below, above], capsize=3, **style)

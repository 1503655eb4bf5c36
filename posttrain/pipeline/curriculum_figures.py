"""Pictures of a reward model's training: how the mixture moved, what was learned when, what was forgotten again.

Every function takes the run and returns one figure; what the run does not hold is said in the figure, in words.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from posttrain.pipeline.figure_style import (
    BUCKET_STYLE,
    COLOURS,
    Figure,
    as_pair_accuracy,
    bucket_style,
    chance,
    curve_style,
    interval_bars,
    label,
    legend,
    missing,
    panels,
    words,
)
from posttrain.pipeline.intervals import wilson
from posttrain.pipeline.reward_data import RewardRun, RewardStageData, ScoredPair, by_bucket

STEP = "optimizer step"
RIGHT = "share of held-out pairs\nordered rightly"
NO_CONTROL = "The run has no control: a reward stage with curriculum.shuffled: true beside the one with a curriculum."
NO_ACCURACIES = "The stage logged no accuracy by bucket: it has no curriculum, or it is not done."


def mixture_over_training(run: RewardRun, stage: str | None = None) -> Figure:
    """Share of each difficulty bucket in the pairs drawn, over the steps, with the beginnings of the phases."""
    asked = run.stage(stage)
    title = f"Mixture of pairs over the training of {asked.name}"
    drawn = [bucket for bucket in asked.buckets if asked.curve("mixture", bucket)]
    if not drawn:
        return missing(title, "The stage logged no mixture: it has no curriculum, or it has not begun.")
    steps = sorted({step for bucket in drawn for step, _ in asked.curve("mixture", bucket)})
    shares = [[dict(asked.curve("mixture", bucket)).get(step, 0.0) for step in steps] for bucket in drawn]
    figure, (axis,) = panels(title)
    axis.stackplot(
        steps,
        shares,
        labels=[words(bucket) for bucket in drawn],
        colors=[COLOURS[BUCKET_STYLE.get(bucket, 6)] for bucket in drawn],
        edgecolor="white",
        linewidth=0.8,
        alpha=0.9,
    )
    last = asked.steps or steps[-1]
    for phase, begins in asked.phases.items():
        axis.axvline(begins * last, color="black", linewidth=1, linestyle=":")
        axis.text(begins * last, 1.01, f" {phase}", fontsize=9, va="bottom")
    axis.set_xlim(0, max(last, steps[-1]))
    axis.set_ylim(0, 1.08 if asked.phases else 1.0)
    label(axis, STEP, "share of the pairs drawn")
    handles, names = axis.get_legend_handles_labels()
    legend(axis, handles=handles[::-1], labels=names[::-1], title="bucket")  # in the order in which the areas lie
    return figure


def loss_over_training(run: RewardRun) -> Figure:
    """Training loss of every reward stage, smoothed, over the steps."""
    title = "Training loss of the reward models"
    logged = [stage for stage in run.stages.values() if stage.metrics.points("loss")]
    if not logged:
        return missing(title, "No reward stage has logged a loss yet.")
    figure, (axis,) = panels(title)
    for index, stage in enumerate(logged):
        steps, losses = zip(*stage.metrics.points("loss"), strict=True)
        style = {**curve_style(_stage_colour(index)), "marker": ""}
        axis.plot(steps, losses, color=style["color"], linewidth=0.7, alpha=0.35)
        axis.plot(steps, _smooth(losses), label=_named(stage), **style)
    label(axis, STEP, "loss (nats a pair)")
    legend(axis)
    return figure


def accuracy_over_training(run: RewardRun, stage: str | None = None) -> Figure:
    """Held-out pair accuracy of each difficulty bucket while the stage trains."""
    asked = run.stage(stage)
    title = f"Pair accuracy by difficulty while {asked.name} trains"
    measured = [bucket for bucket in asked.buckets if asked.curve("accuracy", bucket)]
    if not measured:
        return missing(title, NO_ACCURACIES)
    figure, (axis,) = panels(title)
    for bucket in measured:
        steps, shares = zip(*asked.curve("accuracy", bucket), strict=True)
        axis.plot(steps, shares, label=words(bucket), **bucket_style(bucket))
    chance(axis)
    as_pair_accuracy(axis)
    label(axis, STEP, RIGHT)
    legend(axis, title="bucket")
    return figure


def against_shuffled(run: RewardRun, stage: str | None = None) -> Figure:
    """The same curves beside those of the shuffled control, a panel a bucket."""
    asked, control = run.stage(stage), run.control
    title = "Curriculum against the same pairs in shuffled order"
    if control is None or control.name == asked.name:
        return missing(title, NO_CONTROL)
    shown = [bucket for bucket in asked.buckets if asked.curve("accuracy", bucket) and control.curve("accuracy", bucket)]
    if not shown:
        return missing(title, NO_ACCURACIES)
    figure, axes = panels(title, len(shown), columns=min(2, len(shown)), height=2.8, share_y=True)
    for axis, bucket in zip(axes, shown, strict=True):
        for index, (of, name) in enumerate(((asked, f"{asked.name} (curriculum)"), (control, _named(control)))):
            steps, shares = zip(*of.curve("accuracy", bucket), strict=True)
            axis.plot(steps, shares, label=name, **curve_style((0, 3)[index]))
        chance(axis)
        as_pair_accuracy(axis)
        label(axis, STEP, RIGHT, words(bucket))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def final_accuracy(run: RewardRun) -> Figure:
    """Pair accuracy by difficulty at the end of every reward stage, with intervals of 95 %."""
    title = "Pair accuracy by difficulty at the end of training"
    evaluated = [stage for stage in run.stages.values() if by_bucket(stage.report)]
    if not evaluated:
        return missing(title, "No reward stage has been evaluated by difficulty yet.")
    buckets = [bucket for bucket in evaluated[0].buckets if any(bucket in by_bucket(stage.report) for stage in evaluated)]
    figure, (axis,) = panels(title)
    for index, stage in enumerate(evaluated):
        measured = by_bucket(stage.report)
        held = [place for place, bucket in enumerate(buckets) if measured.get(bucket, {}).get("accuracy") is not None]
        shares = [measured[buckets[place]]["accuracy"] for place in held]
        bounds = [wilson(share, measured[buckets[place]]["count"]) for place, share in zip(held, shares, strict=True)]
        shift = (index - (len(evaluated) - 1) / 2) * 0.18
        style = {**curve_style(_stage_colour(index)), "linestyle": "none", "markersize": 7}
        interval_bars(axis, [place + shift for place in held], shares, bounds, label=_named(stage), **style)
    chance(axis)
    as_pair_accuracy(axis)
    axis.set_xticks(range(len(buckets)), [words(bucket) for bucket in buckets])
    axis.set_xlim(-0.5, len(buckets) - 0.5)
    label(axis, "difficulty bucket, from easy to hard", RIGHT)
    legend(axis)
    return figure


def accuracy_by_difficulty(run: RewardRun, groups: int = 5) -> Figure:
    """Pair accuracy against difficulty itself, the held-out pairs cut into `groups` of equal size."""
    title = "Pair accuracy against difficulty at the end of training"
    known = {
        name: [pair for pair in stage.pairs if pair.difficulty is not None and pair.differing]
        for name, stage in run.stages.items()
    }
    if not any(known.values()):
        return missing(title, "No held-out pair has a difficulty: the stages have no curriculum, or are not evaluated.")
    figure, (axis,) = panels(title)
    for index, (name, pairs) in enumerate(known.items()):
        stage = run.stages[name]
        if not pairs:
            continue
        cut = _groups_by_difficulty(pairs, groups)
        right = [[pair.preference > 0 for pair in group] for group in cut]
        shares = [sum(found) / len(found) for found in right]
        bounds = [wilson(share, len(found)) for share, found in zip(shares, right, strict=True)]
        places = [float(np.mean([pair.difficulty or 0.0 for pair in group])) for group in cut]
        interval_bars(axis, places, shares, bounds, label=_named(stage), **curve_style(_stage_colour(index)))
    chance(axis)
    as_pair_accuracy(axis)
    label(axis, "mean difficulty of the group (0 easiest, 1 hardest)", RIGHT)
    legend(axis)
    return figure


def forgetting(run: RewardRun) -> Figure:
    """Best accuracy of each bucket during training minus the last one, in points of per cent, for every reward stage."""
    title = "Forgetting: best accuracy during training minus the last"
    measured = [stage for stage in run.stages.values() if any(stage.curve("accuracy", bucket) for bucket in stage.buckets)]
    if not measured:
        return missing(title, NO_ACCURACIES)
    buckets = list(dict.fromkeys(b for stage in measured for b in stage.buckets if stage.curve("accuracy", b)))
    figure, (axis,) = panels(title)
    width = 0.8 / len(measured)
    for index, stage in enumerate(measured):
        lost = [_lost(stage.curve("accuracy", bucket)) for bucket in buckets]
        places = [place + (index - (len(measured) - 1) / 2) * width for place in range(len(buckets))]
        colour = COLOURS[_stage_colour(index)]
        bars = axis.bar(
            places, lost, width * 0.92, label=_named(stage), color=colour, hatch=("", "//", "..")[index % 3], edgecolor="white"
        )
        axis.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    axis.set_xticks(range(len(buckets)), [words(bucket) for bucket in buckets])
    axis.margins(y=0.15)
    label(axis, "difficulty bucket, from easy to hard", "accuracy lost (points of per cent)")
    legend(axis)
    return figure


def _lost(points: Sequence[tuple[int, float]]) -> float:
    return 100 * (max(share for _, share in points) - points[-1][1]) if points else float("nan")


def _groups_by_difficulty(pairs: Sequence[ScoredPair], groups: int) -> list[list[ScoredPair]]:
    ordered = sorted(pairs, key=lambda pair: pair.difficulty or 0.0)
    bounds = np.linspace(0, len(ordered), min(groups, len(ordered)) + 1).astype(int)
    return [ordered[low:high] for low, high in zip(bounds[:-1], bounds[1:], strict=True)]


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about a tenth of the series, its start corrected for."""
    keep = max(0.0, 1 - 20 / len(values))
    smoothed, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(mean / weight)
    return smoothed


def _stage_colour(index: int) -> int:
    """Blue for the first stage, vermilion for the second: the pair that differs most."""
    return (0, 3, 2, 5)[index % 4]


def _named(stage: RewardStageData) -> str:
    return f"{stage.name} (shuffled)" if stage.shuffled and "shuffled" not in stage.name else stage.name

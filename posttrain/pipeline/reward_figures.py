"""Pictures of what a reward model has learned: its scores, their honesty, and what happens when they are optimised against.

Every function returns one figure; what the run does not hold is said in the figure, in words. The pictures of the training
itself are in `curriculum_figures`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from posttrain.pipeline.figure_style import (
    BLUE,
    GREY,
    ORANGE,
    VERMILION,
    Axes,
    Figure,
    as_pair_accuracy,
    as_shares,
    chance,
    curve_style,
    interval_bars,
    label,
    legend,
    missing,
    panels,
)
from posttrain.pipeline.intervals import wilson
from posttrain.pipeline.metrics import StageMetrics
from posttrain.pipeline.reward_data import RewardRun, by_target

NO_PAIRS = "The stage has no scored pairs (eval/pairs.jsonl): it is not evaluated yet."
PROBE_COLOURS = {"learned": 0, "scalar": 3}


def score_distributions(run: RewardRun) -> Figure:
    """Scores of better and worse answers by target, a panel a reward stage; pairs that differ in the target."""
    title = "Scores of better and worse answers"
    stages = [stage for stage in run.stages.values() if stage.pairs]
    if not stages:
        return missing(title, NO_PAIRS)
    figure, axes = panels(title, len(stages), height=3.0)
    for axis, stage in zip(axes, stages, strict=True):
        targets = [target for target in stage.targets if stage.leads(target)]
        for index, (name, colour, shift) in enumerate((("better answer", BLUE, -0.18), ("worse answer", ORANGE, 0.18))):
            scores = [[pair.means[target][index] for pair, _ in stage.leads(target)] for target in targets]
            _boxes(axis, scores, [place + shift for place in range(len(targets))], colour, name)
        axis.set_xticks(range(len(targets)), targets, rotation=20 if len(targets) > 5 else 0)
        label(axis, "target", "score (logit)", stage.name)
        legend(axis)
    return figure


def _boxes(axis: Axes, values: Sequence[Sequence[float]], places: Sequence[float], colour: str, name: str) -> None:
    """Boxes from the first to the third quartile, whiskers from 5 to 95 %."""
    axis.boxplot(
        values,
        positions=places,
        widths=0.3,
        whis=(5, 95),
        showfliers=False,
        patch_artist=True,
        boxprops={"facecolor": colour, "alpha": 0.75},
        medianprops={"color": "black"},
        label=name,
    )


def lead_distributions(run: RewardRun, stage: str | None = None) -> Figure:
    """By how much the better answer leads, a panel a target; what lies left of zero is ordered wrongly."""
    asked = run.stage(stage)
    title = f"Lead of the better answer in {asked.name}"
    targets = [target for target in asked.targets if asked.leads(target)]
    if not targets:
        return missing(title, NO_PAIRS)
    columns = min(2, len(targets))
    figure, axes = panels(title, len(targets), columns=columns, height=2.3)
    for axis, target in zip(axes, targets, strict=True):
        leads = [lead for _, lead in asked.leads(target)]
        even = np.histogram_bin_edges(leads, bins=min(30, max(5, len(leads) // 8)))
        edges: list[float] = np.unique(np.concatenate([even, [0.0]])).tolist()  # no bar holds right and wrong together
        axis.hist([lead for lead in leads if lead > 0], edges, color=BLUE, label="right")
        axis.hist([lead for lead in leads if lead <= 0], edges, color=ORANGE, hatch="//", edgecolor="white", label="wrong")
        axis.axvline(0, color="black", linewidth=1)
        right = sum(lead > 0 for lead in leads) / len(leads)
        label(axis, "lead (logits)", "pairs", f"{target}: {100 * right:.0f} % right of {len(leads)}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def accuracy_by_target(run: RewardRun) -> Figure:
    """Held-out accuracy of each head, on pairs that differ in its target, with intervals of 95 %."""
    title = "Pair accuracy by target"
    stages = [stage for stage in run.stages.values() if by_target(stage.report)]
    if not stages:
        return missing(title, "No reward stage has been evaluated by target yet.")
    targets = list(dict.fromkeys(target for stage in stages for target in stage.targets if target in by_target(stage.report)))
    figure, (axis,) = panels(title)
    for index, stage in enumerate(stages):
        measured = by_target(stage.report)
        held = [place for place, target in enumerate(targets) if measured.get(target, {}).get("accuracy") is not None]
        shares = [measured[targets[place]]["accuracy"] for place in held]
        bounds = [wilson(share, measured[targets[place]]["count"]) for place, share in zip(held, shares, strict=True)]
        shift = (index - (len(stages) - 1) / 2) * 0.18
        style = {**curve_style((0, 3, 2, 5)[index % 4]), "linestyle": "none", "markersize": 7}
        interval_bars(axis, [place + shift for place in held], shares, bounds, label=stage.name, **style)
    chance(axis)
    as_pair_accuracy(axis)
    axis.set_xticks(range(len(targets)), targets, rotation=20 if len(targets) > 5 else 0)
    axis.set_xlim(-0.5, len(targets) - 0.5)
    label(axis, "target", "share of held-out pairs\nordered rightly")
    legend(axis)
    return figure


def length_bias(run: RewardRun, stage: str | None = None, target: str | None = None) -> Figure:
    """Lead in score against lead in length, a point a held-out pair, with the line that fits best.

    Without a target the lead is the mean over the targets in which a pair differs, as in the evaluation's numbers.
    """
    asked = run.stage(stage)
    title = f"Length bias of {asked.name}"
    points = [(pair.longer_by, lead) for pair, lead in asked.leads(target) if pair.longer_by is not None]
    if not points:
        return missing(title, NO_PAIRS if not asked.pairs else "The scored pairs have no lengths.")
    lengths, leads = np.array([x for x, _ in points], dtype=float), np.array([y for _, y in points])
    figure, (axis,) = panels(title)
    axis.axhspan(min(leads.min(), 0.0), 0, color=ORANGE, alpha=0.12, linewidth=0)
    axis.scatter(lengths, leads, s=14, color=BLUE, alpha=0.45, linewidths=0, label="held-out pair")
    axis.axhline(0, color="black", linewidth=1)
    axis.axvline(0, color=GREY, linewidth=1, linestyle=":")
    note = f"{target or 'mean over what a pair differs in'}, {len(points)} pairs\nbelow zero the worse answer leads"
    if np.ptp(lengths) > 0 and np.ptp(leads) > 0:
        slope, offset = np.polyfit(lengths, leads, 1)
        ends = np.array([lengths.min(), lengths.max()])
        axis.plot(ends, slope * ends + offset, color=VERMILION, linewidth=2, label=f"fit: {slope:+.3f} logits a token")
        note += f"; correlation {np.corrcoef(lengths, leads)[0, 1]:+.2f}"
    label(axis, "tokens by which the better answer is longer", "lead of the better answer (logits)", note)
    legend(axis, loc="best", bbox_to_anchor=None, frameon=True)
    return figure


def calibration(run: RewardRun, stage: str | None = None) -> Figure:
    """Reliability diagram of each head: how sure it was, and how often it was right."""
    asked = run.stage(stage)
    title = f"Calibration of {asked.name}"
    measured = {target: found for target, found in asked.report.get("calibration", {}).items() if found and found.get("bins")}
    if not measured:
        return missing(title, "The evaluation has no calibration: too few held-out pairs, or not evaluated yet.")
    figure, axes = panels(title, len(measured), columns=min(2, len(measured)), height=3.1)
    for axis, (target, found) in zip(axes, measured.items(), strict=True):
        bins = [held for held in found["bins"] if held["count"]]
        axis.plot([0.5, 1], [0.5, 1], color=GREY, linestyle=(0, (2, 2)), label="calibrated")
        bounds = [wilson(held["accuracy"], held["count"]) for held in bins]
        style = {**curve_style(0), "linestyle": "none", "linewidth": 1.2, "label": "with its temperature, 95 % interval"}
        interval_bars(axis, [held["confidence"] for held in bins], [held["accuracy"] for held in bins], bounds, **style)
        before = found.get("bins_before") or []
        hollow: dict[str, Any] = {"linestyle": "none", "marker": "s", "markersize": 5, "markerfacecolor": "none", "color": ORANGE}
        axis.plot([held["confidence"] for held in before], [held["accuracy"] for held in before], label="before", **hollow)
        axis.set_xlim(0.48, 1.02)
        as_shares(axis)
        errors = f"error {found['ece_before']:.3f} → {found['ece_after']:.3f}, temperature {found['temperature']:.2f}"
        label(axis, "confidence (probability)", "share ordered rightly", f"{target}\n{errors}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def leakage_matrix(run: RewardRun, stage: str | None = None) -> Figure:
    """How often each head follows pairs that differ in one target alone."""
    asked = run.stage(stage)
    title = f"Leakage between the targets of {asked.name}"
    matrix = asked.leakage
    if not matrix or len(asked.targets) < 2:
        return missing(title, "Nothing to compare: the model has one head, or no held-out pairs differ in one target alone.")
    rows, columns = list(matrix), asked.targets
    shares = np.array([[matrix[row].get(column, math.nan) for column in columns] for row in rows])
    figure, (axis,) = panels(title, height=0.45 * len(rows) + 2.2)
    axis.grid(False)
    image = axis.imshow(np.ma.masked_invalid(shares), cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(shares.shape):
        share = shares[row, column]
        text, colour = ("no pairs", GREY) if np.isnan(share) else (f"{share:.2f}", "black" if share > 0.55 else "white")
        axis.text(column, row, text, ha="center", va="center", fontsize=9, color=colour)
    axis.set_xticks(range(len(columns)), columns, rotation=25, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(rows)), rows)
    figure.colorbar(image, ax=axis, label="share preferring the better answer")
    label(axis, "head that is asked", "pairs that differ in this alone")
    return figure


def best_of_n(run: RewardRun, stage: str | None = None) -> Figure:
    """The over-optimisation probe: proxy and gold reward of the best of n answers, as n grows."""
    asked = run.stage(stage)
    title = f"Best of n by {asked.name}"
    found = asked.best_of_n
    if found is None:
        return missing(title, "The run has no best-of-n probe: no best_of_n.json in the stage's folder.")
    figure, (proxy, gold) = panels(title, 2, columns=2, height=3.7)
    for model in ("learned", "scalar"):
        if curves := found.get(model):
            ns = curves.get("ns") or found["ns"]
            style = {**curve_style(PROBE_COLOURS[model]), "label": model}
            proxy.plot(ns, curves["proxy"], **style)
            gold.plot(ns, curves["gold"], **style)
            if curves.get("gold_low") and curves.get("gold_high"):
                gold.fill_between(ns, curves["gold_low"], curves["gold_high"], color=style["color"], alpha=0.18, linewidth=0)
    onset = found.get("onset")
    said = "gold never falls behind" if onset is None else f"over-optimised from n = {onset}"
    for axis in (proxy, gold):
        axis.set_xscale("log", base=2)
        axis.set_xticks(found["ns"], [str(n) for n in found["ns"]])
        axis.minorticks_off()
        if onset is not None:
            axis.axvline(onset, color="black", linewidth=1.2, linestyle=":", label="over-optimisation begins")
    label(proxy, _n_axis(found), "score of the model itself (its own scale)", "Proxy: what is optimised")
    label(gold, _n_axis(found), "verified reward (share right)", f"Gold: {said}")
    figure.legend(*gold.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _n_axis(found: Mapping[str, Any]) -> str:
    distances = found.get("kl")
    return "answers drawn a prompt, n" + (f"\n(KL from 0 to {max(distances):.2f} nats)" if distances else "")


def reward_over_rl(run: RewardRun, stage: str | None = None) -> Figure:
    """Reward by level, verified success and answer length while online RL optimises against the reward; with its alarms."""
    learners = {name: metrics for name, metrics in run.learners.items() if metrics.points("reward")}
    title = "The reward while online RL optimises against it"
    if not learners:
        return missing(title, "The run has no stage of kind rl that has begun.")
    name = stage if stage in learners else next(iter(learners))
    metrics = learners[name]
    figure, (reward, success, length) = panels(f"{title} ({name})", 3, height=2.1)
    levels = ["reward", *sorted(level for level in metrics.series if level.startswith("reward/"))]
    for index, level in enumerate(levels):
        _plot_metric(reward, metrics, level, index, "total" if level == "reward" else level.removeprefix("reward/"))
    _plot_metric(success, metrics, "accuracy", 0, "verified right")
    _plot_metric(length, metrics, "answer_length", 0, "mean answer")
    as_shares(success)
    for axis, unit in ((reward, "reward"), (success, "share of samples"), (length, "tokens")):
        for number, step in enumerate(alarm_steps(metrics)):
            axis.axvline(step, color=VERMILION, linewidth=1, linestyle=":", label="alarm" if number == 0 else None)
        label(axis, "optimizer step", unit)
        legend(axis)
    return figure


def _plot_metric(axis: Axes, metrics: StageMetrics, name: str, index: int, shown: str) -> None:
    points = metrics.points(name)
    if points:
        steps, values = zip(*points, strict=True)
        axis.plot(steps, values, label=shown, **{**curve_style(index), "marker": ""})


def alarm_steps(metrics: StageMetrics) -> list[int]:
    """Steps at which the guards of online RL raised an alarm (metrics `alarm` or `alarm/NAME` above 0)."""
    names = [name for name in metrics.series if name == "alarm" or name.startswith("alarm/")]
    return sorted({step for name in names for step, value in metrics.points(name) if value > 0})

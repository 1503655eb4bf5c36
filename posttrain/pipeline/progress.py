"""How a run looks while it goes: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from posttrain.config.schema import RunConfig
from posttrain.pipeline.graph import Node
from posttrain.pipeline.metrics import StageMetrics

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

LINE_SECONDS = 15.0
"""Time between lines of a running stage where there is no terminal."""

VERBS = {"make_base": "base model", "prepare": "preparing data", "train": "training", "evaluate": "evaluating"}


class Progress:
    """Shows nodes as they start, advance and end.

    Args:
        console: where to; None shows nothing.
        config: gives the number of steps of every stage.
    """

    def __init__(self, console: Console | None, config: RunConfig) -> None:
        self.console = console
        self.steps = {name: stage.steps for name, stage in config.stages.items()}
        self.started_at: dict[str, float] = {}
        self.nodes: dict[str, Node] = {}
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._last_line: dict[str, float] = {}

    def note(self, line: str) -> None:
        """A line of text above the bars."""
        if self.console is not None:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def skipped(self, node: Node) -> None:
        """A node is done already."""
        self.note(f"{node.name}: done before, kept")

    def started(self, node: Node) -> None:
        """A node begins to run."""
        now = time.monotonic()
        self.started_at[node.name], self._last_line[node.name] = now, now
        self.nodes[node.name] = node
        if self.console is not None and self.console.is_terminal:
            total = self.steps.get(node.stage) if node.step == "train" else None
            self._tasks[node.name] = self._live().add_task(f"{node.stage}: {VERBS[node.step]}", total=total, note="")
        else:
            self.note(f"{node.name}: {VERBS[node.step]} ...")

    def update(self, stages: Mapping[str, StageMetrics]) -> None:
        """Show how far the running nodes are."""
        for name, node in self.nodes.items():
            metrics = stages.get(node.stage)
            if node.step != "train" or metrics is None or not metrics.step:
                continue
            if self._bars is not None and name in self._tasks:
                self._bars.update(self._tasks[name], completed=metrics.step, note=_figures(metrics))
            elif time.monotonic() - self._last_line[name] >= LINE_SECONDS:
                self._last_line[name] = time.monotonic()
                left = time_left(metrics, self.steps[node.stage])
                tail = "" if left is None else f", {format_seconds(left)} left"
                self.note(f"{name}: step {metrics.step}/{self.steps[node.stage]}, {_figures(metrics)}{tail}")

    def finished(self, node: Node, seconds: float) -> None:
        """A node is through."""
        self._remove(node)
        self.note(f"{node.name}: done in {format_seconds(seconds)}")

    def failed(self, node: Node) -> None:
        """A node has failed."""
        self._remove(node)
        self.note(f"{node.name}: failed")

    def stop(self) -> None:
        """Take the bars away; may be called again."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
            self._tasks.clear()

    def _remove(self, node: Node) -> None:
        self.nodes.pop(node.name, None)
        task = self._tasks.pop(node.name, None)
        if self._bars is not None and task is not None:
            self._bars.remove_task(task)

    def _live(self) -> Bars:
        if self._bars is None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
            self._bars = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console, transient=True)
            self._bars.start()
        return self._bars


def _figures(metrics: StageMetrics) -> str:
    """Reward or loss, and tokens a second, as far as they are logged."""
    parts = []
    for name in ("reward", "loss"):
        value = metrics.latest(name)
        if value is not None:
            parts.append(f"{name} {value:.3f}")
            break
    speed = metrics.latest("tokens_per_second")
    if speed is not None:
        parts.append(f"{speed:,.0f} tokens/s")
    return ", ".join(parts)


def time_left(metrics: StageMetrics, steps: int) -> float | None:
    """Seconds until the last step at the speed between the first record and the last, None when that is not known yet."""
    logged = sorted({step for series in metrics.series.values() for step in series})
    if metrics.first is None or metrics.last is None or len(logged) < 2 or metrics.last <= metrics.first:
        return None
    return max(0.0, (steps - logged[-1]) * (metrics.last - metrics.first) / (logged[-1] - logged[0]))


def format_seconds(seconds: float) -> str:
    """ "8.3 s", "4 min 05 s", "2 h 07 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"

"""The table of a run, made from its files alone; `report_html` makes the page."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from posttrain.config.errors import UserError
from posttrain.pipeline.folder import RunFolder
from posttrain.pipeline.metrics import StageMetrics, read_stages


@dataclass(frozen=True)
class Row:
    """A stage in the table.

    Attributes:
        stage: its name; "base" is the first model.
        seconds: wall time of preparation and training together, None while it is not done.
        tokens_per_second: trained tokens over training time (start of processes excluded), None where nothing is trained.
        heldout_accuracy: share of held-out prompts answered right, greedy; None where it is not measured.
        pair_accuracy: share of held-out pairs that a reward model orders right; None for other stages.
        num_prompts: held-out prompts scored.
    """

    stage: str
    seconds: float | None
    tokens_per_second: float | None
    heldout_accuracy: float | None
    pair_accuracy: float | None
    num_prompts: int | None


def table(run_folder: str | Path) -> list[Row]:
    """A row a stage, in the order they run; UserError when the folder is not that of a run."""
    return make_table(read_run(run_folder))


@dataclass(frozen=True)
class RunRecords:
    """What the files of a run say.

    Attributes:
        folder: where they lie.
        manifest: manifest.json.
        metrics: what every stage has logged.
        evaluations: eval.json of every stage that has one.
    """

    folder: RunFolder
    manifest: dict[str, Any]
    metrics: dict[str, StageMetrics]
    evaluations: dict[str, dict[str, Any]]

    @property
    def stages(self) -> list[str]:
        """Names of the stages, the first model included, in order."""
        return list(dict.fromkeys(node["stage"] for node in self.manifest["nodes"].values()))

    def seconds(self, node: str) -> float | None:
        """Wall time of a finished node."""
        artifact = self.manifest["nodes"].get(node, {}).get("artifact")
        return None if artifact is None else float(artifact["seconds"])


def read_run(run_folder: str | Path) -> RunRecords:
    """Read manifest, metrics and evaluations."""
    folder = RunFolder.existing(run_folder)
    manifest = folder.read_manifest()
    evaluations = {}
    for node in manifest["nodes"].values():
        path = folder.path / node["folder"] / "eval.json"
        if node["step"] == "evaluate" and node["state"] == "done" and path.is_file():
            try:
                evaluations[node["stage"]] = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError("file is damaged", where=str(path), instead="run again, the step is redone") from error
    return RunRecords(folder, manifest, read_stages(folder.metrics_path), evaluations)


def make_table(records: RunRecords) -> list[Row]:
    """The table out of what was read."""
    return [_row(records, stage) for stage in records.stages]


def _row(records: RunRecords, stage: str) -> Row:
    trained = records.seconds(stage)
    evaluation = records.evaluations.get(stage, {})
    return Row(
        stage=stage,
        seconds=None if trained is None else trained + (records.seconds(f"{stage}.data") or 0.0),
        tokens_per_second=_speed(records.metrics.get(stage)),
        heldout_accuracy=evaluation.get("heldout_accuracy"),
        pair_accuracy=evaluation.get("pair_accuracy"),
        num_prompts=evaluation.get("num_prompts"),
    )


def _speed(metrics: StageMetrics | None) -> float | None:
    """Tokens a second over the whole stage, else the mean of what was logged."""
    if metrics is None:
        return None
    tokens, seconds = metrics.latest("train_tokens"), metrics.latest("train_seconds")
    if tokens is not None and seconds:
        return tokens / seconds
    logged = [value for _, value in metrics.points("tokens_per_second")]
    return sum(logged) / len(logged) if logged else None


def table_json(rows: list[Row]) -> str:
    """The table as JSON: a list of objects with the fields of `Row`."""
    return json.dumps([asdict(row) for row in rows], indent=2)


def row_cells(row: Row) -> tuple[str, str, str, str, str]:
    """A row as text: stage, time, tokens/s, held-out accuracy, pair accuracy; "-" for what there is not."""
    return (
        row.stage,
        "-" if row.seconds is None else f"{row.seconds:.1f} s",
        "-" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
        "-" if row.heldout_accuracy is None else f"{100 * row.heldout_accuracy:.1f} %",
        "-" if row.pair_accuracy is None else f"{100 * row.pair_accuracy:.1f} %",
    )


COLUMNS = ("stage", "time", "tokens/s", "held-out accuracy", "pair accuracy")


def write_html(run_folder: str | Path) -> Path:
    """Write RUN/report.html, one file that opens without a network; returns its path."""
    from posttrain.pipeline.files import write_atomically
    from posttrain.pipeline.report_html import page

    records = read_run(run_folder)
    path = records.folder.path / "report.html"
    write_atomically(path, page(records))
    return path

"""The page of a run: one file with its style and pictures inside, nothing is loaded from anywhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape
from typing import Any

from posttrain.pipeline import svg
from posttrain.pipeline.progress import format_seconds
from posttrain.pipeline.report import COLUMNS, RunRecords, make_table, row_cells
from posttrain.pipeline.report_reward import reward_sections

CURVES = (("reward", "reward"), ("accuracy", "share of right samples"), ("loss", "loss"))

STYLE = """
:root {
  color-scheme: light dark; --ink: #1d2733; --soft: #5c6b7a; --line: #d5dde5; --paper: #ffffff; --panel: #f5f7fa;
  --accent: #2468b2; --good: #2e8555; --bad: #b93a32; --warn: #b07a1e; --second: #c25a00; --third: #00795a; --fourth: #a2588c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e4e9ef; --soft: #9aa8b6; --line: #36424e; --paper: #14191f; --panel: #1c242c;
    --accent: #6aa8ec; --good: #5fba87; --bad: #e5786f; --warn: #dcab58; --second: #f0934a; --third: #3fc39a; --fourth: #dd95c8;
  }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1080px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; }
h2 { font-size: 1.1rem; margin-top: 2.2rem; }
h3 { font-size: .95rem; margin: .2rem 0; }
section > h3 { margin-top: 1.4rem; }
p.soft, figcaption { color: var(--soft); margin-top: .2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .35rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--panel); border-radius: 8px; padding: .7rem; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.4 ui-monospace, monospace; max-height: 12em;
  overflow: auto; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
svg .name { fill: var(--ink); font-weight: 600; font-size: 12px; }
svg .grid { stroke: var(--line); }
svg .curve { fill: none; stroke: var(--accent); stroke-width: 1.8; }
svg .line1 { stroke: var(--second); stroke-dasharray: 6 3; }
svg .line2 { stroke: var(--third); stroke-dasharray: 2 2; }
svg .line3 { stroke: var(--fourth); stroke-dasharray: 8 3 2 3; }
svg .bar { fill: var(--accent); }
svg .track { fill: var(--line); }
svg .edge { fill: none; stroke: var(--soft); stroke-width: 1.2; }
svg .node rect { fill: var(--panel); stroke: var(--line); stroke-width: 1.5; }
svg .done rect { stroke: var(--good); }
svg .failed rect { stroke: var(--bad); }
svg .running rect { stroke: var(--accent); }
svg .skipped rect { stroke: var(--warn); }
.right { color: var(--good); }
.wrong { color: var(--bad); }
"""


def page(records: RunRecords) -> str:
    """The whole page as text."""
    manifest = records.manifest
    title = f"Run {manifest['name']}"
    written = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(manifest["written"]))
    parts = [
        f"<h1>{escape(title)}</h1><p class='soft'>seed {manifest['seed']}, last change {written}</p>",
        _section("Results", _table(records)),
        _section("Stages", f"<div class='wide'>{_graph(records)}</div><p class='soft'>Times include preparation.</p>"),
        _section("Held-out accuracy after each stage", _accuracies(records)),
        _section("Curves", _curves(records)),
        *(_section(f"Reward model {name}", content) for name, content in reward_sections(records).items()),
        _section("Answers before and after", _answers(records)),
        _section("Made with", _versions(manifest)),
    ]
    meta = "<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
    head = f"{meta}<title>{escape(title)}</title>"
    return f"<!doctype html>\n<html lang='en'><head>{head}<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content or '<p class=soft>Nothing yet.</p>'}</section>"


def _table(records: RunRecords) -> str:
    head = "".join(f"<th{_number(index)}>{escape(name)}</th>" for index, name in enumerate(COLUMNS))
    rows = "".join(
        f"<tr>{''.join(f'<td{_number(index)}>{escape(cell)}</td>' for index, cell in enumerate(row_cells(row)))}</tr>"
        for row in make_table(records)
    )
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def _number(column: int) -> str:
    return " class='number'" if column else ""


def _graph(records: RunRecords) -> str:
    """Stages as boxes; their data and evaluation are shown by the state and time of the box."""
    nodes = records.manifest["nodes"]
    parents = {stage: _parents(nodes, stage) for stage in records.stages}
    states = {stage: _state(nodes, stage) for stage in records.stages}
    times = {row.stage: row.seconds for row in make_table(records)}
    notes = {stage: _note(states[stage], times[stage]) for stage in parents}
    return svg.graph_chart(parents, states, notes)


def _note(state: str, seconds: float | None) -> str:
    return state if seconds is None else f"{state}, {format_seconds(seconds)}"


def _parents(nodes: dict[str, Any], stage: str) -> list[str]:
    """Stages that a stage comes from."""
    above = (nodes[parent]["stage"] for name, node in nodes.items() if node["stage"] == stage for parent in node["parents"])
    return [name for name in dict.fromkeys(above) if name != stage]


def _state(nodes: dict[str, Any], stage: str) -> str:
    """One state for all nodes of a stage: the worst of them."""
    states = {node["state"] for node in nodes.values() if node["stage"] == stage}
    return next((state for state in ("failed", "running", "skipped", "pending") if state in states), "done")


def _accuracies(records: RunRecords) -> str:
    values = {stage: evaluation["heldout_accuracy"] for stage, evaluation in records.evaluations.items()}
    measured = {stage: value for stage, value in values.items() if value is not None}
    return svg.bar_chart(measured, "held-out accuracy by stage") if measured else ""


def _curves(records: RunRecords) -> str:
    figures = []
    for stage in records.stages:
        metrics = records.metrics.get(stage)
        for name, label in CURVES:
            points: Sequence[tuple[float, float]] = metrics.points(name) if metrics is not None else []
            if points:
                chart = svg.line_chart(points, f"{label} of {stage} by step")
                caption = f"<figcaption>{escape(label)} by step</figcaption>"
                figures.append(f"<figure><h3>{escape(stage)}</h3>{chart}{caption}</figure>")
    return f"<div class='curves'>{''.join(figures)}</div>" if figures else ""


def _answers(records: RunRecords) -> str:
    """The same prompts before any stage and after the stage that answers best."""
    evaluations = {stage: found for stage, found in records.evaluations.items() if found.get("samples")}
    trained = [stage for stage in evaluations if stage != "base"]
    if not trained:
        return ""
    last = max(trained, key=lambda stage: evaluations[stage]["heldout_accuracy"] or 0.0)
    before = {sample["prompt"]: sample for sample in evaluations.get("base", {}).get("samples", [])}
    rows = "".join(
        f"<tr><td>{_text(sample['prompt'])}</td><td>{_text(sample['expected'])}</td>"
        f"<td>{_answer(before.get(sample['prompt']))}</td><td>{_answer(sample)}</td></tr>"
        for sample in evaluations[last]["samples"]
    )
    head = f"<tr><th>prompt</th><th>expected</th><th>base</th><th>{escape(last)}</th></tr>"
    return f"<div class='wide'><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>"


def _answer(sample: dict[str, Any] | None) -> str:
    if sample is None:
        return "-"
    verdict = "right" if sample["right"] else "wrong"
    return f"<span class='{verdict}'>{verdict}</span>{_text(sample['answer'])}"


def _text(text: object) -> str:
    return f"<pre>{escape(str(text))}</pre>"


def _versions(manifest: dict[str, Any]) -> str:
    found = {**manifest["versions"], "commit": manifest["git_commit"] or "not from a checkout"}
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in found.items())
    return f"<table>{rows}</table>"

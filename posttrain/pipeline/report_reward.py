"""The page's part about reward models: a section a stage of kind reward, with tables, and curves as SVG."""

from __future__ import annotations

from html import escape

from posttrain.pipeline import svg
from posttrain.pipeline.report import RunRecords
from posttrain.pipeline.reward_data import RewardStageData, reward_run
from posttrain.pipeline.reward_tables import report_tables, surely_wrong

CURVES = (("mixture", "share of each difficulty bucket in the pairs drawn"), ("accuracy", "held-out pair accuracy by bucket"))


def reward_sections(records: RunRecords) -> dict[str, str]:
    """HTML of each reward stage that has something to show, by the stage's name."""
    contents = {name: _content(stage) for name, stage in reward_run(records).stages.items()}
    return {name: content for name, content in contents.items() if content}


def _content(stage: RewardStageData) -> str:
    tables = [*report_tables(stage), *([wrong] if (wrong := surely_wrong(stage, most=5)).rows else [])]
    control = "<p class='soft'>The curriculum's control: the same pairs in shuffled order.</p>" if stage.shuffled else ""
    shown = _curves(stage) + "".join(f"<h3>{escape(table.title)}</h3>{table.html()}" for table in tables)
    return control + shown if shown else ""


def _curves(stage: RewardStageData) -> str:
    figures = []
    for kind, what in CURVES:
        series = {bucket: points for bucket in stage.buckets if (points := stage.curve(kind, bucket))}
        if series:
            chart = svg.lines_chart(series, f"{what}, {stage.name}, by step")
            figures.append(f"<figure><h3>{escape(kind)}</h3>{chart}<figcaption>{escape(what)}, by step</figcaption></figure>")
    return f"<div class='curves'>{''.join(figures)}</div>" if figures else ""

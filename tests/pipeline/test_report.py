"""Table and page, from the files of a run alone."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from posttrain.pipeline import svg
from posttrain.pipeline.artifacts import seal
from posttrain.pipeline.folder import RunFolder, State
from posttrain.pipeline.graph import build_graph
from posttrain.pipeline.metrics import MetricsTail, read_stages
from posttrain.pipeline.report import table, table_json, write_html
from posttrain.stages.metrics import log_restart
from tests.pipeline.configs import make_config, sft


def record(stage, step, name, value, when=0.0):
    return json.dumps({"step": step, "stage": stage, "name": name, "value": value, "time": when}) + "\n"


@pytest.fixture
def run_folder(tmp_path):
    """A run whose stage "rl" failed after "sft" was done."""
    config = make_config(tmp_path, {"sft": sft(), "rl": {"kind": "rl", "init": "sft", "data": {"sums/train": 1}, "steps": 2}})
    folder = RunFolder(tmp_path / "run")
    graph = build_graph(config)
    artifacts = {}
    for name in ("base", "base.eval", "sft.data", "sft", "sft.eval"):
        node = graph[name]
        folder.make_stage_folder(node.stage)
        path = folder.node_folder(node)
        path.mkdir()
        if node.step == "evaluate":
            samples = [
                {"prompt": "1 < 2 & 3?", "answer": f"<b>{node.stage}</b>", "expected": "yes", "right": node.stage == "sft"}
            ]
            accuracy = 0.625 if node.stage == "sft" else 0.01
            (path / "eval.json").write_text(
                json.dumps({"heldout_accuracy": accuracy, "num_prompts": 500, "pair_accuracy": None, "samples": samples})
            )
        artifacts[name] = seal(
            folder.path, path, name=name, kind=node.kind, parents={}, config_hash="c", code_hash="d", seconds=10.0, created=0.0
        )
    states: dict[str, State] = {name: "done" if name in artifacts else "pending" for name in graph}
    states["rl"] = "failed"
    folder.write_manifest(graph, states, artifacts, name="run", seed=0)
    folder.metrics_path.write_text(
        "".join(record("sft", step, "loss", 1 / step) for step in range(1, 1001))
        + record("sft", 1000, "train_tokens", 5000)
        + record("sft", 1000, "train_seconds", 2.5)
        + record("rl", 1, "reward", 0.25)
        + record("rl", 1, "tokens_per_second", 70.0)
        + record("rl", 2, "loss", None)
    )
    return folder.path


def test_the_table_has_a_row_a_stage_with_time_speed_and_accuracy(run_folder):
    base, sft_row, rl = table(run_folder)
    assert (base.stage, base.seconds, base.tokens_per_second, base.heldout_accuracy) == ("base", 10.0, None, 0.01)
    assert (sft_row.seconds, sft_row.tokens_per_second, sft_row.heldout_accuracy, sft_row.num_prompts) == (
        20.0,
        2000.0,
        0.625,
        500,
    )
    assert (rl.seconds, rl.tokens_per_second, rl.heldout_accuracy, rl.pair_accuracy) == (None, 70.0, None, None)
    keys = {"stage", "seconds", "tokens_per_second", "heldout_accuracy"}
    assert all(keys <= row.keys() for row in json.loads(table_json([base, sft_row, rl])))


class Page(HTMLParser):
    """Collects tags, checks that they close, and gathers references to other files."""

    EMPTY = {"meta", "line", "rect", "polyline", "path"}

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.references = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in ("href", "src", "srcset", "data", "action", "xlink:href")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(run_folder):
    text = write_html(run_folder).read_text()
    page = Page()
    page.feed(text)
    assert page.open == [] and page.references == []
    assert not re.search(r"https?:|@import|url\(|<script|<link|<img", text)
    for chart in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(chart)


def test_the_page_shows_graph_curves_accuracies_and_answers(run_folder):
    text = write_html(run_folder).read_text()
    assert '<g class="node failed">' in text and "done, 20.0 s" in text
    assert "loss of sft by step" in text and "reward of rl by step" in text and "loss of rl" not in text
    assert "62.5 %" in text
    assert "&lt;b&gt;base&lt;/b&gt;" in text and "&lt;b&gt;sft&lt;/b&gt;" in text and "<b>" not in text
    assert "1 &lt; 2 &amp; 3?" in text


def test_a_run_that_has_just_begun_has_a_page_too(tmp_path):
    folder = RunFolder(tmp_path)
    graph = build_graph(make_config(tmp_path, {"one": sft()}))
    folder.write_manifest(graph, {name: "pending" for name in graph}, {}, name="run", seed=0)
    text = write_html(tmp_path).read_text()
    assert text.count("Nothing yet.") == 3


def test_metrics_are_followed_line_by_line_and_a_restart_drops_what_was_before(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert tail.read() == {}
    whole, half = record("a", 1, "loss", 3.0), record("a", 2, "loss", 2.0)
    path.write_text(whole + half[:20])
    assert tail.read()["a"].points("loss") == [(1, 3.0)]
    with path.open("a") as file:
        file.write(half[20:] + record("a", 2, "loss", 1.5))
    assert tail.read()["a"].points("loss") == [(1, 3.0), (2, 1.5)]
    assert read_stages(path)["a"].points("loss") == tail.stages["a"].points("loss")
    log_restart(path, "a")
    assert tail.read()["a"].points("loss") == [] and tail.stages["a"].step == 0


def test_ticks_are_round_and_inside_the_bounds():
    assert svg.ticks(0.0, 1.0) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert svg.ticks(0.0, 1234.0) == [0.0, 500.0, 1000.0]
    for low, high in ((-3.3, 17.2), (1e-6, 2e-6), (0.999, 1.001)):
        found = svg.ticks(low, high)
        assert 2 <= len(found) <= 7 and low - 1e-9 <= found[0] and found[-1] <= high + 1e-9


def test_curves_of_one_point_and_of_equal_values_can_be_drawn():
    for points in ([(1, 2.0)], [(1, 0.0), (2, 0.0)]):
        ElementTree.fromstring(svg.line_chart(points, "x"))


def test_long_curves_are_thinned_and_keep_their_end():
    chart = svg.line_chart([(step, float(step)) for step in range(10_000)], "x")
    points = re.search(r'points="([^"]*)"', chart)
    assert points is not None and len(points[1].split()) <= svg.MOST_POINTS + 1
    assert points[1].split()[-1].startswith(f"{svg.WIDTH - svg.RIGHT:.1f},")

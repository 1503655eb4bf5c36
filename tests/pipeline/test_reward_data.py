"""What is read from a run about its reward models: stages, pairs, tables, the tree of a score, the page."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.config.errors import UserError
from posttrain.pipeline import reward_tables as tables
from posttrain.pipeline import svg
from posttrain.pipeline.intervals import Z, bootstrap_mean, wilson
from posttrain.pipeline.report import write_html
from posttrain.pipeline.reward_data import BUCKETS, RUN_VARIABLE, RewardRun, load_reward_run
from posttrain.pipeline.reward_trees import composition_of, score_tree
from tests.pipeline.configs import sft
from tests.pipeline.reward_run import PAIRS, STAGES, STEPS, TARGETS, write_reward_run


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reward_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def run(path: Path) -> RewardRun:
    return load_reward_run(path)


def test_the_reward_stages_are_found_with_their_control(run: RewardRun) -> None:
    assert list(run.stages) == ["reward", "shuffled"] and list(run.learners) == ["rl"]
    assert run.stage().name == "reward" and run.control is run.stages["shuffled"]
    assert run.stage("shuffled").phases == {} and run.stage().phases == {"easy": 0.0, "middle": 0.4, "hard": 0.8}
    assert run.stage().steps == STEPS and run.stage().targets == list(TARGETS) and run.stage().buckets == list(BUCKETS)
    with pytest.raises(UserError, match="no reward stage 'rewrd'; did you mean 'reward'"):
        run.stage("rewrd")


def test_pairs_know_where_they_differ_and_by_how_much_they_lead(run: RewardRun) -> None:
    pairs = run.stage().pairs
    assert len(pairs) == PAIRS and run.stage().leads() == [(pair, pair.preference) for pair in pairs]
    pair = next(pair for pair in pairs if len(pair.differing) == 2)
    assert pair.differing == [target for target in TARGETS if pair.margins[target]]
    first, second = (pair.means[target][0] - pair.means[target][1] for target in pair.differing)
    assert pair.preference == pytest.approx((first + second) / 2)
    assert all("helpfulness" in pair.differing for pair, _ in run.stage().leads("helpfulness"))
    measured = run.stage().report["pair_accuracy"]["by_target"]["helpfulness"]
    leads = [lead for _, lead in run.stage().leads("helpfulness")]
    assert measured == {"accuracy": sum(lead > 0 for lead in leads) / len(leads), "count": len(leads)}


def test_the_environment_names_the_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUN_VARIABLE, raising=False)
    with pytest.raises(UserError, match=RUN_VARIABLE):
        load_reward_run()
    monkeypatch.setenv(RUN_VARIABLE, str(path))
    assert load_reward_run().path == path


def test_what_is_no_run_or_has_no_reward_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not the folder of a run"):
        load_reward_run(tmp_path)
    with pytest.raises(UserError, match="no stage of kind reward"):
        load_reward_run(write_reward_run(tmp_path, stages={"sft": sft()}))


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    damaged = write_reward_run(tmp_path)
    pairs = next(damaged.glob("stages/*-reward/eval/pairs.jsonl"))
    pairs.write_text(pairs.read_text() + '{"prompt": ')
    with pytest.raises(UserError, match=rf"pairs.jsonl:{PAIRS + 1}: broken JSON"):
        load_reward_run(damaged)


def test_a_run_without_its_configuration_shows_what_was_evaluated(tmp_path: Path) -> None:
    path = write_reward_run(tmp_path)
    (path / "run.yaml").unlink()
    run = load_reward_run(path)
    assert list(run.stages) == ["reward", "shuffled"] and run.control is None and run.learners == {}


def test_tables_hold_what_was_measured(run: RewardRun) -> None:
    stage = run.stage()
    found = {table.title: table for table in tables.report_tables(stage)}
    assert list(found) == [
        "Pair accuracy by difficulty",
        "Pair accuracy by target",
        "Calibration",
        "Length bias",
        "Leakage between targets",
        "Graded answers",
    ]
    assert [row[0] for row in found["Pair accuracy by difficulty"].rows] == [*BUCKETS, "all"]
    assert found["Pair accuracy by difficulty"].rows[-1][:3] == ("all", str(PAIRS), tables.percent(stage.pair_accuracy))
    assert [row[0] for row in found["Calibration"].rows] == list(TARGETS)
    assert len(found["Leakage between targets"].rows) == 3 and found["Leakage between targets"].rows[0][1:] == (
        "95.0 %",
        "60.0 %",
        "60.0 %",
        "60.0 %",
    )
    for table in found.values():
        assert all(len(row) == len(table.columns) for row in table.rows)
        ElementTree.fromstring(f"<div>{table.html()}</div>")
        assert table.title in str(table) and table.title in table._repr_html_()


def test_the_surest_mistakes_come_first(run: RewardRun) -> None:
    wrong = sorted(lead for _, lead in run.stage().leads() if lead < 0)
    table = tables.surely_wrong(run.stage(), most=3)
    assert [row[3] for row in table.rows] == [tables.number(lead) for lead in wrong[:3]]
    assert table.note == f"{len(wrong)} of {PAIRS} pairs are ordered against their label."
    assert len(tables.most_uncertain(run.stage(), "helpfulness", most=4).rows) == 4


def test_cells_are_cut_and_kept_from_being_markup() -> None:
    assert tables.shorten("a\n b  c") == "a b c" and len(tables.shorten("x" * 500)) == tables.LONGEST_CELL
    table = tables.Table("<t>", ("<b>", "share"), (("<i>", "-"), ("9 lives", "-1.5 % to 2 %")))
    assert "<b>" not in table.html() and "<i>" not in table.html()
    assert re.findall(r"class='number'>([^<]*)", table.html()) == ["share", "-", "-1.5 % to 2 %"]


def test_the_tree_sums_up_to_the_total_and_says_who_decided(run: RewardRun) -> None:
    better, worse = score_tree(run, 5), score_tree(run, 5, "worse")
    pair = run.stage().pairs[5]
    assert pair.chosen in better and pair.rejected in worse
    assert "+1.0000  verifier: 1" in better and "+0.0000  verifier: 0" in worse
    for tree in (better, worse):
        lines = tree.split("\n\n")[1].splitlines()
        top = [float(line.split()[0]) for line in lines[1:] if line.startswith("  ") and not line.startswith("   ")]
        assert float(lines[0].split()[1]) == pytest.approx(sum(top), abs=1e-4 * len(top))
    with pytest.raises(UserError, match="no pair 240"):
        score_tree(run, PAIRS)


@pytest.mark.parametrize("change", ["fewer", "other order"])
def test_a_pair_is_not_joined_to_another_record(tmp_path: Path, change: str) -> None:
    path = write_reward_run(tmp_path)
    heldout = load_reward_run(path).stage().folder / "data" / "heldout.jsonl"
    lines = heldout.read_text().splitlines(keepends=True)
    heldout.write_text("".join(lines[:5] if change == "fewer" else lines[::-1]))
    with pytest.raises(UserError, match=r"heldout.jsonl: pair 5 of the evaluation is not there; evaluate the stage again"):
        score_tree(load_reward_run(path), 5)


def test_a_run_without_reward_models_has_no_stage_to_show(tmp_path: Path) -> None:
    for name in (None, "reward"):
        with pytest.raises(UserError, match="no stage of kind reward; `posttrain reward CONFIG` trains one"):
            RewardRun(tmp_path, "plain", {}, {}, {}).stage(name)


def test_the_tree_is_composed_as_the_stage_that_uses_the_model_does(tmp_path: Path) -> None:
    judge = {"kind": "consistency", "dimension": "truthfulness", "url": "http://127.0.0.1:9/v1", "model": "m"}
    reward = {"model": "reward", "learned_weight": 0.4, "judges": {"far": judge}}
    run = load_reward_run(write_reward_run(tmp_path, stages={**STAGES, "rl": {**STAGES["rl"], "reward": reward}}))
    assert composition_of(run, "reward").learned_weight == 0.4 and composition_of(run, "reward").judges == {}
    assert composition_of(run, "shuffled").learned_weight == 0.1
    assert "rest: " in score_tree(run, 0)


def test_the_page_has_a_section_a_reward_model(path: Path) -> None:
    text = write_html(path).read_text()
    assert "Reward model reward" in text and "Reward model shuffled" in text and "Reward model rl" not in text
    assert text.count("Pair accuracy by difficulty") == 2 and text.count("The curriculum's control") == 1
    assert "share of each difficulty bucket in the pairs drawn, reward, by step" in text
    for place in range(4):
        assert f"line{place}" in text


def test_a_run_whose_reward_model_is_not_done_has_no_section(tmp_path: Path) -> None:
    path = write_reward_run(tmp_path)
    for evaluation in path.glob("stages/*/eval/eval.json"):
        evaluation.unlink()
    (path / "metrics.jsonl").write_text("")
    assert "Reward model" not in write_html(path).read_text()
    assert [stage.pairs for stage in load_reward_run(path).stages.values()] == [[], []]


def test_curves_share_their_axes() -> None:
    chart = ElementTree.fromstring(svg.lines_chart({"low": [(0, 0.0), (10, 0.0)], "high": [(0, 1.0), (10, 1.0)]}, "x"))
    lines = [line for line in chart.iter("polyline")][:2]
    heights = [{point.split(",")[1] for point in line.attrib["points"].split()} for line in lines]
    assert heights == [{f"{svg.HEIGHT - svg.BOTTOM:.1f}"}, {f"{svg.TOP:.1f}"}]
    assert {text.text for text in chart.iter("text")} >= {"low", "high"}


@given(st.integers(1, 400), st.data())
def test_wilson_s_bounds_are_where_the_share_is_just_not_refused(count: int, data: st.DataObject) -> None:
    share = data.draw(st.integers(0, count)) / count
    low, high = wilson(share, count)
    assert 0 <= low <= share <= high <= 1
    for bound in (low, high):
        # The definition, as an equation that the bounds solve: the share lies Z standard errors of the bound away from it.
        assert abs(share - bound) == pytest.approx(Z * math.sqrt(bound * (1 - bound) / count), abs=1e-7)
    assert wilson(share, 0) == (0, 1)


def test_the_bootstrap_is_seeded_and_near_the_normal_interval() -> None:
    values = [float(number % 10 < 7) for number in range(400)]
    low, high = bootstrap_mean(values, seed=1)
    assert (low, high) == bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)
    # 1.96 standard errors of a share of 0.7 among 400 are 0.045; quantiles of 2000 draws are uncertain by about 0.002.
    assert low == pytest.approx(0.655, abs=0.01) and high == pytest.approx(0.745, abs=0.01)
    with pytest.raises(ValueError):
        bootstrap_mean([])


def test_an_evaluation_of_an_older_kind_still_has_a_page(tmp_path: Path) -> None:
    path = write_reward_run(tmp_path)
    evaluation = next(path.glob("stages/*-reward/eval/eval.json"))
    evaluation.write_text(json.dumps({"heldout_accuracy": None, "num_prompts": 0, "pair_accuracy": 0.8, "samples": []}))
    assert tables.report_tables(load_reward_run(path).stage()) == [] and "80.0 %" in write_html(path).read_text()

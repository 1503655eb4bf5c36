"""The notebooks' pictures: each has a title, named axes and a legend that tells its curves apart, or says what is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from posttrain.pipeline import curriculum_figures as curriculum
from posttrain.pipeline import reward_figures as scores
from posttrain.pipeline.reward_data import BUCKETS, RewardRun, load_reward_run
from tests.pipeline.reward_run import REWARD, STEPS, TARGETS, write_reward_run

Picture = Callable[[RewardRun], Figure]
PICTURES: list[Picture] = [
    curriculum.mixture_over_training,
    curriculum.loss_over_training,
    curriculum.accuracy_over_training,
    curriculum.against_shuffled,
    curriculum.final_accuracy,
    curriculum.accuracy_by_difficulty,
    curriculum.forgetting,
    scores.score_distributions,
    scores.lead_distributions,
    scores.accuracy_by_target,
    scores.length_bias,
    scores.calibration,
    scores.best_of_n,
    scores.leakage_matrix,
    scores.reward_over_rl,
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RewardRun:
    return load_reward_run(write_reward_run(tmp_path_factory.mktemp("runs")))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> RewardRun:
    """A run that has one reward stage, nothing of it done."""
    path = write_reward_run(tmp_path_factory.mktemp("bare"), best_of_n=False, stages={"reward": REWARD})
    (path / "metrics.jsonl").write_text("")
    for evaluation in path.glob("stages/*/eval/*"):
        evaluation.unlink()
    return load_reward_run(path)


def title(figure: Figure) -> str:
    return figure.get_suptitle()


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.__name__)
def test_a_picture_has_a_title_and_named_axes(picture: Picture, run: RewardRun, tmp_path: Path) -> None:
    figure = picture(run)
    assert title(figure)
    axes = [axis for axis in figure.axes if axis.get_label() != "<colorbar>"]
    assert axes
    for axis in axes:
        assert axis.get_xlabel() and axis.get_ylabel()
        assert axis.has_data()
    figure.savefig(tmp_path / "picture.png", dpi=40)
    assert (tmp_path / "picture.png").stat().st_size > 1000


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.__name__)
def test_what_is_missing_is_said_in_words(picture: Picture, bare: RewardRun) -> None:
    figure = picture(bare)
    (axis,) = figure.axes
    assert title(figure) and not axis.axison and len(axis.texts[0].get_text().split()) > 4


def test_curves_differ_in_colour_and_dashes(run: RewardRun) -> None:
    (axis,) = curriculum.accuracy_over_training(run).axes
    curves = [line for line in axis.lines if line.get_label() != "chance"]
    assert [line.get_label() for line in curves] == [bucket.replace("_", " ") for bucket in BUCKETS]
    assert len({line.get_color() for line in curves}) == len({line.get_marker() for line in curves}) == 4
    # A line's data are what was logged.
    assert list(map(tuple, np.asarray(curves[0].get_data()).T)) == run.stage().curve("accuracy", "contrastive")


def test_the_mixture_fills_the_whole_and_marks_the_phases(run: RewardRun) -> None:
    (axis,) = curriculum.mixture_over_training(run).axes
    tops = [np.asarray(area.get_paths()[0].vertices)[:, 1].max() for area in axis.collections]
    assert len(tops) == 4 and tops[-1] == pytest.approx(1.0)
    assert [np.asarray(line.get_xdata())[0] for line in axis.lines] == pytest.approx([0.0, 0.4 * STEPS, 0.8 * STEPS])


def test_forgetting_is_best_minus_last(run: RewardRun) -> None:
    (axis,) = curriculum.forgetting(run).axes
    shares = [share for _, share in run.stage().curve("accuracy", BUCKETS[0])]
    assert axis.containers[0].patches[0].get_height() == pytest.approx(100 * (max(shares) - shares[-1]))  # type: ignore[attr-defined]


def test_leads_are_counted_once_and_on_their_side(run: RewardRun) -> None:
    axes = scores.lead_distributions(run).axes
    assert len(axes) == len(TARGETS)
    for axis, target in zip(axes, TARGETS, strict=True):
        leads = [lead for _, lead in run.stage().leads(target)]
        right, wrong = (sum(bar.get_height() for bar in bars.patches) for bars in axis.containers)  # type: ignore[attr-defined]
        assert (right, wrong) == (sum(lead > 0 for lead in leads), sum(lead <= 0 for lead in leads))


def test_the_leakage_matrix_names_its_cells(run: RewardRun) -> None:
    axis = scores.leakage_matrix(run).axes[0]
    assert [text.get_text() for text in axis.texts][:5] == ["0.95", "0.60", "0.60", "0.60", "0.60"]
    assert [label.get_text() for label in axis.get_xticklabels()] == list(TARGETS)


def test_the_probe_says_where_over_optimisation_begins(run: RewardRun) -> None:
    _, gold = scores.best_of_n(run).axes
    assert "n = 16" in gold.get_title()
    assert {line.get_label() for line in gold.lines} == {"learned", "scalar", "over-optimisation begins"}


def test_alarms_are_drawn_at_their_steps(run: RewardRun) -> None:
    assert scores.alarm_steps(run.learners["rl"]) == [50]

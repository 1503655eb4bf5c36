"""Reward stages and curricula that cannot work are refused before anything starts, in one line with file and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.config import UserError, load_config
from posttrain.config.schema import RewardStage
from tests.config.examples import write_valid

LAST_OF_REWARD = "    heldout_pairs: 200\n    steps: 20\n"


def load(folder: Path, *lines: str) -> RewardStage:
    """The example's reward stage with a curriculum of these lines."""
    section = "".join(f"      {line}\n" for line in lines)
    config = load_config(write_valid(folder, (LAST_OF_REWARD, f"{LAST_OF_REWARD}    curriculum:\n{section}")))
    stage = config.stages["reward"]
    assert isinstance(stage, RewardStage)
    return stage


@pytest.mark.parametrize(
    "lines",
    [
        ("pacing: phases",),
        ("pacing: competence", "initial_competence: 0.2", "full_competence: 1.0", "replay: 0.0"),
        ("shuffled: true", "adversarial: 0.2", "difficulty: {margin: 0.0}"),
        ("phases:", "  only: {begins: 0, weights: {near_tie: 1}}"),
        # As in a written-out configuration: options of the other pacing at their defaults.
        ("pacing: phases", "initial_competence: 0.1", "full_competence: 0.8", "replay: 0.1"),
    ],
)
def test_a_curriculum_that_can_be_followed(lines: tuple[str, ...], tmp_path: Path) -> None:
    assert load(tmp_path, *lines).curriculum is not None


@pytest.mark.parametrize(
    ("lines", "key", "says"),
    [
        (("phases:", "  a: {begins: 0.2, weights: {bridging: 1}}"), "phases.a.begins", "first phase begins at 0.2"),
        (
            ("phases:", "  a: {begins: 0, weights: {bridging: 1}}", "  b: {begins: 0, weights: {near_tie: 1}}"),
            "phases.b.begins",
            "0 is not after the 0 of the phase 'a'",
        ),
        (
            (
                "phases:",
                "  a: {begins: 0, weights: {bridging: 1}}",
                "  b: {begins: 0.7, weights: {near_tie: 1}}",
                "  c: {begins: 0.5, weights: {near_tie: 1}}",
            ),
            "phases.c.begins",
            "0.5 is not after the 0.7 of the phase 'b'",
        ),
        (("phases:", "  a: {begins: 0, weights: {bridging: 0}}"), "phases.a.weights", "all weights are 0"),
        (("replay: 0.3",), "replay", "means nothing for pacing phases (value 0.3); take it out, or write pacing: competence"),
        (("full_competence: 1.0",), "full_competence", "means nothing for pacing phases"),
        (("initial_competence: 0.3",), "initial_competence", "means nothing for pacing phases"),
        (
            ("pacing: competence", "phases:", "  a: {begins: 0, weights: {bridging: 1}}"),
            "phases",
            "means nothing for pacing competence; take it out, or write pacing: phases",
        ),
        (
            ("difficulty: {margin: 0, disagreement: 0, prompt: 0, length: 0, source: 0}",),
            "difficulty",
            "no pair is harder than another",
        ),
    ],
)
def test_a_curriculum_that_cannot_be_followed(lines: tuple[str, ...], key: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        load(tmp_path, *lines)
    assert str(refused.value).startswith(f"{tmp_path / 'run.yaml'}: stages.reward.curriculum.{key}: ")
    assert says in str(refused.value)


SOURCES = "sources:\n"
GRADED = """\
sources:
  graded: {kind: graded_pairs, task: chain_sum, emit: EMIT, splits: {train: 200, heldout: 200}}
"""
SECOND = f"""{LAST_OF_REWARD}    dimensions: [correctness, style]
    ensemble: 4
  second:
    kind: reward
    init: reward
    data: {{graded/train: 1.0}}
    heldout: {{graded/heldout: 1.0}}
    heldout_pairs: 50
    steps: 20
    dimensions: [correctness, style]
    ensemble: 4
    curriculum: {{}}
"""


@pytest.mark.parametrize("emit", ["pairs", "grades", "demonstrations"])
def test_a_reward_stage_may_start_from_a_reward_stage_where_nothing_is_sampled(emit: str, tmp_path: Path) -> None:
    path = write_valid(tmp_path, (LAST_OF_REWARD, SECOND))
    path.write_text(path.read_text().replace(SOURCES, GRADED.replace("EMIT", emit)))
    if emit == "demonstrations":
        with pytest.raises(UserError, match="stages.second.data.graded/train: .* cannot write answers; name a source of pairs"):
            load_config(path)
    else:
        assert load_config(path).stages["second"].init == "reward"


def test_heads_may_speak_for_a_gate_or_a_domain_alone(tmp_path: Path) -> None:
    gated = "    reward: {model: reward, weights: {truthfulness: 1}, gates: {harmlessness: 0.5}}\n  rl"
    path = write_valid(tmp_path, ("    reward: {model: reward}\n  rl", gated))
    path.write_text(path.read_text().replace(LAST_OF_REWARD, f"{LAST_OF_REWARD}    dimensions: [harmlessness]\n"))
    load_config(path)
    other = "    reward: {model: reward, weights: {truthfulness: 1}, domains: {prose: {helpfulness: 1}}}\n  rl"
    path = write_valid(tmp_path, ("    reward: {model: reward}\n  rl", other))
    path.write_text(path.read_text().replace(LAST_OF_REWARD, f"{LAST_OF_REWARD}    dimensions: [style]\n"))
    load_config(path)

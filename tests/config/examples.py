"""A small valid configuration, and ways to break it."""

from __future__ import annotations

from pathlib import Path

VALID = """\
name: example
sources:
  addition:
    kind: reasoning_gym
    task: chain_sum
    params: {max_terms: 2}
    splits: {train: 5000, rl: 1000, pairs: 300, eval: 500}
eval:
  source: addition/eval
  num_prompts: 500
stages:
  reward:
    kind: reward
    data: {addition/train: 1.0}
    heldout: {addition/pairs: 1.0}
    heldout_pairs: 200
    steps: 20
  sft:
    kind: sft
    data: {addition: 1.0}
    steps: 30
  dpo:
    kind: dpo
    init: sft
    data: {addition/train: 1.0}
    steps: 10
    reward: {model: reward}
  rl:
    kind: rl
    init: dpo
    data: {addition/rl: 1.0}
    steps: 10
    reward: {model: reward}
"""


def write_valid(folder: Path, replace: tuple[str, str] | None = None) -> Path:
    """The valid file, or the file with one text replaced, which must stand in it once."""
    text = VALID
    if replace is not None:
        assert text.count(replace[0]) == 1, f"{replace[0]!r} stands {text.count(replace[0])} times"
        text = text.replace(*replace)
    path = folder / "run.yaml"
    path.write_text(text)
    return path

"""The order of stages, on random graphs."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.config import RunConfig, UserError, stage_dependencies, stage_order


def make_config(stages: dict[str, dict]) -> RunConfig:
    """A configuration with these stages, each given as what differs from a plain SFT stage."""
    plain = {"kind": "sft", "data": {"a": 1.0}, "steps": 1}
    reward = {"heldout": {"a": 1.0}}
    raw = {name: {**plain, **(reward if stage.get("kind") == "reward" else {}), **stage} for name, stage in stages.items()}
    return RunConfig.model_validate(
        {"name": "graph", "sources": {"a": {"kind": "jsonl"}}, "eval": {"source": "a"}, "stages": raw}
    )


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, dict]:
    """Stages without a circle, written in any order; some use a reward model, some the time of another one."""
    count = draw(st.integers(1, 9))
    names = [f"s{index}" for index in range(count)]
    stages: dict[str, dict] = {}
    for index, name in enumerate(names):
        earlier = [other for other in names[:index] if stages[other]["kind"] != "reward"]
        rewards = [other for other in names[:index] if stages[other]["kind"] == "reward"]
        kind = draw(st.sampled_from(["sft", "dpo", "rl", "reward"]))
        stages[name] = {"kind": kind, "init": draw(st.sampled_from(["base", *earlier]))}
        if kind in ("dpo", "rl") and rewards and draw(st.booleans()):
            stages[name]["reward"] = {"model": draw(st.sampled_from(rewards))}
        if kind == "sft" and index and draw(st.booleans()):
            stages[name]["match_time_of"] = draw(st.sampled_from(names[:index]))
    written = draw(st.permutations(names))
    return {name: stages[name] for name in written}


@given(graphs())
def test_every_stage_stands_once_and_after_what_it_needs(stages: dict[str, dict]) -> None:
    config = make_config(stages)
    order = stage_order(config)
    assert sorted(order) == sorted(stages)
    for name in stages:
        for needed in stage_dependencies(config, name).values():
            assert needed == "base" or order.index(needed) < order.index(name)


@given(graphs())
def test_of_the_stages_that_could_come_next_the_one_written_first_comes(stages: dict[str, dict]) -> None:
    config = make_config(stages)
    order = stage_order(config)
    for place, name in enumerate(order):
        done = {"base", *order[:place]}
        ready = [other for other in stages if other not in done and done >= set(stage_dependencies(config, other).values())]
        assert name == ready[0]


@given(graphs(), st.integers(0, 1000))
def test_a_circle_is_always_refused_and_named(stages: dict[str, dict], seed: int) -> None:
    config = make_config(stages)
    names = stage_order(config)
    rng = random.Random(seed)
    start = rng.choice(names)
    end = start  # walk down from a stage along `init`, then close the circle
    while followers := [name for name in stages if stages[name]["init"] == end]:
        end = rng.choice(followers)
    closed = make_config({name: {**stage, "init": end} if name == start else stage for name, stage in stages.items()})
    with pytest.raises(UserError, match="stages wait for each other: ") as caught:
        stage_order(closed)
    cycle = caught.value.what.split(": ")[1].split(" -> ")
    assert cycle[0] == cycle[-1] and len(cycle) > 1
    for name, needed in zip(cycle, cycle[1:], strict=False):
        assert needed in stage_dependencies(closed, name).values()


def test_the_roles_of_dependencies() -> None:
    config = make_config(
        {
            "judge": {"kind": "reward"},
            "sft": {},
            "rl": {"kind": "rl", "init": "sft", "reward": {"model": "judge"}},
            "control": {"init": "sft", "match_time_of": "rl"},
        }
    )
    assert stage_dependencies(config, "sft") == {"init": "base"}
    assert stage_dependencies(config, "rl") == {"init": "sft", "reward": "judge"}
    assert stage_dependencies(config, "control") == {"init": "sft", "timer": "rl"}
    assert stage_order(config) == ["judge", "sft", "rl", "control"]


def test_an_unknown_stage_is_named() -> None:
    with pytest.raises(UserError, match="stages.a: needs the unknown stage 'b'"):
        stage_order(make_config({"a": {"init": "b"}}))

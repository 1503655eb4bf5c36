"""What a node's hash covers beyond the values of its options: order, other stages' data, and libraries."""

from __future__ import annotations

import importlib.metadata

import pytest

from posttrain.pipeline.graph import build_graph
from posttrain.pipeline.hashing import COMPUTING_LIBRARIES, code_hash
from posttrain.pipeline.parts import config_hash
from tests.pipeline.configs import make_config, sft

SUMS = {"kind": "reasoning_gym", "task": "chain_sum"}
SPLITS = {"train": 8, "more": 8, "held": 4, "held2": 4, "test": 4, "test2": 4}


def judge(**options):
    weights = {"heldout": {"sums/held": 1.0, "sums/held2": 1.0}}
    return {"kind": "reward", "data": {"sums/train": 1.0}, "steps": 2, **weights, **options}


def hashes(tmp_path, stages, splits=SPLITS, **sections):
    config = make_config(tmp_path, stages, sources={"sums": {**SUMS, "splits": splits}}, **sections)
    return {name: config_hash(config, node) for name, node in build_graph(config).items()}


def changed(one, other):
    return {name for name in one if one[name] != other[name]}


def test_the_order_of_splits_counts_because_they_are_cut_in_that_order(tmp_path):
    turned = dict(reversed(SPLITS.items()))
    assert turned == SPLITS
    one, other = (hashes(tmp_path, {"one": sft()}, splits) for splits in (SPLITS, turned))
    assert changed(one, other) == {"base", "base.eval", "one.data", "one", "one.eval"}


@pytest.mark.parametrize("key", ["data", "heldout"])
def test_the_order_of_weights_counts_because_ties_in_the_mixture_go_to_the_first(tmp_path, key):
    refs = {"data": ["sums/train", "sums/more"], "heldout": ["sums/held", "sums/held2"]}[key]
    stages = [
        {"one": sft(data={"sums/test2": 1.0}), "judge": judge(**{key: dict.fromkeys(order, 1.0)})} for order in (refs, refs[::-1])
    ]
    one, other = (hashes(tmp_path, each) for each in stages)
    # The tokenizer takes the first records of the data in order.
    assert changed(one, other) == {"judge.data", "judge"} | ({"base"} if key == "data" else set())


def test_a_trained_tokenizer_depends_on_the_data_of_all_stages_and_on_what_is_held_out(tmp_path):
    one = hashes(tmp_path, {"one": sft()})
    more = hashes(tmp_path, {"one": sft(), "two": sft(data={"sums/more": 1.0})})
    same = hashes(tmp_path, {"one": sft(), "two": sft(data={"sums/train": 2.0}, steps=5)})
    assert one["base"] != more["base"] and one["base"] == same["base"]
    assert one["base"] != hashes(tmp_path, {"one": sft()}, eval={"source": "sums/test2"})["base"]
    given = {"model": {"path": str(tmp_path / "none")}}
    stages = {"one": sft(), "two": sft(data={"sums/more": 1.0})}
    assert hashes(tmp_path, {"one": sft()}, **given)["base"] == hashes(tmp_path, stages, **given)["base"]


@pytest.mark.parametrize("library", ["reasoning-gym", "torch", "transformers", "trl"])
def test_another_version_of_a_library_is_other_code(library, monkeypatch):
    assert library in COMPUTING_LIBRARIES
    code_hash.cache_clear()
    before, version = code_hash(), importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0" if name == library else version(name))
    code_hash.cache_clear()
    assert code_hash() != before
    monkeypatch.undo()
    code_hash.cache_clear()
    assert code_hash() == before

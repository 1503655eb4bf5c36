"""Reading, merging, overriding and writing configurations."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.config import UserError, check, dump_config, load_config
from posttrain.config.names import suggest
from posttrain.config.schema import RLStage, SFTStage
from posttrain.config.tasks import quick_names, quick_settings
from posttrain.config.yaml_files import dump_yaml, parse_yaml
from tests.config.examples import VALID, write_valid


def test_defaults_are_filled_in_and_dumped(tmp_path: Path) -> None:
    config = load_config(write_valid(tmp_path))
    text = dump_config(config)
    assert "adam_eps: 1.0e-15" in text and "hidden_size: 128" in text and "match_time_of: null" in text
    again = tmp_path / "again.yaml"
    again.write_text(text)
    assert load_config(again) == config and dump_config(load_config(again)) == text


def test_the_order_of_stages_is_kept(tmp_path: Path) -> None:
    assert list(load_config(write_valid(tmp_path)).stages) == ["reward", "sft", "dpo", "rl"]


def test_overrides_are_applied_in_order_and_parsed_as_yaml(tmp_path: Path) -> None:
    config = load_config(
        write_valid(tmp_path),
        [
            "seed=1",
            "seed=2",
            "stages.sft.optim.learning_rate=3e-4",
            "stages.rl.sampling.temperatures=[0.7, 1]",
            "stages.sft.sampling={samples_per_prompt: 2}",
            "stages.sft.sampling.max_new_tokens=7",
            "sources.addition.params.max_digits=2",
            "stages.sft.data.addition/rl=0.5",
            'output_dir="a=b"',
        ],
    )
    sft, rl = config.stages["sft"], config.stages["rl"]
    assert isinstance(sft, SFTStage) and isinstance(rl, RLStage) and sft.sampling is not None
    assert (config.seed, sft.optim.learning_rate, rl.sampling.temperatures) == (2, 3e-4, [0.7, 1.0])
    assert (sft.sampling.samples_per_prompt, sft.sampling.max_new_tokens) == (2, 7)
    assert config.sources["addition"].params == {"max_terms": 2, "max_digits": 2}
    assert sft.data == {"addition": 1.0, "addition/rl": 0.5}
    assert config.output_dir == "a=b"


def test_extends_merges_sections_and_replaces_values(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write_valid(tmp_path / "base")
    (tmp_path / "middle.yaml").write_text("extends: base/run.yaml\nseed: 5\nstages:\n  sft: {steps: 7}\n")
    top = tmp_path / "top.yaml"
    top.write_text("extends: middle.yaml\nname: top\nstages:\n  rl: null\n  sft: {data: {addition: null, addition/rl: 2}}\n")
    config = load_config(top)
    assert (config.name, config.seed) == ("top", 5)
    assert list(config.stages) == ["reward", "sft", "dpo"]
    assert config.stages["sft"].steps == 7 and config.stages["sft"].data == {"addition/rl": 2.0}


def test_null_takes_out_only_what_was_inherited(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(VALID + "  more:\n")  # a stage whose body was forgotten
    with pytest.raises(UserError, match="stages.more: null does not fit"):
        load_config(path)
    assert "rl" not in load_config(write_valid(tmp_path), ["stages.rl=null"]).stages


def test_check_names_the_place_it_is_given(tmp_path: Path) -> None:
    config = load_config(write_valid(tmp_path))
    check(config, "somewhere")
    wrong = config.model_copy(update={"model": config.model.model_copy(update={"head_dim": 33})})
    with pytest.raises(UserError, match=r"^somewhere: model\.head_dim: 33 is odd"):
        check(wrong, "somewhere")


def test_a_bare_source_means_its_training_split(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'addition' is the same split as 'addition/train'"):
        load_config(write_valid(tmp_path), ["stages.dpo.data.addition=1"])
    with pytest.raises(
        UserError, match="stages.reward.data.addition/train: 'addition/train' is trained on and is also eval.source"
    ):
        load_config(write_valid(tmp_path), ["eval.source=addition"])


def test_yaml_is_read_by_the_core_schema() -> None:
    text = "[1e-4, 1.5E3, 10_000, 0x10, 1:30, 010, no, on, true, ~, 2024-01-01, 1., .5, -3, +.inf, 1.0.0]"
    found = parse_yaml(text, "here")
    expected = [1e-4, 1500.0, 10000, 16, "1:30", "010", "no", "on", True, None, "2024-01-01", 1.0, 0.5, -3, math.inf, "1.0.0"]
    assert [(type(value), value) for value in found] == [(type(value), value) for value in expected]


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"])) | st.sampled_from(
    ["1e5", "no", "~", "010", "1:3", "0x1", "", "<<", "="]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@given(values)
def test_what_is_dumped_is_read_back(value: object) -> None:
    assert parse_yaml(dump_yaml(value), "here") == value


def test_the_quick_look_knows_every_task_and_its_settings() -> None:
    from reasoning_gym.factory import DATASETS

    assert set(quick_names()) == set(DATASETS)
    for task, (_, settings) in DATASETS.items():
        assert quick_settings(task) == {field.name for field in fields(settings)} - {"seed", "size"}, task


def test_suggestions_name_the_nearest_or_what_there_is() -> None:
    assert suggest("stepz", ["steps", "seed"]) == "did you mean 'steps'?"
    assert suggest("xyz", [str(number) for number in range(10)]) == "known: 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
    assert suggest("xyz", []) == "there are none"


def test_reading_a_configuration_imports_nothing_heavy(tmp_path: Path) -> None:
    path = write_valid(tmp_path)
    code = (
        "import sys; from posttrain.config import load_config, explain; load_config(sys.argv[1]); explain('steps');"
        "print([m for m in ('torch', 'transformers', 'ray', 'trl', 'datasets', 'reasoning_gym', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

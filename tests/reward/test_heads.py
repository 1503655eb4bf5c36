"""Columns of a reward model and their names."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.config.dimensions import TARGETS
from posttrain.config.errors import UserError
from posttrain.reward.heads import Heads

HEADS = st.builds(
    lambda targets, ensemble: Heads(tuple(targets), ensemble),
    st.lists(st.sampled_from(TARGETS), min_size=1, unique=True),
    st.integers(1, 12),
)


@given(HEADS)
def test_names_say_all_about_the_columns(heads: Heads) -> None:
    labels = heads.labels()
    assert Heads.from_labels(labels) == heads and len(set(labels)) == len(labels) == len(heads)
    assert Heads.from_config(SimpleNamespace(id2label=dict(enumerate(labels)))) == heads
    columns = [heads.column(target, member) for target in heads.targets for member in range(heads.ensemble)]
    assert columns == list(range(len(heads)))


def test_names_are_readable_and_a_single_member_has_no_number() -> None:
    assert Heads(("correctness", "style"), 2).labels() == ["correctness/0", "correctness/1", "style/0", "style/1"]
    assert Heads(("correctness",)).labels() == ["correctness"]


def test_columns_are_in_the_order_of_their_numbers_not_of_the_mapping() -> None:
    names = {2: "depth/0", 0: "style/0", 1: "style/1", 3: "depth/1"}
    assert Heads.from_config(SimpleNamespace(id2label=names)) == Heads(("style", "depth"), 2)


def test_a_scalar_model_without_names_scores_correctness() -> None:
    assert Heads.from_labels(["LABEL_0"]) == Heads(("correctness",))


@pytest.mark.parametrize(
    "labels",
    [
        [],
        ["LABEL_0", "LABEL_1"],
        ["toxicity"],
        ["correctness/1", "correctness/0"],
        ["correctness/0", "style/0", "correctness/1", "style/1"],
        ["correctness/0", "correctness/1", "style/0"],
        ["correctness", "correctness"],
        ["correctness/0"],
    ],
)
def test_other_names_are_refused_in_one_line(labels: list[str]) -> None:
    with pytest.raises(UserError, match="are not those of a reward model") as error:
        Heads.from_labels(labels, "folder")
    assert "\n" not in str(error.value) and str(error.value).startswith("folder")


@pytest.mark.parametrize("heads", [((), 1), (("style", "style"), 1), (("style",), 0)])
def test_heads_without_columns_or_with_two_of_a_name_are_refused(heads: tuple[tuple[str, ...], int]) -> None:
    with pytest.raises(ValueError, match="distinct targets"):
        Heads(*heads)

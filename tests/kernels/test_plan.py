"""Which token stands in which row of which chunk."""

from __future__ import annotations

import torch
from hypothesis import given

from posttrain.kernels.lightning.plan import CHUNK_SIZES, chunk_plan
from tests.kernels.shapes import LENGTHS

CPU = torch.device("cpu")


@given(LENGTHS)
def test_every_token_has_one_row_and_comes_back_from_it(lengths: list[int]) -> None:
    plan = chunk_plan(lengths, CPU)
    total = sum(lengths)
    rows = plan.gather.flatten()
    assert sorted(rows[rows < total].tolist()) == list(range(total))
    assert rows.numel() == 0 or int(rows.max()) <= total
    assert torch.equal(rows[plan.scatter], torch.arange(total))


@given(LENGTHS)
def test_chunks_are_runs_of_one_document_filled_from_the_front(lengths: list[int]) -> None:
    plan = chunk_plan(lengths, CPU)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).tolist()
    for row, count in zip(plan.gather.tolist(), plan.rows.tolist(), strict=True):
        assert 1 <= count <= plan.chunk
        assert row[:count] == list(range(row[0], row[0] + count))
        assert set(row[count:]) <= {sum(lengths)}
        assert len({document[token] for token in row[:count]}) == 1


@given(LENGTHS)
def test_steps_follow_each_document_chunk_by_chunk(lengths: list[int]) -> None:
    plan = chunk_plan(lengths, CPU)
    assert list(plan.num_chunks) == [-(-length // plan.chunk) for length in lengths]
    assert sorted(plan.order.tolist()) == list(range(len(lengths)))
    in_order = [plan.num_chunks[document] for document in plan.order.tolist()]
    assert in_order == sorted(in_order, reverse=True)
    assert list(plan.step_sizes) == [sum(n > step for n in plan.num_chunks) for step in range(max(plan.num_chunks))]
    starts = [sum(lengths[:document]) for document in range(len(lengths))]
    place = 0
    for step, size in enumerate(plan.step_sizes):
        for position in range(size):
            assert int(plan.gather[place, 0]) == starts[int(plan.order[position])] + step * plan.chunk
            place += 1
    assert place == plan.gather.shape[0]


@given(LENGTHS)
def test_the_chunk_is_the_smallest_that_holds_the_longest_document(lengths: list[int]) -> None:
    fitting = [size for size in CHUNK_SIZES if size >= max(lengths)]
    assert chunk_plan(lengths, CPU).chunk == (fitting[0] if fitting else CHUNK_SIZES[-1])


def test_a_plan_is_made_once_a_layout() -> None:
    assert chunk_plan([3, 70], CPU) is chunk_plan((3, 70), CPU)


def test_no_document_at_all() -> None:
    plan = chunk_plan([], CPU)
    assert plan.step_sizes == plan.num_chunks == ()
    assert plan.gather.shape[0] == plan.scatter.numel() == 0

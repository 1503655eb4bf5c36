"""What the first rank alone works out, reads or writes, for all ranks; its mistakes reach them too."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from posttrain.config.errors import UserError
from posttrain.stages import group

T = TypeVar("T")


def from_first_rank(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0 (any picklable value), on every rank. Call on every rank.

    Raises:
        UserError, OSError: raised by `work`, on every rank: the others would wait for ever.
    """
    result: T | None = None
    problem: UserError | OSError | None = None
    if group.rank() == 0:
        try:
            result = work()
        except (UserError, OSError) as error:
            problem = error
    result, problem = group.broadcast((result, problem))
    if problem is not None:
        raise problem
    return result

"""All rows, and what makes a contestant of a row ready."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from posttrain.config.errors import UserError
from posttrain.config.names import suggest
from posttrain.kernels.bench import attention, ends, serving
from posttrain.kernels.bench.peers import PEERS, STEPS
from posttrain.kernels.bench.rows import GROUPS, OURS, Row
from posttrain.kernels.bench.timing import Prepared

_MODULES = {name: attention for name in ("forward", "train", "packed")}
_MODULES |= {name: serving for name in ("decode", "verify", "mixed")} | {"ends": ends}


def select(only: Sequence[str] | None = None, peers: bool = True) -> list[Row]:
    """Rows of the groups that are named, in the order of GROUPS; all of them for None.

    Raises:
        UserError: there is no such group.
    """
    for name in only or ():
        if name not in GROUPS:
            raise UserError(f"unknown group '{name}'", where="--only", instead=suggest(name, GROUPS))
    chosen = [row for module in (attention, serving, ends) for row in module.rows() if only is None or row.group in only]
    order = list(GROUPS)
    return sorted((row if peers else without_peers(row) for row in chosen), key=lambda row: order.index(row.group))


def without_peers(row: Row) -> Row:
    """The row with nothing but ours and torch."""
    return replace(row, contestants=tuple(name for name in row.contestants if not is_peer(name)))


def is_peer(contestant: str) -> bool:
    """Whether a contestant comes from another library."""
    return contestant in PEERS or contestant in STEPS


def prepare(row: Row, contestant: str, device: str = "cuda") -> Prepared:
    """The contestant of the row, ready to be timed.

    Raises:
        ImportError: the contestant is not installed.
    """
    return _MODULES[row.group].prepare(row, contestant, device)


def rivals(row: Row) -> list[str]:
    """Whom ours must beat: everybody who is not another way of ours."""
    own = (OURS, row.baseline, serving.DECODES_ALONE)
    return [name for name in row.contestants if name not in own]

"""The process that measures. A peer may crash the device's context: then only this process is lost, and the crash is a result.

Reads one JSON line for each question from its standard input and answers with one; whatever libraries print goes to its
standard error. With the argument `peers` it imports peers at once, and not when it is first asked for one.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from functools import partial
from typing import Any

import torch

from posttrain.kernels.bench.cases import prepare, select
from posttrain.kernels.bench.peers import import_all
from posttrain.kernels.bench.rows import OURS, Row
from posttrain.kernels.bench.timing import copy_bandwidth, timed


def measured(row: Row, contestant: str, device: str = "cuda") -> dict[str, Any]:
    """What one contestant takes, or `absent` or `failed` with the reason; `difference` is relative RMS to ours."""
    try:
        with torch.set_grad_enabled(row.train):
            found = {"difference": _difference(row, contestant, device)} if row.compared and contestant != OURS else {}
            torch.manual_seed(0)
            prepared = prepare(row, contestant, device)
            return found | (prepared.measure() if prepared.measure else timed(prepared))
    except ImportError as error:
        return {"absent": _line(error)}
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    except Exception as error:  # any crash of a contestant is a result
        return {"failed": f"{type(error).__name__}: {_line(error)}"}


def answer(question: dict[str, Any], rows: dict[tuple[str, str], Row]) -> dict[str, Any]:
    """Bytes a millisecond of a copy, or one contestant of one row."""
    if question["contestant"] is None:
        return {"copy": copy_bandwidth()}
    return measured(rows[question["group"], question["case"]], question["contestant"])


def main() -> None:
    """Answers until its input ends; an answer says whether this process is fit to give another."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _tune_briefly()
    if "peers" in sys.argv[1:]:
        import_all()
    rows = {(row.group, row.case): row for row in select()}
    for line in sys.stdin:
        found = answer(json.loads(line), rows)
        gc.collect()
        print(json.dumps({"answer": found, "fit": _fit(found)}), file=replies, flush=True)


def _fit(found: dict[str, Any]) -> bool:
    """Whether the device still works here, and no capture failed: that leaves torch's generator and allocator inside it."""
    try:
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return "no_graph" not in found


def _difference(row: Row, contestant: str, device: str) -> float:
    outputs = []
    for name in (contestant, OURS):
        torch.manual_seed(0)
        output = prepare(row, name, device).output
        assert output is not None
        outputs.append(output().double())
    theirs, ours = outputs
    return float((theirs - ours).norm() / ours.norm())


def _tune_briefly() -> None:
    """Let Triton's autotuner give each configuration a fifth of its usual time; it still tries every one."""
    from triton.runtime.autotuner import Autotuner
    from triton.testing import do_bench

    briefly = partial(do_bench, warmup=5, rep=20)
    Autotuner.do_bench = property(lambda tuner: tuner._do_bench or briefly)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or ["without a message"])[0][:200]


if __name__ == "__main__":
    main()

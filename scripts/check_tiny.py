"""Checks that a run completed: `posttrain report RUN --json` has a row for every stage of the recipe, with its accuracy."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def faults(rows: Iterable[Mapping[str, Any]], stages: Iterable[str]) -> list[str]:
    """What is missing from a report's rows; empty when every stage ran and was scored.

    Args:
        rows: objects with "stage", "seconds", and "heldout_accuracy" or, for a reward model, "pair_accuracy".
        stages: names that must be there.
    """
    by_stage = {row["stage"]: row for row in rows}
    found = []
    for stage in stages:
        row = by_stage.get(stage)
        if row is None:
            found.append(f"{stage}: not in the report")
            continue
        if not isinstance(row.get("seconds"), int | float) or row["seconds"] <= 0:
            found.append(f"{stage}: no time, so it did not run")
        scores = [row.get("heldout_accuracy"), row.get("pair_accuracy")]
        if not any(isinstance(score, int | float) and 0 <= score <= 1 for score in scores):
            found.append(f"{stage}: no held-out accuracy")
    return found


def main() -> None:
    """Command line: `check_tiny.py REPORT.json [--config FILE]`."""
    from posttrain.config import load_config, stage_order

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("--config", type=Path, default=Path(__file__).resolve().parent.parent / "configs/tiny.yaml")
    options = parser.parse_args()
    stages = ["base", *(name for name in stage_order(load_config(options.config)) if name != "base")]
    found = faults(json.loads(options.report.read_text()), stages)
    for line in found:
        print(line)
    print(f"{len(stages) - len({line.split(':')[0] for line in found})} of {len(stages)} stages completed")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()

"""Tables of the tiny run over several seeds, in Markdown, and whether the run's promises hold.

for s in 0 1 2; do make tiny RUNS=runs/$s ARGS="seed=$s"; .venv/bin/posttrain report runs/$s/tiny --json > $s.json; done
.venv/bin/python scripts/tiny_seeds.py 0.json 1.json 2.json > docs/tiny.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

Report = Mapping[str, Mapping[str, Any]]
"""Stage -> its row of `posttrain report --json`."""


def promises(reports: Sequence[Report]) -> dict[str, bool]:
    """What the tiny run promises, in words with the figures, and whether it holds.

    Args:
        reports: one a seed.
    """

    def accuracies(stage: str, name: str = "heldout_accuracy") -> list[float]:
        return [float(report[stage][name]) for report in reports]

    short, rl, shuffled, start = (accuracies(stage) for stage in ("sft_short", "rl", "rl_shuffled", "dpo_long"))
    gain = mean(rl) - mean(short)
    pairs = accuracies("reward", "pair_accuracy")
    change = min(
        after - before
        for stage in ("dpo_short", "dpo_long")
        for after, before in zip(accuracies(stage), accuracies("sft_long"), strict=True)
    )
    excess = max(after - before for after, before in zip(shuffled, start, strict=True))
    return {
        f"short SFT reaches 50 % with every seed (lowest {_percent(min(short))})": min(short) >= 0.5,
        f"online RL gains 10 points over the same run's short SFT on average ({_points(gain)})": gain >= 0.1,
        f"preference learning is not below SFT with any seed (least change {_points(change)})": change >= 0,
        f"the learned reward ranks 80 % of held-out pairs rightly with every seed (lowest {_percent(min(pairs))})": min(pairs)
        >= 0.8,
        f"shuffled rewards gain at most 2 points with every seed (most {_points(excess)})": excess <= 0.02,
    }


def table(reports: Sequence[Report], seeds: Sequence[int]) -> list[str]:
    """Lines of a Markdown table: a row a stage, a column a seed, and the mean."""
    names = [f"seed {seed}" for seed in seeds]
    lines = [f"| stage | {' | '.join(names)} | mean | seconds | tokens/s |", "|---" * (len(names) + 4) + "|"]
    for stage in reports[0]:
        rows = [report[stage] for report in reports]
        score = "pair_accuracy" if rows[0]["heldout_accuracy"] is None else "heldout_accuracy"
        label = f"{stage} (pairs)" if score == "pair_accuracy" else stage
        values = [float(row[score]) for row in rows]
        seconds = "/".join(f"{row['seconds']:.0f}" for row in rows)
        speeds = "/".join("-" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:,.0f}" for row in rows)
        lines.append(
            f"| {label} | {' | '.join(_percent(value) for value in values)} | {_percent(mean(values))} | {seconds} | {speeds} |"
        )
    return lines


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _points(value: float) -> str:
    return f"{100 * value:+.1f} points"


def main() -> None:
    """Command line: `tiny_seeds.py REPORT.json ...`, one a seed from 0; exit status 1 where a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reports", type=Path, nargs="+")
    options = parser.parse_args()
    reports = [{row["stage"]: row for row in json.loads(path.read_text(encoding="utf-8"))} for path in options.reports]
    held = promises(reports)
    print("# The tiny run over seeds\n")
    print("Greedy accuracy on 500 held-out prompts; for the reward model, on 500 held-out pairs. Two CPU cores; made by")
    print("`scripts/tiny_seeds.py`.\n")
    print("\n".join(table(reports, range(len(reports)))))
    print()
    print("\n".join(f"- {'holds' if holds else 'BROKEN'}: {promise}" for promise, holds in held.items()))
    raise SystemExit(not all(held.values()))


if __name__ == "__main__":
    main()

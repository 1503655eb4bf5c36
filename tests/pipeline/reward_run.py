"""A run with a reward model, its shuffled control and online RL, written by hand: files in the format that stages write.

The numbers are made up, but plausible and seeded: easy buckets are learned early, the hardest late, one target leaks.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from posttrain.config import dump_config
from posttrain.pipeline.artifacts import Artifact, seal
from posttrain.pipeline.folder import RunFolder, State
from posttrain.pipeline.graph import build_graph
from posttrain.pipeline.reward_data import BUCKETS
from posttrain.reward.guards.calibration import calibrate
from posttrain.reward.guards.length_bias import length_bias
from tests.pipeline.configs import make_config

TARGETS = ("correctness", "truthfulness", "helpfulness", "harmlessness")
STEPS = 200
PAIRS = 240
ABILITY = {"contrastive": 2.4, "bridging": 1.4, "near_tie": 0.6, "adversarial": 0.25}
REWARD: dict[str, Any] = {
    "kind": "reward",
    "data": {"sums/train": 1.0},
    "heldout": {"sums/test": 1.0},
    "heldout_pairs": 4,
    "steps": STEPS,
    "dimensions": list(TARGETS),
    "ensemble": 2,
}
STAGES: dict[str, Any] = {
    "reward": {**REWARD, "curriculum": {}},
    "shuffled": {**REWARD, "curriculum": {"shuffled": True}},
    "rl": {"kind": "rl", "data": {"sums/train": 1.0}, "steps": 60, "reward": {"model": "reward"}},
}


def write_reward_run(folder: Path, *, best_of_n: bool = True, stages: dict[str, Any] | None = None) -> Path:
    """Write the run below `folder`; returns OUTPUT_DIR/NAME. Without `best_of_n` the probe is missing."""
    config = make_config(folder, STAGES if stages is None else stages)
    run = RunFolder(folder / config.name)
    run.path.mkdir(parents=True)
    run.write_config(dump_config(config))
    graph, done = build_graph(config), dict[str, Artifact]()
    for node in graph.values():
        run.make_stage_folder(node.stage)
        path = run.node_folder(node)
        path.mkdir(parents=True)
        section = config.stages.get(node.stage)
        if node.step == "prepare" and section is not None and section.kind == "reward":
            _write_heldout(path)
        elif node.step == "evaluate" and section is not None and section.kind == "reward":
            _write_evaluation(path, 0.0 if node.stage == "reward" else 0.15)
        elif node.step == "evaluate":
            (path / "eval.json").write_text(
                json.dumps({"heldout_accuracy": 0.5, "num_prompts": 4, "pair_accuracy": None, "samples": []})
            )
        done[node.name] = seal(
            run.path, path, name=node.name, kind=node.kind, parents={}, config_hash="c", code_hash="d", seconds=3.0, created=0.0
        )
    states: dict[str, State] = dict.fromkeys(graph, "done")
    run.write_manifest(graph, states, done, name=config.name, seed=0)
    with run.metrics_path.open("w") as file:
        for name, stage in config.stages.items():
            for step, metric, value in _reward_metrics(name) if stage.kind == "reward" else _rl_metrics():
                file.write(json.dumps({"step": step, "stage": name, "name": metric, "value": value, "time": 0.0}) + "\n")
    if best_of_n and "reward" in config.stages:
        (run.stage_folder("reward") / "best_of_n.json").write_text(json.dumps(_probe()))
    return run.path


def _reward_metrics(stage: str) -> list[tuple[int, str, float]]:
    drawn, records = random.Random(stage), []
    for step in range(5, STEPS + 1, 5):
        progress = step / STEPS
        records.append((step, "loss", 0.69 * math.exp(-2 * progress) + drawn.uniform(0, 0.1)))
        for bucket, share in zip(BUCKETS, _mixture(progress if stage == "reward" else 0.5), strict=True):
            records.append((step, f"mixture/{bucket}", share))
    for step in range(20, STEPS + 1, 20):
        progress = step / STEPS
        for place, bucket in enumerate(BUCKETS):
            learned = min(1.0, progress * (1.6 - 0.2 * place))
            lost = 0.05 * max(0.0, progress - 0.7) * (bucket == "contrastive")
            share = _sigmoid(ABILITY[bucket] * learned * (1.1 if stage == "reward" else 0.9)) - lost
            records.append((step, f"accuracy/{bucket}", min(1.0, share + drawn.uniform(-0.02, 0.02))))
    return records


def _mixture(progress: float) -> list[float]:
    hard = min(1.0, progress / 0.8)
    return [0.8 - 0.7 * hard, 0.2, 0.35 * hard, 0.35 * hard]


def _rl_metrics() -> list[tuple[int, str, float]]:
    drawn, records = random.Random(7), []
    for step in range(1, 61):
        accuracy = 0.4 + 0.4 * (1 - math.exp(-step / 15)) + drawn.uniform(-0.03, 0.03)
        records += [(step, "accuracy", accuracy), (step, "reward/correctness", accuracy), (step, "reward/rest", 0.001 * step)]
        records += [(step, "reward", accuracy + 0.001 * step), (step, "answer_length", 12 + max(0, step - 30) * 0.4)]
        records += [(step, "dropped", 0.0), (step, "alarm/length", float(step == 50))]
    return records


def _pairs(weaker: float) -> list[dict[str, Any]]:
    drawn = random.Random(3)
    return [_pair(drawn, number, weaker) for number in range(PAIRS)]


def _write_heldout(folder: Path) -> None:
    """The records that the pairs of the evaluation come from, in the same order; the verifier wants the better answer."""
    with (folder / "heldout.jsonl").open("w") as file:
        for pair in _pairs(0.0):
            record = {
                "prompt": [{"role": "user", "content": pair["prompt"]}],
                "chosen": [{"role": "assistant", "content": pair["chosen"]}],
                "rejected": [{"role": "assistant", "content": pair["rejected"]}],
                "margins": pair["margins"],
                "verifier": "exact",
                "answer": pair["chosen"],
            }
            file.write(json.dumps(record) + "\n")


def _write_evaluation(folder: Path, weaker: float) -> None:
    pairs = _pairs(weaker)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    def leads(target: str) -> list[float]:
        differing = [pair for pair in pairs if pair["margins"][target] > 0]
        return [pair["scores"][target]["chosen"][0] - pair["scores"][target]["rejected"][0] for pair in differing]

    lengths = [pair["lengths"]["chosen"] - pair["lengths"]["rejected"] for pair in pairs]
    right = {number: _preference(pair) > 0 for number, pair in enumerate(pairs)}
    by_bucket = {
        bucket: _accuracy([right[number] for number, pair in enumerate(pairs) if pair["bucket"] == bucket]) for bucket in BUCKETS
    }
    report = {
        "targets": list(TARGETS),
        "pair_accuracy": {
            "all": sum(right.values()) / len(right),
            "by_bucket": by_bucket,
            "by_target": {target: _accuracy([lead > 0 for lead in leads(target)]) for target in TARGETS},
        },
        # No pair differs in harmlessness alone.
        "leakage": {d: {t: {"share": 0.95 if d == t else 0.6, "count": 20} for t in TARGETS} for d in TARGETS[:3]},
        "calibration": {target: calibrate(leads(target)).to_json() for target in TARGETS},
        "length_bias": length_bias([_preference(pair) for pair in pairs], lengths).to_json(),
        "grades": {"helpfulness": {"pearson": 0.71, "count": 60}},
    }
    evaluation = {
        "heldout_accuracy": None,
        "num_prompts": 0,
        "pair_accuracy": report["pair_accuracy"]["all"],  # type: ignore[index]
        "samples": [],
        "reward": report,
    }
    (folder / "eval.json").write_text(json.dumps(evaluation))


def _pair(drawn: random.Random, number: int, weaker: float) -> dict[str, Any]:
    bucket = BUCKETS[number % 4]
    a, b = drawn.randrange(100), drawn.randrange(100)
    longer = drawn.randrange(-20, 30)
    margins = {target: float(drawn.random() < (0.5 if place else 0.8)) for place, target in enumerate(TARGETS)}
    margins[TARGETS[0]] = margins[TARGETS[0]] or float(not any(margins.values()))
    scores = {}
    for target in TARGETS:
        lead = margins[target] * (ABILITY[bucket] - weaker) * 1.3 + 0.03 * longer + drawn.gauss(0, 0.9)
        middle = drawn.gauss(0, 0.7)
        scores[target] = {
            "chosen": [middle + lead / 2, abs(drawn.gauss(0, 0.2))],
            "rejected": [middle - lead / 2, abs(drawn.gauss(0, 0.2))],
        }
    return {
        "prompt": f"{a} + {b}",
        "chosen": f"{a} + {b} = {a + b}. Answer: {a + b}",
        "rejected": f"{a} + {b} = {a + b + 1}. Answer: {a + b + 1}",
        "source": "sums/test",
        "kind": "adversarial:longer" if bucket == "adversarial" else bucket,
        "bucket": bucket,
        "difficulty": (number % 4) / 4 + drawn.random() / 4,
        "margins": margins,
        "scores": scores,
        "lengths": {"chosen": 30 + longer, "rejected": 30},
    }


def _preference(pair: dict[str, Any]) -> float:
    targets = [target for target in TARGETS if pair["margins"][target] > 0]
    leads = [pair["scores"][target]["chosen"][0] - pair["scores"][target]["rejected"][0] for target in targets]
    return sum(leads) / len(leads)


def _accuracy(right: list[bool]) -> dict[str, float]:
    return {"accuracy": sum(right) / len(right), "count": len(right)}


def _probe() -> dict[str, Any]:
    ns = [1, 2, 4, 8, 16]
    gold, scalar = [0.42, 0.55, 0.63, 0.66, 0.61], [0.42, 0.5, 0.55, 0.56, 0.55]
    return {
        "ns": ns,
        "learned": {
            "proxy": [0.1, 0.7, 1.2, 1.6, 1.9],
            "gold": gold,
            "gold_low": [value - 0.04 for value in gold],
            "gold_high": [value + 0.04 for value in gold],
        },
        "scalar": {"proxy": [0.0, 0.4, 0.8, 1.1, 1.4], "gold": scalar},
        "kl": [math.log(n) - (n - 1) / n for n in ns],
        "onset": 16,
    }


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))

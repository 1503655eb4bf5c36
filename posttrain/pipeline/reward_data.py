"""What a run's folder says about its reward models: what notebooks, tables and pictures are made from.

A stage of kind reward leaves behind, read here and nowhere else:

- metrics.jsonl: `loss`, `mixture/BUCKET` (share of the pairs drawn), `accuracy/BUCKET` (held-out pairs, some ten times a stage);
- eval/eval.json: `pair_accuracy`, and under `reward` accuracy by bucket and target, leakage, calibration, length bias, grades;
- eval/pairs.jsonl: a line a held-out pair with its scores;
- best_of_n.json anywhere in the stage's folder, where the probe was run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config.errors import UserError
from posttrain.config.names import suggest
from posttrain.config.yaml_files import read_yaml
from posttrain.pipeline.metrics import StageMetrics
from posttrain.pipeline.report import RunRecords, read_run
from posttrain.stages.files import read_json, read_records

RUN_VARIABLE = "POSTTRAIN_RUN"
"""Environment variable that names the run of the notebooks."""

BUCKETS = ("contrastive", "bridging", "near_tie", "adversarial")
"""Difficulty buckets from easy to hard; the order of legends and tables."""

PAIRS_FILE = "pairs.jsonl"
BEST_OF_N_FILE = "best_of_n.json"


@dataclass(frozen=True)
class ScoredPair:
    """A held-out pair and what the reward model makes of it.

    Attributes:
        prompt, chosen, rejected: text.
        bucket: of difficulty, "" where it has none.
        source, pair_kind: where the pair comes from and how it was made, "" where unknown.
        difficulty: in [0, 1], None where unknown.
        margins: by how much the better answer leads in each target that the pair names, in [0, 1]: 0 where both are equal,
            None where it is not known how much.
        means, spreads: target -> (chosen, rejected): mean score (a logit) and standard deviation over the ensemble.
        tokens: lengths of (chosen, rejected), None where not recorded.
    """

    prompt: str
    chosen: str
    rejected: str
    bucket: str
    source: str
    pair_kind: str
    difficulty: float | None
    margins: Mapping[str, float | None]
    means: Mapping[str, tuple[float, float]]
    spreads: Mapping[str, tuple[float, float]]
    tokens: tuple[int, int] | None

    def lead(self, target: str) -> float:
        """By how much the better answer's score leads in a target, in logits."""
        better, worse = self.means[target]
        return better - worse

    @property
    def differing(self) -> list[str]:
        """Targets in which the pair has a better answer."""
        return [target for target, margin in self.margins.items() if margin != 0 and target in self.means]

    @property
    def preference(self) -> float:
        """Mean lead over the targets in which the pair differs, as the evaluation judges a pair as a whole; 0 where none do."""
        leads = [self.lead(target) for target in self.differing]
        return sum(leads) / len(leads) if leads else 0.0

    @property
    def longer_by(self) -> int | None:
        """Tokens by which the better answer is longer, None where lengths were not recorded."""
        return None if self.tokens is None else self.tokens[0] - self.tokens[1]


@dataclass(frozen=True)
class RewardStageData:
    """One reward model of a run.

    Attributes:
        name: of the stage.
        folder: the stage's folder.
        shuffled: it is the curriculum's control.
        phases: share of the steps at which each phase of the curriculum has taken over, {} without phases.
        steps: optimizer steps, None where run.yaml does not say.
        metrics: what it logged.
        report: `reward` of its eval.json, {} before its evaluation.
        pair_accuracy: share of held-out pairs ordered rightly, None before its evaluation.
        pairs: the held-out pairs with their scores, [] where there is no such file.
        best_of_n: the over-optimisation probe, None where it was not run.
    """

    name: str
    folder: Path
    shuffled: bool
    phases: Mapping[str, float]
    steps: int | None
    metrics: StageMetrics
    report: Mapping[str, Any]
    pair_accuracy: float | None
    pairs: Sequence[ScoredPair]
    best_of_n: Mapping[str, Any] | None

    @property
    def targets(self) -> list[str]:
        """What the model has heads for, as the evaluation names them; else those of the pairs."""
        named = list(self.report.get("targets", ()))
        return named or list(dict.fromkeys(target for pair in self.pairs for target in pair.means))

    @property
    def buckets(self) -> list[str]:
        """Buckets that anything was logged or evaluated for, from easy to hard."""
        logged = {name.split("/", 1)[1] for name in self.metrics.series if name.startswith(("mixture/", "accuracy/"))}
        found = logged | set(by_bucket(self.report)) | {pair.bucket for pair in self.pairs if pair.bucket}
        return sorted(found, key=lambda bucket: (BUCKETS.index(bucket) if bucket in BUCKETS else len(BUCKETS), bucket))

    @property
    def leakage(self) -> dict[str, dict[str, float]]:
        """d -> t -> how often the head of t prefers the better answer on pairs that differ in d alone; {} without such pairs."""
        cells: Mapping[str, Mapping[str, Mapping[str, float]]] = self.report.get("leakage") or {}
        return {d: {t: cells[d][t]["share"] for t in self.targets if t in cells[d]} for d in self.targets if d in cells}

    def leads(self, target: str | None = None) -> list[tuple[ScoredPair, float]]:
        """The pairs that differ in a target, each with its lead there; without a target, all that differ with their mean lead."""
        if target is None:
            return [(pair, pair.preference) for pair in self.pairs if pair.differing]
        return [(pair, pair.lead(target)) for pair in self.pairs if target in pair.differing]

    def curve(self, kind: str, bucket: str) -> list[tuple[int, float]]:
        """(step, value) of `mixture/BUCKET` or `accuracy/BUCKET`."""
        return self.metrics.points(f"{kind}/{bucket}")


@dataclass(frozen=True)
class RewardRun:
    """The reward models of a run, and the curves of the stages that used them.

    Attributes:
        path: the run's folder.
        name: of the run.
        stages: stages of kind reward, by name, in the order they ran.
        learners: metrics of the stages of kind rl, by name.
        kinds: kind of every stage that run.yaml names.
    """

    path: Path
    name: str
    stages: Mapping[str, RewardStageData]
    learners: Mapping[str, StageMetrics]
    kinds: Mapping[str, str]

    def stage(self, name: str | None = None) -> RewardStageData:
        """The reward stage of a name; without one the first that is no control.

        Raises:
            UserError: there is none of that name, or none at all.
        """
        if not self.stages:
            raise UserError(
                "the run has no stage of kind reward", where=str(self.path), instead="`posttrain reward CONFIG` trains one"
            )
        if name is None:
            return next((stage for stage in self.stages.values() if not stage.shuffled), next(iter(self.stages.values())))
        if name not in self.stages:
            raise UserError(f"no reward stage '{name}'", where=str(self.path), instead=suggest(name, self.stages))
        return self.stages[name]

    @property
    def control(self) -> RewardStageData | None:
        """The first stage whose curriculum is shuffled, None where the run has no control."""
        return next((stage for stage in self.stages.values() if stage.shuffled), None)


def load_reward_run(run_folder: str | Path | None = None) -> RewardRun:
    """Read the reward stages of a run.

    Args:
        run_folder: OUTPUT_DIR/NAME of the run; None takes the environment variable POSTTRAIN_RUN.

    Raises:
        UserError: no folder is named, it is no run, it has no reward stage, or a file in it is damaged.
    """
    path = run_folder or os.environ.get(RUN_VARIABLE)
    if not path:
        raise UserError("no run is named", instead=f"set {RUN_VARIABLE}, or RUN in the first cell, to OUTPUT_DIR/NAME of a run")
    found = reward_run(read_run(path))
    found.stage()  # there must be one
    return found


def reward_run(records: RunRecords) -> RewardRun:
    """The reward stages out of a run that was read; `stages` is empty where it has none."""
    sections = _sections(records)
    kinds = {name: str(section.get("kind")) for name, section in sections.items()}
    stages = {
        name: _read_stage(records, name, sections.get(name, {}))
        for name in records.stages
        if kinds.get(name) == "reward" or records.evaluations.get(name, {}).get("pair_accuracy") is not None
    }
    learners = {name: metrics for name, metrics in records.metrics.items() if kinds.get(name) == "rl"}
    return RewardRun(records.folder.path, records.manifest["name"], stages, learners, kinds)


def by_bucket(report: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Bucket -> {"accuracy", "count"} of an evaluation, {} where it has none."""
    return dict(report.get("pair_accuracy", {}).get("by_bucket", {}))


def by_target(report: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Target -> {"accuracy", "count"} of an evaluation, {} where it has none."""
    return dict(report.get("pair_accuracy", {}).get("by_target", {}))


def _sections(records: RunRecords) -> dict[str, dict[str, Any]]:
    """Stages of run.yaml as plain values, so that runs of an older schema can be looked at too; {} without the file."""
    path = records.folder.config_path
    return dict(read_yaml(path).get("stages", {})) if path.is_file() else {}


def _read_stage(records: RunRecords, name: str, section: Mapping[str, Any]) -> RewardStageData:
    folder = records.folder.stage_folder(name)
    curriculum = section.get("curriculum") or {}
    by_phases = curriculum.get("pacing") == "phases" and not curriculum.get("shuffled")
    evaluation = records.evaluations.get(name, {})
    pairs = folder / "eval" / PAIRS_FILE
    probes = sorted(folder.rglob(BEST_OF_N_FILE))
    return RewardStageData(
        name=name,
        folder=folder,
        shuffled=bool(curriculum.get("shuffled")),
        phases={phase: float(found["begins"]) for phase, found in curriculum["phases"].items()} if by_phases else {},
        steps=section.get("steps"),
        metrics=records.metrics.get(name, StageMetrics()),
        report=evaluation.get("reward") or {},
        pair_accuracy=evaluation.get("pair_accuracy"),
        pairs=[_pair(line) for line in read_records(pairs)] if evaluation and pairs.is_file() else [],
        best_of_n=read_json(probes[0]) if probes else None,
    )


def _pair(line: Mapping[str, Any]) -> ScoredPair:
    scores, lengths = line["scores"], line.get("lengths")
    return ScoredPair(
        prompt=line["prompt"],
        chosen=line["chosen"],
        rejected=line["rejected"],
        bucket=line.get("bucket") or "",
        source=line.get("source") or "",
        pair_kind=line.get("kind") or "",
        difficulty=line.get("difficulty"),
        margins=line["margins"],
        means={target: (found["chosen"][0], found["rejected"][0]) for target, found in scores.items()},
        spreads={target: (found["chosen"][1], found["rejected"][1]) for target, found in scores.items()},
        tokens=(lengths["chosen"], lengths["rejected"]) if lengths else None,
    )

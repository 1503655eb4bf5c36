"""Over several seeds: does the curriculum help, and does the hierarchy choose better answers than one plain score?

    python -m benchmarks.reward_seeds --work FOLDER [--seeds 0 1 2 3 4] [--prompts 200] [--samples 64]

Every seed is one run of configs/tiny/reward.yaml with two controls beside its reward model, all from the same SFT model, for
the same steps: the same pairs in shuffled order, and a plain scalar reward model, of one head on the same pairs without their
labels by dimension. Then answers of the SFT model to held-out prompts are chosen by each reward model without its first level
(no verifier, no rules), and the verifier says how many of the chosen ones are right. Finished seeds are not run again; tables
are printed in Markdown, and everything is recorded in benchmarks/results/reward_seeds.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

RECIPE = Path(__file__).parent.parent / "configs/tiny/reward.yaml"
BUCKETS = ("contrastive", "bridging", "near_tie", "adversarial")
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Seeds: two-sided 95 % point of Student's distribution with one degree of freedom less."""


def recipe_with_controls(seed: int, folder: Path) -> Path:
    """Write the recipe of one seed, and the pairs without labels that the scalar model learns from; returns the recipe's file."""
    from posttrain.config import load_config
    from posttrain.data.sources import load_split

    fields = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    fields |= {"seed": seed, "output_dir": str(folder)}
    config = load_config(RECIPE, [f"seed={seed}"])
    folder.mkdir(parents=True, exist_ok=True)
    for split in fields["sources"]["pairs"]["splits"]:
        # A source each: a file's records are shuffled before splits are cut.
        path = folder / f"plain_{split}.jsonl"
        kept = ("prompt", "chosen", "rejected", "verifier", "answer")
        records = [{name: record[name] for name in kept} for record in load_split(config, f"pairs/{split}")]
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        fields["sources"][f"plain_{split}"] = {"kind": "jsonl", "path": str(path)}
    reward = fields["stages"]["reward"]
    shuffled = {**reward, "curriculum": {**(reward.get("curriculum") or {}), "shuffled": True}}
    scalar = {
        **{name: value for name, value in reward.items() if name not in ("dimensions", "ensemble", "curriculum")},
        "data": {plain_name(ref): weight for ref, weight in reward["data"].items() if not ref.startswith("grades/")},
        "heldout": {plain_name(ref): weight for ref, weight in reward["heldout"].items()},
    }
    fields["stages"] |= {"reward_shuffled": shuffled, "reward_scalar": scalar}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
    return path


def plain_name(ref: str) -> str:
    """The source of the same pairs without labels; other sources are what they were."""
    source, _, split = ref.partition("/")
    return f"plain_{split}/train" if source == "pairs" else ref


def choices(run: Path, prompts: int, samples: int, seed: int) -> dict[str, Any]:
    """Best-of-n curves on the same answers: the hierarchy's learned level, its correctness head alone, the scalar model."""
    from posttrain.config import load_config
    from posttrain.config.reward_schema import RewardSection
    from posttrain.config.schema import SamplingSection
    from posttrain.data.sources import load_split
    from posttrain.data.tokenizer import load_tokenizer
    from posttrain.model.loading import load_causal_lm, load_reward_model
    from posttrain.reward.guards.best_of_n import best_of_n
    from posttrain.reward.hierarchy import HierarchicalReward
    from posttrain.reward.learned import LearnedLevel
    from posttrain.reward.types import Sample
    from posttrain.reward.verifiers import is_right, verify
    from posttrain.rollout.embedded import EmbeddedEngine
    from posttrain.stages.sampling import as_sample, draw

    config = load_config(run.parent / "recipe.yaml", [])
    records = load_split(config, config.eval.source)[:prompts]
    model = stage_folder(run, "sft") / "model"
    tokenizer = load_tokenizer(model)
    sampling = SamplingSection(samples_per_prompt=samples, max_new_tokens=config.eval.max_new_tokens)
    seeds = [(seed, number) for number in range(len(records))]
    engine = EmbeddedEngine(load_causal_lm(model).eval())
    drawn = draw(engine, tokenizer, [record["prompt"] for record in records], sampling, seeds)
    verified = [[as_sample(r, a.text) for a in answers] for r, answers in zip(records, drawn, strict=True)]
    gold = [[float(is_right(verify(sample))) for sample in of_prompt] for of_prompt in verified]
    withheld = [Sample(sample.prompt, sample.answer, {}) for of_prompt in verified for sample in of_prompt]

    def of_prompts(scores: Sequence[float]) -> list[list[float]]:
        return [list(scores[start : start + samples]) for start in range(0, len(scores), samples)]

    def learned(stage: str) -> LearnedLevel:
        folder = stage_folder(run, stage) / "model"
        return LearnedLevel(load_reward_model(folder), load_tokenizer(folder))

    heads = learned("reward")
    totals = [breakdown.total for breakdown in HierarchicalReward(RewardSection(), heads).score(withheld)]
    found = {
        "hierarchy": best_of_n(of_prompts(totals), gold),
        "correctness": best_of_n(of_prompts(heads.scores(withheld)), gold),
        "scalar": best_of_n(of_prompts(learned("reward_scalar").scores(withheld)), gold),
    }
    return {name: curve.to_json() for name, curve in found.items()}


def stage_folder(run: Path, stage: str) -> Path:
    """Folder of a stage in a run."""
    return next(path for path in (run / "stages").iterdir() if path.name.partition("-")[2] == stage)


def measure(seed: int, work: Path, prompts: int, samples: int) -> dict[str, Any]:
    """Run one seed, unless its figures are there."""
    from posttrain.config import load_config
    from posttrain.pipeline.run import run as run_pipeline

    folder = work / f"seed-{seed}"
    figures = folder / "figures.json"
    of = {"seed": seed, "prompts": prompts, "samples": samples, "recipe": RECIPE.read_text(encoding="utf-8")}
    if figures.is_file():
        found: dict[str, Any] = json.loads(figures.read_text(encoding="utf-8"))
        if found["of"] != of:
            raise SystemExit(f"{figures} was measured with other options or another recipe; remove it or take another folder")
        return found
    run_pipeline(load_config(recipe_with_controls(seed, folder)))
    run = folder / "tiny-reward"
    evaluations = {
        stage: json.loads((stage_folder(run, stage) / "eval/eval.json").read_text(encoding="utf-8"))
        for stage in ("sft", "reward", "reward_shuffled", "reward_scalar")
    }
    curves = choices(run, prompts, samples, seed)
    found = {
        "of": of,
        "sft_accuracy": evaluations["sft"]["heldout_accuracy"],
        **{stage: evaluations[stage]["reward"] for stage in ("reward", "reward_shuffled")},
        "scalar_pair_accuracy": evaluations["reward_scalar"]["pair_accuracy"],
        "best_of_n": curves,
    }
    (stage_folder(run, "reward") / "best_of_n.json").write_text(json.dumps(_for_report(curves)), encoding="utf-8")
    figures.write_text(json.dumps(found), encoding="utf-8")
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval over seeds (Student)."""
    if len(values) < 2:
        return values[0], math.nan
    return statistics.mean(values), STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def tables(found: Sequence[Mapping[str, Any]]) -> str:
    """The figures of all seeds, in Markdown."""
    head = f"{len(found)} seeds; percentages, ± is half of a 95 % interval over seeds."
    return "\n\n".join(
        [head, _curriculum_table(found), _leakage_table(found), _choice_table(found), _lead_of_the_hierarchy(found)]
    )


def _shown(values: Sequence[float]) -> str:
    mean, half = interval(values)
    return f"{100 * mean:.1f} ± {100 * half:.1f}"


def _curriculum_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy on held-out pairs by bucket and by dimension, with the curriculum and without."""
    lines = ["| held-out pairs | curriculum | shuffled | difference |", "|---|---|---|---|"]
    rows = {name: ("by_bucket", name) for name in BUCKETS}
    rows |= {f"all that differ in {t}": ("by_target", t) for t in found[0]["reward"]["targets"]}
    for label, (kind, name) in rows.items():
        with_it, without = (
            [float(one[stage]["pair_accuracy"][kind][name]["accuracy"]) for one in found]
            for stage in ("reward", "reward_shuffled")
        )
        differences = [a - b for a, b in zip(with_it, without, strict=True)]
        lines.append(f"| {label} | {_shown(with_it)} | {_shown(without)} | {_shown(differences)} |")
    return "\n".join(lines)


def _leakage_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Pairs that differ in one dimension alone: share whose better answer each head prefers; its accuracy on the diagonal."""
    targets = found[0]["reward"]["targets"]
    lines = [f"| differ in | {' | '.join(targets)} |", "|---" * (len(targets) + 1) + "|"]
    for differing in targets:
        rows = [one["reward"]["leakage"].get(differing, {}) for one in found]
        cells = []
        for head in targets:
            shares = [row[head]["share"] for row in rows if row.get(head, {}).get("share") is not None]
            text = f"{100 * statistics.mean(shares):.0f}" if shares else "-"
            cells.append(f"**{text}**" if head == differing else text)
        lines.append(f"| {differing} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _choice_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Share of right answers among those chosen from n."""
    ns = found[0]["best_of_n"]["hierarchy"]["ns"]
    lines = [f"| right among the best of n | {' | '.join(str(n) for n in ns)} | onset by seed |", "|---" * (len(ns) + 2) + "|"]
    for name in ("hierarchy", "correctness", "scalar"):
        curves = [one["best_of_n"][name] for one in found]
        cells = [_shown([curve["gold"][place] for curve in curves]) for place in range(len(ns))]
        onsets = ", ".join("-" if curve["onset"] is None else str(curve["onset"]) for curve in curves)
        lines.append(f"| {name} | {' | '.join(cells)} | {onsets} |")
    return "\n".join(lines)


def _lead_of_the_hierarchy(found: Sequence[Mapping[str, Any]]) -> str:
    leads = []
    for one in found:
        place = one["best_of_n"]["hierarchy"]["ns"].index(16)
        leads.append(one["best_of_n"]["hierarchy"]["gold"][place] - one["best_of_n"]["scalar"]["gold"][place])
    return f"Hierarchy less scalar at n = 16: {_shown(leads)} points."


def _for_report(curves: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the report and the notebooks draw."""
    names = {"learned": "hierarchy", "scalar": "scalar"}
    drawn = {new: {key: curves[old][key] for key in ("proxy", "gold", "gold_low", "gold_high")} for new, old in names.items()}
    first = curves["hierarchy"]
    return {"ns": first["ns"], "kl": first["kl"], "onset": first["onset"], **drawn}


def main() -> None:
    """Run the seeds one after the other; print and record."""
    from benchmarks.record import write_record

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--samples", type=int, default=64)
    options = parser.parse_args()
    if options.samples < 16 or len(options.seeds) > max(STUDENT):
        parser.error(f"at least 16 samples, and at most {max(STUDENT)} seeds")
    found = [measure(seed, options.work.resolve(), options.prompts, options.samples) for seed in options.seeds]
    print(tables(found))
    write_record("reward_seeds", {"seeds": found})


if __name__ == "__main__":
    main()

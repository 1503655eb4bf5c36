"""Broken configurations: what is changed, and what the one line must name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Broken:
    """A mistake.

    Attributes:
        name: what is wrong.
        replace: text of the valid file, and what stands there instead; None leaves the file as it is.
        key: key that the line names.
        suggestion: what it says to write.
        overrides: given on the command line.
    """

    name: str
    replace: tuple[str, str] | None
    key: str
    suggestion: str
    overrides: tuple[str, ...] = ()


def by_override(name: str, override: str, suggestion: str, *others: str, key: str | None = None) -> Broken:
    """A mistake made by an override."""
    return Broken(name, None, key or override.split("=")[0], suggestion, (*others, override))


BROKEN = [
    # Keys.
    Broken("unknown key at the top", ("name: example\n", "name: example\nsed: 3\n"), "sed", "did you mean 'seed'?"),
    Broken("unknown key in a stage", ("steps: 30", "stesp: 30"), "stages.sft.stesp", "did you mean 'steps'?"),
    Broken(
        "unknown key in a section of a stage",
        ("reward: {model: reward}\n  rl", "reward: {modle: reward}\n  rl"),
        "stages.dpo.reward.modle",
        "did you mean 'model'?",
    ),
    Broken(
        "key one section too high",
        ("steps: 30", "steps: 30\n    learning_rate: 0.1"),
        "stages.sft.learning_rate",
        "optim.learning_rate",
    ),
    Broken("key of another kind", ("steps: 30", "steps: 30\n    beta: 0.1"), "stages.sft.beta", "stages of kind dpo"),
    Broken("unknown key in a source", ("task: chain_sum", "tsk: chain_sum"), "sources.addition.tsk", "did you mean 'task'?"),
    Broken("extends misspelt", ("name: example\n", "name: example\nextend: a.yaml\n"), "extend", "did you mean 'extends'?"),
    Broken("missing key in a stage", ("    steps: 30\n", ""), "stages.sft.steps", "add steps: a whole number of at least 1"),
    Broken("missing name", ("name: example\n", ""), "name", "add name: text"),
    Broken("missing kind", ("    kind: sft\n", ""), "stages.sft", "add kind: one of sft, dpo, reward, rl"),
    Broken("empty stage", ("    kind: sft\n    data: {addition: 1.0}\n    steps: 30\n", ""), "stages.sft", "keys below it"),
    # Values.
    Broken("wrong type", ("steps: 30", "steps: many"), "stages.sft.steps", "a whole number of at least 1"),
    Broken("a fraction of a step", ("steps: 30", "steps: 30.5"), "stages.sft.steps", "a whole number of at least 1"),
    Broken("number as a name", ("name: example", "name: 2024"), "name", 'put it in quotes: name: "2024"'),
    Broken("bad characters in the run's name", ("name: example", "name: my run"), "name", "letters, digits"),
    Broken("out of range", ("steps: 30", "steps: 0"), "stages.sft.steps", "a whole number of at least 1"),
    Broken("unknown kind of stage", ("kind: sft", "kind: stf"), "stages.sft", "did you mean 'sft'?"),
    Broken(
        "text for a section",
        ("reward: {model: reward}\n  rl", "reward: model\n  rl"),
        "stages.dpo.reward",
        "a section with keys below it",
    ),
    by_override("unknown value", "stages.rl.objective=gpro", "did you mean 'grpo'?"),
    by_override("not a number", "stages.sft.optim.adam_eps=.nan", "a number above 0"),
    by_override("infinite", "stages.sft.data.addition=.inf", "a number"),
    by_override(
        "temperature 0", "stages.rl.sampling.temperatures=[1.0, 0]", "a number above 0", key="stages.rl.sampling.temperatures.1"
    ),
    by_override("no temperature", "stages.rl.sampling.temperatures=[]", "write at least one"),
    by_override("yes for true", "stages.sft.demonstrations=yes", "true or false"),
    by_override("learned level that overrules", "stages.rl.reward.learned_weight=0.5", "of at least 0 and below 0.5"),
    by_override("ZeRO stage", "resources.zero_stage=4", "one of 0, 1, 2, 3"),
    # Overrides.
    by_override("override without a value", "stages.sft.steps", "write for example", key="is not KEY=VALUE"),
    by_override("override with an empty value", "stages.sft.steps=", "stages.sft.steps=null"),
    by_override("override with an empty part", "stages..steps=1", "write for example", key="is not KEY=VALUE"),
    by_override("override with broken YAML", "stages.sft.data={a: 1", "check indentation"),
    by_override("override of an unknown key", "stages.sft.stesp=3", "did you mean 'steps'?"),
    by_override("override of an unknown section", "modle.head_dim=3", "did you mean 'model'?", key="modle"),
    by_override("override of an unknown stage", "stages.stf.steps=3", "did you mean 'sft'?", key="stages.stf"),
    by_override("override of an unknown source", "sources.adition.shots=3", "did you mean 'addition'?", key="sources.adition"),
    by_override("override below an option", "seed.first=3", "write seed=VALUE", key="seed"),
    by_override("override of extends", "extends=other.yaml", "write `extends: other.yaml`"),
    by_override(
        "override that adds an unknown key", "stages.new={kind: sft, step: 3}", "did you mean 'steps'?", key="stages.new.step"
    ),
    # Options that mean nothing for the stage's kind.
    by_override("packs of online RL", "stages.rl.batch_size=4", "prompts_per_step sets the size of a step"),
    by_override("updates that share prompts unevenly", "stages.rl.updates_per_step=3", "write a divisor of"),
    by_override("bound on prompts of online RL", "stages.rl.sampling.num_prompts=4", "steps * prompts_per_step prompts"),
    # Names and references.
    Broken("stage called base", ("  sft:\n", "  base:\n"), "stages.base", "rename the stage"),
    Broken("stage name with a dot", ("  sft:\n", "  sft.short:\n"), "stages.sft.short", "use letters, digits"),
    by_override("unknown stage in init", "stages.rl.init=dop", "did you mean 'dpo'?"),
    by_override("unknown reward stage", "stages.rl.reward.model=rewrad", "did you mean 'reward'?"),
    by_override("unknown stage in match_time_of", "stages.sft.match_time_of=dop", "did you mean 'dpo'?"),
    by_override("circle of init", "stages.sft.init=rl", "give one of them init: base"),
    by_override("circle through the timer", "stages.sft.match_time_of=rl", "sft -> rl -> dpo -> sft", key="stages.sft.init"),
    by_override("stage that starts from itself", "stages.sft.init=sft", "name another stage"),
    by_override("reward from a stage of another kind", "stages.dpo.reward.model=sft", "known: reward"),
    by_override("language model from a reward stage", "stages.sft.init=reward", "base"),
    # Rewards.
    by_override("reward without sampling", "stages.sft.reward.model=reward", "add a sampling section", key="stages.sft.reward"),
    by_override(
        "gate without evidence",
        "stages.rl.reward.gates={harmlessness: 0.5}",
        "add a constitution judge of harmlessness",
        key="stages.rl.reward.gates.harmlessness",
    ),
    by_override(
        "gate with a judge that needs a reference",
        "stages.rl.reward={gates: {harmlessness: 0.5},"
        " judges: {a: {kind: consistency, dimension: harmlessness, url: http://127.0.0.1/v1, model: m}}}",
        "add a constitution judge of harmlessness",
        key="stages.rl.reward.gates.harmlessness",
    ),
    by_override(
        "constitution of a judge of consistency",
        "stages.rl.reward.judges={a: {kind: consistency, dimension: correctness, url: http://127.0.0.1/v1, model: m,"
        " constitution: b.yaml}}",
        "write kind: constitution",
        key="stages.rl.reward.judges.a.constitution",
    ),
    by_override("heads that weigh nothing", "stages.rl.reward.weights={truthfulness: 1}", "weigh one of them"),
    by_override("a dimension twice", "stages.reward.dimensions=[style, depth, style]", "name each dimension once"),
    by_override(
        "reward stage after a reward stage, without pairs",
        "stages.second={kind: reward, init: reward, data: {addition/train: 1}, heldout: {addition/pairs: 1}, steps: 1}",
        "name a source of pairs",
        key="stages.second.data.addition/train",
    ),
    by_override(
        "reward stage after one of other heads",
        "stages.second={kind: reward, init: reward, data: {addition/train: 1}, heldout: {addition/pairs: 1}, steps: 1,"
        " dimensions: [style]}",
        "write dimensions: [correctness]",
        key="stages.second.dimensions",
    ),
    by_override(
        "reward stage after one of another ensemble",
        "stages.second={kind: reward, init: reward, data: {addition/train: 1}, heldout: {addition/pairs: 1}, steps: 1,"
        " ensemble: 4}",
        "write 1, or start from a language model",
        key="stages.second.ensemble",
    ),
    by_override(
        "weights of 0",
        "stages.rl.reward.domains={law: {correctness: 0}}",
        "weigh at least one",
        key="stages.rl.reward.domains.law",
    ),
    by_override("pessimism without an ensemble", "stages.rl.reward.pessimism=1", "an ensemble of several members"),
    by_override("unknown source in eval", "eval.source=additoin/eval", "did you mean 'addition'?"),
    by_override("unknown split in eval", "eval.source=addition/evl", "did you mean 'addition/eval'?"),
    Broken("unknown split in data", ("addition/rl", "addition/lr"), "stages.rl.data.addition/lr", "addition/"),
    Broken(
        "unknown split in heldout", ("addition/pairs", "addition/pair"), "stages.reward.heldout.addition/pair", "addition/pairs"
    ),
    by_override("weight 0", "stages.sft.data.addition=0", "a number above 0"),
    Broken(
        "the same split twice",
        ("{addition: 1.0}", "{addition: 1, addition/train: 2}"),
        "stages.sft.data.addition/train",
        "write it once",
    ),
    # Sources.
    Broken("generator without a task", ("    task: chain_sum\n", ""), "sources.addition.task", "add task: chain_sum"),
    by_override("unknown task", "sources.addition.task=chain_sums", "did you mean 'chain_sum'?"),
    by_override("unknown setting of a task", "sources.addition.params.max_term=3", "did you mean 'max_terms'?"),
    by_override("size of a task's data set", "sources.addition.params.size=3", "known: ", key="sources.addition.params.size"),
    by_override(
        "unknown setting in a composite task",
        "sources.mix={kind: reasoning_gym, task: composite, splits: {a: 5},"
        " params: {datasets: [{name: gcd, config: {max_number: 9}}]}}",
        "did you mean 'max_numbers'?",
        key="sources.mix.params.datasets.0.config.max_number",
    ),
    by_override("file without a path", "sources.notes={kind: jsonl}", "add path: data/train.jsonl", key="sources.notes.path"),
    by_override(
        "file that is not there", "sources.notes={kind: jsonl, path: nowhere.jsonl}", "relative paths", key="sources.notes.path"
    ),
    by_override(
        "task for a file", "sources.notes={kind: jsonl, path: a, task: chain_sum}", "take it out", key="sources.notes.task"
    ),
    by_override(
        "generator without splits", "sources.more={kind: reasoning_gym, task: gcd}", "name its splits", key="sources.more.splits"
    ),
    by_override("empty split", "sources.addition.splits.more=0", "write at least 1"),
    by_override("evaluation larger than its split", "eval.num_prompts=501", "write at most 500"),
    by_override("more pairs than records", "stages.reward.heldout_pairs=301", "write at most 300"),
    Broken(
        "training on the evaluation",
        ("addition/rl: 1.0", "addition/eval: 1.0"),
        "stages.rl.data.addition/eval",
        "name another split",
    ),
    Broken(
        "training on the held-out pairs",
        ("addition/pairs", "addition/train"),
        "stages.reward.heldout.addition/train",
        "name another split",
    ),
    # Model.
    by_override("heads", "model.num_key_value_heads=3", "write one of 1, 2, 4"),
    by_override("odd head", "model.head_dim=33", "an even number such as 34"),
    by_override("odd rotation", "model.rotary_dim=5", "an even number such as 6"),
    by_override("rotation wider than the head", "model.rotary_dim=34", "write at most 32"),
    by_override("experts", "model.num_experts_per_tok=5", "write at most 4"),
    by_override("no checkpoint", "model.path=nowhere", "relative paths start at"),
    # Lengths, steps, workers.
    by_override("documents longer than a pack", "stages.sft.max_length=1025", "write at most 1024"),
    by_override("shortest longer than longest", "stages.sft.min_length=257", "write at most 256"),
    by_override(
        "documents longer than positions", "stages.sft.max_length=300", "write at most 299", "model.max_position_embeddings=299"
    ),
    by_override("answers without a prompt", "stages.rl.sampling.max_new_tokens=256", "write less than 256"),
    by_override("evaluation without a prompt", "eval.max_new_tokens=8192", "write less than 8192"),
    by_override("rising learning rate", "stages.sft.optim.min_learning_rate=1", "write at most 0.001"),
    by_override("warm-up longer than training", "stages.sft.optim.warmup_steps=31", "write at most 30"),
    by_override("group of one", "stages.rl.sampling.samples_per_prompt=1", "write at least 2"),
    by_override("pair of one", "stages.dpo.sampling.samples_per_prompt=1", "write at least 2"),
    by_override("nothing to train on", "stages.sft.demonstrations=false", "add a sampling section"),
    by_override(
        "batch against workers",
        "stages.sft.batch_size=3",
        "a multiple such as 4",
        "resources.num_workers=2",
        "stages.reward.batch_size=2",
    ),
    by_override(
        "prompts against workers",
        "stages.rl.prompts_per_step=5",
        "a multiple such as 6",
        "resources.num_workers=2",
        *(f"stages.{stage}.batch_size=2" for stage in ("reward", "sft", "dpo")),
    ),
    by_override("more cores than there are", "resources.cpus_per_worker=10000", "give the address of a Ray cluster"),
]

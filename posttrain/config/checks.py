"""Combinations of options that cannot work, found before anything starts. Each check raises for the first that it finds."""

from __future__ import annotations

import re
from collections.abc import Iterator

from posttrain.config.composition_checks import check_compositions
from posttrain.config.errors import UserError
from posttrain.config.graph import BASE, stage_dependencies, stage_order
from posttrain.config.machine_checks import check_machine, longest_position
from posttrain.config.names import suggest
from posttrain.config.origins import Origins
from posttrain.config.reward_checks import check_curricula, check_reward_stages
from posttrain.config.schema import DPOStage, RewardStage, RLStage, RunConfig, SamplingSection, SFTStage
from posttrain.config.source_checks import check_sources

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\Z")
_ALL = "train"  # the split of a source that names none


def check(config: RunConfig, where: str | Origins = "config", *, on_this_machine: bool = True) -> None:
    """See that the options of a run fit together.

    Args:
        config: a valid configuration.
        where: file that errors name, or which file gave which key.
        on_this_machine: whether its files must exist and its cores and GPUs must be here.

    Raises:
        UserError: the first combination that cannot work.
    """
    at = where if isinstance(where, Origins) else Origins(where)
    for part in (
        _check_names,
        _check_model,
        check_sources,
        _check_references,
        _check_graph,
        check_reward_stages,
        _check_eval,
        _check_stages,
        check_curricula,
        check_compositions,
    ):
        part(config, at)
    _check_positions(config, at, longest_position(config) if on_this_machine else _own_longest_position(config))
    _check_resources(config, at)
    if on_this_machine:
        check_machine(config, at)


def _own_longest_position(config: RunConfig) -> int | None:
    return config.model.max_position_embeddings if config.model.path is None else None


def _check_names(config: RunConfig, at: Origins) -> None:
    named = [("stages", name) for name in config.stages] + [("sources", name) for name in config.sources]
    named += [(f"sources.{source}.splits", name) for source, section in config.sources.items() for name in section.splits]
    for section, name in named:
        if not _NAME.match(name):
            raise UserError(
                f"the name '{name}' has characters that a name may not have",
                where=at.where([*section.split("."), name]),
                instead="use letters, digits, '_' and '-', starting with a letter or digit",
            )
    if BASE in config.stages:
        raise UserError(
            f"the name '{BASE}' is taken by the first model",
            where=at.where(f"stages.{BASE}"),
            instead="rename the stage, for example 'first'",
        )


def _check_model(config: RunConfig, at: Origins) -> None:
    model = config.model
    if model.path is not None:
        return  # the checkpoint brings its own architecture
    heads, groups = model.num_attention_heads, model.num_key_value_heads
    if heads % groups:
        divisors = [str(number) for number in range(1, heads + 1) if heads % number == 0]
        raise UserError(
            f"{groups} key/value heads do not divide the {heads} of num_attention_heads",
            where=at.where("model.num_key_value_heads"),
            instead=f"write one of {', '.join(divisors)}",
        )
    for key in ("head_dim", "rotary_dim"):
        if (value := getattr(model, key)) % 2:
            raise UserError(
                f"{value} is odd", where=at.where(f"model.{key}"), instead=f"write an even number such as {value + 1}"
            )
    if model.rotary_dim > model.head_dim:
        raise UserError(
            f"{model.rotary_dim} is more than head_dim {model.head_dim}",
            where=at.where("model.rotary_dim"),
            instead=f"write at most {model.head_dim}",
        )
    if model.num_experts_per_tok > model.num_local_experts:
        raise UserError(
            f"{model.num_experts_per_tok} is more than num_local_experts {model.num_local_experts}",
            where=at.where("model.num_experts_per_tok"),
            instead=f"write at most {model.num_local_experts}",
        )


def full_reference(ref: str) -> str:
    """`SOURCE/SPLIT` for a reference; a bare source means its split `train`."""
    name, _, split = ref.partition("/")
    return f"{name}/{split or _ALL}"


def _references(config: RunConfig) -> Iterator[tuple[tuple[str, ...], str, float]]:
    """(key, reference, weight) of every use of a split."""
    yield ("eval", "source"), config.eval.source, 1.0
    for name, stage in config.stages.items():
        for ref, weight in stage.data.items():
            yield ("stages", name, "data", ref), ref, weight
        if isinstance(stage, RewardStage):
            for ref, weight in stage.heldout.items():
                yield ("stages", name, "heldout", ref), ref, weight


def _check_references(config: RunConfig, at: Origins) -> None:
    for key, ref, weight in _references(config):
        name, split = full_reference(ref).split("/", 1)
        if name not in config.sources:
            raise UserError(f"unknown source '{name}'", where=at.where(key), instead=suggest(name, config.sources))
        splits = list(config.sources[name].splits) or [_ALL]
        if split not in splits:
            hint = suggest(ref, [f"{name}/{known}" for known in splits])
            raise UserError(f"source '{name}' has no split '{split}'", where=at.where(key), instead=hint)
        if weight <= 0:
            raise UserError(
                f"weight {weight:g} is not above 0", where=at.where(key), instead="write a number above 0, or take it out"
            )
    for name, stage in config.stages.items():
        _refuse_twice(stage.data, ("stages", name, "data"), at)
        if isinstance(stage, RewardStage):
            _refuse_twice(stage.heldout, ("stages", name, "heldout"), at)


def _refuse_twice(weights: dict[str, float], key: tuple[str, ...], at: Origins) -> None:
    seen: dict[str, str] = {}
    for ref in weights:
        full = full_reference(ref)
        if full in seen:
            raise UserError(f"'{ref}' is the same split as '{seen[full]}'", where=at.where((*key, ref)), instead="write it once")
        seen[full] = ref


def _check_graph(config: RunConfig, at: Origins) -> None:
    roles = {"init": "init", "reward": "reward.model", "timer": "match_time_of"}
    for name in config.stages:
        for role, needed in stage_dependencies(config, name).items():
            known = [stage for stage in config.stages if stage != name] + ([BASE] if role == "init" else [])
            if needed in known:
                continue
            itself = needed == name
            raise UserError(
                f"stage '{name}' names itself" if itself else f"unknown stage '{needed}'",
                where=at.where(f"stages.{name}.{roles[role]}"),
                instead="name another stage" if itself else suggest(needed, known),
            )
    for name in config.stages:
        needs = stage_dependencies(config, name)
        if "reward" in needs and not isinstance(config.stages[needs["reward"]], RewardStage):
            models = [other for other, stage in config.stages.items() if isinstance(stage, RewardStage)]
            raise UserError(
                f"stage '{needs['reward']}' is of kind {config.stages[needs['reward']].kind}, not reward",
                where=at.where(f"stages.{name}.reward.model"),
                instead=suggest(needs["reward"], models) if models else "add a stage of kind reward, or write null",
            )
        of_reward = needs["init"] != BASE and isinstance(config.stages[needs["init"]], RewardStage)
        if of_reward and not isinstance(config.stages[name], RewardStage):
            models = [
                BASE,
                *(other for other, stage in config.stages.items() if not isinstance(stage, RewardStage) and other != name),
            ]
            raise UserError(
                f"stage '{needs['init']}' makes a reward model, which cannot write answers",
                where=at.where(f"stages.{name}.init"),
                instead=f"name a stage that makes a language model: {', '.join(models)}",
            )
    try:
        stage_order(config)
    except UserError as error:
        raise UserError(error.what, where=at.where(f"{error.where}.init"), instead=error.instead) from None


def _check_eval(config: RunConfig, at: Origins) -> None:
    evaluated = full_reference(config.eval.source)
    for key, ref, _ in _references(config):
        if key[0] == "stages" and key[2] == "data" and full_reference(ref) == evaluated:
            raise UserError(
                f"'{ref}' is trained on and is also eval.source, so accuracy would not be held out",
                where=at.where(key),
                instead="name another split of the source for one of them",
            )
    size = _size(config, config.eval.source)
    if size is not None and size < config.eval.num_prompts:
        raise UserError(
            f"{config.eval.num_prompts} prompts are more than the {size} records of '{config.eval.source}'",
            where=at.where("eval.num_prompts"),
            instead=f"write at most {size}, or make the split larger",
        )
    for name, stage in config.stages.items():
        if isinstance(stage, RewardStage):
            _check_heldout(config, name, stage, at)


def _check_heldout(config: RunConfig, name: str, stage: RewardStage, at: Origins) -> None:
    total = sum(stage.heldout.values())
    trained = {full_reference(ref) for line in _line(config, name) for ref in config.stages[line].data}
    for ref, weight in stage.heldout.items():
        if full_reference(ref) in trained:
            raise UserError(
                f"'{ref}' is trained on by this stage or one that it starts from, so its pairs would not be held out",
                where=at.where(("stages", name, "heldout", ref)),
                instead="name another split",
            )
        share = weight / total
        size, wanted = _size(config, ref), int(stage.heldout_pairs * share)
        if size is not None and size < wanted:
            raise UserError(
                f"{stage.heldout_pairs} pairs take {wanted} from '{ref}', which has {size} records",
                where=at.where(f"stages.{name}.heldout_pairs"),
                instead=f"write at most {int(size / share)}, or make the split larger",
            )


def _line(config: RunConfig, name: str) -> list[str]:
    """A stage and those that its model went through before."""
    line = [name]
    while (earlier := config.stages[line[-1]].init) != BASE:
        line.append(earlier)
    return line


def _size(config: RunConfig, ref: str) -> int | None:
    """Records of a split, None where only reading the source would tell."""
    name, split = full_reference(ref).split("/", 1)
    return config.sources[name].splits.get(split)


def _check_stages(config: RunConfig, at: Origins) -> None:
    for name, stage in config.stages.items():
        key = f"stages.{name}"
        optim = stage.optim
        _at_most(stage.min_length, "min_length", stage.max_length, "max_length", key, at)
        _at_most(stage.max_length, "max_length", stage.pack_length, "pack_length", key, at)
        _at_most(optim.min_learning_rate, "min_learning_rate", optim.learning_rate, "learning_rate", f"{key}.optim", at)
        _at_most(optim.warmup_steps, "optim.warmup_steps", stage.steps, "steps", key, at)
        sampling: SamplingSection | None = stage.sampling
        if sampling is not None and sampling.max_new_tokens >= stage.max_length:
            raise UserError(
                f"answers of {sampling.max_new_tokens} tokens leave no room for a prompt in max_length {stage.max_length}",
                where=at.where(f"{key}.sampling.max_new_tokens"),
                instead=f"write less than {stage.max_length}, or raise max_length",
            )
        if isinstance(stage, DPOStage | RLStage) and stage.sampling.samples_per_prompt < 2:
            why = "a pair needs two answers" if isinstance(stage, DPOStage) else "a group of one has no advantage"
            raise UserError(
                f"{stage.sampling.samples_per_prompt} is too few: {why}",
                where=at.where(f"{key}.sampling.samples_per_prompt"),
                instead="write at least 2",
            )
        if isinstance(stage, RLStage):
            _refuse_meaningless_for_rl(stage, key, at)
        if isinstance(stage, SFTStage) and not stage.demonstrations and sampling is None:
            raise UserError(
                "false leaves nothing to train on, because there is no sampling",
                where=at.where(f"{key}.demonstrations"),
                instead="write true, or add a sampling section",
            )


def _refuse_meaningless_for_rl(stage: RLStage, key: str, at: Origins) -> None:
    """Options that other kinds share, at another value than their default: a written-out config names them all."""
    if stage.batch_size != type(stage).model_fields["batch_size"].default:
        raise UserError(
            f"'batch_size' means nothing for kind rl (value {stage.batch_size})",
            where=at.where(f"{key}.batch_size"),
            instead="take it out: prompts_per_step sets the size of a step",
        )
    if stage.sampling.num_prompts is not None:
        raise UserError(
            f"'num_prompts' means nothing for kind rl (value {stage.sampling.num_prompts})",
            where=at.where(f"{key}.sampling.num_prompts"),
            instead="take it out: a stage uses steps * prompts_per_step prompts",
        )


def _at_most(low: float, low_key: str, high: float, high_key: str, section: str, at: Origins) -> None:
    if low > high:
        raise UserError(
            f"{low:g} is more than {high_key} {high:g}", where=at.where(f"{section}.{low_key}"), instead=f"write at most {high:g}"
        )


def _check_positions(config: RunConfig, at: Origins, longest: int | None) -> None:
    if longest is None:
        return
    for name, stage in config.stages.items():
        if stage.max_length > longest:
            raise UserError(
                f"{stage.max_length} is more than the model's max_position_embeddings {longest}",
                where=at.where(f"stages.{name}.max_length"),
                instead=f"write at most {longest}",
            )
    if config.eval.max_new_tokens >= longest:
        raise UserError(
            f"{config.eval.max_new_tokens} leaves no room for a prompt in the model's max_position_embeddings {longest}",
            where=at.where("eval.max_new_tokens"),
            instead=f"write less than {longest}",
        )


def _check_resources(config: RunConfig, at: Origins) -> None:
    workers = config.resources.num_workers
    for name, stage in config.stages.items():
        option = "prompts_per_step" if isinstance(stage, RLStage) else "batch_size"
        value = getattr(stage, option)
        if value % workers:
            raise UserError(
                f"{value} cannot be divided among resources.num_workers {workers}",
                where=at.where(f"stages.{name}.{option}"),
                instead=f"write a multiple such as {-(-value // workers) * workers}",
            )
        if isinstance(stage, RLStage) and value % (workers * stage.updates_per_step):
            raise UserError(
                f"{value} // {workers} workers cannot be divided among updates_per_step {stage.updates_per_step}",
                where=at.where(f"stages.{name}.updates_per_step"),
                instead=f"write a divisor of {value // workers}",
            )

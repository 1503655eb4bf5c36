"""Options, their explanations, and the frozen list: a new option is a decision, made by adding it here too."""

from __future__ import annotations

import pytest

from posttrain.config import UserError, explain
from posttrain.config.schema import RunConfig
from posttrain.config.tree import options, walk

OPTIONS = """
name
output_dir
seed
model.path
model.hidden_size
model.num_hidden_layers
model.num_attention_heads
model.num_key_value_heads
model.head_dim
model.rotary_dim
model.softmax_every
model.intermediate_size
model.num_local_experts
model.num_experts_per_tok
model.rope_theta
model.max_position_embeddings
model.rms_norm_eps
model.initializer_range
model.dtype
tokenizer.vocab_size
tokenizer.training_records
sources.NAME.kind
sources.NAME.task
sources.NAME.params
sources.NAME.emit
sources.NAME.pair_kinds
sources.NAME.path
sources.NAME.subset
sources.NAME.hub_split
sources.NAME.format
sources.NAME.dimension
sources.NAME.shots
sources.NAME.disjoint_from
sources.NAME.splits
resources.address
resources.num_workers
resources.cpus_per_worker
resources.gpus_per_worker
resources.zero_stage
resources.max_failures
rollout.engine
eval.source
eval.num_prompts
eval.max_new_tokens
eval.num_shown
stages.NAME.init
stages.NAME.data
stages.NAME.steps
stages.NAME.max_length
stages.NAME.min_length
stages.NAME.pack_length
stages.NAME.batch_size
stages.NAME.gradient_checkpointing
stages.NAME.optim.learning_rate
stages.NAME.optim.min_learning_rate
stages.NAME.optim.schedule
stages.NAME.optim.warmup_steps
stages.NAME.optim.weight_decay
stages.NAME.optim.adam_beta1
stages.NAME.optim.adam_beta2
stages.NAME.optim.adam_eps
stages.NAME.optim.max_grad_norm
stages.NAME.save_steps
stages.NAME.keep_checkpoints
stages.NAME.logging_steps
stages.NAME.kind
stages.NAME.sampling.samples_per_prompt
stages.NAME.sampling.temperatures
stages.NAME.sampling.max_new_tokens
stages.NAME.sampling.num_prompts
stages.NAME.demonstrations
stages.NAME.match_time_of
stages.NAME.reward.model
stages.NAME.reward.learned_weight
stages.NAME.reward.weights
stages.NAME.reward.domains
stages.NAME.reward.gates
stages.NAME.reward.gate_value
stages.NAME.reward.pessimism
stages.NAME.reward.judges.NAME.url
stages.NAME.reward.judges.NAME.model
stages.NAME.reward.judges.NAME.api_key_variable
stages.NAME.reward.judges.NAME.timeout_seconds
stages.NAME.reward.judges.NAME.batch_timeout_seconds
stages.NAME.reward.judges.NAME.retries
stages.NAME.reward.judges.NAME.concurrency
stages.NAME.reward.judges.NAME.max_new_tokens
stages.NAME.reward.judges.NAME.cache
stages.NAME.reward.judges.NAME.prompt_price
stages.NAME.reward.judges.NAME.completion_price
stages.NAME.reward.judges.NAME.kind
stages.NAME.reward.judges.NAME.dimension
stages.NAME.reward.judges.NAME.constitution
stages.NAME.reward.no_verdict
stages.NAME.reward.actor_gpus
stages.NAME.beta
stages.NAME.sft_weight
stages.NAME.min_margin
stages.NAME.heldout
stages.NAME.heldout_pairs
stages.NAME.center_coefficient
stages.NAME.dimensions
stages.NAME.ensemble
stages.NAME.margin_scale
stages.NAME.label_noise
stages.NAME.tie_weight
stages.NAME.grade_weight
stages.NAME.curriculum.pacing
stages.NAME.curriculum.phases.NAME.begins
stages.NAME.curriculum.phases.NAME.weights
stages.NAME.curriculum.initial_competence
stages.NAME.curriculum.full_competence
stages.NAME.curriculum.replay
stages.NAME.curriculum.difficulty.margin
stages.NAME.curriculum.difficulty.disagreement
stages.NAME.curriculum.difficulty.prompt
stages.NAME.curriculum.difficulty.length
stages.NAME.curriculum.difficulty.source
stages.NAME.curriculum.adversarial
stages.NAME.curriculum.shuffled
stages.NAME.objective
stages.NAME.prompts_per_step
stages.NAME.updates_per_step
stages.NAME.scale_advantages
stages.NAME.balance_advantages
stages.NAME.clip_ratio_low
stages.NAME.clip_ratio_high
stages.NAME.negative_ratio_cap
stages.NAME.is_weight_cap
stages.NAME.kl_coef
stages.NAME.shuffle_rewards
""".split()


def test_the_options_are_those_decided_on() -> None:
    assert list(dict.fromkeys(option.key for option in options())) == OPTIONS


def test_every_leaf_of_the_json_schema_is_an_option() -> None:
    """Pydantic's own JSON schema is walked, independently of `walk`."""
    schema = RunConfig.model_json_schema()
    found: set[str] = set()

    def visit(node: dict, key: str) -> None:
        if "$ref" in node:
            visit(schema["$defs"][node["$ref"].rsplit("/", 1)[-1]], key)
        elif "anyOf" in node or "oneOf" in node:
            for choice in node.get("anyOf", []) + node.get("oneOf", []):
                if choice.get("type") != "null":
                    visit(choice, key)
        elif "properties" in node:
            for name, child in node["properties"].items():
                visit(child, f"{key}.{name}")
        elif isinstance(node.get("additionalProperties"), dict) and not _is_scalar(node["additionalProperties"]):
            visit(node["additionalProperties"], f"{key}.NAME")
        else:
            found.add(key.removeprefix("."))

    visit(schema, "")
    assert found == set(OPTIONS)


def _is_scalar(node: dict) -> bool:
    """Whether values are plain, or mappings of plain values (weights by domain)."""
    inner = node.get("additionalProperties")
    return node.get("type") in ("number", "integer", "string", "boolean") or (isinstance(inner, dict) and _is_scalar(inner))


@pytest.mark.parametrize("key", OPTIONS)
def test_an_option_is_explained(key: str) -> None:
    for text in explain(key).split("\n\n"):
        name, description, *rest = text.splitlines()
        assert name.split()[0] == key
        assert len(description.strip()) > 10 and description.rstrip().endswith((".", ")", ";"))
        labels = [line.split(":")[0].strip() for line in rest]
        assert labels in (["write", "default", "source"], ["write", "default"])
        assert (labels[-1] == "default") == ("none, must be given" in rest[-1])


@pytest.mark.parametrize("option", [item for item in walk() if item.key not in OPTIONS], ids=lambda item: item.key)
def test_a_section_lists_its_keys(option) -> None:
    text = explain(option.key)
    assert "keys:" in text and f"    {option.key}." in text


def test_the_end_of_a_name_is_enough() -> None:
    assert explain("learning_rate") == explain("optim.learning_rate") == explain("stages.sft_short.optim.learning_rate")


def test_a_value_range_a_default_and_a_source_are_told() -> None:
    lines = explain("stages.NAME.min_margin").splitlines()
    assert lines[0] == "stages.NAME.min_margin  (stages of kind dpo)"
    assert lines[2:] == ["  write:   a number of at least 0", "  default: 0.05", "  source:  paper section 6.3"]


def test_a_kind_of_stage_chooses_its_meaning() -> None:
    everything, of_rl = explain("stages.NAME.reward"), explain("stages.rl.reward")
    assert of_rl in everything and of_rl != everything and "kind rl" in of_rl


def test_an_entry_of_a_mapping_is_explained_by_the_mapping() -> None:
    assert explain("stages.sft.data.addition/train") == explain("stages.NAME.data")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("lerning_rate", "stages.NAME.optim.learning_rate"),
        ("stages.dpo.betta", "stages.NAME.beta"),
        ("model.hidden_sise", "model.hidden_size"),
        ("resorces", "resources"),
    ],
)
def test_an_unknown_option_names_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f"unknown option; did you mean '{nearest}'"):
        explain(key)


def test_a_name_like_nothing_shows_how_to_ask() -> None:
    with pytest.raises(UserError, match="write for example stages.NAME.steps"):
        explain("")

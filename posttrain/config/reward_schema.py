"""The sections of the configuration that are about rewards: how they are composed, and how a reward model learns."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from posttrain.config.section import Section

Dimension = Literal["correctness", "truthfulness", "helpfulness", "harmlessness"]
Target = Literal["correctness", "truthfulness", "helpfulness", "harmlessness", "coherence", "depth", "relevance", "style"]
Bucket = Literal["contrastive", "bridging", "near_tie", "adversarial"]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]

_EQUAL_WEIGHTS: dict[Dimension, float] = {"correctness": 1.0, "truthfulness": 1.0, "helpfulness": 1.0, "harmlessness": 1.0}


class EndpointSection(Section):
    """A language model behind any OpenAI-compatible endpoint (`posttrain serve` is one), as a judge needs it."""

    url: str = Field(description="Base address of the endpoint, for example http://127.0.0.1:8000/v1.")
    model: str = Field(description="Name of the model there.")
    api_key_variable: str | None = Field(None, description="Environment variable that holds the key; null sends none.")
    timeout_seconds: float = Field(60.0, gt=0, description="Deadline of one request, from connecting to the last byte.")
    batch_timeout_seconds: float = Field(
        600.0, gt=0, description="Deadline of all requests of one call; what is still open then has no verdict."
    )
    retries: int = Field(2, ge=0, description="Requests repeated after a failure, before there is no verdict.")
    concurrency: int = Field(16, ge=1, description="Requests of one call under way at once.")
    max_new_tokens: int = Field(512, ge=1, description="Longest verdict; one that is cut is none.")
    cache: str | None = Field(None, description="Folder of verdicts by content, shared between runs; null keeps them in memory.")
    prompt_price: float = Field(0.0, ge=0, description="Price of a million prompt tokens, for the cost count.")
    completion_price: float = Field(0.0, ge=0, description="Price of a million tokens of verdicts, for the cost count.")


class JudgeSection(EndpointSection):
    """A language model that judges answers."""

    kind: Literal["consistency", "constitution"] = Field(
        description="consistency: does the answer agree with the reference, in five grades. constitution: does it keep to each "
        "principle of a written constitution."
    )
    dimension: Dimension = Field(description="What the verdict is evidence for.")
    constitution: str | None = Field(
        None, description="constitution: YAML file of principles; null takes the one that comes with the package."
    )


class RewardSection(Section):
    """Composition of the hierarchy: gates first, then evidence of correctness, then the weighted rest."""

    model: str | None = Field(
        None, description="Stage of kind reward that gives the learned level; null does without a learned level."
    )
    learned_weight: float = Field(
        0.1,
        ge=0,
        lt=0.5,
        description="Weight of all that is not evidence of correctness, each part in (0, 1); below 0.5 so that it never "
        "overrules a verifier.",
    )
    weights: dict[Dimension, Weight] = Field(
        default_factory=lambda: dict(_EQUAL_WEIGHTS),
        description="Weight of each dimension within the rest; one that is not named weighs nothing, and dimensions that nothing "
        "speaks about are left out.",
    )
    domains: dict[str, dict[Dimension, Weight]] = Field(
        default_factory=dict, description="Weights of a record's domain (field `domain`) in the place of `weights`."
    )
    gates: dict[Literal["harmlessness", "format"], Share] = Field(
        default_factory=dict,
        description="Least harmlessness (judged, else learned) and least share of format rules kept; an answer below scores "
        "`gate_value`, whatever else it is.",
    )
    gate_value: float = Field(0.0, ge=-1, le=0, description="Reward of an answer that a gate stops.")
    pessimism: float = Field(
        0.0, ge=0, description="Standard deviations of the ensemble taken off a learned score before it is squashed."
    )
    judges: dict[str, JudgeSection] = Field(default_factory=dict, description="Language models that judge, by a name of yours.")
    no_verdict: Literal["drop", "learned", "zero"] = Field(
        "learned",
        description="Where a judge gives no verdict: drop takes the answer out of training, learned goes on with the learned "
        "level (without one: zero), zero counts the judge's part as 0.",
    )
    actor_gpus: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Serve the reward to all workers of a stage from one Ray actor, with this share of a GPU (0: on the CPU); "
        "null gives every worker its own copy.",
    )


class PhaseSection(Section):
    """A phase of the curriculum: weights of the difficulty buckets, reached when the phase begins."""

    begins: Share = Field(
        description="Share of the stage's steps at which the phase has its own weights; the first begins at 0, each later than "
        "the one before."
    )
    weights: dict[Bucket, Weight] = Field(
        min_length=1,
        description="Weight of each bucket, relative to their sum; a bucket that is not named weighs 0, one without pairs is "
        "left out.",
    )


class DifficultySection(Section):
    """Weights of what makes a pair difficult; each component is a rank in [0, 1] among the stage's pairs."""

    margin: float = Field(
        1.0, ge=0, description="Small margin, the mean over the dimensions that differ; an unknown one counts as the middle."
    )
    disagreement: float = Field(
        1.0, ge=0, description="Disagreement of an ensemble that scored the pair beforehand, where known."
    )
    prompt: float = Field(0.5, ge=0, description="Low success rate of the init model on the prompt, where known.")
    length: float = Field(0.25, ge=0, description="Long answers, and a better answer that is shorter than the worse one.")
    source: float = Field(0.25, ge=0, description="Small mean margin of the pair's source, where known.")


class CurriculumSection(Section):
    """Order of a reward model's pairs, from easy to hard (our own extension; docs/reward.md)."""

    pacing: Literal["phases", "competence"] = Field(
        "phases",
        description="phases: mixture weights of the buckets, interpolated linearly between phases. competence: pairs up to a "
        "difficulty that grows with the root of time (Platanios et al. 2019).",
    )
    phases: dict[str, PhaseSection] = Field(
        default_factory=lambda: {
            "easy": PhaseSection(begins=0.0, weights={"contrastive": 0.8, "bridging": 0.2}),
            "middle": PhaseSection(
                begins=0.4, weights={"contrastive": 0.2, "bridging": 0.5, "near_tie": 0.2, "adversarial": 0.1}
            ),
            "hard": PhaseSection(
                begins=0.8, weights={"contrastive": 0.1, "bridging": 0.2, "near_tie": 0.35, "adversarial": 0.35}
            ),
        },
        min_length=1,
        description="The phases by name, in order of `begins`; between two beginnings the weights move linearly, after the last "
        "they stay.",
    )
    initial_competence: float = Field(
        0.1, gt=0, le=1, description="competence: share of the easiest pairs open at the first step."
    )
    full_competence: float = Field(
        0.8, gt=0, le=1, description="competence: share of the stage's steps after which all pairs are open."
    )
    replay: Share = Field(
        0.1, description="competence: share of the places that the easiest third of the pairs keeps throughout."
    )
    difficulty: DifficultySection = Field(default_factory=lambda: DifficultySection(), description="What makes a pair difficult.")
    adversarial: Share = Field(
        0.0,
        description="Share of the stage's pairs that an adversarial one is made from: the better answer against itself made "
        "longer, a worse answer in a sure tone, a refusal of a right answer's prompt (phrases in English).",
    )
    shuffled: bool = Field(False, description="Control: the same pairs, drawn for the same steps, in shuffled order.")

"""The typed configuration of a run. Imports no torch, so that `posttrain plan` answers at once.

Every field has a description: `posttrain explain KEY` prints it. Sources are named in the description
where the default comes from a paper.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from posttrain.config.reward_schema import CurriculumSection, RewardSection, Target, Weight
from posttrain.config.section import Section

_FIRST_TARGET: Target = "correctness"

PairKind = Literal["contrastive", "single", "near_tie", "adversarial"]
_PAIR_KINDS: dict[PairKind, float] = {"contrastive": 0.3, "single": 0.4, "near_tie": 0.15, "adversarial": 0.15}


class ModelSection(Section):
    """The model to start from: a checkpoint folder, or an architecture made from scratch."""

    path: str | None = Field(None, description="Folder of a checkpoint with its tokenizer; null makes a model from scratch.")
    hidden_size: int = Field(128, ge=8, description="Width of the residual stream.")
    num_hidden_layers: int = Field(4, ge=1, description="Number of blocks.")
    num_attention_heads: int = Field(4, ge=1, description="Query heads, in lightning and softmax layers.")
    num_key_value_heads: int = Field(2, ge=1, description="Key/value heads of softmax layers; divides num_attention_heads.")
    head_dim: int = Field(32, ge=2, description="Width of a head; even.")
    rotary_dim: int = Field(16, ge=2, description="Leading dimensions of a head that are rotated; even, at most head_dim.")
    softmax_every: int = Field(4, ge=1, description="One softmax layer closes every group of this many layers; the paper uses 8.")
    intermediate_size: int = Field(256, ge=1, description="Inner width of an expert.")
    num_local_experts: int = Field(4, ge=1, description="Experts a layer.")
    num_experts_per_tok: int = Field(2, ge=1, description="Experts chosen for a token; at most num_local_experts.")
    rope_theta: float = Field(
        10_000.0, gt=0, description="RoPE base; 10,000 in pre-training, 10M in post-training (paper, table 6)."
    )
    max_position_embeddings: int = Field(8192, ge=1, description="Longest position; no document may be longer.")
    rms_norm_eps: float = Field(1e-5, gt=0, description="Epsilon of the decoder norms.")
    initializer_range: float = Field(0.02, gt=0, description="Standard deviation of initial weights.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Type of weights; router, head and states stay fp32.")


class TokenizerSection(Section):
    """The tokenizer of a model made from scratch; a checkpoint brings its own."""

    vocab_size: int = Field(512, ge=270, description="Size of the byte-level BPE trained on the recipe's own data.")
    training_records: int = Field(2000, ge=1, description="Records of each source that the BPE is trained on.")


class SourceSection(Section):
    """Where records come from. Splits are disjoint by prompt, cut in the order given."""

    kind: Literal["reasoning_gym", "graded_pairs", "jsonl", "parquet", "huggingface"] = Field(
        description="reasoning_gym generates tasks with scorers, graded_pairs good and bad answers; the others read records."
    )
    task: str | None = Field(None, description="reasoning_gym, graded_pairs: name of the task.")
    params: dict[str, Any] = Field(
        default_factory=dict, description="reasoning_gym, graded_pairs: the task's own difficulty settings."
    )
    emit: Literal["pairs", "grades", "demonstrations"] | None = Field(
        None,
        description="graded_pairs and formats of preferences: pairs, answers with grades, or (graded_pairs) right answers with "
        "their steps. Null means pairs.",
    )
    pair_kinds: dict[PairKind, Weight] = Field(
        default_factory=lambda: dict(_PAIR_KINDS),
        min_length=1,
        description="graded_pairs: weight of pairs that differ in much, in one dimension alone, in little, or to mislead.",
    )
    path: str | None = Field(None, description="jsonl, parquet: the file. huggingface: name of the dataset.")
    subset: str | None = Field(None, description="huggingface: configuration of the dataset.")
    hub_split: str = Field("train", description="huggingface: split of the dataset.")
    format: Literal["trl", "helpsteer2", "helpsteer3", "ultrafeedback", "skywork", "hh", "rewardbench2", "rm_bench"] = Field(
        "trl", description="jsonl, parquet, huggingface: what the columns are, TRL's formats or a published schema."
    )
    dimension: Target | None = Field(
        None,
        description="Formats that only say which answer is better: what they judge by. Null takes the format's own, where it has "
        "one; hh and skywork have none.",
    )
    shots: int = Field(1, ge=1, description="Records joined to one conversation of as many turns (many-shot documents).")
    disjoint_from: list[str] = Field(
        default_factory=list, description="Earlier sources whose prompts are left out here; those of eval.source always are."
    )
    splits: dict[str, int] = Field(
        default_factory=dict, description="Name and number of records of each split; empty puts all records in the split 'train'."
    )


class ResourcesSection(Section):
    """What a training stage runs on."""

    address: str | None = Field(
        None, description="Address of a running Ray cluster; null starts a local Ray and stops it afterwards."
    )
    num_workers: int = Field(1, ge=1, description="Training processes of a stage (data parallel).")
    cpus_per_worker: int = Field(1, ge=1, description="CPU cores, and threads, of a worker.")
    gpus_per_worker: int = Field(0, ge=0, le=1, description="GPUs of a worker: 0 or 1.")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        0, description="DeepSpeed ZeRO stage; 0 trains without DeepSpeed (one worker, or plain data parallel)."
    )
    max_failures: int = Field(
        0, ge=0, description="How often a stage whose worker died is started again from its last complete checkpoint."
    )


class RolloutSection(Section):
    """What answers are drawn with: for evaluation, training data and online RL."""

    engine: Literal["auto", "embedded", "vllm"] = Field(
        "auto",
        description="embedded samples from the trainer's own model; vllm runs vLLM in a process of its own, as CPU stages can; "
        "auto takes vllm where it is installed and stages run on CPUs, else embedded. Tokens are drawn by the same noise in "
        "both, so they differ by rounding alone. For models of a few million parameters and short answers, embedded is faster.",
    )


class EvalSection(Section):
    """Held-out accuracy, greedy, after every stage."""

    source: str = Field(description="SOURCE/SPLIT of the held-out prompts; must have a verifier.")
    num_prompts: int = Field(500, ge=1, description="Prompts scored.")
    max_new_tokens: int = Field(16, ge=1, description="Longest answer.")
    num_shown: int = Field(8, ge=0, description="Answers kept for the report.")


class SamplingSection(Section):
    """How answers are drawn from the model for rejection sampling, preference pairs and online RL."""

    samples_per_prompt: int = Field(4, ge=1, description="Answers drawn for a prompt.")
    temperatures: list[Annotated[float, Field(gt=0)]] = Field(
        [1.0], min_length=1, description="Temperatures, used in turn (paper section 5.3: several)."
    )
    max_new_tokens: int = Field(16, ge=1, description="Longest answer.")
    num_prompts: int | None = Field(
        None,
        ge=1,
        description="Prompts sampled for training data; null takes all of the stage's prompts. Means nothing for kind rl.",
    )


class OptimSection(Section):
    """Optimizer and schedule of a training stage."""

    learning_rate: float = Field(1e-3, gt=0, description="Highest learning rate.")
    min_learning_rate: float = Field(0.0, ge=0, description="Learning rate at the last step of a cosine schedule.")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="Decay after warm-up (paper table 7: cosine in short stages, constant in long ones)."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW beta1.")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="AdamW beta2 (paper section 4: 0.95).")
    adam_eps: float = Field(1e-15, gt=0, description="AdamW epsilon (MiniMax-M1 section 3.2: 1e-15 for tiny gradients).")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient norm is clipped here.")


class StageSection(Section):
    """What every training stage has. `init` names the stage whose model it starts from."""

    init: str = Field("base", description="Stage whose model this one starts from, or 'base'.")
    data: dict[str, float] = Field(min_length=1, description="Weight of each SOURCE/SPLIT in the stage's documents.")
    steps: int = Field(ge=1, description="Optimizer steps.")
    max_length: int = Field(256, ge=2, description="Longest document in tokens; longer ones are dropped and counted.")
    min_length: int = Field(
        1,
        ge=1,
        description="Shortest document in tokens (of kind rl: prompt with max_new_tokens); shorter ones are dropped and counted.",
    )
    pack_length: int = Field(1024, ge=2, description="Tokens of a packed sequence; at least max_length.")
    batch_size: int = Field(
        1, ge=1, description="Packed sequences a step, over all workers; divisible by their number. Means nothing for kind rl."
    )
    gradient_checkpointing: Literal["none", "attention", "block"] = Field(
        "none",
        description="What the backward pass computes again instead of keeping: nothing, attention (experts are kept), or whole "
        "blocks (least memory, about a third more arithmetic). Results are the same.",
    )
    optim: OptimSection = Field(default_factory=OptimSection, description="Optimizer and schedule.")
    save_steps: int = Field(100, ge=1, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(1, ge=1, description="Complete checkpoints kept while the stage runs.")
    logging_steps: int = Field(10, ge=1, description="Steps between metric records.")


class SFTStage(StageSection):
    """Supervised fine-tuning on demonstrations, joined by verified samples of the model itself."""

    kind: Literal["sft"] = Field(description="Kind of the stage.")
    sampling: SamplingSection | None = Field(
        None,
        description="Rejection sampling: answers of the init model that `reward` accepts join the demonstrations; "
        "null trains on demonstrations alone.",
    )
    demonstrations: bool = Field(
        True, description="Whether given demonstrations are trained on; false leaves the accepted samples alone."
    )
    match_time_of: str | None = Field(
        None,
        description="Stage whose wall time (sampling included) bounds this one: a control at equal cost. "
        "Results then depend on the machine's speed.",
    )
    reward: RewardSection = Field(
        default_factory=lambda: RewardSection(),
        description="What accepts samples: where the record has a verifier all distinct right ones that pass the gates, else the "
        "best one by total.",
    )


class DPOStage(StageSection):
    """Direct preference optimisation, best against worst of several samples by reward (paper section 5.4.1)."""

    kind: Literal["dpo"] = Field(description="Kind of the stage.")
    beta: float = Field(
        0.1, gt=0, description="Strength of the tie to the reference model (not printed in the paper; TRL's default)."
    )
    sft_weight: float = Field(
        0.0, ge=0, description="Weight of the chosen answer's negative log-likelihood added to the loss (RPO's alpha)."
    )
    sampling: SamplingSection = Field(default_factory=lambda: SamplingSection(), description="How candidate answers are drawn.")
    reward: RewardSection = Field(default_factory=lambda: RewardSection(), description="What ranks them.")
    demonstrations: bool = Field(
        False,
        description="A prompt's demonstration competes with its samples, so prompts that the model always fails make pairs.",
    )
    min_margin: float = Field(0.05, ge=0, description="Pairs whose rewards differ by less are dropped (paper section 6.3).")


class RewardStage(StageSection):
    """Reward model with a head a dimension, on pairs and graded answers; sampled pairs are verified-better against -worse."""

    kind: Literal["reward"] = Field(description="Kind of the stage.")
    sampling: SamplingSection = Field(
        default_factory=lambda: SamplingSection(),
        description="How wrong answers are drawn from the init model; "
        "every training prompt also gets an answer of a neighbouring prompt.",
    )
    heldout: dict[str, float] = Field(min_length=1, description="Weight of each SOURCE/SPLIT for held-out pairs.")
    heldout_pairs: int = Field(500, ge=1, description="Held-out pairs scored after training.")
    center_coefficient: float = Field(
        0.01, ge=0, description="Pull of the mean reward to zero (TRL's center_rewards_coefficient)."
    )
    dimensions: list[Target] = Field(
        default_factory=lambda: [_FIRST_TARGET],
        min_length=1,
        description="What the model has heads for: dimensions and attributes of helpfulness. A pair that names no dimensions "
        "counts for the first.",
    )
    ensemble: int = Field(
        1,
        ge=1,
        description="Heads of each dimension, each trained on its own draw of the pairs; their spread is the uncertainty.",
    )
    margin_scale: float = Field(
        0.0, ge=0, description="A pair's margin in [0, 1], times this, is what the better answer must lead by (Llama 2's margin)."
    )
    label_noise: float = Field(
        0.0, ge=0, lt=0.5, description="Share of pairs that are taken to be labelled the wrong way round (conservative loss)."
    )
    tie_weight: float = Field(
        1.0, ge=0, description="Weight of the loss that holds dimensions equal in which a pair does not differ."
    )
    grade_weight: float = Field(1.0, ge=0, description="Weight of the loss on graded answers (cross-entropy with the grade).")
    curriculum: CurriculumSection | None = Field(
        None, description="Order of the pairs, from easy to hard; null draws them in random order."
    )


class RLStage(StageSection):
    """Online RL with verifiable rewards: sample, score, update (paper section 5.4.2)."""

    kind: Literal["rl"] = Field(description="Kind of the stage.")
    objective: Literal["minimax01", "grpo", "cispo"] = Field(
        "minimax01", description="Policy objective: the paper's modified GRPO, plain GRPO, or MiniMax-M1's CISPO."
    )
    prompts_per_step: int = Field(32, ge=1, description="Prompts a step, over all workers; divisible by the number of workers.")
    updates_per_step: int = Field(
        1,
        ge=1,
        description="Optimizer steps a batch of rollouts, each on a share of its prompts.",
    )
    sampling: SamplingSection = Field(
        default_factory=lambda: SamplingSection(), description="How answers are drawn; samples_per_prompt is the group size."
    )
    reward: RewardSection = Field(default_factory=lambda: RewardSection(), description="What scores them.")
    scale_advantages: bool = Field(
        False, description="Divide a group's advantages by their standard deviation (GRPO does; Dr. GRPO does not)."
    )
    balance_advantages: bool = Field(
        True, description="Scale so that positive and negative advantages weigh the same (paper section 5.4.2; formula ours)."
    )
    clip_ratio_low: float = Field(0.2, gt=0, lt=1, description="Ratio is clipped at 1 - this.")
    clip_ratio_high: float = Field(0.2, gt=0, description="Ratio is clipped at 1 + this.")
    negative_ratio_cap: float = Field(
        3.0,
        gt=1,
        description="minimax01: tokens with negative advantage and a ratio above this leave the loss (value not printed).",
    )
    is_weight_cap: float = Field(5.0, gt=1, description="cispo: importance weights are capped here (absolute).")
    kl_coef: float = Field(0.0, ge=0, description="Weight of the KL term; 0 needs no reference model.")
    shuffle_rewards: bool = Field(
        False, description="Control: rewards are permuted over the step's samples, so nothing can be learned from them."
    )


AnyStage = Annotated[SFTStage | DPOStage | RewardStage | RLStage, Field(discriminator="kind")]


class RunConfig(Section):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run; its folder is OUTPUT_DIR/NAME.")
    output_dir: str = Field("runs", description="Folder of runs.")
    seed: int = Field(0, ge=0, description="Seed of everything random in the run.")
    model: ModelSection = Field(default_factory=lambda: ModelSection(), description="The model to start from.")
    tokenizer: TokenizerSection = Field(
        default_factory=lambda: TokenizerSection(), description="The tokenizer of a model made from scratch."
    )
    sources: dict[str, SourceSection] = Field(min_length=1, description="Named sources of records.")
    resources: ResourcesSection = Field(default_factory=lambda: ResourcesSection(), description="What a training stage runs on.")
    rollout: RolloutSection = Field(default_factory=lambda: RolloutSection(), description="What answers are drawn with.")
    eval: EvalSection = Field(description="Held-out accuracy after every stage.")
    stages: dict[str, AnyStage] = Field(
        min_length=1, description="The stages, by name; `init` and `reward.model` make them a graph."
    )

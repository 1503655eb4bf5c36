"""The stage's reward, put together from its section of the config."""

from __future__ import annotations

from posttrain.config.schema import RewardSection
from posttrain.data.tokenizer import load_tokenizer
from posttrain.model.loading import load_reward_model
from posttrain.reward.hierarchy import HierarchicalReward
from posttrain.reward.learned import LearnedLevel
from posttrain.stages.devices import placed
from posttrain.stages.job import StageJob


def build_reward(job: StageJob, section: RewardSection) -> HierarchicalReward:
    """The verifier, above the learned level of `inputs["reward"]` where the section names a reward model."""
    if section.model is None:
        return HierarchicalReward(None, section.learned_weight)
    folder = job.inputs["reward"]
    model = placed(load_reward_model(folder))
    return HierarchicalReward(LearnedLevel(model, load_tokenizer(folder)), section.learned_weight)

"""The reward model's curriculum: how difficult pairs are, in which order they come, and adversarial pairs made from given ones.

Pure functions of records and numbers, without a model. The paper (MiniMax-01) describes no curriculum for its reward models;
this one is our own.
"""

from posttrain.reward.curriculum.adversarial import adversarial_pairs
from posttrain.reward.curriculum.difficulty import BUCKETS, buckets, disagreement_of, pair_difficulty
from posttrain.reward.curriculum.order import bucket_schedule, competence, plan_order

__all__ = [
    "BUCKETS",
    "adversarial_pairs",
    "bucket_schedule",
    "buckets",
    "competence",
    "disagreement_of",
    "pair_difficulty",
    "plan_order",
]

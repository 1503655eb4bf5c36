"""Language models as judges, behind any OpenAI-compatible endpoint (level 1 of the reward hierarchy).

`build_judges` makes those of a reward, `build_pairwise` the one that compares two answers. A judge that is slow, down or writes
nonsense gives "no verdict" (score None, with the reason), never a number.
"""

from posttrain.reward.judges.build import build_judges, build_pairwise
from posttrain.reward.judges.consistency import ConsistencyJudge
from posttrain.reward.judges.constitution import ConstitutionJudge, load_constitution
from posttrain.reward.judges.endpoint import Endpoint
from posttrain.reward.judges.pairwise import PairwiseJudge, Preference, Tally, tally
from posttrain.reward.judges.types import Costs, Judge, Question, Verdict

__all__ = [
    "ConsistencyJudge",
    "ConstitutionJudge",
    "Costs",
    "Endpoint",
    "Judge",
    "PairwiseJudge",
    "Preference",
    "Question",
    "Tally",
    "Verdict",
    "build_judges",
    "build_pairwise",
    "load_constitution",
    "tally",
]

"""Grading plain documents, and weighing their sources by the grades (MiniMax-01, section 4: quality of data)."""

from posttrain.reward.documents.grading import (
    CATEGORIES,
    UNKNOWN,
    Document,
    DocumentGrade,
    DocumentGrader,
    DocumentJudge,
    LearnedDocumentGrader,
)
from posttrain.reward.documents.weights import GroupWeight, source_weights, thinning

__all__ = [
    "CATEGORIES",
    "UNKNOWN",
    "Document",
    "DocumentGrade",
    "DocumentGrader",
    "DocumentJudge",
    "GroupWeight",
    "LearnedDocumentGrader",
    "source_weights",
    "thinning",
]

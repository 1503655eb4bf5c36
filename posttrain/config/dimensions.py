"""Names of what the reward hierarchy scores: four dimensions, one of them with attributes (MiniMax-01, section 5.2)."""

from __future__ import annotations

DIMENSIONS = ("correctness", "truthfulness", "helpfulness", "harmlessness")
"""What an answer is scored for."""

ATTRIBUTES = ("coherence", "depth", "relevance", "style")
"""What people grade helpfulness by, beside the rules that can be checked."""

TARGETS = (*DIMENSIONS, *ATTRIBUTES)
"""All that a learned reward model may have a head for."""

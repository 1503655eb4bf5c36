"""Weights on their way from a trainer to engines: where they come from, how they are checked, where they wait."""

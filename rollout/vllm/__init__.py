"""vLLM: our model in it, and what we drive it with. The only place that imports it."""

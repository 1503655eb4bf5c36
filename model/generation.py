"""What transformers' `generate` needs beyond the forward pass."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationMixin

from posttrain.model.cache import HybridCache


class HybridGeneration(GenerationMixin):
    """Greedy search, sampling and beams of transformers on a `HybridCache`.

    Prompts of different length are padded on the left. Assisted decoding and prompt look-up guess several tokens and take
    back the wrong ones; a recurrent state cannot, so transformers refuses both (`_is_stateful`).
    """

    _is_stateful = True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """transformers' caches hold no recurrent states."""
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        """Put a cache of the right size into `model_kwargs`.

        Raises:
            ValueError: padding on the right, another kind of cache, or the model as a draft for another one.
        """
        mask = model_kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2 and mask.shape[1] and not bool(mask[:, -1].all()):
            raise ValueError("generate continues at the last column, but a row is padded there; set padding_side='left'")
        if generation_config.is_assistant:
            raise ValueError(f"{type(self).__name__} cannot draft for assisted decoding: its cache cannot be rolled back")
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} does not hold recurrent states; leave it out"
            )
        given = model_kwargs.get("past_key_values")
        if given is not None:
            if not isinstance(given, HybridCache):
                raise ValueError(f"past_key_values must be a HybridCache, got {type(given).__name__}")
            return
        if generation_config.use_cache is False:
            return
        rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        embedding: torch.Tensor = self.get_input_embeddings().weight
        model_kwargs["past_key_values"] = HybridCache(
            self.config, rows, max_cache_length, device=embedding.device, dtype=embedding.dtype, grows=True
        )

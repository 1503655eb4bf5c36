"""Configuration of MiniMax-Text-01, under the names of its released config.json."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from posttrain.model.checkpoint_files import MODEL_TYPE


class MiniMaxText01Config(PreTrainedConfig):
    """Architecture of a MiniMax-Text-01 model of any size.

    Field names are those of the released files. `attn_type_list` holds a 0 for every lightning layer and a 1 for
    every softmax layer; the released model has seven of the first before each of the second. The residual factors
    default to DeepNorm's (2 * layers) ** 0.25 (MiniMax-01 paper section 4.1).

    Raises:
        ValueError: sizes that do not fit each other.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 200_064,
        hidden_size: int = 6144,
        num_hidden_layers: int = 80,
        num_attention_heads: int = 64,
        num_key_value_heads: int = 8,
        head_dim: int = 128,
        rotary_dim: int = 64,
        rope_theta: float = 10_000_000.0,
        max_position_embeddings: int = 10_240_000,
        intermediate_size: int = 9216,
        num_local_experts: int = 32,
        num_experts_per_tok: int = 2,
        attn_type_list: list[int] | None = None,
        rms_norm_eps: float = 1e-5,
        lightning_norm_eps: float = 1e-6,
        layernorm_linear_attention_alpha: float | None = None,
        layernorm_linear_attention_beta: float = 1.0,
        layernorm_full_attention_alpha: float | None = None,
        layernorm_full_attention_beta: float = 1.0,
        layernorm_mlp_alpha: float | None = None,
        layernorm_mlp_beta: float = 1.0,
        initializer_range: float = 0.02,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.rotary_dim = rotary_dim
        self.rope_theta = rope_theta
        self.max_position_embeddings = max_position_embeddings
        self.intermediate_size = intermediate_size
        self.num_local_experts = num_local_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.attn_type_list = attn_type_list or [int((i + 1) % 8 == 0) for i in range(num_hidden_layers)]
        self.rms_norm_eps = rms_norm_eps
        self.lightning_norm_eps = lightning_norm_eps
        alpha = (2 * num_hidden_layers) ** 0.25
        self.layernorm_linear_attention_alpha = layernorm_linear_attention_alpha or alpha
        self.layernorm_linear_attention_beta = layernorm_linear_attention_beta
        self.layernorm_full_attention_alpha = layernorm_full_attention_alpha or alpha
        self.layernorm_full_attention_beta = layernorm_full_attention_beta
        self.layernorm_mlp_alpha = layernorm_mlp_alpha or alpha
        self.layernorm_mlp_beta = layernorm_mlp_beta
        self.initializer_range = initializer_range
        self._check()
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    def _check(self) -> None:
        if len(self.attn_type_list) != self.num_hidden_layers or not set(self.attn_type_list) <= {0, 1}:
            raise ValueError(
                f"attn_type_list must hold a 0 or 1 for each of {self.num_hidden_layers} layers: {self.attn_type_list}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"{self.num_attention_heads} heads are not divisible by {self.num_key_value_heads} key/value heads")
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ValueError(f"rotary_dim must be even and at most head_dim {self.head_dim}, got {self.rotary_dim}")
        if not 0 < self.num_experts_per_tok <= self.num_local_experts:
            raise ValueError(f"num_experts_per_tok {self.num_experts_per_tok} must be in 1..{self.num_local_experts}")

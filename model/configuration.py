"""Configuration of MiniMax-Text-01 and MiniMax-M1, under the names of their released config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from posttrain.model.config_fields import (
    INNER_NORM_EPS,
    M1,
    TEXT_01,
    TRANSLATED,
    canonical,
    drop_fixed,
    native_fields,
    official_fields,
)

_COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rotary_dim",
    "max_position_embeddings",
    "intermediate_size",
    "num_local_experts",
    "num_experts_per_tok",
)


class MiniMaxText01Config(PreTrainedConfig):
    """Architecture of a MiniMax-Text-01 model of any size.

    Field names are those of the released files. `attn_type_list` holds a 0 for every lightning layer and a 1 for
    every softmax layer; the released model has seven of the first before each of the second. The residual factors
    default to DeepNorm's (2 * layers) ** 0.25 (MiniMax-01 paper section 4.1). Other fields of a file are kept as attributes
    (`router_aux_loss_coef`, say), save those with a single implemented value, such as `postnorm`, which are checked.

    `from_dict` and `from_pretrained` also take the fields of transformers' `minimax`.

    Raises:
        ValueError: sizes that do not fit each other, or a value that is not implemented.
    """

    model_type = TEXT_01
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_experts": "num_local_experts"}  # TRL reads the first, where an auxiliary loss is on

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
        lightning_norm_eps: float = INNER_NORM_EPS,
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
        kwargs = drop_fixed(kwargs)
        if translated := sorted(TRANSLATED & kwargs.keys()):
            raise ValueError(f"{translated[0]} is not a name of this class; from_dict translates it")
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
        self.attn_type_list: list[int] = attn_type_list  # type: ignore[assignment]  # completed below, once sizes are checked
        self.rms_norm_eps = rms_norm_eps
        self.lightning_norm_eps = lightning_norm_eps
        self.layernorm_linear_attention_alpha = layernorm_linear_attention_alpha
        self.layernorm_linear_attention_beta = layernorm_linear_attention_beta
        self.layernorm_full_attention_alpha = layernorm_full_attention_alpha
        self.layernorm_full_attention_beta = layernorm_full_attention_beta
        self.layernorm_mlp_alpha = layernorm_mlp_alpha
        self.layernorm_mlp_beta = layernorm_mlp_beta
        self.initializer_range = initializer_range
        self._complete_and_check(tie_word_embeddings)
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """The configuration of a config.json of any of the three kinds; see `config_fields.canonical` for errors."""
        fields = canonical(config_dict)
        del fields["model_type"]
        return super().from_dict(fields, **kwargs)

    def to_official(self, model_type: str | None = None) -> dict[str, Any]:
        """config.json of a released model.

        Args:
            model_type: `minimax_text_01` or `minimax_m1`; by default this class's own.

        Raises:
            ValueError: another type, or a `lightning_norm_eps` that the released code does not have.
        """
        return official_fields(self.to_diff_dict(), model_type or type(self).model_type)

    def to_native(self) -> dict[str, Any]:
        """config.json of transformers' `minimax`; ValueError where transformers would compute another model."""
        return native_fields(self.to_diff_dict())

    def _complete_and_check(self, tied: bool) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.attn_type_list is None:
            self.attn_type_list = [int((i + 1) % 8 == 0) for i in range(self.num_hidden_layers)]
        for part in ("linear_attention", "full_attention", "mlp"):
            if getattr(self, f"layernorm_{part}_alpha") is None:
                setattr(self, f"layernorm_{part}_alpha", (2 * self.num_hidden_layers) ** 0.25)
        if len(self.attn_type_list) != self.num_hidden_layers or not set(self.attn_type_list) <= {0, 1}:
            raise ValueError(
                f"attn_type_list must hold a 0 or 1 for each of {self.num_hidden_layers} layers: {self.attn_type_list}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"{self.num_attention_heads} heads are not divisible by {self.num_key_value_heads} key/value heads")
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(f"rotary_dim must be even and at most head_dim {self.head_dim}, got {self.rotary_dim}")
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError(f"num_experts_per_tok {self.num_experts_per_tok} must be in 1..{self.num_local_experts}")
        if tied:
            raise ValueError("tie_word_embeddings = True is not implemented; it must be False")


class MiniMaxM1Config(MiniMaxText01Config):
    """MiniMax-M1: the same architecture under another `model_type` (MiniMax-M1 report, section 2)."""

    model_type = M1

    def __init__(self, **kwargs: Any) -> None:  # without one of its own, transformers would generate one that calls no other
        super().__init__(**kwargs)


CONFIGS: dict[str, type[MiniMaxText01Config]] = {TEXT_01: MiniMaxText01Config, M1: MiniMaxM1Config}
"""Classes by the model_type that `config_fields.canonical` gives."""

# Wherever the class is known the Auto classes know it: AutoTokenizer reads config.json too, and where the type is unknown to
# it, it goes on with a nameless base class and a warning about it.
for _config in CONFIGS.values():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)

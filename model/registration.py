"""Makes transformers' Auto classes know the models: `import posttrain.model.registration` is enough, without remote code.

Released checkpoints load through `from_pretrained` as well: transformers is told how their experts are stacked.
"""

from __future__ import annotations

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming, WeightTransform

from posttrain.model.configuration import MiniMaxM1Config, MiniMaxText01Config
from posttrain.model.modeling import MiniMaxText01ForCausalLM, MiniMaxText01ForSequenceClassification


class MiniMaxM1ForCausalLM(MiniMaxText01ForCausalLM):
    """MiniMax-M1's language model."""

    config_class = MiniMaxM1Config


class MiniMaxM1ForSequenceClassification(MiniMaxText01ForSequenceClassification):
    """A reward model on MiniMax-M1's trunk."""

    config_class = MiniMaxM1Config


class _ReadOnly(WeightConverter):
    """Stacks experts on loading. Saving keeps our names: a stock Trainer resumes from what it saved by the model's own names,
    with strict=False, so experts saved under other names would silently stay at their initial values."""

    __slots__ = ()

    def reverse_transform(self) -> WeightTransform:
        """A renaming that matches nothing."""
        return WeightRenaming(r"(?!)", "never")


def _stack_experts() -> list[WeightTransform]:
    return [
        _ReadOnly(
            [".experts.*.w1.weight", ".experts.*.w3.weight"],
            ".experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        _ReadOnly([".experts.*.w2.weight"], ".experts.down_proj", operations=[MergeModulelist(dim=0)]),
    ]


for _config, _causal_lm, _classifier in (
    (MiniMaxText01Config, MiniMaxText01ForCausalLM, MiniMaxText01ForSequenceClassification),
    (MiniMaxM1Config, MiniMaxM1ForCausalLM, MiniMaxM1ForSequenceClassification),
):
    AutoModelForCausalLM.register(_config, _causal_lm, exist_ok=True)
    AutoModelForSequenceClassification.register(_config, _classifier, exist_ok=True)
    register_checkpoint_conversion_mapping(_config.model_type, _stack_experts(), overwrite=True)

"""What vLLM calls in each of its processes (entry point `vllm.general_plugins`): our model, under its three names."""

from __future__ import annotations

from posttrain.rollout.vllm import backends, versions

ARCHITECTURES = ("MiniMaxText01ForCausalLM", "MiniMaxForCausalLM", "MiniMaxM1ForCausalLM")
"""Names in `architectures` of config.json: the released model, transformers' class, and MiniMax-M1."""

MODEL = "posttrain.rollout.vllm.model:MiniMaxText01ForCausalLM"


def register() -> None:
    """Make vLLM know the model, its configurations and our weight transfer; a second call changes nothing.

    Nothing heavy is imported: vLLM looks at the model's class in a process of its own.

    Raises:
        UserError: a version of vLLM that is known not to work. vLLM logs it and goes on without the plugin.
    """
    versions.check()
    versions.let_llvmlite_be_scanned()
    from vllm import ModelRegistry

    import posttrain.model.configuration  # noqa: F401  # makes transformers' AutoConfig know the model types

    for name in ARCHITECTURES:
        ModelRegistry.register_model(name, MODEL)
    backends.register()

"""What is kept for the backward pass, what is computed again, and models that hold no memory at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from posttrain.model import head
from posttrain.model.backbone import CheckpointPolicy
from posttrain.model.head import LMHead
from posttrain.model.modeling import MiniMaxText01ForCausalLM, MiniMaxText01ForSequenceClassification
from tests.model.small import packed, random_tokens, small_config, small_model

POLICIES: list[CheckpointPolicy] = ["block", "attention"]


def pass_through(model: MiniMaxText01ForCausalLM) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes of activations kept for the backward pass, each storage once, and the gradients."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens, layout = packed(random_tokens(65), random_tokens(1), random_tokens(30))
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens, labels=tokens, layout=layout, output_router_logits=True).loss
    loss.backward()
    return sum(kept.values()), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_checkpoints_change_no_gradient(policy: CheckpointPolicy, reentrant: bool) -> None:
    model = small_model(router_aux_loss_coef=0.1)
    _, truth = pass_through(model)
    model.checkpoint_policy = policy
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    _, gradients = pass_through(model)
    for name, gradient in truth.items():
        # A reentrant checkpoint inside a block adds the same gradients in another order: two additions a layer, each off by up
        # to one rounding in either order, over three layers.
        tolerance = 16 * torch.finfo(torch.float32).eps * float(gradient.abs().max()) if reentrant else 0.0
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=tolerance)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_checkpoints_keep_less_and_blocks_least() -> None:
    kept = {}
    for policy in (None, *POLICIES):
        model = small_model()
        if policy:
            model.checkpoint_policy = policy
            model.gradient_checkpointing_enable()
        kept[policy], _ = pass_through(model)
    assert kept["attention"] < 0.8 * kept[None]
    assert kept["block"] < 0.5 * kept["attention"]


def test_every_second_layer_is_recomputed_where_so_asked() -> None:
    model = small_model()
    model._set_gradient_checkpointing(every_n_layers=2)
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True, False, True]


def test_a_policy_of_another_name_is_refused() -> None:
    model: Any = small_model()
    model.checkpoint_policy = "everything"
    with pytest.raises(ValueError, match="checkpoint_policy must be 'block' or 'attention', got 'everything'"):
        model.gradient_checkpointing_enable()


@pytest.mark.parametrize("kind", [MiniMaxText01ForCausalLM, MiniMaxText01ForSequenceClassification])
def test_models_are_made_without_memory(kind: type[torch.nn.Module]) -> None:
    with torch.device("meta"):
        model = kind(small_config())
    assert all(parameter.is_meta for parameter in model.parameters())
    real = kind(small_config())
    model.load_state_dict(real.state_dict(), assign=True)
    tokens = random_tokens(20)[None]
    assert torch.equal(model(tokens).logits, real(tokens).logits)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_the_head_keeps_no_tokens_times_vocabulary(with_entropy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor in the backward pass: no tensor of that size is ever made."""
    monkeypatch.setattr(head, "CHUNK_LOGITS", 100_000)
    tokens, vocabulary = 8192, 512
    made = LMHead(4, vocabulary)
    torch.nn.init.normal_(made.weight)
    hidden = torch.randn(tokens, 4, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,))
    largest = _Largest()
    with largest:
        if with_entropy:
            logprobs, entropy = made(hidden, targets, with_entropy=True)
            (logprobs.sum() + entropy.sum()).backward()
        else:
            made(hidden, targets).sum().backward()
    assert 0 < largest.elements <= 100_000


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made

"""The model on a GPU, where lightning attention runs in Triton, against the same weights in fp64 on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from posttrain.data.layout import SequenceLayout
from posttrain.model.attention import LightningAttention
from posttrain.model.configuration import MiniMaxText01Config
from posttrain.model.modeling import MiniMaxText01ForCausalLM
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.types import RolloutRequest, SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

LENGTHS = (1, 63, 0, 64, 65, 1, 200)


def model() -> MiniMaxText01ForCausalLM:
    """Three lightning layers and a softmax layer, with weights large enough that layers matter."""
    torch.manual_seed(0)
    config = MiniMaxText01Config(
        vocab_size=300,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rotary_dim=16,
        rope_theta=1e4,
        max_position_embeddings=1024,
        intermediate_size=64,
        num_local_experts=4,
        attn_type_list=[0, 0, 0, 1],
        initializer_range=0.1,
    )
    return MiniMaxText01ForCausalLM(config)


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Root mean square of the difference, as a share of the truth's."""
    return float((found.double().cpu() - truth).norm() / truth.norm())


def test_packed_logits_and_gradients_agree_with_fp64() -> None:
    reference, tested = model().double(), model().cuda()
    tokens = torch.randint(0, 300, (1, sum(LENGTHS)))
    losses = []
    for one in (reference, tested):
        device = next(one.parameters()).device
        layout = SequenceLayout.from_lengths(LENGTHS, device)
        output = one(tokens.to(device), layout=layout, labels=tokens.to(device))
        output.loss.backward()
        losses.append(output.loss.detach())
    # fp32 throughout, the kernels' products too: the bounds that hold for fp32 on the CPU.
    assert relative(losses[1], losses[0].cpu()) < 5e-5
    for (name, truth), found in zip(reference.named_parameters(), tested.parameters(), strict=True):
        assert relative(found.grad, truth.grad) < 2e-4, name


def test_a_lightning_layer_in_bf16_compiled_and_recomputed() -> None:
    config = MiniMaxText01Config(
        hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=128, attn_type_list=[0, 1]
    )
    torch.manual_seed(0)
    layer = LightningAttention(config, 0).cuda().bfloat16()
    x, dy = (torch.randn(sum(LENGTHS), 256, dtype=torch.bfloat16) for _ in range(2))

    def results(like: torch.Tensor, run: Callable[..., torch.Tensor], one: LightningAttention) -> dict[str, torch.Tensor]:
        leaf = x.to(like).requires_grad_()
        out = run(leaf, SequenceLayout.from_lengths(LENGTHS, like.device))
        grads = torch.autograd.grad(out, [leaf, *one.parameters()], dy.to(like))
        return dict(zip(("out", "x", *dict(one.named_parameters())), (out.detach(), *grads), strict=True))

    host = copy.deepcopy(layer).cpu()
    chain = results(x, host, host)
    truth = results(x.double(), host.double(), host)
    eager = results(x.cuda(), layer, layer)
    recomputed = results(x.cuda(), lambda *inputs: checkpoint(layer, *inputs, use_reentrant=False), layer)
    compiled = results(x.cuda(), torch.compile(layer, fullgraph=True), layer)
    for name, exact in truth.items():
        assert torch.equal(recomputed[name], eager[name]), name
        # Torch's chain in bf16 rounds the gated norm more often than ours, and attention less: the walks round their operands.
        assert max(relative(eager[name], exact), relative(compiled[name], exact)) < 1.1 * relative(chain[name], exact), name


def test_decoding_continues_a_prefill() -> None:
    tested = model().cuda().eval()
    engine = EmbeddedEngine(tested)
    prompts = [tuple(torch.randint(0, 300, (length,)).tolist()) for length in (1, 5, 64, 65, 130)]
    params = SamplingParams(max_new_tokens=8, temperature=0.0, stop_token_ids=())
    outputs = engine.generate([RolloutRequest(str(n), prompt, params) for n, prompt in enumerate(prompts)])
    for prompt, output in zip(prompts, outputs, strict=True):
        whole = torch.tensor([[*prompt, *output.token_ids]], device="cuda")
        layout = SequenceLayout.from_lengths([whole.shape[1]], "cuda")
        with torch.no_grad():
            logprobs = tested.token_logprobs(whole, layout)[len(prompt) :].cpu()
        assert (logprobs - torch.tensor(output.logprobs)).abs().max() < 0.02


def test_a_packed_document_is_what_it_is_alone_in_bf16() -> None:
    tested = model().cuda().bfloat16()
    tokens = torch.randint(0, 300, (1, sum(LENGTHS)), device="cuda")
    with torch.no_grad():
        packed = tested.token_logprobs(tokens, SequenceLayout.from_lengths(LENGTHS, "cuda"))
        start = 0
        for length in LENGTHS:
            part = tokens[:, start : start + length]
            alone = tested.token_logprobs(part, SequenceLayout.from_lengths([length], "cuda")) if length else packed[:0]
            # Products of other shapes round differently; a leak of state would show in the first digit.
            torch.testing.assert_close(packed[start : start + length], alone, rtol=0.0, atol=0.15)
            start += length

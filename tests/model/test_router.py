"""The router: balance losses in both forms, load, and given routes replayed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.models.minimax.modeling_minimax import load_balancing_loss_func

from posttrain.data.layout import SequenceLayout
from posttrain.model.router import (
    FREE,
    check_routes,
    choose,
    pack_routes,
    paper_balance_loss,
    router_load,
    transformers_balance_loss,
)
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.types import RolloutRequest, SamplingParams
from tests.model.small import packed, random_tokens, small_model

DOCUMENTS = [random_tokens(17), random_tokens(1), random_tokens(64)]


def drawn(layers: int = 3, tokens: int = 50, experts: int = 8, top_k: int = 2) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Logits of every layer and the routes that they choose, fp64."""
    torch.manual_seed(0)
    logits = [torch.randn(tokens, experts, dtype=torch.float64, requires_grad=True) for _ in range(layers)]
    return logits, torch.stack([choose(scores, top_k)[1] for scores in logits], dim=1)


def test_the_papers_balance_loss_is_its_formula() -> None:
    logits, routes = drawn()
    expected = torch.zeros((), dtype=torch.float64)
    for layer, scores in enumerate(logits):
        probabilities = scores.softmax(-1)
        for expert in range(8):
            taken = sum(expert in row for row in routes[:, layer].tolist()) / 50
            expected = expected + taken * probabilities[:, expert].mean() / 8 / 3
    loss = paper_balance_loss(router_load(logits, routes))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for ours, truth in zip(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-15)


def test_transformers_balance_loss_is_that_of_transformers() -> None:
    logits, routes = drawn()
    loss = transformers_balance_loss(router_load(logits, routes))
    expected = load_balancing_loss_func(tuple(logits), 8, 2)
    # Their sums run in fp32.
    torch.testing.assert_close(loss, expected.double(), rtol=1e-6, atol=0)
    for ours, truth in zip(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-9)


def test_the_two_forms_differ_by_the_square_of_the_number_of_experts() -> None:
    """Exactly so in one layer: 1,024 for the released 32 experts."""
    load = router_load(*drawn(layers=1, experts=32))
    assert float((transformers_balance_loss(load) / paper_balance_loss(load)).detach()) == pytest.approx(1024, rel=1e-12)
    even = router_load([torch.zeros(32, 32)], torch.stack([torch.arange(32), torch.arange(32).roll(1)], dim=1)[:, None])
    assert transformers_balance_loss(even).item() == pytest.approx(2.0)
    assert paper_balance_loss(even).item() == pytest.approx(2 / 32**2)


def test_load_counts_pairs_and_measures_entropy() -> None:
    logits, routes = drawn()
    load = router_load(logits, routes)
    assert load.counts.shape == (3, 8) and load.counts.sum(dim=1).tolist() == [100, 100, 100]
    torch.testing.assert_close(load.fraction.sum(dim=1), torch.full((3,), 2.0, dtype=torch.float64))
    for layer, scores in enumerate(logits):
        expected = torch.distributions.Categorical(logits=scores.detach()).entropy().mean()
        torch.testing.assert_close(load.entropy[layer], expected)
    nothing = router_load([torch.zeros(0, 8)] * 2, torch.zeros(0, 2, 2, dtype=torch.int16))
    assert not nothing.counts.any() and paper_balance_loss(nothing) == 0 and transformers_balance_loss(nothing) == 0


@pytest.mark.parametrize("left", [True, False])
def test_padding_is_not_counted(left: bool) -> None:
    model = small_model(dtype=torch.float64)
    tokens, layout = packed(*DOCUMENTS)
    padded = torch.zeros(3, 64, dtype=torch.int64)
    mask = torch.zeros_like(padded)
    for row, document in enumerate(DOCUMENTS):
        place = slice(64 - len(document), 64) if left else slice(0, len(document))
        padded[row, place], mask[row, place] = document, 1
    one = model(tokens, layout=layout, output_router_logits=True, output_router_load=True)
    two = model(padded, attention_mask=mask, output_router_logits=True, output_router_load=True)
    assert torch.equal(one.router_load.counts, two.router_load.counts)
    torch.testing.assert_close(one.aux_loss, two.aux_loss)
    assert {scores.shape for scores in two.router_logits} == {(3 * 64, 4)}
    # As transformers' trainers compute it from the padded logits.
    expected = load_balancing_loss_func(two.router_logits, 4, 2, mask)
    torch.testing.assert_close(two.aux_loss, expected.double(), rtol=1e-6, atol=0)


def test_the_configurations_fields_switch_the_auxiliary_loss_on() -> None:
    tokens, layout = packed(*DOCUMENTS)
    plain, weighed = small_model(), small_model(output_router_logits=True, router_aux_loss_coef=0.5)
    without, with_it = plain(tokens, labels=tokens, layout=layout), weighed(tokens, labels=tokens, layout=layout)
    assert without.aux_loss is None
    torch.testing.assert_close(with_it.loss, without.loss + 0.5 * with_it.aux_loss)
    with_it.aux_loss.backward()
    gate = weighed.get_parameter("model.layers.1.block_sparse_moe.gate.weight")
    assert gate.grad is not None and gate.grad.any()
    # Asked for without a coefficient, it is given and not added.
    asked = plain(tokens, labels=tokens, layout=layout, output_router_logits=True)
    assert asked.aux_loss is not None and torch.equal(asked.loss, without.loss)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_own_routes_replayed_give_the_same_loss_and_gradients(checkpointing: bool) -> None:
    model = small_model(dtype=torch.float64)
    if checkpointing:
        model.gradient_checkpointing_enable()
    tokens, layout = packed(*DOCUMENTS)
    gradients, losses = [], []
    routes = None
    for _ in range(2):
        output = model(tokens, labels=tokens, layout=layout, output_routes=True, routes=routes)
        model.zero_grad()
        output.loss.backward()
        losses.append(output.loss.detach())
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        routes = output.routes.flip(-1)  # in another order, which changes nothing but roundings
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_other_routes_are_followed_and_still_train_the_gate() -> None:
    model = small_model(dtype=torch.float64)
    tokens, layout = packed(*DOCUMENTS)
    own = model(tokens, layout=layout, output_routes=True)
    given = torch.stack([(own.routes[..., 0] + 1) % 4, (own.routes[..., 0] + 2) % 4], dim=-1)
    output = model(tokens, labels=tokens, layout=layout, output_routes=True, routes=given)
    assert torch.equal(output.routes, given)
    output.loss.backward()
    gates = [parameter for name, parameter in model.named_parameters() if name.endswith("moe.gate.weight")]
    assert len(gates) == 3 and all(gate.grad is not None and gate.grad.any() for gate in gates)
    # The share of a given expert is the softmax over the given ones alone.
    logits = torch.randn(5, 4, dtype=torch.float64)
    weights, routes = choose(logits, 2, torch.tensor([[0, 3]] * 5, dtype=torch.int16))
    torch.testing.assert_close(weights, logits[:, [0, 3]].softmax(-1))
    assert routes.dtype == torch.int64


def test_an_engines_routes_are_replayed_in_training() -> None:
    model = small_model(dtype=torch.float64).eval()
    engine = EmbeddedEngine(model, return_routes=True)
    requests = [RolloutRequest(str(n), tuple(d.tolist()), SamplingParams(9, seed=n)) for n, d in enumerate(DOCUMENTS)]
    outputs = engine.generate(requests)
    texts = [torch.tensor([*r.prompt_ids, *o.token_ids]) for r, o in zip(requests, outputs, strict=True)]
    tokens, layout = packed(*texts)
    routes = pack_routes([output.routed_experts for output in outputs], layout)
    assert routes.dtype == torch.int16 and int((routes == FREE).all(dim=2).all(dim=1).sum()) == len(texts)
    replayed = model(tokens, layout=layout, routes=routes, return_token_logprobs=True, output_routes=True)
    own = model(tokens, layout=layout, return_token_logprobs=True, output_routes=True)
    torch.testing.assert_close(replayed.token_logprobs, own.token_logprobs, rtol=0, atol=1e-10)
    assert torch.equal(replayed.routes.sort(-1).values, own.routes.sort(-1).values)


def test_pieces_that_do_not_fit_their_documents_are_refused() -> None:
    layout = SequenceLayout.from_lengths([3, 2])
    piece = np.zeros((2, 1, 1), dtype=np.int16)
    assert pack_routes([piece, None], layout).flatten().tolist() == [0, 0, FREE, FREE, FREE]
    cases: list[tuple[list[np.ndarray | None], str]] = [
        ([piece], "1 pieces"),
        ([piece[:1], None], "has 3 tokens"),
        ([None, None], "no document"),
    ]
    for pieces, message in cases:
        with pytest.raises(ValueError, match=message):
            pack_routes(pieces, layout)


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        ([[[0, 1]], [[2, 4]]], r"in 0\.\.3, found 0\.\.4"),
        ([[[0, 1]], [[-2, 3]]], r"in 0\.\.3, found -2\.\.3"),
        ([[[0, 1]], [[3, 3]]], "one expert twice: token 1, layer 0"),
        ([[[0, 1]], [[3, -1]]], "in all layers or in none"),
        ([[[0, 1]]], "must be"),
        ([[[0.0, 1.0]], [[2.0, 3.0]]], "integers"),
    ],
)
def test_routes_that_name_no_two_experts_are_refused(routes: list[list[list[float]]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_routes(torch.tensor(routes), tokens=2, layers=1, experts=4, top_k=2, device=torch.device("cpu"))

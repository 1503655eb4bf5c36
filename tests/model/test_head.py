"""The head: log-probabilities in chunks, their gradients, and the losses made of them."""

from __future__ import annotations

import pytest
import torch

from posttrain.data.layout import SequenceLayout
from posttrain.model import head
from posttrain.model.head import LMHead
from tests.model.small import packed, random_tokens, small_model

CHUNKS = [1, 4, 5, 11, 12, 13, 2048]  # of 12 tokens: one by one, with and without a rest, exactly all, more than all


def small_head(dtype: torch.dtype = torch.float64) -> LMHead:
    made = LMHead(6, 9)
    with torch.no_grad():
        made.weight.normal_()
    return made.to(dtype)


def plain(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    return (logits / temperature).log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_chunks_give_the_log_softmax_and_its_gradients(chunk: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_TOKENS", chunk)
    made, hidden = small_head(), torch.randn(12, 6, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.randint(9, (12,)), torch.randn(12, dtype=torch.float64)
    expected = plain(hidden @ made.weight.T, targets, temperature)
    truth = torch.autograd.grad((expected * weights).sum(), [hidden, made.weight])
    got = made(hidden, targets, temperature)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad((got * weights).sum(), [hidden, made.weight]), truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("temperature", [0.3, 1.7])
@pytest.mark.parametrize("parts", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_entropy_is_that_of_the_distribution(
    chunk: int, temperature: float, parts: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, beside the log-probabilities, and as a value that nothing is trained on."""
    monkeypatch.setattr(head, "CHUNK_TOKENS", chunk)
    made, hidden = small_head(), torch.randn(12, 6, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.randint(9, (12,)), torch.randn(2, 12, dtype=torch.float64)
    full = hidden @ made.weight.T
    expected = (plain(full, targets, temperature), torch.distributions.Categorical(logits=full / temperature).entropy())
    got = made(hidden, targets, temperature, with_entropy=True)
    gradients = []
    for pair in (expected, got):
        loss = sum(part * (value * weight).sum() for part, value, weight in zip(parts, pair, weights, strict=True) if part)
        gradients.append(torch.autograd.grad(loss, [hidden, made.weight]))
    for ours, truth in zip((*got, *gradients[1]), (*expected, *gradients[0]), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-11)


def test_a_frozen_head_passes_gradients_on() -> None:
    made, hidden = small_head().requires_grad_(False), torch.randn(12, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(9, (12,))
    (ours,) = torch.autograd.grad(made(hidden, targets).sum(), hidden)
    (truth,) = torch.autograd.grad(plain(hidden @ made.weight.T, targets, 1.0).sum(), hidden)
    torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("chunk", [2, 2048])
def test_gradients_agree_with_finite_differences(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_TOKENS", chunk)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 6, 3, 3, 1])
    assert torch.autograd.gradcheck(lambda h, w: head._ChunkedLogprobs.apply(h, w, targets, 1.3, True), (hidden, weight))


def test_no_token_at_all() -> None:
    made = small_head()
    assert made(torch.zeros(0, 6, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)).shape == (0,)
    assert made(torch.zeros(0, 6, dtype=torch.float64)).shape == (0, 9)


def test_large_logits_stay_finite() -> None:
    made = small_head(torch.float32)
    hidden = torch.randn(4, 6).mul(1e4).requires_grad_()
    logprobs = made(hidden, torch.arange(4))
    logprobs.sum().backward()
    assert logprobs.isfinite().all() and hidden.grad is not None and hidden.grad.isfinite().all()


def test_the_head_of_a_bf16_model_computes_in_fp32() -> None:
    made = small_head(torch.bfloat16)
    hidden = torch.randn(12, 6, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(9, (12,))
    logits = made(hidden)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, hidden.float() @ made.weight.float().T)
    got = made(hidden, targets)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, plain(logits, targets, 1.0), rtol=1e-6, atol=1e-6)
    got.sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
    assert made.weight.grad is not None and made.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_token_logprobs_are_those_of_each_token_after_its_predecessors(temperature: float) -> None:
    model = small_model(dtype=torch.float64)
    tokens, layout = packed(random_tokens(5), random_tokens(1), random_tokens(0), random_tokens(17), random_tokens(2))
    with torch.no_grad():
        logits = model(tokens, layout=layout).logits[0]
        got = model.token_logprobs(tokens, layout, temperature)
    offset = 0
    for length in layout.lengths:
        assert not got[offset : offset + 1].any()
        for t in range(offset + 1, offset + length):
            expected = (logits[t - 1] / temperature).log_softmax(-1)[tokens[0, t]]
            torch.testing.assert_close(got[t], expected, rtol=1e-12, atol=1e-12)
        offset += length


def test_labels_count_where_they_are_set_and_never_at_a_first_token() -> None:
    model = small_model(dtype=torch.float64)
    tokens, layout = packed(random_tokens(6), random_tokens(1), random_tokens(9))
    labels = tokens.clone()
    labels[0, :3] = -100
    labels[0, 9] = -100
    logprobs = model.token_logprobs(tokens, layout)
    counted = [t for t in range(16) if labels[0, t] != -100 and t not in (0, 6, 7)]
    loss = model(tokens, labels=labels, layout=layout).loss
    torch.testing.assert_close(loss, -logprobs[counted].mean())
    torch.testing.assert_close(
        model(tokens, labels=labels, layout=layout, num_items_in_batch=64).loss, -logprobs[counted].sum() / 64
    )


@pytest.mark.parametrize("left", [True, False])
def test_the_loss_of_padded_rows_is_that_of_transformers(left: bool) -> None:
    """Cross-entropy of logits against labels moved on by one, padding left out: what HF models give."""
    model = small_model(dtype=torch.float64)
    documents = [random_tokens(5), random_tokens(11), random_tokens(8)]
    tokens = torch.zeros(3, 11, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, document in enumerate(documents):
        place = slice(11 - len(document), 11) if left else slice(0, len(document))
        tokens[row, place], mask[row, place] = document, 1
    labels = tokens.masked_fill(mask == 0, -100)
    output = model.eval()(tokens, attention_mask=mask, labels=labels)
    shifted = labels[:, 1:].clone()
    shifted[(mask[:, :-1] == 0)] = -100  # the first token after left padding has no predecessor
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].reshape(-1, 41), shifted.reshape(-1), ignore_index=-100)
    torch.testing.assert_close(output.loss, expected)


def test_token_entropy_is_that_of_what_each_token_was_drawn_from() -> None:
    model = small_model(dtype=torch.float64)
    tokens, layout = packed(random_tokens(5), random_tokens(1), random_tokens(17))
    with torch.no_grad():
        logits = model(tokens, layout=layout).logits[0] / 0.7
        got = model(tokens, layout=layout, return_token_entropy=True, temperature=0.7)
    expected = torch.distributions.Categorical(logits=logits).entropy().roll(1)
    expected[layout.position_ids == 0] = 0
    torch.testing.assert_close(got.token_entropy, expected)
    assert torch.equal(got.token_logprobs, model.token_logprobs(tokens, layout, 0.7))


def test_a_label_is_the_target_whatever_the_token() -> None:
    model = small_model(dtype=torch.float64)
    tokens = random_tokens(9)[None]
    labels = random_tokens(9, seed=5)[None]
    expected = torch.nn.functional.cross_entropy(model(tokens).logits[0, :-1], labels[0, 1:])
    torch.testing.assert_close(model(tokens, labels=labels).loss, expected)
    with pytest.raises(ValueError, match="labels must be"):
        model(tokens, labels=labels[:, 1:])


def test_logits_come_with_a_loss_in_evaluation_only() -> None:
    model, tokens = small_model(), random_tokens(9)[None]
    assert model(tokens, labels=tokens).logits is None
    assert model.eval()(tokens, labels=tokens).logits.shape == (1, 9, 41)


def test_labels_that_count_nowhere_give_a_loss_of_zero() -> None:
    model = small_model()
    tokens, layout = packed(random_tokens(6))
    loss = model(tokens, labels=torch.full_like(tokens, -100), layout=layout).loss
    assert loss == 0
    loss.backward()


def test_both_loss_and_logprobs_when_both_are_asked_for() -> None:
    model = small_model()
    tokens = random_tokens(6)[None]
    layout = SequenceLayout.from_lengths([6])
    output = model(tokens, labels=tokens, layout=layout, return_token_logprobs=True)
    torch.testing.assert_close(output.loss, -output.token_logprobs.sum() / 5)
    assert output.logits is None

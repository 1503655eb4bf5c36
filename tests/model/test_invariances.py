"""How documents lie in a batch changes nothing: packed, padded, cached, in chunks, beside others or alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.layout import SequenceLayout
from posttrain.kernels.lightning import plan as chunk_plan_module
from posttrain.model.attention import LightningAttention
from posttrain.model.cache import HybridCache
from posttrain.model.layers import Float32Linear
from posttrain.model.modeling import MiniMaxText01ForCausalLM, MiniMaxText01ForSequenceClassification
from tests.model.small import packed, random_tokens, small_config, small_model

LENGTHS = [0, 1, 2, 15, 16, 17, 63, 64, 65, 130]
MODEL = small_model(dtype=torch.float64)
CONFIG = MODEL.config


def same(ours: torch.Tensor, truth: torch.Tensor) -> None:
    """Equal up to the roundings of fp64."""
    torch.testing.assert_close(ours, truth, rtol=0.0, atol=1e-10)


@torch.no_grad()
def alone(document: torch.Tensor, model: MiniMaxText01ForCausalLM = MODEL) -> torch.Tensor:
    """Logits [T, V] of a document that nothing accompanies."""
    if not len(document):
        return torch.zeros(0, CONFIG.vocab_size, dtype=torch.float64)
    return model(document[None]).logits[0]


def texts(lengths: list[int]) -> list[torch.Tensor]:
    return [random_tokens(length, seed=place) for place, length in enumerate(lengths)]


def new_cache(rows: int, capacity: int = 256, dtype: torch.dtype = torch.float64) -> HybridCache:
    return HybridCache(CONFIG, rows, capacity, device="cpu", dtype=dtype)


def feed(cache: HybridCache, pieces: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits of one piece a row, which continues what the row has taken in."""
    layout = SequenceLayout.from_lengths([len(piece) for piece in pieces])
    with torch.no_grad():
        logits = MODEL(torch.cat(pieces)[None], layout=layout, past_key_values=cache).logits[0]
        return list(logits.split(list(layout.lengths)))


@settings(max_examples=25)
@given(st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=6).filter(any))
def test_packed_documents_are_as_alone(lengths: list[int]) -> None:
    documents = texts(lengths)
    tokens, layout = packed(*documents)
    with torch.no_grad():
        together = MODEL(tokens, layout=layout).logits[0].split(lengths)
    for document, logits in zip(documents, together, strict=True):
        same(logits, alone(document))


@pytest.mark.parametrize("length", [0, 1])
@pytest.mark.parametrize("place", range(5))
def test_documents_of_no_and_of_one_token_stand_anywhere(place: int, length: int) -> None:
    lengths = [17, 64, 3, 70]
    lengths.insert(place, length)
    documents = texts(lengths)
    tokens, layout = packed(*documents)
    with torch.no_grad():
        together = MODEL(tokens, layout=layout).logits[0].split(lengths)
    for document, logits in zip(documents, together, strict=True):
        same(logits, alone(document))


@pytest.mark.parametrize("lengths", [[0], [0, 0, 0], [0, 1, 0], [1], [1, 1, 1]])
def test_batches_of_nothing_but_documents_of_no_and_of_one_token(lengths: list[int]) -> None:
    documents = texts(lengths)
    tokens, layout = packed(*documents)
    output = MODEL(tokens, layout=layout, output_routes=True)
    same(output.logits[0], torch.cat([alone(document) for document in documents]))
    assert output.routes.shape == (sum(lengths), CONFIG.num_hidden_layers, CONFIG.num_experts_per_tok)
    output.logits.sum().backward()
    MODEL.zero_grad()


@pytest.mark.parametrize("lengths", [[5, 17, 1, 64], [0, 3], [65, 65], [1]])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_on_any_side_changes_nothing(lengths: list[int], side: str) -> None:
    width = max(lengths) + (0 if side == "left" else 3)
    documents = texts(lengths)
    # Padding with random ids: what stands there must not matter.
    tokens = torch.stack([random_tokens(width, seed=77 + row) for row in range(len(lengths))])
    mask = torch.zeros_like(tokens)
    starts = []
    for row, document in enumerate(documents):
        spare = width - len(document)
        starts.append({"left": spare, "right": 0, "both": spare // 2}[side])
        tokens[row, starts[-1] : starts[-1] + len(document)] = document
        mask[row, starts[-1] : starts[-1] + len(document)] = 1
    with torch.no_grad():
        logits = MODEL(tokens, attention_mask=mask).logits
    for row, (start, document) in enumerate(zip(starts, documents, strict=True)):
        same(logits[row, start : start + len(document)], alone(document))
    assert not logits[mask == 0].any()


def test_scores_are_read_at_the_last_token_whatever_the_padding() -> None:
    torch.manual_seed(0)
    model = MiniMaxText01ForSequenceClassification(small_config(num_labels=1)).double()
    documents = texts([5, 17, 1, 9])
    tokens, layout = packed(*documents)
    with torch.no_grad():
        scores = model(tokens, layout=layout).logits
        assert scores.shape == (4, 1)
        for row, document in enumerate(documents):
            same(scores[row], model(document[None]).logits[0])
            hidden = model.model(document[None]).last_hidden_state[0]
            same(scores[row], model.score.weight @ hidden[-1])
        for left in (True, False):
            padded = torch.zeros(4, 20, dtype=torch.int64)
            mask = torch.zeros(4, 20, dtype=torch.int64)
            for row, document in enumerate(documents):
                place = slice(20 - len(document), 20) if left else slice(0, len(document))
                padded[row, place], mask[row, place] = document, 1
            same(model(padded, attention_mask=mask).logits, scores)
    with pytest.raises(ValueError, match="without tokens"):
        model(tokens, layout=SequenceLayout.from_lengths([5, 0, 27]))


def test_token_by_token_is_as_all_at_once() -> None:
    document = random_tokens(70)
    cache = new_cache(1, capacity=70)
    steps = [feed(cache, [document[t : t + 1]])[0] for t in range(70)]
    same(torch.cat(steps), alone(document))
    assert cache.lengths == [70]


@settings(max_examples=25)
@given(st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 33, 64, 65]), min_size=1, max_size=6))
def test_a_document_in_any_pieces_is_as_whole(pieces: list[int]) -> None:
    document = random_tokens(sum(pieces))
    cache = new_cache(1, capacity=max(1, sum(pieces)))
    logits = [feed(cache, [piece])[0] for piece in document.split(pieces)]
    same(torch.cat(logits), alone(document))


@settings(max_examples=15)
@given(st.lists(st.tuples(*[st.sampled_from([0, 1, 1, 2, 17, 40])] * 3), min_size=1, max_size=4))
def test_rows_of_a_cache_do_not_know_each_other(rounds: list[tuple[int, int, int]]) -> None:
    """Each row takes pieces of its own sizes, some of them empty."""
    totals = [sum(column) for column in zip(*rounds, strict=True)]
    documents = texts(totals)
    cache = new_cache(3)
    got: list[list[torch.Tensor]] = [[], [], []]
    pieces = [document.split([sizes[row] for sizes in rounds]) for row, document in enumerate(documents)]
    for turn in range(len(rounds)):
        for row, logits in enumerate(feed(cache, [pieces[row][turn] for row in range(3)])):
            got[row].append(logits)
    assert cache.lengths == totals
    for row, document in enumerate(documents):
        same(torch.cat(got[row]), alone(document))


def test_selected_rows_go_on_as_they_would_have() -> None:
    documents = texts([20, 9, 33])
    cache = new_cache(3)
    feed(cache, [document[:-4] for document in documents])
    cache.select([2, 0, 0])
    assert cache.batch_size == 3
    chosen = [documents[2], documents[0], documents[0]]
    got = feed(cache, [document[-4:] for document in chosen])
    for logits, document in zip(got, chosen, strict=True):
        same(logits, alone(document)[-4:])
    # The two copies of one row go separate ways.
    other = (documents[0][:1] + 1) % CONFIG.vocab_size
    got = feed(cache, [documents[2][:1], documents[0][:1], other])
    same(got[1], alone(torch.cat([documents[0], documents[0][:1]]))[-1:])
    same(got[2], alone(torch.cat([documents[0], other]))[-1:])


def test_a_cache_of_another_number_of_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="2 rows, the batch 1 documents"):
        feed(new_cache(2), [random_tokens(3)])


@pytest.mark.parametrize("kinds", [[0, 1, 0], [0, 0, 0]])
def test_more_than_a_cache_holds_is_refused_before_anything_is_written(kinds: list[int]) -> None:
    model = small_model(dtype=torch.float64, attn_type_list=kinds)
    cache = HybridCache(model.config, 2, 10, device="cpu", dtype=torch.float64)
    tokens, layout = packed(random_tokens(4), random_tokens(8))
    with torch.no_grad():
        model.next_token_logits(tokens[0], layout, cache)
        before = {layer: state.clone() for layer, state in cache.states.items()}
        with pytest.raises(ValueError, match="holds 10 tokens a row, asked for 11"):
            model.next_token_logits(torch.zeros(4, dtype=torch.int64), SequenceLayout.from_lengths([1, 3]), cache)
        assert cache.lengths == [4, 8]
        assert all(torch.equal(cache.states[layer], state) for layer, state in before.items())
        model.next_token_logits(torch.zeros(8, dtype=torch.int64), SequenceLayout.from_lengths([6, 2]), cache)
    assert cache.lengths == [10, 10]


def test_next_token_logits_are_those_after_each_last_token() -> None:
    documents = texts([5, 17, 1])
    tokens, layout = packed(*documents)
    with torch.no_grad():
        logits, routes = MODEL.next_token_logits(tokens[0], layout, new_cache(3), output_routes=True)
        whole = MODEL(tokens, layout=layout, output_routes=True)
    assert routes is not None and torch.equal(routes, whole.routes) and routes.dtype == torch.int16
    same(logits, torch.stack([alone(document)[-1] for document in documents]))


@pytest.mark.parametrize("place", range(3))
def test_no_token_follows_an_empty_document(place: int) -> None:
    lengths = [5, 7]
    lengths.insert(place, 0)
    tokens, layout = packed(*texts(lengths))
    cache = new_cache(3)
    with pytest.raises(ValueError, match=f"document {place} is empty"):
        MODEL.next_token_logits(tokens[0], layout, cache)
    assert cache.lengths == [0, 0, 0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_pack_are_the_sum_of_those_alone(checkpointing: bool) -> None:
    model = small_model(dtype=torch.float64)
    documents = texts([17, 1, 0, 65, 2])
    for document in documents:
        if len(document) > 1:
            layout = SequenceLayout.from_lengths([len(document)])
            model.token_logprobs(document[None], layout, 0.8).square().sum().backward()
    summed = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    tokens, layout = packed(*documents)
    model.token_logprobs(tokens, layout, 0.8).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, summed[name], rtol=1e-9, atol=1e-9)


def test_a_cast_to_bf16_and_back_leaves_decays_and_states_in_fp32() -> None:
    model = small_model()
    probe = torch.zeros(1)
    attentions = [module for module in model.modules() if isinstance(module, LightningAttention)]
    assert len(attentions) == 2
    before = [attention.slopes(probe).clone() for attention in attentions]
    model.to(torch.bfloat16)
    document = random_tokens(12)
    cache = new_cache(1, dtype=torch.bfloat16)
    with torch.no_grad():
        for piece in document.split([7, 1, 4]):
            hidden = model.model(piece[None], past_key_values=cache).last_hidden_state
            assert hidden.dtype == torch.bfloat16
            assert model.lm_head(hidden).dtype == torch.float32
    assert {state.dtype for state in cache.states.values()} == {torch.float32}
    assert {table.dtype for table in (*cache.keys.values(), *cache.values.values())} == {torch.bfloat16}
    half = [attention.slopes(probe.bfloat16()) for attention in attentions]
    model.float()
    after = [attention.slopes(probe) for attention in attentions]
    for first, second, third in zip(before, half, after, strict=True):
        assert first.dtype == second.dtype == third.dtype == torch.float32
        assert torch.equal(first, second) and torch.equal(first, third)
    assert not any("slope" in name for name in model.state_dict())
    # Weights lost bits on the way; decays did not: the same rounded weights give the same numbers in a fresh model.
    fresh = small_model(seed=1)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(document[None]).logits, model(document[None]).logits)


@pytest.mark.parametrize("left", [True, False])
def test_gradients_of_padded_rows_are_those_of_a_pack(left: bool) -> None:
    model = small_model(dtype=torch.float64)
    documents = texts([17, 1, 65, 2])
    tokens, layout = packed(*documents)
    model(tokens, labels=tokens, layout=layout).loss.backward()
    truth = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    padded, mask = torch.zeros(4, 70, dtype=torch.int64), torch.zeros(4, 70, dtype=torch.int64)
    for row, document in enumerate(documents):
        place = slice(70 - len(document), 70) if left else slice(0, len(document))
        padded[row, place], mask[row, place] = document, 1
    model(padded, labels=padded, attention_mask=mask).loss.backward()  # labels of padding are not read
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, truth[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pieces", [[75], [70, 1, 1, 3]])
def test_autocast_leaves_router_state_and_head_in_fp32(pieces: list[int]) -> None:
    """Autocast reaches matrix products inside fp32 code too, where nobody switches it off."""
    model = small_model()
    attention, gate, head = LightningAttention(CONFIG, 0), Float32Linear(32, 4, bias=False), model.lm_head
    hidden, targets = torch.randn(75, 32, dtype=torch.bfloat16), random_tokens(75)
    qkv = torch.randn(75, 4, 24, dtype=torch.bfloat16)

    def results() -> list[torch.Tensor]:
        cache, parts = new_cache(1, dtype=torch.float32), []
        for part in qkv.split(pieces):
            parts.append(attention.attend(part, SequenceLayout.from_lengths([len(part)]), cache))
        return [torch.cat(parts), cache.states[0], gate(hidden), head(hidden), head(hidden, targets)]

    with torch.no_grad():
        truth = results()
        with torch.autocast("cpu", torch.bfloat16):
            assert (hidden @ hidden.T.float()).dtype == torch.bfloat16
            assert all(torch.equal(ours, expected) for ours, expected in zip(results(), truth, strict=True))
            # The whole model runs so, cache and all.
            cache = new_cache(1, dtype=torch.float32)
            for piece in random_tokens(75).split(pieces):
                assert model(piece[None], past_key_values=cache).logits.dtype == torch.float32
    assert {x.dtype for x in (*truth[1:], *cache.states.values(), *cache.keys.values())} == {torch.float32}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_pass_without_gradients_does_not_spoil_training_after_it(context: Callable[[], AbstractContextManager[None]]) -> None:
    """Tables remembered between calls must serve both kinds of calls."""
    chunk_plan_module._chunk_plan.cache_clear()
    model = small_model()
    tokens, layout = packed(random_tokens(77), random_tokens(19))
    with context():
        model(tokens, layout=layout)
    model.token_logprobs(tokens, SequenceLayout.from_lengths(layout.lengths)).sum().backward()
    model.token_logprobs(tokens, layout).sum().backward()

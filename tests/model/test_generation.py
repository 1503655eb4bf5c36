"""transformers' `generate` on our model and cache: greedy, sampling, beams, padding, chunks, continued conversations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from posttrain.data.layout import SequenceLayout
from posttrain.model.cache import HybridCache
from tests.model.native import largest_difference
from tests.model.small import packed, random_tokens, small_model

PAD = 40  # occurs in no prompt, or transformers would take it for padding
MODEL = small_model(dtype=torch.float64).eval()
WAYS: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": True, "num_return_sequences": 2},
    {"do_sample": True, "temperature": 0.7, "top_k": 5},
    {"num_beams": 3},
    {"num_beams": 3, "num_return_sequences": 2, "do_sample": True},
]


def prompts(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded prompts and their mask."""
    width = max(lengths)
    tokens, mask = torch.full((len(lengths), width), PAD), torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        tokens[row, width - length :] = random_tokens(length, PAD, seed=row)
        mask[row, width - length :] = 1
    return tokens, mask


def generated(tokens: torch.Tensor, mask: torch.Tensor | None = None, new: int = 12, **way: Any) -> torch.Tensor:
    """[rows, prompt + new] ids."""
    torch.manual_seed(0)
    return MODEL.generate(tokens, attention_mask=mask, max_new_tokens=new, pad_token_id=PAD, **way)


@pytest.mark.parametrize("lengths", [(9, 9), (5, 17), (1, 70)])
@pytest.mark.parametrize("way", WAYS)
def test_with_and_without_cache_the_same_is_generated(way: dict[str, Any], lengths: tuple[int, ...]) -> None:
    tokens, mask = prompts(*lengths)
    cached = generated(tokens, mask, **way)
    assert cached.shape[1] == max(lengths) + 12
    assert torch.equal(cached, generated(tokens, mask, **way, use_cache=False))


def test_without_a_mask_rows_of_one_length_are_whole() -> None:
    tokens, mask = prompts(9, 9)
    assert torch.equal(generated(tokens), generated(tokens, mask))


@pytest.mark.parametrize("way", [{"do_sample": False}, {"num_beams": 3}])
def test_a_row_of_a_padded_batch_is_generated_as_alone(way: dict[str, Any]) -> None:
    tokens, mask = prompts(5, 17, 1)
    together = generated(tokens, mask, **way)
    for row in range(3):
        alone = generated(tokens[row, mask[row].bool()][None], **way)
        assert torch.equal(together[row, 17:], alone[0, -12:])


@pytest.mark.parametrize("chunk", [1, 3, 16, 64])
def test_a_prompt_taken_in_by_chunks_is_as_whole(chunk: int) -> None:
    tokens, mask = prompts(5, 17)
    assert torch.equal(generated(tokens, mask, prefill_chunk_size=chunk), generated(tokens, mask))


def test_a_conversation_goes_on_from_its_cache() -> None:
    tokens, mask = prompts(5, 17)
    torch.manual_seed(0)
    first = MODEL.generate(tokens, attention_mask=mask, max_new_tokens=4, pad_token_id=PAD, return_dict_in_generate=True)
    more = torch.cat([first.sequences, random_tokens(6, PAD).expand(2, 6)], dim=1)
    longer = torch.cat([mask, mask.new_ones(2, 10)], dim=1)
    assert torch.equal(generated(more, longer, past_key_values=first.past_key_values), generated(more, longer))


def test_forward_continues_a_cache_with_several_tokens_of_padded_rows() -> None:
    """In transformers' conventions: the mask covers what the cache holds, padding included."""
    tokens, mask = prompts(5, 17)
    whole = MODEL(tokens, attention_mask=mask, output_hidden_states=True)
    first = MODEL(tokens[:, :14], attention_mask=mask[:, :14], use_cache=True)
    cache = first.past_key_values
    assert isinstance(cache, HybridCache) and cache.lengths == [2, 14] and cache.get_seq_length() == 14
    rest = MODEL(tokens[:, 14:], attention_mask=mask, past_key_values=cache, logits_to_keep=2, output_hidden_states=True)
    assert cache.lengths == [5, 17] and cache.get_seq_length() == 17
    torch.testing.assert_close(rest.logits, whole.logits[:, -2:], rtol=0, atol=1e-10)
    for ours, theirs in zip(rest.hidden_states, whole.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs[:, 14:], rtol=0, atol=1e-10)
    columns = torch.tensor([3, 16])
    torch.testing.assert_close(MODEL(tokens, attention_mask=mask, logits_to_keep=columns).logits, whole.logits[:, columns])


def test_outputs_index_as_those_of_transformers() -> None:
    tokens, _ = prompts(9)
    output = MODEL(tokens, labels=tokens, output_hidden_states=True)
    assert output[0] is output.loss and output[1] is output.logits and output[2] is output.hidden_states
    cached = MODEL(tokens, use_cache=True)
    assert cached[0] is cached.logits and cached[1] is cached.past_key_values
    as_tuple = MODEL(tokens, use_cache=True, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], cached.logits)
    assert MODEL(tokens).past_key_values is None
    assert len(output.hidden_states) == MODEL.config.num_hidden_layers + 1
    assert torch.equal(output.hidden_states[0], MODEL.model.embed_tokens(tokens))
    assert torch.equal(MODEL.lm_head(output.hidden_states[-1]), output.logits)


def test_embeddings_stand_for_ids() -> None:
    tokens, mask = prompts(5, 17)
    embedded = MODEL.get_input_embeddings()(tokens)
    assert torch.equal(MODEL(inputs_embeds=embedded, attention_mask=mask).logits, MODEL(tokens, attention_mask=mask).logits)
    for both in ({}, {"input_ids": tokens, "inputs_embeds": embedded}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            MODEL.model(**both)


def test_a_pass_with_a_cache_has_no_gradients_and_takes_no_labels() -> None:
    tokens, _ = prompts(9)
    assert not MODEL.model(tokens, use_cache=True).last_hidden_state.requires_grad
    with pytest.raises(ValueError, match="labels with a cache"):
        MODEL(tokens, labels=tokens, use_cache=True)


def test_a_cache_grows_where_it_may() -> None:
    tokens, _ = prompts(70)
    cache = HybridCache(MODEL.config, 1, 0, device="cpu", dtype=torch.float64, grows=True)
    with torch.no_grad():
        pieces = [MODEL(piece, past_key_values=cache).logits for piece in tokens.split([1, 2, 20, 47], dim=1)]
        assert cache.capacity >= 70
        assert largest_difference(torch.cat(pieces, dim=1), MODEL(tokens).logits) < 1e-12


def test_rows_are_repeated_and_chosen_under_transformers_names() -> None:
    tokens, layout = packed(random_tokens(9), random_tokens(4))
    cache = HybridCache(MODEL.config, 2, 16, device="cpu", dtype=torch.float64)
    with torch.no_grad():
        MODEL(tokens, layout=layout, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        assert cache.lengths == [9, 9, 4, 4]
        cache.batch_select_indices(torch.tensor([1, 2]))
        cache.reorder_cache(torch.tensor([1, 0]))
        assert cache.lengths == [4, 9]
        step = MODEL(torch.tensor([[7, 8]]), layout=SequenceLayout.from_lengths([1, 1]), past_key_values=cache).logits[0]
        for row, (document, token) in enumerate([(random_tokens(4), 7), (random_tokens(9), 8)]):
            alone = MODEL(torch.cat([document, torch.tensor([token])])[None]).logits[0, -1]
            torch.testing.assert_close(step[row], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ({"prompt_lookup_num_tokens": 2}, "assisted generation is not supported"),
        ({"assistant_model": MODEL}, "assisted generation is not supported"),
        ({"cache_implementation": "static"}, "does not hold recurrent states"),
        ({"past_key_values": DynamicCache()}, "must be a HybridCache"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions is not supported"),
    ],
)
def test_what_the_cache_cannot_do_is_refused(way: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generated(random_tokens(9, PAD)[None], **way)


def test_prompts_padded_on_the_right_are_refused() -> None:
    tokens, mask = prompts(5, 17)
    for use_cache in (True, False):
        with pytest.raises(ValueError, match="padding_side='left'"):
            generated(tokens.flip(1), mask.flip(1), use_cache=use_cache)


def test_a_cache_does_not_go_back() -> None:
    cache = HybridCache(MODEL.config, 1, 4, device="cpu", dtype=torch.float64)
    for call in (lambda: cache.crop(1), cache.activate_past_recording):
        with pytest.raises(ValueError, match="cannot be cropped"):
            call()

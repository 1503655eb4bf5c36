"""The learned level: packing changes no score, a score is read at the stop token, and every head speaks about its target."""

import copy
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from posttrain.config.errors import UserError
from posttrain.data.encode import encode_answer, encode_prompt
from posttrain.data.tokenizer import train_tokenizer
from posttrain.model.configuration import MiniMaxText01Config
from posttrain.model.modeling import MiniMaxText01ForSequenceClassification
from posttrain.reward.heads import Heads, HeadScore
from posttrain.reward.learned import LearnedLevel, batches_by_tokens
from posttrain.reward.types import Sample


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["What is 12 + 34? 46"], 300)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase) -> MiniMaxText01ForSequenceClassification:
    torch.manual_seed(0)
    config = MiniMaxText01Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        rotary_dim=8,
        attn_type_list=[0, 1],
        intermediate_size=32,
        num_local_experts=4,
        initializer_range=0.5,
        num_labels=1,
    )
    return MiniMaxText01ForSequenceClassification(config)


SAMPLES = [Sample([{"role": "user", "content": f"What is {a} + {a + 3}?" * (1 + a % 4)}], str(2 * a + 3), {}) for a in range(11)]


def test_scores_do_not_depend_on_what_is_packed_together(model, tokenizer) -> None:
    together = LearnedLevel(model, tokenizer).scores(SAMPLES)
    in_batches = LearnedLevel(model, tokenizer, batch_tokens=150).scores(SAMPLES)
    alone = [LearnedLevel(model, tokenizer).scores([sample])[0] for sample in SAMPLES]
    assert together == pytest.approx(alone, abs=1e-5)
    assert in_batches == pytest.approx(alone, abs=1e-5)
    assert len({round(score, 4) for score in alone}) == len(alone)
    assert LearnedLevel(model, tokenizer).scores([]) == []


def test_a_score_is_the_padded_model_s_score_of_prompt_answer_and_stop_token(model, tokenizer) -> None:
    sample = SAMPLES[3]
    ids = torch.tensor([encode_prompt(tokenizer, sample.prompt) + encode_answer(tokenizer, sample.answer)])
    assert ids[0, -1] == tokenizer.eos_token_id
    padded = torch.cat([ids, torch.zeros(1, 9, dtype=torch.int64)], dim=1)
    mask = (torch.arange(padded.shape[1]) < ids.shape[1]).long()[None]
    with torch.no_grad():
        expected = model(input_ids=padded, attention_mask=mask).logits.item()
    assert LearnedLevel(model, tokenizer).scores([sample])[0] == pytest.approx(expected, abs=1e-5)


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 60))
def test_batches_hold_every_document_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = batches_by_tokens(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or sum(lengths[i] for i in batch) <= budget for batch in batches)


@pytest.fixture(scope="module")
def ensemble(model: MiniMaxText01ForSequenceClassification) -> MiniMaxText01ForSequenceClassification:
    """The same trunk under two targets of three members."""
    config = copy.deepcopy(model.config)
    config.id2label = dict(enumerate(Heads(("correctness", "style"), 3).labels()))
    several = MiniMaxText01ForSequenceClassification(config)
    several.model.load_state_dict(model.model.state_dict())
    torch.nn.init.normal_(several.score.weight, generator=torch.Generator().manual_seed(1))
    return several


def test_every_head_speaks_about_its_target(ensemble, tokenizer) -> None:
    level = LearnedLevel(ensemble, tokenizer)
    assert level.heads == Heads(("correctness", "style"), 3)
    for sample, scores in zip(SAMPLES, level.dimension_scores(SAMPLES), strict=True):
        ids = torch.tensor([encode_prompt(tokenizer, sample.prompt) + encode_answer(tokenizer, sample.answer)])
        with torch.no_grad():
            logits = ensemble(input_ids=ids).logits[0].tolist()
        assert list(scores) == ["correctness", "style"]
        for target, members in (("correctness", logits[:3]), ("style", logits[3:])):
            assert scores[target].mean == pytest.approx(sum(members) / 3, abs=1e-5)
            assert scores[target].std == pytest.approx(statistics.stdev(members), abs=1e-5)
            assert scores[target].std > 0.01


def test_the_plain_score_is_the_mean_of_the_first_target(model, ensemble, tokenizer) -> None:
    scores = LearnedLevel(ensemble, tokenizer).dimension_scores(SAMPLES)
    assert LearnedLevel(ensemble, tokenizer).scores(SAMPLES) == [score["correctness"].mean for score in scores]
    one = LearnedLevel(model, tokenizer)
    assert [score["correctness"] for score in one.dimension_scores(SAMPLES)] == [HeadScore(s, 0.0) for s in one.scores(SAMPLES)]


def test_heads_that_the_configuration_does_not_name_are_refused(model, tokenizer) -> None:
    unnamed = copy.deepcopy(model)
    unnamed.config.id2label = {0: "helpful"}
    with pytest.raises(UserError, match="helpful.*id2label"):
        LearnedLevel(unnamed, tokenizer)


def test_a_budget_without_tokens_is_refused(model, tokenizer) -> None:
    with pytest.raises(ValueError, match="batch_tokens"):
        LearnedLevel(model, tokenizer, batch_tokens=0)

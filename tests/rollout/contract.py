"""What every rollout engine keeps to, whatever it runs on.

A test module of an engine makes a subclass of `EngineContract` whose name starts with Test, and says in it how to make
the engine and what its model's true numbers are.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from posttrain.rollout.types import RolloutEngine, RolloutOutput, RolloutRequest, SamplingParams

MAX_LENGTH = 4096
"""Longest prompt and answer together, of every engine here."""
PROMPTS: list[tuple[int, ...]] = [(1, 2, 3), (4,), (1, 2, 3), (7, 7, 7, 7, 7, 2), (3, 9), (5, 1, 2, 8), (4,), (9,) * 20, (2, 11)]


def request(
    name: str,
    prompt: tuple[int, ...] = (1, 2, 3),
    tokens: int = 8,
    temperature: float = 1.0,
    seed: int = 0,
    stop: tuple[int, ...] = (),
    top_p: float = 1.0,
) -> RolloutRequest:
    """A request in one line."""
    return RolloutRequest(name, prompt, SamplingParams(tokens, temperature, top_p, stop, seed))


def mixed_requests() -> list[RolloutRequest]:
    """Prompts of several lengths, some equal; several limits, temperatures, seeds and stop tokens."""
    temperatures = (1.0, 0.7, 1.3, 0.0)
    return [
        request(
            f"r{i}", PROMPTS[i % len(PROMPTS)], 1 + i * 5 % 13, temperatures[i % 4], seed=100 + i, stop=(2, 6) if i % 3 else ()
        )
        for i in range(18)
    ]


@dataclass
class Tensors:
    """A weight source of one group."""

    tensors: dict[str, torch.Tensor]
    version: int

    def groups(self) -> Iterable[list[tuple[str, torch.Tensor]]]:
        yield list(self.tensors.items())


class EngineContract:
    """The tests; the four methods at the top are the engine's own."""

    vocab_size: int
    logits_dtype = torch.float32

    def engine(self, **options: object) -> RolloutEngine:
        """A new engine of version 3 with its first weights; `return_routes` and other options as the engine has them."""
        raise NotImplementedError

    def weights(self, seed: int) -> dict[str, torch.Tensor]:
        """Tensors of other weights that fit."""
        raise NotImplementedError

    def logits(self, tokens: tuple[int, ...], weights: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        """True logits [T, V] after every token, of the first weights where none are given."""
        raise NotImplementedError

    def routes(self, tokens: tuple[int, ...]) -> np.ndarray:
        """True experts [T, layers, k], as a whole forward pass chooses them."""
        raise NotImplementedError

    def logprobs(
        self, asked: RolloutRequest, answer: tuple[int, ...], weights: dict[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """True log-probabilities of an answer's tokens at the request's temperature."""
        start = len(asked.prompt_ids)
        logits = self.logits(asked.prompt_ids + answer, weights)[start - 1 : -1] / (asked.params.temperature or 1.0)
        return logits.double().log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).squeeze(1)

    def test_it_is_an_engine(self) -> None:
        engine = self.engine()
        assert isinstance(engine, RolloutEngine)
        assert engine.logprob_semantics in ("processed", "raw")
        assert engine.weight_version == 3
        engine.close()
        engine.close()

    def test_no_request_gives_no_output(self) -> None:
        assert self.engine().generate([]) == []

    def test_outputs_come_in_the_order_of_the_requests_with_fields_of_one_length(self) -> None:
        requests = mixed_requests()
        outputs = self.engine().generate(requests)
        assert [output.request_id for output in outputs] == [asked.request_id for asked in requests]
        for asked, output in zip(requests, outputs, strict=True):
            count = len(output.token_ids)
            assert 1 <= count <= asked.params.max_new_tokens
            assert len(output.logprobs) == len(output.weight_versions) == count
            assert all(0 <= token < self.vocab_size for token in output.token_ids)
            assert all(logprob <= 0 for logprob in output.logprobs)
            assert set(output.weight_versions) == {3}
            assert output.routed_experts is None

    def test_an_answer_ends_with_its_first_stop_token_or_at_its_length(self) -> None:
        requests = [request(f"r{i}", tokens=5, seed=i, stop=(2, 6)) for i in range(60)]
        outputs = self.engine().generate(requests)
        for output in outputs:
            stops = [token in (2, 6) for token in output.token_ids]
            if output.finish_reason == "stop":
                assert stops[-1] and not any(stops[:-1])
            else:
                assert output.finish_reason == "length" and len(stops) == 5 and not any(stops)
        assert {output.finish_reason for output in outputs} == {"stop", "length"}

    def test_a_stop_token_as_the_last_that_fits_is_a_stop(self) -> None:
        free = self.engine().generate([request("r", tokens=5, temperature=0.0)])[0]
        last = free.token_ids[-1]
        cut = free.token_ids.index(last) + 1
        output = self.engine().generate([request("r", tokens=cut, temperature=0.0, stop=(last,))])[0]
        assert output.finish_reason == "stop" and output.token_ids == free.token_ids[:cut]

    def test_a_longer_limit_only_goes_on(self) -> None:
        short, long = self.engine().generate([request("a", tokens=4, seed=5), request("b", tokens=11, seed=5)])
        assert long.token_ids[:4] == short.token_ids
        assert (short.finish_reason, long.finish_reason) == ("length", "length")

    def test_the_longest_position_ends_an_answer(self) -> None:
        prompt = tuple(i % 7 for i in range(MAX_LENGTH - 3))
        output = self.engine().generate([request("r", prompt, tokens=50)])[0]
        assert len(output.token_ids) == 3 and output.finish_reason == "length"

    @pytest.mark.parametrize(
        "bad",
        [
            request("bad", prompt=()),
            request("bad", prompt=(1,) * MAX_LENGTH),
            request("bad", prompt=(1,) * (MAX_LENGTH + 5)),
            request("bad", top_p=0.9),
            request("bad", tokens=0),
            request("bad", tokens=-1),
        ],
        ids=["empty prompt", "no room", "too long", "top_p", "no tokens", "negative"],
    )
    def test_requests_that_cannot_run_are_refused_by_name(self, bad: RolloutRequest) -> None:
        engine = self.engine()
        with pytest.raises(ValueError, match="bad"):
            engine.generate([request("good"), bad])
        assert len(engine.generate([request("good")])) == 1

    def test_a_request_gives_the_same_tokens_in_any_company(self) -> None:
        requests = mixed_requests()
        together = self.engine().generate(requests)
        engine = self.engine()
        for outputs in (
            [engine.generate([asked])[0] for asked in requests],
            list(reversed(engine.generate(requests[::-1]))),
            [*engine.generate(requests[:5]), *engine.generate(requests[5:])],
        ):
            for first, second in zip(together, outputs, strict=True):
                assert first.token_ids == second.token_ids and first.finish_reason == second.finish_reason
                assert first.logprobs == pytest.approx(second.logprobs, abs=2e-5)

    def test_other_seeds_give_other_tokens_and_equal_ones_equal(self) -> None:
        outputs = self.engine().generate([request(f"r{i}", tokens=12, seed=i % 20) for i in range(40)])
        answers = [output.token_ids for output in outputs]
        assert answers[:20] == answers[20:]
        assert len(set(answers)) >= 19

    @pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
    def test_logprobs_are_the_models_own(self, temperature: float) -> None:
        requests = [request(f"r{i}", prompt, 20, temperature, seed=i) for i, prompt in enumerate(PROMPTS)]
        for asked, output in zip(requests, self.engine().generate(requests), strict=True):
            expected = self.logprobs(asked, output.token_ids)
            torch.testing.assert_close(torch.tensor(output.logprobs, dtype=torch.float64), expected, rtol=0, atol=2e-5)

    def test_temperature_zero_takes_the_likeliest_and_scores_it_at_one(self) -> None:
        requests = [request(f"r{i}", prompt, 20, 0.0, seed=i) for i, prompt in enumerate(PROMPTS)]
        for asked, output in zip(requests, self.engine().generate(requests), strict=True):
            start = len(asked.prompt_ids)
            logits = self.logits(asked.prompt_ids + output.token_ids)[start - 1 : -1]
            assert logits.argmax(-1).tolist() == list(output.token_ids)
            expected = self.logprobs(asked, output.token_ids)
            torch.testing.assert_close(torch.tensor(output.logprobs, dtype=torch.float64), expected, rtol=0, atol=2e-5)

    @pytest.mark.parametrize("temperature", [0.7, 1.3])
    def test_tokens_are_drawn_from_the_distribution(self, temperature: float) -> None:
        """Chi-square of first tokens, and of second tokens after the likeliest first one."""
        draws = 4000
        prompt = (5, 1, 2)
        outputs = self.engine().generate([request(str(i), prompt, 2, temperature, seed=i) for i in range(draws)])
        self.check_counts(outputs, prompt, temperature, 0)
        firsts = [output.token_ids[0] for output in outputs]
        likeliest = max(set(firsts), key=firsts.count)
        after = [output for output in outputs if output.token_ids[0] == likeliest]
        assert len(after) > 300
        self.check_counts(after, (*prompt, likeliest), temperature, 1)

    def check_counts(self, outputs: list[RolloutOutput], context: tuple[int, ...], temperature: float, place: int) -> None:
        """Chi-square over tokens expected at least five times, the others together; bound of 1 in 10,000 (Wilson-Hilferty)."""
        expected = (self.logits(context)[-1].double() / temperature).softmax(-1) * len(outputs)
        counts = torch.bincount(torch.tensor([output.token_ids[place] for output in outputs]), minlength=self.vocab_size).double()
        common = expected >= 5
        cells = [(counts[common], expected[common])]
        if expected[~common].sum() >= 5:
            cells.append((counts[~common].sum()[None], expected[~common].sum()[None]))
        got, wanted = (torch.cat(parts) for parts in zip(*cells, strict=True))
        freedom = len(got) - 1
        bound = freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3
        assert freedom >= 3
        assert float(((got - wanted) ** 2 / wanted).sum()) < bound

    def test_another_thread_ends_a_request_and_no_other(self) -> None:
        engine = self.engine()
        outputs: list[RolloutOutput] = []
        asked = [request("long", tokens=4000), request("short", tokens=3), request("other", (4, 4), tokens=40)]
        worker = threading.Thread(target=lambda: outputs.extend(engine.generate(asked)))
        worker.start()
        deadline = time.monotonic() + 60
        while worker.is_alive() and time.monotonic() < deadline:
            engine.cancel(["long", "unknown"])
            time.sleep(0.002)
        worker.join(timeout=60)
        long, short, other = outputs
        assert long.finish_reason == "cancelled" and 1 <= len(long.token_ids) < 4000
        assert len(long.logprobs) == len(long.weight_versions) == len(long.token_ids)
        assert (short.finish_reason, len(short.token_ids)) == ("length", 3)
        assert (other.finish_reason, len(other.token_ids)) == ("length", 40)
        again = engine.generate([request("long", tokens=30)])[0]
        assert again.token_ids[: len(long.token_ids)] == long.token_ids[:30]

    def test_a_cancel_that_comes_too_late_does_not_end_the_next_request_of_that_name(self) -> None:
        engine = self.engine()
        engine.generate([request("r", tokens=3)])
        engine.cancel(["r"])
        assert engine.generate([request("r", tokens=9)])[0].finish_reason == "length"
        with pytest.raises(ValueError, match="bad"):
            engine.generate([request("bad", tokens=0)])
        engine.cancel(["r"])
        assert engine.generate([request("r", tokens=9)])[0].finish_reason == "length"

    def test_new_weights_are_taken_over_with_their_version(self) -> None:
        engine, new = self.engine(), self.weights(seed=1)
        before = engine.generate([request("r", tokens=20)])[0]
        engine.update_weights(Tensors(new, version=8))
        assert engine.weight_version == 8
        output = engine.generate([asked := request("r", tokens=20)])[0]
        assert set(output.weight_versions) == {8}
        assert output.token_ids != before.token_ids
        expected = self.logprobs(asked, output.token_ids, new)
        torch.testing.assert_close(torch.tensor(output.logprobs, dtype=torch.float64), expected, rtol=0, atol=2e-5)

    def test_handed_in_weights_stay_the_callers(self) -> None:
        engine, new = self.engine(), {name: tensor.clone() for name, tensor in self.weights(seed=1).items()}
        engine.update_weights(Tensors(new, version=8))
        before = engine.generate([request("r", tokens=20)])
        for tensor in new.values():
            tensor.zero_()
        assert engine.generate([request("r", tokens=20)]) == before

    @pytest.mark.parametrize("damage", ["missing", "extra", "misshapen", "none at all"])
    def test_weights_that_do_not_fit_change_nothing(self, damage: str) -> None:
        engine, new = self.engine(), dict(self.weights(seed=1))
        before = engine.generate([request("r", tokens=20)])
        name = list(new)[-1]
        if damage == "missing":
            del new[name]
        elif damage == "extra":
            new["stray.weight"] = torch.zeros(3)
        elif damage == "misshapen":
            new[name] = new[name][:-1]
        else:
            new.clear()
        with pytest.raises(ValueError, match="stray.weight" if damage == "extra" else name):
            engine.update_weights(Tensors(new, version=8))
        assert engine.weight_version == 3
        assert engine.generate([request("r", tokens=20)]) == before

    def test_routed_experts_are_those_of_a_whole_pass(self) -> None:
        requests = mixed_requests()
        outputs = self.engine(return_routes=True).generate(requests)
        plain = self.engine().generate(requests)
        for asked, output, other in zip(requests, outputs, plain, strict=True):
            assert output.routed_experts is not None
            assert output.routed_experts.dtype == np.int16
            fed = asked.prompt_ids + output.token_ids[:-1]
            assert output.routed_experts.shape == (len(fed), *self.routes(fed).shape[1:])
            assert np.array_equal(np.sort(output.routed_experts, axis=-1), np.sort(self.routes(fed), axis=-1))
            assert output.token_ids == other.token_ids

"""The engine for tests keeps to the contract."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from posttrain.rollout.fake import WEIGHT, FakeEngine
from posttrain.rollout.types import RolloutEngine
from tests.rollout.contract import MAX_LENGTH, EngineContract, request


class TestFakeEngine(EngineContract):
    vocab_size = 16

    def engine(self, **options: Any) -> RolloutEngine:
        return FakeEngine(self.vocab_size, version=3, max_length=MAX_LENGTH, **options)

    def weights(self, seed: int) -> dict[str, torch.Tensor]:
        return {WEIGHT: torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)).mul(2)}

    def logits(self, tokens: tuple[int, ...], weights: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        table = torch.from_numpy(FakeEngine(self.vocab_size).table) if weights is None else weights[WEIGHT].double()
        return table[torch.tensor(tokens)]

    def routes(self, tokens: tuple[int, ...]) -> np.ndarray:
        return np.array([[[token % 2]] for token in tokens])


def test_its_table_is_spread_out_and_always_the_same() -> None:
    first, second = FakeEngine(16).table, FakeEngine(16).table
    assert np.array_equal(first, second)
    assert first.min() < -2 and first.max() > 2 and len(np.unique(first)) == 256


def test_it_remembers_that_it_was_closed() -> None:
    engine = FakeEngine()
    engine.generate([request("r")])
    assert not engine.closed
    engine.close()
    assert engine.closed

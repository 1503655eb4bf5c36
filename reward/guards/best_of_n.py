"""Over-optimisation probe: the best of n answers by the reward, judged by a gold standard, as n grows.

While the reward means something, the best of more answers is better. Where the gold curve turns down although the reward's own
goes on rising, selection has begun to exploit the reward's mistakes (Gao et al. 2022, arXiv 2210.10760).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

BOUND = 1.96
"""Standard errors of a 95 % interval; a fall beyond them is the onset."""


@dataclass(frozen=True)
class BestOfN:
    """Curves over n; every list is as long as `ns`.

    Attributes:
        ns: 1, 2, 4, ... and the number of samples a prompt.
        proxy: expected reward of the answer that the reward chooses among n.
        gold: expected gold score of that answer.
        gold_low, gold_high: the gold curve less and plus 1.96 standard errors over prompts (bootstrap).
        kl: nats between choosing the best of n and drawing one: log n - (n - 1) / n.
        onset: the first n whose gold score lies below the best one at a smaller n by more than 1.96 standard errors of
            that fall; None where there is none.
    """

    ns: tuple[int, ...]
    proxy: tuple[float, ...]
    gold: tuple[float, ...]
    gold_low: tuple[float, ...]
    gold_high: tuple[float, ...]
    kl: tuple[float, ...]
    onset: int | None

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def best_of_n(proxy: ArrayLike, gold: ArrayLike, resamples: int = 1000, seed: int = 0) -> BestOfN:
    """Unbiased estimates from N samples of each prompt.

    Args:
        proxy: reward of every sample, [prompts, N].
        gold: gold score of the same samples, [prompts, N].
        resamples: bootstrap draws of prompts, at least 2.
        seed: of the draws.

    Raises:
        ValueError: no samples, prompts with different numbers of samples, or numbers that are not finite.
    """
    proxies, golds = np.asarray(proxy, dtype=np.float64), np.asarray(gold, dtype=np.float64)
    if proxies.ndim != 2 or proxies.shape != golds.shape or not proxies.size:
        raise ValueError("every prompt needs as many samples as the others, with a reward and a gold score each")
    if not (np.isfinite(proxies).all() and np.isfinite(golds).all()):
        raise ValueError("a score is not finite")
    if resamples < 2:
        raise ValueError(f"resamples must be at least 2, got {resamples}")
    samples = proxies.shape[1]
    ns = sizes(samples)
    of_proxy = np.stack([expected_choice(proxies, proxies, n) for n in ns])
    of_gold = np.stack([expected_choice(proxies, golds, n) for n in ns])
    drawn = np.random.default_rng(seed).integers(proxies.shape[0], size=(resamples, proxies.shape[0]))
    resampled = of_gold[:, drawn].mean(axis=2)  # [sizes, resamples]
    mean, error = of_gold.mean(axis=1), resampled.std(axis=1, ddof=1)
    return BestOfN(
        ns,
        tuple(of_proxy.mean(axis=1).tolist()),
        tuple(mean.tolist()),
        tuple((mean - BOUND * error).tolist()),
        tuple((mean + BOUND * error).tolist()),
        tuple(math.log(n) - (n - 1) / n for n in ns),
        _onset(ns, mean, resampled),
    )


def sizes(samples: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to `samples`, which is always the last."""
    found = [1 << power for power in range(samples.bit_length()) if 1 << power <= samples]
    return tuple(found if found[-1] == samples else [*found, samples])


def expected_choice(proxy: Array, gold: Array, n: int) -> Array:
    """Expected gold score of the sample with the highest proxy among n drawn without replacement.

    The sample of rank r (from 1, lowest first) is the best of n in C(r - 1, n - 1) of the C(N, n) draws. Samples of equal proxy
    share their chances, as a coin decides between them.

    Args:
        proxy: [prompts, N].
        gold: [prompts, N].
        n: at most N.

    Returns:
        [prompts].
    """
    samples = proxy.shape[1]
    chance = np.array([math.comb(rank, n - 1) / math.comb(samples, n) for rank in range(samples)])
    result = np.empty(proxy.shape[0])
    for row in range(proxy.shape[0]):
        values, place, counts = np.unique(proxy[row], return_inverse=True, return_counts=True)
        ends = np.cumsum(counts)
        of_value = np.array([chance[end - count : end].sum() / count for end, count in zip(ends, counts, strict=True)])
        result[row] = (of_value[place] * gold[row]).sum()
    return result


def _onset(ns: Sequence[int], mean: Array, resampled: Array) -> int | None:
    for number in range(1, len(ns)):
        best = int(np.argmax(mean[:number]))
        # Both means are of the same prompts, so the error of their difference is what counts.
        error = float((resampled[best] - resampled[number]).std(ddof=1))
        fall = float(mean[best] - mean[number])
        if fall > BOUND * error and fall > 1e-12 * max(1.0, abs(float(mean[best]))):
            return ns[number]
    return None

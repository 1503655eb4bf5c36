"""Packed softmax attention on a GPU, in bf16 and for any lengths, against fp64 on the host."""

from __future__ import annotations

import pytest
import torch

from posttrain.data.layout import SequenceLayout
from posttrain.model.attention import _packed_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

TOLERANCE = 2 * 2.0**-8
"""Relative RMS. Likelihoods and outputs are rounded to bf16 (each at most 2^-9), and gradients pass two such products."""


@pytest.mark.parametrize("lengths", [(1,), (63, 0, 64, 65, 1, 1), (0, 0, 5), (700, 3)])
def test_agrees_with_fp64(lengths: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = [(sum(lengths), heads, 64) for heads in (8, 2, 2, 8)]
    drawn = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    results = []
    for device, kind in (("cuda", torch.bfloat16), ("cpu", torch.float64)):
        q, k, v = (part.clone().to(device, kind).requires_grad_() for part in drawn[:3])
        out = _packed_attention(q, k, v, SequenceLayout.from_lengths(lengths, torch.device(device)))
        out.backward(drawn[3].to(device, kind))
        results.append([x.detach().double().cpu() for x in (out, q.grad, k.grad, v.grad) if x is not None])
    for found, expected in zip(*results, strict=True):
        # The gradient of a document of one token is a difference of equal numbers, of size 1, in fp32.
        assert (found - expected).norm() <= TOLERANCE * expected.norm() + 2.0**-20 * expected.numel() ** 0.5

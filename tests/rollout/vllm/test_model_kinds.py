"""Kinds of checkpoints and shapes of models that the plugin takes, and what it refuses."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.config.errors import UserError
from posttrain.data.layout import SequenceLayout
from posttrain.model.config_fields import M1, TEXT_01
from tests.rollout.vllm import tiny
from tests.rollout.vllm.test_model import assert_agrees, poison

pytestmark = tiny.needs_vllm

SHAPES: dict[str, dict[str, Any]] = {
    "all lightning": {"attn_type_list": [0, 0, 0]},
    "all softmax": {"attn_type_list": [1, 1, 1]},
    "one layer": {"num_hidden_layers": 1, "attn_type_list": [0]},
    "three heads, one for keys": {"num_attention_heads": 3, "num_key_value_heads": 1},
    "odd sizes": {"vocab_size": 61, "hidden_size": 48, "intermediate_size": 20, "num_local_experts": 5, "num_experts_per_tok": 3},
    "wide heads, gains": {
        "head_dim": 32,
        "rotary_dim": 16,
        "layernorm_mlp_beta": 0.7,
        "layernorm_full_attention_beta": 1.3,
        "layernorm_linear_attention_alpha": 1.1,
        "num_hidden_layers": 4,
        "attn_type_list": [1, 0, 0, 1],
    },
}


QUICK = ("all softmax", "odd sizes")


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SHAPES])
def test_shapes(name: str, tmp_path: Path) -> None:
    changes = SHAPES[name]
    model = tiny.write_tiny(tmp_path / "tiny", seed=len(name), **changes)
    asked = tiny.mixed_prompts(12, 200, vocab_size=changes.get("vocab_size", 97))
    with tiny.tiny_engine(tmp_path / "tiny", max_num_batched_tokens=random.Random(name).choice([17, 64])) as llm:
        poison(llm)
        answers = tiny.continuations(llm, asked, 4)
    assert_agrees(model, asked, answers)


@pytest.mark.parametrize(
    ("scheme", "model_type"),
    [
        ("official", TEXT_01),
        ("native", TEXT_01),
        pytest.param("official", M1, marks=pytest.mark.slow),
        pytest.param("posttrain", M1, marks=pytest.mark.slow),
    ],
)
def test_kinds_of_checkpoints(scheme: Any, model_type: str, tmp_path: Path) -> None:
    model = tiny.write_tiny(tmp_path / "tiny", scheme=scheme, model_type=model_type, rotary_dim=16 if scheme == "native" else 8)
    asked = tiny.mixed_prompts(8, 100)
    with tiny.tiny_engine(tmp_path / "tiny") as llm:
        answers = tiny.continuations(llm, asked, 4)
    assert_agrees(model, asked, answers)


def test_another_checkpoint_in_place(tmp_path: Path) -> None:
    """A reload gives the other model, and back the first; the same weights change no bit."""
    first = tiny.write_tiny(tmp_path / "first")
    second = tiny.write_tiny(tmp_path / "second", seed=1, scheme="official")
    asked = tiny.mixed_prompts(8, 100)
    with tiny.tiny_engine(tmp_path / "first") as llm:
        before = tiny.continuations(llm, asked, 4)
        for folder, model in (("first", first), ("second", second), ("first", first)):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tmp_path / folder)})
            answers = tiny.continuations(llm, asked, 4)
            assert_agrees(model, asked, answers)
            assert (answers == before) == (folder == "first")


def test_a_tensor_without_a_place(tmp_path: Path) -> None:
    model = tiny.write_tiny(tmp_path / "tiny")
    tensors = model.state_dict() | {"model.layers.0.self_attn.bias": torch.zeros(1)}
    with tiny.tiny_engine(tmp_path / "tiny", load_format="dummy") as llm, pytest.raises(ValueError, match="self_attn.bias"):
        tiny.inner_model(llm).load_weights(iter(list(tensors.items())[::-1]))


def test_a_part_of_the_experts_is_not_the_parameter() -> None:
    """What is reported as loaded is whole: vLLM takes it for a check of the checkpoint."""
    from types import SimpleNamespace

    from posttrain.rollout.vllm.loading import load_weights

    stub: Any = SimpleNamespace(config=SimpleNamespace(num_local_experts=2))
    parameter = torch.nn.Parameter(torch.zeros(2, 3, 4))
    loader = lambda param, loaded_weight, expert, part: param.data[expert].copy_(loaded_weight)  # noqa: E731
    parameter.weight_loader = loader  # type: ignore[attr-defined]
    stub.named_parameters = lambda: [("l.experts.down_proj", parameter)]
    one = ("l.experts.0.w2.weight", torch.ones(3, 4))
    assert load_weights(stub, [one]) == set()
    assert load_weights(stub, [one, ("l.experts.1.w2.weight", torch.ones(3, 4))]) == {"l.experts.down_proj"}
    assert load_weights(stub, [("l.experts.down_proj", torch.full((2, 3, 4), 2.0))]) == {"l.experts.down_proj"}
    assert bool((parameter == 2).all())


def test_bf16_is_near_the_trainer(tmp_path: Path) -> None:
    """Other kernels round otherwise; states, router and head are fp32 on both sides. Measured: mean 0.013, this is twice that."""
    model = tiny.write_tiny(tmp_path / "tiny")
    model = model.to(torch.bfloat16)
    for layer in model.model.layers:
        layer.block_sparse_moe.gate.float()
    model.config.dtype = torch.bfloat16
    tiny.save_tiny(model, tmp_path / "bf16")
    asked = tiny.mixed_prompts(24, 200)
    with tiny.tiny_engine(tmp_path / "bf16", dtype="bfloat16") as llm:
        inner = tiny.inner_model(llm)
        assert inner.lm_head.weight.dtype == inner.model.layers[0].block_sparse_moe.gate.weight.dtype == torch.float32
        assert inner.model.layers[0].self_attn.attn.kv_cache[0].dtype == torch.float32
        answers = tiny.continuations(llm, asked, 8)
    differences = [
        (tiny.score(model, prompt, chosen) - torch.tensor(logprobs)).abs()
        for prompt, (chosen, logprobs) in zip(asked, answers, strict=True)
    ]
    assert torch.cat(differences).mean() < 0.026


def test_experts_are_shown(tmp_path: Path) -> None:
    """What `SparseMoe.record` is told, layer by layer, are the experts that the trainer's model takes."""
    from posttrain.rollout.vllm.experts import SparseMoe

    model = tiny.write_tiny(tmp_path / "tiny")
    prompt = tiny.mixed_prompts(4, 250, seed=4)[3]
    seen: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: []}
    with tiny.tiny_engine(tmp_path / "tiny", max_num_batched_tokens=64) as llm:
        for module in tiny.inner_model(llm).modules():
            if isinstance(module, SparseMoe):
                module.record = lambda layer, routes: seen[layer].append(routes.clone())
        tiny.continuations(llm, [prompt], 1)
    found = torch.stack([torch.cat(seen[layer]) for layer in range(3)], dim=1).sort(dim=-1).values
    with torch.no_grad():
        wanted = model(torch.tensor([prompt]), layout=SequenceLayout.from_lengths([len(prompt)]), output_routes=True).routes
    # Two experts of near-equal score may change places under other roundings; in one of 750 choices at most.
    assert (found != wanted.sort(dim=-1).values).any(dim=-1).sum() <= 1


@pytest.mark.parametrize("scheme", ["official", pytest.param("posttrain", marks=pytest.mark.slow)])
def test_experts_of_vllm(scheme: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU takes, in vLLM's own kernels for CPUs: names, loaders, router. Their sizes are multiples of 32."""
    from types import SimpleNamespace

    from posttrain.rollout.vllm import experts

    model = tiny.write_tiny(tmp_path / "tiny", scheme=scheme, intermediate_size=64)
    monkeypatch.setattr(experts, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    asked = tiny.mixed_prompts(12, 100)
    with tiny.tiny_engine(tmp_path / "tiny") as llm:
        assert not tiny.inner_model(llm).model.layers[0].block_sparse_moe.on_host
        answers = tiny.continuations(llm, asked, 4)
    assert_agrees(model, asked, answers)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"enable_expert_parallel": True}, "expert parallelism runs on GPUs only"),
        ({"quantization": "fp8_per_tensor", "dtype": "bfloat16"}, "quantised experts run on GPUs only"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}}, "takes tokens back"),
    ],
)
def test_what_a_cpu_cannot_do_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    tiny.write_tiny(tmp_path / "tiny")
    with pytest.raises(UserError, match=said), tiny.tiny_engine(tmp_path / "tiny", **changes):
        pass
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def test_a_refused_version_registers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.rollout.vllm import plugin, versions

    plugin.register()
    plugin.register()  # vLLM may call it often
    monkeypatch.setattr(versions, "installed", lambda: "0.24.0")
    with pytest.raises(UserError, match="vLLM 0.24.0 does not run posttrain's model"):
        plugin.register()
    monkeypatch.setattr(versions, "installed", lambda: None)
    with pytest.raises(UserError, match="vLLM is not installed"):
        versions.check()


def test_versions(caplog: pytest.LogCaptureFixture) -> None:
    from posttrain.rollout.vllm import versions

    with caplog.at_level(logging.WARNING):
        for tested in (*versions.TESTED, "0.32.0+cpu", None):
            versions.check(tested)
        assert not caplog.records
        versions.check("0.33.1")
        assert "was tested on vLLM 0.26.0 and 0.32.0, not on 0.33.1" in caplog.text
    for old in ("0.23.0", "0.25.1"):
        with pytest.raises(UserError, match=f"vLLM {old} does not run"):
            versions.check(old)


def test_the_pool_is_seen_as_dense() -> None:
    """Pages that are a whole number of states need no copy; others are refused."""
    pytest.importorskip("vllm")
    from posttrain.rollout.vllm.lightning import _dense

    memory = torch.arange(6 * 2 * 2 * 3, dtype=torch.float32)  # three pages of six 2 x 2 states of one head
    strided = memory.as_strided((3, 1, 2, 2), (24, 4, 2, 1))
    slots = torch.tensor([2, -1, 0], dtype=torch.int32)
    pool, places = _dense(strided, slots)
    assert pool.is_contiguous() and places.tolist() == [12, -1, 0]
    assert torch.equal(pool[12], strided[2])
    dense = torch.zeros(3, 1, 2, 2)
    assert _dense(dense, slots)[0] is dense
    with pytest.raises(ValueError, match="no multiple of the 4"):
        _dense(memory.as_strided((3, 1, 2, 2), (22, 4, 2, 1)), slots)


@pytest.mark.parametrize("pages", [1, 3])
def test_the_way_of_gpus_is_that_of_cpus(pages: int) -> None:
    """The operators that a GPU runs, on a CPU: decodes with padded rows beside prefills, states in one dense pool."""
    from posttrain.rollout.vllm.lightning import LightningMetadata, _on_gpu, _on_host

    heads, width, lengths = 2, 8, [5, 1, 70]
    tokens = 3 + sum(lengths)
    q, k, v = torch.randn(3, tokens, heads, width).unbind()
    slopes = torch.tensor([0.5, 0.02])
    step = LightningMetadata(
        num_decodes=4,  # the last without a token
        num_decode_tokens=3,
        num_tokens=tokens,
        lengths=lengths,
        query_start_loc=torch.tensor([0, 1, 2, 3, 3, 8, 9, 79], dtype=torch.int32),
        slots=torch.tensor([4, -1, 2, -1, 1, 7, 5], dtype=torch.int32),
    )
    size = heads * width * width
    memory = torch.randn(8 * pages * size)
    found = []
    for way in (_on_host, _on_gpu):
        states = memory.clone().as_strided((8, heads, width, width), (pages * size, width * width, width, 1))
        out = torch.zeros(tokens, heads, width)
        way(q, k, v, slopes, states, step, out)
        found.append((out[[0, 2, *range(3, tokens)]], states[1:]))  # page 0 is nobody's
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)

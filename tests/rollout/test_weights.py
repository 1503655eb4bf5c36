"""Weights on their way: what a source gives, what a checksum sees, and that nothing damaged or misfitting is taken."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from posttrain.config.errors import UserError
from posttrain.model.naming import SCHEMES, Scheme, pieces
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.types import WeightSource
from posttrain.rollout.weights import store
from posttrain.rollout.weights.checksums import _WORDS, ALGORITHMS, Algorithm, checksum
from posttrain.rollout.weights.manifest import Manifest, TensorRecord, WeightsRefused, checkpoint_shapes
from posttrain.rollout.weights.sink import EngineUnusable, WeightSink, deliver
from posttrain.rollout.weights.source import CheckpointSource, ModelSource
from posttrain.rollout.weights.store import StoredWeights, publish
from tests.model.schemes import same_bits, write_official
from tests.model.small import small_model

ROOT = Path(__file__).parents[2]


def collected(source: WeightSource) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for group in source.groups() for name, tensor in group}


def published(root: Path, **changes: Any) -> StoredWeights:
    return publish(ModelSource(small_model(**changes), version=5), root)


def rewrite(path: Path, data: bytes) -> None:
    """Change a published file, which is read-only."""
    path.chmod(0o600)
    path.write_bytes(data)


# Checksums


def test_sha256_is_the_known_one() -> None:
    abc = torch.tensor(list(b"abc"), dtype=torch.uint8)
    assert checksum(abc, "sha256") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_sum64_is_what_it_says_in_plain_integers() -> None:
    mask = 2**64 - 1

    def key(place: int, stream: int) -> int:
        x = (place + (stream << 32)) * 0x9E3779B97F4A7C15 & mask
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        return (x ^ x >> 31) | 1

    for count in (0, 1, 2, 3, 4, 5, 17, 63):
        data = torch.randint(0, 256, (count,), dtype=torch.uint8)
        padded = bytes(data.tolist()) + b"\0" * (-count % 4)
        words = [int.from_bytes(padded[i : i + 4], "little", signed=True) for i in range(0, len(padded), 4)]
        expected = sum(word * key(i, 0) for i, word in enumerate(words)) * key(0, 1) & mask
        assert checksum(data, "sum64") == f"{expected:016x}"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_any_flipped_bit_is_seen_and_layout_in_memory_is_not(algorithm: Algorithm, dtype: torch.dtype) -> None:
    tensor = torch.randint(-99, 99, (7, 9)).to(dtype)
    before = checksum(tensor, algorithm)
    assert checksum(tensor.T.contiguous().T, algorithm) == before == checksum(tensor[None, :, :, None], algorithm)
    flat = tensor.view(-1).view(torch.uint8)
    for place in range(len(flat)):
        for bit in range(8):
            flat[place] ^= 1 << bit
            assert checksum(tensor, algorithm) != before
            flat[place] ^= 1 << bit
    assert checksum(tensor, algorithm) == before


def test_sum64_sees_words_and_blocks_in_another_place() -> None:
    words = torch.arange(2 * _WORDS + 3, dtype=torch.int32)
    before = checksum(words, "sum64")
    assert checksum(torch.cat([words[_WORDS : 2 * _WORDS], words[:_WORDS], words[2 * _WORDS :]]), "sum64") != before
    swapped = words.clone()
    swapped[[0, 1]] = words[[1, 0]]
    assert checksum(swapped, "sum64") != before
    flipped = words.clone()
    flipped[-1] ^= 1
    assert checksum(flipped, "sum64") != before
    assert checksum(words.view(torch.uint8)[4:], "sum64") == checksum(words[1:].clone(), "sum64")


def test_an_unknown_checksum_is_refused() -> None:
    with pytest.raises(ValueError, match="crc"):
        checksum(torch.zeros(1), "crc")  # type: ignore[arg-type]


# Sources


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_is_given_layer_by_layer_under_any_names(scheme: Scheme) -> None:
    model = small_model()
    groups = [[name for name, _ in group] for group in ModelSource(model, 1, scheme).groups()]
    assert [len({name.split(".")[2] for name in group}) for group in groups if "layers" in group[0]] == [1, 1, 1]
    assert [group for group in groups if "layers" not in group[0]] == [
        ["model.embed_tokens.weight"],
        ["model.norm.weight"],
        ["lm_head.weight"],
    ]
    own = model.state_dict()
    given = collected(ModelSource(model, 1, scheme))
    expected = pieces({name: tuple(tensor.shape) for name, tensor in own.items()}, scheme)
    assert list(given) == [piece.name for piece in expected]
    for piece in expected:
        flat = own[piece.target].reshape(-1)[piece.start :]
        assert given[piece.name].shape == piece.shape and given[piece.name].reshape(-1).equal(flat[: given[piece.name].numel()])
    assert checkpoint_shapes(model.config.to_dict(), list(given)) == {piece.name: piece.shape for piece in expected}


def test_wrappers_are_looked_through() -> None:
    model = small_model()
    wrapper = torch.nn.Module()
    wrapper.module = torch.nn.Module()
    wrapper.module.module = model
    assert same_bits(collected(ModelSource(wrapper, 1)), model.state_dict())


def test_an_embedded_engine_takes_a_model_over() -> None:
    new = small_model(seed=1)
    engine = EmbeddedEngine(small_model())
    engine.update_weights(ModelSource(new, version=7))
    assert engine.weight_version == 7 and same_bits(engine.model.state_dict(), new.state_dict())


def test_a_checkpoint_is_given_under_the_names_of_its_files(tmp_path: Path) -> None:
    folder = write_official(tmp_path / "official")
    source = CheckpointSource(folder, version=2)
    given = collected(source)
    assert len(given) > 20 and all(".experts.gate_up_proj" not in name for name in given)
    stored = publish(source, tmp_path)
    stored.verify(checkpoint_shapes(json.loads((folder / "config.json").read_text()), list(given)))
    assert same_bits(collected(stored), given) and stored.version == 2


# Published weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_published_is_what_is_read(tmp_path: Path, scheme: Scheme, dtype: torch.dtype) -> None:
    model = small_model(dtype=dtype)
    stored = publish(ModelSource(model, 5, scheme), tmp_path)
    again = StoredWeights.open(stored.folder, stored.manifest.digest)
    again.verify(checkpoint_shapes(model.config.to_dict(), list(collected(again))))
    assert again == stored and again.version == 5
    assert again.manifest.nbytes == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert same_bits(collected(again), collected(ModelSource(model, 5, scheme)))
    assert [[name for name, _ in group] for group in again.groups()] == [
        [name for name, _ in group] for group in ModelSource(model, 5, scheme).groups()
    ]
    for _, tensor in next(iter(again.groups())):
        tensor.zero_()  # a reader's pages are its own
    again.verify()
    again.remove()
    again.remove()
    assert list(tmp_path.iterdir()) == []


def test_every_flipped_byte_of_every_file_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    stored = published(tmp_path, vocab_size=5, hidden_size=8, num_hidden_layers=1, attn_type_list=[0], intermediate_size=4)
    before, digest = collected(stored), stored.manifest.digest
    refused = 0
    for path in sorted(stored.folder.glob("*.*s*")):
        data = path.read_bytes()
        for place in range(0, len(data), 7):
            rewrite(path, data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
            try:
                read = StoredWeights.open(stored.folder, digest)
                read.verify()
            except WeightsRefused:
                refused += 1
            else:  # __metadata__ and padding of a header say nothing about tensors
                assert path.suffix == ".safetensors" and place < 8 + int.from_bytes(data[:8], "little")
                assert same_bits(collected(read), before)
        rewrite(path, data)
    StoredWeights.open(stored.folder, digest).verify()
    assert refused > 1000


@pytest.mark.parametrize("damage", ["cut short", "missing file", "swapped files", "other tensors"])
def test_damaged_files_are_refused(tmp_path: Path, damage: str) -> None:
    stored = published(tmp_path)
    first, second = sorted(stored.folder.glob("*.safetensors"))[1:3]
    if damage == "cut short":
        rewrite(first, first.read_bytes()[:-1])
    elif damage == "missing file":
        first.unlink()
    elif damage == "swapped files":
        one, two = first.read_bytes(), second.read_bytes()
        rewrite(first, two)
        rewrite(second, one)
    else:
        other = published(tmp_path, seed=3)
        rewrite(first, (other.folder / first.name).read_bytes())
    with pytest.raises(WeightsRefused, match="version 5 are damaged"):
        stored.verify()


def test_a_manifest_that_is_not_the_announced_one_is_refused(tmp_path: Path) -> None:
    stored, other = published(tmp_path), published(tmp_path, seed=1)
    with pytest.raises(WeightsRefused, match="not the one that was announced"):
        StoredWeights.open(other.folder, stored.manifest.digest)
    with pytest.raises(WeightsRefused, match="no published weights"):
        StoredWeights.open(tmp_path / "nowhere", stored.manifest.digest)
    rewrite(other.folder / store.MANIFEST, b"{}")
    with pytest.raises(WeightsRefused, match="damaged"):
        StoredWeights.open(other.folder, stored.manifest.digest)


def test_a_manifest_that_points_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    record = TensorRecord("w", "F32", (1,), "0", "../escape.safetensors")
    with pytest.raises(WeightsRefused, match="no file of its folder"):
        StoredWeights(tmp_path, Manifest(1, "sha256", (record,))).verify()


@pytest.mark.parametrize("damage", ["missing", "extra", "misshapen", "repeated", "not floating-point"])
def test_weights_that_do_not_fit_are_named(damage: str) -> None:
    shapes = {"a.weight": (2, 3), "b.weight": (4,)}
    own = {name: TensorRecord(name, "F32", shape, "0", "f") for name, shape in shapes.items()}
    records = list(own.values())
    Manifest(1, "sha256", tuple(records)).refuse_misfits(shapes)
    if damage == "missing":
        records.pop()
    elif damage == "extra":
        records.append(TensorRecord("b.weight.2", "F32", (1,), "0", "f"))
    elif damage == "misshapen":
        records[1] = TensorRecord("b.weight", "F32", (5,), "0", "f")
    elif damage == "repeated":
        records.append(records[1])
    else:
        records[1] = TensorRecord("b.weight", "I32", (4,), "0", "f")
    with pytest.raises(WeightsRefused, match=rf"weights do not fit: {damage} \['b.weight"):
        Manifest(1, "sha256", tuple(records)).refuse_misfits(shapes)


def test_a_source_is_read_to_its_end_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ZeRO-3 the other ranks wait in every gather."""
    source, given = ModelSource(small_model(), 1), []

    def groups() -> Iterator[list[tuple[str, torch.Tensor]]]:
        for group in source.groups():
            given.append(group[0][0])
            yield group

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store, "write_file", full)
    with pytest.raises(UserError, match="no room for the weights"):
        publish(SimpleNamespace(version=1, groups=groups), tmp_path)
    assert len(given) == 6 and list(tmp_path.iterdir()) == []


def test_publishing_nowhere_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be published here"):
        publish(ModelSource(small_model(), 1), tmp_path / "nowhere")


PUBLISHER = """
import os, signal, sys
from pathlib import Path
from posttrain.rollout.weights.source import ModelSource
from posttrain.rollout.weights.store import publish
from tests.model.small import small_model
publish(ModelSource(small_model(), 7), Path(sys.argv[1]))
print("published", flush=True)
sys.stdin.read()
"""


def test_what_a_killed_process_published_is_removed_by_the_next_one(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PUBLISHER, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "published\n"
        first = published(tmp_path)
        published(tmp_path)
        assert len(list(tmp_path.iterdir())) == 3  # the other one lives, and so does this one
        other.kill()
        other.wait(timeout=60)
    published(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3 and first.folder.exists()
    assert not list(tmp_path.glob("posttrain-weights-7-*"))


# Delivery


class Sink:
    """Takes everything, or refuses at a step."""

    def __init__(self, fault: str = "") -> None:
        self.fault, self.weight_version = fault, 0
        self.staged: StoredWeights | None = None
        self.calls: list[str] = []

    def stage(self, stored: StoredWeights) -> None:
        self.calls.append("stage")
        if self.fault == "stage":
            raise WeightsRefused("stage")
        self.staged = stored

    def swap(self) -> None:
        self.calls.append("swap")
        if self.fault == "swap":
            raise EngineUnusable("swap")
        assert self.staged is not None
        self.weight_version = self.staged.version

    def discard(self) -> None:
        self.calls.append("discard")
        self.staged = None


def test_no_sink_swaps_before_all_have_verified(tmp_path: Path) -> None:
    stored = published(tmp_path)
    good, bad = Sink(), Sink("stage")
    assert isinstance(good, WeightSink)
    with pytest.raises(WeightsRefused):
        deliver(stored, [good, bad])
    assert good.calls == ["stage", "discard"] and good.weight_version == 0
    lost = Sink("swap")
    with pytest.raises(EngineUnusable):
        deliver(stored, [good, lost])
    assert (good.weight_version, lost.weight_version) == (5, 0)
    deliver(stored, [both := Sink()])
    assert both.weight_version == 5

"""Broken data files and checkpoints: found before anything starts, told in one line that names file and line."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from safetensors.torch import load_file, save_file

from posttrain.cli import main
from posttrain.config.schema import ModelSection
from posttrain.data.tokenizer import train_tokenizer
from posttrain.model.loading import new_model, save_model

RUN = """\
name: mine
output_dir: {folder}/runs
model: {model}
sources:
  notes: {{kind: {kind}, path: {folder}/{file}, splits: {{train: 6, test: 4}}}}
eval: {{source: notes/test, num_prompts: 4}}
stages:
  sft: {{kind: sft, data: {{notes/train: 1.0}}, steps: 2}}
"""


def record(number: int, **changes: Any) -> dict[str, Any]:
    """A record that a verifier can check; None takes a field out."""
    whole = {"prompt": f"{number} + 1 =", "completion": str(number + 1), "verifier": "exact", "answer": str(number + 1)}
    return {name: value for name, value in {**whole, **changes}.items() if value is not None}


GOOD = [json.dumps(record(number)) for number in range(12)]


def write_run(folder: Path, content: bytes, *, file: str = "notes.jsonl", model: str = "{head_dim: 32}") -> Path:
    """A run over one data file."""
    (folder / file).write_bytes(content)
    path = folder / "run.yaml"
    path.write_text(RUN.format(folder=folder, file=file, kind=file.rsplit(".", 1)[-1], model=model))
    return path


def lines(*texts: str) -> bytes:
    return "".join(text + "\n" for text in texts).encode()


def with_line(number: int, text: str) -> bytes:
    """Good records, with one line (counted from 1) replaced."""
    return lines(*GOOD[: number - 1], text, *GOOD[number:])


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line on stderr of a command that must be refused, without `error: `."""
    status = main([*words])
    printed = capsys.readouterr()
    assert status == 2 and printed.out == ""
    assert "Traceback" not in printed.err and printed.err.count("\n") == 1 and printed.err.startswith("error: "), printed.err
    return printed.err.removeprefix("error: ").rstrip("\n")


@dataclass(frozen=True)
class Broken:
    """A broken file, the place that the line starts with (below the folder) and what it says."""

    name: str
    content: bytes
    place: str
    problem: str


BROKEN = [
    Broken("half a line", with_line(5, GOOD[4][:20]), "notes.jsonl:5: ", "invalid JSON"),
    Broken("no JSON at all", with_line(2, "prompt, completion"), "notes.jsonl:2: ", "invalid JSON"),
    Broken("the last line cut off", lines(*GOOD) + GOOD[0][:30].encode(), "notes.jsonl:13: ", "invalid JSON"),
    Broken("a list", with_line(3, "[1, 2]"), "notes.jsonl:3: ", "a list, not an object"),
    Broken("not UTF-8", with_line(4, "here").replace(b"here", b'{"text": "\xff"}'), "notes.jsonl:4: ", "not UTF-8 (byte 10)"),
    Broken("compressed", b"\x1f\x8b\x08\x00" + bytes(range(200, 240)), "notes.jsonl:1: ", "not UTF-8"),
    Broken("empty", b"", "notes.jsonl: ", "no records"),
    Broken("blank lines alone", b"\n\n \n", "notes.jsonl: ", "no records"),
    Broken(
        "unknown columns", with_line(6, '{"question": "1", "response": "2"}'), "notes.jsonl:6: ", "columns of no known format"
    ),
    Broken(
        "misspelt column",
        with_line(7, '{"prompt": "1", "completions_": "2"}'),
        "notes.jsonl:7: ",
        "did you mean 'completion'?",
    ),
    Broken(
        "a number for a prompt", with_line(8, json.dumps(record(0, prompt=[8]))), "notes.jsonl:8: ", "'prompt[0]' is a number"
    ),
    Broken(
        "unknown role",
        with_line(9, json.dumps(record(0, prompt=[{"role": "usr", "content": "x"}]))),
        "notes.jsonl:9: ",
        "did you mean 'user'?",
    ),
    Broken(
        "chosen without rejected",
        with_line(1, json.dumps({"prompt": "x", "chosen": "y"})),
        "notes.jsonl:1: ",
        "'chosen' without 'rejected'",
    ),
    Broken(
        "images", with_line(10, json.dumps({**record(0), "images": ["a.png"]})), "notes.jsonl:10: ", "the model reads text only"
    ),
]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
@pytest.mark.parametrize("command", ["plan", "run", "sft"])
def test_a_broken_data_file_is_refused_with_its_line(
    command: str, broken: Broken, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path, broken.content)
    line = refused(capsys, command, str(path))
    assert line.startswith(f"{tmp_path}/{broken.place}") and broken.problem in line, line
    assert not (tmp_path / "runs").exists(), "something was started"


@pytest.mark.parametrize(
    ("rows", "place", "problem"),
    [
        ([record(n) for n in range(4)], "sources.notes.splits.train", "split 'train' asks for 6 records"),
        ([record(n) for n in range(9)], "sources.notes.splits.test", "split 'test' asks for 4 records"),
        ([record(n % 9) for n in range(90)], "sources.notes.splits.test", "only 3 with distinct prompts after the 6"),
        ([record(n, verifier=None) for n in range(12)], "notes/test", "4 of 4 records have no 'verifier'"),
        ([{"text": str(n)} for n in range(12)], "notes/test", "4 of 4 records have no 'prompt'"),
    ],
    ids=["first split", "second split", "repeated prompts", "no verifier", "no prompts"],
)
def test_records_that_are_too_few_or_cannot_be_evaluated_are_refused(
    rows: list[dict[str, Any]], place: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, "plan", str(write_run(tmp_path, lines(*map(json.dumps, rows)))))
    assert line.startswith(f"{place}: ") and problem in line, line


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_a_parquet_file_is_read_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path, b"PAR1 and no more", file="notes.parquet")
    file = tmp_path / "notes.parquet"
    assert refused(capsys, "plan", str(path)).startswith(f"{file}: no readable Parquet file")
    write_parquet(file, [record(n) if n != 4 else {"completion": "1"} for n in range(12)])
    assert refused(capsys, "plan", str(path)).startswith(f"{file}: row 5: columns of no known format")
    write_parquet(file, [record(n) for n in range(12)])
    assert main(["plan", str(path)]) == 0


def test_a_good_file_is_planned_and_none_is_read_for_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from posttrain.config import load_config
    from tests.cli.runs import make_run

    path = write_run(tmp_path, lines(*GOOD))
    assert main(["plan", str(path)]) == 0
    (tmp_path / "notes.jsonl").write_bytes(with_line(3, "{"))
    make_run(load_config(path), ["sft"])
    assert main(["plan", str(path)]) == 0
    assert capsys.readouterr().err == ""
    assert refused(capsys, "plan", str(path), "--from", "sft").startswith(f"{tmp_path}/notes.jsonl:3: ")


def test_a_file_left_out_of_a_generator_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path, with_line(2, "{"))
    sums = "sources.sums={kind: reasoning_gym, task: chain_sum, splits: {train: 5}}"
    others = ["stages.sft.data={sums: 1.0}", "tokenizer.training_records=5"]
    assert refused(capsys, "plan", str(path), sums, *others).startswith(f"{tmp_path}/notes.jsonl:2: ")


def test_the_command_itself_prints_one_line(tmp_path: Path) -> None:
    path = write_run(tmp_path, with_line(5, "{"))
    command = [sys.executable, "-m", "posttrain", "run", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {tmp_path}/notes.jsonl:5: invalid JSON")


def test_plan_looks_at_files_and_checkpoints_without_torch(tmp_path: Path, checkpoint: Path) -> None:
    path = write_run(tmp_path, lines(*GOOD), model=f"{{path: {checkpoint}}}")
    code = (
        "import sys; from posttrain.cli import main; status = main(['plan', sys.argv[1]])\n"
        "sys.exit(status or [name for name in ('torch', 'transformers', 'ray', 'datasets') if name in sys.modules] or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


# Checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint")
    section = ModelSection(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        rotary_dim=4,
        softmax_every=2,
        intermediate_size=8,
        num_local_experts=2,
    )
    tokenizer = train_tokenizer(["1 + 1 = 2"], 270)
    save_model(new_model(section, len(tokenizer), 1, eos_token_id=3), tokenizer, folder)
    return folder


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def rewrite(name: str, content: bytes | None) -> Callable[[Path], None]:
    """Put other content into a file; None removes it."""

    def change(folder: Path) -> None:
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)

    return change


def set_field(name: str, key: str, value: Any) -> Callable[[Path], None]:
    """Change a field of a JSON file."""

    def change(folder: Path) -> None:
        fields = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**fields, key: value}))

    return change


def change_tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the tensors of the weights."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")

    return apply


def cut(keep: int) -> Callable[[Path], None]:
    """Keep the first bytes of the weights."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:keep])

    return change


GATE = "model.layers.0.block_sparse_moe.gate.weight"

DAMAGED: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "no chat template": (rewrite("chat_template.jinja", None), "", "tokenizer has no chat template"),
    "empty chat template": (rewrite("chat_template.jinja", b""), "", "tokenizer has no chat template"),
    "broken tokenizer settings": (rewrite("tokenizer_config.json", b"{\n\n,"), "/tokenizer_config.json", "broken JSON in line 3"),
    "broken tokenizer": (rewrite("tokenizer.json", b'{"a": 1,\n'), "/tokenizer.json", "broken JSON in line 2"),
    "broken configuration": (rewrite("config.json", b"{"), "/config.json", "not a JSON object"),
    "another model": (set_field("config.json", "model_type", "llama"), "/config.json", "expected 'minimax_text_01'"),
    "weights missing": (rewrite("model.safetensors", None), "/model.safetensors", "weights are missing"),
    "weights empty": (rewrite("model.safetensors", b""), "/model.safetensors", "damaged weights"),
    "a pointer for the weights": (
        rewrite("model.safetensors", b"version https://git-lfs"),
        "/model.safetensors",
        "damaged weights",
    ),
    "weights cut off in the header": (cut(100), "/model.safetensors", "damaged weights"),
    "weights cut off in the data": (cut(9000), "/model.safetensors", "damaged weights"),
    "header too long": (rewrite("model.safetensors", struct.pack("<Q", 2**40) + b"{}"), "/model.safetensors", "damaged weights"),
    "a tensor missing": (change_tensors(lambda t: t.pop(GATE)), "", f"missing {GATE} [2, 16]"),
    "a tensor of another name": (change_tensors(lambda t: t.update(stray=t.pop(GATE))), "", "extra stray [2, 16]"),
    "a tensor of another shape": (
        change_tensors(lambda t: t.update({GATE: t[GATE].T})),
        "",
        f"{GATE} is [16, 2], expected [2, 16]",
    ),
    "a size that the weights do not have": (set_field("config.json", "vocab_size", 300), "", "expected [300, 16]"),
    "a damaged index": (rewrite("model.safetensors.index.json", b"{}"), "/model.safetensors.index.json", "damaged index"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_checkpoint_is_refused(case: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, place, problem = DAMAGED[case]
    path = write_run(tmp_path, lines(*GOOD), model=f"{{path: {checkpoint}}}")
    assert main(["plan", str(path)]) == 0
    capsys.readouterr()
    change(checkpoint)
    for command in ("plan", "run"):
        line = refused(capsys, command, str(path))
        assert line.startswith(f"{checkpoint}{place}: ") and problem in line, line

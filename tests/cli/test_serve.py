"""`posttrain serve` and `posttrain generate`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.cli import main
from posttrain.data.encode import encode_prompt
from posttrain.data.layout import SequenceLayout
from posttrain.data.tokenizer import load_tokenizer
from posttrain.model.loading import load_causal_lm
from tests.rollout.vllm.tiny import needs_vllm
from tests.stages.tasks import SFT, make_job


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_job(tmp_path_factory.mktemp("serve"), SFT).inputs["init"]


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """What would have taken this process's place."""
    asked: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda path, words, environment: asked.append((words, environment)))
    return asked


@needs_vllm
def test_serve_listens_on_this_machine_alone(checkpoint: Path, executed: list, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(checkpoint), "--max-num-seqs", "4"]) == 0
    words, environment = executed[0]
    assert words[words.index("--host") + 1] == "127.0.0.1" and words[words.index("--port") + 1] == "8000"
    assert words[words.index("--served-model-name") + 1] == checkpoint.name and words[-2:] == ["--max-num-seqs", "4"]
    assert environment["VLLM_NO_USAGE_STATS"] == "1"
    told = capsys.readouterr().err
    assert "http://127.0.0.1:8000/v1" in told and "password" not in told


@needs_vllm
def test_serve_says_that_others_can_reach_it(checkpoint: Path, executed: list, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(checkpoint), "--host", "0.0.0.0", "--port", "81", "--name", "m"]) == 0
    assert "no password" in capsys.readouterr().err
    assert executed[0][0][executed[0][0].index("--served-model-name") + 1] == "m"


@needs_vllm
@pytest.mark.parametrize("missing", ["config.json", "tokenizer_config.json"])
def test_serve_refuses_a_folder_that_lacks_a_file(
    missing: str, checkpoint: Path, tmp_path: Path, executed: list, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in checkpoint.iterdir():
        if file.name != missing:
            (tmp_path / file.name).symlink_to(file)
    assert main(["serve", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and str(tmp_path) in told and told.count("\n") == 1 and not executed


def test_generate_prints_what_the_model_answers(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(checkpoint), "1+2", "--engine", "embedded", "--max-new-tokens", "4"]) == 0
    first = capsys.readouterr()
    assert "engine: embedded" in first.err and first.out.endswith("\n")


def test_generate_refuses_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tmp_path / "none"), "1+2"]) == 2
    assert "no such folder" in capsys.readouterr().err


@needs_vllm
@pytest.mark.slow
def test_generate_gives_the_same_on_both_engines(checkpoint: Path) -> None:
    answers = []
    for engine in ("embedded", "auto"):
        words = ["generate", str(checkpoint), "1+2", "--max-new-tokens", "12", "--engine", engine, "--temperature", "0.7"]
        command = [sys.executable, "-m", "posttrain", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        answers.append(done.stdout)
        assert ("engine: vLLM" in done.stderr) == (engine == "auto")
    assert answers[0] == answers[1]


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a running server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    words = [sys.executable, "-m", "posttrain", "serve", str(checkpoint), "--port", str(port), "--name", "tiny"]
    words += ["--max-length", "512"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=30)


@needs_vllm
@pytest.mark.slow
def test_the_official_client_talks_to_the_server(server: str, checkpoint: Path) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=server, api_key="none", timeout=120)
    assert [model.id for model in client.models.list()] == ["tiny"]
    tokenizer, model = load_tokenizer(checkpoint), load_causal_lm(checkpoint)
    messages = [{"role": "user", "content": "1+2"}]
    ids = encode_prompt(tokenizer, messages)

    chat = client.chat.completions.create(
        model="tiny",
        messages=messages,
        max_tokens=8,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    assert chat.usage is not None and chat.usage.prompt_tokens == len(ids), "the server encodes a chat as training does"
    logprobs = chat.choices[0].logprobs
    assert logprobs is not None and logprobs.content
    assert all(len(place.top_logprobs) >= 2 for place in logprobs.content)

    plain = client.completions.create(model="tiny", prompt=ids, max_tokens=8, temperature=0, logprobs=1)
    assert plain.choices[0].text == chat.choices[0].message.content
    found = plain.choices[0].logprobs
    assert found is not None and found.token_logprobs is not None
    answer = greedy(model, ids, len(found.token_logprobs))
    tokens = torch.tensor([[*ids, *answer]])
    with torch.no_grad():
        expected = model.token_logprobs(tokens, SequenceLayout.from_lengths([tokens.shape[1]]))[len(ids) :]
    assert found.token_logprobs == pytest.approx(expected.tolist(), abs=1e-4)
    assert [place.logprob for place in logprobs.content] == pytest.approx(found.token_logprobs, abs=1e-4)

    stream: Any = client.chat.completions.create(
        model="tiny",
        messages=messages,
        max_tokens=8,
        temperature=0,
        stream=True,
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == chat.choices[0].message.content and len(pieces) > 1


@torch.no_grad()
def greedy(model: torch.nn.Module, ids: list[int], count: int) -> list[int]:
    tokens = list(ids)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(ids) :]


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert "serve" in told and "generate" in told

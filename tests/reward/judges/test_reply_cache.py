"""Replies are kept by content: across processes, under fire, and never past damage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.config.errors import UserError
from posttrain.reward.judges.cache import FolderCache, MemoryCache, content_key
from posttrain.reward.judges.consistency import question
from posttrain.reward.judges.endpoint import Endpoint
from posttrain.reward.types import Sample
from tests.reward.judges.judge_server import line, serving

ROOT = Path(__file__).resolve().parents[3]
PAYLOAD = {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 8, "temperature": 0.0}
KEY = content_key("test/1", PAYLOAD)
SAMPLE = Sample([{"role": "user", "content": "1+1?"}], "2", {"answer": "2"})


def run(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_another_process_finds_the_reply_without_a_request(tmp_path: Path) -> None:
    with serving(lambda handler, asked: handler.say(line(asked, grade=4))) as server:
        section = server.section(cache=str(tmp_path / "verdicts"), timeout_seconds=10.0)
        code = (
            "import sys\n"
            "from posttrain.config.reward_schema import EndpointSection\n"
            "from posttrain.reward.judges import Endpoint\n"
            "from posttrain.reward.judges.consistency import question\n"
            "from posttrain.reward.types import Sample\n"
            "sample = Sample([{'role': 'user', 'content': '1+1?'}], '2', {'answer': '2'})\n"
            "(verdict,) = Endpoint('other', EndpointSection.model_validate_json(sys.argv[1])).ask([question(sample)])\n"
            "print(verdict.values['grade'], verdict.cached)\n"
        )
        process = run(code, section.model_dump_json())
        out, problem = process.communicate(timeout=60)
        assert out == "4 False\n", problem
        (verdict,) = Endpoint("this", section).ask([question(SAMPLE)])
        assert verdict.values == {"grade": 4, "reason": "because"} and verdict.cached
        assert len(server.asked) == 1


def test_processes_that_write_at_once_never_show_half_a_reply(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from posttrain.reward.judges.cache import FolderCache\n"
        "cache, mine = FolderCache(sys.argv[1]), sys.argv[2] * 50_000\n"
        "for turn in range(60):\n"
        "    cache.put(sys.argv[3], mine)\n"
        "    found = cache.get(sys.argv[3])\n"
        "    assert found is not None and len(found) == 50_000 and len(set(found)) == 1, found and found[:50]\n"
    )
    processes = [run(code, str(tmp_path), letter, KEY) for letter in "ab"]
    problems = [process.communicate(timeout=60)[1] for process in processes]
    assert problems == ["", ""]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [f"{KEY}.json"], "nothing half-written is left"


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b'{"text": "5"}',
        b'{"text": 5, "check": "x"}',
        b'{"text": null, "check": null}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_a_damaged_entry_is_a_miss_and_is_replaced(tmp_path: Path, damage: bytes) -> None:
    cache = FolderCache(tmp_path)
    cache.put(KEY, "5")
    (path,) = tmp_path.rglob("*.json")
    path.write_bytes(damage)
    assert cache.get(KEY) is None
    cache.put(KEY, "6")
    assert cache.get(KEY) == "6"


def test_a_changed_letter_and_a_renamed_file_are_noticed(tmp_path: Path) -> None:
    cache = FolderCache(tmp_path)
    cache.put(KEY, "grade 1")
    (path,) = tmp_path.rglob("*.json")
    other = KEY[:-1] + ("0" if KEY[-1] != "0" else "1")
    path.with_name(f"{other}.json").write_bytes(path.read_bytes())
    assert cache.get(other) is None and cache.get(KEY) == "grade 1"
    path.write_bytes(path.read_bytes().replace(b"grade 1", b"grade 5"))
    assert cache.get(KEY) is None


def test_an_entry_that_is_whole_but_no_verdict_is_asked_again(tmp_path: Path) -> None:
    with serving(lambda handler, asked: handler.say(line(asked, grade=2))) as server:
        endpoint = Endpoint("test", server.section(cache=str(tmp_path)))
        endpoint.ask([question(SAMPLE)])
        (path,) = tmp_path.rglob("*.json")
        endpoint._cache.put(path.stem, "not a verdict")
        (verdict,) = endpoint.ask([question(SAMPLE)])
        assert verdict.values is not None and not verdict.cached and len(server.asked) == 2


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="folder of judges' verdicts cannot be written"):
        FolderCache(tmp_path / "file" / "below")


def test_a_disk_that_fails_later_is_warned_about_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = FolderCache(tmp_path)
    (tmp_path / KEY[:2]).write_text("in the way")
    cache.put(KEY, "5")
    cache.put(KEY, "5")
    assert cache.get(KEY) is None and len(caplog.records) == 1


def test_memory_forgets_what_was_unused_for_longest() -> None:
    cache = MemoryCache(limit=2)
    cache.put("a", "1")
    cache.put("b", "2")
    cache.get("a")
    cache.put("c", "3")
    assert [cache.get(key) for key in "abc"] == ["1", None, "3"]


@given(text=st.text(st.characters(), max_size=50))
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "texts"
    for cache in (FolderCache(folder), MemoryCache()):
        cache.put(KEY, text)
        assert cache.get(KEY) == text


def test_the_key_follows_everything_that_shapes_the_reply() -> None:
    keys = {KEY, content_key("test/2", PAYLOAD)}
    for name, value in (("model", "n"), ("messages", []), ("max_tokens", 9), ("temperature", 0.5)):
        keys.add(content_key("test/1", {**PAYLOAD, name: value}))
    assert len(keys) == 6
    assert content_key("test/1", json.loads(json.dumps(dict(reversed(PAYLOAD.items()))))) == KEY, "the order of fields is nothing"

"""`bench kernels` without a GPU: its rows at small sizes, peers' adapters, the process that is lost, the record, the picture."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from posttrain.config import UserError
from posttrain.kernels.bench import attention, compiling, record, run, timing, worker
from posttrain.kernels.bench.cases import is_peer, prepare, rivals, select
from posttrain.kernels.bench.peers import import_all
from posttrain.kernels.bench.plot import draw, write_plot
from posttrain.kernels.bench.report import tables
from posttrain.kernels.bench.rows import GROUPS, HEAD_DIM, OURS, Row
from tests.kernels import fake_peers

ROOT = Path(__file__).resolve().parents[2]
# Two results, each rounded to bf16 (half a unit in 2^8), can be 2^-8 of their size apart.
APART = 2**-8
BANDWIDTH = 3e9  # bytes a millisecond


def small(row: Row) -> Row:
    """The row at a size for a CPU; its kind and its contestants stay."""
    if row.group in ("decode", "verify"):
        return replace(row, documents=min(row.documents, 3), heads=2)
    if row.group == "mixed":
        return replace(row, heads=2)
    return replace(
        row, documents=min(row.documents, 3), tokens=70, heads=2, compared=row.group != "packed" and bool(row.floor_bytes)
    )


def pairs() -> Iterator[Any]:
    """One row of each kind with each of its contestants."""
    seen = set()
    for row in select():
        kind = (row.group, row.train, row.case.split(",")[0] if row.group == "ends" else row.documents > 1, bool(row.floor_bytes))
        for name in row.contestants:
            if (kind, name) not in seen and row.floor_bytes:
                seen.add((kind, name))
                yield pytest.param(small(row), name, id=f"{row.group}-{row.case}-{name}".replace(" ", "_"))


@pytest.mark.parametrize(("row", "contestant"), pairs())
def test_a_contestant_computes_what_ours_does(row: Row, contestant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_peers.install(monkeypatch)
    with torch.set_grad_enabled(row.train):
        torch.manual_seed(0)
        prepared = prepare(row, contestant, "cpu")
        prepared.run()
        assert prepared.calls >= 1
        if row.compared and contestant != OURS:
            assert worker._difference(row, contestant, "cpu") <= APART


def test_another_decay_shows_as_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_peers.install(monkeypatch)
    row = small(select(["forward"])[0])
    monkeypatch.setattr(fake_peers, "attend", lambda q, k, v, rates: v)
    assert worker._difference(row, "FLA 64", "cpu") > 0.1


def test_what_is_not_installed_is_recorded_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_peers.hide(monkeypatch)
    for group, name in (("forward", "FLA 64"), ("forward", "vLLM"), ("train", "lightning_attn2"), ("decode", "FLA")):
        found = worker.measured(replace(small(select([group])[0]), compared=False), name, "cpu")
        assert list(found) == ["absent"], found


def test_peers_that_cannot_be_imported_are_passed_over_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_peers.hide(monkeypatch)
    import_all()


def test_a_failure_is_a_result_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    row = small(select(["forward"])[0])
    for error, told in ((RuntimeError("no\nmore"), "RuntimeError: no"), (torch.OutOfMemoryError("much"), "out of memory")):

        def broken(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(worker, "prepare", broken)
        assert worker.measured(row, OURS, "cpu") == {"failed": told}


def test_rows_have_a_name_of_their_own_and_ours_first() -> None:
    rows = select()
    assert len({(row.group, row.case) for row in rows}) == len(rows)
    assert [group for group in GROUPS if any(row.group == group for row in rows)] == list(GROUPS)
    for row in rows:
        assert row.contestants[0] == OURS and not any(map(is_peer, select([row.group], peers=False)[0].contestants))
        assert OURS not in rivals(row) and row.baseline not in rivals(row)


def test_floors_are_the_bytes_that_must_move() -> None:
    floors = {(row.group, row.case): row.floor_bytes for row in select()}
    numbers = 8192 * 64 * HEAD_DIM
    assert floors["forward", "1 x 8,192, 64 heads"] == 2 * numbers * 4
    assert floors["train", "1 x 8,192, 64 heads"] == 2 * numbers * (4 + 10)
    assert floors["decode", "4 sequences"] == 4 * 64 * HEAD_DIM**2 * 4 * 2


def test_an_unknown_group_is_a_mistake_of_the_user() -> None:
    with pytest.raises(UserError, match="unknown group 'decod'; did you mean 'decode'"):
        select(["decod"])


def test_packed_documents_are_never_empty_and_always_the_same() -> None:
    offsets = attention.random_offsets(64, 65536, "cpu")
    assert offsets[0] == 0 and offsets[-1] == 65536 and len(offsets) == 65 and int(offsets.diff().min()) >= 1
    assert torch.equal(offsets, attention.random_offsets(64, 65536, "cpu"))


def test_the_picture_and_tables_of_a_record() -> None:
    rows = [run.summary(row, results(row), BANDWIDTH) for row in select()]
    picture = ElementTree.fromstring(draw(rows))
    titles = [element.text or "" for element in picture.iter() if element.tag.endswith("title")]
    ratios = sum(len(row["of_floor"]) for row in rows if "of_floor" in row)
    names = len({name for row in rows for name in row.get("of_floor", ())})
    assert len(titles) == ratios + names
    by_title = {table.title: table for table in tables(rows)}
    assert list(by_title) == list(GROUPS.values())
    assert all(len(cells) == len(table.columns) for table in by_title.values() for cells in table.cells)
    forward = by_title[GROUPS["forward"]]
    assert forward.columns[:4] == ["case", "floor, ms", "ours, ms", "of the floor"] and forward.columns[-1] == "speed-up"
    assert "failed: out of memory" in forward.cells[0] and "not installed" in forward.cells[0]
    assert by_title[GROUPS["train"]].cells[-1][2] == "0.250 GiB beyond (32 heads)"
    assert by_title[GROUPS["mixed"]].columns[-1] == "times prefills alone"


def test_a_picture_without_a_single_time_is_still_one(tmp_path: Path) -> None:
    ElementTree.fromstring(write_plot([], tmp_path / "x.svg").read_text())


def test_a_summary_names_the_fastest_rival_and_the_cost() -> None:
    row = select(["forward"])[0]
    found: dict[str, dict[str, Any]] = {OURS: {"ms": 2.0}, "FLA 64": {"ms": 5.0}, "FLA 128": {"ms": 4.0}, "vLLM": {"failed": "x"}}
    made = run.summary(row, found, row.floor_bytes)  # a floor of one millisecond
    assert made["fastest_rival"] == "FLA 128" and made["speed_up"] == 2.0 and "cost" not in made
    assert made["of_floor"] == {OURS: 2.0, "FLA 64": 5.0, "FLA 128": 4.0}
    assert "speed_up" not in run.summary(row, {OURS: {"failed": "x"}, "FLA 64": {"ms": 1.0}}, 1.0)
    packed = select(["packed"])[0]
    made = run.summary(packed, {OURS: {"ms": 2.0}, attention.ONE_DOCUMENT: {"ms": 1.6}}, 1.0)
    assert made["baseline"] == attention.ONE_DOCUMENT and made["cost"] == pytest.approx(1.25) and "speed_up" not in made


def results(row: Row) -> dict[str, dict[str, Any]]:
    """Results of every kind."""
    if not row.floor_bytes:
        return {OURS: {"extra_gib": 0.25, "heads": 32}}
    kinds: dict[str, dict[str, Any]] = {"vLLM": {"failed": "out of memory"}, "lightning_attn2": {"absent": "no module"}}
    floor = row.floor_bytes / BANDWIDTH
    return {name: kinds.get(name, {"ms": floor * (1.1 + at), "how": "call"}) for at, name in enumerate(row.contestants)}


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[run.Worker]:
    monkeypatch.chdir(ROOT)
    with run.Worker(tmp_path / "log", "tests.kernels.fake_worker", seconds=2.0) as found:
        yield found


def test_a_lost_process_is_started_again(workers: run.Worker) -> None:
    row = select(["forward"])[0]
    first = workers.ask(row, OURS)
    assert workers.ask(None, None) == {"copy": 3e9}
    assert workers.ask(row, "crashes") == {"failed": "its process ended with status -6: an illegal memory access"}
    second = workers.ask(row, OURS)
    assert second["ms"] == 1.0 and second["process"] != first["process"]


def test_a_process_that_is_not_fit_any_more_answers_and_is_replaced(workers: run.Worker) -> None:
    row = select(["forward"])[0]
    last = workers.ask(row, "breaks")
    assert last["ms"] == 1.0 and workers.ask(row, OURS)["process"] != last["process"]


def test_a_process_that_does_not_answer_is_ended(workers: run.Worker) -> None:
    row = select(["forward"])[0]
    workers.ask(row, OURS)
    assert workers.ask(row, "hangs") == {"failed": "no answer within 2 s"}
    assert workers.ask(row, OURS)["ms"] == 1.0


def test_peers_with_offsets_that_run_over_come_last() -> None:
    rows = select()
    safe, risky = run.jobs_of(rows)
    assert {name for _, name in risky} >= {"vLLM", "lightning_attn2"} and all(row.elements >= 2**31 for row, _ in risky)
    assert sorted(map(str, safe + risky)) == sorted(str((row, name)) for row in rows for name in row.contestants)
    told: list[str] = []
    answers = iter([{"ms": 0.25}, {"failed": "out of memory"}])
    found = run.ask_all(risky[:2], SimpleNamespace(ask=lambda row, name: next(answers)), told.append)  # type: ignore[arg-type]
    assert list(found) == risky[:2] and told[0].endswith(": 0.25 ms") and told[1].endswith(": failed out of memory")


@pytest.mark.parametrize("fails", ["vLLM", OURS])
def test_a_comparison_leaves_a_record_a_picture_and_a_log(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("FAILS", fails)
    monkeypatch.setattr(run, "require_gpu", lambda: None)
    monkeypatch.setattr(run, "compile_all", lambda groups, peers, log, limit: 1.5)
    monkeypatch.setattr(run, "Worker", partial(run.Worker, module="tests.kernels.fake_worker"))
    told: list[str] = []
    outcome = run.compare(tmp_path / "new", ["decode"], tell=told.append)
    written = json.loads(outcome.record.read_text())["results"]
    assert written == outcome.results and written["copy_gb_per_s"] == 3000.0 and written["compiling_s"] == 1.5
    assert len(written["rows"]) == 5 and written["rows"][0]["results"][fails] == {"failed": "out of memory"}
    assert outcome.picture.read_text().startswith("<svg") and outcome.log.is_file()
    assert len(outcome.broken) == (5 if fails == OURS else 0) and told[:2] == ["compiling", "compiled in 2 s"]


@pytest.mark.parametrize("parts", [1, 3, 16])
def test_processes_share_what_they_compile(parts: int) -> None:
    rows = select()
    shares = [compiling.share(rows, part, parts) for part in range(parts)]
    single = [job for jobs in shares for job in jobs if not job[1].startswith("FLA ")]
    assert len(single) == len(set(single)) and {name for _, name in single} >= {OURS, "vLLM", "FLA", "lightning_attn2"}
    for jobs in shares:  # the tuned ones are everybody's, each kind once, at few tokens
        tuned = [job for job in jobs if job[1].startswith("FLA ")]
        assert tuned == [job for job in shares[0] if job[1].startswith("FLA ")]
        assert all(row.tokens == compiling.TUNED_TOKENS for row, _ in tuned) and len(tuned) == 6


def test_only_compiling_launches_nothing_and_shares_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    calls: list[tuple[bool, dict[str, int]]] = []
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, grid, warmup, **options: calls.append((warmup, options)))

    def kernel(x: torch.Tensor, **options: int) -> None:
        if options["config"] == 1:
            raise RuntimeError("out of resources")
        JITFunction.run(None, grid=None, warmup=False, **options)

    configs = [SimpleNamespace(all_kwargs=lambda number=number: {"config": number}) for number in range(7)]
    tuner = SimpleNamespace(configs=configs, fn=SimpleNamespace(run=kernel), arg_names=["x", "size", "heads"], keys=["size"])
    before = Autotuner.run
    with compiling.only_compiling(1, 3):
        for dtype, size, heads in ((torch.float32, 1, 8), (torch.float32, 1, 64), (torch.bfloat16, 1, 8), (torch.float32, 2, 8)):
            Autotuner.run(tuner, torch.empty(1, dtype=dtype), size=size, heads=heads)
    # Of its share, 1 and 4, the first does not compile; another number of heads is no reason to try again.
    assert [(warmup, options["config"], options["heads"]) for warmup, options in calls] == [(True, 4, 8)] * 3
    assert Autotuner.run is before


def test_the_median_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_events", lambda call, repeats: [50.0, 2.0] if repeats == 2 else [9.0, 7.0, 8.0])
    ran: list[int] = []
    assert timing.timed(timing.Prepared(lambda: ran.append(1), calls=2)) == {"ms": 4.0, "how": "call"}
    assert len(ran) == 1 + 10  # once to compile, then 20 ms of warming at the 2 ms that the second call took


def test_compiling_goes_through_the_rows_in_processes_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(compiling, "MOST_PROCESSES", 2)
    compiling.compile_all(["mixed"], True, tmp_path / "log", 120.0)
    lines = (tmp_path / "log").read_text().splitlines()
    assert sorted(line.split(", ", 3)[3] for line in lines) == ["decodes alone", "ours", "prefills alone"], lines


def test_compiling_ends_when_its_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert compiling.compile_all(["mixed"], True, tmp_path / "log", 0.0) < 5.0


def test_a_record_says_where_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = json.loads(record.write_record("x", {"a": 1}, tmp_path).read_text())
    assert written["results"] == {"a": 1} and written["machine"]["torch"] and written["command"]
    monkeypatch.setattr(record, "__file__", str(tmp_path / "record.py"))
    assert record._commit() is None

"""`posttrain reward` and `posttrain score`: what they print and write, against the model asked directly; one line a mistake."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from posttrain.cli import main
from posttrain.config.reward_schema import RewardSection
from posttrain.data.sources import read_jsonl
from posttrain.pipeline.answer_files import sample_of
from posttrain.pipeline.folder import RunFolder
from posttrain.pipeline.scoring import open_learned, open_reward
from posttrain.reward.heads import Heads
from posttrain.reward.types import RewardBreakdown, Sample
from tests.cli.reward_models import write_language_model, write_lines, write_reward_model
from tests.config.examples import VALID, write_valid
from tests.pipeline.reward_run import STAGES, write_reward_run
from tests.reward.judges.judge_server import line, serving

HEADS = Heads(("correctness", "helpfulness", "depth"), 2)
ANSWERS = [
    {"prompt": f"What is {n} + 3?", "completion": str(n + 3 + n % 2), "verifier": "exact", "answer": str(n + 3)} for n in range(8)
]
PAIRS: list[dict[str, Any]] = [
    {
        "prompt": f"What is {n}?",
        "chosen": str(n),
        "rejected": str(n + 1),
        "margins": {"correctness": 1.0, "helpfulness": float(n % 2)},
    }
    for n in range(6)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reward_model(tmp_path_factory.mktemp("models") / "reward", HEADS)


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "answers.jsonl", ANSWERS)


def error(words: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a refused command prints."""
    assert main([str(word) for word in words]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1, printed
    return printed.err.rstrip("\n")


def numbers(words: list[Any], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What a command prints with --json."""
    assert main([*(str(word) for word in words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# posttrain reward


def test_reward_runs_the_stages_with_all_they_need_and_prints_their_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import posttrain.pipeline.run as pipeline

    asked: list[dict[str, Any]] = []
    folder = RunFolder(write_reward_run(tmp_path))

    def run(config, *, console, **arguments):
        asked.append(arguments)
        return folder

    monkeypatch.setattr(pipeline, "run", run)
    # Nothing of this configuration is done: what the stages need is run as well, and not asked for first.
    second = "  shuffled: {kind: reward, data: {addition: 1}, heldout: {addition/pairs: 1}, heldout_pairs: 9, steps: 2}\n"
    path = str(write_valid(tmp_path, ("  sft:\n", f"{second}  sft:\n")))
    assert main(["reward", path]) == 0
    printed = capsys.readouterr().out
    assert asked == [{"only": "reward"}, {"only": "shuffled"}]
    for text in ("reward model shuffled", "Pair accuracy by difficulty", "adversarial", "Pair accuracy by target", "error after"):
        assert text in printed
    assert "correlation of score lead and length lead" in printed and "posttrain report" in printed
    asked.clear()
    assert main(["reward", path, "--stage", "shuffled"]) == 0
    assert asked == [{"only": "shuffled"}] and "reward model reward" not in capsys.readouterr().out


# posttrain score MODEL FILE


def test_scores_are_those_of_the_hierarchy(
    model: Path, answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    found = numbers(["score", model, answers, "--output", output], capsys)
    reward = open_reward(model, RewardSection())
    expected = reward.score([sample_of(record, "completion") for record in read_jsonl(answers)])
    lines = [json.loads(text) for text in output.read_text().splitlines()]
    assert [RewardBreakdown.from_json(one["reward"]).total for one in lines] == pytest.approx([one.total for one in expected])
    assert [one["answer"] for one in lines] == [record["completion"] for record in ANSWERS]
    totals = [one.total for one in expected]
    assert found["answers"] == 8 and found["scores"]["total"] == pytest.approx(
        {"count": 8, "mean": fmean(totals), "deviation": stdev(totals)}
    )
    assert found["scores"]["correctness"]["mean"] == 0.5  # every second answer is right
    assert {"rest/correctness", "rest/helpfulness", "rest/helpfulness/depth"} <= found["scores"].keys()


def test_the_table_and_the_first_trees_are_printed(model: Path, answers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", str(model), str(answers), "--trees", "2"]) == 0
    printed = capsys.readouterr().out
    assert "rest/helpfulness" in printed and printed.count("verifier:") == 2 and "What is 1 + 3? -> 5" in printed


def test_pairs_give_their_accuracy_where_they_differ(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_lines(tmp_path / "pairs.jsonl", PAIRS)
    found = numbers(["score", model, file], capsys)
    learned = open_learned(model)
    sides = [
        [Sample([{"role": "user", "content": pair["prompt"]}], pair[side], {}) for pair in PAIRS]
        for side in ("chosen", "rejected")
    ]
    better, worse = (learned.dimension_scores(samples) for samples in sides)
    led = [one["helpfulness"].mean > other["helpfulness"].mean for one, other in zip(better, worse, strict=True)]
    # Without a rule or a judge the squashed head alone speaks, in the order of its logits; odd pairs differ in helpfulness.
    helpful = found["pairs"]["rest/helpfulness"]
    assert helpful["count"] == 3 and helpful["accuracy"] == pytest.approx(sum(led[1::2]) / 3)
    assert found["pairs"]["total"]["count"] == 6 and found["answers"] == 12


def test_parquet_is_read_as_json_lines_are(
    model: Path, answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parquet = tmp_path / "answers.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ANSWERS), parquet)
    assert numbers(["score", model, parquet], capsys) == numbers(["score", model, answers], capsys)


def test_two_files_are_compared_prompt_by_prompt(
    model: Path, answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = [{**record, "completion": record["answer"]} for record in ANSWERS[:6]] + [{**ANSWERS[7], "prompt": "Who?"}]
    file = write_lines(tmp_path / "others.jsonl", others)
    found = numbers(["score", model, answers, "--compare", file], capsys)
    # Of six shared prompts three have the same right answer; on the other three the second file is right.
    correctness = found["compare"]["correctness"]
    assert (correctness["wins"], correctness["ties"], correctness["losses"]) == (0, 3, 3)
    assert (
        correctness["share"] == 0.25 and correctness["low"] <= 0.25 <= correctness["high"] and correctness["difference"] == -0.5
    )
    assert (found["shared_prompts"], found["unshared_prompts"]) == (6, 3)
    assert found == numbers(["score", model, answers, "--compare", file], capsys)
    assert main(["score", str(model), str(answers), "--compare", str(file), "--trees", "0"]) == 0
    printed = capsys.readouterr().out
    assert "0 / 3 / 3" in printed and "3 prompts stand in one file alone" in printed


def test_a_stage_of_a_config_says_how_to_compose(
    model: Path, answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "composed.yaml"
    path.write_text(VALID.replace("{model: reward}", "{model: reward, learned_weight: 0.0}"))
    totals = numbers(["score", model, answers, "--reward", f"{path}:rl"], capsys)["scores"]["total"]
    assert totals["mean"] == 0.5  # the verifier alone


@pytest.mark.parametrize("place", ["stage", "run"])
def test_a_stage_or_a_run_stands_for_its_model(
    place: str, answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_reward_run(tmp_path, stages={name: STAGES[name] for name in ("reward", "rl")})
    stage = next(run.glob("stages/*-reward"))
    write_reward_model(stage / "model", Heads(("correctness",)))
    assert numbers(["score", run if place == "run" else stage, answers], capsys)["answers"] == 8


# Benchmarks


def test_a_file_in_rewardbench_2_s_schema_gives_hand_computed_accuracies(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, Any]] = [
        {
            "id": str(n),
            "prompt": f"What is {n}?",
            "chosen": [str(n)],
            "rejected": [str(n + k) for k in (1, 2, 3)],
            "num_correct": 1,
            "subset": "Math" if n % 2 else "Safety",
        }
        for n in range(6)
    ]
    found = numbers(["score", model, write_lines(tmp_path / "bench.jsonl", rows), "--format", "rewardbench2"], capsys)
    learned = open_learned(model)

    def logit(prompt: str, answer: str) -> float:
        heads = learned.dimension_scores([Sample([{"role": "user", "content": prompt}], answer, {})])[0]
        return (heads["correctness"].mean + heads["helpfulness"].mean) / 2  # depth is no dimension

    right = {
        name: [
            logit(row["prompt"], row["chosen"][0]) > max(logit(row["prompt"], text) for text in row["rejected"])
            for row in rows
            if row["subset"] == name
        ]
        for name in ("Math", "Safety")
    }
    assert {name: one["accuracy"] for name, one in found["subsets"].items()} == pytest.approx(
        {name: sum(of) / 3 for name, of in right.items()}
    )
    assert main(["score", str(model), str(tmp_path / "bench.jsonl"), "--format", "rewardbench2"]) == 0
    assert "overall" in capsys.readouterr().out


# Documents


def test_documents_are_graded_by_a_reward_model_with_these_heads(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_lines(
        tmp_path / "docs.jsonl", [{"text": f"Fact {n}.", "source": ("web", "books")[n % 2], "domain": "news"} for n in range(6)]
    )
    output = tmp_path / "grades.jsonl"
    found = numbers(["score", model, "--documents", file, "--output", output, "--floor", "0.2"], capsys)
    lines = [json.loads(text) for text in output.read_text().splitlines()]
    assert [one["source"] for one in found["weights"]] == ["web", "books"]
    assert sum(one["weight"] for one in found["weights"]) == pytest.approx(1)
    assert all(one["keep"] == pytest.approx(0.2 + 0.8 * (one["depth"] + one["helpfulness"]) / 2) for one in lines)
    assert main(["score", str(model), "--documents", str(file)]) == 0
    assert "Weights of sources" in capsys.readouterr().out


def test_documents_are_graded_by_a_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def respond(handler: Any, asked: Any) -> None:
        deep = "deep" in asked.block("DOCUMENT")
        handler.say(line(asked, depth=5 if deep else 1, helpfulness=5 if deep else 1, category="news"))

    records = [{"text": "deep", "source": "books"}, {"text": "shallow", "source": "web"}]
    file = write_lines(tmp_path / "docs.jsonl", records)
    with serving(respond) as server:
        words = ["score", "--documents", file, "--judge", server.section().url, "--judge-model", "m"]
        found = numbers(words, capsys)
        assert main([str(word) for word in words]) == 0
    books, web = found["weights"]
    assert (books["quality"], web["quality"]) == (1.0, 0.0)
    assert web["weight"] == pytest.approx(0.1 / 1.1)  # thinned to the floor, not dropped
    assert found["costs"]["questions"] == 2
    assert "2 questions" in capsys.readouterr().out


# Mistakes


def test_a_model_that_is_none_is_refused(answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such folder" in error(["score", tmp_path / "none", answers], capsys)
    assert "holds no model (no config.json)" in error(["score", tmp_path, answers], capsys)
    language = write_language_model(tmp_path / "lm")
    assert "holds no reward model but MiniMaxText01ForCausalLM" in error(["score", language, answers], capsys)
    run = write_reward_run(tmp_path / "runs")
    assert "the run has no finished reward model" in error(["score", run, answers], capsys)
    for stage in ("reward", "shuffled"):
        write_reward_model(next(run.glob(f"stages/*-{stage}")) / "model", Heads(("correctness",)))
    assert "the run has 2 reward models; name one: " in error(["score", run, answers], capsys)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        ("", "no records"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": ', ":2: invalid JSON"),
        ('{"prompt": "a"}\n', "nothing to score (columns: prompt); give prompt and completion, or chosen and rejected"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "chosen": "b", "rejected": "c"}\n', "pairs and single answers"),
        ('{"prompt": "a", "complation": "b"}\n', "did you mean 'completion'?"),
    ],
)
def test_a_file_that_is_none_is_refused(
    content: str | None, said: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file.jsonl"
    if content is not None:
        file.write_text(content)
    printed = error(["score", model, file], capsys)
    assert said in printed and str(file) in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["score"], "a reward model and a file are needed"),
        (["score", "MODEL", "FILE", "--judge", "http://x"], "--judge: means nothing without --documents"),
        (["score", "MODEL", "FILE", "--judge-model", "m"], "--judge-model: means nothing without --documents"),
        (["score", "MODEL", "FILE", "--judge-key", "KEY"], "--judge-key: means nothing without --documents"),
        (["score", "MODEL", "FILE", "--floor", "0.1"], "--floor: means nothing without --documents; leave it out"),
        (["score", "MODEL", "FILE", "--seed", "0"], "--seed: means nothing without --compare; add --compare, or leave it out"),
        (["score", "MODEL", "FILE", "--reward", "config.yaml"], "--reward config.yaml: names no stage"),
        (["score", "MODEL", "FILE", "--reward", "CONFIG:sft2"], "no stage 'sft2' with a reward"),
        (["score", "MODEL", "FILE", "--output", "no/where/out.jsonl"], "no/where: no such folder"),
        # Before the model is opened: there is none.
        (["score", "NONE", "FILE", "--output", "no/where/out.jsonl"], "no/where: no such folder; make it first"),
        (["score", "NONE", "FILE", "--output", "FOLDER"], "FOLDER: a folder, not a file"),
        (["score", "NONE", "--documents", "DOCS", "--output", "FOLDER"], "FOLDER: a folder, not a file"),
        (["score", "NONE", "FILE", "--compare", "OTHERS"], "have no prompt in common"),
        (["score", "MODEL", "FILE", "--compare", "PAIRS"], "--compare: pairs cannot be compared"),
        (["score", "MODEL", "FILE", "--compare", "OTHERS"], "have no prompt in common"),
        (["score", "MODEL", "FILE", "--format", "rm_bench"], "FILE: record 1:"),
        (["score", "MODEL", "FILE", "--format", "rm_bench", "--compare", "FILE"], "--compare: means nothing for a benchmark"),
        (["score", "MODEL", "FILE", "--format", "rm_bench", "--trees", "3"], "--trees: means nothing for a benchmark's format"),
        (["score", "MODEL", "FILE", "--format", "rm_bench", "--seed", "1"], "--seed: means nothing for a benchmark's format"),
        (["score", "MODEL", "FILE", "--format", "rm_bench", "--reward", "CONFIG:sft2"], "error: --reward "),
        (["score", "NONE", "FILE", "--format", "rm_bench"], "error: NONE: no such folder"),
        (["score", "--documents", "FILE"], "--documents: one grader is needed"),
        (["score", "SCALAR", "--documents", "DOCS"], "the reward model has no head for depth and helpfulness"),
        (["score", "MODEL", "--documents", "FILE"], "document 1 has no text (columns: answer, completion, prompt, verifier)"),
        (["score", "MODEL", "--documents", "DOCS", "--floor", "0"], "--floor: must be above 0"),
        (["score", "--documents", "DOCS", "--judge", "http://127.0.0.1:9/v1"], "add --judge-model NAME"),
        (
            ["score", "MODEL", "--documents", "DOCS", "--judge-key", "KEY"],
            "--judge-key: means nothing without --judge; add --judge",
        ),
        (["score", "MODEL", "--documents", "DOCS", "--judge-model", "m"], "--judge-model: means nothing without --judge"),
        (["score", "MODEL", "--documents", "DOCS", "--format", "trl"], "--format: means nothing beside --documents"),
        (["score", "MODEL", "--documents", "DOCS", "--trees", "3"], "--trees: means nothing beside --documents"),
        (["score", "MODEL", "--documents", "DOCS", "--seed", "0"], "--seed: means nothing beside --documents"),
        (["score", "MODEL", "--documents", "BYTES"], "BYTES:3: not UTF-8 (byte 0)"),
        (["score", "MODEL", "FILE", "--documents", "DOCS"], "FILE: means nothing beside --documents"),
    ],
)
def test_a_mistake_on_the_command_line_gives_one_line(
    words: list[str], said: str, model: Path, answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {
        "MODEL": model,
        "FILE": answers,
        "PAIRS": write_lines(tmp_path / "pairs.jsonl", PAIRS),
        "OTHERS": write_lines(tmp_path / "others.jsonl", [{"prompt": "Who?", "completion": "I"}]),
        "DOCS": write_lines(tmp_path / "docs.jsonl", [{"text": "A fact."}]),
        "CONFIG:sft2": f"{write_valid(tmp_path)}:sft2",
    }
    if "SCALAR" in words:
        places["SCALAR"] = write_reward_model(tmp_path / "scalar", Heads(("correctness",)))
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "BYTES").write_bytes(b'{"text": "a"}\n  \n\xff\n')
    places |= {name: tmp_path / name for name in ("FOLDER", "BYTES")}
    expected = said.replace("FILE: record", f"{answers}: record")
    assert expected in error([places.get(word, word) for word in words], capsys)

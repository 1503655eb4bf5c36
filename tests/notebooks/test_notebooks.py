"""The notebooks are thin, kept without outputs, and run top to bottom on a run's folder."""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import pytest
import yaml

from posttrain.pipeline.reward_data import RUN_VARIABLE
from tests.pipeline.reward_run import write_reward_run

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LOGIC = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.For, ast.While, ast.If, ast.Try, ast.comprehension)


def code_cells(path: Path) -> list[str]:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def python(cell: str) -> ast.Module:
    return ast.parse("\n".join(line for line in cell.splitlines() if not line.startswith("%")))


def test_both_notebooks_are_there_and_named_in_their_readme() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["reward_curriculum", "reward_scores"]
    assert all(path.name in (FOLDER / "README.md").read_text() for path in NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_no_logic(path: Path) -> None:
    first, *rest = code_cells(path)
    for cell in (first, *rest):
        assert not [node for node in ast.walk(python(cell)) if isinstance(node, LOGIC)], cell
    for cell in rest:
        (statement,) = python(cell).body
        assert isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call), cell


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs_and_explains_every_picture(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells if cell.cell_type == "code")
    assert cells[0].cell_type == "markdown"
    explained = [cell for cell in cells if cell.cell_type == "markdown" and len(cell.source) > 60]
    assert len(explained) >= sum("figures." in cell.source for cell in cells if cell.cell_type == "code") - 1


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_top_to_bottom(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    execute(path, write_reward_run(tmp_path), tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def real_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny reward recipe with few steps, and its shuffled control."""
    from posttrain.cli import main

    folder = tmp_path_factory.mktemp("runs")
    recipe = folder / "recipe.yaml"
    fields = yaml.safe_load((FOLDER.parent / "configs/tiny/reward.yaml").read_text(encoding="utf-8"))
    fields["sources"]["sums"]["splits"] = {"heldout": 20, "sft": 200}
    fields["sources"]["pairs"]["splits"] = {"heldout": 120, "train": 300}
    fields["sources"]["grades"]["splits"] = {"train": 60}
    fields["eval"] |= {"num_prompts": 10}
    fields["stages"]["sft"] |= {"steps": 20}
    reward = {**fields["stages"]["reward"], "steps": 30, "heldout_pairs": 120, "logging_steps": 5}
    fields["stages"] |= {"reward": reward, "shuffled": {**reward, "curriculum": {"shuffled": True}}}
    recipe.write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
    assert main(["run", str(recipe), f"output_dir={folder}"]) == 0
    return folder / "tiny-reward"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_on_a_run_that_was_made_here(
    path: Path, real_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(path, real_run, tmp_path, monkeypatch)


def execute(path: Path, run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a notebook; every figure gives a picture, every printed tree a tree."""
    from nbclient import NotebookClient

    monkeypatch.setenv(RUN_VARIABLE, str(run))
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.source.startswith("figures."):
            assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.source
        if cell.cell_type == "code" and cell.source.startswith("print"):
            assert any(output.get("text", "").startswith("prompt: ") for output in cell.outputs), cell.source

"""Imports point down: on the tree itself, and on planted violations that the check must see."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.project.layers import LAYERS, LINKED, source_files, violations

ROOT = Path(__file__).resolve().parents[2]


def write_tree(root: Path, files: dict[str, str]) -> None:
    """A tree of the package's shape: links included, each file at its real place."""
    (root / "posttrain").mkdir()
    (root / "posttrain/__init__.py").write_text('__version__ = "0"\n')
    for name in LINKED:
        (root / name).mkdir()
        (root / "posttrain" / name).symlink_to(Path("..") / name)
    for below, text in files.items():
        path = root / below if below.split("/")[0] in LINKED else root / "posttrain" / below
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_imports_of_the_project_point_down() -> None:
    assert violations(ROOT) == []


def test_every_folder_of_the_project_is_read_once() -> None:
    read = [below for _, below in source_files(ROOT)]
    assert len(read) == len(set(read))
    assert {"config", "data", *LINKED} <= {below.split("/")[0] for below in read}


def test_downward_imports_are_accepted(tmp_path: Path) -> None:
    write_tree(
        tmp_path,
        {
            "cli.py": "import posttrain.pipeline.run\nfrom posttrain import __version__\n",
            "pipeline/run.py": "import ray\nfrom ray import train\nfrom . import plan\nfrom ..stages import job\n",
            "pipeline/plan.py": "from posttrain.cluster import start\n",
            "stages/rl.py": "import trl\nfrom posttrain.rollout.types import Sample\nfrom ..reward import types\n",
            "rollout/fleet.py": "import ray\n",
            "rollout/vllm/engine.py": "from vllm import LLM\n",
            "reward/actor.py": "import ray\n",
            "model/modeling.py": "import torch\nfrom posttrain.kernels.lightning import attend\n",
            "config/schema.py": "import pydantic\nfrom .errors import UserError\n",
        },
    )
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    ("below", "text", "seen"),
    [
        ("model/a.py", "import posttrain.stages.run\n", "model/a.py:1: imports stages, a higher layer than model"),
        ("model/a.py", "\nfrom posttrain.stages.run import train\n", "model/a.py:2: imports stages, a higher layer"),
        ("kernels/a.py", "from posttrain import model\n", "imports model, a higher layer than kernels"),
        ("kernels/lightning/a.py", "from ...model import modeling\n", "imports model, a higher layer than kernels"),
        ("kernels/lightning/__init__.py", "from ...model import modeling\n", "imports model, a higher layer than kernels"),
        ("data/a.py", "def f():\n    from ..pipeline.run import run\n", "data/a.py:2: imports pipeline"),
        ("data/a.py", "import importlib\nimportlib.import_module('posttrain.cli')\n", "data/a.py:2: imports cli"),
        ("config/a.py", "from posttrain.data.layout import SequenceLayout\n", "imports data, a higher layer than config"),
        ("config/a.py", "import torch.nn\n", "imports torch, which config does without"),
        ("stages/a.py", "from ..pipeline import run\n", "imports pipeline, a higher layer than stages"),
        ("pipeline/a.py", "from .. import cli\n", "imports cli, a higher layer than pipeline"),
        ("reward/a.py", "from posttrain.rollout.types import Sample\n", "reward and rollout do not know each other"),
        ("rollout/a.py", "from ..reward import types\n", "rollout and reward do not know each other"),
        ("stages/a.py", "import vllm\n", "imports vllm, which belongs to rollout/vllm/"),
        ("rollout/engine.py", "from vllm import LLM\n", "imports vllm"),
        ("kernels/a.py", "from vllm import LLM\n", "imports vllm"),
        ("stages/a.py", "import ray\n", "imports ray"),
        ("rollout/other.py", "import ray\n", "imports ray"),
        ("reward/other.py", "from ray.util import queue\n", "imports ray"),
        ("pipeline/a.py", "from trl import DPOTrainer\n", "imports trl, which belongs to stages/"),
        ("model/a.py", "if TYPE_CHECKING:\n    import trl\n", "model/a.py:2: imports trl"),
        ("model/a.py", "from kernels.lightning import attend\n", "its name is posttrain.kernels"),
        ("tools/a.py", "", "tools/a.py: is in no layer"),
    ],
)
def test_a_planted_violation_is_seen(tmp_path: Path, below: str, text: str, seen: str) -> None:
    write_tree(tmp_path, {below: text})
    found = violations(tmp_path)
    assert len(found) == 1 and seen in found[0], found


def test_the_design_page_lists_the_same_layers() -> None:
    page = (ROOT / "docs/design.md").read_text()
    block = page.split("<!-- layers -->")[1].split("```")[1]
    written = [{name.strip() for name in line.split("#")[0].replace("|", ",").split(",")} for line in block.strip().splitlines()]
    assert written == [set(folders) for folders in reversed(LAYERS)]

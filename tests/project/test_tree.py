"""The tree itself: links, namespace folders, what a wheel holds, and what no file may say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.project.layers import LINKED

ROOT = Path(__file__).resolve().parents[2]
MADE = {".git", ".venv", "runs", "build", "dist", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"}
LONGEST = 500  # lines of a Python file
# Written in parts, so that this file does not name them either.
REGISTRIES = (
    "pypi" + ".org",
    "python" + "hosted.org",
    "pytorch" + ".org/whl",
    "npm" + "js.org",
    "debian" + ".org",
    "anaconda" + ".org",
)
PLACES = re.compile(r"(?<![\w.-])/(?:wo" + r"rk/|op" + r"t/(?:wheels|pypi))")


def files() -> Iterator[Path]:
    """Every file that belongs to the project, linked folders once, nothing that a tool made."""
    for folder, below, names in os.walk(ROOT):
        below[:] = [name for name in below if name not in MADE and not name.endswith(".egg-info")]
        yield from (path for name in names if not (path := Path(folder, name)).is_symlink())


@pytest.mark.parametrize("name", LINKED)
def test_a_folder_is_linked_into_the_package(name: str) -> None:
    link = ROOT / "posttrain" / name
    assert link.is_symlink() and os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name


@pytest.mark.parametrize("name", LINKED)
def test_a_linked_folder_has_no_init(name: str) -> None:
    assert not (ROOT / name / "__init__.py").exists(), f"{name}/__init__.py would hide other packages called {name}"


def test_transformers_imports_from_the_root_with_the_kernels_package_installed() -> None:
    code = (
        "import kernels, transformers.models.minimax.modeling_minimax as m\n"
        "assert 'site-packages' in kernels.__file__, kernels.__file__\n"
        "assert callable(kernels.get_kernel) and m.MiniMaxForCausalLM\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr


def test_an_init_in_kernels_would_hide_the_kernels_package(tmp_path: Path) -> None:
    """Shows that the test above can fail: without `__init__.py` the package is found, with it the folder is."""
    (tmp_path / "kernels").mkdir()
    code = "import importlib.util; print(importlib.util.find_spec('kernels').origin)"

    def origin() -> str:
        return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert "site-packages" in origin()
    (tmp_path / "kernels/__init__.py").touch()
    assert str(tmp_path) in origin()


def test_the_package_is_found_from_any_folder(tmp_path: Path) -> None:
    code = "import importlib.util as u; print(*(u.find_spec('posttrain.' + n + '.types').origin for n in ('reward', 'rollout')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [Path(text).resolve() for text in done.stdout.split()]
    assert found == [ROOT / "reward/types.py", ROOT / "rollout/types.py"]


@pytest.mark.slow
def test_a_wheel_holds_the_linked_folders(tmp_path: Path) -> None:
    source, out, unpacked = tmp_path / "source", tmp_path / "out", tmp_path / "unpacked"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(*MADE, "*.egg-info"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(out), str(source)]
    subprocess.run(command, check=True, timeout=240)
    (wheel,) = out.glob("posttrain-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("posttrain/")}
        archive.extractall(unpacked)
    folders = [ROOT / "posttrain" / name for name in ("config", "data", "pipeline", "cluster")]
    wanted = {f"posttrain/{path.relative_to(ROOT)}" for name in LINKED for path in (ROOT / name).rglob("*.py")}
    wanted |= {f"posttrain/{path.relative_to(ROOT / 'posttrain')}" for folder in folders for path in folder.rglob("*.py")}
    assert wanted <= held, wanted - held
    code = "import posttrain.reward.types as t; print(t.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == unpacked / "posttrain/reward/types.py"


def test_no_file_names_a_package_registry_or_a_folder_of_one_machine() -> None:
    found = []
    for path in files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if PLACES.search(line) or any(host in line for host in REGISTRIES):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_python_files_stay_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files() if path.suffix == ".py"}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}

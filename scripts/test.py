"""Runs the checks, one after the other, and prints how long each took. All of them run; the exit status is 1 if one failed."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def checks(marker: str | None) -> dict[str, list[str]]:
    """Name and command of each check; a marker ("slow", "gpu") runs those tests alone."""
    pytest = [str(BIN / "python"), "-m", "pytest", "-q", "--durations=10", "--durations-min=2"]
    if marker == "slow":
        return {"pytest (slow)": [*pytest, "-m", "slow and not gpu"]}
    if marker is not None:
        return {f"pytest ({marker})": [*pytest, "-m", marker]}
    return {
        "ruff": [str(BIN / "ruff"), "check", "."],
        "mypy": [str(BIN / "mypy")],
        "pytest": pytest,
    }


def main() -> None:
    """Command line: `test.py [--marker slow|gpu]`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--marker", choices=("slow", "gpu"), help="run only the tests with this marker, and no other check")
    rows = []
    for name, command in checks(parser.parse_args().marker).items():
        print(f"== {name}", flush=True)
        started = time.monotonic()
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        rows.append((name, time.monotonic() - started, status))
    print("\n== checks")
    for name, seconds, status in rows:
        print(f"{name:<16} {seconds:7.1f} s  {'ok' if status == 0 else f'FAILED (status {status})'}")
    raise SystemExit(any(status for _, _, status in rows))


if __name__ == "__main__":
    main()

"""Scores one answer by a reasoning-gym task, inside a sandbox. A program by itself: nothing of the project is there.

Standard input is marshalled: folders to import from, the task's module, its name and settings, the answer, its entry, and seconds
of processor time for scoring. Standard output is the line "ready", then the JSON of {"score": number} or {"unreadable": reason}.
"""

import importlib
import json
import marshal
import os
import signal
import sys
import types


def _import_alone(module: str, folder: str) -> None:
    """Import one task without all others: its packages stand empty. That takes a third of the time."""
    parts = module.split(".")
    for depth in range(1, len(parts)):
        package = types.ModuleType(".".join(parts[:depth]))
        package.__path__ = [os.path.join(folder, *parts[:depth])]
        sys.modules[package.__name__] = package
    importlib.import_module(module)


def main() -> None:
    """Score the answer on standard input."""
    folders, module, task, params, answer, entry, seconds = marshal.loads(sys.stdin.buffer.read())
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"  # thread pools reserve memory
    sys.path += folders
    _import_alone(module, folders[0])
    from reasoning_gym.factory import create_dataset

    scorer = create_dataset(task, seed=0, size=1, **params).score_answer
    results, sys.stdout = sys.stdout, sys.stderr  # what a task prints is no result
    print("ready", file=results, flush=True)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # ends the process, also amid arithmetic that no handler interrupts
    try:
        result: dict[str, object] = {"score": float(scorer(answer, entry))}
    except Exception as error:
        result = {"unreadable": f"{type(error).__name__}: {error}"[:200]}
    print(json.dumps(result), file=results, flush=True)


if __name__ == "__main__":
    main()

"""The layers of the package: which folder may import which, and where vLLM, Ray and TRL may be imported.

Read with `ast`, file by file, so nothing is imported and a folder without `__init__.py` counts like any other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

# From the lowest to the highest: a folder imports its own level and what is below. docs/design.md has the same list.
LAYERS = (
    ("config",),
    ("data", "sandbox"),
    ("kernels",),
    ("model",),
    ("reward", "rollout"),
    ("stages",),
    ("pipeline", "cluster"),
    ("cli",),
)
LEVEL = {folder: level for level, folders in enumerate(LAYERS) for folder in folders}
STRANGERS = ({"reward", "rollout"},)  # of one level, and neither imports the other
LINKED = ("kernels", "model", "reward", "rollout", "stages")

# Library -> the only places that import it.
PLACES = {
    "vllm": ("rollout/vllm/", "kernels/bench/peers.py"),  # the second compares kernels with its, when asked to
    "ray": ("pipeline/", "cluster/", "rollout/fleet.py", "reward/actor.py"),
    "trl": ("stages/",),
}
# Folder -> libraries it does without, so that what it does stays quick.
WITHOUT = {"config": {"torch", "transformers", "trl", "ray", "deepspeed", "datasets", "vllm"}}


def source_files(root: Path) -> Iterator[tuple[Path, str]]:
    """Every Python file of the package with its path below `posttrain/`, linked folders read where they are."""
    folders = [root / "posttrain", *(root / name for name in LINKED)]
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            below = path.relative_to(root)
            if below.parts[0] == "posttrain":
                if len(below.parts) > 2 and below.parts[1] in LINKED:
                    continue  # reached through a link
                below = below.relative_to("posttrain")
            yield path, below.as_posix()


def imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything imported; `from a import b` gives `a.b`, as b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if is_package else module.split(".")[:-1]
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def fault(below: str, name: str) -> str | None:
    """What is wrong with the file `below` importing `name`, or None."""
    here = below.split("/")[0].removesuffix(".py")
    library, *rest = name.split(".")
    if library in LINKED:
        return f"imports {library}; its name is posttrain.{library}"
    if library in PLACES and not below.startswith(PLACES[library]):
        return f"imports {library}, which belongs to {', '.join(PLACES[library])}"
    if library in WITHOUT.get(here, ()):
        return f"imports {library}, which {here} does without"
    if library != "posttrain" or not rest or rest[0] not in LEVEL:
        return None
    there = rest[0]
    if LEVEL[there] > LEVEL[here]:
        return f"imports {there}, a higher layer than {here}"
    if here != there and any({here, there} == pair for pair in STRANGERS):
        return f"imports {there}; {here} and {there} do not know each other"
    return None


def violations(root: Path) -> list[str]:
    """One line for each import that the layers forbid, and for each file outside them."""
    found = []
    for path, below in source_files(root):
        if below in ("__init__.py", "__main__.py"):
            continue
        if below.split("/")[0].removesuffix(".py") not in LEVEL:
            found.append(f"{below}: is in no layer")
            continue
        module = "posttrain." + below.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        tree = ast.parse(path.read_text(), filename=str(path))
        for line, name in imported(tree, module, path.name == "__init__.py"):
            if text := fault(below, name):
                found.append(f"{below}:{line}: {text}")
    return found

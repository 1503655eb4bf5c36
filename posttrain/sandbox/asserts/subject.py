"""The process of the program under test: runs it once, then does what the judge asks of it and sends plain data back.

The judge forks it before it reads the asserts, so there is nothing of them in its memory.

Nothing here is relied on: the program may change all of it. It could send wrong answers, but it could give those anyway.
"""

from __future__ import annotations

import builtins
import functools
import json
import os
import site
import sys

from posttrain.sandbox.asserts.values import decode, encode

TYPE_CHECKING = False
if TYPE_CHECKING:  # the module `typing` is slow to import
    from typing import Any


class _Objects:
    """Objects that stay here, by number."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def keep(self, value: Any) -> int:
        self.kept.append(value)
        return len(self.kept) - 1

    def get(self, number: int) -> Any:
        return self.kept[number]


def serve(requests_fd: int, replies_fd: int) -> None:
    """Runs the program, with nothing on standard input and output, and serves the judge until it has no more requests."""
    for descriptor, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY)):
        empty = os.open(os.devnull, flags)
        os.dup2(empty, descriptor)
        os.close(empty)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
    requests, replies = open(requests_fd), open(replies_fd, "w")
    site.main()
    objects = _Objects()
    namespace: dict[str, Any] = {"__name__": "program", "__builtins__": builtins}
    sys.argv = ["program.py"]
    with open("program.py", encoding="utf-8", errors="surrogatepass") as file:
        source = file.read()

    def begin() -> None:
        exec(compile(source, "program.py", "exec"), namespace)

    _reply(replies, begin, objects)
    for line in requests:
        request = json.loads(line)
        _reply(replies, functools.partial(_do, request, namespace, objects), objects)


def _do(request: dict[str, Any], namespace: dict[str, Any], objects: _Objects) -> Any:
    if request["do"] == "name":
        name = request["name"]
        if name not in namespace:
            raise NameError(f"name {name!r} is not defined")
        return namespace[name]
    target = objects.get(request["on"])
    arguments = [decode(argument, objects.get) for argument in request["arguments"]]
    match request["do"]:
        case "call":
            named = {name: decode(argument, objects.get) for name, argument in request["named"].items()}
            result = target(*arguments, **named)
            # What the call changed in its arguments is part of what it did.
            return {
                "result": result,
                "arguments": [a if isinstance(a, (list, dict, set, bytearray)) else None for a in arguments],
            }
        case "attribute":
            return getattr(target, arguments[0])
        case "item":
            return target[arguments[0]]
        case "length":
            return len(target)
        case "list":
            return list(target)
    raise ValueError(f"unknown request {request['do']}")


def _reply(replies: Any, action: Any, objects: _Objects) -> None:
    try:
        message: dict[str, Any] = {"value": encode(action(), objects.keep)}
    except Exception as error:
        message = {"error": [type(error).__name__, str(error)[:500]]}
    replies.write(json.dumps(message) + "\n")
    replies.flush()

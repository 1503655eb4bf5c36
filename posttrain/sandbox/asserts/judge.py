"""The process that runs the asserts: binds the names that they use to the program in another process, and says what held.

It reads the asserts from standard input, so that they lie in no file; it cannot be looked into; and it loads nothing from the
folder that the program can write to.
"""

from __future__ import annotations

import ast
import builtins
import ctypes
import json
import os
import sys

from posttrain.sandbox.asserts.subject import serve
from posttrain.sandbox.asserts.values import decode, encode

TYPE_CHECKING = False
if TYPE_CHECKING:  # slow to import
    from collections.abc import Iterator
    from typing import Any

_PR_SET_DUMPABLE = 4
_LONGEST = 200


class Unjudgeable(Exception):
    """The test asks for something that cannot be carried over to the program; says nothing about the program."""


class ProgramEnded(Exception):
    """The program's process is gone, or no longer speaks sense."""


class Remote:
    """Something of the program's that is no plain data: a function, a class, an object, an iterator.

    Equality and truth are those of any object, so that nothing the program defines takes part in a comparison.
    """

    def __init__(self, link: Link, number: int) -> None:
        self.__dict__.update(_link=link, _number=number)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._link.call(self._number, arguments, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._link.ask("attribute", self._number, name)

    def __getitem__(self, key: Any) -> Any:
        return self._link.ask("item", self._number, key)

    def __len__(self) -> int:
        return self._link.ask("length", self._number)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Any]:
        return iter(self._link.ask("list", self._number))


class Link:
    """The line to the program's process."""

    def __init__(self) -> None:
        read_request, write_request = os.pipe()
        read_reply, write_reply = os.pipe()
        if os.fork() == 0:
            os.close(write_request)
            os.close(read_reply)
            try:
                serve(read_request, write_reply)
            finally:
                os._exit(1)
        os.close(read_request)
        os.close(write_reply)
        self.requests, self.replies = open(write_request, "w"), open(read_reply)

    def receive(self) -> Any:
        """The next reply; an error there is raised here, by its name where Python has it."""
        try:
            line = self.replies.readline()
            if not line:
                raise ProgramEnded("the program ended before it answered")
            message = json.loads(line)
            if "error" in message:
                name, text = (str(part) for part in message["error"])
            else:
                return decode(message["value"], lambda number: Remote(self, number))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ProgramEnded("the program's reply cannot be read") from error
        known = getattr(builtins, name, None)
        if isinstance(known, type) and issubclass(known, Exception):
            try:
                raised = known(text)
            except TypeError:  # some want more than a text
                raised = Exception(f"{name}: {text}")
            raise raised
        raise type(name, (Exception,), {})(text)

    def send(self, **request: Any) -> Any:
        try:
            self.requests.write(json.dumps(request) + "\n")
            self.requests.flush()
        except BrokenPipeError:
            raise ProgramEnded("the program ended before it was asked") from None
        return self.receive()

    def name(self, name: str) -> Any:
        return self.send(do="name", name=name)

    def ask(self, what: str, number: int, *arguments: Any) -> Any:
        return self.send(do=what, on=number, arguments=[encode(argument, self._carried) for argument in arguments])

    def call(self, number: int, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        carried = [encode(argument, self._carried) for argument in arguments]
        reply = self.send(
            do="call",
            on=number,
            arguments=carried,
            named={name: encode(argument, self._carried) for name, argument in named.items()},
        )
        if not isinstance(reply, dict) or set(reply) != {"result", "arguments"} or not isinstance(reply["arguments"], list):
            raise ProgramEnded("the program's reply cannot be read")
        for argument, changed in zip(arguments, reply["arguments"], strict=False):
            _change(argument, changed)
        return reply["result"]

    def _carried(self, value: Any) -> int:
        if isinstance(value, Remote) and value._link is self:
            return value._number
        raise Unjudgeable(f"the test gives the program a {type(value).__name__}, and only plain data can be given")


def _change(argument: Any, changed: Any) -> None:
    """Makes a list, dictionary, set or bytearray what the call made of it."""
    if type(argument) is not type(changed):
        return
    if isinstance(argument, (list, bytearray)):
        argument[:] = changed
    elif isinstance(argument, (dict, set)):
        argument.clear()
        argument.update(changed)


def free_names(test: str, program: str) -> list[str]:
    """Names that a test uses and neither defines nor finds in Python: those it wants of the program.

    A program that defines `abs` anew must not sway `abs(f(1) - 2) < 1e-6`, so Python's own names stay Python's. Only a test that
    uses no other name is about one of those (`assert sum(2, 3) == 5`).
    """
    tree = ast.parse(test)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)} - _defined(tree)
    wanted = {name for name in used if not hasattr(builtins, name)}
    if not wanted:
        try:
            wanted = used & _defined(ast.parse(program))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            pass  # the program's own run will say so
    return sorted(wanted)


def used_modules(test: str, names: list[str]) -> dict[str, Any]:
    """Modules of the standard library among the names that a test does not define.

    Tests often lean on the program's imports. The modules are taken from here, since a program could have changed its own, and a
    name counts as a module where it is used as one alone: `math.pi`, but not `numbers(3)`.
    """
    attributes: dict[str, list[str]] = {}
    uses: dict[str, int] = {}
    for node in ast.walk(ast.parse(test)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            attributes.setdefault(node.value.id, []).append(node.attr)
        elif isinstance(node, ast.Name):
            uses[node.id] = uses.get(node.id, 0) + 1
    modules = {}
    for name in sys.stdlib_module_names & set(names):
        if len(attributes.get(name, [])) == uses[name]:
            module = __import__(name)
            if all(hasattr(module, attribute) for attribute in attributes[name]):
                modules[name] = module
    return modules


def _defined(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) | ast.ExceptHandler(name=str(name)):
                names.add(name)
            case ast.Import() | ast.ImportFrom():
                names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names


def verdict(link: Link, test: str, program: str) -> dict[str, Any]:
    """{"passed": bool or None, "reason": text}; None where the test cannot be judged this way."""
    namespace: dict[str, Any] = {"__name__": "test"}
    try:
        names = free_names(test, program)
        code = compile(test, "test", "exec")
    except (SyntaxError, ValueError) as error:
        return {"passed": None, "reason": f"the test is no Python: {error}"}
    try:
        namespace.update(used_modules(test, names))
        link.receive()  # how the program's own run went
        for name in names:
            if name not in namespace:
                try:
                    namespace[name] = link.name(name)
                except NameError:
                    pass  # the test will say so itself, if it comes to that
        exec(code, namespace)
    except Unjudgeable as error:
        return {"passed": None, "reason": str(error)}
    except ProgramEnded as error:
        return {"passed": False, "reason": str(error)}
    except AssertionError as error:
        return {"passed": False, "reason": f"an assertion does not hold{': ' if str(error) else ''}{str(error)[:_LONGEST]}"}
    except BaseException as error:  # also SystemExit, which a test has no business with
        return {"passed": False, "reason": f"{type(error).__name__}: {str(error)[:_LONGEST]}"}
    return {"passed": True, "reason": ""}


def main() -> None:
    """Reads {"nonce", "program", "test"} from standard input and writes the verdict, with the nonce, to standard output."""
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    link = Link()  # before anything is read, so that the program's process holds nothing of it
    order = json.load(sys.stdin)
    answer, sys.stdout = sys.stdout, sys.stderr  # what a test prints is no verdict
    result = verdict(link, order["test"], order["program"])
    answer.write(json.dumps({"nonce": order["nonce"], **result}) + "\n")
    answer.flush()
    os._exit(0)

"""Calls of vLLM's `LLMEngine` that end: its own wait for ever where the process behind it has died.

Facts used, the same in vLLM 0.26 and 0.32: v1/engine/core_client.py (`SyncMPClient.call_utility` waits without a deadline, and
the timeout of `collective_rpc` is the executor's; a monitor sets `resources.engine_dead`; `InprocClient` has an `engine_core`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from posttrain.rollout.weights.sink import EngineUnusable

T = TypeVar("T")

_GLANCE_SECONDS = 0.2


def call_workers(engine: Any, method: str, args: tuple[Any, ...], timeout: float) -> list[Any]:
    """Call a method of every worker, see `call_engine`.

    Args:
        engine: an `LLMEngine`.
        method, args: plain numbers, texts, lists and dicts.
        timeout: seconds for the answers.
    """
    return call_engine(engine, method, lambda: engine.collective_rpc(method, timeout=timeout, args=args), timeout)


def call_engine(engine: Any, what: str, call: Callable[[], T], timeout: float) -> T:
    """Make a call that waits for the engine's process.

    Args:
        engine: an `LLMEngine`, in this process or with one of its own.
        what: named in errors.
        call: the call.
        timeout: seconds for the answer. An engine in this process has as long as it takes.

    Raises:
        EngineUnusable: the engine died, raised or did not answer in time; its next answer might belong to this call.
    """
    client = getattr(engine, "engine_core", None)
    try:
        return call() if hasattr(client, "engine_core") else _wait(client, what, call, timeout)
    except Exception as error:
        raise EngineUnusable(f"the engine did not answer {what}: {type(error).__name__}: {error}") from error


def _wait(client: Any, what: str, call: Callable[[], T], timeout: float) -> T:
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    # A thread that nobody waits for: where the engine has died it never ends.
    threading.Thread(target=run, name=f"posttrain-{what}", daemon=True).start()
    deadline = time.monotonic() + timeout
    while not answer.done():
        if getattr(getattr(client, "resources", None), "engine_dead", False):
            raise RuntimeError("its process has ended")
        if time.monotonic() > deadline:
            raise TimeoutError(f"no answer within {timeout:g} seconds")
        try:
            answer.exception(_GLANCE_SECONDS)
        except TimeoutError:
            continue
    return answer.result()

"""A chat-completions server on loopback that answers, or misbehaves, as a test says."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from posttrain.config.reward_schema import EndpointSection

TAG = re.compile(r"<<([0-9a-f]{8}) [A-Z_]+\n")


@dataclass
class Asked:
    """A request that the server received."""

    payload: dict[str, Any]
    headers: dict[str, str]
    path: str

    @property
    def tag(self) -> str:
        """The tag that the question's markers carry."""
        found = TAG.search(self.payload["messages"][-1]["content"])
        assert found is not None
        return found.group(1)

    def block(self, name: str) -> str:
        """The text between the markers of a name."""
        return self.payload["messages"][-1]["content"].split(f"<<{self.tag} {name}\n")[1].split(f"\n{name} {self.tag}>>")[0]


Respond = Callable[["Handler", Asked], None]


@dataclass
class Running:
    """A running server: its address, and what it has seen."""

    url: str
    stop: threading.Event = field(default_factory=threading.Event)
    asked: list[Asked] = field(default_factory=list)
    active: int = 0
    peak: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def section(self, **options: Any) -> EndpointSection:
        """An endpoint's section for this server, without retries."""
        return EndpointSection(**{"url": self.url, "model": "small", "timeout_seconds": 10.0, "retries": 0, **options})


class Handler(BaseHTTPRequestHandler):
    """Reads a request, counts it, and lets the test's function respond."""

    protocol_version = "HTTP/1.1"
    running: Running
    respond: Respond

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        asked = Asked(json.loads(body), dict(self.headers.items()), self.path)
        with self.running.lock:
            self.running.asked.append(asked)
            self.running.active += 1
            self.running.peak = max(self.running.peak, self.running.active)
        try:
            type(self).respond(self, asked)
        finally:
            with self.running.lock:
                self.running.active -= 1

    def send(self, body: bytes, status: int = 200, **headers: str) -> None:
        """A whole response."""
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def say(self, text: str | None, usage: Any = (11, 7), finish: str = "stop") -> None:
        """A chat completion; `usage` is (prompt tokens, completion tokens), or sent as it is."""
        body: dict[str, Any] = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]}
        if isinstance(usage, tuple):
            body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
        elif usage is not None:
            body["usage"] = usage
        self.send(json.dumps(body).encode())

    def hang(self) -> None:
        """Wait until the test is over."""
        self.running.stop.wait(20)
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what some tests want."""


@contextmanager
def serving(respond: Respond) -> Iterator[Running]:
    """Run the server for the block."""
    handler = type("Bound", (Handler,), {"respond": staticmethod(respond)})
    server = _Server(("127.0.0.1", 0), handler)
    running = Running(f"http://127.0.0.1:{server.server_address[1]}/v1")
    handler.running = running  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield running
    finally:
        running.stop.set()
        server.shutdown()
        server.server_close()
        thread.join(5)


def line(asked: Asked, **verdict: Any) -> str:
    """A verdict's last line, with the question's id."""
    return json.dumps({"id": asked.tag, "reason": "because", **verdict})

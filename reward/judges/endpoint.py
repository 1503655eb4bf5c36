"""A judging model: many questions in, a verdict or an honest "no verdict" for each out, in order and in time."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from posttrain.config.errors import UserError
from posttrain.config.reward_schema import EndpointSection
from posttrain.reward.judges.cache import FolderCache, MemoryCache, ReplyCache, content_key
from posttrain.reward.judges.transport import Failure, Patience, ask
from posttrain.reward.judges.types import SHOWN, Costs, Question, Reply, Unreadable, Verdict

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")

_LOG = logging.getLogger(__name__)
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class Endpoint:
    """A model behind an OpenAI-compatible endpoint, with its cache and its costs.

    Replies are sampled at temperature 0. A question is repeated when the request fails (no connection, too slow, status 408, 409,
    425, 429 or 5xx, a body that is no chat completion), not when the model writes something else than a verdict: at
    temperature 0 it would write it again.

    Args:
        name: named in warnings and errors.
        section: address, model, deadlines, retries, cache, prices.
        first_wait: seconds, mean wait before the first retry.

    Raises:
        UserError: the address is none, the variable of the key is not set, or the cache's folder cannot be written.
    """

    def __init__(self, name: str, section: EndpointSection, *, first_wait: float = 0.5) -> None:
        self.name, self.section = name, section
        self._first_wait = first_wait
        self._url = _completions(name, section.url)
        self._headers = _headers(name, section.api_key_variable)
        self._cache: ReplyCache = MemoryCache() if section.cache is None else FolderCache(section.cache)
        self._costs, self._lock = Costs(), threading.Lock()

    @property
    def costs(self) -> Costs:
        """What this endpoint has cost since it was made."""
        with self._lock:
            return self._costs

    def ask(self, questions: Sequence[Question]) -> list[Verdict]:
        """One verdict a question, in order. Equal questions are asked once.

        Returns at the batch's deadline at the latest; no failure of the endpoint raises. May be called from several threads, and
        where an event loop runs.
        """
        payloads = [self._payload(question) for question in questions]
        keys = [content_key(question.template, payload) for question, payload in zip(questions, payloads, strict=True)]
        verdicts: dict[str, Verdict] = {}
        open_keys: dict[str, int] = {}  # key -> the first question that has it
        for index, (key, question) in enumerate(zip(keys, questions, strict=True)):
            if key not in verdicts and key not in open_keys:
                kept = self._kept(key, question)
                if kept is None:
                    open_keys[key] = index
                else:
                    verdicts[key] = kept
        if open_keys:
            asked = {key: (questions[index], payloads[index]) for key, index in open_keys.items()}
            given: dict[str, Verdict] = _run(lambda done: self._ask_all(asked, done))
            verdicts |= given
        first = set(open_keys.values())
        answers = [_again(verdicts[key]) if index not in first else verdicts[key] for index, key in enumerate(keys)]
        self._account(answers)
        return answers

    def _payload(self, question: Question) -> dict[str, Any]:
        return {
            "model": self.section.model,
            "messages": [dict(message) for message in question.messages],
            "max_tokens": self.section.max_new_tokens,
            "temperature": 0.0,
        }

    def _kept(self, key: str, question: Question) -> Verdict | None:
        text = self._cache.get(key)
        if text is None:
            return None
        try:
            return Verdict(question.read(text), self.section.model, text[-SHOWN:], cached=True)
        except Unreadable:
            return None  # of an older reader, or damaged

    async def _ask_all(self, asked: Mapping[str, tuple[Question, dict[str, Any]]], done: Future[dict[str, Verdict]]) -> None:
        """Ask everything at once, within bounds; set `done` at the deadline at the latest, before connections are closed."""
        section, until = self.section, time.monotonic() + self.section.batch_timeout_seconds
        patience = Patience(section.timeout_seconds, until, section.retries, self._first_wait)
        slots = asyncio.Semaphore(section.concurrency)
        async with self._client() as client:
            tasks = {
                key: asyncio.create_task(self._ask_one(client, key, question, payload, patience, slots))
                for key, (question, payload) in asked.items()
            }
            await asyncio.wait(tasks.values(), timeout=section.batch_timeout_seconds)
            late = Verdict(None, section.model, problem=f"not answered within the batch's {section.batch_timeout_seconds:g} s")
            done.set_result({key: task.result() if task.done() else late for key, task in tasks.items()})
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)

    async def _ask_one(
        self,
        client: httpx2.AsyncClient,
        key: str,
        question: Question,
        payload: dict[str, Any],
        patience: Patience,
        slots: asyncio.Semaphore,
    ) -> Verdict:
        def sent(again: bool) -> None:
            self._add(Costs(requests=1, retries=int(again)))

        model = self.section.model
        try:
            reply = await ask(client, self._url, payload, patience, seed=key, slots=slots, sent=sent)
        except Failure as failure:
            return Verdict(None, model, problem=failure.problem)
        except Exception as error:  # whatever a library raises, one question without a verdict must not cost the others theirs
            return Verdict(None, model, problem=f"{type(error).__name__}: {error}"[:SHOWN])
        self._add(self._price(reply))
        shown = reply.text[-SHOWN:]
        try:
            values = question.read(reply.text)
        except Unreadable as unreadable:
            cut = f"; it was cut at max_new_tokens ({self.section.max_new_tokens})" if reply.cut else ""
            return Verdict(None, model, shown, f"{unreadable}{cut}")
        except Exception as error:
            return Verdict(None, model, shown, f"reading the reply failed ({type(error).__name__}: {error})"[:SHOWN])
        await self._keep(key, reply.text)
        return Verdict(values, model, shown)

    async def _keep(self, key: str, text: str) -> None:
        """Write to the cache off the event loop: a slow disk must hold up neither other questions nor the deadline."""
        try:
            await asyncio.to_thread(self._cache.put, key, text)
        except Exception as error:
            _LOG.warning("judge %s: a verdict could not be kept (%s: %s)", self.name, type(error).__name__, error)

    def _client(self) -> httpx2.AsyncClient:
        """A client for one batch: a judge then holds no sockets, and can be used from any thread."""
        import httpx2

        # Bounds and deadlines are ours: the library's would let a request wait for a connection on its own deadline, and count
        # seconds per read, not per request.
        limits = httpx2.Limits(max_connections=None)
        return httpx2.AsyncClient(headers=self._headers, timeout=None, limits=limits, verify=self._tls, trust_env=not self._local)

    @cached_property
    def _local(self) -> bool:
        """Whether the address is this machine's own, which no proxy can reach."""
        return urlsplit(self._url).hostname in _LOOPBACK

    @cached_property
    def _tls(self) -> ssl.SSLContext | bool:
        """The certificates to trust, read once as that takes 50 ms; plain HTTP to this machine needs none."""
        import httpx2

        return False if self._local and self._url.startswith("http:") else httpx2.create_ssl_context()

    def _price(self, reply: Reply) -> Costs:
        if reply.tokens is None:
            return Costs(uncounted=1)
        prompt, completion = reply.tokens
        price = (prompt * self.section.prompt_price + completion * self.section.completion_price) / 1e6
        return Costs(prompt_tokens=prompt, completion_tokens=completion, price=price)

    def _account(self, verdicts: Sequence[Verdict]) -> None:
        without = [verdict for verdict in verdicts if verdict.values is None]
        hits = sum(verdict.cached for verdict in verdicts)
        self._add(Costs(questions=len(verdicts), cache_hits=hits, no_verdicts=len(without)))
        if without:
            some = without[0].problem
            _LOG.warning("judge %s: no verdict on %d of %d, for example: %s", self.name, len(without), len(verdicts), some)

    def _add(self, costs: Costs) -> None:
        with self._lock:
            self._costs += costs


def _again(verdict: Verdict) -> Verdict:
    """The verdict on an equal question of the same call; "no verdict" is nothing that was kept."""
    return Verdict(verdict.values, verdict.model, verdict.text, verdict.problem, cached=verdict.values is not None)


def _run(work: Callable[[Future[T]], Coroutine[Any, Any, None]]) -> T:
    """What `work` sets its future to. It runs in a thread with an event loop of its own, which goes on closing afterwards."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            asyncio.run(work(done))
        except BaseException as error:
            if done.done():
                _LOG.warning("closing the connections to a judge failed: %s", error)
            else:
                done.set_exception(error)

    threading.Thread(target=run, name="judge", daemon=True).start()
    return done.result()


def _completions(name: str, url: str) -> str:
    try:
        parts = urlsplit(url)
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and not (parts.query or parts.fragment)
        right = right and (parts.port is None or parts.port > 0)
    except ValueError:
        right = False
    if not right or any(letter.isspace() for letter in url):
        raise UserError(f"'{url}' is no address of an endpoint", where=f"judge {name}", instead="write http://HOST:PORT/v1")
    return url.rstrip("/") + "/chat/completions"


def _headers(name: str, variable: str | None) -> dict[str, str]:
    headers = {"content-type": "application/json", "accept-encoding": "identity"}
    if variable is not None:
        key = os.environ.get(variable, "").strip()
        if not key or not key.isascii() or not key.isprintable():
            problem = f"the environment variable '{variable}' holds no key"
            raise UserError(problem, where=f"judge {name}", instead="set it, or set api_key_variable to null")
        headers["authorization"] = f"Bearer {key}"
    return headers

"""One request to an OpenAI-compatible endpoint: sent, repeated with growing waits, and its reply checked.

Whatever a server does, the outcome is a `Reply` or a `Failure` with a reason, within the deadline.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from posttrain.reward.judges.types import SHOWN, Reply

if TYPE_CHECKING:
    import httpx2

LARGEST_BODY = 4 * 2**20
"""Bytes of a response that are read; a verdict takes a thousandth."""
LONGEST_WAIT = 30.0
"""Seconds; longest wait before a retry that the server did not ask for."""
_REPEATED = {408, 409, 425, 429}


class Failure(Exception):
    """A request without a usable reply.

    Args:
        problem: why, for people.
        repeat: whether asking again may help.
        wait: seconds that the server asked to wait, or None.
    """

    def __init__(self, problem: str, *, repeat: bool, wait: float | None = None) -> None:
        super().__init__(problem[:SHOWN])
        self.problem, self.repeat, self.wait = problem[:SHOWN], repeat, wait


@dataclass(frozen=True)
class Patience:
    """How long a request is waited for.

    Attributes:
        request: seconds of one attempt, from connecting to the last byte.
        until: end of the whole batch, on the clock of `time.monotonic`.
        retries: attempts after the first.
        first_wait: seconds, mean wait before the first retry; each further one doubles it.
    """

    request: float
    until: float
    retries: int
    first_wait: float


async def ask(
    client: httpx2.AsyncClient,
    url: str,
    payload: Mapping[str, Any],
    patience: Patience,
    *,
    seed: str,
    slots: asyncio.Semaphore,
    sent: Callable[[bool], None],
) -> Reply:
    """Send a chat completion until there is a reply, the retries are used up, or asking again cannot help.

    Args:
        client: open client.
        url: of the chat completions.
        payload: the request's JSON.
        patience: deadlines and retries.
        seed: draws the jitter of the waits.
        slots: bounds the requests under way; none is held while waiting.
        sent: called before each attempt, with whether it is a retry.

    Raises:
        Failure: no reply.
    """
    jitter = random.Random(seed)
    body = json.dumps(payload).encode()  # ASCII: half a surrogate pair in a text must not stop the request
    attempt = 0
    while True:
        try:
            async with slots:
                seconds = min(patience.request, patience.until - time.monotonic())
                if seconds <= 0:
                    raise Failure("the batch's deadline passed before the request could be sent", repeat=False)
                sent(attempt > 0)
                return await _attempt(client, url, body, seconds)
        except Failure as failure:
            attempt += 1
            if not failure.repeat or attempt > patience.retries:
                raise Failure(_after(failure.problem, attempt), repeat=False) from failure
            drawn = min(LONGEST_WAIT, patience.first_wait * 2 ** (attempt - 1)) * jitter.uniform(0.5, 1.5)
            wait = max(drawn, failure.wait or 0.0)
            if time.monotonic() + wait >= patience.until:
                problem = f"{failure.problem}; the batch's deadline leaves no time to ask again"
                raise Failure(_after(problem, attempt), repeat=False) from failure
        await asyncio.sleep(wait)


def _after(problem: str, attempts: int) -> str:
    return problem if attempts == 1 else f"{problem} (after {attempts} requests)"


async def _attempt(client: httpx2.AsyncClient, url: str, body: bytes, seconds: float) -> Reply:
    import httpx2

    try:
        async with asyncio.timeout(max(seconds, 0.0)):
            async with client.stream("POST", url, content=body) as response:
                received = await _receive(response)
    except TimeoutError:
        raise Failure(f"no complete reply within {seconds:.3g} s", repeat=True) from None
    except httpx2.HTTPError as error:
        raise Failure(f"{type(error).__name__}: {error}", repeat=True) from error
    if response.status_code != 200:
        raise _refusal(response.status_code, response.headers.get("retry-after"), received)
    return read_reply(received)


async def _receive(response: httpx2.Response) -> bytes:
    """The body as sent. Compression is not asked for and not undone, so that a small body cannot become a huge one."""
    received = bytearray()
    async for chunk in response.aiter_raw():
        received += chunk
        if len(received) > LARGEST_BODY:
            raise Failure(f"the reply is longer than {LARGEST_BODY} bytes", repeat=False)
    return bytes(received)


def _refusal(status: int, retry_after: str | None, received: bytes) -> Failure:
    said = " ".join(received[:200].decode("utf-8", "replace").split())
    problem = f"HTTP status {status}" + (f": {said}" if said else "")
    return Failure(problem, repeat=status >= 500 or status in _REPEATED, wait=_seconds(retry_after))


def _seconds(retry_after: str | None) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date; None where it is neither."""
    if retry_after is None:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def read_reply(received: bytes) -> Reply:
    """The first choice of a chat completion.

    Raises:
        Failure: the body is no chat completion; asking again may help, as proxies and overloaded servers cut bodies.
    """
    try:
        body = json.loads(received)
        choice = body["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Failure("the response is not the JSON of a chat completion", repeat=True) from error
    if not isinstance(text, str):
        raise Failure("the chat completion has no text", repeat=True)
    return Reply(text, _tokens(body.get("usage")), finish == "length")


def _tokens(usage: Any) -> tuple[int, int] | None:
    counts = [usage.get(f"{part}_tokens") if isinstance(usage, dict) else None for part in ("prompt", "completion")]
    prompt, completion = (count if type(count) is int and 0 <= count < 2**40 else None for count in counts)
    return None if prompt is None or completion is None else (prompt, completion)

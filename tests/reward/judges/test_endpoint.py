"""The client against a server that misbehaves: a verdict or an honest "no verdict", in order, within the deadline."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from posttrain.config.errors import UserError
from posttrain.config.reward_schema import EndpointSection
from posttrain.reward.judges import endpoint as endpoint_module
from posttrain.reward.judges import transport
from posttrain.reward.judges.endpoint import Endpoint
from posttrain.reward.judges.transport import Failure, read_reply
from posttrain.reward.judges.types import Costs, Question, Unreadable
from tests.reward.judges.judge_server import Asked, Handler, Running, serving

SLACK = 5.0  # seconds beyond a deadline that a busy machine may take; far less than a server here hangs


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other address is an error of the test."""
    connect = socket.socket.connect

    def checked(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX or address[0] == "127.0.0.1", address
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", checked)


def read_number(text: str) -> Mapping[str, Any]:
    if not text.isdecimal():
        raise Unreadable("no number")
    return {"number": int(text)}


def ask_number(number: int, template: str = "test/1") -> Question:
    return Question(template, ({"role": "user", "content": f"{number}"},), read_number)


def number_of(asked: Asked) -> int:
    return int(asked.payload["messages"][0]["content"])


def echo(handler: Handler, asked: Asked) -> None:
    handler.say(asked.payload["messages"][0]["content"])


def requests_of(server: Running, count: int) -> int:
    """Requests that the server has received, once they are so many: a client may give up before the server has looked."""
    end = time.monotonic() + 5
    while len(server.asked) < count and time.monotonic() < end:
        time.sleep(0.01)
    return len(server.asked)


def test_verdicts_come_in_the_order_of_the_questions_however_late_each_reply_is() -> None:
    delays = random.Random(3).sample(range(12), 12)

    def respond(handler: Handler, asked: Asked) -> None:
        time.sleep(delays[number_of(asked)] / 100)
        echo(handler, asked)

    with serving(respond) as server:
        verdicts = Endpoint("test", server.section()).ask([ask_number(number) for number in range(12)])
    assert [verdict.values for verdict in verdicts] == [{"number": number} for number in range(12)]


def test_the_request_is_a_chat_completion_with_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "abc")
    with serving(echo) as server:
        section = server.section(api_key_variable="JUDGE_KEY", max_new_tokens=77, url=server.url + "/")
        Endpoint("test", section).ask([ask_number(5)])
        Endpoint("test", server.section()).ask([ask_number(5)])
    first, second = server.asked
    assert first.path == "/v1/chat/completions"
    assert first.payload == {
        "model": "small",
        "messages": [{"role": "user", "content": "5"}],
        "max_tokens": 77,
        "temperature": 0.0,
    }
    assert first.headers["authorization"] == "Bearer abc" and "authorization" not in second.headers


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_than_allowed_are_under_way(concurrency: int) -> None:
    """With one at a time the last waits for 2 s, which is more than its own deadline: that counts from when it is sent."""
    lock, together = threading.Lock(), threading.Barrier(concurrency)
    active, counts = 0, []

    def respond(handler: Handler, asked: Asked) -> None:
        nonlocal active
        with lock:
            active += 1
            counts.append(active)
        together.wait(5)  # passed only by as many as are allowed
        time.sleep(0.4)
        with lock:  # before the reply, which lets the next one start
            active -= 1
        echo(handler, asked)

    with serving(respond) as server:
        endpoint = Endpoint("test", server.section(concurrency=concurrency, timeout_seconds=1.9))
        verdicts = endpoint.ask([ask_number(number) for number in range(6)])
    assert max(counts) <= concurrency
    assert [verdict.values for verdict in verdicts] == [{"number": number} for number in range(6)]


def drop(handler: Handler, asked: Asked) -> None:
    handler.connection.close()
    handler.close_connection = True


def cut_body(handler: Handler, asked: Asked) -> None:
    handler.send_response(200)
    handler.send_header("content-length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices"')
    handler.close_connection = True


def endless(handler: Handler, asked: Asked) -> None:
    """A stream of harmless bytes, each in time, that never ends."""
    handler.send_response(200)
    handler.send_header("transfer-encoding", "chunked")
    handler.end_headers()
    while not handler.running.stop.wait(0.02):
        handler.wfile.write(b"1\r\n \r\n")
        handler.wfile.flush()


def huge(handler: Handler, asked: Asked) -> None:
    handler.send(b" " * (transport.LARGEST_BODY + 1))


def no_http(handler: Handler, asked: Asked) -> None:
    handler.wfile.write(b"\x00\x01 not http at all\r\n\r\n")
    handler.close_connection = True


def compressed(handler: Handler, asked: Asked) -> None:
    handler.send(b"\x1f\x8b\x08\x00garbage", content_encoding="gzip")


MISBEHAVIOUR: dict[str, tuple[Callable[[Handler, Asked], None], str]] = {
    "silent": (lambda handler, asked: handler.hang(), "no complete reply within 1 s"),
    "endless stream": (endless, "no complete reply within 1 s"),
    "dropped": (drop, "RemoteProtocolError"),
    "cut body": (cut_body, "RemoteProtocolError"),
    "no HTTP": (no_http, "RemoteProtocolError"),
    "500": (lambda handler, asked: handler.send(b"out of memory", 500), "HTTP status 500: out of memory"),
    "429": (lambda handler, asked: handler.send(b"", 429), "HTTP status 429"),
    "401": (lambda handler, asked: handler.send(b"bad key", 401), "HTTP status 401: bad key"),
    "redirect": (lambda handler, asked: handler.send(b"", 307, location="http://192.0.2.1/"), "HTTP status 307"),
    "no JSON": (lambda handler, asked: handler.send(b"<html>"), "not the JSON of a chat completion"),
    "deep JSON": (lambda handler, asked: handler.send(b"[" * 200_000), "not the JSON of a chat completion"),
    "long number": (lambda handler, asked: handler.send(b"9" * 10_000), "not the JSON of a chat completion"),
    "other JSON": (lambda handler, asked: handler.send(b'{"choices": []}'), "not the JSON of a chat completion"),
    "a list": (lambda handler, asked: handler.send(b"[1]"), "not the JSON of a chat completion"),
    "no text": (lambda handler, asked: handler.say(None), "no text"),
    "compressed": (compressed, "not the JSON of a chat completion"),
    "huge body": (huge, "longer than"),
    "nonsense": (lambda handler, asked: handler.say("I would say seven."), "no number"),
    "cut verdict": (lambda handler, asked: handler.say("I would", finish="length"), "cut at max_new_tokens (512)"),
}


@pytest.mark.parametrize("kind", MISBEHAVIOUR)
def test_misbehaviour_gives_no_verdict_in_time_and_nothing_is_kept(kind: str) -> None:
    respond, problem = MISBEHAVIOUR[kind]
    with serving(respond) as server:
        deadline = 1.0 if "within" in problem else 5.0
        endpoint = Endpoint("test", server.section(timeout_seconds=deadline))
        began = time.monotonic()
        (verdict,) = endpoint.ask([ask_number(5)])
        assert time.monotonic() - began < deadline + SLACK
        assert verdict.values is None and problem in verdict.problem and len(verdict.problem) < 500
        assert verdict.evidence()["no_verdict"] == verdict.problem and not verdict.cached
        endpoint.ask([ask_number(5)])
        assert requests_of(server, 2) == 2, "the question is asked again, not remembered as unanswered"
    assert endpoint.costs.no_verdicts == endpoint.costs.questions == 2 and endpoint.costs.cache_hits == 0


def test_a_server_that_is_down_gives_no_verdict() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        section = EndpointSection(url=f"http://127.0.0.1:{taken.getsockname()[1]}", model="small", retries=1)
        (verdict,) = Endpoint("test", section, first_wait=0.01).ask([ask_number(1)])
    assert verdict.values is None and "ConnectError" in verdict.problem and "after 2 requests" in verdict.problem


def test_a_batch_ends_at_its_deadline_with_what_was_answered() -> None:
    def respond(handler: Handler, asked: Asked) -> None:
        echo(handler, asked) if number_of(asked) % 2 else handler.hang()

    with serving(respond) as server:
        section = server.section(timeout_seconds=60.0, batch_timeout_seconds=1.5, retries=5)
        endpoint = Endpoint("test", section)
        began = time.monotonic()
        verdicts = endpoint.ask([ask_number(number) for number in range(6)])
        assert time.monotonic() - began < 1.5 + SLACK
    assert [verdict.values and verdict.values["number"] for verdict in verdicts] == [None, 1, None, 3, None, 5]
    assert "within" in verdicts[0].problem and endpoint.costs.no_verdicts == 3


def test_questions_that_wait_for_a_slot_end_at_the_deadline_too() -> None:
    with serving(lambda handler, asked: handler.hang()) as server:
        section = server.section(timeout_seconds=60.0, batch_timeout_seconds=1.0, concurrency=1)
        began = time.monotonic()
        verdicts = Endpoint("test", section).ask([ask_number(number) for number in range(50)])
        assert time.monotonic() - began < 1.0 + SLACK
        assert all(verdict.values is None for verdict in verdicts) and requests_of(server, 1) == 1


def test_a_batch_returns_at_its_deadline_whatever_its_requests_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that heeds no deadline, nor its cancellation, stands for a connection that will not close."""

    async def stuck(*arguments: Any, **options: Any) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(3.0)

    monkeypatch.setattr(endpoint_module, "ask", stuck)
    began = time.monotonic()
    section = EndpointSection(url="http://127.0.0.1:9/v1", model="small", batch_timeout_seconds=0.1)
    (verdict,) = Endpoint("test", section).ask([ask_number(1)])
    assert verdict.values is None and time.monotonic() - began < 2.5


def test_failures_are_repeated_and_counted() -> None:
    def respond(handler: Handler, asked: Asked) -> None:
        bad = [drop, lambda handler, asked: handler.send(b"", 503), lambda handler, asked: handler.send(b"{")]
        turn = len(handler.running.asked) - 1
        (bad[turn] if turn < 3 else echo)(handler, asked)

    with serving(respond) as server:
        endpoint = Endpoint("test", server.section(retries=3), first_wait=0.01)
        (verdict,) = endpoint.ask([ask_number(5)])
    assert verdict.values == {"number": 5}
    assert (endpoint.costs.requests, endpoint.costs.retries, endpoint.costs.no_verdicts) == (4, 3, 0)


@pytest.mark.parametrize(("status", "requests"), [(400, 1), (401, 1), (404, 1), (422, 1), (408, 3), (429, 3), (502, 3)])
def test_only_what_may_pass_is_repeated(status: int, requests: int) -> None:
    with serving(lambda handler, asked: handler.send(b"", status)) as server:
        (verdict,) = Endpoint("test", server.section(retries=2), first_wait=0.005).ask([ask_number(5)])
        assert len(server.asked) == requests and verdict.values is None


def test_the_server_is_left_in_peace_as_long_as_it_asks() -> None:
    times: list[float] = []

    def respond(handler: Handler, asked: Asked) -> None:
        times.append(time.monotonic())
        handler.send(b"", 429, retry_after="1") if len(times) == 1 else echo(handler, asked)

    with serving(respond) as server:
        (verdict,) = Endpoint("test", server.section(retries=1), first_wait=0.001).ask([ask_number(5)])
    assert verdict.values == {"number": 5} and times[1] - times[0] >= 1.0


def test_a_wait_beyond_the_deadline_is_not_begun() -> None:
    with serving(lambda handler, asked: handler.send(b"", 429, retry_after="3600")) as server:
        began = time.monotonic()
        (verdict,) = Endpoint("test", server.section(retries=9)).ask([ask_number(5)])
        assert time.monotonic() - began < SLACK and len(server.asked) == 1
    assert "leaves no time" in verdict.problem


@pytest.mark.parametrize(
    ("header", "low", "high"),
    [(None, None, None), ("7", 7, 7), ("soon", None, None), ("-3", None, None), ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0)],
)
def test_the_header_that_asks_for_patience(header: str | None, low: float | None, high: float | None) -> None:
    seconds = transport._seconds(header)
    assert (seconds is None) == (low is None)
    assert seconds is None or (low is not None and high is not None and low <= seconds <= high)


def test_equal_questions_are_asked_once_and_replies_are_remembered() -> None:
    with serving(echo) as server:
        endpoint = Endpoint("test", server.section(prompt_price=2e6, completion_price=1e6))
        verdicts = endpoint.ask([ask_number(5), ask_number(6), ask_number(5)])
        assert [verdict.cached for verdict in verdicts] == [False, False, True]
        assert endpoint.ask([ask_number(5)])[0].cached
        assert not endpoint.ask([ask_number(5, "test/2")])[0].cached, "another wording is another question"
        assert len(server.asked) == 3
    # Three replies of 11 and 7 tokens at 2 and 1 a token.
    assert endpoint.costs == Costs(5, 2, 0, 3, 0, 33, 21, 0, 3 * (11 * 2.0 + 7 * 1.0))
    assert (endpoint.costs + endpoint.costs).to_json()["prompt_tokens"] == 66


@pytest.mark.parametrize("usage", [None, [], "many", {}, {"prompt_tokens": -1, "completion_tokens": 2}, {"prompt_tokens": True}])
def test_a_reply_without_a_usable_count_of_tokens_is_said_to_have_none(usage: Any) -> None:
    with serving(lambda handler, asked: handler.say("5", usage=usage)) as server:
        endpoint = Endpoint("test", server.section(prompt_price=1.0))
        assert endpoint.ask([ask_number(5)])[0].values == {"number": 5}
    assert endpoint.costs.uncounted == 1 and endpoint.costs.price == endpoint.costs.prompt_tokens == 0


def test_it_can_be_called_where_an_event_loop_runs_and_from_threads() -> None:
    with serving(echo) as server:
        endpoint = Endpoint("test", server.section())

        async def inside() -> Any:
            return endpoint.ask([ask_number(1)])[0].values

        assert asyncio.run(inside()) == {"number": 1}
        found: list[Any] = []
        threads = [
            threading.Thread(target=lambda number=number: found.extend(endpoint.ask([ask_number(number)]))) for number in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    assert sorted(verdict.values["number"] for verdict in found) == [0, 1, 2, 3] and endpoint.costs.questions == 5


def test_half_a_surrogate_pair_in_a_text_stops_nothing() -> None:
    with serving(lambda handler, asked: handler.say("4")) as server:
        broken = Question("test/1", ({"role": "user", "content": "\ud800"},), read_number)
        assert Endpoint("test", server.section()).ask([broken])[0].values == {"number": 4}


def test_no_questions_send_nothing() -> None:
    with serving(echo) as server:
        assert Endpoint("test", server.section()).ask([]) == [] and not server.asked


def test_an_unforeseen_error_costs_its_own_question_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(text: str) -> Mapping[str, Any]:
        raise ZeroDivisionError

    async def ask(client: Any, url: str, payload: Mapping[str, Any], *arguments: Any, **options: Any) -> Any:
        if payload["messages"][0]["content"] == "7":
            raise OverflowError("from a library")
        return await transport.ask(client, url, payload, *arguments, **options)

    monkeypatch.setattr(endpoint_module, "ask", ask)
    unread = Question("test/1", ({"role": "user", "content": "5"},), broken)
    with serving(echo) as server:
        verdicts = Endpoint("test", server.section()).ask([unread, ask_number(6), ask_number(7)])
    assert [verdict.values is None for verdict in verdicts] == [True, False, True]
    assert "ZeroDivisionError" in verdicts[0].problem and verdicts[2].problem == "OverflowError: from a library"


def test_a_cache_that_hangs_holds_up_neither_other_questions_nor_the_deadline() -> None:
    hangs = threading.Event()
    with serving(echo) as server:
        endpoint = Endpoint("test", server.section(batch_timeout_seconds=2.0))
        put = endpoint._cache.put

        def stuck(key: str, text: str) -> None:
            if "1" in text:
                hangs.wait(60)
            put(key, text)

        endpoint._cache.put = stuck  # type: ignore[method-assign]
        began = time.monotonic()
        late, other = endpoint.ask([ask_number(1), ask_number(2)])
        seconds = time.monotonic() - began
        hangs.set()
    assert seconds < 2.0 + SLACK
    assert other.values is not None and late.values is None and "not answered within" in late.problem


def test_missing_verdicts_are_warned_about_once_a_call(caplog: pytest.LogCaptureFixture) -> None:
    with serving(lambda handler, asked: handler.say("?")) as server:
        Endpoint("strict", server.section()).ask([ask_number(1), ask_number(2)])
    (record,) = caplog.records
    assert record.getMessage() == "judge strict: no verdict on 2 of 2, for example: no number"


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://host/v1", "http://", "http://host:port/v1", "http://a b/", "http://h?x=1"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="is no address of an endpoint; write http"):
        Endpoint("test", EndpointSection(url=url, model="small"))


@pytest.mark.parametrize("value", [None, "", "  ", "käy", "a\nb"])
def test_a_key_that_is_not_there_is_refused(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(UserError, match="'JUDGE_KEY' holds no key"):
        Endpoint("test", EndpointSection(url="http://127.0.0.1:1/v1", model="small", api_key_variable="JUDGE_KEY"))


def test_a_reply_is_read_strictly() -> None:
    body = {
        "choices": [{"message": {"content": "x"}, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4},
    }
    reply = read_reply(json.dumps(body).encode())
    assert (reply.text, reply.tokens, reply.cut) == ("x", (3, 4), True)
    for broken in (b"", b"null", b"\xff", b'{"choices": {"0": 1}}', b'{"choices": [[1]]}', b'{"choices": [{"message": "x"}]}'):
        with pytest.raises(Failure):
            read_reply(broken)

"""Streams whose engine, client or time does not go as it should."""

import asyncio
import contextlib
import json
import socket
import time
from types import SimpleNamespace

import pytest

from deepseek_jax.inference.engine import GREEDY
from deepseek_jax.inference.job import Delta, Job, Usage
from deepseek_jax.serving import answering
from deepseek_jax.serving import server as server_module
from deepseek_jax.serving.service import Limits, Service
from tests.serving import asking
from tests.serving.served import fake_model, served
from tests.support.patience import SECONDS, wait_for


@contextlib.contextmanager
def streaming(running, **body):
    body = {"prompt": "once", "max_tokens": 4000, "stream": True} | body
    with asking.stream("POST", running.url + "/v1/completions", json=body) as answer:
        yield answer


def events(answer):
    return [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]


@pytest.fixture(scope="module")
def slow():
    """A server whose engine makes a token in 20 ms, of one text at a time; two others may wait."""
    model = fake_model(None, rows=1, most_waiting=2, seconds_per_token=0.02)
    with served(model, Limits(heartbeat_seconds=0.1)) as running:
        yield running


def test_heartbeats_come_while_nothing_else_does(server):
    lines, goes_on = [], server.service.model.engine.goes_on
    try:
        with streaming(server, prompt="STALL", max_tokens=2) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            for line in filter(None, answer.iter_lines()):
                lines.append(line)
                if len(lines) == 5:
                    goes_on.set()
    finally:
        goes_on.clear()
    assert lines[:5] == [": waiting"] * 5 and lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


def test_heartbeats_come_while_tokens_are_held_back(monkeypatch):
    """The text may be the beginning of a stop string, token after token: here for 0.36 s, on a clock of the test's."""
    now = 0.0
    monkeypatch.setattr(answering, "time", SimpleNamespace(monotonic=lambda: now, time=time.time))

    class Held:
        def push(self, delta):
            return [{"text": delta.text}] if delta.finish_reason else []

    async def arrivals():
        nonlocal now
        for i in range(1, 10):
            now += 0.04
            yield 0, Delta("greet" if i == 9 else "", [i], None, "stop" if i == 9 else None, Usage(1, 0, i), 0)

    wishes = SimpleNamespace(num_choices=1, usage_always=False, usage_at_end=False)
    service = Service(model=fake_model(None), limits=Limits(heartbeat_seconds=0.1))
    answer = answering.Answer(service, answering.Form("", "", ""), wishes, [None], [Held()])

    async def collect():
        return [chunk and chunk["choices"] async for chunk in answer._chunks(arrivals())]

    assert asyncio.run(collect()) == [None, None, [{"text": "greet"}]]


def test_a_stream_ends_with_done_whatever_happens(server, slow):
    with streaming(server, max_tokens=3) as answer:
        assert events(answer)[-1] == "[DONE]"
    with streaming(server, prompt="BREAK") as answer:
        *_, error, done = events(answer)
    assert done == "[DONE]" and json.loads(error)["error"]["code"] == "engine_error"


def test_a_text_has_the_time_of_a_request(server):
    begin = time.monotonic()
    with streaming(server, max_tokens=2) as answer:
        assert events(answer)[-1] == "[DONE]"
    seconds = server.service.limits.request_seconds
    assert begin + seconds <= server.service.model.engine.jobs[-1].deadline <= time.monotonic() + seconds


def test_a_text_ends_with_its_time(server):
    with streaming(server, prompt="LATE") as answer:
        *chunks, done = events(answer)
    last = json.loads(chunks[-1])["choices"][0]
    assert done == "[DONE]" and last["finish_reason"] == "length" and last["stop_reason"] == "deadline"
    assert "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)


def test_a_time_that_is_over_before_the_first_token_is_told(server):
    body = {"prompt": "TOO LATE", "max_tokens": 2}
    answer = asking.post(server.url + "/v1/completions", json=body)
    assert answer.status_code == 408 and answer.json()["error"]["code"] == "request_timeout"
    with streaming(server, **body) as answer:
        error, done = events(answer)
    assert json.loads(error)["error"]["code"] == "request_timeout" and done == "[DONE]"


def test_texts_without_a_token_in_time_cost_the_others_nothing(server):
    answer = asking.post(server.url + "/v1/completions", json={"prompt": ["b", "TOO LATE"], "max_tokens": 2})
    assert answer.status_code == 200
    other, late = answer.json()["choices"]
    assert (late["text"], late["finish_reason"], late["stop_reason"]) == ("", "length", "deadline")
    assert other["text"]


def test_a_text_that_is_too_late_beside_another_ends_with_its_deadline():
    engine, heard = fake_model(None).engine, []
    options = {"max_new_tokens": 2, "sampling": GREEDY}
    engine.submit(Job(prompt=engine.tokenizer.encode("STALL"), **options), lambda delta: None)
    late = Job(prompt=engine.tokenizer.encode("TOO LATE"), deadline=time.monotonic(), **options)
    engine.submit(late, heard.append)
    try:
        wait_for(lambda: heard)
    finally:
        engine.close()
    assert [delta.finish_reason for delta in heard] == ["deadline"]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompt", ["once", "STALL"])
def test_the_job_of_a_client_that_has_gone_is_cancelled(slow, stream, prompt):
    engine = slow.service.model.engine
    before = engine.finished["cancelled"]
    body = json.dumps({"prompt": prompt, "max_tokens": 4000, "stream": stream}).encode()
    with connected(slow) as connection:
        send(connection, body)
        wait_for(lambda: engine.num_jobs == 1)
    wait_for(lambda: engine.num_jobs == 0)
    assert engine.finished["cancelled"] == before + 1


@contextlib.contextmanager
def busy(slow, num_jobs):
    """Let so many texts run or wait."""
    engine = slow.service.model.engine
    with contextlib.ExitStack() as stack:
        for i in range(num_jobs):
            stack.enter_context(streaming(slow))
            wait_for(lambda: engine.running == 1 and engine.num_jobs == i + 1)  # noqa: B023
        yield
    wait_for(lambda: engine.num_jobs == 0)


def test_a_full_queue_says_when_to_come_again(slow):
    with busy(slow, 3):  # one runs, two wait
        for stream in (False, True):
            body = {"prompt": "a", "stream": stream}
            answer = asking.post(slow.url + "/v1/completions", json=body)
            assert answer.status_code == 429 and answer.headers["retry-after"] == "3"
            assert answer.json()["error"]["type"] == "rate_limit_error"


def test_of_several_texts_all_or_none_are_taken(slow):
    """The second finds no room, so the first does not go on either."""
    engine = slow.service.model.engine
    with busy(slow, 2):
        before = engine.finished["cancelled"]
        answer = asking.post(slow.url + "/v1/completions", json={"prompt": ["a", "b"]})
        assert answer.status_code == 429
        wait_for(lambda: engine.num_jobs == 2 and engine.finished["cancelled"] == before + 1)


def test_a_client_that_does_not_read_is_dropped(server, monkeypatch):
    """Each of 60 texts begins with its prompt: 240 kB, where socket and transport hold half of that."""
    monkeypatch.setattr(server_module, "UNREAD_SECONDS", 0.2)
    made = server_module._Protocol.connection_made

    def connection_made(self, transport):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        made(self, transport)

    monkeypatch.setattr(server_module._Protocol, "connection_made", connection_made)
    body = {"prompt": "a" * 4000, "max_tokens": 2, "stream": True, "n": 60, "echo": True}
    with connected(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        send(connection, json.dumps(body).encode())
        received = connection.recv(100)
        wait_for(lambda: server.service.model.engine.num_jobs == 0 and server.service.metrics.active == 0)
        with contextlib.suppress(ConnectionResetError):
            received += b"".join(iter(lambda: connection.recv(65536), b""))
    assert received.startswith(b"HTTP/1.1 200 ") and b"[DONE]" not in received


def test_a_client_that_sends_nothing_is_dropped(server, monkeypatch):
    monkeypatch.setattr(server_module, "HEAD_SECONDS", 0.1)
    for beginning in (b"", b"GET /health HT"):
        with connected(server) as connection:
            connection.sendall(beginning)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(10) == b""


def connected(running):
    host, port = running.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=SECONDS)


def send(connection, body):
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

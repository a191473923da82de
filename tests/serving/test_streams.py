"""Streams whose engine, client or time does not go as it should."""

import contextlib
import json
import socket
import time

import httpx2
import pytest

from deepseek_jax.serving import server as server_module
from deepseek_jax.serving.service import Limits
from tests.serving.served import fake_model, served


@contextlib.contextmanager
def streaming(running, **body):
    body = {"prompt": "once", "max_tokens": 4000, "stream": True} | body
    with httpx2.stream("POST", running.url + "/v1/completions", json=body, timeout=20) as answer:
        yield answer


def events(answer):
    return [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]


def wait_for(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


@pytest.fixture(scope="module")
def slow():
    """A server whose engine makes a token in 20 ms, of one text at a time; two others may wait."""
    model = fake_model(None, rows=1, most_waiting=2, seconds_per_token=0.02)
    with served(model, Limits(heartbeat_seconds=0.1)) as running:
        yield running


@pytest.fixture(scope="module")
def brief():
    """A server that has 0.6 s for a request."""
    with served(fake_model(None, seconds_per_token=0.02), Limits(request_seconds=0.6)) as running:
        yield running


def test_heartbeats_come_while_nothing_else_does(server):
    with streaming(server, prompt="STALL", max_tokens=2) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines.count(": waiting") >= 5 and lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


def test_heartbeats_come_while_tokens_are_held_back(slow):
    """The text may be the beginning of a stop string, token after token."""
    with streaming(slow, prompt="greet", stop=["Grüße, 世界! and more"], max_tokens=100) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines.index(": waiting") < min(i for i, line in enumerate(lines) if "Grü" in line)
    assert lines[-1] == "data: [DONE]"


def test_a_stream_ends_with_done_whatever_happens(server, slow):
    with streaming(server, max_tokens=3) as answer:
        assert events(answer)[-1] == "[DONE]"
    with streaming(server, prompt="BREAK") as answer:
        *_, error, done = events(answer)
    assert done == "[DONE]" and json.loads(error)["error"]["code"] == "engine_error"


def test_a_text_ends_with_its_time(brief):
    with streaming(brief) as answer:
        *chunks, done = events(answer)
    last = json.loads(chunks[-1])["choices"][0]
    assert done == "[DONE]" and last["finish_reason"] == "length" and last["stop_reason"] == "deadline"
    assert len(chunks) < 60


def test_a_time_that_is_over_before_the_first_token_is_told(brief):
    body = {"prompt": "STALL", "max_tokens": 2}
    answer = httpx2.post(brief.url + "/v1/completions", json=body)
    assert answer.status_code == 408 and answer.json()["error"]["code"] == "request_timeout"
    with streaming(brief, **body) as answer:
        error, done = events(answer)
    assert json.loads(error)["error"]["code"] == "request_timeout" and done == "[DONE]"


def test_texts_without_a_token_in_time_cost_the_others_nothing(brief):
    answer = httpx2.post(brief.url + "/v1/completions", json={"prompt": ["STALL", "b"], "max_tokens": 2})
    assert answer.status_code == 200
    stalled, other = answer.json()["choices"]
    assert (stalled["text"], stalled["finish_reason"], stalled["stop_reason"]) == ("", "length", "deadline")
    assert other["text"]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompt", ["once", "STALL"])
def test_the_job_of_a_client_that_has_gone_is_cancelled(slow, stream, prompt):
    engine = slow.service.model.engine
    before = engine.finished["cancelled"]
    body = json.dumps({"prompt": prompt, "max_tokens": 4000, "stream": stream}).encode()
    with connected(slow) as connection:
        send(connection, body)
        wait_for(lambda: engine.num_jobs == 1)
    wait_for(lambda: engine.num_jobs == 0, 0.5)
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
            answer = httpx2.post(slow.url + "/v1/completions", json=body)
            assert answer.status_code == 429 and answer.headers["retry-after"] == "3"
            assert answer.json()["error"]["type"] == "rate_limit_error"


def test_of_several_texts_all_or_none_are_taken(slow):
    """The second finds no room, so the first does not go on either."""
    engine = slow.service.model.engine
    with busy(slow, 2):
        before = engine.finished["cancelled"]
        answer = httpx2.post(slow.url + "/v1/completions", json={"prompt": ["a", "b"]})
        assert answer.status_code == 429
        wait_for(lambda: engine.num_jobs == 2 and engine.finished["cancelled"] == before + 1)


def test_a_client_that_does_not_read_is_dropped(server, monkeypatch):
    monkeypatch.setattr(server_module, "UNREAD_SECONDS", 0.2)
    made = server_module._Protocol.connection_made

    def connection_made(self, transport):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        made(self, transport)

    monkeypatch.setattr(server_module._Protocol, "connection_made", connection_made)
    engine = server.service.model.engine
    before = engine.finished["cancelled"]
    with connected(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        send(connection, json.dumps({"prompt": "once", "max_tokens": 4000, "stream": True, "n": 4}).encode())
        wait_for(lambda: engine.num_jobs > 0)
        wait_for(lambda: engine.num_jobs == 0 and server.service.metrics.active == 0, 10)
    wait_for(lambda: "gone" in server.lines[-1] or " 200 " in server.lines[-1])
    assert engine.finished["cancelled"] >= before


def test_a_client_that_sends_nothing_is_dropped(server, monkeypatch):
    monkeypatch.setattr(server_module, "HEAD_SECONDS", 0.1)
    for beginning in (b"", b"GET /health HT"):
        with connected(server) as connection:
            connection.sendall(beginning)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(10) == b""


def connected(running):
    host, port = running.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def send(connection, body):
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

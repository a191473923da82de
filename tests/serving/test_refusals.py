"""Requests that cannot be answered: each gets its status and a message, and the server goes on."""

import asyncio
import contextlib
import gzip
import json
import socket
import tracemalloc

import openai
import pytest
from starlette.requests import Request

from deepseek_jax.serving import body
from deepseek_jax.serving.body import read_bytes
from deepseek_jax.serving.errors import ApiError
from deepseek_jax.serving.service import Limits
from tests.serving import asking
from tests.serving.conftest import BODY_BYTES
from tests.serving.served import fake_model, served
from tests.support.patience import SECONDS, wait_for


def post(server, content, path="/v1/completions", kind="application/json", **headers):
    if not isinstance(content, str | bytes):
        content = json.dumps(content)
    return asking.post(server.url + path, content=content, headers={"content-type": kind, **headers})


def refused(answer, status, param=None, code=None):
    error = answer.json()["error"]
    assert answer.status_code == status, answer.text
    assert error.keys() == {"message", "type", "param", "code"} and error["message"]
    if param is not None:
        assert error["param"] == param and param.split(".")[0] in error["message"], error
    if code is not None:
        assert error["code"] == code
    return error["message"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1, 2]",
        "null",
        '{"prompt": "a", "temperature": Infinity}',
        "[" * 50_000,
        b'{"prompt": "\xff"}',
        '{"prompt": "\\ud800"}',
        '{"prompt": "a", "stop": ["\\udc00"]}',
        '{"\\ud800": 1}',
    ],
    ids=lambda content: repr(content)[:40],
)
def test_bodies_that_are_no_json(server, content):
    refused(post(server, content), 400, code="invalid_json")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"prompt": "a", "seed": ' + "9" * 5000 + "}", "a number of more than 4,300 digits; write fewer"),
        ('{"prompt": "a", "temperature": NaN}', "the body has NaN, which is not JSON; write a number"),
        ('{"prompt": null}', "prompt is null; write a text"),
        ('{"prompt": "a", "temperature": true}', "temperature is true; write a number"),
        ('{"prompt": "a", "stop": {"a": [null, false]}}', 'stop is {"a": [null, false]}; write'),
        ('{"prompt": "a", "echo": "it\'s"}', 'echo is "it\'s"; write true or false'),
        ('{"prompt": "a", "response_format": {"type": null}}', 'is null; its type must be "text", "json_object"'),
        ('{"prompt": "a", "model": "x\\ny"}', r'the model "x\ny" does not exist'),
    ],
)
def test_a_message_speaks_json_and_not_python(server, content, words):
    message = post(server, content).json()["error"]["message"]
    assert words in message, message


def test_a_compressed_body_is_refused_as_such(server):
    answer = post(server, gzip.compress(b'{"prompt": "a"}'), **{"content-encoding": "gzip"})
    assert "gzip" in refused(answer, 415)


@pytest.mark.parametrize(
    "field, value",
    [
        ("prompt", 5),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", ["a", 1]),
        ("prompt", [1, "a"]),
        ("prompt", [True]),
        ("prompt", [-1]),
        ("prompt", [10**30]),
        ("prompt", [275]),
        ("prompt", {"text": "a"}),
        ("max_tokens", -1),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("max_tokens", 10**40),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("presence_penalty", 3),
        ("n", 0),
        ("n", 129),
        ("best_of", 4),
        ("seed", 2**64),
        ("stop", ""),
        ("stop", [""]),
        ("stop", ["a"] * 100),
        ("stop", "a" * 2000),
        ("logprobs", True),
        ("logprobs", 21),
        ("logprobs", -1),
        ("logit_bias", [1]),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"999999": 1}),
        ("logit_bias", {"5": 101}),
        ("stream", 1),
        ("echo", "yes"),
        ("stop_token_ids", [999]),
        ("stream_options", {"include_usage": True}),
        ("suffix", "end"),
        ("use_beam_search", True),
        ("guided_regex", "a+"),
        ("prompt_logprobs", 1),
        ("response_format", {"type": "poem"}),
        ("response_format", "json"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_fields_of_completions(server, field, value):
    num_jobs = len(server.service.model.engine.jobs)
    refused(post(server, {"prompt": "a", "max_tokens": 2} | {field: value}), 400, field)
    assert len(server.service.model.engine.jobs) == num_jobs


def test_numbers_that_json_alone_cannot_bound(server):
    refused(post(server, '{"prompt": "a", "temperature": 1e999}'), 400, "temperature")
    refused(post(server, '{"prompt": "a", "temperature": ' + "9" * 400 + "}"), 400, "temperature")


def test_an_unknown_model_and_what_changes_nothing(server):
    refused(post(server, {"model": "gpt-4", "prompt": "a"}), 404, "model", "model_not_found")
    harmless = {"suffix": "", "user": "u", "service_tier": "auto", "x-unknown": 1, "min_tokens": 0, "max_tokens": 2}
    assert post(server, {"prompt": "a", "best_of": 1, "temperature": None} | harmless).status_code == 200


def test_a_prompt_that_is_too_long(server):
    message = refused(post(server, {"prompt": "a" * 5000}), 400, code="context_length_exceeded")
    assert "5001" in message and "4096" in message
    refused(post(server, {"prompt": "a", "max_tokens": 5000}), 400, "max_tokens", "context_length_exceeded")


def test_more_texts_than_may_wait(server):
    refused(post(server, {"prompt": ["a"] * 65}), 400, "prompt")
    refused(post(server, {"prompt": ["a"] * 2, "n": 40}), 400, "prompt")


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_of_100_mb_is_refused_and_hardly_kept(server, announced, monkeypatch):
    monkeypatch.setattr(body, "DISCARD_SECONDS", SECONDS)
    piece = b"x" * 1_000_000
    content = piece * 100 if announced else (piece for _ in range(100))
    refused(post(server, content), 413, code="body_too_large") if announced else None
    if not announced:
        answer = asking.post(
            server.url + "/v1/completions", content=content, headers={"content-type": "application/json"}
        )
        refused(answer, 413, code="body_too_large")
    assert post(server, {"prompt": "a" * (BODY_BYTES + 1)}).status_code == 413


def test_a_body_that_is_too_large_is_not_kept():
    async def read():
        pieces = iter(range(60))

        async def receive():
            return {"type": "http.request", "body": bytes(1_000_000), "more_body": next(pieces, 0) < 59}

        scope = {"type": "http", "headers": [(b"content-type", b"application/json")]}
        tracemalloc.start()
        try:
            with pytest.raises(ApiError, match="more than 2,500,000 bytes"):
                await read_bytes(Request(scope, receive), 2_500_000, SECONDS)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert asyncio.run(read()) < 8_000_000


def test_the_type_of_a_body_keeps_foreign_pages_out(server):
    """A browser asks before it sends JSON to another server, and is not let in; a form it would send at once."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        refused(post(server, {"prompt": "a"}, kind=kind), 415)
    assert post(server, {"prompt": "a"}, kind="application/json; charset=utf-8").status_code == 200


def test_a_client_that_sends_slowly_is_told_so():
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(served(fake_model(None), Limits(body_seconds=0.2)))
        host, port = running.url.removeprefix("http://").split(":")
        connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=SECONDS))
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head.encode() + b'Content-Length: 50\r\n\r\n{"prompt": "a')
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert b" 408 " in answer.split(b"\r\n")[0] and b"body_too_slow" in answer


def test_addresses_and_methods_that_there_are_not(server):
    refused(asking.get(server.url + "/v1/embeddings"), 404)
    refused(asking.get(server.url + "/v1/completions"), 405)
    refused(post(server, {}, path="/v1/models"), 405)
    refused(asking.get(server.url + "/v1/models/other"), 404, "model", "model_not_found")
    assert asking.get(server.url + "/v1/models/fake").json()["id"] == "fake"


def test_a_fault_of_the_engine_is_told(server, client):
    assert refused(post(server, {"prompt": "BREAK"}), 500, code="engine_error").endswith("on fire")
    with pytest.raises(openai.APIError, match="on fire"):
        list(client.completions.create(model="fake", prompt="BREAK", stream=True))


def test_a_fault_of_ours_tells_nothing_of_itself(server, monkeypatch):
    def fail(*_):
        raise RuntimeError("a secret of ours")

    monkeypatch.setattr(type(server.service.model.engine), "submit", fail)
    for stream in (False, True):
        answer = post(server, {"prompt": "a", "stream": stream})
        assert "secret" not in refused(answer, 500, code="internal_error")
    wait_for(lambda: any("a secret of ours" in line for line in server.lines))


def test_the_server_is_still_there(server, client):
    assert client.completions.create(model="fake", prompt="a", max_tokens=3).choices[0].text
    wait_for(lambda: server.service.model.engine.num_jobs == 0)

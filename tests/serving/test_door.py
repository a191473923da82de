"""Who is let in: hosts, keys, rates; and how a server ends."""

import json
import threading
import time

import httpx2
import openai
import pytest

from deepseek_jax.inputs import is_loopback
from deepseek_jax.serving.door import Rates
from deepseek_jax.serving.server import bind, host_names
from deepseek_jax.serving.service import Limits
from tests.serving.served import fake_model, served

KEYS = ("sk-one", "sk-two")
BODY = {"prompt": "once", "max_tokens": 2}


@pytest.fixture(scope="module")
def locked():
    limits = Limits(requests_per_minute=6)
    with served(fake_model(None), limits, keys=KEYS, origins=("https://example.org",)) as running:
        yield running


def ask(running, key=None, path="/v1/completions", **headers):
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    return httpx2.post(running.url + path, json=BODY, headers=headers)


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer sk-three", "Basic sk-one", "sk-one", "Bearer sk-ön"])
@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/fake", "/metrics", "/tokenizer_info", "/nowhere", "/v1/completions"]
)
def test_without_a_key_nothing_is_told(locked, header, path):
    headers = {} if header is None else {"authorization": header.encode()}
    answer = httpx2.get(locked.url + path, headers=headers)
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key" and "fake" not in answer.text


def test_health_and_the_page_are_open(locked):
    assert httpx2.get(locked.url + "/health").json() == {"status": "ok"}
    page = httpx2.get(locked.url + "/")
    assert page.status_code == 200 and "fake" not in page.text


def test_each_key_has_its_rate(locked):
    answers = [ask(locked, KEYS[0]) for _ in range(7)]
    assert [answer.status_code for answer in answers] == [200] * 6 + [429]
    assert 0 < int(answers[-1].headers["retry-after"]) <= 11
    assert answers[-1].json()["error"]["code"] == "rate_limit_exceeded"
    client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key=KEYS[1], max_retries=0)
    assert client.completions.create(model="fake", prompt="a", max_tokens=2).choices
    with pytest.raises(openai.RateLimitError):
        openai.OpenAI(base_url=f"{locked.url}/v1", api_key=KEYS[0], max_retries=0).models.list()


def test_a_rate_fills_by_the_second():
    rates = Rates(2)
    assert [rates.take("a", 0.0), rates.take("a", 0.0)] == [0, 0] and rates.take("b", 0.0) == 0
    assert rates.take("a", 10.0) == pytest.approx(20.0)
    assert rates.take("a", 30.0) == 0 and rates.take("a", 30.0) > 0
    assert not any(Rates(0).take("a", 0.0) for _ in range(100))


def test_pages_of_named_servers_only_may_call(locked, server):
    asked = {"origin": "https://example.org", "access-control-request-method": "POST"}
    answer = httpx2.options(locked.url + "/v1/completions", headers=asked)
    assert answer.headers["access-control-allow-origin"] == "https://example.org"
    answer = httpx2.options(locked.url + "/v1/completions", headers=asked | {"origin": "https://example.com"})
    assert "access-control-allow-origin" not in answer.headers
    answer = httpx2.options(server.url + "/v1/completions", headers=asked)
    assert answer.status_code == 405 and "access-control-allow-origin" not in answer.headers


def test_a_name_that_points_here_is_not_this_server(server):
    """DNS rebinding: the browser of a user believes that the page and the server are one."""
    for host, status in {"evil.example:80": 403, "localhost:1": 200, "127.0.0.1": 200, "[::1]:80": 200}.items():
        assert httpx2.get(server.url + "/health", headers={"host": host}).status_code == status, host
    assert host_names("0.0.0.0") is None and not is_loopback("0.0.0.0") and is_loopback("::1")


def test_a_port_that_is_taken(server):
    port = int(server.url.rpartition(":")[2])
    with pytest.raises(ValueError, match=rf"--port={port} is taken.*--port=0"):
        bind("127.0.0.1", port)
    with pytest.raises(ValueError, match="not an address|cannot be served"):
        bind("203.0.113.7", 0)


def test_running_requests_end_and_new_ones_are_refused():
    model = fake_model(None, seconds_per_token=0.02)
    texts = []
    with served(model) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        whole = lambda: texts.append(client.completions.create(model="fake", prompt="a", max_tokens=40))  # noqa: E731
        asking = threading.Thread(target=whole)
        asking.start()
        with httpx2.Client(base_url=running.url) as other:
            assert other.get("/health").status_code == 200
            while not model.engine.num_jobs:
                time.sleep(0.01)
            running.stop()
            time.sleep(0.2)
            for answer in (other.get("/health"), other.post("/v1/completions", json=BODY)):
                assert answer.status_code == 503 and answer.json()["error"]["code"] == "shutting_down"
        asking.join(10)
    assert texts[0].usage.completion_tokens == 40
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(running.url + "/health")


def test_what_runs_too_long_is_told_that_the_server_ends():
    model = fake_model(None, seconds_per_token=0.05)
    with served(model, drain_seconds=0.3) as running:
        body = BODY | {"max_tokens": 4000, "stream": True}
        with httpx2.stream("POST", running.url + "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            running.stop()
            *_, error, done = [line.removeprefix("data: ") for line in lines if line]
    assert json.loads(error)["error"]["code"] == "shutting_down" and done == "[DONE]"


def test_every_request_has_a_line_without_contents(server):
    httpx2.post(server.url + "/v1/completions", json={"prompt": "a secret", "max_tokens": 3})
    httpx2.get(server.url + "/nowhere%1b[31m")
    time.sleep(0.1)
    completion, nowhere = server.lines[-2:]
    assert completion.startswith("POST /v1/completions 200 ") and "prompt=9 cached=0 completion=3" in completion
    assert "secret" not in completion and "\x1b" not in nowhere and " 404 " in nowhere

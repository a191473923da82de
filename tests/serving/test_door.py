"""Who is let in: hosts, keys, rates; and how a server ends."""

import json
import threading
from types import SimpleNamespace

import httpx2
import openai
import pytest

from deepseek_jax.inputs import is_loopback
from deepseek_jax.serving import door
from deepseek_jax.serving import server as server_module
from deepseek_jax.serving.door import Rates
from deepseek_jax.serving.server import bind, host_names
from deepseek_jax.serving.service import Limits
from tests.serving import asking
from tests.serving.served import fake_model, served
from tests.support.patience import SECONDS, wait_for

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
    return asking.post(running.url + path, json=BODY, headers=headers)


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer sk-three", "Basic sk-one", "sk-one", "Bearer sk-ön"])
@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/fake", "/metrics", "/tokenizer_info", "/nowhere", "/v1/completions"]
)
def test_without_a_key_nothing_is_told(locked, header, path):
    headers = {} if header is None else {"authorization": header.encode()}
    answer = asking.get(locked.url + path, headers=headers)
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key" and "fake" not in answer.text


def test_health_and_the_page_are_open(locked):
    assert asking.get(locked.url + "/health").json() == {"status": "ok"}
    page = asking.get(locked.url + "/")
    assert page.status_code == 200 and "fake" not in page.text


def test_each_key_has_its_rate(locked, monkeypatch):
    monkeypatch.setattr(door, "time", SimpleNamespace(monotonic=lambda: 1000.0))  # leave comes back every 10 s
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
    answer = asking.options(locked.url + "/v1/completions", headers=asked)
    assert answer.headers["access-control-allow-origin"] == "https://example.org"
    answer = asking.options(locked.url + "/v1/completions", headers=asked | {"origin": "https://example.com"})
    assert "access-control-allow-origin" not in answer.headers
    answer = asking.options(server.url + "/v1/completions", headers=asked)
    assert answer.status_code == 405 and "access-control-allow-origin" not in answer.headers


def test_a_name_that_points_here_is_not_this_server(server):
    """DNS rebinding: the browser of a user believes that the page and the server are one."""
    for host, status in {"evil.example:80": 403, "localhost:1": 200, "127.0.0.1": 200, "[::1]:80": 200}.items():
        assert asking.get(server.url + "/health", headers={"host": host}).status_code == status, host
    assert host_names("0.0.0.0") is None and not is_loopback("0.0.0.0") and is_loopback("::1")


def test_a_port_that_is_taken(server):
    port = int(server.url.rpartition(":")[2])
    with pytest.raises(ValueError, match=rf"--port={port} is taken.*--port=0"):
        bind("127.0.0.1", port)
    with pytest.raises(ValueError, match="not an address|cannot be served"):
        bind("203.0.113.7", 0)


def test_running_requests_end_and_new_ones_are_refused():
    model = fake_model(None)
    texts = []
    with served(model, drain_seconds=SECONDS) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        whole = lambda: texts.append(client.completions.create(model="fake", prompt="STALL", max_tokens=40))  # noqa: E731
        asking_thread = threading.Thread(target=whole)
        asking_thread.start()
        with asking.Client(base_url=running.url) as other:
            assert other.get("/health").status_code == 200
            wait_for(lambda: model.engine.num_jobs)
            running.stop()
            wait_for(lambda: other.get("/health").status_code == 503)
            for answer in (other.get("/health"), other.post("/v1/completions", json=BODY)):
                assert answer.status_code == 503 and answer.json()["error"]["code"] == "shutting_down"
        assert model.engine.num_jobs == 1
        model.engine.goes_on.set()
        asking_thread.join(SECONDS)
    assert texts[0].usage.completion_tokens == 40
    with pytest.raises(httpx2.ConnectError):
        asking.get(running.url + "/health")


def test_what_runs_too_long_is_told_that_the_server_ends(monkeypatch):
    monkeypatch.setattr(server_module, "SHUTDOWN_SECONDS", SECONDS)
    model = fake_model(None, seconds_per_token=0.05)
    with served(model, drain_seconds=0.3) as running:
        body = BODY | {"max_tokens": 4000, "stream": True}
        with asking.stream("POST", running.url + "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            running.stop()
            *_, error, done = [line.removeprefix("data: ") for line in lines if line]
    assert json.loads(error)["error"]["code"] == "shutting_down" and done == "[DONE]"


def test_every_request_has_a_line_without_contents(server):
    before = len(server.lines)

    def line(words):
        return next((line for line in server.lines[before:] if words in line), "")

    asking.post(server.url + "/v1/completions", json={"prompt": "a secret", "max_tokens": 3})
    asking.get(server.url + "/nowhere%1b[31m")
    wait_for(lambda: line("prompt=9 ") and line("/nowhere"))  # a line is written behind the answer
    assert line("prompt=9 ").startswith("POST /v1/completions 200 ")
    assert "prompt=9 cached=0 completion=3" in line("prompt=9 ") and " 404 " in line("/nowhere")
    assert not any("secret" in text or "\x1b" in text for text in server.lines[before:])

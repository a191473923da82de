"""`/metrics`, and the endpoints about tokens."""

import re
import time
from types import SimpleNamespace

import pytest

from deepseek_jax.inference.job import Delta, Usage
from deepseek_jax.serving.answering import Answer, Form
from deepseek_jax.serving.metrics import Histogram, Metrics
from tests.serving import asking
from tests.support.patience import wait_for


def test_metrics_are_prometheus_text(server, client):
    client.completions.create(model="fake", prompt="a", max_tokens=5)
    wait_for(lambda: not server.service.model.engine.num_jobs)  # texts of other tests, which were cancelled
    answer = asking.get(server.url + "/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    values = {}
    for line in answer.text.splitlines():
        if not line.startswith("#"):
            assert re.fullmatch(r'[a-z_]+(\{[a-z_]+="[^"]*"(,[a-z_]+="[^"]*")*\})? [-+.e\d]+', line), line
            name, _, value = line.rpartition(" ")
            values[name.removeprefix("deepseek_jax_")] = float(value)
    assert values["time_to_first_token_seconds_count"] >= 1 and values["inter_token_latency_seconds_count"] >= 4
    assert values['time_to_first_token_seconds_bucket{le="+Inf"}'] == values["time_to_first_token_seconds_count"]
    assert values["draft_acceptance"] == 0.647059 and values['accepted_tokens_total{position="1"}'] == 3
    assert values['expert_tokens_total{layer="1",expert="3"}'] == 7
    assert values["completion_tokens_total"] >= 5 and values["jobs_running"] == 0 and values["cache_pages"] == 64
    assert values['http_responses_total{path="/v1/completions",status="200"}'] >= 1
    families = [line.split()[2] for line in answer.text.splitlines() if line.startswith("# TYPE")]
    assert len(families) == len(set(families)) == answer.text.count("# HELP")


@pytest.mark.parametrize("together", [(1, 1, 1, 1, 1), (5,), (2, 3)])
def test_every_token_behind_the_first_is_counted_however_they_come(together, monkeypatch):
    now, metrics = 100.0, Metrics()
    clock = SimpleNamespace(monotonic=lambda: now, time=time.time)  # the servers of other tests have theirs
    monkeypatch.setattr("deepseek_jax.serving.answering.time", clock)
    monkeypatch.setattr("deepseek_jax.serving.metrics.time", clock)
    answer = Answer(SimpleNamespace(metrics=metrics), Form("", "", ""), SimpleNamespace(num_choices=1), [None], [None])
    for i in together:
        now += 0.5
        answer._observe(0, Delta("", [7] * i, None, None, Usage(1, 0, i), 0))
    between = dict(line.rsplit(" ", 1) for line in metrics.between_tokens.lines("x"))
    assert [*metrics.first_token.lines("x")][-2:] == ["x_sum 0.5", "x_count 1"]
    assert between["x_count"] == "4" and float(between["x_sum"]) == 0.5 * (len(together) - 1)


def test_a_histogram_counts_up_to_each_bound():
    histogram = Histogram((0.1, 1.0))
    for seconds, times in ((0.1, 1), (0.5, 2), (5.0, 1)):
        histogram.observe(seconds, times)
    assert [*histogram.lines("x")] == [
        'x_bucket{le="0.1"} 1',
        'x_bucket{le="1.0"} 3',
        'x_bucket{le="+Inf"} 4',
        "x_sum 6.1",
        "x_count 4",
    ]


def test_tokens_per_second_forget(monkeypatch):
    metrics, now = Metrics(), 1000.0
    monkeypatch.setattr("deepseek_jax.serving.metrics.time", SimpleNamespace(monotonic=lambda: now))
    metrics.count_tokens(50)
    now = 1005.0
    assert "deepseek_jax_tokens_per_second 5\n" in "\n".join(metrics._own())
    now = 1011.0
    assert "deepseek_jax_tokens_per_second 0\n" in "\n".join(metrics._own())


def test_texts_become_ids_and_come_back(server):
    def post(path, body):
        return asking.post(server.url + path, json=body).json()

    tokenizer = server.service.model.tokenizer
    found = post("/tokenize", {"prompt": "hé<｜end▁of▁sentence｜>", "add_special_tokens": False})
    assert found["tokens"] == [*tokenizer.encode("hé"), tokenizer.eos] and found["count"] == 4
    assert post("/detokenize", {"tokens": [tokenizer.bos, *found["tokens"]]}) == {
        "prompt": "<｜begin▁of▁sentence｜>hé<｜end▁of▁sentence｜>"
    }
    assert post("/tokenize", {"prompt": "a"})["tokens"][0] == tokenizer.bos
    assert post("/detokenize", {"tokens": [10**9]})["error"]["param"] == "tokens"
    assert post("/tokenize", {})["error"]["param"] == "prompt"
    info = asking.get(server.url + "/tokenizer_info").json()
    assert info["eos_token"] == "<｜end▁of▁sentence｜>" and info["model_max_length"] == 4096

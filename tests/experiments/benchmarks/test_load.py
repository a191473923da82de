"""The load generator: on a clock of its own, where times are exact, and against a server that answers by a script."""

import asyncio
import json
import selectors
import time

import numpy as np
import pytest

from experiments.benchmarks import event_client, load, load_drawing
from experiments.benchmarks.load import Arrival, Asked
from experiments.benchmarks.load_prompts import parse_lengths, read_prompts
from tests.support.http_script import reply_events, reply_json, serving
from tests.support.patience import SECONDS


class Clock(asyncio.SelectorEventLoop):
    """An event loop whose time jumps to the next moment at which something is due."""

    def __init__(self):
        super().__init__(Jumping(self))
        self.now = 0.0

    def time(self):
        return self.now


class Jumping(selectors.SelectSelector):
    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def select(self, timeout=None):
        self.clock.now += timeout or 0.0
        return super().select(0)


def on_clock(target, asked, timeout=100.0):
    with asyncio.Runner(loop_factory=Clock) as runner:
        return runner.run(load.run(target, asked, timeout))


def asked_at(*moments):
    return [Asked(at, [at], 4) for at in moments]


def answering(first, gap):
    """Answer with four tokens, `first(at)` and then every `gap(at)` seconds."""

    async def target(asked):
        await asyncio.sleep(first(asked.at))
        yield Arrival(True, 1)
        for tokens in (2, 3, 4):
            await asyncio.sleep(gap(asked.at))
            yield Arrival(True, tokens)

    return target


def test_percentiles_are_exact():
    """The i-th of 200 requests has its first token after 20 i ms, and the others every i / 4 ms."""
    target = answering(lambda at: 0.02 * at, lambda at: 0.00025 * at)
    values = load.summary(on_clock(target, asked_at(*range(1, 201))))
    for q, i in {50: 100, 95: 190, 99: 198}.items():
        assert values[f"time to first token, p{q}"] == pytest.approx((0.02 * i, "s"))
        assert values[f"gap between tokens, p{q}"] == pytest.approx((0.00025 * i, "s"))
        assert values[f"time per token, p{q}"] == pytest.approx((0.00025 * i, "s"))
        assert values[f"total time, p{q}"] == pytest.approx((0.02 * i + 0.00075 * i, "s"))
    end = 200 + 4 + 0.15  # the last request begins, and is done
    assert values["good"] == (50.0, "%")  # 20 i <= 2,000
    assert values["goodput"] == pytest.approx((100 / end, "requests/s"))
    assert values["completed"] == pytest.approx((200 / end, "requests/s"))
    assert values["throughput"] == pytest.approx((800 / end, "tokens/s"))
    assert values["failed"] == (0.0, "") and values["sent late, p99"][0] < 1e-6


def test_a_percentile_is_a_value_that_occurred():
    values = [3.0, 1.0, 2.0, 4.0]
    assert [load.percentile(values, q) for q in (0, 25, 26, 50, 75, 99, 100)] == [1, 1, 2, 2, 3, 4, 4]


def test_waiting_counts_from_the_planned_moment():
    """A server that does one request after the other makes those behind it slow; none of them is omitted."""
    lock = asyncio.Lock()

    async def one_by_one(asked):
        async with lock:
            await asyncio.sleep(1)
            yield Arrival(True, 1)

    samples = on_clock(one_by_one, asked_at(0, 0.1, 0.2))
    assert [sample.first for sample in samples] == pytest.approx([1.0, 1.9, 2.8])
    assert [sample.is_good for sample in samples] == [True, True, False]


def test_a_late_program_makes_latencies_longer_and_not_the_load_lower():
    async def busy(asked):
        asyncio.get_running_loop().now += 1.0  # as long as nothing else can run
        yield Arrival(True, 1)

    samples = on_clock(busy, asked_at(0, 0.1, 0.2))
    assert [sample.first for sample in samples] == pytest.approx([1.0, 1.9, 2.8])
    assert [sample.late for sample in samples] == pytest.approx([0.0, 0.9, 1.8])


def test_several_tokens_at_once_are_one_gap_and_share_the_pace():
    async def drafting(asked):
        for tokens in (1, 3, 5):
            await asyncio.sleep(0.1)
            yield Arrival(True, tokens)
        yield Arrival(False, 6)  # a token without a text, known from the usage at the end

    (sample,) = on_clock(drafting, asked_at(0))
    assert (sample.tokens, sample.pace) == (6, pytest.approx(0.2 / 5))
    assert load.summary([sample])["gap between tokens, p50"][0] == pytest.approx(0.1)


def test_what_fails_is_counted_and_has_no_latency():
    async def target(asked):
        if asked.at == 0:
            raise RuntimeError("429: the queue is full")
        if asked.at == 1:
            await asyncio.sleep(1000)
        if asked.at == 3:
            yield Arrival(True, 1)

    samples = on_clock(target, asked_at(0, 1, 2, 3), timeout=5)
    errors = [sample.error for sample in samples]
    assert errors == ["429: the queue is full", "not done after 5 s", "an answer without a token", None]
    values = load.summary(samples)
    assert (values["failed"][0], values["good"][0]) == (3.0, 25.0)
    assert values["time to first token, p99"][0] < 1e-6


def test_arrivals_are_those_of_a_poisson_process_and_the_same_for_a_seed():
    def make(seed):
        return load.plan(50.0, 40.0, lambda rng: ([1], 2), np.random.default_rng(seed))

    moments = np.array([asked.at for asked in make(0)])
    gaps = np.diff(moments)
    assert len(moments) == pytest.approx(2000, abs=4 * 2000**0.5) and moments[-1] < 40
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # of an exponential distribution both are equal
    assert make(0) == make(0) != make(1)
    assert len(load.plan(0.001, 0.1, lambda rng: ([1], 2), np.random.default_rng(0))) == 1
    with pytest.raises(ValueError, match="more than 100000; measure fewer"):
        load.plan(1e5, 100.0, lambda rng: ([1], 2), np.random.default_rng(0))


def test_lengths():
    rng = np.random.default_rng(0)

    def draw(text):
        return np.array([parse_lengths(text, "--n").draw(rng) for _ in range(2000)])

    assert set(draw("7")) == {7} and set(draw("uniform:3,5")) == {3, 4, 5}
    logs = np.log(draw("lognormal:200,0.5"))
    assert np.median(logs) == pytest.approx(np.log(200), abs=0.05) and logs.std() == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize(
    "text", ["", "0", "1.5", "-3", "uniform:5,3", "uniform:1", "lognormal:0,1", "lognormal:9,-1", "normal:1,2", "nan"]
)
def test_lengths_that_are_none(text):
    with pytest.raises(ValueError, match="--n=.* is no distribution of lengths; write 512"):
        parse_lengths(text, "--n")


def test_prompts_of_a_file(tmp_path):
    file = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "hi"}]
    file.write_text(f'{{"prompt": "a"}}\n\n{json.dumps({"messages": chat})}\n')
    assert read_prompts(str(file)) == ["a", chat]
    for line in ("[1]", '{"prompt": ""}', '{"messages": []}', "{", '{"messages": ["hi"]}'):
        file.write_text(f'{{"prompt": "a"}}\n{line}\n')
        with pytest.raises(ValueError, match="line 2 has no prompt"):
            read_prompts(str(file))
    file.write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(str(file))


def chunk(**choice):
    return b"data: %b\n\n" % json.dumps({"choices": [choice]}).encode()


async def events(*pieces):
    for piece in pieces:
        await asyncio.sleep(0.02)
        yield piece


USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 5}}\n\n'
DONE = b"data: [DONE]\n\n"
COUNTED = b'data: {"choices": [{"text": ""}], "usage": {"completion_tokens": 2}}\n\n'
ANSWERS = {
    "counted": [chunk(text="a"), COUNTED, COUNTED, USAGE, DONE],
    "whole": [chunk(text="a"), chunk(text="b")[:9], chunk(text="b")[9:] + b": ping\n\n" + chunk(text=""), USAGE + DONE],
    "error": [chunk(text="a"), b'data: {"error": {"message": "the cache is full"}}\n\n'],
    "cut": [chunk(text="a")],
}


async def script(asked):
    if asked.path == "/v1/models":
        return reply_json({"data": [{"id": "tiny"}]})
    body = json.loads(asked.body)
    if asked.headers.get("authorization") != "Bearer sesame" or body["temperature"] != 0.5:
        return reply_json({"error": {"message": "no"}}, 401)
    if asked.path == "/v1/chat/completions":
        return reply_events(
            events(chunk(delta={"role": "assistant", "content": ""}), chunk(delta={"content": "a"}), DONE)
        )
    return reply_events(events(*ANSWERS[body["prompt"]]))


def test_a_server_over_http():
    with serving(script) as url:
        server = event_client.parse_url(url, "sesame")
        assert asyncio.run(event_client.get_json(server, "/models"))["data"][0]["id"] == "tiny"
        target = event_client.target(server, "tiny", {"temperature": 0.5})
        prompts = ["whole", "error", "cut", "counted", [{"role": "user", "content": "hi"}]]
        begin = time.perf_counter()
        samples = asyncio.run(load.run(target, [Asked(0.0, prompt, 4) for prompt in prompts], SECONDS))
        took = time.perf_counter() - begin
        refused = event_client.target(server._replace(key=None), "tiny", {"temperature": 0.5})
        (unknown,) = asyncio.run(load.run(refused, [Asked(0.0, "whole", 4)], SECONDS))
    errors = [sample.error for sample in (*samples, unknown)]
    assert errors == [None, "the cache is full", "the stream ended before [DONE]", None, None, "401: no"]
    whole, _, _, counted, chat = samples
    assert (len(counted.arrivals), counted.tokens) == (2, 5)  # the second token has no text
    assert (len(whole.arrivals), whole.tokens, len(chat.arrivals), chat.tokens) == (2, 5, 1, 1)
    assert 0.02 <= whole.first <= whole.total <= took and whole.total >= 0.08  # four pieces, 0.02 s before each
    (gone,) = asyncio.run(load.run(target, [Asked(0.0, "whole", 4)], SECONDS))
    assert "Connect call failed" in gone.error


@pytest.mark.parametrize(
    "text", ["", "localhost:8000", "ftp://a", "http://", "http://a:b", "http://a/?q=1", "http://[a"]
)
def test_addresses_that_are_none(text):
    with pytest.raises(ValueError, match="is no address of a server; write http"):
        event_client.parse_url(text, None)


def test_addresses():
    assert event_client.parse_url("http://127.0.0.1:8000", None) == ("127.0.0.1", 8000, "/v1", False, None)
    assert event_client.parse_url("https://a.b/c/v1/", "k") == ("a.b", 443, "/c/v1", True, "k")


def test_the_drawing_has_each_percentile_and_the_limits():
    target = answering(lambda at: 0.02 * at, lambda at: 0.00025 * at)
    values = load.summary(on_clock(target, asked_at(*range(1, 21))))
    shape = {"prompt_tokens": "512", "output_tokens": "128", "seconds": 60}
    records = [
        {"config": "tiny", "mode": mode, "shape": shape | {"rate": rate}, "value": rate * value}
        for rate in (2.0, 1.0)
        for mode, (value, _) in values.items()
    ]
    figure = load_drawing.draw(records)
    firsts, paces, speeds = figure.axes
    assert [line.get_label() for line in firsts.lines][:3] == ["p50", "p95", "p99"]
    assert list(firsts.lines[1].get_xdata()) == [1.0, 2.0]
    assert list(firsts.lines[1].get_ydata()) == pytest.approx([0.38, 0.76])
    assert paces.lines[-1].get_ydata()[0] == 0.05 and len(speeds.lines) == 3

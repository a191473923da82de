"""The server over the real engine, on a small model in FP32."""

import asyncio
import concurrent.futures
import json
import random
import time

import httpx2
import openai
import pytest

from deepseek_jax.inference.engine import GREEDY, Engine
from deepseek_jax.inference.job import Job
from deepseek_jax.serving.chat_format import ChatFormat
from deepseek_jax.serving.model import Model
from tests.inference.test_decode import make_config
from tests.serving import asking
from tests.serving.fake_engine import chat_tokenizer
from tests.serving.served import served
from tests.support.drawn import drawn_weights
from tests.support.meshes import mesh_of
from tests.support.patience import SECONDS

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("engine_served")]

NUM_POSITIONS = 1024


@pytest.fixture(scope="module")
def served_engine():
    tokenizer = chat_tokenizer()
    config = make_config(vocab_size=tokenizer.vocab_size).with_(data={"sequence_length": NUM_POSITIONS})
    sizes = {"num_rows": 8, "num_pages": 64, "most_prefill_tokens": 128, "silent": True}
    engine = Engine.open(config, drawn_weights(config.model), tokenizer, mesh_of(), **sizes)
    chat = ChatFormat(tokenizer, None, vocab_size=tokenizer.vocab_size, name="v3")
    model = Model(
        name="small",
        engine=engine,
        tokenizer=tokenizer,
        num_positions=NUM_POSITIONS,
        most_jobs=1024,
        chat=chat,
        grammars=chat.grammars,
    )
    with served(model) as running:
        yield running


@pytest.fixture(scope="module")
def client(served_engine):
    with openai.OpenAI(base_url=f"{served_engine.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def settled(engine):
    """Return the stats when nothing runs any more."""
    end = time.monotonic() + SECONDS
    while (stats := engine.stats()).running or stats.waiting or stats.pages_used:
        assert time.monotonic() < end, stats
        time.sleep(0.02)
    return stats


def test_texts_and_log_probabilities_are_those_of_the_engine(served_engine, client):
    model = served_engine.service.model
    ids = model.encode("def square(x):")
    (alone,) = model.engine.generate([Job(prompt=ids, max_new_tokens=30, sampling=GREEDY)])
    settings = {"max_tokens": 30, "temperature": 0, "logprobs": 2, "echo": True}
    choice = client.completions.create(model="small", prompt="def square(x):", **settings).choices[0]
    assert choice.text == "def square(x):" + alone.text
    (expected,) = model.engine.log_probabilities([[*ids, *alone.ids]])
    assert choice.logprobs.token_logprobs[1:] == pytest.approx([one.logprob for one in expected], abs=1e-4)


def test_one_entry_more_than_the_prompt_has_also_where_the_text_ends(client, served_engine):
    model = served_engine.service.model
    bias = {str(model.tokenizer.eos): 100}
    settings = {"max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True, "logit_bias": bias}
    choice = client.completions.create(model="small", prompt=[model.encode("abc")], **settings).choices[0]
    assert len(choice.logprobs.token_logprobs) == 5


def test_many_at_once_with_others_that_leave(served_engine, client):
    engine = served_engine.service.model.engine

    def ask(i):
        settings = {"max_tokens": 10 + i % 30, "temperature": i % 2, "seed": i % 20}
        return client.completions.create(model="small", prompt=f"text {i % 20} " * (1 + i % 5), **settings).choices[0]

    def leave(i):
        body = {"prompt": f"text {i}", "max_tokens": 200, "stream": True}
        with asking.stream("POST", served_engine.url + "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            for _ in range(random.Random(i).randrange(10)):
                next(lines, None)

    def ask_too_much(i):
        prompt, limits = ("x" * 2000, {}) if i % 2 else ("x", {"max_tokens": 5000})
        with pytest.raises(openai.BadRequestError, match="positions"):
            client.completions.create(model="small", prompt=prompt, **limits)

    alone = [ask(i).text for i in range(60)]
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        leaving = [pool.submit(leave, i) for i in range(30)]
        refused = [pool.submit(ask_too_much, i) for i in range(20)]
        together = list(pool.map(lambda i: ask(i).text, range(60)))
        for one in leaving + refused:
            one.result()
    assert together == alone
    assert settled(engine).finished["cancelled"] > 0


def test_five_hundred_at_once_get_what_each_gets_alone(served_engine):
    """Greedy, whole and streamed, of prompts that begin alike; eight rows, and pages for a part of them."""

    def body(i):
        prompt = f"{'the same beginning ' * (i % 5)}number {i}"
        return {"prompt": prompt, "max_tokens": 2 + i % 11, "temperature": 0, "stream": i % 3 == 0, "ignore_eos": True}

    async def ask(client, i):
        answer = await client.post("/v1/completions", json=body(i))
        assert answer.status_code == 200, answer.text
        if not body(i)["stream"]:
            return answer.json()["choices"][0]["text"]
        chunks = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
        return "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)

    async def ask_all(at_once):
        limits = httpx2.Limits(max_connections=at_once)
        async with httpx2.AsyncClient(base_url=served_engine.url, limits=limits, timeout=SECONDS) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(500)))

    alone = asyncio.run(ask_all(1))
    assert len(set(alone)) > 400
    settled(served_engine.service.model.engine)
    assert asyncio.run(ask_all(500)) == alone
    settled(served_engine.service.model.engine)


def test_chat_with_a_schema_and_a_tool_that_must_be_called(served_engine, client):
    messages = [{"role": "user", "content": "a"}]
    schema = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    settings = {"model": "small", "messages": messages, "max_tokens": 150, "temperature": 0}
    choice = client.chat.completions.create(**settings, response_format=wanted).choices[0]
    if choice.finish_reason == "stop":
        assert json.loads(choice.message.content)["x"] in (1, 2)
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    choice = client.chat.completions.create(**settings, tools=tools, tool_choice="required").choices[0]
    if choice.finish_reason == "tool_calls":
        assert choice.message.tool_calls[0].function.name == "f"
        assert json.loads(choice.message.tool_calls[0].function.arguments)["x"] in (1, 2)
    settled(served_engine.service.model.engine)


def test_a_prefix_is_found_again(served_engine, client):
    prompt = "the same beginning " * 8
    settings = {"model": "small", "prompt": prompt, "max_tokens": 4, "temperature": 0}
    first, second = (client.completions.create(**settings) for _ in range(2))
    assert second.usage.prompt_tokens_details.cached_tokens >= 64
    assert second.choices[0].text == first.choices[0].text
    salted = client.completions.create(**settings, extra_body={"cache_salt": "other"})
    assert salted.usage.prompt_tokens_details.cached_tokens == 0

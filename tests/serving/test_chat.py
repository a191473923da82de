"""`/v1/chat/completions`, asked with the official client."""

import json

import openai
import pytest

from tests.serving import asking
from tests.serving.served import fake_model, served

MODEL = "fake"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Says the weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
SCHEMA = {
    "type": "object",
    "properties": {"done": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
    "required": ["done", "kind"],
    "additionalProperties": False,
}


def chat(client, text="once", **settings):
    messages = settings.pop("messages", [{"role": "user", "content": text}])
    return client.chat.completions.create(model=MODEL, messages=messages, **{"max_tokens": 400, "seed": 1} | settings)


@pytest.fixture(scope="module")
def thinker():
    with (
        served(fake_model("r1")) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def test_a_reply(client, server):
    answer = chat(client, "greet")
    message = answer.choices[0].message
    assert (message.role, message.content, message.tool_calls) == ("assistant", "Grüße, 世界!", None)
    assert answer.choices[0].finish_reason == "stop" and answer.object == "chat.completion"
    parts = [{"type": "text", "text": "gr"}, {"type": "text", "text": "eet"}]
    again = chat(client, messages=[{"role": "user", "content": parts}])
    assert again.choices[0].message.content == message.content and again.usage == answer.usage
    ids = asking.post(server.url + "/tokenize", json={"messages": [{"role": "user", "content": "greet"}]}).json()
    assert ids["tokens"] == list(server.service.model.engine.jobs[-1].prompt)


def test_as_much_as_fits_may_follow(client, server):
    chat(client, "greet", max_tokens=openai.omit)
    job = server.service.model.engine.jobs[-1]
    assert len(job.prompt) + job.max_new_tokens == 4096
    chat(client, "greet", max_completion_tokens=7)
    assert server.service.model.engine.jobs[-1].max_new_tokens == 7


def joined(stream):
    """Return content, reasoning, calls and end of each choice of a stream."""
    found: dict[int, dict] = {}
    for chunk in stream:
        for choice in chunk.choices:
            own = found.setdefault(
                choice.index, {"content": "", "reasoning": "", "calls": [], "ends": [], "tokens": []}
            )
            assert choice.delta.role in (None, "assistant")
            own["content"] += choice.delta.content or ""
            own["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
            for call in choice.delta.tool_calls or ():
                if call.id:
                    assert call.index == len(own["calls"])
                    own["calls"].append([call.function.name, ""])
                own["calls"][call.index][1] += call.function.arguments
            own["tokens"] += [entry.token for entry in (choice.logprobs.content if choice.logprobs else ())]
            own["ends"] += [choice.finish_reason] * (choice.finish_reason is not None)
    return found


@pytest.mark.parametrize(
    "text, settings",
    [
        ("greet", {}),
        ("greet", {"logprobs": True, "top_logprobs": 2}),
        ("weather", {"tools": TOOLS}),
        ("riddle", {}),
        ("endless", {}),
        ("once", {"n": 3, "max_tokens": 9}),
        ("greet", {"stop": ["ß"], "logprobs": True}),
    ],
)
@pytest.mark.parametrize("model", ["client", "thinker"])
def test_a_whole_answer_is_its_stream_joined(request, model, text, settings):
    client = request.getfixturevalue(model)
    whole = chat(client, text, **settings)
    *chunks, last = chat(client, text, **settings, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage == whole.usage
    found = joined(chunks)
    assert len(found) == len(whole.choices) == settings.get("n", 1)
    for choice in whole.choices:
        own, message = found[choice.index], choice.message
        assert own["content"] == (message.content or "")
        assert own["reasoning"] == (getattr(message, "reasoning_content", None) or "")
        assert own["calls"] == [[call.function.name, call.function.arguments] for call in message.tool_calls or ()]
        assert own["ends"] == [choice.finish_reason]
        assert own["tokens"] == [entry.token for entry in (choice.logprobs.content if choice.logprobs else ())]


def test_tools_are_called_and_their_results_are_read(client, server):
    answer = chat(client, "weather", tools=TOOLS)
    choice = answer.choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me look."
    assert call.function.name == "get_weather" and json.loads(call.function.arguments) == {"city": "Bern"}
    messages = [
        {"role": "user", "content": "what is it like?"},
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    assert chat(client, messages=messages, tools=TOOLS).choices[0].message.content
    prompt = server.service.model.tokenizer.decode(server.service.model.engine.jobs[-1].prompt)
    assert "sunny" in prompt and "get_weather" in prompt


def test_reasoning_is_apart_and_fails_safe(thinker):
    message = chat(thinker, "riddle").choices[0].message
    assert (message.reasoning_content, message.content) == ("It may be an egg.", "An egg.")
    choice = chat(thinker, "endless", max_tokens=10).choices[0]
    assert choice.message.reasoning_content.startswith("On the") and choice.message.content is None
    assert choice.finish_reason == "length"


def test_what_is_held_to_the_end_is_not_lost(client):
    """Blanks at the beginning may stand before reasoning."""
    assert chat(client, "pause").choices[0].message.content == "  "


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_is_met(client, stream):
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    answer = chat(client, response_format=wanted, stream=stream)
    text = joined(answer)[0]["content"] if stream else answer.choices[0].message.content
    found = json.loads(text)
    assert found.keys() == {"done", "kind"} and found["kind"] in "ab" and isinstance(found["done"], bool)


def test_log_probabilities(client):
    content = chat(client, "greet", logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert [entry.token for entry in content][:3] == ["G", "r", "bytes:\\xc3"]
    assert bytes(byte for entry in content for byte in entry.bytes).decode() == "Grüße, 世界!"
    assert len(content[0].top_logprobs) == 3 and content[0].top_logprobs[2].logprob == -9999.0
    assert chat(client, "greet", logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert chat(client, "greet").choices[0].logprobs is None


@pytest.mark.parametrize(
    "field, value",
    [
        ("messages", None),
        ("messages", [{"role": "king", "content": "a"}]),
        ("tools", "x"),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "sometimes"),
        ("response_format", {"type": "poem"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": []}}}),
        ("max_tokens", 0),
        ("max_completion_tokens", -5),
        ("top_logprobs", 3),
        ("logprobs", 3),
        ("n", 0),
        ("functions", [{"name": "f"}]),
        ("audio", {"voice": "x"}),
        ("modalities", ["audio"]),
        ("reasoning_effort", "high"),
        ("chat_template", "{{ x }}"),
        ("chat_template_kwargs", {"messages": []}),
        ("continue_final_message", True),
        ("add_generation_prompt", False),
        ("parallel_tool_calls", "no"),
        ("logit_bias", {"-1": 5}),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_bad_fields(server, field, value):
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2} | {field: value}
    answer = asking.post(server.url + "/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error", answer.text
    assert error["param"] == field, error


def test_variables_of_a_template_may_have_any_name(server):
    """Also one that our own functions use."""
    for name, status in (("tokenizer", 200), ("continues", 200), ("self", 400), ("continue_final_message", 400)):
        body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "chat_template_kwargs": {name: 1}}
        assert asking.post(server.url + "/v1/chat/completions", json=body).status_code == status, name


def test_the_last_message_is_continued(client):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    settings = {"model": "fake", "max_tokens": 5, "temperature": 0}
    found = client.chat.completions.create(messages=messages, extra_body=extra, **settings)
    other = client.chat.completions.create(messages=messages, **settings)
    assert found.usage.prompt_tokens == other.usage.prompt_tokens - 2 and found.choices[0].message.content


def test_a_conversation_that_is_too_long(client):
    with pytest.raises(openai.BadRequestError, match="positions") as caught:
        chat(client, "a" * 5000)
    assert caught.value.code == "context_length_exceeded"


def test_a_model_without_a_template_says_so(server):
    with served(fake_model(None)) as running:
        body = {"messages": [{"role": "user", "content": "a"}]}
        answer = asking.post(running.url + "/v1/chat/completions", json=body)
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "no_chat_template"
        assert asking.get(running.url + "/v1/models").json()["data"][0]["chat"] is False
    assert asking.get(server.url + "/v1/models").json()["data"][0]["chat"] is True

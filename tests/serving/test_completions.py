"""`/v1/completions`, asked with the official client."""

import pytest

MODEL = "fake"


def complete(client, prompt="once", **settings):
    return client.completions.create(model=MODEL, prompt=prompt, **{"max_tokens": 12, "seed": 1} | settings)


def test_text_ids_and_lists_of_both_are_prompts(client, server):
    tokenizer = server.service.model.tokenizer
    ids = [tokenizer.bos, *tokenizer.encode("once")]
    alone = complete(client)
    assert complete(client, ids).choices[0].text == alone.choices[0].text
    several = complete(client, ["once", "twice"])
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.choices[0].text == alone.choices[0].text != several.choices[1].text
    assert [c.text for c in complete(client, [ids, ids]).choices] == [alone.choices[0].text] * 2
    assert several.usage.prompt_tokens == 2 * len(ids) + 1 and several.usage.completion_tokens == 24
    assert alone.choices[0].finish_reason == "length" and alone.object == "text_completion"


def test_special_tokens_spelled_in_a_prompt_are_special(client, server):
    complete(client, "<｜begin▁of▁sentence｜>a<｜User｜>b")
    tokenizer = server.service.model.tokenizer
    expected = [tokenizer.bos, *tokenizer.encode("a"), tokenizer.special_ids["<｜User｜>"], *tokenizer.encode("b")]
    assert list(server.service.model.engine.jobs[-1].prompt) == expected
    complete(client, "a", extra_body={"add_special_tokens": False})
    assert list(server.service.model.engine.jobs[-1].prompt) == tokenizer.encode("a")


def test_choices_differ_by_seed_and_the_first_is_the_one_that_comes_alone(client):
    three = complete(client, n=3)
    assert len({choice.text for choice in three.choices}) == 3
    assert three.choices[0].text == complete(client).choices[0].text
    assert [c.text for c in three.choices] == [c.text for c in complete(client, n=3).choices]
    assert three.usage.prompt_tokens == complete(client).usage.prompt_tokens
    assert complete(client, seed=None).choices[0].text or True  # without a seed it only has to answer


@pytest.mark.parametrize(
    "settings",
    [{}, {"n": 2}, {"prompt": ["greet", "once"], "max_tokens": 40}, {"logprobs": 2, "echo": True}, {"stop": "e"}],
)
def test_a_whole_answer_is_its_stream_joined(client, settings):
    whole = complete(client, **settings)
    stream = [*complete(client, **settings, stream=True, stream_options={"include_usage": True})]
    *chunks, last = stream
    assert last.choices == [] and last.usage == whole.usage and all(chunk.usage is None for chunk in chunks)
    for choice in whole.choices:
        own = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.text for c in own) == choice.text
        assert [c.finish_reason for c in own if c.finish_reason] == [choice.finish_reason]
        if choice.logprobs:
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                assert [x for c in own for x in getattr(c.logprobs, name)] == getattr(choice.logprobs, name), name


def test_text_of_many_bytes_and_the_end_of_a_text(client):
    choice = complete(client, "greet", max_tokens=100).choices[0]
    assert choice.text == "Grüße, 世界!" and choice.finish_reason == "stop"
    assert complete(client, "greet", max_tokens=100, stop=["ß", "x"]).choices[0].text == "Grü"
    ignoring = complete(client, "greet", max_tokens=100, extra_body={"ignore_eos": True})
    assert ignoring.choices[0].finish_reason == "length"


def test_log_probabilities_of_an_echoed_prompt_and_of_the_text(client, server):
    choice = complete(client, "gré", max_tokens=2, logprobs=3, echo=True).choices[0]
    found = choice.logprobs
    assert choice.text.startswith("gré")
    assert found.tokens[:5] == ["<｜begin▁of▁sentence｜>", "g", "r", "bytes:\\xc3", "bytes:\\xa9"]
    assert len(found.tokens) == 7 and found.text_offset[:6] == [0, 0, 1, 2, 2, 3]
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    ids = server.service.model.tokenizer.encode("g")
    assert found.token_logprobs[1] == -0.5 - ids[0] / 512 == max(found.top_logprobs[1].values())
    assert found.top_logprobs[1]["\x01"] == -9999.0  # minus infinity has no JSON


def test_only_the_prompt_is_rated_with_no_new_token(client):
    choice = complete(client, "abc", max_tokens=0, logprobs=1, echo=True).choices[0]
    assert choice.text == "abc" and len(choice.logprobs.tokens) == 4 and choice.finish_reason == "length"


def test_evaluations_get_one_entry_more_than_the_prompt_has(client, server):
    """Also where the new token would be EOS, which a text does not have."""
    ids = server.service.model.encode("greet")
    choice = complete(client, [ids], max_tokens=1, logprobs=1, echo=True, temperature=0).choices[0]
    assert len(choice.logprobs.token_logprobs) == len(ids) + 1
    assert server.service.model.engine.jobs[-1].ignore_eos


def test_what_a_body_asks_for_reaches_the_engine(client, server):
    body = {
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "priority": 3,
        "stop_token_ids": [7],
        "cache_salt": "s",
    }
    complete(
        client,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        logit_bias={"17": -100},
        user="me",
        extra_body=body,
    )
    job = server.service.model.engine.jobs[-1]
    sampling = job.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 5, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.25, -0.5, 1.2)
    assert job.own.logit_bias == {17: -100.0} and job.own.seed == 1
    assert (job.priority, job.salt, list(job.stop)) == (3, "s", [7])


def test_ids_come_along_on_request(client, server):
    model = server.service.model
    choice = complete(client, "greet", max_tokens=50, extra_body={"return_token_ids": True}).choices[0]
    assert choice.token_ids == model.tokenizer.encode("Grüße, 世界!")
    assert choice.prompt_token_ids == model.encode("greet")


def test_a_schema_holds_for_completions_too(client):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    text = complete(client, max_tokens=200, extra_body={"response_format": wanted}).choices[0].text
    assert text.startswith("{")

"""A file of prompts: what its lines may ask for, and what comes out."""

import json

import pytest

from deepseek_jax.data.bpe import byte_tokenizer
from deepseek_jax.inference.completions import Completion, TokenLogprob
from deepseek_jax.inference.requests import Request
from experiments.prompts import Line, answer, read_lines, request_of


def test_lines_ask_in_the_words_of_openai(tmp_path):
    texts = ['{"prompt": "a", "seed": 7, "logit_bias": {"5": -100, "6": 0.5}, "logprobs": 2}', "", '{"prompt": "b"}']
    (tmp_path / "p").write_text("\n".join(texts))
    first, second = read_lines(str(tmp_path / "p"))
    assert first.request == Request(seed=7, logit_bias={5: -100.0, 6: 0.5}, num_logprobs=2) and first.prompt == "a"
    assert second == ({"prompt": "b"}, Request())
    assert request_of({"seed": None, "logit_bias": None, "logprobs": None}) == Request()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": "x"}, "\"seed\" is 'x'; write a whole number"),
        ({"seed": True}, '"seed" is True; write a whole number'),
        ({"seed": 2**64}, "does not fit into 64 bits"),
        ({"logprobs": 2.0}, '"logprobs" is 2.0'),
        ({"logprobs": 99}, "logprobs = 99 must be from 0 to 20"),
        ({"logit_bias": [5]}, r'"logit_bias" is \[5\]; write ids and numbers: {"17": -100}'),
        ({"logit_bias": {"x": 1}}, '"logit_bias" is'),
        ({"logit_bias": {"5": "much"}}, '"logit_bias" is'),
        ({"logit_bias": {"5": float("nan")}}, "logit_bias = nan for id 5"),
    ],
)
def test_a_line_that_asks_wrongly_is_refused_with_its_number(tmp_path, values, message):
    (tmp_path / "p").write_text('{"prompt": "a"}\n' + json.dumps({"prompt": "b"} | values))
    with pytest.raises(ValueError, match=f"p, line 2: .*{message}"):
        read_lines(str(tmp_path / "p"))


def test_log_probabilities_are_written_with_the_texts_of_tokens():
    tokenizer, written = byte_tokenizer(), []
    a, b = tokenizer.encode("ab")
    found = [Completion("a", "length", 1, [TokenLogprob(a, -0.5, [(b, -0.25)])]), Completion("b", "stop", 1)]
    lines = [Line({"prompt": "x", "id": 3}, Request(num_logprobs=1)), Line({"prompt": "y"}, Request())]
    answer(lines, 2, tokenizer, lambda batch, start: found, written.append)
    first, second = map(json.loads, written)
    top = [{"id": b, "token": "b", "logprob": -0.25}]
    assert first["token_logprobs"] == [{"id": a, "token": "a", "logprob": -0.5, "top": top}] and first["id"] == 3
    assert second == {"prompt": "y", "completion": "b", "finish_reason": "stop", "num_tokens": 1}

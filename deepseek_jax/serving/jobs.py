"""What a request asks of every text alike: how its tokens are drawn, where it ends, how many there are."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from deepseek_jax.inference.job import Grammar, Job
from deepseek_jax.inference.requests import Request
from deepseek_jax.inference.sampling import Sampling
from deepseek_jax.serving.errors import ApiError
from deepseek_jax.serving.fields import Fields, told, wrong
from deepseek_jax.serving.model import Model

MOST_CHOICES = 128  # OpenAI's
MOST_STOPS, LONGEST_STOP = 64, 1024
LARGEST_INTEGER = 2**31 - 1
# Fields of OpenAI's API and of vLLM's that change the answer and are not done, with the values that ask for nothing.
NOT_DONE: dict[str, tuple[Any, ...]] = {
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "min_tokens": (0,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "include_stop_str_in_output": (False,),
    "return_tokens_as_token_ids": (False,),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "logits_processors": ([],),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "mirostat": (0,),
    "typical_p": (1, 1.0),
    "top_a": (0, 0.0),
}
PRIORITIES = 2**15


class Wishes(NamedTuple):
    """What a request asks of every text alike."""

    sampling: Sampling
    seed: int | None
    bias: dict[int, float]
    stop: tuple[str | int, ...]
    num_choices: int
    ignore_eos: bool
    priority: int
    salt: str | None
    stream: bool
    usage_at_end: bool  # a chunk with the usage follows the last choice
    usage_always: bool  # every chunk has the usage so far
    spelled: Mapping[int, str]  # special tokens whose text is part of the text
    token_ids: bool  # the answer has the ids


def read_wishes(fields: Fields, model: Model) -> Wishes:
    """Return what a body asks of every text.

    Raises:
        ApiError: a field has another type, is beyond its range, or asks for what is not done.
    """
    fields.refuse(NOT_DONE)
    name = fields.text("model")
    if name is not None and name != model.name:
        message = f"the model {told(name)} does not exist; GET /v1/models names the one that does"
        raise ApiError(404, message, param="model", code="model_not_found")
    ignore_eos = fields.boolean("ignore_eos")
    stop_ids = fields.ids("stop_token_ids", model.vocab_size)
    eos = model.special_texts.get(model.tokenizer.eos)
    # the text of EOS is never part of a text, and it ends there anyway
    stop: list[str | int] = [text for text in fields.texts("stop", MOST_STOPS, LONGEST_STOP) if text != eos]
    options = fields.object("stream_options") or {}
    stream = fields.boolean("stream")
    if options and not stream:
        raise ApiError(400, "stream_options is for stream = true", param="stream_options", code="invalid_value")
    return Wishes(
        sampling=read_sampling(fields, model),
        seed=fields.integer("seed", None, -(2**63), 2**64 - 1),
        bias=fields.biases("logit_bias", model.vocab_size),
        stop=(*stop, *stop_ids, *(() if ignore_eos else model.ends)),
        num_choices=fields.integer("n", 1, 1, MOST_CHOICES),
        ignore_eos=ignore_eos,
        priority=fields.integer("priority", 0, -PRIORITIES, PRIORITIES),
        salt=fields.text("cache_salt"),
        stream=stream,
        usage_at_end=Fields(options).boolean("include_usage"),
        usage_always=Fields(options).boolean("continuous_usage_stats"),
        spelled={} if fields.boolean("skip_special_tokens", True) else model.special_texts,
        token_ids=fields.boolean("return_token_ids"),
    )


def read_sampling(fields: Fields, model: Model) -> Sampling:
    """Return how tokens are drawn; where a body says nothing as the model's folder says, or as OpenAI has it.

    Raises:
        ApiError: a value is beyond its range.
    """
    default = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} | dict(model.sampling)
    top_k = fields.integer("top_k", int(default["top_k"]), -1, LARGEST_INTEGER)  # -1: all, as in vLLM
    values = {
        "temperature": fields.number("temperature", default["temperature"], 0.0, 100.0),
        "top_p": fields.number("top_p", default["top_p"], 0.0, 1.0),
        "min_p": fields.number("min_p", 0.0, 0.0, 1.0),
        "repetition_penalty": fields.number("repetition_penalty", 1.0, 0.0, 1e4),
        "frequency_penalty": fields.number("frequency_penalty", 0.0, -2.0, 2.0),
        "presence_penalty": fields.number("presence_penalty", 0.0, -2.0, 2.0),
    }
    for name in ("top_p", "repetition_penalty"):
        if values[name] == 0.0:
            raise wrong(name, 0, "write a number above 0")
    return Sampling(
        top_k=max(top_k, 0),
        temperature=values["temperature"],
        top_p=values["top_p"],
        min_p=values["min_p"],
        repetition_penalty=values["repetition_penalty"],
        frequency_penalty=values["frequency_penalty"],
        presence_penalty=values["presence_penalty"],
    )


def make_jobs(
    wishes: Wishes,
    prompts: Sequence[tuple[list[int], int]],
    deadline: float,
    num_logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    grammar: Callable[[], Grammar] | None = None,
    spelled: Mapping[int, str] | None = None,
) -> list[Job]:
    """Return the jobs of a request: `wishes.num_choices` for every prompt, one prompt's beside each other.

    The first choice of a prompt draws with the seed as it is, so it is what the prompt alone would give.

    Args:
        prompts: the ids of each, and how many tokens may follow.
        deadline: of `time.monotonic`.
    """
    jobs = []
    for ids, max_new_tokens in prompts:
        for choice in range(wishes.num_choices):
            seed = secrets.randbits(63) if wishes.seed is None else (wishes.seed + choice) % 2**64
            job = Job(
                prompt=ids,
                max_new_tokens=max_new_tokens,
                sampling=wishes.sampling,
                own=Request(seed=seed, logit_bias=wishes.bias, num_logprobs=num_logprobs),
                stop=wishes.stop,
                ignore_eos=wishes.ignore_eos,
                priority=wishes.priority,
                deadline=deadline,
                grammar=grammar,
                prompt_logprobs=prompt_logprobs,
                salt=wishes.salt,
                spelled={**wishes.spelled, **(spelled or {})},
            )
            jobs.append(job)
    return jobs


def check_room(model: Model, num_prompt: int, max_new_tokens: int | None, param: str) -> int:
    """Return how many tokens may follow a prompt: as many as asked for, or as fit.

    Raises:
        ApiError: they do not fit.
    """
    left = model.num_positions - num_prompt
    wanted = 1 if max_new_tokens is None else max_new_tokens
    if left < wanted:
        message = (
            f"the prompt has {num_prompt} tokens and {wanted} may follow; the model has {model.num_positions} positions"
            f" for both: shorten the prompt{f', or lower {param}' if max_new_tokens else ''}"
        )
        raise ApiError(400, message, param=param if max_new_tokens else None, code="context_length_exceeded")
    return left if max_new_tokens is None else max_new_tokens


def check_count(model: Model, count: int, param: str) -> None:
    """Refuse a request for more texts than may wait.

    Raises:
        ApiError: there are too many.
    """
    if count > model.most_jobs:
        message = f"{param} asks for {count} texts; at most {model.most_jobs} at once"
        raise ApiError(400, message, param=param, code="invalid_value")

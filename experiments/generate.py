"""Continue prompts with a trained model: `python -m experiments.generate --workdir=runs/tiny --prompt="def "`.

The text of one --prompt appears while the model makes it. --prompts=FILE has many, of any lengths: JSON lines, each an
object with "prompt". What follows each is written as the same object with "completion", "finish_reason" ("stop": end of
the document or a --stop string; "length") and "num_tokens", to --out or to standard output.

Configuration and tokenizer come from the workdir, weights from its newest intact checkpoint. One device decodes; with
--expert_devices, several devices share the routed experts. Before a run that began with a released FP8 checkpoint has a
checkpoint of its own, its weights stay in FP8 if the model can be decoded so: with activations in BF16, and dims that
are multiples of 128. Otherwise they are multiplied out.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from absl import flags

from deepseek_jax.config import Config
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.files import replacing, write_all
from deepseek_jax.inference.completions import Completion, complete
from deepseek_jax.inference.decode import decode_execution
from deepseek_jax.inference.generate import expert_mesh, prompt_ids, stream
from deepseek_jax.inference.sampling import Sampling
from deepseek_jax.inference.weights import decode_weights, takes_fp8
from deepseek_jax.inputs import local_path, new_file, read_text, shown
from deepseek_jax.progress import Bar
from deepseek_jax.training.weights import restore_weights
from deepseek_jax.training.workdir import read_config
from experiments import command, session

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.")
PROMPTS = flags.DEFINE_string("prompts", None, 'File of prompts instead: JSON lines, each an object with "prompt".')
OUT = flags.DEFINE_string("out", None, "JSON lines to write what follows --prompts to; standard output by default.")
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 32, "How many of --prompts are decoded at once.", lower_bound=1, upper_bound=2**16
)
STOP = flags.DEFINE_multi_string("stop", [], "End a text before this string; may be given several times.")
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; the newest intact one by default.", lower_bound=0)
MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens",
    200,
    "Stop after this many tokens, or at the end of the document.",
    lower_bound=1,
    upper_bound=2**31 - 1,
)
TEMPERATURE = flags.DEFINE_float("temperature", 0.2, "Divides the logits; 0 always takes the most probable token.")
TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Draw among the fewest tokens that together reach this probability; 1 means all."
)
TOP_K = flags.DEFINE_integer(
    "top_k", 0, "Draw among this many of the most probable tokens; 0 means all.", upper_bound=2**31 - 1
)
MIN_P = flags.DEFINE_float("min_p", 0.0, "Draw among tokens of at least this share of the largest probability.")
REPETITION_PENALTY = flags.DEFINE_float(
    "repetition_penalty", 1.0, "Divides positive logits, multiplies negative ones, of tokens in prompt or text."
)
FREQUENCY_PENALTY = flags.DEFINE_float(
    "frequency_penalty", 0.0, "Subtracted from a token's logit for every time that the text has it."
)
PRESENCE_PENALTY = flags.DEFINE_float("presence_penalty", 0.0, "Subtracted once if the text has the token.")
EXPERT_DEVICES = flags.DEFINE_integer(
    "expert_devices", 1, "Devices that share the routed experts; each has all other weights.", lower_bound=1
)
SEED = flags.DEFINE_integer(
    "seed",
    0,
    "Seed of the draws, of 32 bits; the same seed gives the same text.",
    lower_bound=0,
    upper_bound=2**32 - 1,
)


def main(_) -> None:
    """Restore, decode, print."""
    if PROMPT.value is None and PROMPTS.value is None:
        raise ValueError("--prompt is missing, and --prompts too; give the text to continue, or a file of prompts")
    if PROMPT.value is not None and PROMPTS.value is not None:
        raise ValueError("--prompt and --prompts are both given; leave one out")
    if OUT.value is not None and PROMPTS.value is None:
        raise ValueError(f"--out={shown(OUT.value)} is for --prompts; the text of one --prompt is printed")
    if session.COORDINATOR.value is not None or session.DISTRIBUTED.value:
        raise ValueError(
            "experiments.generate runs in one process; leave --coordinator and --distributed out, and give"
            " --expert_devices"
        )
    workdir = local_path(WORKDIR.value, "--workdir")
    file = PROMPTS.value
    requests = [{"prompt": checked_prompt(PROMPT.value or "")}] if file is None else read_requests(file)
    config = read_config(workdir)
    sampling = sampling_of_flags()
    out = command.path_of(OUT, new_file)
    session.start()
    mesh = expert_mesh(config.model, EXPERT_DEVICES.value)
    tokenizer = Tokenizer.load(workdir / "tokenizer.json")
    check_requests(config, tokenizer, requests, file)
    as_stored = takes_fp8(config.model, config.execution)
    weights, _ = restore_weights(config, workdir, mesh, STEP.value, as_stored=as_stored)
    rest = MAX_NEW_TOKENS.value, sampling, SEED.value, mesh, STOP.value
    if file is not None:
        with jax.set_mesh(mesh):  # once, not for every batch
            weights = decode_weights(decode_execution(config, mesh), weights, mesh)
        with lines_to(out) as write:
            size = BATCH_SIZE.value if len(requests) > BATCH_SIZE.value else 0
            answer(requests, lambda prompts, i: complete(config, weights, tokenizer, prompts, *rest, i, size), write)
        return
    prompt = requests[0]["prompt"]
    text = stream(config, weights, tokenizer, prompt, *rest)
    first = next(text)  # or a refusal, before anything is printed
    print(prompt + command.for_terminal(first), end="", flush=True)
    for part in text:
        print(command.for_terminal(part), end="", flush=True)
    print()


def sampling_of_flags() -> Sampling:
    """Return how tokens are drawn; a refusal begins with the name of a field, which is that of the flag."""
    try:
        return Sampling(
            temperature=TEMPERATURE.value,
            top_p=TOP_P.value,
            top_k=TOP_K.value,
            min_p=MIN_P.value,
            repetition_penalty=REPETITION_PENALTY.value,
            frequency_penalty=FREQUENCY_PENALTY.value,
            presence_penalty=PRESENCE_PENALTY.value,
        )
    except ValueError as error:
        raise ValueError(f"--{error}") from error


def answer(
    requests: list[dict[str, Any]], run: Callable[[list[str], int], list[Completion]], write: Callable[[str], None]
) -> None:
    """Complete requests batch by batch, and write each batch when it is done."""
    with Bar(len(requests), "decode", "prompts") as bar:
        for start in range(0, len(requests), BATCH_SIZE.value):
            batch = requests[start : start + BATCH_SIZE.value]
            for request, found in zip(batch, run([r["prompt"] for r in batch], start), strict=True):
                result = {"completion": found.text, "finish_reason": found.reason, "num_tokens": found.num_tokens}
                write(json.dumps(request | result) + "\n")
            bar.update(len(batch))


@contextlib.contextmanager
def lines_to(path: Path | None) -> Iterator[Callable[[str], None]]:
    """Yield what writes a line to standard output, or to a file that is there when all are written."""
    if path is None:
        yield lambda line: print(line, end="", flush=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as descriptor:
        yield lambda line: write_all(descriptor, memoryview(line.encode()))
        os.fsync(descriptor)


def read_requests(file: str) -> list[dict[str, Any]]:
    """Return the objects of the file of --prompts.

    Raises:
        ValueError: a line is not an object with a text "prompt", or there is none.
    """
    path, requests = local_path(file, "--prompts"), []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"--prompts={shown(file)}, line {number}"
        try:
            request = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON ({shown(str(error))}); write one object a line") from error
        if not isinstance(request, dict) or not isinstance(request.get("prompt"), str):
            raise ValueError(f'{where} has no text "prompt"; write {{"prompt": "..."}}')
        requests.append(request)
    if not requests:
        raise ValueError(f"--prompts={shown(file)} holds no prompt; write one object a line")
    return requests


def check_requests(config: Config, tokenizer: Tokenizer, requests: list[dict[str, Any]], file: str | None) -> None:
    """Refuse the first prompt that cannot be continued; of several, the message has its number."""
    for number, request in enumerate(requests, start=1):
        try:
            prompt_ids(config, tokenizer, request["prompt"], MAX_NEW_TOKENS.value)
        except ValueError as error:
            if file is None:
                raise
            raise ValueError(f"prompt {number} of --prompts={shown(file)}: {error}") from error


def checked_prompt(prompt: str) -> str:
    """Return the prompt, if it is text."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"--prompt={shown(prompt)} is not UTF-8 text (character {error.start}); convert it") from error
    return prompt


if __name__ == "__main__":
    command.run(main)

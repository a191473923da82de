"""Continue prompts with a trained model: `python -m experiments.generate --workdir=runs/tiny --prompt="def "`.

The model is that of a run (--workdir), or that of a folder in Hugging Face's format (--hf): a released checkpoint, or
an export of ours.

The text of one --prompt appears while the model makes it. --prompts=FILE has many, of any lengths: JSON lines, each an
object with "prompt", and, if it likes, "seed", "logit_bias" and "logprobs" of its own. What follows each is written as
the same object with "completion", "finish_reason" ("stop": end of the document or a --stop string; "length") and
"num_tokens", to --out or to standard output. --chat talks in the terminal, in the form of the folder's chat template.

One device decodes; with --expert_devices, several devices share the routed experts, and --data_devices such groups
share the prompts. Weights in FP8 stay in FP8 if the model can be decoded so: with activations in BF16, and dims that
are multiples of 128. Otherwise they are multiplied out.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import flags

from deepseek_jax.data.chat import ChatTemplate
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference.completions import Completion, complete
from deepseek_jax.inference.decode import decode_execution
from deepseek_jax.inference.generate import expert_mesh, longest_text, stream
from deepseek_jax.inference.requests import Request
from deepseek_jax.inference.sampling import Sampling
from deepseek_jax.inference.weights import decode_weights
from deepseek_jax.inputs import new_file, shown
from experiments import command, session
from experiments.conversation import HELP, converse, read_terminal
from experiments.model_source import Source, open_named
from experiments.prompts import Line, answer, check_lines, lines_to, read_lines

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
HF = flags.DEFINE_string("hf", None, "Folder in Hugging Face's format instead.")
PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.")
PROMPTS = flags.DEFINE_string("prompts", None, 'File of prompts instead: JSON lines, each an object with "prompt".')
CHAT = flags.DEFINE_bool("chat", False, "Talk in the terminal instead, in the form of the model's chat template.")
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
DATA_DEVICES = flags.DEFINE_integer(
    "data_devices", 1, "Groups of --expert_devices that share the prompts; each has all weights.", lower_bound=1
)
SEED = flags.DEFINE_integer(
    "seed",
    0,
    "Seed of the draws, of 32 bits; the same seed gives the same text.",
    lower_bound=0,
    upper_bound=2**32 - 1,
)


class Model:
    """A model on its devices, ready to make text as the flags say."""

    def __init__(self, source: Source, sampling: Sampling, mesh: jax.sharding.Mesh, tokenizer: Tokenizer):
        """Read the weights."""
        self.config, self.tokenizer, self._sampling, self._mesh = source.config, tokenizer, sampling, mesh
        self._stop = [*STOP.value, *source.generation.ends]
        self._weights = source.load(mesh)

    def keep_placed(self) -> None:
        """Cast and place the weights once, not for every text."""
        with jax.set_mesh(self._mesh):
            execution = decode_execution(self.config, self._mesh)
            self._weights = decode_weights(self.config.model, execution, self._weights, self._mesh)

    def stream(self, prompt: str | Sequence[int], max_new_tokens: int) -> Iterator[str]:
        """Yield the text that follows a prompt."""
        rest = self._sampling, SEED.value, self._mesh, self._stop
        return stream(self.config, self._weights, self.tokenizer, prompt, max_new_tokens, *rest)

    def complete(self, lines: Sequence[Line], first: int, size: int) -> list[Completion]:
        """Return what follows the prompts of some lines, the first of which has the number `first`."""
        rest = MAX_NEW_TOKENS.value, self._sampling, SEED.value, self._mesh, self._stop, first, size
        prompts, requests = [line.prompt for line in lines], [line.request for line in lines]
        return complete(self.config, self._weights, self.tokenizer, prompts, *rest, requests)


def main(_) -> None:
    """Open, check, read, decode, print."""
    check_flags()
    file = PROMPTS.value
    lines = [Line({"prompt": checked_prompt(PROMPT.value or "")}, Request())] if file is None else read_lines(file)
    source = open_named(WORKDIR.value, HF.value, STEP.value)
    sampling = sampling_of_flags(source.generation.sampling)
    out = command.path_of(OUT, new_file)
    template = ChatTemplate.load(source.chat_folder) if CHAT.value else None
    session.start()
    mesh = expert_mesh(source.config.model, EXPERT_DEVICES.value, DATA_DEVICES.value)
    tokenizer = source.tokenizer()
    if template is None:
        check_lines(source.config, tokenizer, lines, MAX_NEW_TOKENS.value, file)
    model = Model(source, sampling, mesh, tokenizer)
    if template is not None:
        chat(model, template)
    elif file is not None:
        model.keep_placed()
        size = BATCH_SIZE.value if len(lines) > BATCH_SIZE.value else 0
        with lines_to(out) as write:
            answer(lines, BATCH_SIZE.value, tokenizer, lambda batch, i: model.complete(batch, i, size), write)
    else:
        text = model.stream(lines[0].prompt, MAX_NEW_TOKENS.value)
        first = next(text)  # or a refusal, before anything is printed
        print(lines[0].prompt + command.for_terminal(first), end="", flush=True)
        for part in text:
            print(command.for_terminal(part), end="", flush=True)
        print()


def check_flags() -> None:
    """Refuse flags that do not go together."""
    given = [f"--{flag.name}" for flag in (PROMPT, PROMPTS, CHAT) if flag.value not in (None, False)]
    if not given:
        raise ValueError(
            "--prompt is missing, and --prompts and --chat too; give the text to continue, or a file of prompts"
        )
    if len(given) > 1:
        raise ValueError(f"{given[0]} and {given[1]} are both given; leave one out")
    if OUT.value is not None and PROMPTS.value is None:
        raise ValueError(f"--out={shown(OUT.value)} is for --prompts; the text of one --prompt is printed")
    if session.COORDINATOR.value is not None or session.DISTRIBUTED.value:
        raise ValueError(
            "experiments.generate runs in one process; leave --coordinator and --distributed out, and give"
            " --expert_devices"
        )


def chat(model: Model, template: ChatTemplate) -> None:
    """Talk in the terminal; the longest reply is --max_new_tokens, or what the model's positions leave."""
    longest = longest_text(model.config)

    def reply(ids: list[int]) -> Iterator[str]:
        if len(ids) >= longest:
            raise ValueError(f"the conversation has {len(ids)} tokens, and the model knows {longest}; /new begins anew")
        return model.stream(ids, min(MAX_NEW_TOKENS.value, longest - len(ids)))

    def write(text: str) -> None:
        print(command.for_terminal(text), end="", flush=True)

    model.keep_placed()
    print(HELP)
    converse(template, model.tokenizer, reply, read_terminal, write)


def sampling_of_flags(defaults: dict[str, Any]) -> Sampling:
    """Return how tokens are drawn: as the flags say, where one is not given as the folder says.

    A refusal begins with the name of a field, which is that of the flag.
    """
    named = (TEMPERATURE, TOP_P, TOP_K, MIN_P, REPETITION_PENALTY, FREQUENCY_PENALTY, PRESENCE_PENALTY)
    given: dict[str, Any] = {flag.name: flag.value for flag in named if flag.present or flag.name not in defaults}
    try:
        return Sampling(**defaults | given)
    except ValueError as error:
        raise ValueError(f"--{error}") from error


def checked_prompt(prompt: str) -> str:
    """Return the prompt, if it is text."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"--prompt={shown(prompt)} is not UTF-8 text (character {error.start}); convert it") from error
    return prompt


if __name__ == "__main__":
    command.run(main)

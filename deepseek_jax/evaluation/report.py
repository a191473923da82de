"""The report of a complete run: yardsticks, the sheet of curves, the final table, and a sampled text.

It comes after the last checkpoint. So it never fails a run: a part that cannot be made is a line that says why, and the
parts after it are made.
"""

import contextlib
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from deepseek_jax.config import Config
from deepseek_jax.data.heldout import open_held_out
from deepseek_jax.data.pipeline import open_corpus
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.evaluation.yardsticks import add_yardsticks
from deepseek_jax.inference.generate import stream
from deepseek_jax.inference.sampling import Sampling
from deepseek_jax.inputs import printable_lines
from deepseek_jax.training.checkpoint import Checkpoints
from deepseek_jax.training.curves import final_table
from deepseek_jax.training.pretrain import Result
from deepseek_jax.training.sheet import draw_sheet
from deepseek_jax.training.state import weights_of

SAMPLE_TOKENS = 120
SAMPLING = Sampling(temperature=0.8, top_p=0.95, top_k=0)
BEGINNING = re.compile(r"\S+(?:\s+\S+){0,4}")  # five words
MOST_CHARACTERS = 60  # of a prompt, for languages without spaces
PROMPT_SHARE = 4  # the prompt takes at most a quarter of the context


def report(config: Config, workdir: Path, result: Result, wandb: str, say: Callable[[str], None]) -> None:
    """Measure the yardsticks, draw the curves, and say the final table and a sampled continuation.

    Args:
        config: the run's configuration.
        workdir: the run's folder.
        result: of `train`; all processes call this.
        wandb: a project of Weights & Biases that gets the yardsticks, too; none if "".
        say: shows a text to the person who started the run.
    """
    with _optional("yardsticks", say):
        add_yardsticks(config, workdir, result.tokenizer, result.step, result.tokens_seen, wandb)
    steps: list[int] = []
    with _optional("list of checkpoints", say):
        checkpoints = Checkpoints(workdir, keep=None)  # every process opens it: Orbax waits for all
        steps = checkpoints.steps()
        checkpoints.close()
    if jax.process_index() > 0:
        return
    with _optional("sheet of curves", say):
        draw_sheet(config, workdir, sum(leaf.size for leaf in jax.tree.leaves(weights_of(result.state).params)))
    with _optional("final table", say):
        digest = open_corpus(config, result.tokenizer, workdir).digest
        say("\n" + final_table(workdir, digest, steps, config.data.sources))
    with _optional("sample", say):
        say("\n" + sample(config, workdir, result))


@contextlib.contextmanager
def _optional(part: str, say: Callable[[str], None]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever it is, the run is complete
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        say(f"the run is complete and saved; its {part} cannot be made: {reason}")


def sample(config: Config, workdir: Path, result: Result) -> str:
    """Return a continuation of the first words of a held-out document, or how to get one, with a heading.

    Raises:
        ValueError: the model's context is too short for a prompt and a token.
    """
    prompt = first_words(config, result.tokenizer, workdir)
    if jax.process_count() > 1:
        command = [
            "python",
            "-m",
            "experiments.generate",
            f"--workdir={workdir}",
            f"--prompt={' '.join(prompt.split())}",
        ]
        return f"The weights are spread over {jax.process_count()} processes; for a sample:\n{shlex.join(command)}"
    num_tokens = min(SAMPLE_TOKENS, config.data.sequence_length - len(result.tokenizer.encode(prompt)) - 1)
    if num_tokens < 1:
        raise ValueError(f"data.sequence_length = {config.data.sequence_length} has no room for a prompt and a token")
    text = "".join(
        stream(config, weights_of(result.state), result.tokenizer, prompt, num_tokens, SAMPLING, config.seed)
    )
    heading = f"sample, temperature {SAMPLING.temperature}, top-p {SAMPLING.top_p}:"
    return f"{heading}\n\n{printable_lines(prompt + text)}\n"


def first_words(config: Config, tokenizer: Tokenizer, workdir: Path) -> str:
    """Return the first words of the first held-out document that has any, within a share of the context."""
    for text in open_held_out(config, tokenizer, workdir).texts():
        if words := BEGINNING.search(text.decode("utf-8", "ignore")):
            prompt = words[0][:MOST_CHARACTERS]
            while len(tokenizer.encode(prompt)) > config.data.sequence_length // PROMPT_SHARE:
                prompt = prompt[: len(prompt) // 2]
            return prompt
    return ""

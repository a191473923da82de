"""Continue a prompt with a trained model: `python -m experiments.generate --workdir=runs/tiny --prompt="def "`.

Text appears while the model makes it. Configuration and tokenizer come from the workdir, weights from its newest intact
checkpoint. One device decodes; with --expert_devices, several devices share the routed experts. Before a run that began
with a released FP8 checkpoint has a checkpoint of its own, its weights stay in FP8 if the model can be decoded so: with
activations in BF16, and dims that are multiples of 128. Otherwise they are multiplied out.
"""

from absl import flags

from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference.generate import expert_mesh, stream
from deepseek_jax.inference.sampling import Sampling
from deepseek_jax.inference.weights import takes_fp8
from deepseek_jax.inputs import local_path, shown
from deepseek_jax.training.weights import restore_weights
from deepseek_jax.training.workdir import read_config
from experiments import command, session

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.", required=True)
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
    workdir, prompt = local_path(WORKDIR.value, "--workdir"), checked_prompt(PROMPT.value)
    config = read_config(workdir)
    sampling = Sampling(temperature=TEMPERATURE.value, top_p=TOP_P.value, top_k=TOP_K.value)
    session.start()
    mesh = expert_mesh(config.model, EXPERT_DEVICES.value)
    as_stored = takes_fp8(config.model, config.execution)
    weights, _ = restore_weights(config, workdir, mesh, STEP.value, as_stored=as_stored)
    tokenizer = Tokenizer.load(workdir / "tokenizer.json")
    text = stream(config, weights, tokenizer, prompt, MAX_NEW_TOKENS.value, sampling, SEED.value, mesh)
    first = next(text)  # or a refusal, before anything is printed
    print(prompt + command.for_terminal(first), end="", flush=True)
    for part in text:
        print(command.for_terminal(part), end="", flush=True)
    print()


def checked_prompt(prompt: str) -> str:
    """Return the prompt, if it is text."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"--prompt={shown(prompt)} is not UTF-8 text (character {error.start}); convert it") from error
    return prompt


if __name__ == "__main__":
    command.run(main)

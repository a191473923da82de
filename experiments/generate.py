"""Continue a prompt with a trained model: `python -m experiments.generate --workdir=runs/tiny --prompt="def "`.

Text appears as it is made. Configuration, tokenizer and weights come from the workdir's newest intact checkpoint; one device decodes.
"""

from pathlib import Path

import jax
from absl import app, flags

from deepseek_jax.config import Config, Mesh
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference.decode import stream
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.training.checkpoint import Checkpoints, put_tokenizer, read_config
from deepseek_jax.training.state import State, abstract_state
from experiments import session

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.", required=True)
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; the newest intact one by default.")
MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 200, "Stop after this many tokens, if not at the end of the document.", lower_bound=1
)
TEMPERATURE = flags.DEFINE_float("temperature", 0.2, "Divides the logits; 0 always takes the most probable token.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw among the fewest tokens that reach this probability together; 1 is all.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Draw among this many of the most probable tokens; 0 is all.")
SEED = flags.DEFINE_integer("seed", 0, "Of the draws; the same seed gives the same text.")


def main(_) -> None:
    """Restore, decode, print."""
    session.start()
    workdir = Path(WORKDIR.value)
    config = read_config(workdir)
    weights = restore_weights(config, workdir, STEP.value)
    pieces = stream(
        config,
        weights["params"],
        weights["router_bias"],
        Tokenizer.load(workdir / "tokenizer.json"),
        PROMPT.value,
        MAX_NEW_TOKENS.value,
        temperature=TEMPERATURE.value,
        top_p=TOP_P.value,
        top_k=TOP_K.value,
        seed=SEED.value,
    )
    print(PROMPT.value, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def restore_weights(config: Config, workdir: Path, step: int | None) -> State:
    """Return `params` and `router_bias` of a checkpoint on this process's first device, and put its tokenizer into the workdir.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged.
    """
    mesh = make_mesh(Mesh(pipe=1, data=1, node=1, expert=1, tensor=1), jax.local_devices()[:1])
    whole = abstract_state(config, mesh)
    checkpoints = Checkpoints(workdir, keep=None)
    restored = checkpoints.restore({name: whole[name] for name in ("params", "router_bias")}, mesh, step)
    checkpoints.close()
    if restored is None:
        raise ValueError(f"{workdir} has no complete checkpoint yet; let experiments.train run until its first save")
    state, _, tokenizer_files = restored
    put_tokenizer(workdir, tokenizer_files)
    return state


if __name__ == "__main__":
    app.run(main)

"""Extend the context of a small model by YaRN, and test it before and after.

`python -m experiments.studies.context_extension`

DeepSeek-V3 is trained at 4K tokens and extended in two short phases, to 32K and 128K (arXiv 2412.19437, section 4.3).
The study does the same at the size of a CPU: a small `tiny` over bytes learns text and needles (`needles`), each
in every second row, at 64 tokens, then two short phases with YaRN continue it at 256 and 512. Five models are tested:

    64                   as it was trained
    64, YaRN             the same weights with YaRN's frequencies and temperature, not trained with them
    256                  after the first phase
    512                  after the second
    512, without YaRN    after the same two phases, the same tokens, with the frequencies of before: the control

Tests, up to 1,024 tokens, twice what was trained: held-out bits per byte by position; and the share of needles that are
found, by length of the row and depth of the needle. Writes records and the drawing.
"""

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from absl import flags

from configs import tiny
from deepseek_jax.config import Config, from_config_dict
from deepseek_jax.data.heldout import heldout_batches
from deepseek_jax.data.packing import Batch
from deepseek_jax.data.pipeline import make_train_loader, open_tokenizer
from deepseek_jax.evaluation.logits import logits
from deepseek_jax.palette import BLUE, GRAY, GREEN, ORANGE, VERMILION
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parameters import Weights
from deepseek_jax.posttraining.accuracy import wilson
from deepseek_jax.training.evaluation import place_batch
from deepseek_jax.training.objective import pretraining
from deepseek_jax.training.optimizer import rates
from deepseek_jax.training.state import State, create_state, jit_state_around
from deepseek_jax.training.step import jit_train_step
from experiments import command, session
from experiments.studies import needles, output
from pallas_kernels.bench import records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORKDIR = Path("runs/context_extension")  # keeps the tokenised corpus
SHORT = 64
PHASES = ((64, 32), (256, 8), (512, 4))  # tokens of a row, rows
STEPS = flags.DEFINE_list("steps", ["600", "150", "100"], "Steps of the three phases.")
WIDTH = 96
LAST_RATE = 3e-4
DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.95)
LENGTHS = (64, 128, 256, 512, 1024)
TEST_ROWS = 32  # at once, and of needles of one length and depth
TEXTS = 4  # times so many rows of text
BANDS = np.append(0, 2 ** np.arange(4, 11))  # of positions


class Model(NamedTuple):
    """A model to test."""

    name: str
    config: Config
    weights: Weights


def main(_) -> None:
    """Train, extend, test, write, draw."""
    if len(STEPS.value) != len(PHASES) or not all(text.isdecimal() and int(text) for text in STEPS.value):
        raise ValueError(f"--steps={','.join(STEPS.value)} must be {len(PHASES)} numbers of steps, such as 600,150,100")
    folder = output.folder("long_context")
    session.start()
    mesh = make_mesh(study_config(0, yarn=False).mesh)
    models = list(train_all(mesh))
    text_BS = held_out_text()
    points = [point for model in models for point in test(model, text_BS, mesh)]
    common = records.provenance("experiments.studies.context_extension", session.describe_device(mesh))
    records.write(folder / "context_extension.json", [point | common for point in points])
    draw(points).savefig(folder / "context_extension.png", dpi=110)
    print(f"Wrote {folder}/context_extension.json and .png")


def study_config(phase: int, yarn: bool) -> Config:
    """A smaller `tiny` over bytes, with or without YaRN; from phase 1 on at the last learning rate of phase 0."""
    (length, rows), steps = PHASES[phase], int(STEPS.value[phase])
    config = from_config_dict(tiny.get_config()).with_(
        model={
            "vocab_size": 512,
            "width": WIDTH,
            "num_layers": 3,
            "query_latent": 64,
            "dense_hidden": 256,
            "num_experts": 8,
            "experts_per_token": 2,
            "expert_hidden": 96,
            "num_mtp_layers": 0,
        },
        data={"tokenizer": "byte", "sequence_length": length},
        training={
            "num_tokens": float(length * rows * steps),
            "batch_size": (("constant", 1.0, rows),),
            "micro_batch_size": rows,
        },
        optimizer={"learning_rate": (("constant", 0.7, 3e-3), ("cosine", 1.0, LAST_RATE))},
        mesh={"data": 1},
        execution={"scan_unroll": 3, "expert_block": 64},
    )
    if yarn:
        extended = dataclasses.replace(config.model.yarn, enabled=True, factor=10.0, original_length=SHORT)
        config = config.with_(model={"yarn": extended})
    if phase:
        rates_of_phase = {"learning_rate": (("constant", 1.0, LAST_RATE),), "warmup_steps": 0}
        config = config.with_(optimizer=rates_of_phase | {"bias_update_rate": (("constant", 1.0, 0.0),)})
    return config


def train_all(mesh: jax.sharding.Mesh):
    """Yield the models."""
    config = study_config(0, yarn=False)
    with jax.set_mesh(mesh):
        short = weights_of(train(config, create_state(config), mesh, seed=0))
    yield Model("64", config, short)
    yield Model("64, YaRN", study_config(0, yarn=True), short)
    for yarn in (True, False):
        weights = short
        for phase in (1, 2):
            config = study_config(phase, yarn)
            with jax.set_mesh(mesh):
                weights = weights_of(train(config, jit_state_around(config.optimizer, copy(weights)), mesh, seed=phase))
            if yarn or phase == 2:
                yield Model(f"{PHASES[phase][0]}{'' if yarn else ', without YaRN'}", config, weights)


def copy(weights: Weights) -> Weights:
    """Return copies: a step takes its state's memory."""
    return jax.tree.map(lambda a: a + 0, weights)


def weights_of(state: State) -> Weights:
    """Return a state's weights."""
    return Weights(state["params"], state["router_bias"])


def train(config: Config, state: State, mesh: jax.sharding.Mesh, seed: int) -> State:
    """Return the state after the config's tokens, text and needles."""
    step, rows, length = (
        jit_train_step(config, pretraining(config), mesh),
        config.training.micro_batch_size,
        config.data.sequence_length,
    )
    loader = make_train_loader(config, open_tokenizer(config, WORKDIR), WORKDIR)
    rng = np.random.default_rng(seed)
    tokens = rows * length
    num_steps = int(config.training.num_tokens) // tokens
    for i in range(num_steps):
        batch = needles.train_batch(loader.next_batch(rows), rng)
        state, metrics = step(state, place_batch(batch, mesh), rates(config, i, i * tokens))
        if i % 100 == 99 or i + 1 == num_steps:
            found = asked_and_found(config, state, batch, mesh)
            loss = float(metrics["loss"])
            print(f"{length} tokens, step {i + 1} of {num_steps}: loss {loss:.3f}, {found:.2f} found", flush=True)
    loader.close()
    return state


def asked_and_found(config: Config, state: State, batch: Batch, mesh: jax.sharding.Mesh) -> float:
    """Return the share of the needles asked for in a training batch that a model finds."""
    asked_BS = batch["loss_weights_BS"] == needles.WEIGHT
    best_BS = logits(config, weights_of(state), batch["tokens_BS"], mesh)["logits"].argmax(-1)
    return float((best_BS == batch["targets_BS"])[asked_BS].mean())


def held_out_text() -> np.ndarray:
    """Return rows of held-out bytes, a token longer than the longest row of a test: [B, S + 1]."""
    config = study_config(0, yarn=False).with_(data={"sequence_length": LENGTHS[-1]})
    batches = heldout_batches(config, open_tokenizer(config, WORKDIR), WORKDIR, TEST_ROWS, TEXTS)
    return np.concatenate([needles.rows_of(batch).tokens for batch in batches])


def test(model: Model, text_BS: np.ndarray, mesh: jax.sharding.Mesh):
    """Yield the records of a model: bits per byte by band of positions, needles found by length and depth."""
    run = functools.partial(logits, model.config, model.weights, mesh=mesh)
    bits_BS = np.concatenate([target_bits(run, rows) for rows in np.split(text_BS, TEXTS)])
    for begin, end in zip(BANDS[:-1], BANDS[1:], strict=True):
        band_B = bits_BS[:, begin:end].mean(axis=1)
        error = {"standard_error": round(float(band_B.std(ddof=1) / len(band_B) ** 0.5), 4)}
        value = round(float(band_B.mean()), 4)
        yield record(model, "held-out text", {"from": int(begin), "to": int(end)}, value, "bits per byte") | error
    for length in LENGTHS:
        for depth in DEPTHS:
            rng = np.random.default_rng(length)
            rows = needles.test_rows(text_BS[:TEST_ROWS, :length], rng, depth)
            best_B = run(rows)["logits"][:, -2].argmax(-1)
            found = wilson(int((best_B == rows[:, -1]).sum()), TEST_ROWS)
            interval = {"low": found.low, "high": found.high}
            yield record(model, "needle", {"length": length, "depth": depth}, found.share, "share found") | interval


def target_bits(run, rows: np.ndarray) -> np.ndarray:
    """Return the bits of each target of rows [B, S + 1], [B, S]."""
    scores_BSV = run(rows[:, :-1])["logits"]
    top_BS = scores_BSV.max(-1)
    log_z_BS = top_BS + np.log(np.exp(scores_BSV - top_BS[..., None]).sum(-1))
    found_BS = np.take_along_axis(scores_BSV, rows[:, 1:, None], axis=-1)[..., 0]
    return (log_z_BS - found_BS) / np.log(2.0)


def record(model: Model, mode: str, shape: dict[str, Any], value: float, unit: str) -> dict[str, Any]:
    """Return a record of one measurement."""
    print(f"{model.name:10} {mode:14} {shape}: {value:.3f} {unit}", flush=True)
    return {
        "config": f"tiny over bytes, {model.name}",
        "mode": mode,
        "precision": "fp32",
        "shape": shape,
        "value": value,
        "unit": unit,
    }


def draw(points: list[dict[str, Any]]) -> "Figure":
    """Draw bits by position, and needles by length, of each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(point["config"] for point in points))
    for name, color, marker in zip(names, (VERMILION, ORANGE, BLUE, GREEN, GRAY), "osDv^", strict=True):
        mine = [point for point in points if point["config"] == name]
        style = {
            "color": color,
            "marker": marker,
            "label": name.partition(", ")[2],
            "ls": "--" if color == GRAY else "-",
        }
        text = [point for point in mine if point["mode"] == "held-out text"]
        middle = [(point["shape"]["from"] + point["shape"]["to"]) / 2 for point in text]
        errors = [1.96 * point["standard_error"] for point in text]
        left.errorbar(middle, [point["value"] for point in text], errors, capsize=2, **style)
        found = [
            np.mean([p["value"] for p in mine if p["mode"] == "needle" and p["shape"]["length"] == length])
            for length in LENGTHS
        ]
        right.plot(LENGTHS, found, **style)
    left.set(xscale="log", xlabel="position (tokens)", ylabel="held-out bits per byte")
    right.set(xscale="log", xlabel="tokens of the row", ylabel="needles found, all depths", ylim=(-0.03, 1.03))
    right.axhline(1 / needles.KINDS, color="0.8", lw=0.8)
    for axes, ticks in ((left, (8, 16, 32, *LENGTHS)), (right, LENGTHS)):
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.axvline(SHORT, color="0.7", linestyle=":")
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, title="trained to")
    return figure


if __name__ == "__main__":
    command.run(main)

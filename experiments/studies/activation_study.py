"""Compare FP8 linear layers with FP32 on the activations of a trained model.

`python -m experiments.studies.activation_study`

Normal numbers flatter a quantiser: a model's activations have outliers, and its gradients differ between tokens by
orders of magnitude. So the study trains `configs/tiny.py`, with a latent that FP8 can multiply. One more batch, run in
BF16, gives every linear layer an input x and a gradient g of its output (`experiments/studies/linears.py`). From these
and the FP32 weight W the study makes y = x W, dx = g W^T and dW = x^T g in three ways
(`experiments/studies/products.py`):

    exact       NumPy in FP32
    ours        `model.linear` with an `Fp8Weight`: kernels on their hardware, their references elsewhere
    emulated    the recipe as the report words it (DeepSeek-V3, arXiv 2412.19437, section 3.3), quantised in NumPy,
                products in FP32

Expected: a cosine to exact of at least 0.999, and 0.9985 for dW, whose x is rounded twice; an error of at most 1.1
times the emulated recipe's; no bias. A bias is a slope of ours against exact that is not 1, or a mean error that is not
0. The mean error is in percent of the root mean square of exact: errors share the rounding of one weight, so they are
not independent, and their standard error would be too small.

g is divided by the tokens of a whole batch. The last records say how exact the gradients are if g is as small as larger
batches make it, as medians over all linear layers: a smallest scale that suits activations (1e-4 in the released
kernels) costs 60% at 67 million tokens.

The two matrices of a feed-forward are measured one by one. The model joins them (`swiglu_linear`), and rounds the input
of the second only once for dW. Writes records and the drawing. Takes ten minutes on one core, nine of them for
training.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from configs import tiny
from deepseek_jax.config import Config, from_config_dict
from deepseek_jax.data.pipeline import Loader, make_train_loader, open_tokenizer
from deepseek_jax.palette import BLUE, GREEN, VERMILION
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.program import resolve_for
from deepseek_jax.parameters import Weights
from deepseek_jax.training.evaluation import place_batch
from deepseek_jax.training.objective import pretraining
from deepseek_jax.training.optimizer import rates
from deepseek_jax.training.state import State, create_state
from deepseek_jax.training.step import jit_train_step
from experiments import command, session
from experiments.studies import output
from experiments.studies.linears import Linear, take
from experiments.studies.products import PRODUCTS, emulated, exact, ours
from pallas_kernels.bench import records
from pallas_kernels.quantized import GROUP

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORKDIR = Path("runs/activation_study")  # keeps the tokenizer and the tokenised corpus
ROWS = 16  # of the batch that is measured: 4,096 tokens
COLORS = dict(zip(PRODUCTS, (BLUE, GREEN, VERMILION), strict=True))
LARGEST_RATIO = 1.1
LEAST_COSINE = {"output": 0.999, "input gradient": 0.999, "weight gradient": 0.9985}
BATCH_TOKENS = [2**n for n in range(12, 27, 2)]  # 4,096 to 67M; DeepSeek-V3's batch grows to 15,360 x 4,096 = 63M


def main(_) -> None:
    """Train, take, measure, write, draw."""
    folder = output.folder("activation")
    session.start()
    config = study_config()
    mesh = make_mesh(config.mesh)
    loader = make_train_loader(config, open_tokenizer(config, WORKDIR), WORKDIR)
    state = train(config, mesh, loader)
    weights = Weights(state["params"], state["router_bias"])
    found = take(resolve_for(config, mesh), weights, loader.next_batch(ROWS))
    loader.close()
    points = [point for one in found for point in measure(one)]
    report(points)
    batches = [
        record for tokens in BATCH_TOKENS for record in medians([p for one in found for p in measure(one, tokens)])
    ]
    common = records.provenance("experiments.studies.activation_study", session.describe_device(mesh))
    records.write(folder / "activation_study.json", [point | common for point in points + batches])
    draw(points, batches).savefig(folder / "activation_study.png", dpi=110)
    print(f"Wrote {folder}/activation_study.json and .png")


def study_config() -> Config:
    """The tiny model with a latent of 128 channels, as FP8 wants it."""
    config = tiny.get_config()
    config.model.kv_latent = GROUP
    return from_config_dict(config)


def train(config: Config, mesh: jax.sharding.Mesh, loader: Loader) -> State:
    """Return the state after the config's tokens, on the host."""
    step, rows = jit_train_step(config, pretraining(config), mesh), config.training.micro_batch_size
    tokens = rows * config.data.sequence_length
    num_steps = int(config.training.num_tokens) // tokens
    with jax.set_mesh(mesh):
        state = create_state(config)
        for i in range(num_steps):
            state, metrics = step(state, place_batch(loader.next_batch(rows), mesh), rates(config, i, i * tokens))
            if i % 50 == 0 or i + 1 == num_steps:
                print(f"step {i + 1} of {num_steps}: loss {float(metrics['loss']):.3f}", flush=True)
    return jax.device_get(state)


def measure(one: Linear, batch_tokens: int | None = None) -> list[dict[str, Any]]:
    """Return the records of a linear layer's products, g scaled as in a batch of `batch_tokens` tokens if given."""
    tokens = len(one.x_TI)
    g_TO = (
        one.g_TO
        if batch_tokens is None
        else (one.g_TO.astype(np.float32) * np.float32(tokens / batch_tokens)).astype(one.g_TO.dtype)
    )
    x_TI, wide_g_TO = one.x_TI.astype(np.float32), g_TO.astype(np.float32)
    ways = (
        exact(x_TI, wide_g_TO, one.w_IO),
        ours(one.recipe, one.x_TI, g_TO, one.w_IO),
        emulated(one.recipe, x_TI, wide_g_TO, one.w_IO),
    )
    shape = {
        "tokens": tokens,
        "inputs": one.w_IO.shape[0],
        "outputs": one.w_IO.shape[1],
        "batch_tokens": batch_tokens or tokens,
    }
    found = []
    for op, want, *others in zip(PRODUCTS, *ways, strict=True):
        ours_is, emulated_is = (_compare(np.asarray(other, np.float64), want.astype(np.float64)) for other in others)
        yardstick = {"name": "the recipe emulated"} | emulated_is
        record = {
            "op": op,
            "mode": f"{one.layer}, {one.matrix}",
            "precision": "fp8",
            "shape": shape,
            "unit": "% relative L2",
        }
        found.append(record | ours_is | {"yardstick": yardstick})
    return found


def _compare(got: np.ndarray, want: np.ndarray) -> dict[str, float]:
    """Return the relative error in percent, the cosine and both biases."""
    error, norm = got - want, np.linalg.norm(want)
    along = float(np.vdot(got, want)) / norm
    return {
        "value": 100 * float(np.linalg.norm(error) / norm),
        "cosine": along / max(float(np.linalg.norm(got)), 1e-300),
        "slope": along / norm,
        "mean_error": 100 * float(error.mean()) * math.sqrt(error.size) / norm,
    }


def medians(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a record per gradient: the medians of error and cosine over all linear layers."""
    found = []
    for op in PRODUCTS[1:]:
        own = [point for point in points if point["op"] == op]
        middle = {key: float(np.median([point[key] for point in own])) for key in ("value", "cosine")}
        yardstick = {
            "name": "the recipe emulated",
            "value": float(np.median([point["yardstick"]["value"] for point in own])),
        }
        shape = {key: own[0]["shape"][key] for key in ("tokens", "batch_tokens")}
        found.append(
            {"op": op, "mode": "median of all linears", "precision": "fp8", "shape": shape, "unit": "% relative L2"}
            | middle
        )
        found[-1]["yardstick"] = yardstick
    return found


def report(points: list[dict[str, Any]]) -> None:
    """Print a line per product of every linear layer, and mark those that miss a bound."""
    print(
        f"{'':<42}{'cosine':>10}{'error %':>9}{'to emulated':>12}{'slope - 1':>11}{'emulated':>10}"
        f"{'mean %':>8}{'emulated':>10}"
    )
    for point in points:
        other = point["yardstick"]
        ratio = point["value"] / other["value"]
        missed = "  missed" if point["cosine"] < LEAST_COSINE[point["op"]] or ratio > LARGEST_RATIO else ""
        slopes = f"{point['slope'] - 1:>11.1e}{other['slope'] - 1:>10.1e}"
        means = f"{point['mean_error']:>8.3f}{other['mean_error']:>10.3f}"
        name = f"{point['mode']}, {point['op']}"
        print(f"{name:<42}{point['cosine']:>10.6f}{point['value']:>9.3f}{ratio:>12.4f}{slopes}{means}{missed}")


def draw(points: list[dict[str, Any]], batches: list[dict[str, Any]]) -> "Figure":
    """Return the drawing: errors of every linear layer on the left, of the gradients in larger batches on the right."""
    from matplotlib.figure import Figure  # slow to import, and only drawing needs it

    figure = Figure(figsize=(13, 8), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(point["mode"] for point in points))
    for op, color in COLORS.items():
        own = [point for point in points if point["op"] == op]
        left.plot([point["value"] for point in own], names, "o", color=color, label=op)
        left.plot(
            [point["yardstick"]["value"] for point in own],
            names,
            "o",
            color=color,
            markerfacecolor="none",
            markersize=9,
        )
        own = [record for record in batches if record["op"] == op]
        if own:
            sizes = [record["shape"]["batch_tokens"] for record in own]
            right.plot(sizes, [record["value"] for record in own], "o-", color=color, label=op)
            right.plot(
                sizes, [record["yardstick"]["value"] for record in own], ":", color=color, label=f"{op}, emulated"
            )
    left.set(title="Error of each linear (rings: the recipe emulated)", xlabel="relative L2 error, %", xlim=(0, None))
    left.invert_yaxis()
    right.set(
        title="Gradients as small as larger batches make them",
        xlabel="tokens of the batch",
        xscale="log",
        ylim=(0, None),
    )
    right.yaxis.set_major_formatter("{x:g}")
    right.set_ylabel("relative L2 error, %, median of all linears")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    command.run(main)

"""Compare FP8 linears with FP32 on the activations of a trained model.

`python -m experiments.studies.activation_study`

Normal numbers flatter a quantiser: what a model computes has outliers, and gradients that differ between tokens by
orders of magnitude. So `configs/tiny.py`, with a latent that FP8 can multiply, is trained as it says. In one more
batch, run in BF16, every `linear` has an input x and a gradient g of its output. Of these, and of its FP32 weight W, it
makes y = x W, dx = g W^T and dW = x^T g in three ways:

    exact       NumPy in FP32
    ours        `model.linear` with an `Fp8Weight`: kernels on their hardware, their references elsewhere
    emulated    the recipe as the report words it (DeepSeek-V3, arXiv 2412.19437, section 3.3), quantised in NumPy,
                products in FP32

Expected: cosines to exact of at least 0.999, and 0.9985 for dW, whose x is rounded twice; an error at most 1.1 times
the emulated recipe's; no bias. Bias is a slope of ours against exact that is not 1, or a mean error that is not 0; the
latter is given in percent of the root mean square of exact, for errors that share the rounding of one weight are not
independent, and their standard error would be too small.

g is divided by the tokens of a whole batch. The last records say what is left of the gradients where g is as small as
larger batches make it, as medians over all linears: a smallest scale that suits activations (1e-4 in the released
kernels) costs 60% at 67 million tokens.

The FFN's two matrices are measured one by one; the model joins them (`swiglu_linear`) and rounds the input of the
second only once for dW. Writes records and the drawing. Takes ten minutes on one core, nine of them for training.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl import app

from configs import tiny
from deepseek_jax.config import Config, from_config_dict, schedule_value
from deepseek_jax.data.packing import Batch
from deepseek_jax.data.pipeline import Loader, make_train_loader, open_tokenizer
from deepseek_jax.model import attention, layers, norm_linear, transformer
from deepseek_jax.model.linear import linear
from deepseek_jax.model.precision import ATTENTION_OUTPUT, HIDDEN, Input
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parameters import PARAMETERS, Fp8Weight, leaf_name
from deepseek_jax.training import losses
from deepseek_jax.training.evaluation import place_batch
from deepseek_jax.training.optimizer import rates
from deepseek_jax.training.state import State, create_state
from deepseek_jax.training.step import jit_train_step, resolve_for
from experiments import session
from experiments.studies import output
from pallas_kernels import records
from pallas_kernels.quantize import quantize_blocks
from pallas_kernels.quantized import GROUP

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORKDIR = Path("runs/activation_study")  # keeps the tokenizer and the tokenised corpus
ROWS = 16  # of the batch that is measured: 4,096 tokens
MATRICES = (
    "q_a_DA",
    "kv_a_DC",
    "q_b_ANQ",
    "kv_b_CNX",
    "o_NHD",
    "gate_up_D2F",
    "down_FD",
)  # of a layer, in the order of their products
PRODUCTS = ("output", "input gradient", "weight gradient")
LARGEST_E4M3, LARGEST_E5M6 = 448.0, 65024.0
COLORS = dict(zip(PRODUCTS, ("#0072B2", "#009E73", "#D55E00"), strict=True))  # Okabe and Ito's palette
LARGEST_RATIO = 1.1
LEAST_COSINE = {"output": 0.999, "input gradient": 0.999, "weight gradient": 0.9985}
BATCH_TOKENS = [2**n for n in range(12, 27, 2)]  # 4,096 to 67M; DeepSeek-V3's batch grows to 15,360 x 4,096 = 63M


class Linear(NamedTuple):
    """One product of the model, taken while it ran."""

    layer: str
    matrix: str
    x_TI: np.ndarray  # BF16
    g_TO: np.ndarray  # BF16
    w_IO: np.ndarray  # FP32

    @property
    def recipe(self) -> Input:
        """How FP8 treats x."""
        return ATTENTION_OUTPUT if self.matrix == "o_NHD" else HIDDEN


def main(_) -> None:
    """Train, take, measure, write, draw."""
    session.start()
    config = study_config()
    mesh = make_mesh(config.mesh)
    loader = make_train_loader(config, open_tokenizer(config, WORKDIR), WORKDIR)
    state = train(config, mesh, loader)
    found = take(resolve_for(config, mesh), state["params"], state["router_bias"], loader.next_batch(ROWS))
    loader.close()
    points = [point for one in found for point in measure(one)]
    report(points)
    batches = [
        record for tokens in BATCH_TOKENS for record in medians([p for one in found for p in measure(one, tokens)])
    ]
    folder = output.folder("activation")
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
    step, rows = jit_train_step(config, mesh), config.training.micro_batch_size
    tokens = rows * config.data.sequence_length
    num_steps = int(config.training.num_tokens) // tokens
    with jax.set_mesh(mesh):
        state = create_state(config)
        for i in range(num_steps):
            state, metrics = step(state, place_batch(loader.next_batch(rows), mesh), rates(config, i, i * tokens))
            if i % 50 == 0 or i + 1 == num_steps:
                print(f"step {i + 1} of {num_steps}: loss {float(metrics['loss']):.3f}", flush=True)
    return jax.device_get(state)


def take(config: Config, params: Any, router_bias: Any, batch: Batch) -> list[Linear]:
    """Run a batch forward and backward in BF16; return its linears, without those of routed experts, in the order of
    their products.

    g is the gradient by zeros that are added to each output, of the loss with MTP.

    Args:
        config: resolved.
        params: as `transformer.init` makes them, on the host.
        router_bias: likewise.
        batch: one that fits into memory.
    """
    execution = dataclasses.replace(
        config.execution, precision="bf16", remat="none", scan_unroll=config.model.num_layers
    )
    config = dataclasses.replace(config, execution=execution)

    def loss(zeros, params):
        taken = []

        def tapped(x, weight, input_dims=1, recipe=HIDDEN):
            y = linear(x, weight, input_dims, recipe)
            taken.append((x, y))
            return y + zeros[len(taken) - 1] if zeros else y

        with contextlib.ExitStack() as patched:
            for module in (attention, layers, norm_linear):
                patched.enter_context(mock.patch.object(module, "linear", tapped))
            output = transformer.apply(config, params, router_bias, batch, _cast)
        return _loss(config, output, params["head_DV"], batch), taken

    _, shapes = jax.eval_shape(functools.partial(loss, []), params)
    zeros = [jnp.zeros(y.shape, y.dtype) for _, y in shapes]
    gradients, taken = jax.jit(jax.grad(loss, has_aux=True))(zeros, params)
    found = []
    for (layer, matrix, weight), (x, _), g in zip(_weights(params), taken, gradients, strict=True):
        inputs = math.prod(weight.shape[: PARAMETERS[matrix].input_dims])
        x_TI, g_TO = np.asarray(x).reshape(-1, inputs), np.asarray(g).reshape(batch["tokens_BS"].size, -1)
        found.append(Linear(layer, matrix, x_TI, g_TO, weight.reshape(inputs, -1)))
    return found


def _cast(tree: Any) -> Any:
    """Weights in BF16 but for those that are not multiplied in it; what `parallel.weights.gather` does on one
    device.
    """

    def one(path, w):
        return w.astype(jnp.bfloat16) if w.ndim > 1 and PARAMETERS[leaf_name(path)].precision != "fp32" else w

    return jax.tree_util.tree_map_with_path(one, tree)


def _loss(config: Config, output: transformer.Output, head_DV: jax.Array, batch: Batch) -> jax.Array:
    """Cross entropy per token, with that of the MTP layers."""

    def one(hidden_BSD, targets_BS, weights_BS):
        hidden_TD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
        return losses.cross_entropy(
            hidden_TD, head_DV, targets_BS.ravel(), weights_BS.ravel(), config.execution.loss_chunk, 0.0
        )[0]

    total = one(output.hidden_BSD, batch["targets_BS"], batch["loss_weights_BS"])
    for depth, hidden_BSD in enumerate(output.mtp_hidden, start=1):
        weight = schedule_value(config.loss.mtp_weight, 0.0) / len(output.mtp_hidden)
        total += weight * one(hidden_BSD, *losses.mtp_targets(batch, depth)[1:])
    return total / batch["loss_weights_BS"].sum()


def _weights(params: Any) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield layer, matrix and weight of every linear in the order in which `transformer.apply` multiplies."""
    for stack in ("dense_layers", "moe_layers", "mtp_layers"):
        parts = params.get(stack, {})
        parts = parts.get("block", parts)
        for layer in range(len(parts["attention"]["norm_D"]) if parts else 0):
            owners = parts["attention"], parts["ffn"] if "ffn" in parts else parts["moe"]["shared"]
            for owner in owners:
                yield from (
                    (f"{stack.split('_')[0]} {layer}", matrix, owner[matrix][layer])
                    for matrix in MATRICES
                    if matrix in owner
                )


def measure(one: Linear, batch_tokens: int | None = None) -> list[dict[str, Any]]:
    """Return the records of the three products of a linear; with `batch_tokens`, g is what it would be in a batch of so
    many tokens.
    """
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
    """Return the relative error in percent, the cosine, and both biases."""
    error, norm = got - want, np.linalg.norm(want)
    along = float(np.vdot(got, want)) / norm
    return {
        "value": 100 * float(np.linalg.norm(error) / norm),
        "cosine": along / max(float(np.linalg.norm(got)), 1e-300),
        "slope": along / norm,
        "mean_error": 100 * float(error.mean()) * math.sqrt(error.size) / norm,
    }


def medians(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a record per gradient: the medians of the linears' errors and cosines."""
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


def exact(x_TI: np.ndarray, g_TO: np.ndarray, w_IO: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return y, dx and dW in FP32."""
    return x_TI @ w_IO, g_TO @ w_IO.T, x_TI.T @ g_TO


@functools.partial(jax.jit, static_argnums=0)
def ours(recipe: Input, x_TI: jax.Array, g_TO: jax.Array, w_IO: jax.Array) -> tuple[jax.Array, ...]:
    """Return y, dx and dW of `model.linear` in FP8."""
    blocks = quantize_blocks(w_IO)
    y_TO, pull = jax.vjp(
        lambda x, carrier: linear(x, Fp8Weight(carrier, blocks.values, blocks.scales), recipe=recipe), x_TI, w_IO
    )
    return y_TO, *pull(g_TO)


def emulated(recipe: Input, x_TI: np.ndarray, g_TO: np.ndarray, w_IO: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return y, dx and dW in FP32 of operands that are quantised as the report says: figure 6, sections 3.3.2 and
    3.3.3.
    """
    pow2 = recipe.scale == "pow2"
    tiles_TI, blocks_IO = quantized(x_TI, (1, GROUP), pow2=pow2), quantized(w_IO, (GROUP, GROUP))
    kept_TI = (
        quantized(x_TI, (1, GROUP), pow2=True, rounded=e5m6, largest=LARGEST_E5M6)
        if recipe.kept == "e5m6"
        else tiles_TI
    )
    columns_TI = quantized(kept_TI, (GROUP, 1), pow2=pow2)
    return tiles_TI @ blocks_IO, quantized(g_TO, (1, GROUP)) @ blocks_IO.T, columns_TI.T @ quantized(g_TO, (GROUP, 1))


def e4m3(x: np.ndarray) -> np.ndarray:
    """Round to E4M3."""
    return x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def e5m6(x: np.ndarray) -> np.ndarray:
    """Round to five exponent and six mantissa bits, bias 15."""
    step = 2.0 ** (np.maximum(np.frexp(x)[1] - 1, -14) - 6)
    return np.round(x / step) * step


def quantized(
    x: np.ndarray, group: tuple[int, int], pow2: bool = False, rounded: Callable = e4m3, largest: float = LARGEST_E4M3
) -> np.ndarray:
    """Return FP32 `x` [m, n] with one scale per group of (rows, columns), the last of which may be partial, after
    rounding.
    """
    (m, n), (rows, columns) = x.shape, group
    padded = np.pad(x, ((0, -m % rows), (0, -n % columns)))
    parts = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns).astype(np.float64)
    scale = abs(parts).max(axis=(1, 3), keepdims=True) / largest
    scale = np.where(scale > 0, scale, 1.0)
    scale = 2.0 ** np.ceil(np.log2(scale)) if pow2 else scale
    return (rounded((parts / scale).astype(np.float32)) * scale).astype(np.float32).reshape(padded.shape)[:m, :n]


def report(points: list[dict[str, Any]]) -> None:
    """Print a line per product of every linear, and say what misses a bound."""
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
    """Return the drawing: errors of every linear on the left, those of the gradients in larger batches on the right."""
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
    app.run(main)

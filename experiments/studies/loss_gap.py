"""Train in FP8 and in BF16 on the same data from the same weights, and draw the gap.

`python -m experiments.studies.loss_gap`

Two runs in BF16 whose weights begin 1e-7 apart part, too: rounding decides ties between experts, and from then on they
are two runs. Their difference is the noise floor. Three runs per seed:

    bf16         the yardstick
    bf16 noise   the same, every initial weight multiplied by 1 + 1e-7 n, n normal
    fp8          the recipe (`model/precision.py`)

Reports the largest gap of the smoothed losses after warm-up, and the mean signed gap over the last quarter of the
steps, in percent of the yardstick's loss. (The report has less than 0.25% for models of 16B and 230B, appendix B.1.)
Writes loss_gap.json, loss_gap.png, and loss_gap.csv with every loss.
"""

import csv
import dataclasses
import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from absl import flags

from deepseek_jax.config import Config, from_config_dict
from deepseek_jax.data.packing import Batch
from deepseek_jax.data.pipeline import check_data, make_train_loader, open_tokenizer
from deepseek_jax.inputs import new_folder
from deepseek_jax.palette import BLUE, GRAY, VERMILION
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.training.evaluation import place_batch
from deepseek_jax.training.loop import NonFiniteError
from deepseek_jax.training.objective import pretraining
from deepseek_jax.training.optimizer import batch_size, rates
from deepseek_jax.training.state import State, create_state
from deepseek_jax.training.step import jit_train_step
from experiments import command, recipe, session
from experiments.studies import output
from pallas_kernels.bench import records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFIG = recipe.Recipe("configs/v3_300m.py", "Configuration; its precision is set by the arm.")
WORKDIR = flags.DEFINE_string("workdir", "runs/loss_gap", "Folder that keeps the tokenizer and the tokenised corpus.")
SEEDS = flags.DEFINE_integer("seeds", 2, "Number of seeds.", lower_bound=1, upper_bound=1000)

ARMS = ("bf16", "bf16 noise", "fp8")
PERTURBATION = 1e-7
SMOOTHING = 0.9  # of the exponential moving average
COLORS = {"bf16": BLUE, "bf16 noise": GRAY, "fp8": VERMILION}
LABELS = {"bf16": "BF16", "bf16 noise": "BF16 again, weights 1e-7 apart", "fp8": "FP8 (DeepSeek-V3's recipe)"}


def main(_) -> None:
    """Train, write, draw."""
    config = from_config_dict(CONFIG.value)
    results, workdir = output.folder("loss_gap"), new_folder(WORKDIR.value, "--workdir")
    size = batch_size(config, tokens_seen=0)
    num_steps = int(config.training.num_tokens // (size * config.data.sequence_length))
    if num_steps <= config.optimizer.warmup_steps:
        raise ValueError(
            f"config.training.num_tokens = {config.training.num_tokens:g} is {num_steps} steps, of which warm-up takes"
            f" {config.optimizer.warmup_steps}: no step is left to compare; raise it or lower optimizer.warmup_steps"
        )
    check_data(config, workdir)
    session.start()
    mesh = make_mesh(config.mesh)
    steps = {
        precision: jit_train_step(_with(config, precision), pretraining(config), mesh) for precision in ("bf16", "fp8")
    }
    losses: dict[tuple[int, str], np.ndarray] = {}
    for seed in range(config.seed, config.seed + SEEDS.value):
        seeded = dataclasses.replace(config, seed=seed)
        batches = _batches(seeded, workdir, size, num_steps)
        for arm in ARMS:
            losses[seed, arm] = train(
                seeded, mesh, steps[arm.split()[0]], batches, arm.endswith("noise"), f"seed {seed}, {arm}"
            )
            # Earlier results stay until a seed is complete: a run that fails leaves its losses in the workdir.
            complete = (config.seed, ARMS[-1]) in losses
            write(results if complete else workdir, config, session.describe_device(mesh), losses)


def _with(config: Config, precision: str) -> Config:
    return config.with_(execution={"precision": precision})


def _batches(config: Config, workdir: Path, size: int, count: int) -> list[Batch]:
    loader = make_train_loader(config, open_tokenizer(config, workdir), workdir)
    batches = [loader.next_batch(size) for _ in range(count)]
    loader.close()
    return batches


def train(
    config: Config, mesh: jax.sharding.Mesh, step: Any, batches: list[Batch], perturbed: bool, label: str
) -> np.ndarray:
    """Return the loss of every step, in nats per token."""
    found, start = [], time.perf_counter()
    with jax.set_mesh(mesh):
        state = create_state(config)
        if perturbed:
            state["params"] = _perturb(state)
        tokens = batches[0]["tokens_BS"].size
        for i, batch in enumerate(batches):
            state, metrics = step(state, place_batch(batch, mesh), rates(config, i, i * tokens))
            found.append(metrics["loss"])
            if i % 200 == 199 or i + 1 == len(batches):
                seconds = time.perf_counter() - start
                print(f"{label}: step {i + 1}, loss {float(found[-1]):.4f}, {seconds:.0f} s", flush=True)
        skipped = int(metrics["skipped"])
    losses = np.array(jax.device_get(found), np.float64)
    if skipped or not np.isfinite(losses).all():
        raise NonFiniteError(
            f"{label}: {np.sum(~np.isfinite(losses))} losses are not finite; lower optimizer.learning_rate"
        )
    return losses


@jax.jit
def _perturb(state: State) -> Any:
    def noisy(w, key):
        return w * (1 + PERTURBATION * jax.random.normal(key, w.shape, out_sharding=jax.typeof(w).sharding))

    leaves, tree = jax.tree.flatten(state["params"])
    return jax.tree.unflatten(tree, map(noisy, leaves, jax.random.split(jax.random.key(1), len(leaves))))


def smooth(losses: np.ndarray) -> np.ndarray:
    """Return the exponential moving average, corrected for its start at zero."""
    averages = list(
        itertools.accumulate(losses, lambda before, x: SMOOTHING * before + (1 - SMOOTHING) * x, initial=0.0)
    )[1:]
    return np.array(averages) / (1 - SMOOTHING ** np.arange(1, len(losses) + 1))


def gaps(losses: np.ndarray, yardstick: np.ndarray, warmup_steps: int) -> tuple[np.ndarray, float, float]:
    """Return, in percent, the gap of the smoothed losses at every step, its largest magnitude after warm-up, and the
    mean gap of the losses over the last quarter.
    """
    gap = 100 * (smooth(losses) / smooth(yardstick) - 1)
    last = slice(3 * len(losses) // 4, None)
    return gap, float(np.abs(gap[warmup_steps:]).max()), float(100 * (losses[last].mean() / yardstick[last].mean() - 1))


def write(folder: Path, config: Config, device: str, losses: dict[tuple[int, str], np.ndarray]) -> None:
    """Write the losses so far, and records and drawing of the seeds whose arms are all complete."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "loss_gap.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *(f"seed {seed}, {arm}" for seed, arm in losses)])
        writer.writerows(
            [i + 1, *(f"{x:.6f}" for x in row)] for i, row in enumerate(zip(*losses.values(), strict=True))
        )
    seeds = [seed for seed, arm in losses if arm == ARMS[-1]]
    if seeds:
        found = [record for seed in seeds for record in describe(config, seed, losses)]
        records.write(
            folder / "loss_gap.json",
            [record | records.provenance("experiments.studies.loss_gap", device) for record in found],
        )
        draw(config, seeds, losses).savefig(folder / "loss_gap.png", dpi=110)
        for record in found:
            print(f"{record['mode']}: {record['value']:.4f} {record['unit']}")


def describe(config: Config, seed: int, losses: dict[tuple[int, str], np.ndarray]) -> list[dict[str, Any]]:
    """Return the records of one seed."""
    shape = {"steps": len(losses[seed, "bf16"]), "tokens_per_step": batch_size(config, 0) * config.data.sequence_length}
    found = []
    for arm in ARMS[1:]:
        _, largest, mean = gaps(losses[seed, arm], losses[seed, "bf16"], config.optimizer.warmup_steps)
        values = {"largest gap of the smoothed loss after warm-up": largest, "mean gap over the last quarter": mean}
        found += [
            {
                "op": config.name,
                "mode": f"seed {seed}, {arm} against bf16, {name}",
                "precision": arm.split()[0],
                "shape": shape,
            }
            | {"value": value, "unit": "%", "yardstick": None}
            for name, value in values.items()
        ]
    return found


def draw(config: Config, seeds: list[int], losses: dict[tuple[int, str], np.ndarray]) -> "Figure":
    """Return the drawing: smoothed losses on the left, their gaps to BF16 on the right."""
    from matplotlib.figure import Figure  # slow to import, and only drawing needs it

    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    warmup = config.optimizer.warmup_steps
    for number, seed in enumerate(seeds):
        style = {"linestyle": "-" if number == 0 else "--", "linewidth": 1.2}
        for arm in ARMS:
            curve = smooth(losses[seed, arm])
            label = LABELS[arm] if number == 0 else None
            left.plot(np.arange(1, len(curve) + 1), curve, color=COLORS[arm], label=label, **style)
            if arm != "bf16":
                gap = gaps(losses[seed, arm], losses[seed, "bf16"], warmup)[0]
                right.plot(np.arange(warmup, len(gap)) + 1, gap[warmup:], color=COLORS[arm], **style)
    left.set(title=f"{config.name}: loss, nats per token", xlabel="step", yscale="log")
    left.legend(frameon=False)
    right.set(title="Gap to BF16, %; dotted: the 0.25% of the report", xlabel="step")
    for limit in (-0.25, 0.25):
        right.axhline(limit, color="black", linewidth=0.8, linestyle=":")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    command.run(main)

"""One pass over the held-out batches: loss, bits per byte, and how evenly the experts were used."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from deepseek_jax.data.heldout import HeldOut
from deepseek_jax.data.packing import Batch
from deepseek_jax.parameters import ROWS, Weights


class Evaluation(NamedTuple):
    """What the held-out text says about a model."""

    loss: float  # nats per target of the main head
    bits_per_byte: float  # all nats as bits, over the UTF-8 bytes of the text
    source_bits_per_byte: list[float | None]  # of each source; None where nothing is held out
    mtp_loss: list[float]  # one per depth: nats, over the number of targets of the main head
    counts_LE: np.ndarray  # int64 assignments
    max_vio_L: np.ndarray  # of counts_LE: (max - mean) / mean


def place_batch(batch: Batch, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Put this process's rows on the mesh; they are its part of the global batch."""
    sharding = jax.sharding.NamedSharding(mesh, jax.P(ROWS))
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def evaluate(eval_step: Callable, weights: Weights, held_out: HeldOut, mesh: jax.sharding.Mesh) -> Evaluation:
    """Run `eval_step` over every held-out batch without waiting; add on the host in double precision.

    The losses of several sources are averaged by their weights. The counts of experts are of all batches, of which each
    source has its share.
    """
    pending = [[eval_step(weights, place_batch(batch, mesh)) for batch in part] for part in held_out.parts]
    sums = [
        jax.tree.map(lambda *values: np.sum(np.stack(values).astype(np.float64), axis=0), *jax.device_get(results))
        if results
        else None
        for results in pending
    ]
    counts_LE = sum(total["counts_LE"] for total in sums if total).astype(np.int64)
    mean_L = np.maximum(counts_LE.mean(axis=1), 1e-9)
    bits = [
        float(total["loss_sum"] / np.log(2.0) / part.num_bytes) if total else None
        for total, part in zip(sums, held_out.parts, strict=True)
    ]
    return Evaluation(
        loss=float(held_out.mean([total and total["loss_sum"] / total["weight_sum"] for total in sums])),
        bits_per_byte=held_out.mean(bits),
        source_bits_per_byte=bits,
        mtp_loss=held_out.mean([total and total["mtp_loss_sum"] / total["weight_sum"] for total in sums]).tolist(),
        counts_LE=counts_LE,
        max_vio_L=counts_LE.max(axis=1) / mean_L - 1.0,
    )

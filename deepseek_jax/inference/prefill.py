"""Prefill: prompts of any lengths go through the model in calls of packed tokens, and the cache keeps them.

A call takes T tokens of each device, a power of two, so that there are few programs. The host packs the new tokens of
a device's sequences into them, the longest first (`calls`). A sequence that does not fit goes into a later call. Only
one that is longer than a whole call is cut, and its next piece continues from the pages of the last. Sequences may also
begin with a prefix that the cache has already. Four sequences, calls of at most 16 tokens:

    new tokens      7, 40, 5, 3
    call 1          16 of 1                     16 tokens
    call 2          16 of 1                     16 tokens, continues
    call 3          7 of 0, 8 of 1              16 tokens, continues
    call 4          5 of 2, 3 of 3              8 tokens

The tokens that fill up a call belong to no sequence: they are written nowhere and reach no expert.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from deepseek_jax.config import Config, Execution, Model
from deepseek_jax.inference.cache import CACHE_SPECS, Cache
from deepseek_jax.inference.weights import weight_specs
from deepseek_jax.model.packed import Rows
from deepseek_jax.model.prefill import Sequences
from deepseek_jax.model.transformer import prefill_step
from deepseek_jax.parallel.mesh import axis_size
from deepseek_jax.parallel.program import jit_on, resolve_for
from deepseek_jax.parameters import ROWS, P, Weights
from pallas_kernels.lowering import manual_axes

# Tokens of a device in a call. More make no product faster. A CPU's products are as fast with few.
MOST_TOKENS, MOST_TOKENS_ON_CPU = 16384, 2048
MOST_PADDED = 2  # times that, at most, are the tokens of the rows that cuDNN attends to
FEWEST_TOKENS = 128  # smaller calls take as long
EXPERT_BLOCK, EXPERT_WAVE = 16, 8  # where experts are multiplied in blocks; a short prompt gives each of them few rows


class Call(NamedTuple):
    """One run of the program.

    Attributes:
        tokens_T: int32, the packed tokens of the devices one behind the other.
        new_B: int32, how many of them each row has.
        rows: that the sequences of a device fill; a program with cuDNN is made for them.
        continues: whether any row has tokens in the cache already; a program is made for that, too.
    """

    tokens_T: np.ndarray
    new_B: np.ndarray
    rows: Rows
    continues: bool


def prefill_execution(config: Config, mesh: jax.sharding.Mesh) -> Execution:
    """Return the execution of prefill on `mesh`: attention and experts as in training, where nothing is split."""
    changes = {"exchange": "auto", "remat": "none", "scan_unroll": 1}
    changes |= {"expert_block": EXPERT_BLOCK, "expert_wave": EXPERT_WAVE}
    execution = resolve_for(config.with_(execution=changes, data={"mask_documents": False}), mesh).execution
    if execution.attention != "cudnn":
        return dataclasses.replace(execution, attention="xla")
    return execution


def calls(new_tokens: Sequence[Sequence[int]], length_B: np.ndarray, num_devices: int, most_tokens: int) -> list[Call]:
    """Pack new tokens into calls.

    Args:
        new_tokens: of every row; the first B / `num_devices` rows are those of the first device, and so on.
        length_B: tokens that the cache has of every row.
        num_devices: that rows are split over.
        most_tokens: of a device in a call, a power of two.
    """
    tokens = [np.asarray(row, np.int32) for row in new_tokens]
    left_B, each, found = np.array([len(row) for row in tokens]), len(tokens) // num_devices, []
    while left_B.any():
        new_B = np.zeros(len(tokens), np.int32)
        length = _bucket(min(int(left_B.max()), most_tokens))
        for first in range(0, len(tokens), each):
            _fill(new_B[first : first + each], left_B[first : first + each], most_tokens, length)
        begin_B = np.array([len(row) for row in tokens]) - left_B
        num_tokens = _bucket(int(new_B.reshape(-1, each).sum(1).max()))
        tokens_RT = np.zeros((num_devices, num_tokens), np.int32)
        for device, packed_T in enumerate(tokens_RT):
            rows = range(device * each, (device + 1) * each)
            new = np.concatenate([tokens[row][begin_B[row] : begin_B[row] + new_B[row]] for row in rows])
            packed_T[: len(new)] = new
        number = _power_of_two(int((new_B.reshape(-1, each) > 0).sum(1).max()))
        continues = bool(((new_B > 0) & (begin_B + length_B > 0)).any())
        found.append(Call(tokens_RT.reshape(-1), new_B, Rows(number, length), continues))
        left_B = left_B - new_B
    return found


def _fill(new_B: np.ndarray, left_B: np.ndarray, most_tokens: int, length: int) -> None:
    """Write how many of its tokens each row of a device gets in a call, whose rows have `length` tokens."""
    room, most_rows = most_tokens, max(MOST_PADDED * most_tokens // length, 1)
    for row in np.argsort(-left_B, kind="stable"):
        left = left_B[row]
        if left and (new_B > 0).sum() < most_rows and (left <= room or left > most_tokens):
            new_B[row] = min(left, room)
            room -= new_B[row]


def run_prefill(
    model: Model,
    execution: Execution,
    mesh: jax.sharding.Mesh,
    weights: Weights,
    cache: Cache,
    new_tokens: Sequence[Sequence[int]],
) -> tuple[Array, Cache]:
    """Run new tokens of every row through the model; call it under `jax.set_mesh(mesh)`.

    Args:
        model: shape and mathematics.
        execution: as `prefill_execution` returns it.
        mesh: rows are split over its devices.
        weights: as `decode_weights` returns them.
        cache: donated. Rows continue behind its lengths, and their tables have the pages for the new tokens.
        new_tokens: of each row of the cache, [] for one that gets none.

    Returns:
        FP32 logits [B, V] of the token after each row's last new one, 0 of a row that gets none, and the cache.
    """
    most_tokens = MOST_TOKENS_ON_CPU if mesh.devices.flat[0].platform == "cpu" else MOST_TOKENS
    packed = calls(new_tokens, np.asarray(cache.length_B), axis_size(mesh, ROWS), most_tokens)
    shape = len(new_tokens), weights.params["head_DV"].shape[1]
    logits_BV = jnp.zeros(shape, jnp.float32, device=jax.NamedSharding(mesh, P(ROWS)))  # made where they are needed
    for call in packed:
        program = prefill_program(model, execution, mesh, call)
        arrays = jax.device_put((call.tokens_T, call.new_B), P(ROWS))
        logits_BV, cache = program(weights, cache, logits_BV, *arrays)
    return logits_BV, cache


def prefill_program(model: Model, execution: Execution, mesh: jax.sharding.Mesh, call: Call) -> Callable:
    """Return the program of a call: (weights, cache, logits_BV, tokens_T, new_B) -> (logits_BV, cache)."""
    rows = call.rows if execution.attention == "cudnn" else Rows(0, 0)  # others do not read them
    return jit_on(prefill, execution, mesh, model, execution, rows, call.continues, donate=(1, 2), cublas=True)


def prefill(
    model: Model,
    execution: Execution,
    rows: Rows,
    continues: bool,
    weights: Weights,
    cache: Cache,
    logits_BV: Array,
    tokens_T: Array,
    new_B: Array,
) -> tuple[Array, Cache]:
    """Run the packed tokens of one call; a row without new ones keeps its logits."""

    def local(weights, cache, logits_BV, tokens_T, new_B):
        weights = manual_axes.vary(weights, frozenset(ROWS))
        sequences = Sequences.of(cache.tables_BJ, cache.length_B, new_B, len(tokens_T))
        options = {"continues": continues, "rows": rows}
        hidden_TD, pages = prefill_step(model, execution, weights, cache.pages, tokens_T, sequences, **options)
        hidden_BD = hidden_TD[jnp.maximum(jnp.cumsum(new_B) - 1, 0)]
        with jax.named_scope("head"):
            new_BV = jnp.matmul(hidden_BD, weights.params["head_DV"], preferred_element_type=jnp.float32)
        logits_BV = jnp.where(new_B[:, None] > 0, new_BV, logits_BV)
        return logits_BV, cache._replace(pages=pages, length_B=cache.length_B + new_B)

    in_specs = weight_specs(weights), CACHE_SPECS, P(ROWS), P(ROWS), P(ROWS)
    run = jax.shard_map(local, in_specs=in_specs, out_specs=(P(ROWS), CACHE_SPECS))
    return run(weights, cache, logits_BV, tokens_T, new_B)


def _bucket(number: int) -> int:
    """Return the number of tokens that a program is made for."""
    return max(FEWEST_TOKENS, _power_of_two(number))


def _power_of_two(number: int) -> int:
    return 1 << (int(number) - 1).bit_length()

"""The routed experts' FFN in plain XLA: work proportional to the assignments, static shapes.

Problem. T rows have K experts each; expert e gets n_e of the T * K assignments, known only at run time. A matmul per
expert needs dynamic shapes. A buffer of fixed capacity per expert either drops rows or is sized for the worst case.
Computing every expert for every row costs E / K times the work.

Choice. Sort the assignments by expert and cut each expert's run into blocks of `block` rows; only the last block of an
expert has empty rows. T * K / block + E blocks, a static number, are always enough. A block belongs to one expert, so a
batched matmul of blocks against gathered weights does the work, `wave` blocks at a time. The loop over waves stops at
the number of blocks that exist (traced), so a buffer sized for twice the balanced load costs no arithmetic when routing
is balanced. The gate multiplies the SwiGLU output, before the down projection.

Worked example, block = 2, six assignments to experts [1 0 1 1 2 1]:

    sorted by expert      0: [1]   1: [0 2 3 5]   2: [4]
    blocks                0: [1 _]    1: [0 2] [3 5]    2: [4 _]      block_expert = [0 1 1 2]
    source                1 6 0 2 3 5 4 6           (6 = empty)
    slots                 2 0 3 4 6 5               (where each assignment went)

The derivative is written out: it recomputes the SwiGLU output from the saved pre-activations, reads the incoming
gradient by the same `source`, and makes weight gradients in FP32. Gate and up projections are two products: to
take one product of both apart, and to put its derivative together, would be passes over all rows.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.model.layers import silu_with_slope
from deepseek_jax.model.recompute import keep
from deepseek_jax.parallel.mesh import vary
from deepseek_jax.parallel.rows import sum_rows
from deepseek_jax.parameters import CastWeight


class Blocks(NamedTuple):
    """The assignments in block order. Z = number of slots = padded number of blocks * block."""

    source_Z: jax.Array  # assignment in each slot, T * K where empty
    slots_TK: jax.Array  # slot of each assignment, Z where it has no expert here
    expert: jax.Array  # [blocks] expert of each block
    rows_E: jax.Array  # slots of each expert, empty ones included
    waves: jax.Array  # number of waves that hold a block with rows


class Routing(NamedTuple):
    """The part of `Blocks` that grouped products over all rows need (`experts_fp8`, `experts_grouped`)."""

    source_Z: jax.Array
    slots_TK: jax.Array
    rows_E: jax.Array


def plan_blocks(experts_TK: jax.Array, num_experts: int, block: int, wave: int) -> Blocks:
    """Sort assignments by expert and cut them into blocks; ids outside [0, num_experts) get no slot."""
    flat = experts_TK.reshape(-1)
    num_blocks = -(-(flat.size // block + num_experts) // wave) * wave
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    bounds = jnp.searchsorted(flat[order], jnp.arange(num_experts + 1), method="compare_all").astype(jnp.int32)
    start, count = bounds[:-1], jnp.diff(bounds)
    blocks = (count + block - 1) // block
    block_end = jnp.cumsum(blocks)
    first_slot = (block_end - blocks) * block

    expert = jnp.searchsorted(block_end, jnp.arange(num_blocks), side="right", method="compare_all")
    expert = jnp.minimum(expert, num_experts - 1)
    slot_expert = jnp.repeat(expert, block)
    offset = jnp.arange(num_blocks * block, dtype=jnp.int32) - first_slot[slot_expert]
    filled = offset < count[slot_expert]
    source_Z = jnp.where(filled, jnp.take(order, start[slot_expert] + offset, mode="clip"), flat.size)

    rank = jnp.zeros_like(order).at[order].set(jnp.arange(flat.size, dtype=jnp.int32), unique_indices=True)
    clipped = jnp.clip(flat, 0, num_experts - 1)
    slot = jnp.where(
        (flat >= 0) & (flat < num_experts), first_slot[clipped] + rank - start[clipped], num_blocks * block
    )
    return Blocks(source_Z, slot.reshape(experts_TK.shape), expert, blocks * block, (block_end[-1] + wave - 1) // wave)


def expert_ffn(
    weights: dict[str, jax.Array | CastWeight],
    x_TD: jax.Array,
    gates_TK: jax.Array,
    experts_TK: jax.Array,
    *,
    block: int,
    wave: int,
) -> jax.Array:
    """Return the gated sum of each row's experts: sum over k of gate_k * down_k(silu(x gate_k) * (x up_k)) (V3 eq. 12).

    Args:
        weights: `gate_up_ED2F` and `down_EFD` of the experts that are here, in the dtype of `x_TD`.
        x_TD: rows.
        gates_TK: FP32 gate weights.
        experts_TK: int32 ids into the weights; other ids contribute zero.
        block: rows per block.
        wave: blocks multiplied at once; if there are no more blocks than that, there is no loop.
    """
    gate_up, down = (CastWeight.of(weights[name]) for name in ("gate_up_ED2F", "down_EFD"))
    num_experts = down.values.shape[0]
    wave = min(wave, experts_TK.size // block + num_experts)
    with jax.named_scope("route"):
        blocks = keep(plan_blocks(experts_TK, num_experts, block, wave), "routing")
    weights = gate_up.values, down.values
    return _blocked_ffn((block, wave), x_TD, gates_TK, gate_up.carrier, down.carrier, weights, blocks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked_ffn(sizes, x_TD, gates_TK, gate_up_carrier, down_carrier, weights, blocks):
    return _forward(sizes, x_TD, gates_TK, gate_up_carrier, down_carrier, weights, blocks)[0]


def _over_waves(num_waves, bound, body, carry):
    """Run `body(i, carry)` for each wave that exists; a single wave needs no loop."""
    return body(0, carry) if bound == 1 else lax.fori_loop(0, num_waves, body, carry)


def _wave(sizes, i, x_TD, gates_TK, blocks):
    """Return sources, rows, gates and experts of wave i."""
    block, wave = sizes
    source = lax.dynamic_slice_in_dim(blocks.source_Z, i * wave * block, wave * block)
    x = jnp.take(x_TD, source // gates_TK.shape[1], axis=0, mode="fill", fill_value=0).reshape(wave, block, -1)
    gate = jnp.take(gates_TK.reshape(-1), source, mode="fill", fill_value=0).reshape(wave, block, 1)
    return source, x, gate, lax.dynamic_slice_in_dim(blocks.expert, i * wave, wave)


def _put(buffer, rows, i):
    """Write a wave's rows into a buffer of all slots; a wave of all slots is itself the buffer."""
    rows = rows.reshape(-1, *buffer.shape[1:])
    return rows if rows.shape == buffer.shape else lax.dynamic_update_slice_in_dim(buffer, rows, i * rows.shape[0], 0)


def _forward(sizes, x_TD, gates_TK, gate_up_carrier, down_carrier, weights, blocks):
    gate_up_ED2F, down_EFD = weights
    num_slots, dtype, hidden_size = blocks.source_Z.size, x_TD.dtype, down_EFD.shape[1]

    def body(i, carry):
        y_ZD, gate_ZF, up_ZF = carry
        _, x, weight, expert = _wave(sizes, i, x_TD, gates_TK, blocks)
        gate, up = (jnp.einsum("wbd,wdf->wbf", x, gate_up_ED2F[expert, :, half]) for half in range(2))
        act = _swiglu(gate, up)[0] * weight
        y = jnp.einsum("wbf,wfd->wbd", act.astype(dtype), down_EFD[expert])
        return _put(y_ZD, y, i), _put(gate_ZF, gate, i), _put(up_ZF, up, i)

    with jax.named_scope("experts"):
        zeros = [
            vary(jnp.zeros((num_slots, width), dtype), x_TD) for width in (x_TD.shape[1], hidden_size, hidden_size)
        ]
        y_ZD, gate_ZF, up_ZF = _over_waves(blocks.waves, blocks.expert.size // sizes[1], body, tuple(zeros))
        hidden = keep((gate_ZF, up_ZF), "expert_hidden")
        y_TD = sum_rows(y_ZD, blocks.source_Z, blocks.slots_TK)
    return y_TD, (x_TD, gates_TK, weights, blocks, hidden)


def _backward(sizes, residuals, g_TD):
    x_TD, gates_TK, (gate_up_ED2F, down_EFD), blocks, (gate_ZF, up_ZF) = residuals
    num_slots, dtype = blocks.source_Z.size, x_TD.dtype
    rows = sizes[0] * sizes[1]

    def body(i, carry):
        dx_ZD, dweight_Z, dgate_up, ddown = carry
        source, x, weight, expert = _wave(sizes, i, x_TD, gates_TK, blocks)
        gate, up = (
            lax.dynamic_slice_in_dim(half, i * rows, rows).reshape(*x.shape[:2], -1) for half in (gate_ZF, up_ZF)
        )
        dy = jnp.take(g_TD, source // gates_TK.shape[1], axis=0, mode="fill", fill_value=0).reshape(x.shape)
        act, act_by_gate, act_by_up = _swiglu(gate, up)
        dact = jnp.einsum("wbd,wfd->wbf", dy, down_EFD[expert]).astype(jnp.float32)
        dhalves = [(dact * weight * slope).astype(dtype) for slope in (act_by_gate, act_by_up)]
        dx = sum(jnp.einsum("wbf,wdf->wbd", d, gate_up_ED2F[expert, :, half]) for half, d in enumerate(dhalves))
        ddown = ddown.at[expert].add(
            jnp.einsum("wbf,wbd->wfd", (act * weight).astype(dtype), dy, preferred_element_type=jnp.float32)
        )
        dhalves = [jnp.einsum("wbd,wbf->wdf", x, d, preferred_element_type=jnp.float32) for d in dhalves]
        dgate_up = dgate_up.at[expert].add(jnp.stack(dhalves, axis=2))
        return _put(dx_ZD, dx, i), _put(dweight_Z, (dact * act).sum(-1), i), dgate_up, ddown

    with jax.named_scope("experts"):
        buffers = jnp.zeros((num_slots, x_TD.shape[1]), dtype), jnp.zeros((num_slots,))
        carry = jax.tree.map(
            lambda a: vary(a, x_TD), (*buffers, jnp.zeros(gate_up_ED2F.shape), jnp.zeros(down_EFD.shape))
        )
        dx_ZD, dweight_Z, dgate_up, ddown = _over_waves(blocks.waves, blocks.expert.size // sizes[1], body, carry)
        dx_TD = sum_rows(dx_ZD, blocks.source_Z, blocks.slots_TK)
        dgates_TK = jnp.take(dweight_Z, blocks.slots_TK, mode="fill", fill_value=0)
    return dx_TD, dgates_TK, dgate_up, ddown, None, None


def _swiglu(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return silu(gate) * up in FP32, and its derivatives by gate and by up."""
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    silu, slope = silu_with_slope(gate)
    return silu * up, up * slope, silu


_blocked_ffn.defvjp(_forward, _backward)

"""The routed experts' FFN in plain XLA: work proportional to the assignments, static shapes.

Problem. T rows have K experts each; expert e gets n_e of the T * K assignments, known only at run time. A matmul per
expert needs dynamic shapes. A buffer of fixed capacity per expert either drops rows or is sized for the worst case.
Computing every expert for every row costs E / K times the work.

Choice. Rows lie in the order of their experts (`parallel.slots`), and each expert's slots are cut into blocks of
`block` rows; only the last block of an expert has empty rows. A block belongs to one expert, so a batched matmul of
blocks against gathered weights does the work, `wave` blocks at a time. The loop over waves stops at the number of
blocks that exist (traced), so slots for more than the balanced load cost no arithmetic when routing is balanced. The
gate multiplies the SwiGLU output, before the down projection.

Worked example, block = 2, six assignments to experts [1 0 1 1 2 1]:

    blocks                0: [1 _]    1: [0 2] [3 5]    2: [4 _]      expert = [0 1 1 2]

The derivative is written out: it recomputes the SwiGLU output from the saved pre-activations, reads the incoming
gradient by the same `source`, and makes weight gradients in FP32. Gate and up projections are two products: to
take one product of both apart, and to put its derivative together, would be passes over all rows.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.model.layers import silu_with_slope
from deepseek_jax.model.recompute import keep
from deepseek_jax.parallel.mesh import vary
from deepseek_jax.parallel.rows import sum_rows, take_rows
from deepseek_jax.parallel.slots import Routing


class Blocks(NamedTuple):
    """The slots as blocks of one expert each."""

    expert: jax.Array  # [blocks] expert of each block
    waves: jax.Array  # number of waves that hold a block with rows


def cut_blocks(rows_E: jax.Array, num_slots: int, block: int, wave: int) -> Blocks:
    """Return the blocks of `num_slots` slots, of which expert e has `rows_E[e]`, a multiple of `block`."""
    block_end = jnp.cumsum(rows_E // block)
    expert = jnp.searchsorted(block_end, jnp.arange(num_slots // block), side="right", method="compare_all")
    return Blocks(jnp.minimum(expert, rows_E.size - 1), (block_end[-1] + wave - 1) // wave)


@dataclasses.dataclass(frozen=True)
class BlockedExperts:
    """The arithmetic of `model.rounds.Experts` by batched products of blocks, in FP32 or BF16.

    Attributes:
        block: rows per block.
        wave: blocks multiplied at once; if there are no more blocks than that, there is no loop.
    """

    block: int
    wave: int

    @property
    def unit(self) -> int:
        """Slots of an expert are a multiple of it."""
        return self.block

    def num_slots(self, assignments: int, num_experts: int) -> int:
        """Return the slots of whole waves that hold `assignments` in any distribution."""
        blocks = assignments // self.block + num_experts
        wave = min(self.wave, blocks)
        return -(-blocks // wave) * wave * self.block

    def pack(self, x_TD: jax.Array) -> jax.Array:
        """Return the rows as they are."""
        return x_TD

    def forward(self, weights: dict[str, tuple], rows: jax.Array, gates_WK: jax.Array, routing: Routing):
        """Return the sums [W, D] and both halves of the pre-activations [Z, F]."""
        (gate_up_ED2F,), (down_EFD,) = weights["gate_up_ED2F"], weights["down_EFD"]
        num_slots, dtype, hidden_size = routing.source_Z.size, rows.dtype, down_EFD.shape[1]
        sizes, blocks = self.sizes(routing)

        def body(i, carry):
            y_ZD, gate_ZF, up_ZF = carry
            _, x, weight, expert = _wave(sizes, i, rows, gates_WK, routing.source_Z, blocks.expert)
            gate, up = (jnp.einsum("wbd,wdf->wbf", x, gate_up_ED2F[expert, :, half]) for half in range(2))
            act = _swiglu(gate, up)[0] * weight
            y = jnp.einsum("wbf,wfd->wbd", act.astype(dtype), down_EFD[expert])
            return _put(y_ZD, y, i), _put(gate_ZF, gate, i), _put(up_ZF, up, i)

        widths = rows.shape[1], hidden_size, hidden_size
        zeros = tuple(vary(jnp.zeros((num_slots, width), dtype), rows) for width in widths)
        y_ZD, gate_ZF, up_ZF = _over_waves(blocks.waves, blocks.expert.size // sizes[1], body, zeros)
        return sum_rows(y_ZD, routing.slots_WK), keep((gate_ZF, up_ZF), "expert_hidden")

    def backward(
        self,
        weights: dict[str, tuple],
        rows: jax.Array,
        gates_WK: jax.Array,
        routing: Routing,
        hidden: Any,
        g_rows: jax.Array,
        dweights: dict[str, jax.Array],
    ):
        """Return the gradients of rows and gates, and of weights, added to those in `dweights`."""
        (gate_up_ED2F,), (down_EFD,) = weights["gate_up_ED2F"], weights["down_EFD"]
        gate_ZF, up_ZF = hidden
        num_slots, dtype = routing.source_Z.size, rows.dtype
        sizes, blocks = self.sizes(routing)
        in_wave = sizes[0] * sizes[1]

        def body(i, carry):
            dx_ZD, dweight_Z, dgate_up, ddown = carry
            source, x, weight, expert = _wave(sizes, i, rows, gates_WK, routing.source_Z, blocks.expert)
            gate, up = (
                lax.dynamic_slice_in_dim(half, i * in_wave, in_wave).reshape(*x.shape[:2], -1)
                for half in (gate_ZF, up_ZF)
            )
            dy = take_rows(g_rows, source // gates_WK.shape[1]).reshape(x.shape)
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

        buffers = jnp.zeros((num_slots, rows.shape[1]), dtype), jnp.zeros((num_slots,))
        sums = (dweights.get(name, jnp.zeros(weights[name][0].shape)) for name in ("gate_up_ED2F", "down_EFD"))
        carry = jax.tree.map(lambda a: vary(a, rows), (*buffers, *sums))
        dx_ZD, dweight_Z, dgate_up, ddown = _over_waves(blocks.waves, blocks.expert.size // sizes[1], body, carry)
        dgates_WK = routing.to_assignments(dweight_Z)
        return sum_rows(dx_ZD, routing.slots_WK), dgates_WK, {"gate_up_ED2F": dgate_up, "down_EFD": ddown}

    def sizes(self, routing: Routing) -> tuple[tuple[int, int], Blocks]:
        """Return (rows per block, blocks per wave), and the blocks."""
        num_slots = routing.source_Z.size
        sizes = self.block, min(self.wave, num_slots // self.block)
        return sizes, cut_blocks(routing.rows_E, num_slots, *sizes)


def over_blocks(experts: BlockedExperts, routing: Routing, x_ZI: jax.Array, w_EIO: jax.Array) -> jax.Array:
    """Return the product of rows in slots [Z, O], each with the weight of its expert."""
    (block, wave), blocks = experts.sizes(routing)

    def body(i, y_ZO):
        x = lax.dynamic_slice_in_dim(x_ZI, i * wave * block, wave * block).reshape(wave, block, -1)
        expert = lax.dynamic_slice_in_dim(blocks.expert, i * wave, wave)
        return _put(y_ZO, jnp.einsum("wbi,wio->wbo", x, w_EIO[expert]), i)

    zeros = vary(jnp.zeros((x_ZI.shape[0], w_EIO.shape[2]), x_ZI.dtype), x_ZI)
    return _over_waves(blocks.waves, blocks.expert.size // wave, body, zeros)


def _over_waves(num_waves, bound, body, carry):
    """Run `body(i, carry)` for each wave that exists; a single wave needs no loop."""
    return body(0, carry) if bound == 1 else lax.fori_loop(0, num_waves, body, carry)


def _wave(sizes, i, rows, gates_WK, source_Z, expert):
    """Return sources, rows, gates and experts of wave i."""
    block, wave = sizes
    source = lax.dynamic_slice_in_dim(source_Z, i * wave * block, wave * block)
    x = take_rows(rows, source // gates_WK.shape[1]).reshape(wave, block, -1)
    gate = jnp.take(gates_WK.reshape(-1), source, mode="fill", fill_value=0).reshape(wave, block, 1)
    return source, x, gate, lax.dynamic_slice_in_dim(expert, i * wave, wave)


def _put(buffer, rows, i):
    """Write a wave's rows into a buffer of all slots; a wave of all slots is itself the buffer."""
    rows = rows.reshape(-1, *buffer.shape[1:])
    return rows if rows.shape == buffer.shape else lax.dynamic_update_slice_in_dim(buffer, rows, i * rows.shape[0], 0)


def _swiglu(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return silu(gate) * up in FP32, and its derivatives by gate and by up."""
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    silu, slope = silu_with_slope(gate)
    return silu * up, up * slope, silu

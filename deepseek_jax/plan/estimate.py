"""The memory of a step on any mesh, estimated from few traces of the gradient: a search asks for hundreds."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from deepseek_jax.model.precision import compute_dtype
from deepseek_jax.parallel.mesh import axis_size
from deepseek_jax.parallel.stages import program_of, split_layers
from deepseek_jax.parameters import CONTEXT, PIPE, ROWS, TOKENS
from deepseek_jax.plan.counts import (
    IN_GRADIENT,
    bytes_per_device,
    gathered_layer,
    micro_batches_of,
    placement_of,
    state_of,
    update_bytes,
    without_pipe,
)
from deepseek_jax.plan.liveness import Living, living
from deepseek_jax.plan.meshes import Fit

MANY = 8  # sequences of a device


class Memory:
    """Estimates the memory of a step on any mesh, from few traces of the gradient, each made once.

    One trace for each recomputation says what a sequence needs. What does not grow with tokens is the same for both: a
    trace of MANY sequences says how much, for two sequences one of two. For more, two would say too much, as other
    places of the program then need most: V3's step of eight came out 7% too small.
    It may be less than nothing: V3 with "full" on 128 devices has 5.4 GB beside its gradients with one sequence, which
    needs most before they are all made, 17 with two, and 71 with eight.

    MTP's layers lie outside of the loop over layers, and cost most of the time of a trace. So one trace alone has them:
    what it needs more than one without them is taken to be the same for other sequences and recomputations. For V3 it
    is 3.62 GB with one sequence and either recomputation, and 3.26 with eight, of 75.

    In a pipeline each slot of the table keeps what its stage's layers keep, which the trace has as what its loops over
    layers hand from the forward to the backward pass (`liveness.kept_bytes`). What else the trace has is taken to live
    in a tick. A tick reads one slot and makes another.
    """

    def __init__(self, state: Any, say: Callable[[str], None]):
        """Take the abstract state of the config, and what to tell before a trace."""
        self._state, self._say = state, say
        self._state_without_mtp: Any = None
        self._traced: dict[tuple[Any, ...], Living] = {}
        self._held: dict[tuple[Any, ...], float] = {}

    def of(self, fit: Fit) -> float:
        """Return the bytes of one device: state, gradients and what lives beside them, or the average's own update."""
        return max(self._of_step(fit), update_bytes(fit.config, self._state, fit.mesh))

    def _of_step(self, fit: Fit) -> float:
        execution, pipe = fit.config.execution, fit.mesh.shape[PIPE]
        if pipe == 1:
            return self.least(fit) + self._beside(fit, sequences_of(fit))
        program = program_of(execution.schedule, pipe, micro_batches_of(fit.config))
        boxes = program.num_activations + program.num_gradients + program.num_pending
        return self.of_pipeline(fit, program.num_slots, boxes)

    def least(self, fit: Fit) -> float:
        """Return the bytes that need no trace: state, gradients, copies, a gathered layer, transfers between stages."""
        config, pipe = fit.config, fit.mesh.shape[PIPE]
        execution = config.execution
        placement = placement_of(execution.schedule, pipe).name if pipe > 1 else ""
        key = *fit.mesh.shape.values(), execution.gather, placement
        if key not in self._held:
            held = bytes_per_device(config, self._state, fit.mesh)
            sums = held["gradients"] if pipe > 1 else 0  # a tick's branch gives other sums back than it was given
            self._held[key] = sum(held.values()) + sums + gathered_layer(config, self._state, fit.mesh)
        return self._held[key] + least_slots(fit) * row_bytes(fit)

    def of_pipeline(self, fit: Fit, slots: int, boxes: int) -> float:
        """Return the bytes of one device of a pipeline whose table has so many slots of what is kept, and inboxes."""
        config, model, pipe = fit.config, fit.config.model, fit.mesh.shape[PIPE]
        flat = dataclasses.replace(fit, config=config.with_(mesh={PIPE: 1}), mesh=without_pipe(fit.mesh))
        sequences, all_layers = sequences_of(flat), model.num_layers + model.num_mtp_layers
        beside, of_layer = self._beside(flat, sequences), self._trace(flat, 1).kept
        kept = beside / all_layers if of_layer is None else sequences * of_layer  # not scanned: all that lives
        stages = split_layers(model, placement_of(config.execution.schedule, pipe).num_stages)
        most = max(s.dense_layers.number + s.moe_layers.number + s.is_last * model.num_mtp_layers for s in stages)
        row, of_tick = row_bytes(fit), max(0.0, beside - kept * all_layers)
        held = self.least(fit) - least_slots(fit) * row
        return held + of_tick + (slots + 2) * (kept * most + row) + (boxes + 6) * row  # two spare, four of a tick

    def _beside(self, fit: Fit, sequences: int) -> float:
        """Return what lives beside gradients, copies and a gathered layer, on the first mesh that was asked for."""
        one, of_mtp = self._trace(fit, 1).most, self._mtp(fit)
        if sequences == 1:
            return one + of_mtp
        full = _with_remat(fit, "full")
        many = 2 if sequences == 2 else MANY
        fixed = (many * self._trace(full, 1).most - self._trace(full, many).most) / (many - 1)
        return fixed + sequences * max(0.0, one - fixed) + of_mtp

    def _mtp(self, fit: Fit) -> float:
        """Return what MTP's layers need beside the others, at the place where most lives."""
        if not fit.config.model.num_mtp_layers:
            return 0.0
        full = _with_remat(fit, "full")
        return max(0.0, self._trace(full, 1, has_mtp=True).most - self._trace(full, 1).most)

    def _trace(self, fit: Fit, sequences: int, has_mtp: bool = False) -> Living:
        """Return what lives beside them with so many sequences on a device, without MTP's layers or with them."""
        execution = fit.config.execution
        key = execution.remat, execution.gather, sequences, axis_size(fit.mesh, (CONTEXT,)), has_mtp
        if key not in self._traced:
            self._say(f"tracing the gradient: {sequences} sequences a device, remat {key[0]}{', MTP' * has_mtp}")
            config = fit.config.with_(
                training={"micro_batch_size": sequences * axis_size(fit.mesh, ROWS)}, execution={"scan_unroll": 1}
            )
            state = self._state
            if not has_mtp and config.model.num_mtp_layers:
                config = config.with_(model={"num_mtp_layers": 0})
                state = self._state_without_mtp = self._state_without_mtp or state_of(config)
            held = bytes_per_device(config, state, fit.mesh)
            known = sum(size for name, size in held.items() if name in IN_GRADIENT)
            known += gathered_layer(config, state, fit.mesh)
            found = living(config, fit.mesh)
            self._traced[key] = found._replace(most=max(0, found.most - known))
        return self._traced[key]


def _with_remat(fit: Fit, remat: str) -> Fit:
    return dataclasses.replace(fit, config=fit.config.with_(execution={"remat": remat}))


def sequences_of(fit: Fit) -> int:
    """Return the sequences of a micro-batch on a device."""
    return fit.config.training.micro_batch_size // axis_size(fit.mesh, ROWS)


def least_slots(fit: Fit) -> int:
    """Return how many micro-batches some device of a pipeline holds at once at least; without one 0."""
    pipe = fit.mesh.shape[PIPE]
    count = micro_batches_of(fit.config)
    return 0 if pipe == 1 else count if fit.config.execution.schedule == "gpipe" else min(count, pipe)


def row_bytes(fit: Fit) -> int:
    """Return the bytes of one micro-batch's activations between two layers."""
    config = fit.config
    tokens = config.training.micro_batch_size * config.data.sequence_length // axis_size(fit.mesh, TOKENS)
    return tokens * config.model.width * jnp.dtype(compute_dtype(config.execution)).itemsize

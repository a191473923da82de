"""The executor: gradients of a batch on a mesh with `pipe`, by any table of `deepseek_jax.pipeline`.

A table's program (`pipeline.program`) says for every device and tick what to do and in which slots it finds what it
needs. One loop over the ticks runs it, inside the step's shard_map:

    work     one branch of a switch: idle, F, B, W, BW, or F and BW of two micro-batches side by side
    send     activations and gradients to the neighbours, by ppermute, whatever the branch was
    store    what arrived into the inboxes

A branch is made for every kind of cell and every shape of stage and chunk that occurs (`stage_work`), so a program does
not grow with devices or micro-batches. Devices that differ in `pipe` take different branches in one tick. Collectives
in a branch run over other axes: all devices of such a group have the same place in the pipeline, hence the same branch.
Nothing in a branch may run over `pipe`, or it would wait for devices that are elsewhere; the ppermutes are outside.

F and BW of a pair are independent computations in one branch, so XLA may hide the exchange of one behind the arithmetic
of the other. It moves nothing across the border of a branch. What is kept and the sums of gradients pass through the
branches and are changed in place there (`training.kept`).

Every device has all micro-batches' tokens: 4 bytes a token where an activation has 14,336.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.model.balance import no_routers
from deepseek_jax.model.precision import compute_dtype
from deepseek_jax.parallel.gradient_sums import apart, lend, lends, together
from deepseek_jax.parallel.mesh import vary
from deepseek_jax.parallel.stage_weights import collect, distribute
from deepseek_jax.parallel.stages import Holding, Stage, holding_of, program_of, split_layers
from deepseek_jax.parallel.weights import detach, gather, reduce_gradients, with_fp8
from deepseek_jax.parameters import PIPE, TOKENS, Weights
from deepseek_jax.pipeline.program import Program, links
from deepseek_jax.training import kept
from deepseek_jax.training.objective import Batch
from deepseek_jax.training.stage_work import Held, StageWork, Starts
from deepseek_jax.training.tick import Carry, Inboxes, Made, Own, Sums, Work, branches_of
from pallas_kernels.lowering import manual_axes

INBOXES = ("activation", "gradient")
SIDES = {"left": 1, "right": -1, "self": 0}  # an arrival from the left has moved one device to the right


def stage_gradients(
    recipe: Any, weights: Weights, micro_batches: Batch, norms: Any, rates: Any
) -> tuple[Any, Any, Any]:
    """Return FP32 gradients in the layout of the parameters, and this device's sums of terms and of routers' reports.

    Args:
        recipe: of the step.
        weights: as stored, this device's part.
        micro_batches: [M, rows, S], this device's rows.
        norms: the objective's normalisers.
        rates: of the step.
    """
    model, execution = recipe.model, recipe.execution
    if recipe.objective.batch_wise:
        raise ValueError(
            "an objective with batch_wise needs a batch's counts before its first backward pass: mesh.pipe = 1"
        )
    program = program_of(execution.schedule, lax.axis_size(PIPE), micro_batches["tokens_BS"].shape[0])
    placement = program.table.placement
    stages = split_layers(model, placement.num_stages)
    holding = holding_of(placement, stages)
    load = functools.partial(gather, dtype=compute_dtype(execution), num_experts=model.num_experts, differentiated=True)
    once = execution.gather == "step"
    mine = with_fp8(model, execution, collect(weights.params, holding))
    counts = {name: layers.shape[1] for name, layers in holding.layers.items()} | {"mtp_layers": model.num_mtp_layers}
    mine, quantized = (apart(tree, counts) for tree in detach(load(mine) if once else mine))
    held = Held(mine, quantized, weights.router_bias)
    work = {
        shape: StageWork(recipe, shape, (lambda tree: tree) if once else load, norms, rates)
        for shape in dict.fromkeys(stage.shape for stage in stages)
    }
    run = Run(program, stages, holding, held, micro_batches, work, lends=lends(execution, begins=True))
    sums = run.all_ticks(run.begin(recipe)).own.sums
    grads = together(sums.grads)
    grads = reduce_gradients(grads, model.num_experts) if once else grads
    return distribute(grads, weights.params, holding), sums.terms, sums.router


class Run:
    """One pass of a program over the micro-batches of a step."""

    def __init__(
        self,
        program: Program,
        stages: list[Stage],
        holding: Holding,
        held: Held,
        micro_batches: Batch,
        work: dict[Stage, StageWork],
        lends: bool,
    ):
        self.program, self.stages, self.holding, self.held = program, stages, holding, held
        self.micro_batches, self.work, self.lends = micro_batches, work, lends
        self.axes = frozenset((PIPE, *TOKENS))
        self.branches, self.branch = branches_of(program, stages)

    def begin(self, recipe: Any) -> Carry:
        """Return the buffers, empty, and sums of zero; traces every shape of stage to learn what it keeps."""
        model, tokens_BS = recipe.model, self.micro_batches["tokens_BS"][0]
        x_BSD = jnp.zeros((*tokens_BS.shape, model.width), compute_dtype(recipe.execution))
        x_BSD = manual_axes.vary(x_BSD, self.axes)
        zero, first = jnp.int32(0), jax.tree.map(lambda a: a[0], self.micro_batches)
        starts = Starts(0, 0, manual_axes.vary(zero, frozenset((PIPE,))))
        grads = jax.tree.map(lambda w: vary(jnp.zeros(w.shape, jnp.float32), w), self.held.params)
        held = self._lent(grads)
        for work in self.work.values():
            jax.eval_shape(lambda x, work=work: work.forward(held, starts, x, first)[0], x_BSD)
        last = next(work for stage, work in self.work.items() if stage.is_last)
        terms = jax.eval_shape(functools.partial(_terms, last, held, starts), x_BSD, first)
        for work in self.work.values():
            work.learn_terms(terms)
        structures = [work.structure for work in self.work.values() if work.structure]
        router = self._no_router(model, x_BSD)
        boxes = {"activation": self.program.num_activations, "gradient": self.program.num_gradients}
        sums = Sums(
            grads=grads,
            terms=manual_axes.vary(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), terms), self.axes),
            router=manual_axes.vary(router, self.axes),
        )
        inboxes = {
            name: manual_axes.vary(jnp.zeros((slots + 1, *x_BSD.shape), x_BSD.dtype), self.axes)
            for name, slots in boxes.items()
        }
        own = Own(
            sums=sums,
            kept=kept.empty([s.packing for s in structures], self.program.num_slots, self.axes),
            pending=kept.empty([s.pending for s in structures], self.program.num_pending, self.axes),
        )
        return Carry(own, inboxes)

    def _no_router(self, model: Any, x_BSD: jax.Array) -> Any:
        """Return the routers' report of all layers, zero."""
        shapes = [work.structure.shapes for work in self.work.values() if work.structure]
        layers = model.num_moe_layers + max(len(shape.mtp_hidden) for shape in shapes)
        routers = [shape.observed for shape in shapes if shape.observed is not None]
        if not routers:
            return no_routers(model, x_BSD)
        return jax.tree.map(lambda a: jnp.zeros((layers, *a.shape[1:]), a.dtype), routers[0])

    def all_ticks(self, carry: Carry) -> Carry:
        """Run the program."""
        rows = {name: array.T for name, array in self.program.arrays().items()} | {"branch": self.branch.T}
        device = lax.axis_index(PIPE)
        branches = [functools.partial(self._work, *key) for key in self.branches]

        def tick(carry: Carry, row: dict[str, jax.Array]) -> tuple[Carry, None]:
            row = {name: values[device] for name, values in row.items()}
            own, made = lax.switch(row["branch"], branches, carry.own, carry.inboxes, row)
            return Carry(own, self._exchange(carry.inboxes, made, row)), None

        return lax.scan(tick, carry, jax.tree.map(jnp.asarray, rows))[0]

    def _lent(self, sums: Any) -> Held:
        """Return the weights; if they were gathered once a step, products add to the sums of gradients of experts."""
        return self.held._replace(params=lend(self.held.params, self.held.quantized, sums)) if self.lends else self.held

    def _starts(self, row: dict[str, jax.Array], part: str, work: Work) -> Starts:
        routers = jnp.asarray([stage.moe_layers.first for stage in self.stages], jnp.int32)
        of_stacks = {name: starts[work.chunk] for name, starts in self.holding.starts.items()}
        return Starts(**of_stacks, routers=routers[row[f"{part}_stage"]])

    def _micro_batch(self, row: dict[str, jax.Array], part: str) -> Batch:
        number = row[f"{part}_micro_batch"]
        return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, number, keepdims=False), self.micro_batches)

    def _work(
        self,
        forward: Work | None,
        backward: Work | None,
        weight: Work | None,
        own: Own,
        inboxes: Inboxes,
        row: dict[str, jax.Array],
    ) -> tuple[Own, Made]:
        """Run one cell. The halves of a pair add to other sums and write other slots: neither waits for the other."""
        zeros = jnp.zeros_like(inboxes["activation"][0])
        made = Made(zeros, zeros)
        if backward:
            own, made = self._backward(own, made, inboxes, row, backward, backward == weight)
        elif weight:
            own = self._weight(own, row, weight)
        if forward:
            own, made = self._forward(own, made, inboxes, row, forward)
        return own, manual_axes.vary(made, self.axes)

    def _forward(self, own: Own, made: Made, inboxes: Inboxes, row: dict, of: Work) -> tuple[Own, Made]:
        work, starts = self.work[of.stage], self._starts(row, "forward", of)
        x_BSD = _at(inboxes["activation"], row["forward_inbox"])
        outputs, arrays = work.forward(self._lent(own.sums.grads), starts, x_BSD, self._micro_batch(row, "forward"))
        assert work.structure is not None
        if not of.stage.is_last:
            made = made._replace(activation=outputs.hidden_BSD)
        return Own(
            own.sums._replace(router=work.add_router(own.sums.router, starts, outputs.observed)),
            work.structure.packing.write(own.kept, row["forward_slot"], arrays),
            own.pending,
        ), made

    def _backward(self, own: Own, made: Made, inboxes: Inboxes, row: dict, of: Work, joined: bool) -> tuple[Own, Made]:
        work, starts, batch = self.work[of.stage], self._starts(row, "backward", of), self._micro_batch(row, "backward")
        assert work.structure is not None
        arrays, slots = work.structure.packing.read(own.kept, row["backward_slot"])
        gradient_BSD = _at(inboxes["gradient"], row["backward_inbox"])
        terms, head_grads, gradients = work.objective(self.held, arrays, gradient_BSD, batch)
        grads, gradient_BSD = work.backward(self._lent(own.sums.grads), starts, arrays, gradients)
        total, pending = work.add(own.sums.grads, starts, head_grads), own.pending
        if joined:
            total = work.add(total, starts, grads)
        else:
            pending = work.structure.pending.write(pending, row["backward_pending"], work.flat(gradients))
        terms = jax.tree.map(lambda a, b: a + vary(b, a), own.sums.terms, terms)
        sums = own.sums._replace(grads=total, terms=terms)
        return Own(sums, slots, pending), made._replace(gradient=gradient_BSD)

    def _weight(self, own: Own, row: dict, of: Work) -> Own:
        work, starts = self.work[of.stage], self._starts(row, "weight", of)
        assert work.structure is not None
        arrays, slots = work.structure.packing.read(own.kept, row["weight_slot"])
        gradients, pending = work.structure.pending.read(own.pending, row["weight_pending"])
        grads, _ = work.backward(self._lent(own.sums.grads), starts, arrays, work.unflat(gradients))
        return Own(own.sums._replace(grads=work.add(own.sums.grads, starts, grads)), slots, pending)

    def _exchange(self, inboxes: Inboxes, made: Made, row: dict[str, jax.Array]) -> Inboxes:
        """Send to both neighbours, over the links on which the table ever sends; store what arrived."""
        inboxes = dict(inboxes)
        for name in INBOXES:
            sent = getattr(made, name)
            for side, step in SIDES.items():
                column = f"{name}_from_{side}"
                arrivals = getattr(self.program, column)
                if (arrivals < 0).all():
                    continue
                came = lax.ppermute(sent, PIPE, links(arrivals, step)) if step else sent
                nobody = inboxes[name].shape[0] - 1
                slot = jnp.where(row[column] < 0, nobody, row[column])
                inboxes[name] = lax.dynamic_update_index_in_dim(inboxes[name], came, slot, 0)
        return inboxes


def _at(inbox: jax.Array, slot: jax.Array) -> jax.Array:
    """Return what an inbox has; of a slot -1, to which nothing comes, some numbers that are not read."""
    return lax.dynamic_index_in_dim(inbox, jnp.maximum(slot, 0), keepdims=False)


def _terms(work: StageWork, held: Held, starts: Starts, x_BSD: jax.Array, batch: Batch) -> Any:
    outputs, arrays = work.forward(held, starts, x_BSD, batch)
    return work.objective(held, arrays, outputs.hidden_BSD, batch)[0]

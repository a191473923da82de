"""The work of one micro-batch on one stage: forward, backward, and the two halves of backward.

Between the two passes a slot keeps what the derivative of the forward pass needs, as `execution.remat` says, without
the weights: those are cut out of the stack again. The choice of experts is among it, so both passes take the same
routes.

The head is no part of a stage's forward pass but begins the backward pass of the last one. So its logits' gradient, an
array of the head's size, lives within a tick and in no slot.

    F    stage(x) -> y, or hidden states in the last stage     keeps residuals, and what the objective reads
    B    objective(outputs) -> their gradients -> dx           the head's gradient is complete here
    W    the gradients of outputs -> weights' gradients

B and W apart: B leaves the gradients of the outputs in a slot, and both apply the derivative to them. XLA drops from
each what the other is for. W needs the gradients between the layers of its stage, so it makes them again, and what
`remat` recomputes, too: W apart from B costs a B more than the two together. Tables that have W in the tick of its B
(1f1b, most of DualPipe) pay nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax.model.attention import expanded
from deepseek_jax.model.balance import no_routers
from deepseek_jax.model.layer import Part, run_layers
from deepseek_jax.model.rope import rotary_table
from deepseek_jax.model.transformer import Output, embed, finish
from deepseek_jax.parallel.gradient_sums import GradientSum, added
from deepseek_jax.parallel.mesh import vary
from deepseek_jax.parallel.stages import STACKS, Stage
from deepseek_jax.parallel.weights import attach, in_fp32
from deepseek_jax.parameters import Weights
from deepseek_jax.training.kept import Packing
from deepseek_jax.training.network_inputs import network_inputs
from deepseek_jax.training.objective import Batch


class Held(NamedTuple):
    """What a device has of the model; stacks as lists of slots, each an array that a product reads as it lies.

    Attributes:
        params: what is differentiated.
        quantized: what `parallel.weights.attach` puts beside it.
        router_bias: of all layers, in their order.
    """

    params: Any
    quantized: Any
    router_bias: Any


class Starts(NamedTuple):
    """Where the layers of a stage begin: in the stacks that a device holds, and among all MoE layers."""

    dense_layers: int
    moe_layers: int
    routers: jax.Array


class Structure(NamedTuple):
    """How a slot is read: the same for all stages of one shape.

    Attributes:
        pull: tree of the derivative.
        known: for each of its leaves the number of the weight that it is, or None: it is kept.
        outputs: tree of what the objective reads.
        shapes: of all outputs.
        packing: of the slot; residuals, then outputs.
        pending: of the gradients of the outputs.
    """

    pull: Any
    known: list[int | None]
    outputs: Any
    shapes: Any
    packing: Packing
    pending: Packing


class StageWork:
    """Forward and backward passes of stages of one shape."""

    def __init__(self, recipe: Any, shape: Stage, load: Callable, norms: Any, rates: Any):
        self.recipe, self.shape, self.load, self.norms, self.rates = recipe, shape, load, norms, rates
        model = recipe.model
        tops = {"embed_VD"} if shape.is_first else set()
        if shape.is_last:
            tops |= {"final_norm_D"} | ({"embed_VD", "mtp_layers"} if model.num_mtp_layers else set())
        self.tops = tuple(sorted(tops))
        self.structure: Structure | None = None  # found by the first trace of `forward`
        self.no_terms: Any = None  # zeros of the objective's terms, for a stage without head

    def learn_terms(self, shapes: Any) -> None:
        """Take the shapes of the objective's terms, which a stage without head has as zeros."""
        self.no_terms = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

    def cut(self, tree: Any, starts: Starts) -> Any:
        """Return the weights of a stage: lists of layers, and whatever else it needs."""
        part = {name: tree[name] for name in self.tops}
        for name in STACKS:
            if count := getattr(self.shape, name).number:
                start = getattr(starts, name)
                part[name] = tree[name][start : start + count]
        return part

    def cut_bias(self, bias: Any, starts: Starts) -> Any:
        """Return the router biases of a stage."""
        part = {}
        if count := self.shape.moe_layers.number:
            part["moe_layers"] = [_layer(bias["moe_layers"], starts.routers + i) for i in range(count)]
        if "mtp_layers" in self.tops:
            part["mtp_layers"] = [_layer(bias["mtp_layers"], i) for i in range(self.recipe.model.num_mtp_layers)]
        return part

    def forward(self, held: Held, starts: Starts, x_BSD: jax.Array, batch: Batch) -> tuple[Any, list[jax.Array]]:
        """Return the outputs of a stage, and what to keep in a slot.

        The outputs are an `Output`, with the residual stream in place of hidden states where more stages follow.
        """
        params, quantized = self.cut(held.params, starts), self.cut(held.quantized, starts)
        bias = self.cut_bias(held.router_bias, starts)

        def run(params: Any, x_BSD: jax.Array) -> Output:
            return self._run(Weights(attach(params, quantized), bias), x_BSD, batch)

        outputs, pull = jax.vjp(run, params, x_BSD)
        kept = outputs if self.shape.is_last else outputs._replace(hidden_BSD=None)
        leaves, tree = jax.tree.flatten(pull)
        known = known_weights(leaves, (params, quantized, bias))
        arrays = [leaf for leaf, place in zip(leaves, known, strict=True) if place is None]
        arrays += jax.tree.leaves(kept)
        if self.structure is None:
            gradients = [leaf for leaf in jax.tree.leaves(outputs) if jnp.issubdtype(leaf.dtype, jnp.floating)]
            shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), outputs)
            packings = Packing(arrays), Packing(gradients)
            self.structure = Structure(tree, known, jax.tree.structure(kept), shapes, *packings)
        assert known == self.structure.known, "two traces of a stage keep different weights: a slot would be misread"
        return outputs, arrays

    def objective(
        self, held: Held, arrays: list[jax.Array], gradient_BSD: jax.Array, batch: Batch
    ) -> tuple[Any, Any, Any]:
        """Return the objective's terms, the gradients of the head's weights, and of the stage's outputs."""
        assert self.structure is not None
        outputs = jax.tree.unflatten(self.structure.outputs, arrays[len(arrays) - self.structure.outputs.num_leaves :])
        objective, is_last = self.recipe.objective, self.shape.is_last
        head = {"head_DV": held.params["head_DV"]} if is_last else {}
        numbers = {name: held.quantized[name] for name in head}

        def total(head: Any, outputs: Output) -> tuple[jax.Array, Any]:
            router = outputs.observed
            if router is None:
                router = no_routers(self.recipe.model, gradient_BSD)
            if is_last:
                head_DV = in_fp32(self.load(attach(head, numbers))["head_DV"])
                terms = objective.terms(outputs, head_DV, batch)
            else:
                terms = self.no_terms
            return vary(objective.total(terms, router, self.norms, self.rates), gradient_BSD), terms

        value, pull, terms = jax.vjp(total, head, outputs, has_aux=True)
        head_grads, gradients = pull(jnp.ones_like(value))
        if not is_last:
            gradients = gradients._replace(hidden_BSD=gradient_BSD)
        return terms, head_grads, gradients

    def backward(self, held: Held, starts: Starts, arrays: list[jax.Array], gradients: Any) -> tuple[Any, jax.Array]:
        """Return the gradients of a stage's weights and of its input, from those of its outputs."""
        assert self.structure is not None
        structure = self.structure
        weights = jax.tree.leaves(
            (self.cut(held.params, starts), self.cut(held.quantized, starts), self.cut_bias(held.router_bias, starts))
        )
        kept = iter(arrays)
        leaves = [next(kept) if place is None else weights[place] for place in structure.known]
        return jax.tree.unflatten(structure.pull, leaves)(gradients)

    def add(self, total: Any, starts: Starts, grads: Any) -> Any:
        """Add the gradients of a stage to those of the device (`parallel.gradient_sums.added`)."""
        total = dict(total)
        for name, part in grads.items():
            begin = getattr(starts, name) if name in STACKS else 0
            if isinstance(part, list):
                end = begin + len(part)
                sums = jax.tree.map(added, total[name][begin:end], part)
                total[name] = [*total[name][:begin], *sums, *total[name][end:]]
            else:
                total[name] = jax.tree.map(added, total[name], part)
        return total

    def add_router(self, total: Any, starts: Starts, router: Any) -> Any:
        """Add what the routers of a stage report to that of all layers."""
        if router is None:
            return total
        count = self.shape.moe_layers.number

        def add(a: jax.Array, new: jax.Array) -> jax.Array:
            new = vary(new, a)
            if count:
                old = lax.dynamic_slice_in_dim(a, starts.routers, count)
                a = lax.dynamic_update_slice_in_dim(a, old + new[:count], starts.routers, 0)
            return a.at[a.shape[0] - (new.shape[0] - count) :].add(new[count:]) if new.shape[0] > count else a

        return jax.tree.map(add, total, router)

    def flat(self, gradients: Any) -> list[jax.Array]:
        """Return the gradients of outputs that are arrays: those of integers are not."""
        return [leaf for leaf in jax.tree.leaves(gradients) if leaf.dtype != jax.dtypes.float0]

    def unflat(self, arrays: list[jax.Array]) -> Any:
        """Undo `flat`."""
        assert self.structure is not None
        left = iter(arrays)

        def gradient(output: jax.ShapeDtypeStruct) -> Any:
            is_float = jnp.issubdtype(output.dtype, jnp.floating)
            return next(left) if is_float else np.zeros(output.shape, jax.dtypes.float0)

        return jax.tree.map(gradient, self.structure.shapes)

    def _run(self, weights: Weights, x_BSD: jax.Array, batch: Batch) -> Output:
        recipe = self.recipe
        model, execution, observe = recipe.model, recipe.execution, recipe.objective.observe
        inputs = network_inputs(model, execution, recipe.objective, batch)
        attend = expanded(execution, rotary_table(model, inputs.positions_BS), inputs.segment_ids_BM)
        parts = [Part(attend, inputs.valid_BS)]
        top = self.load({name: weights.params[name] for name in self.tops if name != "mtp_layers"})
        if self.shape.is_first:
            x_BSD = embed(execution, top["embed_VD"], inputs.tokens_BS)
        (x_BSD,), observed = run_layers(model, execution, weights, (x_BSD,), parts, self.load, observe)
        if self.shape.is_last:
            return finish(model, execution, weights, top, parts, [inputs], (x_BSD,), observed, self.load, observe)
        return Output(x_BSD, (), observed[0] if observed else None)


def known_weights(leaves: list[Any], weights: Any) -> list[int | None]:
    """Return for each leaf of a derivative the number of the weight that it is, or None: it goes into a slot.

    A weight is known by its identity. In a slot a weight costs memory and no more, but a sum that is lent must not be
    there: it would stay as it was at F, and `added` would put it in place of all that was added since.
    """
    places = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(weights))}
    known = [places.get(id(leaf)) for leaf in leaves]
    nodes = jax.tree.leaves(weights, is_leaf=lambda node: isinstance(node, GradientSum))
    lost = [node.total.shape for node in nodes if isinstance(node, GradientSum) and places[id(node.total)] not in known]
    assert not lost, f"sums of gradients {lost} were lent, and the derivative reads copies of them"
    return known


def _layer(stack: Any, index: Any) -> Any:
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False), stack)

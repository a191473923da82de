"""What leaves a device in a step, in closed form: the bytes that the traced program has, without tracing it.

    exchange    each MoE layer sends rows out and sums back, and in the backward pass their gradients; over `expert`,
                behind a hop over `node`, the rows once more, and with remat "full" once more too (`traffic.py` says how
                many copies travel)
    latents     where devices share sequences (`mesh.context`), each layer gathers the latents of whole rows, once more
                where a layer is computed again, and sums and splits their gradients (`parallel.context`)
    weights     a weight that is stored split and multiplied whole is gathered, in a layer that keeps less than all for
                each pass
    gradients   of the same weights, in FP32, are summed and split again; sums of parts that several devices store, and
                of gains, are left out (under 1% of V3's on 64 devices)

tests/plan/test_traffic.py holds these against the traced program.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.config import Config
from deepseek_jax.model.precision import compute_dtype
from deepseek_jax.model.recompute import REPEATING
from deepseek_jax.parallel.collectives import GATHER, SCATTER, Collective, sent_bytes
from deepseek_jax.parallel.mesh import AXES, AnyMesh, axis_size
from deepseek_jax.parallel.program import choose_exchange
from deepseek_jax.parallel.transport import most_copies
from deepseek_jax.parameters import CONTEXT, EXPERTS, PARAMETERS, layout_in_use, leaf_name
from deepseek_jax.plan.counts import laid_out
from deepseek_jax.plan.traffic import LATENTS, ROUTES, ROWS_OUT, SUMS_BACK, Copies, abstract, copies_of, row_bytes

EXCHANGE, WEIGHTS, GRADIENTS = "exchange", "weights", "gradients"
ACTIVATIONS = "activations"  # between the stages of a pipeline, and their gradients
KINDS = (EXCHANGE, LATENTS, ACTIVATIONS, WEIGHTS, GRADIENTS)


class Sent(NamedTuple):
    """What leaves a device along one axis of the mesh in a step."""

    axis: str
    kind: str  # EXCHANGE, LATENTS, WEIGHTS or GRADIENTS
    bytes: float
    useful: float  # what balanced routing asks for at most; of weights and gradients all


def sent_in_step(config: Config, mesh: AnyMesh, state: Any, micro_batches: int, tokens: int) -> list[Sent]:
    """Return what leaves a device in a step.

    Args:
        config: what is trained.
        mesh: of `config`.
        state: abstract state (`counts.state_of`).
        micro_batches: of a step.
        tokens: of one micro-batch on a device.
    """
    times = {WEIGHTS: micro_batches, GRADIENTS: micro_batches}
    if config.execution.gather == "step":
        times = {WEIGHTS: 1, GRADIENTS: 1}
    found = {(axis, EXCHANGE): (n * micro_batches * tokens, u * micro_batches * tokens)
             for axis, (n, u) in exchange_of_token(config, mesh).items()}  # fmt: skip
    latents = micro_batches * tokens * latents_of_token(config, mesh)
    found[CONTEXT, LATENTS] = latents, latents
    for (top, axis, kind), size in weights_of(config, mesh, state).items():
        size *= times[kind] * (passes_of(config, top) if kind == WEIGHTS else 1)
        shipped, useful = found.get((axis, kind), (0.0, 0.0))
        found[axis, kind] = shipped + size, useful + size
    return in_order(Sent(axis, kind, *sizes) for (axis, kind), sizes in found.items() if sizes[0])


def in_order(sent: Iterable[Sent]) -> list[Sent]:
    """Return what is sent by kind, then by axis."""
    return sorted(sent, key=lambda each: (KINDS.index(each.kind), AXES.index(each.axis)))


def exchange_of_token(config: Config, mesh: AnyMesh) -> dict[str, tuple[float, float]]:
    """Return by axis the bytes that leave a device for a token, all layers, both passes: shipped, and the limit."""
    model, sizes = config.model, dict(mesh.shape)
    layers = model.num_moe_layers + model.num_mtp_layers
    parts, nodes = axis_size(mesh, EXPERTS), sizes["node"]
    if parts == 1 or not layers:
        return {}
    exchange = config.execution.exchange
    exchange = choose_exchange(parts, nodes) if exchange == "auto" else exchange
    k, groups = model.experts_per_token, (model.num_groups, model.num_kept_groups)
    limit = copies_of(most_copies(parts, k, groups), most_copies(nodes, k, groups), sizes, exchange)
    to_all = copies_of(parts, nodes, sizes, exchange)
    slack = config.execution.exchange_slack
    shipped = Copies(*(min(slack * some, every) for some, every in zip(limit, to_all, strict=True)))
    rows, routes, sums = (row_bytes(config, kind) or 0 for kind in (ROWS_OUT, ROUTES, SUMS_BACK))
    repeated = int(config.execution.remat in REPEATING)  # a layer that is computed again sends its rows again
    found = {}
    for axis, first in zip(EXPERTS, (True, exchange != "two_hop"), strict=True):
        times = (2 if first else 3) + repeated  # that rows travel
        each = times * rows + 2 * sums
        route = (1 + repeated) * routes * (sizes[axis] - 1) / sizes[axis] if first else 0
        copies = getattr(shipped, axis), getattr(limit, axis)
        found[axis] = tuple(layers * (c * each + route) for c in copies)
    return {axis: sizes for axis, sizes in found.items() if sizes[0]}


def latents_of_token(config: Config, mesh: AnyMesh) -> float:
    """Return the bytes of latents that leave a device for each of its tokens, all layers, both passes."""
    model = config.model
    layers = model.num_layers + model.num_mtp_layers
    size = (model.kv_latent + model.rotary_dim) * jnp.dtype(compute_dtype(config.execution)).itemsize
    passes = 2 if config.execution.remat == "none" else 3
    return layers * passes * size * (axis_size(mesh, (CONTEXT,)) - 1)


def weights_of(config: Config, mesh: AnyMesh, state: Any) -> dict[tuple[str, str, str], float]:
    """Return the bytes of one gather of all weights (WEIGHTS), and of one sum of their gradients (GRADIENTS).

    They lie by the first name of the parameter, axis and kind.
    """
    found: dict[tuple[str, str, str], float] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(laid_out(state["params"], abstract(mesh))):
        name, top = leaf_name(path), str(path[0].key)
        used = _axes(layout_in_use(name, leaf.ndim))
        axes = tuple(axis for axis in _axes(leaf.sharding.spec) if axis not in used and mesh.shape[axis] > 1)
        if not axes:
            continue
        held = leaf.size // math.prod(mesh.shape[axis] for axis in used)
        parts = math.prod(mesh.shape[axis] for axis in axes)
        shard = Collective(GATHER, _dtype(config, name), (held // parts,), axes, (), 1, "")
        whole = Collective(SCATTER, jnp.dtype(jnp.float32), (held,), axes, (), 1, "")
        for kind, collective in ((WEIGHTS, shard), (GRADIENTS, whole)):
            for axis, size in sent_bytes(collective, dict(mesh.shape)).items():
                found[top, axis, kind] = found.get((top, axis, kind), 0.0) + size
    return found


def passes_of(config: Config, top: str) -> int:
    """Return how often the weights under the first name of a parameter are gathered for a micro-batch."""
    again = config.execution.gather == "layer" and config.execution.remat != "none" and "layers" in top
    return 2 if again else 1


@functools.cache
def _dtype(config: Config, name: str) -> Any:
    precision = PARAMETERS[name].precision
    if precision == "fp32":
        return jnp.dtype(jnp.float32)
    if precision == "fp8" and config.execution.precision == "fp8":
        return jnp.dtype(jnp.float8_e4m3fn)
    return jnp.dtype(compute_dtype(config.execution))


def _axes(spec: Any) -> tuple[str, ...]:
    entries = (entry for entry in spec if entry)
    return tuple(axis for entry in entries for axis in ((entry,) if isinstance(entry, str) else entry))

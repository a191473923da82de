"""What travels between devices in a training step, per axis of the mesh, in bytes that leave a device for each token.

Three figures stand side by side for every kind of row that an exchange moves:

    useful     what the routing asks for: a row for each device, or node, that has an expert of the token
    shipped    what the program sends, whose shapes are static: counted in the traced or compiled program
    limit      what the most scattered token needs: as many copies as its experts can lie on devices or nodes

A copy whose destination is the sender's own place does not travel. Senders are at every place alike, so of c copies to
n places c (n - 1) / n travel. Example, V3 on 8 nodes: at most 4 copies (section 2.1.2), so 3.5 x (7,168 B of E4M3 +
224 B of scales) = 25,872 B go out over `node`, and 3.5 x 14,336 B = 50,176 B of BF16 sums come back. One copy per
expert would be 51,744 and 100,352 B.

Nothing is allocated and no device is needed: the gradient of one micro-batch is traced with shapes, on an abstract
mesh.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import Config, Model
from deepseek_jax.model import transformer
from deepseek_jax.model.precision import compute_dtype
from deepseek_jax.model.router import route, router_scores
from deepseek_jax.parallel.collectives import (
    GATHER,
    SCATTER,
    SUMS,
    WHILE,
    Collective,
    compiled_collectives,
    sent_bytes,
    traced_collectives,
)
from deepseek_jax.parallel.mesh import AnyMesh, axis_size
from deepseek_jax.parallel.program import resolve, resolve_for
from deepseek_jax.parallel.transport import most_copies
from deepseek_jax.parameters import CONTEXT, EXPERTS, PIPE, ROWS, TOKENS, P, Weights
from deepseek_jax.plan.counts import largest_batch
from deepseek_jax.plan.memory import BATCH_DTYPES
from deepseek_jax.training import step
from deepseek_jax.training.objective import pretraining
from deepseek_jax.training.optimizer import Rates
from pallas_kernels import GROUP, dispatch

FORWARD, BACKWARD, RECOMPUTED = "forward", "backward", "recomputed"
ROWS_OUT, ROUTES, SUMS_BACK, GATE_GRADIENTS, COUNTS = "rows", "routes", "sums", "gate gradients", "counts"
LATENTS = "latents"  # of the tokens that other devices have of the same rows (`parallel.context`)
EXCHANGED = (ROWS_OUT, ROUTES, SUMS_BACK, GATE_GRADIENTS, COUNTS)
WEIGHTS, GRADIENTS, OTHER = "weights", "gradients", "scales, losses"
KINDS = (*EXCHANGED, LATENTS, WEIGHTS, GRADIENTS, OTHER)
SCOPES = ("dispatch", "combine", "route", "gather", "context")
WORD = 4  # bytes of FP32 and int32
ROUTE_WORDS = 3  # of each assignment: gate, device and slot


class Line(NamedTuple):
    """What travels of one kind along one axis, in bytes that leave a device for each of its tokens; None: no figure."""

    axis: str
    kind: str  # one of KINDS
    direction: str  # FORWARD, BACKWARD or RECOMPUTED
    shipped: float
    useful: float | None = None
    limit: float | None = None
    per_expert: float | None = None  # if a token were sent once per expert


class Copies(NamedTuple):
    """How many copies of a token's row leave its device, on average over the places of senders."""

    node: float  # to other nodes
    expert: float  # inside a node


def trace(config: Config, mesh: AnyMesh) -> list[Collective]:
    """Return the collectives of the gradient of one micro-batch of `config`, traced with shapes alone.

    Only what travels is as in a run: between the collectives stands the arithmetic of a CPU.

    Raises:
        ValueError: `execution.exchange` does not fit the mesh.
    """
    return traced_collectives(trace_gradient(config, mesh, "cpu"))


def trace_gradient(config: Config, mesh: AnyMesh, platform: str) -> Any:
    """Return the gradient of one micro-batch as a traced program (jaxpr), made with shapes alone; in a pipeline that of
    the largest batch. Kernels are calls in it (`dispatch.outlined`).

    Args:
        config: what is trained.
        mesh: of `config`; its devices need not be there.
        platform: "cpu" or "gpu": whose kernels are in it. Attention is XLA's on both.

    Raises:
        ValueError: `execution.exchange` does not fit the mesh.
    """
    with_xla = config.with_(execution={"attention": "xla"} | ({"experts": "auto"} if platform == "cpu" else {}))
    nodes, shared = axis_size(mesh, EXPERTS[:1]), axis_size(mesh, (CONTEXT,))
    resolved = resolve(with_xla, platform, axis_size(mesh, EXPERTS), nodes, shared)
    sizes = abstract(mesh)
    with jax.sharding.use_abstract_mesh(sizes), dispatch.outlined():
        gradients, inputs = _gradients(resolved, sizes)
        return jax.make_jaxpr(gradients)(*inputs).jaxpr


def compile_for(config: Config, mesh: jax.sharding.Mesh) -> list[Collective]:
    """Return the collectives of the same program compiled for the devices of `mesh`.

    XLA computes top-level gathers of several uses once. For CPUs it turns BF16 collectives into FP32.

    Raises:
        ValueError, NotImplementedError: as `parallel.program.resolve_for`.
    """
    with jax.set_mesh(mesh):
        gradients, inputs = _gradients(resolve_for(config, mesh), mesh)
        return compiled_collectives(jax.jit(gradients).lower(*inputs).compile().as_text() or "", dict(mesh.shape))


def abstract(mesh: AnyMesh) -> jax.sharding.AbstractMesh:
    """Return the mesh without its devices."""
    return mesh if isinstance(mesh, jax.sharding.AbstractMesh) else mesh.abstract_mesh


def _gradients(config: Config, mesh: AnyMesh) -> tuple[Any, tuple[Weights, dict[str, Any], Rates]]:
    """Return the gradient of one micro-batch and its inputs, as shapes, dtypes and shardings."""
    training = config.training
    recipe = step.Recipe(
        config.model, config.execution, pretraining(config), config.optimizer, training.micro_batch_size
    )
    weights = jax.eval_shape(lambda: transformer.init(config.model, jax.random.key(0)))
    rows = jax.sharding.NamedSharding(mesh, P(ROWS, None))
    sequences = training.micro_batch_size if mesh.shape[PIPE] == 1 else largest_batch(config)
    shape = sequences, config.data.sequence_length
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, dtype in BATCH_DTYPES.items()}
    rate: Any = jax.ShapeDtypeStruct((), jnp.float32)
    return functools.partial(step.gradients, recipe), (weights, batch, Rates(rate, rate, rate))


def fresh_routes(model: Model, num_tokens: int) -> np.ndarray:
    """Return the experts [num_tokens, K] that a fresh router chooses for random tokens, int32."""
    h, w = (jax.random.normal(key, shape) for key, shape in zip(
        jax.random.split(jax.random.key(0)),
        ((1, num_tokens, model.width), (model.width, model.num_experts)),
        strict=True,
    ))  # fmt: skip
    experts, _ = route(model, router_scores(model, h, model.init_std * w), jnp.zeros((model.num_experts,)))
    return np.asarray(experts[0])


def copies_of(devices: float, nodes: float, sizes: Mapping[str, int], exchange: str) -> Copies:
    """Return the copies that travel of a token whose experts lie on so many devices, in so many nodes.

    Args:
        devices: that have an expert of the token.
        nodes: that have one.
        sizes: devices along every axis of the mesh.
        exchange: "local", "dense" or "two_hop".
    """
    node, expert = (1 - 1 / sizes[axis] for axis in EXPERTS)
    if exchange == "two_hop":  # one copy to a node, whose device of the sender's index hands it on
        return Copies(nodes * node, devices * expert)
    return Copies(devices * node, devices * expert / sizes["node"]) if exchange == "dense" else Copies(0.0, 0.0)


def spread(experts_TK: np.ndarray, num_experts: int, sizes: Mapping[str, int]) -> tuple[float, float]:
    """Return on how many devices, and in how many nodes, the experts of a token lie, on average.

    Args:
        experts_TK: ids; others than [0, num_experts) are no expert.
        num_experts: E, an equal and consecutive part of them on each device.
        sizes: devices along every axis of the mesh.
    """
    there = (experts_TK >= 0) & (experts_TK < num_experts)
    device = np.where(there, experts_TK * (sizes["node"] * sizes["expert"]) // num_experts, -1)
    node = np.where(there, device // sizes["expert"], -1)

    def distinct(place_TK):
        ordered = np.sort(place_TK, axis=1)
        new = np.diff(ordered, axis=1, prepend=-1) > 0
        return float((new & (ordered >= 0)).sum(1).mean())

    return distinct(device), distinct(node)


def layer_lines(config: Config, mesh: AnyMesh, collectives: Iterable[Collective], experts_TK: np.ndarray) -> list[Line]:
    """Return what one MoE layer exchanges, in the first round: the only one unless routing is far from balanced.

    Args:
        config: that was traced.
        mesh: its mesh.
        collectives: of the gradient of one micro-batch.
        experts_TK: chosen experts, for what is useful.
    """
    model, sizes = config.model, dict(mesh.shape)
    exchange = resolve(config, "cpu", axis_size(mesh, EXPERTS), sizes["node"]).execution.exchange
    shipped = _shipped(config, mesh, collectives)
    layers = model.num_moe_layers + model.num_mtp_layers
    k, groups = model.experts_per_token, (model.num_groups, model.num_kept_groups)
    useful = copies_of(*spread(experts_TK, model.num_experts, sizes), sizes, exchange)
    devices, nodes = (most_copies(parts, k, groups) for parts in (axis_size(mesh, EXPERTS), sizes["node"]))
    limit, per_expert = copies_of(devices, nodes, sizes, exchange), copies_of(k, k, sizes, exchange)
    lines = []
    for (axis, kind, direction), sent in shipped.items():
        if axis in EXPERTS and kind in EXCHANGED and direction != RECOMPUTED:
            size = row_bytes(config, kind)
            figures = (getattr(copies, axis) * size for copies in (useful, limit, per_expert)) if size else ()
            lines.append(Line(axis, kind, direction, sent / layers, *figures))
    return sorted(lines, key=_order)


def step_lines(config: Config, mesh: AnyMesh, collectives: Iterable[Collective]) -> list[Line]:
    """Return what all layers together send in one micro-batch, in first rounds; exchanges as one kind, "exchange"."""
    sums: dict[tuple[str, str, str], float] = {}
    for (axis, kind, direction), sent in _shipped(config, mesh, collectives).items():
        key = axis, "exchange" if kind in EXCHANGED else kind, FORWARD if direction == FORWARD else BACKWARD
        sums[key] = sums.get(key, 0.0) + sent
    return sorted((Line(*key, sent) for key, sent in sums.items()), key=_order)


def _order(line: Line) -> tuple[int, int, int]:
    kinds = ("exchange", *KINDS)
    return TOKENS.index(line.axis), (FORWARD, BACKWARD, RECOMPUTED).index(line.direction), kinds.index(line.kind)


def _shipped(config: Config, mesh: AnyMesh, collectives: Iterable[Collective]) -> dict[tuple[str, str, str], float]:
    """Return the bytes a token of one micro-batch by axis, kind and direction."""
    rows = config.training.micro_batch_size // axis_size(mesh, ROWS)
    tokens = rows * config.data.sequence_length // axis_size(mesh, (CONTEXT,))
    shipped: dict[tuple[str, str, str], float] = {}
    for c in collectives:
        shares, direction = _kinds(config, c), _direction(c)
        for axis, sent in sent_bytes(c, dict(mesh.shape)).items():
            for kind, share in shares.items():
                if sent and share and WHILE not in c.loops:
                    key = axis, kind, direction
                    shipped[key] = shipped.get(key, 0.0) + share * sent * c.times / tokens
    return shipped


def _direction(c: Collective) -> str:
    if "rematted_computation" in c.scope:
        return RECOMPUTED
    return BACKWARD if "transpose(" in c.scope or c.kind == SCATTER else FORWARD


def _kinds(config: Config, c: Collective) -> dict[str, float]:
    """Return which share of a collective's bytes is of which kind."""
    scope = [word for word in re.findall(r"\w+", c.scope) if word in SCOPES][-1:]
    if scope == ["dispatch"]:
        # words beside rows: their scales, and on the first way routes
        has_routes = c.dtype == jnp.int32 and _direction(c) != BACKWARD
        routes = ROUTE_WORDS * config.model.experts_per_token / c.shape[-1] if has_routes else 0.0
        return {ROUTES: routes, ROWS_OUT: 1.0 - routes}
    if scope == ["combine"]:
        return {GATE_GRADIENTS if c.shape[-1] == config.model.experts_per_token else SUMS_BACK: 1.0}
    if scope == ["route"]:
        return {COUNTS if c.kind == GATHER else OTHER: 1.0}
    if scope == ["context"]:
        return {LATENTS: 1.0}
    if c.kind == SCATTER or (c.kind in SUMS and _direction(c) == BACKWARD):
        return {GRADIENTS: 1.0}
    return {WEIGHTS if c.kind == GATHER else OTHER: 1.0}


def row_bytes(config: Config, kind: str) -> int | None:
    """Return the bytes of one copy: what one row is on the wire."""
    width, k = config.model.width, config.model.experts_per_token
    number = jnp.dtype(compute_dtype(config.execution)).itemsize
    in_fp8 = config.execution.precision == "fp8"
    return {
        ROWS_OUT: width + WORD * -(-width // GROUP) if in_fp8 else width * number,
        ROUTES: ROUTE_WORDS * k * WORD,
        SUMS_BACK: width * number,
        GATE_GRADIENTS: k * WORD,
    }.get(kind)

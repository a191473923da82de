"""How long a training step takes: the work of one device, what its links carry, how long it waits.

    step = micro-batches x (forward + backward + sums and casts) + idle of the pipeline + exposed exchange
           + exposed weights and gradients + optimizer

Work is `work.py`'s at the rates of `rates.py`; pipeline stages are taken as equal. **The overlap rule.** Our own
program is taken to compute nothing while rows, weights or gradients travel: all of it is exposed. On two H200s XLA hid
none of an exchange. Of weights by layer 71 of 79 ms lay beside computation, and made it 34 ms slower
(experiments/log.md): there the rule is a bound from above. A `Layout` may say that a system hides
exchanges behind another micro-batch (DualPipe, but for the micro-batches that run alone; its kernels take
multiprocessors from the products) or weights behind layers (FSDP on TPUs): hidden work costs what it takes beyond the
computation. On a TPU's torus a row of an exchange passes as many links as it has to go hops, on average a quarter of
each side.
"""

import dataclasses
from typing import Any, NamedTuple

import jax

from deepseek_jax.config import Config
from deepseek_jax.parallel.mesh import AXES, AnyMesh, axis_size
from deepseek_jax.parameters import CONTEXT, EXPERTS, PIPE, TOKENS
from deepseek_jax.plan import rates
from deepseek_jax.plan.bubble import Stage, waiting
from deepseek_jax.plan.chips import Chip, topology
from deepseek_jax.plan.counts import micro_batches_of
from deepseek_jax.plan.sums import cast_traffic, casts_once, gradient_traffic, gradients_of
from deepseek_jax.plan.traffic import LATENTS, abstract
from deepseek_jax.plan.wire import EXCHANGE, passes_of, sent_in_step
from deepseek_jax.plan.work import layers_of, seconds

# Bytes of an optimizer step for each weight that a device stores: weight, two BF16 moments and gradient read, the
# gradient once more for the norm, weight and moments written.
OPTIMIZER_BYTES = 24
IN, OUT = "in", "out"


class Transport(NamedTuple):
    """How rows travel between devices.

    Attributes:
        share: of the links' rates, inside ("in") and between ("out") nodes.
        together: whether both kinds of links are busy at once.
        multiprocessors: of 132 that it takes from products while it runs beside them.
    """

    share: dict[str, float]
    together: bool = False
    multiprocessors: int = 0


NCCL = Transport(rates.NCCL)
TORUS = Transport(rates.TORUS)
DEEPEP = Transport(rates.DEEPEP, together=True, multiprocessors=20)  # DeepSeek-V3, section 3.2.2


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a step is laid out, as far as its time depends on it.

    Attributes:
        tokens: of one micro-batch on one device.
        micro_batches: of a step.
        experts: routed experts of one layer on a device.
        weights: parameters whose state one device has.
        exchange: bytes that leave a device in a step in exchanges and as latents, over links inside and between nodes.
        other: the same of weights and gradients.
        remat: as `execution.remat`.
        transport: of exchanges and all else.
        stages: of a pipeline, and its schedule and chunks (`bubble.py`).
        tensor: devices that divide each product.
        hides: "exchange" and "weights", what travels behind computation.
        hops: links that a row of an exchange passes on its way.
        split_products: bytes that leave a device inside its node for products that are divided; nothing hides them.
        square: share of its square that attention computes; a half is what a causal mask leaves.
        context: devices that share a sequence; each makes keys and values of all of it.
        sums: bytes that sums of gradients and casts of weights move in a step (`sums.py`); 0: not counted.
    """

    tokens: int
    micro_batches: int
    experts: float
    weights: float
    exchange: dict[str, float]
    other: dict[str, float]
    remat: str
    transport: Transport = NCCL
    stages: int = 1
    schedule: str = "none"
    chunks: int = 1
    tensor: int = 1
    hides: tuple[str, ...] = ()
    hops: float = 1.0
    split_products: float = 0.0
    square: float = 0.5
    context: int = 1
    sums: float = 0.0


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of a training step, all computed. What travels is the exposed part; `travel` has all of it."""

    forward: float
    backward: float
    exchange: float
    other: float
    idle: float
    optimizer: float
    sums: float  # of gradients over micro-batches, and casts of weights
    travel: float

    @property
    def total(self) -> float:
        """Return the seconds of the step."""
        busy = self.forward + self.backward + self.sums + self.optimizer
        return busy + self.exchange + self.other + self.idle


def layout_of(config: Config, mesh: AnyMesh, state: Any, chip: Chip) -> Layout:
    """Return the layout of our own step on a mesh of devices without a pipeline.

    Args:
        config: that fits the mesh.
        mesh: of devices or of sizes.
        state: abstract state (`counts.state_of`).
        chip: says which axes lie inside a node.
    """
    assert mesh.shape[PIPE] == 1, "a pipeline has stages, which differ: plan.stages"
    micro_batches = micro_batches_of(config)
    tokens = config.training.micro_batch_size * config.data.sequence_length // axis_size(mesh, TOKENS)
    parts = axis_size(mesh, EXPERTS)
    exchange, other = {IN: 0.0, OUT: 0.0}, {IN: 0.0, OUT: 0.0}
    for sent in sent_in_step(config, mesh, state, micro_batches, tokens):
        (exchange if sent.kind in (EXCHANGE, LATENTS) else other)[link_of(chip, mesh, sent.axis)] += sent.bytes
    size = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
    passes = 1 if casts_once(config) else micro_batches * passes_of(config, "layers")
    moved = cast_traffic(config, 4 * size / mesh.size, passes)
    moved += gradient_traffic(gradients_of(config, state, abstract(mesh), pipe=False), micro_batches)
    return Layout(
        tokens=tokens,
        micro_batches=micro_batches,
        experts=max(config.model.num_experts / parts, 1),
        weights=size / mesh.size,
        exchange=exchange,
        other=other,
        remat=config.execution.remat,
        transport=TORUS if chip.compiles else NCCL,
        hops=mean_hops(chip, mesh.size),
        context=axis_size(mesh, (CONTEXT,)),
        sums=moved,
    )


def link_of(chip: Chip, mesh: AnyMesh, axis: str) -> str:
    """Return which links an axis of the mesh takes: those inside a node if it and the faster axes fit in one."""
    inner = AXES[AXES.index(axis) :]
    return IN if not chip.node or axis_size(mesh, inner) <= chip.node else OUT


def mean_hops(chip: Chip, devices: int) -> float:
    """Return how many links a row of an exchange passes on average: a quarter of each side of a torus."""
    if not chip.compiles or devices == 1:
        return 1.0
    sides = topology(chip, devices).partition(":")[2].split("x")
    return max(1.0, sum(int(side) / 4 for side in sides))


def step_time(config: Config, layout: Layout, chip: Chip) -> StepTime:
    """Return the seconds of a step.

    Args:
        config: its model, sequence length and precision.
        layout: of the step.
        chip: of all devices.

    Raises:
        ValueError: the chip has no such products, or the schedule takes no such stages.
    """
    layers, heads = layers_of(config, layout.experts, layout.context)
    tokens = layout.tokens / layout.tensor
    layers = [dataclasses.replace(work, attention=work.attention * 2 * layout.square) for work in layers]
    passes = [seconds(chip, config, work, layout.tokens, layout.remat) for work in layers]
    passes += [seconds(chip, config, work, layout.tokens, "none") for work in heads]
    forward, inputs, weights = (tokens * sum(times) / layout.stages for times in zip(*passes, strict=True))
    count = layout.micro_batches
    exchange = travel(layout.transport, layout.exchange, chip, layout.hops) / count
    compute, hidden = forward + inputs + weights, "exchange" in layout.hides
    slowed = compute * 132 / (132 - layout.transport.multiprocessors) if hidden else compute
    exposed = max(0.0, exchange - slowed) if hidden else exchange
    half = exchange / 2
    stage = Stage(
        forward + half, inputs + half, weights, slowed + exposed if hidden else forward + inputs + weights + exchange
    )
    wait = waiting(layout.schedule, layout.stages, count, stage, layout.chunks)
    shown = wait.apart if hidden and layout.stages > 1 else 0.0
    other = travel(layout.transport, layout.other, chip, 1.0)
    split = layout.split_products / (layout.transport.share[IN] * chip.link_in)
    all_compute = count * slowed
    return StepTime(
        forward=count * forward * slowed / compute,
        backward=count * (inputs + weights) * slowed / compute,
        exchange=count * exposed + shown * (exchange - exposed),
        other=split + (max(0.0, other - all_compute) if "weights" in layout.hides else other),
        idle=wait.seconds,
        optimizer=OPTIMIZER_BYTES * layout.weights / rates.memory_rate(chip),
        sums=layout.sums / rates.memory_rate(chip),
        travel=count * exchange + other + split,
    )


def travel(transport: Transport, sent: dict[str, float], chip: Chip, hops: float) -> float:
    """Return the seconds in which bytes leave a device, over links inside and between nodes."""
    times = [
        sent[IN] * hops / (transport.share[IN] * chip.link_in),
        sent[OUT] * hops / (transport.share[OUT] * chip.link_out),
    ]
    return max(times) if transport.together else sum(times)

"""What a decoding step reads, how fast it can be at best, how fast ours is, and which cache fits.

A device has its part of the routed experts and all other weights whole, and its own sequences (`inference.decode`). A
step reads, once, every weight but the embedding, of its experts those that the tokens of all devices that share them
reach, and the latent cache of its sequences. Two floors: those bytes at the stated rate of memory, and the arithmetic
at the stated BF16 peak (activations are BF16 whatever the weights are). The expected time is

    bytes / (READ x stated rate) + layers x (LAYER + sequences of the device x SEQUENCE) + rows between devices

READ is the rate that `experiments.benchmarks.decoding` takes for an H200. LAYER and SEQUENCE are set so that two
records of `v3_5b` in BF16 on one H200, batches 1 and 128, come out; all other records are predicted (docs/planning.md).
Other chips, and the latency of an exchange, are not measured: the first are assumed alike, the second is left out.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.config import Config, Model
from deepseek_jax.inference.cache import cache_bytes_per_token
from deepseek_jax.inference.weights import APART, takes_fp8
from deepseek_jax.model.precision import compute_dtype
from deepseek_jax.parallel.context import refuse_context
from deepseek_jax.parallel.mesh import AXES, AnyMesh, MeshMisfit, axis_size, check_model_fit, mesh_shape
from deepseek_jax.parallel.program import choose_exchange
from deepseek_jax.parallel.stages import refuse_pipeline
from deepseek_jax.parallel.transport import most_copies
from deepseek_jax.parameters import EXPERTS, PARAMETERS, ROWS, leaf_name
from deepseek_jax.plan.chips import DECIMAL, Chip, size_text, unit_of
from deepseek_jax.plan.meshes import abstract_mesh, axes_text
from deepseek_jax.plan.timing import IN, NCCL, OUT, TORUS, link_of, mean_hops, travel
from deepseek_jax.plan.traffic import copies_of
from pallas_kernels import GROUP

READ = 4.3 / 4.8  # of the stated rate: what the floor of the records reads at on an H200
LAYER = 53.2e-6  # seconds of a layer beside its bytes: 15 kernels and the waits between them
SEQUENCE = 0.446e-6  # seconds of a layer for each sequence
FP32, LOGITS = 4, 4  # bytes
BATCHES = (1, 32, 128)  # sequences of a device


@dataclasses.dataclass(frozen=True)
class Decoding:
    """A model on devices that decode. Bytes are of one device, FLOPs of one token.

    Attributes:
        config: of the model.
        mesh: of the devices.
        chip: of all of them.
        always: weights that every step reads.
        experts: routed experts of a device, in all layers.
        table: the embedding, which a step does not read.
        cache: of one token, in all layers.
        products: FLOPs of a token's products.
    """

    config: Config
    mesh: AnyMesh
    chip: Chip
    always: float
    experts: float
    table: float
    cache: int
    products: float

    @property
    def weights(self) -> float:
        """Bytes of all weights of a device."""
        return self.always + self.experts + self.table

    def read(self, sequences: float, context: int) -> float:
        """Return the bytes that a step of so many sequences of a device reads, each with `context` tokens."""
        model, sharing = self.config.model, axis_size(self.mesh, EXPERTS)
        missed = (1 - model.experts_per_token / model.num_experts) ** (sequences * sharing) if self.experts else 1.0
        return self.always + (1 - missed) * self.experts + sequences * context * self.cache

    def floors(self, sequences: float, context: int) -> tuple[float, float]:
        """Return the seconds of a step at least: by its bytes, and by its FLOPs."""
        model = self.config.model
        attention = 2 * model.num_layers * model.num_heads * context * (2 * model.kv_latent + model.rotary_dim)
        flops = sequences * (self.products + attention)
        return self.read(sequences, context) / self.chip.hbm, flops / self.chip.peak_bf16

    def seconds(self, sequences: float, context: int) -> float:
        """Return the expected seconds of a step."""
        by_bytes, by_flops = self.floors(sequences, context)
        layers = self.config.model.num_layers * (LAYER + sequences * SEQUENCE)
        return max(by_bytes / READ, by_flops) + layers + self._exchange(sequences)

    def room(self, sequences: float) -> float:
        """Return the tokens of cache for which a device has room beside its weights and FP32 logits."""
        logits = sequences * self.config.model.vocab_size * LOGITS
        return max(0.0, self.chip.memory - self.weights - logits) / self.cache

    def most_context(self, sequences: float) -> int:
        """Return the tokens that each of so many sequences of a device can have."""
        return int(self.room(sequences) / sequences)

    def most_sequences(self, context: int) -> int:
        """Return how many sequences of `context` tokens a device can have."""
        beside = max(0.0, self.chip.memory - self.weights)
        return int(beside / (context * self.cache + self.config.model.vocab_size * LOGITS))

    def _exchange(self, sequences: float) -> float:
        """Return the seconds of rows and sums between devices, without latency."""
        model, sizes, parts = self.config.model, dict(self.mesh.shape), axis_size(self.mesh, EXPERTS)
        if parts == 1:
            return 0.0
        exchange, k = choose_exchange(parts, sizes["node"]), model.experts_per_token
        groups = model.num_groups, model.num_kept_groups
        copies = copies_of(most_copies(parts, k, groups), most_copies(sizes["node"], k, groups), sizes, exchange)
        row = 2 * model.width * jnp.dtype(compute_dtype(self.config.execution)).itemsize
        sent = {IN: 0.0, OUT: 0.0}
        for axis in EXPERTS:
            sent[link_of(self.chip, self.mesh, axis)] += model.num_moe_layers * sequences * row * getattr(copies, axis)
        hops = mean_hops(self.chip, self.mesh.size)
        return travel(TORUS if self.chip.compiles else NCCL, sent, self.chip, hops)


def decoding(config: Config, num_devices: int, chip: Chip, state: Any) -> Decoding:
    """Return how `config` decodes on devices: on its own mesh, or if that is another number with experts spread widest.

    Args:
        config: of the model; FP8 weights stay in FP8.
        num_devices: of the mesh.
        chip: of all devices.
        state: abstract state (`counts.state_of`).

    Raises:
        ValueError: decoding refuses the mesh or the model does not fit it, or a device cannot hold its weights; the
            message has a number that can.
    """
    mesh = _mesh(config, num_devices, chip)
    found = _contents(config, mesh, chip, state)
    if found.weights <= chip.memory:
        return found
    for number in (num_devices << doublings for doublings in range(1, 12)):
        if chip.has(number) and _contents(config, _widest(config, number, chip), chip, state).weights <= chip.memory:
            where = f"; {chip.name}:{number // chip.devices} does, with experts over more devices"
            break
    else:
        where = ": take another chip, or --config.execution.precision=fp8"
    raise ValueError(
        f"{config.name} does not fit on {num_devices} {chip.name} to decode: a device needs"
        f" {found.weights / 1e9:,.0f} GB for weights and has {chip.memory / 1e9:,.0f}{where}"
    )


def flags_of(config: Config, mesh: AnyMesh) -> str:
    """Return the flags of a mesh that differs from the config's; an axis that takes what is left needs none."""
    sizes = mesh.shape.items()
    return " ".join(f"--config.mesh.{axis}={n}" for axis, n in sizes if getattr(config.mesh, axis) not in (n, -1))


def lines(found: Decoding, context: int) -> list[str]:
    """Return the lines that a person reads, for sequences of `context` tokens."""
    rows, mesh = axis_size(found.mesh, ROWS), found.mesh
    weights, experts, table = (
        size_text(size, found.weights, DECIMAL) for size in (found.weights, found.experts, found.table)
    )
    reads = {n: found.read(n, context) for n in BATCHES if n <= found.most_sequences(context)}
    unit, name = unit_of(max(reads.values(), default=0.0), DECIMAL)
    text = [
        f"decoding on {mesh.size} devices of {found.chip.name} ({axes_text(mesh)}){_with(found)}, computed:",
        f"  weights of a device       {weights:>13}, of them routed experts {experts}, the embedding {table}",
        f"  cache of a token          {found.cache:>10,} bytes, in all layers",
        f"  a step at {context:,} tokens each; expected: rates measured on one H200{_assumed(found)}:",
        f"  {'sequences a device':>20}{f'read, {name}':>10}{'floor, memory':>15}{'floor, FLOPs':>14}{'expected':>11}"
        f"{'tokens/s a device':>19}{'in all':>12}",
    ]
    for batch in BATCHES:
        by_bytes, by_flops = found.floors(batch, context)
        time = found.seconds(batch, context)
        if batch not in reads:
            text.append(f"  {batch:>20}  does not fit")
            continue
        text.append(
            f"  {batch:>20}{reads[batch] / unit:>10,.2f}{1e3 * by_bytes:>12,.2f} ms"
            f"{1e3 * by_flops:>11,.2f} ms{1e3 * time:>8,.2f} ms{batch / time:>19,.0f}{rows * batch / time:>12,.0f}"
        )
    fits = (f"{found.most_context(batch):,} at {batch}" for batch in BATCHES)
    text.append(f"  most tokens of a sequence: {', '.join(fits)} a device, beside weights and logits alone")
    sizes = (f"{found.most_sequences(size):,} of {size:,}" for size in (4096, 32768, 131072))
    return [*text, f"  most sequences a device: {', '.join(sizes)} tokens"]


def record(found: Decoding, context: int) -> dict[str, Any]:
    """Return the same as plain values: bytes, seconds, and whether the caches of so many sequences fit."""
    steps = {
        str(batch): {
            "read_computed": found.read(batch, context),
            "floor_memory_computed": found.floors(batch, context)[0],
            "floor_flops_computed": found.floors(batch, context)[1],
            "seconds_expected": found.seconds(batch, context),
            "fits": batch <= found.most_sequences(context),
        }
        for batch in BATCHES
    }
    return {
        "config": found.config.name,
        "precision": found.config.execution.precision,
        "mesh": dict(found.mesh.shape),
        "context": context,
        "weights_computed": found.weights,
        "cache_of_a_token_computed": found.cache,
        "steps": steps,
        "most_context_computed": {str(batch): found.most_context(batch) for batch in BATCHES},
    }


def _with(found: Decoding) -> str:
    flags = flags_of(found.config, found.mesh)
    return f" with {flags}" if flags else ""


def _assumed(found: Decoding) -> str:
    other = [] if found.chip.name == "h200" else [f"{found.chip.name} is assumed to reach the same shares"]
    if axis_size(found.mesh, EXPERTS) > 1:
        other.append("no latency of an exchange is in it: a bound from below")
    return f"; {'; '.join(other)}" if other else ""


def _mesh(config: Config, num_devices: int, chip: Chip) -> jax.sharding.AbstractMesh:
    """Return the config's mesh; if that is of another number of devices, the widest.

    Raises:
        ValueError: decoding refuses an axis of the config's mesh, or the model does not fit it.
    """
    _refuse_axes({axis: getattr(config.mesh, axis) for axis in AXES})
    try:
        mesh = abstract_mesh(mesh_shape(config.mesh, num_devices))
    except MeshMisfit:
        return _widest(config, num_devices, chip)
    _refuse_axes(dict(mesh.shape))  # an axis of -1 has its size now
    check_model_fit(config.model, mesh)
    return mesh


def _refuse_axes(sizes: dict[str, int]) -> None:
    refuse_pipeline(sizes, "decoding")
    refuse_context(abstract_mesh({axis: max(size, 1) for axis, size in sizes.items()}), "decoding")


def _widest(config: Config, num_devices: int, chip: Chip) -> jax.sharding.AbstractMesh:
    """Return the mesh that spreads experts over most devices, inside nodes first."""
    parts = math.gcd(num_devices, config.model.num_experts) if config.model.num_moe_layers else 1
    expert = math.gcd(parts, chip.node or parts)
    sizes = {"data": num_devices // parts, "context": 1, "node": parts // expert, "expert": expert}
    return abstract_mesh({"pipe": 1} | sizes | {"tensor": 1})


def _contents(config: Config, mesh: AnyMesh, chip: Chip, state: Any) -> Decoding:
    model, parts = config.model, axis_size(mesh, EXPERTS)
    always = experts = table = products = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state["params"]):
        name, top = leaf_name(path), str(path[0].key)
        if top == "mtp_layers":
            continue
        size = leaf.size * _bytes_of(config, model, name)
        if top == "embed_VD":
            table += size
        elif PARAMETERS[name].per_expert:
            experts += size / parts
            products += 2 * leaf.size * model.experts_per_token / model.num_experts
        else:
            always += size
            products += 2 * leaf.size
    cache = cache_bytes_per_token(model, config.execution)
    return Decoding(config, mesh, chip, always, experts, table, cache, products)


def _bytes_of(config: Config, model: Model, name: str) -> float:
    """Return the bytes of one number of a weight, as `inference.weights` keeps it."""
    precision, execution = PARAMETERS[name].precision, config.execution
    if precision == "fp32":
        return FP32
    if precision == execution.precision == "fp8" and name != APART and takes_fp8(model, execution):
        return 1 + FP32 / GROUP**2
    return jnp.dtype(compute_dtype(execution)).itemsize

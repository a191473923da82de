"""The collectives of the train step: which, how many, of what type and where.

They are counted in two programs, because each hides what the other shows. The traced program (jaxpr) has every
collective that the code asks for, with its dtype, the loops around it and their trip counts. It is also what is looked
at in BF16: XLA:CPU would turn BF16 collectives into FP32. The compiled program has what XLA's partitioner added on its
own account outside the shard_map: a reshard of a weight or an all-reduce of its gradient would appear only there.
"""

import collections
import functools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax.config import Config, from_config_dict
from deepseek_jax.parallel.collectives import (
    EXCHANGE,
    GATHER,
    SCATTER,
    SUMS,
    WHILE,
    Collective,
    compiled_collectives,
    sent_bytes,
    traced_collectives,
)
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.program import resolve_for
from deepseek_jax.parameters import EXPERTS, PARAMETERS
from deepseek_jax.plan.memory import abstract_inputs, trace_step
from tests.support import small

pytestmark = pytest.mark.xdist_group(small.GROUP)  # the steps of `small.on_mesh`, and what one test traced

MESH = (2, 1, 4)
MESHES = {"2x4": MESH, "1x8": (1, 1, 8)}
ROWS_OUT = "all_gather of rows"  # over the experts' axes alone; weights are gathered over `data`, too
LARGEST = "pmax"


def of_kinds(found: list[Collective]) -> list[Collective]:
    """The collectives, with gathers of rows as a kind of their own."""

    def of_rows(c):
        return c.kind == GATHER and "data" not in c.axes

    return [c._replace(kind=ROWS_OUT) if of_rows(c) else c for c in found]


class Traced(NamedTuple):
    config: Config
    params: dict
    collectives: list[Collective]

    def of(self, *kinds):
        return [c for c in self.collectives if c.kind in kinds]


def traced(sizes=MESH, *, gather="layer", precision="fp32", remat="none", exchange="auto") -> Traced:
    """The small model's step, traced without an array."""
    return _traced(sizes, gather, precision, remat, exchange)


@functools.cache
def _traced(sizes, gather, precision, remat, exchange):
    tree = small.fp8_config_dict() if precision == "fp8" else small.config_dict()
    tree.mesh.update(dict(zip(("data", "node", "expert"), sizes, strict=True)))
    tree.execution.update({"gather": gather, "precision": precision, "remat": remat, "exchange": exchange})
    config = from_config_dict(tree)
    mesh = make_mesh(config.mesh)
    jaxpr = trace_step(resolve_for(config, mesh), mesh).jaxpr
    return Traced(config, abstract_inputs(config, mesh)[0]["params"], of_kinds(traced_collectives(jaxpr.jaxpr)))


def split_leaves(tree, sizes) -> list[str]:
    """Names of the leaves that a gather makes whole: split over several devices, besides by their experts."""
    return [
        name
        for name, _ in named_leaves(tree)
        if any(PARAMETERS[name].layout) and (sizes[0] if PARAMETERS[name].per_expert else math.prod(sizes)) > 1
    ]


def named_leaves(tree):
    return [(path[-1].key, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def num_micro_batches(config):
    return config.training.batch_size[-1][2] // config.training.micro_batch_size


def num_routers(config):
    return config.model.num_moe_layers + config.model.num_mtp_layers


def times_by_loops(collectives):
    return sum(c.times for c in collectives if "while" not in c.loops)


@pytest.mark.parametrize(("gather", "remat", "sizes"), [
    ("layer", "none", (2, 1, 4)),
    ("layer", "none", (1, 1, 8)),
    ("layer", "selective", (2, 1, 4)),
    ("layer", "selective", (1, 1, 8)),
    ("kept", "selective", (2, 1, 4)),
])  # fmt: skip
def test_layerwise_gathers_and_reductions_are_as_many_as_weights_used(gather, remat, sizes):
    """Per micro-batch, each weight of each layer is gathered once forward and reduced once.

    It is gathered once more where the backward pass recomputes, unless it is kept.
    """
    step = traced(sizes, gather=gather, remat=remat)
    stacks = {name: step.params[name] for name in ("dense_layers", "moe_layers", "mtp_layers")}
    in_layers = sum(len(split_leaves(stack, sizes)) * len(jax.tree.leaves(stack)[0]) for stack in stacks.values())
    top = len(split_leaves({name: step.params[name] for name in ("embed_VD", "head_DV", "final_norm_D")}, sizes))
    assert top == 2
    visits = 2 if (gather, remat) == ("layer", "selective") else 1
    assert times_by_loops(step.of(GATHER)) == num_micro_batches(step.config) * (top + visits * in_layers)
    assert times_by_loops(step.of(SCATTER)) == num_micro_batches(step.config) * (top + in_layers)


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stepwise_gathers_and_reductions_happen_once(sizes, precision):
    """With gather = "step": one gather and one reduction per stack of weights, outside the loop over micro-batches."""
    step = traced(sizes, gather="step", precision=precision)
    weights = split_leaves(step.params, sizes)
    for kind in (GATHER, SCATTER):
        assert len(step.of(kind)) == len(weights)
        assert {c.loops for c in step.of(kind)} == {()}
    gains = [leaf.shape for name, leaf in named_leaves(step.params) if not any(PARAMETERS[name].layout)]
    summed = collections.Counter(c.shape for c in step.of(*SUMS) if c.dtype == jnp.float32)
    assert summed >= collections.Counter(gains)  # each gain's gradient, whole stacks; the rest are losses
    assert {c.loops for c in step.of(*SUMS)} == {()}


@pytest.mark.parametrize("gather", ["layer", "step"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_are_reduced_in_fp32(gather, precision):
    step = traced(gather=gather, precision=precision)
    assert {c.dtype for c in step.of(SCATTER)} == {jnp.dtype(jnp.float32)}
    assert {c.dtype for c in step.of(*SUMS)} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}  # int32: counts


@pytest.mark.parametrize("gather", ["layer", "step"])
def test_weights_travel_in_bf16(gather):
    """All but the embedding and the routers."""
    step = traced(gather=gather, precision="bf16")
    dtypes = collections.Counter({jnp.dtype(jnp.bfloat16): 0, jnp.dtype(jnp.float32): 0})
    for c in step.of(GATHER):
        dtypes[c.dtype] += c.times
    stacks = 2  # of routers: MoE layers and MTP layers
    in_fp32 = 1 + stacks if gather == "step" else num_micro_batches(step.config) * (1 + num_routers(step.config))
    assert dtypes[jnp.dtype(jnp.float32)] == in_fp32
    assert dtypes[jnp.dtype(jnp.bfloat16)] > 3 * in_fp32


@pytest.mark.parametrize("gather", ["layer", "step"])
def test_fp8_weights_travel_in_bytes(gather):
    """As many as there are, quantised once per step.

    The devices agree beforehand on scales only, once for each stack of a weight. Of experts, which they store whole,
    they tell each other the scales.
    """
    step = traced(gather=gather, precision="fp8")
    split = split_leaves(step.params, MESH)
    in_fp8 = [name for name in split if PARAMETERS[name].precision == "fp8"]
    moved = [c for c in step.of(GATHER) if c.dtype == jnp.uint8]
    once = (
        len(in_fp8)
        if gather == "step"
        else num_micro_batches(step.config)
        * sum(
            sum(PARAMETERS[name].precision == "fp8" for name in split_leaves(stack, MESH))
            * len(jax.tree.leaves(stack)[0])
            for stack in (step.params["dense_layers"], step.params["moe_layers"])
        )
    )
    assert sum(c.times for c in moved) == once
    assert {c.dtype for c in step.of(SCATTER)} == {jnp.dtype(jnp.float32)}
    agreed = step.of(LARGEST)
    whole = [name for name in in_fp8 if PARAMETERS[name].per_expert]
    assert len([c for c in agreed if c.loops == () and len(c.shape) > 1]) == len(in_fp8) - len(whole) > 0
    assert len([c for c in step.of(GATHER) if c.dtype == jnp.float32 and "quantize_weights" in c.scope]) == len(whole)
    largest = max(math.prod(c.shape) for c in agreed)
    assert (
        largest
        < min(leaf.size for name, leaf in named_leaves(step.params) if PARAMETERS[name].precision == "fp8") / 100
    )


@pytest.mark.parametrize("remat", ["none", "selective"])
def test_an_exchange_costs_so_many_collectives(remat):
    """Counts to all; rows out, and gates with devices and slots in one array; sums home. In the backward pass the
    gradient of the sums out, those of rows and gates home.

    Recomputing repeats nothing of it: rows and routes are kept. (MTP, outside any scan, asks for the sums again and
    leaves it to XLA to see that nobody reads them.) All else sits in loops that run no round when the first carries
    everything.
    """
    step = traced(remat=remat, precision="bf16")
    routers, mtp = num_routers(step.config), step.config.model.num_mtp_layers
    moved = 6 * routers if remat == "none" else 6 * routers + mtp
    assert times_by_loops(step.of(EXCHANGE)) == num_micro_batches(step.config) * moved
    assert times_by_loops(step.of(ROWS_OUT)) == num_micro_batches(step.config) * routers
    by_dtype = collections.Counter(c.dtype for c in step.of(EXCHANGE) if "while" not in c.loops)
    assert set(by_dtype) == {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    k = step.config.model.experts_per_token
    assert {c.shape[-1] for c in step.of(EXCHANGE) if c.dtype == jnp.float32} == {k}  # only gates' gradients
    assert {c.shape[-1] for c in step.of(EXCHANGE) if c.dtype == jnp.int32} == {3 * k}


def test_in_fp8_rows_and_their_gradients_travel_in_bytes():
    """Out in both passes; sums come home in BF16. E4M3 travels as uint8, its scales as words, one for 128 channels."""
    step = traced(precision="fp8")
    width = step.config.model.width
    rows = [c for c in step.of(EXCHANGE) if "while" not in c.loops and c.shape[-1] == width]
    assert {c.dtype for c in rows} == {jnp.dtype(jnp.uint8), jnp.dtype(jnp.bfloat16)}
    times = {dtype: sum(c.times for c in rows if c.dtype == dtype) for dtype in (jnp.uint8, jnp.bfloat16)}
    assert set(times.values()) == {2 * num_routers(step.config) * num_micro_batches(step.config)}
    words = [c for c in step.of(EXCHANGE) if "while" not in c.loops and c.dtype == jnp.int32]
    routes, scales = 3 * step.config.model.experts_per_token, width // 128
    assert {c.shape[-1] for c in words} == {scales + routes, scales}  # with the rows, and with their gradients
    assert sum(c.times for c in words) == times[jnp.uint8]


@pytest.mark.parametrize(("sizes", "exchange", "forward", "backward"), [
    ((2, 1, 4), "dense", 4, 4),  # counts; rows, words; sums / gradients, their scales; those of rows and of gates
    ((1, 2, 4), "two_hop", 7, 9),  # rows, words and sums twice / rows once more, with scales beside the gradients'
])  # fmt: skip
def test_an_exchange_in_fp8_costs_so_few_collectives(sizes, exchange, forward, backward):
    """One flies at a time, and each has its latency: what is narrow shares one, and counts say how many rounds."""
    step = traced(sizes, precision="fp8", exchange=exchange)
    inside = ("dispatch", "combine", "route")
    found = [c for c in step.collectives if "while" not in c.loops and set(re.findall(r"\w+", c.scope)) & set(inside)]
    times = {False: 0, True: 0}
    for c in found:
        times["transpose(" in c.scope] += c.times
    layers = num_routers(step.config) * num_micro_batches(step.config)
    assert (times[False] / layers, times[True] / layers) == (forward, backward)


def test_no_sum_has_the_size_of_a_weight():
    """What is summed whole over devices is no larger than the largest leaf that lies everywhere."""
    for gather in ("layer", "step"):
        step = traced(gather=gather)
        assert max(math.prod(c.shape) for c in step.of(*SUMS)) <= largest_everywhere(step)


def largest_everywhere(step):
    """Elements of the largest stacked gain or of the counts: fewer than any weight of one layer has.

    That holds for whole weights and for the experts of this device.
    """
    leaves = named_leaves(step.params)
    largest = max(leaf.size for name, leaf in leaves if not any(PARAMETERS[name].layout))
    largest = max(largest, num_routers(step.config) * step.config.model.num_experts)
    for name, leaf in leaves:
        if any(PARAMETERS[name].layout):
            parts = MESH[1] * MESH[2] if EXPERTS in PARAMETERS[name].layout else 1
            assert largest < math.prod(leaf.shape[-len(PARAMETERS[name].layout) :]) // parts, name
    return largest


@functools.cache
def compiled() -> list[Collective]:
    on = small.on_mesh(MESH)
    return of_kinds(compiled_collectives(on.step.as_text(), dict(on.mesh.shape)))


@pytest.mark.slow
def test_the_partitioner_moves_no_weight_on_its_own_account():
    """Every gather, scatter and exchange comes from a statement inside the shard_map.

    Outside, the partitioner adds only sums for norms: scalars.
    """
    kinds = collections.Counter(c.kind for c in compiled())
    assert kinds["ppermute"] == 0
    for kind in (GATHER, ROWS_OUT, SCATTER, EXCHANGE):
        assert kinds[kind] > 0
        assert [c.scope for c in compiled() if c.kind == kind and "/shard_map/" not in c.scope] == []
    outside = [c for c in compiled() if "shard_map" not in c.scope]
    assert {math.prod(c.shape) for c in outside} <= {1}


@pytest.mark.slow
def test_compiled_step_has_no_all_reduce_of_a_weight():
    bound = largest_everywhere(traced())
    for c in compiled():
        if c.kind in SUMS:
            assert math.prod(c.shape) <= bound, c
            assert c.dtype in (jnp.float32, jnp.int32), c


@pytest.mark.slow
def test_the_compiled_step_sends_the_bytes_of_the_traced_one():
    """Rows, sums and gradients, by axis, kind and dtype; scans count as often as they run.

    Gathers of weights may be fewer: the second micro-batch of two, which needs no loop, shares them with the first.
    """

    def sent(found):
        sums = collections.Counter()
        for c in found:
            if WHILE not in c.loops and c.kind in (EXCHANGE, SCATTER, GATHER, ROWS_OUT):
                whole = c._replace(kind=GATHER) if c.kind == ROWS_OUT else c
                for axis, count in sent_bytes(whole, dict(small.on_mesh(MESH).mesh.shape)).items():
                    sums[axis, c.kind, str(c.dtype)] += count * c.times
        return +sums

    wanted, got = sent(traced().collectives), sent(compiled())
    assert set(got) == set(wanted)
    assert any(axis == "expert" and kind == EXCHANGE for axis, kind, _ in got)
    for key, count in wanted.items():
        assert got[key] <= count if key[1] == GATHER else got[key] == count, key

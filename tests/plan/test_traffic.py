"""What travels: the program's bytes are the limits' arithmetic, the routing needs no more, and HLO is read whole."""

import functools
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import from_config_dict
from deepseek_jax.model import transformer
from deepseek_jax.parallel.collectives import Collective, compiled_collectives, sent_bytes, traced_collectives
from deepseek_jax.parameters import PARAMETERS, TOKENS
from deepseek_jax.plan import traffic, wire
from deepseek_jax.plan.counts import state_of
from deepseek_jax.plan.meshes import require_fit
from tests.support import small

SIZES = {"pipe": 1, "data": 2, "context": 1, "node": 2, "expert": 4, "tensor": 1}


@functools.cache
def v3():
    """V3's own layer alone, on 8 nodes of 8 devices: its fit and what its gradient sends."""
    config = from_config_dict(importlib.import_module("configs.deepseek_v3").get_config())
    config = config.with_(
        model={"num_layers": 1, "num_dense_layers": 0, "num_mtp_layers": 0, "vocab_size": 1024},
        data={"sequence_length": 512},
        execution={"exchange_slack": 1.0},
    )
    fit = require_fit(config, 64)
    return fit, traffic.trace(fit.config, fit.mesh)


def layer(experts_TK=None):
    fit, collectives = v3()
    routes = traffic.fresh_routes(fit.config.model, 256) if experts_TK is None else experts_TK
    lines = traffic.layer_lines(fit.config, fit.mesh, collectives, routes)
    return {(line.axis, line.kind, line.direction): line for line in lines}


def test_the_closed_form_is_what_the_program_sends():
    """Exchanges to 2% (counts and gradients of gates are left out), weights and gradients to 1% (scales)."""
    fit, collectives = v3()
    tokens = fit.config.training.micro_batch_size // fit.num_devices * fit.config.data.sequence_length
    traced: dict = {}
    for line in traffic.step_lines(fit.config, fit.mesh, collectives):
        key = line.axis, line.kind
        traced[key] = traced.get(key, 0.0) + line.shipped
    for sent in wire.sent_in_step(fit.config, fit.mesh, state_of(fit.config), 1, tokens):
        close = 0.02 if sent.kind == wire.EXCHANGE else 0.01
        assert sent.bytes / tokens == pytest.approx(traced.pop((sent.axis, sent.kind)), rel=close), sent
        assert sent.useful <= sent.bytes
    assert {kind for _, kind in traced} <= {traffic.OTHER}


def test_the_closed_form_knows_shared_sequences_and_what_is_computed_again():
    """The small model, two devices to a sequence. Latents and weights are the program's; rows that are sent again too,
    but for some of their routes, which are a sixth of such short rows.
    """
    tree = small.config_dict()
    tree.mesh.update({"data": 1, "context": 2, "node": 2, "expert": 2})
    tree.execution.remat = "full"
    config = from_config_dict(tree)
    fit, state = require_fit(config, 8), state_of(config)
    collectives = traffic.trace(fit.config, fit.mesh)
    traced: dict = {}
    for line in traffic.step_lines(fit.config, fit.mesh, collectives):
        traced[line.axis, line.kind] = traced.get((line.axis, line.kind), 0.0) + line.shipped
    tokens = fit.config.training.micro_batch_size // 4 * fit.config.data.sequence_length // 2
    sent = {(s.axis, s.kind): s.bytes / tokens for s in wire.sent_in_step(fit.config, fit.mesh, state, 1, tokens)}
    for axis, kind in (("context", "latents"), ("context", "weights"), ("node", "weights"), ("expert", "weights")):
        assert sent[axis, kind] == pytest.approx(traced[axis, kind], rel=1e-6), (axis, kind)
    once = wire.exchange_of_token(fit.config.with_(execution={"remat": "selective"}), fit.mesh)
    again = {line.kind: line.shipped for line in traffic.step_lines(fit.config, fit.mesh, resent(collectives))}
    assert sum(again.values()) == pytest.approx(sent["node", "exchange"] - once["node"][0], rel=0.1)


def resent(collectives):
    """Rows and routes over `node` that a layer sends again."""
    return [c for c in collectives if "rematted" in c.scope and "dispatch" in c.scope and c.axes == ("node",)]


@pytest.mark.parametrize("direction", [traffic.FORWARD, traffic.BACKWARD])
def test_v3_sends_four_copies_a_token_between_nodes(direction):
    """The goldens of the report's layer: 3.5 x 7,392 B out and 3.5 x 14,336 B back, in both passes."""
    lines = layer()
    rows, sums = lines["node", "rows", direction], lines["node", "sums", direction]
    assert (rows.shipped, rows.limit, rows.per_expert) == (25_872, 25_872, 51_744)
    assert (sums.shipped, sums.limit, sums.per_expert) == (50_176, 50_176, 100_352)
    kinds = {kind for axis, kind, way in lines if (axis, way) == ("node", direction)}
    assert kinds == {"rows", "sums", *(["routes", "counts"] if direction == "forward" else ["gate gradients"])}


@pytest.mark.parametrize("direction", [traffic.FORWARD, traffic.BACKWARD])
def test_inside_a_node_a_row_goes_to_those_who_want_it(direction):
    """7 of 8 copies leave the forwarder at slack 1; in the backward pass rows are handed on beside their gradients."""
    lines = layer()
    rows, sums = lines["expert", "rows", direction], lines["expert", "sums", direction]
    times = 1 if direction == traffic.FORWARD else 2
    assert (rows.shipped, rows.limit) == (times * 7 * 7_392, 7 * 7_392)
    assert (sums.shipped, sums.limit) == (7 * 14_336, 7 * 14_336)


def test_routing_asks_for_no_more_than_is_sent_and_allowed():
    for line in layer().values():
        if line.useful is not None:
            assert 0 < line.useful <= min(line.limit, line.shipped), line
    scattered = layer(np.tile(np.arange(8) * 16, (4, 1)))  # two in each of 4 nodes: all limits but per expert
    assert scattered["node", "rows", "forward"].useful == 25_872
    assert scattered["expert", "sums", "forward"].useful == 8 * 7 / 8 * 14_336


def test_a_step_gathers_each_weight_and_reduces_its_gradient_once():
    """63 of 64 parts of each come in: weights in their own precision, gradients in FP32; gains are summed whole."""
    fit, collectives = v3()
    lines = {(x.axis, x.direction, x.kind): x.shipped for x in traffic.step_lines(fit.config, fit.mesh, collectives)}
    tokens = fit.config.training.micro_batch_size // 64 * 512
    params = jax.eval_shape(lambda: transformer.init(fit.config.model, jax.random.key(0))).params
    weights = gradients = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        parameter = PARAMETERS[path[-1].key]
        if TOKENS in parameter.layout:
            weights += leaf.size * {"fp8": 1, "compute": 2, "fp32": 4}[parameter.precision]
            gradients += 4 * leaf.size
        elif not any(parameter.layout):
            gradients += 2 * 4 * leaf.size
    for (direction, kind), whole in {("forward", "weights"): weights, ("backward", "gradients"): gradients}.items():
        sent = [lines[axis, direction, kind] * tokens for axis in ("node", "expert")]
        np.testing.assert_allclose(sum(sent), whole * 63 / 64, rtol=1e-6)
        np.testing.assert_allclose(sent[0], 8 * sent[1], rtol=1e-6)  # 56 of them in other nodes, 7 in this one
    assert not any(axis == "data" for axis, _, _ in lines)


@pytest.mark.parametrize(("ids", "devices", "nodes"), [
    ([0, 1], 1, 1),
    ([0, 2], 2, 1),
    ([0, 15], 2, 2),
    ([-1, 16], 0, 0),  # padding
    ([-1, 9], 1, 1),
])  # fmt: skip
def test_spread_counts_distinct_places(ids, devices, nodes):
    """Of 16 experts, two on each of 8 devices, eight in each of two nodes."""
    assert traffic.spread(np.array([ids]), 16, SIZES) == (devices, nodes)


def brute_force(experts_TK, exchange):
    """Copies that travel, by walking every token from every place of a sender."""
    node = expert = 0
    for ids in experts_TK:
        targets = {(e // 8, e // 2 % 4) for e in ids}
        for home in np.ndindex(2, 4):
            if exchange == "two_hop":
                node += len({n for n, _ in targets} - {home[0]})
                expert += sum(e != home[1] for _, e in targets)  # from the device of the sender's index there
            else:
                node += sum(n != home[0] for n, _ in targets)
                expert += sum(n == home[0] and e != home[1] for n, e in targets)
    return node / len(experts_TK) / 8, expert / len(experts_TK) / 8


@pytest.mark.parametrize("exchange", ["dense", "two_hop"])
def test_copies_are_those_of_a_walk(exchange):
    experts_TK = np.stack([np.random.default_rng(i).permutation(16)[:3] for i in range(20)])
    devices, nodes = traffic.spread(experts_TK, 16, SIZES)
    np.testing.assert_allclose(traffic.copies_of(devices, nodes, SIZES, exchange), brute_force(experts_TK, exchange))
    assert traffic.copies_of(devices, nodes, SIZES, "local") == (0, 0)


def collective(kind, axes, shape=(8, 3), dtype=jnp.float32):
    return Collective(kind, jnp.dtype(dtype), shape, axes, (), 1, "")


@pytest.mark.parametrize(("kind", "axes", "sent"), [
    ("all_gather", ("node", "expert"), {"node": 4 * 96, "expert": 3 * 96}),
    ("all_gather", ("expert",), {"expert": 3 * 96}),
    ("all_to_all", ("node", "expert"), {"node": 4 * 12, "expert": 3 * 12}),
    ("reduce_scatter", ("expert", "data"), {"data": 4 * 12, "expert": 3 * 12}),
    ("psum", ("data",), {"data": 96}),
    ("ppermute", ("node",), {"node": 96}),
    ("all_gather", ("pipe",), {"pipe": 0}),
])  # fmt: skip
def test_bytes_that_a_device_sends(kind, axes, sent):
    """Of an operand of 96 bytes; 2 devices along data and node, 4 along expert."""
    assert sent_bytes(collective(kind, axes), SIZES) == sent


def test_a_chain_sends_less_than_a_ring():
    """Of three links of four devices, traced and compiled: three quarters of 96 bytes on average."""
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "expert"), axis_types=2 * (jax.sharding.AxisType.Explicit,))
    pairs = [(0, 1), (1, 2), (2, 3)]
    move = jax.shard_map(
        lambda x: jax.lax.ppermute(x, "expert", pairs), mesh=mesh, in_specs=jax.P("expert"), out_specs=jax.P("expert")
    )
    with jax.sharding.use_abstract_mesh(mesh):
        x = jax.ShapeDtypeStruct((32, 3), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P("expert")))
        (traced,) = traced_collectives(jax.make_jaxpr(move)(x).jaxpr)
    text = """ENTRY %main (x: f32[8,3]) -> f32[8,3] {
      ROOT %p = f32[8,3] collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,3},{4,5},{5,6},{6,7}}
    }"""
    sizes = {"data": 2, "expert": 4}
    (compiled,) = compiled_collectives(text, sizes)
    assert sent_bytes(traced, sizes) == sent_bytes(compiled, sizes) == {"expert": 72}


HLO = """HloModule a

%region (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%body (p: (s32[], f32[8,3])) -> (s32[], f32[8,3]) {
  %e = (u8[2,3]{1,0}, u8[2,3]{1,0}) all-to-all(%a, %b), replica_groups=GROUPS, metadata={op_name="jit(f)/x"}
}

%until (p: (s32[], f32[8,3])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8,3]) -> f32[8,3] {
  %while.1 = (s32[], f32[8,3]) while(%t), condition=%until, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %while.2 = (s32[], f32[8,3]) while(%t), condition=%until, body=%body
  %g = bf16[8,12]{1,0} all-gather(%x), replica_groups=GROUPS, dimensions={1}, use_global_device_ids=true
  %r = f32[8,3]{1,0} reduce-scatter(%x), replica_groups=GROUPS, dimensions={0}, to_apply=%region
  %a = ((f32[8,3]), f32[8,3], u32[]) all-to-all-start(%x), replica_groups=GROUPS, dimensions={0}
  %b = (f32[8,3], f32[8,12]) all-gather-start(%x), replica_groups=GROUPS, dimensions={1}
  ROOT %s = f32[8,3]{1,0} all-reduce(%r), replica_groups=[1,16]<=[16], to_apply=%region
}
"""
GROUPS = {  # of 16 devices, data x node x expert = 2 x 2 x 4
    ("expert",): ("[4,4]<=[16]", "{{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}}", "mesh['data'=2] {'expert'}"),
    ("node",): ("[8,2]<=[2,2,4]T(0,2,1)", "{{0,4},{1,5},{2,6},{3,7},{8,12},{9,13},{10,14},{11,15}}"),
    ("data", "expert"): ("[2,8]<=[2,2,4]T(1,0,2)", "{{0,1,2,3,8,9,10,11},{4,5,6,7,12,13,14,15}}"),
}


@pytest.mark.parametrize(("axes", "groups"), [(axes, form) for axes, forms in GROUPS.items() for form in forms])
def test_a_compiled_program_is_read_whole(axes, groups):
    """Loops with their trip counts, and groups in every form that HLO has."""
    sizes = SIZES
    found = compiled_collectives(HLO.replace("GROUPS", groups), sizes)
    parts = math.prod(sizes[axis] for axis in axes)
    exchanges, others = found[:4], found[4:]
    assert [(c.loops, c.times) for c in exchanges] == 2 * [(("scan",), 5)] + 2 * [(("while",), 1)]
    assert {(c.kind, c.shape, str(c.dtype), c.axes) for c in exchanges} == {("all_to_all", (2, 3), "uint8", axes)}
    assert [(c.kind, c.shape, c.axes) for c in others] == [
        ("all_gather", (8, 12 // parts), axes),
        ("reduce_scatter", (8 * parts, 3), axes),
        ("all_to_all", (8, 3), axes),
        ("all_gather", (8, 12 // parts), axes),
        ("psum", (8, 3), ("data", "node", "expert")),
    ]
    assert exchanges[0].scope == "jit(f)/x"


def test_text_that_is_no_program_of_the_mesh_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        compiled_collectives("", SIZES)
    with pytest.raises(ValueError, match="has device 15, and the mesh .* has 8"):
        compiled_collectives(HLO.replace("GROUPS", "[8,2]<=[16]"), SIZES | {"data": 1})

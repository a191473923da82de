"""FP8 weights on a mesh: quantised in place to the bits of one device, moved as bytes, gradients summed in FP32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from deepseek_jax import config as config_lib
from deepseek_jax.model.recompute import recomputed
from deepseek_jax.parallel.collectives import GATHER, traced_collectives
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.weights import attach, detach, gather, quantize_weights, reduce_gradients
from deepseek_jax.parameters import PARAMETERS, TOKENS, P, matrix_shape, num_lead_dims, partition_specs
from pallas_kernels.lowering import manual_axes
from pallas_kernels.quantize import quantize_blocks
from tests.support import small

# Shapes of whole weights by how their blocks of 128 x 128 lie on eight devices.
SHAPES = {
    # eight parts of 16, 24 and 40 rows, the last block partial; four experts, whose halves have no whole blocks
    "split blocks": {
        "q_a_DA": (128, 136),
        "kv_a_DC": (3, 192, 200),
        "o_NHD": (2, 4, 32, 320),
        "gate_up_D2F": (128, 2, 128),
        "down_FD": (2, 256, 192),
        "gate_up_ED2F": (2, 4, 192, 2, 128),
        "down_EFD": (4, 128, 144),
        "router_DE": (128, 4),
    },
    "whole blocks": {
        "q_a_DA": (1024, 136),
        "o_NHD": (2, 4, 32, 1024),
        "gate_up_ED2F": (2, 4, 256, 2, 64),
        "down_EFD": (4, 128, 512),
    },
    "not divided": {
        "q_a_DA": (132, 136),
        "kv_a_DC": (3, 130, 200),
        "kv_b_CNX": (2, 129, 2, 64),
        "o_NHD": (2, 4, 32, 324),
        "gate_up_ED2F": (2, 12, 129, 2, 64),
        "down_EFD": (12, 128, 129),
        "router_DE": (131, 12),
    },
    "whole experts": {"gate_up_ED2F": (2, 8, 192, 2, 128), "down_EFD": (8, 128, 144)},
}
CASES = [(lie, name) for lie, shapes in SHAPES.items() for name in shapes]
FP8 = [(lie, name) for lie, name in CASES if PARAMETERS[name].precision == "fp8"]


@functools.cache
def on_eight_devices(lie):
    """On 2x2x2: each device's gathered FP8 weights, and the gradients that come back by both ways."""
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES[lie].items()}
    num_experts = params["down_EFD"].shape[0]
    if lie == "split blocks":
        params["q_a_DA"][100, 5] = np.nan
        params["kv_a_DC"][1, :128, :128] = 0.0

    def cotangent(name, shape):
        device = 1 + jax.lax.axis_index(TOKENS)
        return (device * jnp.arange(np.prod(shape), dtype=jnp.float32) % 7).reshape(shape)

    def local(params):
        quantized = quantize_weights(params, num_experts)

        def moved_of(tree):
            return detach(gather(attach(tree, quantized), jnp.bfloat16, num_experts))

        weights, pull = jax.vjp(lambda tree: moved_of(tree)[0], params)
        _, moved = moved_of(params)
        mine = {name: cotangent(name, w.shape).astype(w.dtype) for name, w in weights.items()}
        return (
            jax.tree.map(lambda w: w[None], ({name: q for name, q in moved.items() if q}, mine)),
            pull(mine)[0],
            reduce_gradients(mine, num_experts),
        )

    tree = {"pipe": 1, "data": 2, "node": 2, "expert": 2, "tensor": 1}
    with jax.set_mesh(make_mesh(config_lib.Mesh(**ConfigDict(tree)))):
        specs = partition_specs(params)
        run = jax.jit(jax.shard_map(local, in_specs=(specs,), out_specs=(P(TOKENS), specs, specs)))
        return params, *jax.device_get(run(jax.tree.map(jax.device_put, params, specs)))


def expert_dim(lie, name):
    return len(SHAPES[lie][name]) - len(PARAMETERS[name].layout)


def mine(lie, name, w, device):
    """What a device has of a whole array when it is gathered."""
    return np.split(w, 4, expert_dim(lie, name))[device % 4] if PARAMETERS[name].per_expert else w


@pytest.mark.parametrize("lie,name", FP8)
def test_every_device_has_the_bits_of_one_device(lie, name):
    params, (moved, _), *_ = on_eight_devices(lie)
    values, scales = moved[name]
    for device in range(8):
        w = mine(lie, name, params[name], device)
        matrix = matrix_shape(w.shape, num_lead_dims(name, w.ndim), PARAMETERS[name].input_dims)
        want = quantize_blocks(jnp.asarray(w.reshape(-1, *matrix[-2:])))
        np.testing.assert_array_equal(
            values[device].view(np.uint8).ravel(), np.asarray(want.values).view(np.uint8).ravel()
        )
        np.testing.assert_array_equal(scales[device].ravel(), np.ravel(want.scales))
    assert values.shape[1:] == mine(lie, name, params[name], 0).shape


@pytest.mark.parametrize("lie,name", CASES)
def test_gradients_come_back_summed(lie, name):
    """Small integers: the sum in FP32 is exact."""
    _, (_, cotangents), transposed, reduced = on_eight_devices(lie)
    c = cotangents[name].astype(np.float32)
    if PARAMETERS[name].per_expert:
        want = np.concatenate(list(c.reshape(2, 4, *c.shape[1:]).sum(0)), axis=expert_dim(lie, name))
    else:
        want = c.sum(0)
    assert transposed[name].dtype == reduced[name].dtype == np.float32
    np.testing.assert_array_equal(transposed[name], want)
    np.testing.assert_array_equal(reduced[name], want)


def test_the_table_names_every_linear_layer():
    """What stays out is what V3 keeps in higher precision (section 3.3.1), and the merging matrix, stored in BF16."""
    matrices = {name for name, row in PARAMETERS.items() if row.decayed and not name.startswith("lora_")}
    others = {name for name in matrices if PARAMETERS[name].precision != "fp8"}
    assert others == {"embed_VD", "head_DV", "router_DE", "merge_2DD"}


@functools.cache
def two_layers(precision, gathered):
    """Gradients of two layers whose weights lie on (data 2, expert 2), and how often each is gathered."""
    execution = small.config().with_(execution={"gather": gathered, "remat": "full"}).execution
    rng = np.random.default_rng(0)
    shapes = {"q_a_DA": (512, 128), "down_EFD": (4, 128, 128), "router_DE": (128, 4)}
    params = {name: rng.normal(size=(2, *shape)).astype(np.float32) for name, shape in shapes.items()}

    def local(params):
        quantized = quantize_weights(params, 4) if precision == "fp8" else jax.tree.map(lambda _: None, params)
        params, numbers = detach(attach(params, quantized))

        def body(x, layer):
            whole = gather(attach(*layer), jnp.bfloat16, 4, differentiated=True)
            for w in whole.values():
                carrier, values = (w, w) if isinstance(w, jax.Array) else (w.carrier, w.values.astype(jnp.float32))
                # a product with `values` whose gradient is the carrier's, and which needs them in both passes
                x = x + jnp.sin(jnp.sum(carrier * x) + jnp.sum(values * jnp.cos(x)))
            return x, None

        def loss(params):
            x = manual_axes.vary(jnp.float32(1e-3) * (1 + jax.lax.axis_index(TOKENS)), frozenset(TOKENS))
            return jax.lax.scan(recomputed(execution, body, True), x, (params, numbers))[0]

        return jax.grad(loss)(params)

    tree = {"pipe": 1, "data": 2, "node": 1, "expert": 2, "tensor": 1}
    with jax.set_mesh(make_mesh(config_lib.Mesh(**ConfigDict(tree)), jax.devices()[:4])):
        specs = partition_specs(params)
        run = jax.jit(jax.shard_map(local, in_specs=(specs,), out_specs=specs))
        placed = jax.tree.map(jax.device_put, params, specs)
        found = traced_collectives(run.trace(placed).jaxpr.jaxpr)
        return jax.device_get(run(placed)), sum(c.times for c in found if c.kind == GATHER and c.times > 1)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_kept_weight_is_gathered_once_and_gives_the_same_bits(precision):
    """448, E4M3's largest, is among the values: kept as a number, it would be infinite (`model.recompute`)."""
    want, twice = two_layers(precision, "layer")
    got, once = two_layers(precision, "kept")
    assert (twice, once) == (12, 6)  # three weights of two layers
    assert all(np.linalg.norm(w) > 0 and np.isfinite(w).all() for w in want.values())
    jax.tree.map(np.testing.assert_array_equal, got, want)

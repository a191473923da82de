"""One row per parameter: what derives from the table, and that one row is all that a new parameter needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from deepseek_jax.config import from_config_dict
from deepseek_jax.inference.weights import decode_weights
from deepseek_jax.parallel.mesh import AXES, make_mesh
from deepseek_jax.parallel.weights import attach, detach, gather, quantize_weights, reduce_gradients
from deepseek_jax.parameters import (
    COPIES,
    EXPERTS,
    PARAMETERS,
    STORED_EXPERTS,
    TOKENS,
    P,
    Parameter,
    Weights,
    layout_of,
    matrix_shape,
    num_lead_dims,
    partition_specs,
)
from deepseek_jax.training.optimizer import decay_mask
from pallas_kernels.quantize import quantize_blocks

NEW = "adapter_DAP"


@pytest.fixture
def new_row(monkeypatch):
    """A parameter that no module has: two dims of rows, multiplied in FP8."""
    monkeypatch.setitem(PARAMETERS, NEW, Parameter(P(None, None, TOKENS), 2, "fp8"))


def config(**mesh: int):
    tree = tiny.get_config()
    tree.mesh.update(mesh)
    return from_config_dict(tree)


def test_one_row_is_all_that_a_parameter_needs(new_row):
    """Layout, quantisation, gather, reduction of gradients, decay: on eight devices, stacked over two layers."""
    w = np.random.default_rng(0).normal(size=(2, 24, 8, 128)).astype(np.float32)
    params = {"moe_layers": {"attention": {NEW: w}}}
    assert partition_specs(params)["moe_layers"]["attention"][NEW] == P(None, None, None, TOKENS)
    assert decay_mask(params)["moe_layers"]["attention"][NEW]

    def local(params):
        quantized = quantize_weights(params, 0)
        carriers, pull = jax.vjp(lambda tree: detach(gather(attach(tree, quantized), jnp.bfloat16, 0))[0], params)
        _, moved = detach(gather(attach(params, quantized), jnp.bfloat16, 0))
        ones = jax.tree.map(jnp.ones_like, carriers)
        return jax.tree.map(lambda a: a[None], moved), pull(ones)[0], reduce_gradients(ones, 0)

    with jax.set_mesh(make_mesh(config(data=2, node=2, expert=2).mesh)):
        specs = partition_specs(params)
        run = jax.jit(jax.shard_map(local, in_specs=(specs,), out_specs=(P(TOKENS), specs, specs)))
        moved, transposed, reduced = jax.device_get(run(jax.tree.map(jax.device_put, params, specs)))

    values, scales = moved["moe_layers"]["attention"][NEW]
    matrix = matrix_shape(w.shape, num_lead_dims(NEW, w.ndim), PARAMETERS[NEW].row_dims)
    assert matrix == (2, 24 * 8, 128)
    want = quantize_blocks(jnp.asarray(w.reshape(matrix)))
    for device in range(8):
        np.testing.assert_array_equal(
            values[device].reshape(matrix).view(np.uint8), np.asarray(want.values).view(np.uint8)
        )
        np.testing.assert_array_equal(scales[device], want.scales)
    np.testing.assert_array_equal(transposed["moe_layers"]["attention"][NEW], np.full(w.shape, 8.0))
    np.testing.assert_array_equal(reduced["moe_layers"]["attention"][NEW], np.full(w.shape, 8.0))


def test_a_new_row_is_cast_for_decoding(new_row):
    bf16 = tiny.get_config()
    bf16.execution.precision = "bf16"
    params = {NEW: np.ones((4, 4, 4), np.float32), "norm_D": np.ones(4, np.float32)}
    mesh = make_mesh(config(data=1).mesh, jax.devices()[:1])
    cast, _ = decode_weights(from_config_dict(bf16).model, from_config_dict(bf16).execution, Weights(params, {}), mesh)
    assert (cast[NEW].dtype, cast["norm_D"].dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize(
    ("width", "axes"),
    [
        (48, TOKENS),
        (40, ("context", "node", "expert")),  # of 12 devices 4 divide it, and of 3 data none
        (36, TOKENS),
        (30, ("data", "context", "expert")),  # 6, over the faster link
        (27, ("data", "context")),
        (50, ("context", "expert")),
        (25, "context"),
    ],
)
def test_a_dim_is_split_over_the_axes_that_divide_it_into_most_parts(width, axes):
    """On data 3, node 2, expert 2; an axis of one device divides everything."""
    sizes = dict.fromkeys(AXES, 1) | {"data": 3, "node": 2, "expert": 2}
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))):
        assert layout_of("q_a_DA", (5, width, 7), 0) == P(None, axes, None)
        assert layout_of("o_NHD", (2, 3, width), 0) == P(None, None, axes)


def test_experts_stay_on_their_devices():
    """12 on (node 2, expert 2) and data 3: whole ones. 8: each is split over data, if that divides it."""
    sizes = dict.fromkeys(AXES, 1) | {"data": 3, "node": 2, "expert": 2}
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))):
        assert layout_of("down_EFD", (12, 5, 7), 12) == P(STORED_EXPERTS, None, None)
        assert layout_of("down_EFD", (8, 5, 9), 8) == P(EXPERTS, None, COPIES)
        assert layout_of("down_EFD", (8, 5, 7), 8) == P(EXPERTS, None, "context")


def test_the_table_is_the_recipe():
    """Section 3.3.1: all linear layers in FP8 but embedding, head, router and the matrix that merges MTP's inputs."""
    named = {
        precision: {n for n, row in PARAMETERS.items() if row.precision == precision}
        for precision in ("fp8", "compute")
    }
    assert named["compute"] == {"head_DV", "merge_2DD"}
    others = {n for n, row in PARAMETERS.items() if row.decayed and not n.startswith("lora_")} - named["fp8"]
    assert others == {"embed_VD", "router_DE"} | named["compute"]
    assert {n for n, row in PARAMETERS.items() if row.input_dims == 2} == {"o_NHD", "merge_2DD"}
    assert {n for n, row in PARAMETERS.items() if row.per_expert and not n.startswith("lora_")} == {
        "gate_up_ED2F",
        "down_EFD",
    }
    assert {n for n, row in PARAMETERS.items() if row.keeps_fp32} == {"router_DE", "bias_E"}


def test_every_row_has_an_entry_per_dim_of_its_name():
    for name, row in PARAMETERS.items():
        assert len(row.layout) == len(name.rpartition("_")[2]), name

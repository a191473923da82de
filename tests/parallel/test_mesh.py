"""The mesh refuses what does not fit, the layout covers every parameter, and `gather` and reduction are transposes."""

import functools
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import Mesh, from_config_dict
from deepseek_jax.model import transformer
from deepseek_jax.parallel.mesh import AXES, check_fit, connect, make_mesh
from deepseek_jax.parallel.weights import detach, gather, reduce_gradients
from deepseek_jax.parameters import PARAMETERS, TOKENS, P, partition_specs
from tests.support import small
from tests.support.configs import CONFIGS


def sizes(**axes):
    return Mesh(**(dict.fromkeys(AXES, 1) | axes))


# fmt: skip
@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        ({"data": -1, "expert": 4}, (1, 2, 1, 1, 4, 1)),
        ({"data": 2, "node": 2, "expert": -1}, (1, 2, 1, 2, 2, 1)),
        ({"data": 8}, (1, 8, 1, 1, 1, 1)),
    ],
)
def test_mesh_has_the_sizes_asked_for(axes, shape):
    mesh = make_mesh(sizes(**axes))
    assert mesh.axis_names == AXES
    assert mesh.devices.shape == shape
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}


def test_every_group_of_axes_connects():
    sums = connect(make_mesh(sizes(data=2, node=2, expert=2)))
    assert [set(np.asarray(sum_).tolist()) for sum_ in sums] == [{2}] * 3 + [{4}] * 3 + [{8}]


def test_axes_of_a_torus_are_split_where_whole_ones_do_not_serve(monkeypatch):
    """As on 128 chips of a v5p, 8 x 4 x 4, for a mesh of 2 x 8 x 8; `tests.plan.test_aot_tpu` asks libtpu."""

    def refuse(*_, **__):
        raise NotImplementedError("Failed to find assignment for logical_axis_index 3 of size 8")

    monkeypatch.setattr(jax, "make_mesh", refuse)
    mesh = make_mesh(sizes(data=2, expert=4))
    assert mesh.axis_names == AXES
    assert mesh.devices.shape == (1, 2, 1, 1, 4, 1)
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}


# fmt: skip
@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": 3}, "'data': 3.*does not fit 8 devices.*multiply to 8.*mesh.data=-1.*--cpu_devices"),
        (
            {"data": -1, "expert": 3},
            "config.mesh.expert = 3 does not fit 8 devices.*nearest that does is expert = 2 or 4",
        ),
        ({"data": -1, "node": 2, "expert": 3}, "does not fit 8 .*nearest that does is expert = 2 or 4,"),
        ({"data": -1, "node": 3, "expert": 3}, "does not fit 8 devices.*lower it"),
        ({"data": 2, "expert": 3}, "does not fit 8 devices.*for example mesh.expert=4"),
        (
            {"data": -1, "expert": 16},
            "config.mesh.expert = 16 does not fit 8 devices.*divide.*is expert = 8,.*--cpu_devices=16",
        ),
        ({"data": -1, "node": -1}, "at most one is -1"),
        ({"data": 0}, "sizes are positive"),
        ({"data": -2, "expert": -4}, "sizes are positive"),
        ({"tensor": -1}, "mesh.tensor = -1: this axis is reserved.*set it to 1"),
    ],
)
def test_mesh_that_does_not_fit_is_refused(axes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(sizes(**axes))


# fmt: skip
@pytest.mark.parametrize(
    ("section", "name", "value", "parts", "fitting"),
    [
        ("model", "num_experts", 12, 8, r"is 8 or 16: .*\(6 or 12\)"),
        ("training", "micro_batch_size", 4, 8, r"is 8: .*\(4\)"),
    ],
)
def test_dims_that_the_mesh_cannot_split_are_refused(section, name, value, parts, fitting):
    tree = small.config_dict()
    tree.mesh.update({"data": 1, "expert": 8})
    check_fit(from_config_dict(tree), make_mesh(from_config_dict(tree).mesh))
    tree[section][name] = value
    config = from_config_dict(tree)
    with pytest.raises(
        ValueError,
        match=f"{section}.{name} = {value} cannot be split over {parts} devices.*nearest {name} that can {fitting}",
    ):
        check_fit(config, make_mesh(config.mesh))


def test_tokens_that_share_no_scale_are_refused_in_fp8():
    tree = small.fp8_config_dict()
    tree.mesh.update({"data": 1, "expert": 8})
    check_fit(from_config_dict(tree), make_mesh(from_config_dict(tree).mesh))
    tree.data.sequence_length = 192
    message = (
        "micro_batch_size = 8 leaves 192 tokens to each of 8 devices; in FP8 128 tokens share"
        r" .* make it a multiple of 128, .*\(16\)"
    )
    with pytest.raises(ValueError, match=message):
        check_fit(from_config_dict(tree), make_mesh(from_config_dict(tree).mesh))
    tree.training.micro_batch_size = 16
    check_fit(from_config_dict(tree), make_mesh(from_config_dict(tree).mesh))


@functools.cache
def parameters(name):
    config = from_config_dict(importlib.import_module(f"configs.{name}").get_config())
    return jax.eval_shape(lambda: transformer.init(config.model, jax.random.key(0)))


def named_leaves(tree):
    return [(path[-1].key, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


@pytest.mark.parametrize("name", CONFIGS)
def test_layout_covers_every_parameter(name):
    """Stacked leaves have one dim more than their layout, others as many.

    No axis splits two dims, and matrices are split over all of TOKENS.
    """
    params, router_bias = parameters(name)
    specs = jax.tree.leaves(partition_specs((params, router_bias)), is_leaf=lambda spec: isinstance(spec, P))
    for (leaf_name, leaf), spec in zip(named_leaves((params, router_bias)), specs, strict=True):
        assert leaf.ndim - len(PARAMETERS[leaf_name].layout) in (0, 1), leaf_name
        axes = [axis for entry in spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
        everywhere = leaf_name.endswith("norm_D") or leaf_name in ("q_norm_A", "kv_norm_C", "bias_E")
        assert sorted(axes) == ([] if everywhere else sorted(TOKENS)), leaf_name


def test_layout_has_no_entry_without_a_parameter():
    """Beside those of adapters: of one matrix, and of one for each expert."""
    adapters = {"lora_a_IU", "lora_b_UO", "lora_a_EIU", "lora_b_EUO"}
    assert {name for config in CONFIGS for name, _ in named_leaves(parameters(config))} == set(PARAMETERS) - adapters


def test_unknown_parameter_is_named():
    with pytest.raises(KeyError, match=r"no row of PARAMETERS for \['new_DF'\]"):
        partition_specs({"new_DF": jnp.zeros((2, 2))})


DEVICES, E = (2, 2, 2), 8
# One leaf per kind of layout, shapes of the whole weight, two of them stacked.
WHOLE = {
    "embed_VD": (16, 24),
    "head_DV": (24, 16),
    "router_DE": (24, E),
    "o_NHD": (3, 2, 4, 24),
    "final_norm_D": (24,),
    "norm_D": (3, 24),
    "gate_up_ED2F": (E, 16, 2, 4),
    "down_EFD": (3, E, 4, 16),
}


def expert_dim(name):
    return WHOLE[name].index(E) if PARAMETERS[name].per_expert else None


def local_shape(name):
    """A gathered leaf on one device: whole, but only this device's experts."""
    return tuple(size // 4 if dim == expert_dim(name) else size for dim, size in enumerate(WHOLE[name]))


@functools.cache
def gathered_and_reduced(dtype):
    """On 2x2x2: gathered weights, and gradients by both ways, for cotangents that differ on every device."""
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in WHOLE.items()}
    # 256 on one device and 1 on seven: a sum in BF16 stays at 256.
    cotangents = {
        name: np.ones((8, *local_shape(name)), np.float32) * rng.integers(1, 4, local_shape(name)) for name in WHOLE
    }
    for c in cotangents.values():
        c[0] *= 256

    def local(params, cotangents):
        whole, pull = jax.vjp(lambda tree: gather(tree, dtype, E), params)
        mine = jax.tree.map(lambda c, w: c[0].astype(w.dtype), cotangents, whole)
        return jax.tree.map(lambda w: w[None], whole), pull(mine)[0], reduce_gradients(mine, E)

    with jax.set_mesh(make_mesh(sizes(data=2, node=2, expert=2))):
        specs = partition_specs(params)
        run = jax.jit(jax.shard_map(local, in_specs=(specs, P(TOKENS)), out_specs=(P(TOKENS), specs, specs)))
        arrays = (
            jax.tree.map(jax.device_put, params, specs),
            jax.tree.map(lambda c: jax.device_put(c, P(TOKENS)), cotangents),
        )
        return params, cotangents, *jax.device_get(run(*arrays))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", WHOLE)
def test_gather_makes_the_weight_whole_everywhere(name, dtype):
    params, _, whole, *_ = gathered_and_reduced(dtype)
    stays_fp32 = name in ("embed_VD", "router_DE") or name.endswith("norm_D")
    want = params[name] if stays_fp32 else params[name].astype(dtype)
    for device in range(8):
        mine = want if expert_dim(name) is None else np.split(want, 4, expert_dim(name))[device % 4]
        assert whole[name].dtype == want.dtype
        np.testing.assert_array_equal(whole[name][device], mine)


def test_what_is_differentiated_is_summed_in_fp32_without_a_rounding_before():
    """A cotangent of 1 + 2^-20 from each of eight devices: BF16 would make it 1. And the values are those of BF16."""
    params = {"q_a_DA": np.float32(np.arange(64).reshape(16, 4) / 7), "norm_D": np.ones(4, np.float32)}

    def local(params):
        carriers, pull = jax.vjp(lambda tree: detach(gather(tree, jnp.bfloat16, 0, differentiated=True))[0], params)
        _, numbers = detach(gather(params, jnp.bfloat16, 0, differentiated=True))
        cotangents = jax.tree.map(lambda c: jnp.full_like(c, 1 + 2.0**-20), carriers)
        return numbers["q_a_DA"][0][None], pull(cotangents)[0]

    with jax.set_mesh(make_mesh(sizes(data=2, node=2, expert=2))):
        specs = partition_specs(params)
        run = jax.jit(jax.shard_map(local, in_specs=(specs,), out_specs=(P(TOKENS), specs)))
        values, grads = jax.device_get(run(jax.tree.map(jax.device_put, params, specs)))
    np.testing.assert_array_equal(values, np.broadcast_to(params["q_a_DA"].astype(jnp.bfloat16), (8, 16, 4)))
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, np.full_like(g, 8 + 2.0**-17)), grads)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", WHOLE)
def test_gradients_are_summed_over_devices_in_fp32(name, dtype):
    """By the transpose of `gather` and by `reduce_gradients`: small integers sum exactly in FP32, and not in BF16."""
    _, cotangents, _, transposed, reduced = gathered_and_reduced(dtype)
    c = cotangents[name]
    if expert_dim(name) is None:
        want = c.sum(0)
    else:  # devices 0..3 and 4..7 are the two data groups, each with all experts
        want = np.concatenate(list(c.reshape(2, 4, *c.shape[1:]).sum(0)), axis=expert_dim(name))
    assert transposed[name].dtype == reduced[name].dtype == np.float32
    np.testing.assert_array_equal(transposed[name], want)
    np.testing.assert_array_equal(reduced[name], want)


def test_layout_divides_the_671b_model_evenly():
    """On 2 x 8 x 8 devices, every weight but the gains in 128 equal parts: at most 22 GB of FP32 weights a device."""
    shape = dict(zip(TOKENS, (2, 1, 8, 8), strict=True))
    params, _ = parameters("deepseek_v3")
    total = 0
    for (name, leaf), spec in zip(
        named_leaves(params), jax.tree.leaves(partition_specs(params), is_leaf=lambda s: isinstance(s, P)), strict=True
    ):
        parts = [math.prod(shape[a] for a in ((e,) if isinstance(e, str) else e or ())) for e in spec]
        assert all(size % part == 0 for size, part in zip(leaf.shape, parts, strict=True)), name
        total += leaf.size // math.prod(parts)
    assert 4 * total <= 22e9

"""Adapters: their gradients are those of the merged weights, they begin as the base, and what is merged is what ran."""

import dataclasses
import functools
import gc
import weakref
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.adapters import Adapted, Lora, adapt, base_of, halves, is_weight, mark
from deepseek_jax.config import from_config_dict
from deepseek_jax.huggingface.load import abstract_weights
from deepseek_jax.inference.weights import dequantized
from deepseek_jax.model import transformer
from deepseek_jax.model.linear import linear, swiglu_linear
from deepseek_jax.model.norm_linear import norm_linear
from deepseek_jax.model.precision import ATTENTION_OUTPUT
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parameters import Fp8Weight, Weights, leaf_name
from deepseek_jax.plan.adapters import held_by_device
from deepseek_jax.plan.meshes import fit_as_written
from deepseek_jax.training import adapted as adapted_training
from deepseek_jax.training.adapted import first_state, frozen, merged, open_adapters
from deepseek_jax.training.checkpoint import Progress
from deepseek_jax.training.objective import pretraining
from deepseek_jax.training.origin import Beginning
from deepseek_jax.training.state import weights_of
from deepseek_jax.training.step import gradients, recipe_of, update
from pallas_kernels.quantize import quantize_blocks
from tests.support import small
from tests.support.drawn_adapters import check_gradients

LORA = Lora(rank=4, alpha=8.0, targets=("attention", "shared", "experts"))
ONE = (1, 1, 1)


def config(precision="fp32", sizes=ONE):
    """One MoE layer, with dims that FP8 allows."""
    tree = small.fp8_config_dict()
    tree.model.update({"num_layers": 1, "num_dense_layers": 0})
    tree.execution.precision = precision
    tree.training.update({"batch_size": (("constant", 1.0, 8),), "micro_batch_size": 8})
    tree.mesh.update(dict(zip(("data", "node", "expert"), sizes, strict=True)))
    return from_config_dict(tree)


@functools.cache
def base_weights():
    """FP32 weights of the model, on the host."""
    cfg = config()
    with jax.set_mesh(make_mesh(cfg.mesh, jax.devices()[:1])):
        init_model = functools.partial(transformer.init, cfg.model)
        return jax.device_get(jax.jit(init_model)(jax.random.key(0)))


def weights_on(mesh):
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_weights(config(), mesh))
    return jax.device_put(base_weights(), shardings)


class Case(NamedTuple):
    """`step(base, state, batch, RATES) -> (grads, sums, state, metrics)`, and what it takes, on a mesh."""

    mesh: Any
    base: Any
    state: Any
    batch: Any
    step: Any


@functools.cache
def case(precision="fp32", sizes=ONE):
    """The step of adapters whose B is zero."""
    cfg = config(precision, sizes)
    mesh = make_mesh(cfg.mesh, jax.devices()[: np.prod(sizes)])
    recipe = recipe_of(cfg, pretraining(cfg), mesh)

    def step(base, state, batch, rates):
        grads, sums, norms = gradients(recipe, weights_of(state), batch, rates, base)
        return grads, sums, *update(recipe, state, grads, sums, norms, rates)

    with jax.set_mesh(mesh):
        weights = weights_on(mesh)
        base = mark(LORA, frozen(recipe.execution, weights.params))
        start = functools.partial(first_state, cfg, LORA)
        state = jax.jit(start)(base, weights.router_bias)
        batch = small.put(small.batch(rows=8, length=cfg.data.sequence_length))
        compiled = jax.jit(step).lower(base, state, batch, small.RATES).compile()
    return Case(mesh, base, state, batch, compiled)


def run(case, state, base=None):
    with jax.set_mesh(case.mesh):
        return case.step(base or case.base, state, case.batch, small.RATES)


def moved(state):
    """A state whose B is not zero."""
    leaves, tree = jax.tree.flatten(state["params"])
    keys = jax.random.split(jax.random.key(2), len(leaves))
    leaves = [leaf + 0.02 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return state | {"params": tree.unflatten(leaves)}


@pytest.mark.slow
def test_a_learns_from_the_second_step_on_and_what_is_merged_is_what_ran():
    mesh, base, start, _, _ = case()
    first, _, second, _ = run(case(), start)
    state = moved(second)
    grads, _, _, metrics = run(case(), state)
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(grads), strict=True):
        assert np.any(one) == ("_b_" in path[-1].key) and np.any(other), path
    assert len(jax.tree.leaves(grads)) == 2 * (5 + 2 + 2)  # of attention, of the shared and of the routed experts
    with jax.set_mesh(mesh):
        whole = mark(LORA, merged(Weights(adapt(base, state["params"]), {})).params)
    still = start | {"router_bias": state["router_bias"]}  # a step has moved them
    merged_loss = float(run(case(), still, whole)[3]["loss"])
    assert merged_loss == pytest.approx(float(metrics["loss"]), rel=1e-6)
    assert abs(float(run(case(), still)[3]["loss"]) - merged_loss) > 1e-3


@pytest.mark.slow
def test_gradients_are_those_of_the_merged_weights_projected():
    """dA = s dW B^T and dB = s A^T dW, with dW by autodiff of the model with merged weights."""
    mesh, base, start, batch, _ = case()
    state = moved(start)
    grads = run(case(), state)[0]
    cfg = config()
    adapted = adapt(base, state["params"])
    with jax.set_mesh(mesh):
        whole = merged(Weights(adapted, state["router_bias"]))
        program = jax.jit(functools.partial(gradients, recipe_of(cfg, pretraining(cfg), mesh)))
        full = program.lower(whole, batch, small.RATES).compile()(whole, batch, small.RATES)[0]
    assert check_gradients(adapted, grads, full) == 5 + 2 + 2  # of attention, of the shared and of the routed experts


@pytest.mark.slow
def test_two_steps_in_fp8_are_those_in_fp32_as_far_as_fp8_goes():
    """Attention, the shared and the routed experts. FP32 multiplies what FP8 stores, so activations alone differ.

    Measured: losses 3.5e-4 apart, cosines of gradients from 0.927 (of A of a query projection), norms within 3.2%.
    """
    fp8, fp32 = case("fp8"), case()
    stored = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(fp8.base)]
    same = jax.tree.map_with_path(plain, jax.device_get(fp8.base), is_leaf=lambda leaf: isinstance(leaf, Fp8Weight))
    same = jax.device_put(same, jax.tree.map(lambda leaf: leaf.sharding, fp32.base))
    states = [fp8.state, fp32.state]
    jax.tree.map(np.testing.assert_array_equal, *(state["params"] for state in states))
    for step in range(2):
        taken = run(fp8, states[0]), run(fp32, states[1], same)
        states = [each[2] for each in taken]
        losses = [float(each[3]["loss"]) for each in taken]
        assert abs(losses[0] - losses[1]) < 6e-4 * losses[1], (step, losses)
        leaves = jax.tree_util.tree_leaves_with_path(taken[0][0])
        for (path, a), b in zip(leaves, jax.tree.leaves(taken[1][0]), strict=True):
            if step or "_b_" in path[-1].key:
                a, b = np.float64(a), np.float64(b)
                norms = np.linalg.norm(a), np.linalg.norm(b)
                assert (a * b).sum() > 0.9 * norms[0] * norms[1], (step, jax.tree_util.keystr(path))
                assert norms[0] == pytest.approx(norms[1], rel=0.06), (step, jax.tree_util.keystr(path))
    assert stored == [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(fp8.base)]


@pytest.mark.slow
def test_a_step_on_eight_devices_is_that_of_one_and_takes_the_memory_that_was_planned():
    """As tests.training.test_equal_steps."""
    sizes = 2, 2, 2
    one, many = case(), case(sizes=sizes)
    start = moved(one.state)
    taken = run(one, start), run(many, jax.device_put(start, jax.tree.map(lambda leaf: leaf.sharding, many.state)))
    (want, want_sums, want_state, want_metrics), (grads, sums, state, metrics) = map(jax.device_get, taken)
    for name in ("loss", "grad_norm", "update_norm", "param_norm"):
        np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=1e-6, err_msg=name)
    np.testing.assert_array_equal(sums.router.counts_E, want_sums.router.counts_E)
    for tree, wanted in ((grads, want), (state["params"], want_state["params"])):
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(wanted), strict=True):
            assert np.linalg.norm(a - b) <= 5e-6 * np.linalg.norm(b), jax.tree_util.keystr(path)
    planned = held_by_device(fit_as_written(config(sizes=sizes), 8), many.base, many.state)
    batch = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(many.batch))
    assert many.step.memory_analysis().argument_size_in_bytes == pytest.approx(
        planned["base"] + planned["adapters"] + planned["moments"] + batch, abs=128
    )


def test_targets_alone_are_marked_with_alpha_by_rank():
    params = {"dense_layers": {"ffn": {"down_FD": np.zeros((2, 8, 8))}}, "embed_VD": np.zeros((4, 8))}
    marked = mark(Lora(rank=4, alpha=2.0, targets=("ffn",)), params)
    assert marked["dense_layers"]["ffn"]["down_FD"].scale == 0.5 and marked["embed_VD"] is params["embed_VD"]


def test_the_base_as_it_was_read_is_let_go(monkeypatch, tmp_path):
    """A run in BF16 multiplies a copy; what was read in FP32 would take twice as much beside it, for the whole run."""
    cfg = config("bf16")
    mesh = make_mesh(cfg.mesh, jax.devices()[:1])
    shapes = abstract_weights(cfg, mesh)
    read = [jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), shapes)]
    matrix = weakref.ref(read[0].params["moe_layers"]["attention"]["o_NHD"])
    start = Progress(step=0, tokens_seen=0, data=None)
    monkeypatch.setattr(adapted_training, "read_origin", lambda *_, **__: Beginning(read.pop(), None, start, {}))
    monkeypatch.setattr(adapted_training, "check_base", lambda *_: "")
    with jax.set_mesh(mesh):
        parts = open_adapters(cfg, LORA, pretraining(cfg), tmp_path, mesh)
    gc.collect()
    assert parts.weights_met > 0 and matrix() is None


def plain(path, weight):
    return np.asarray(dequantized(leaf_name(path), weight) if isinstance(weight, Fp8Weight) else weight, np.float32)


@pytest.mark.slow
def test_in_fp8_adapters_that_are_zero_change_no_bit():
    """Each form of a layer: behind a norm, a feed-forward, attention's output."""
    random = np.random.default_rng(0).standard_normal

    def weight(*shape, input_dims=1):
        matrix = np.prod(shape[:input_dims]), np.prod(shape[input_dims:])
        blocks = quantize_blocks(np.float32(random(matrix)))
        base = Fp8Weight(np.zeros(shape, np.float32), blocks.values.reshape(shape), blocks.scales)
        pair = {"lora_a_IU": random((matrix[0], 4)), "lora_b_UO": np.zeros((4, matrix[1]))}
        return Adapted(base, jax.tree.map(np.float32, pair), 0.5)

    x = jnp.asarray(random((2, 3, 128)), jnp.bfloat16)
    q, kv, o = weight(128, 2, 64), weight(128, 128), weight(2, 64, 128, input_dims=2)
    weights = q, kv, o, weight(128, 2, 256), weight(256, 128)

    def run(x, q, kv, o, gate_up, down):
        q, kv = norm_linear(x, jnp.ones(128), 1e-6, q, kv)
        return swiglu_linear(linear(q, o, 2, ATTENTION_OUTPUT) + kv, gate_up, down)

    both = jax.jit(lambda x, weights: (run(x, *weights), run(x, *map(base_of, weights))))
    np.testing.assert_array_equal(*both(x, weights))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [ONE, (2, 2, 2)])
def test_merging_keeps_the_stored_bytes_of_what_did_not_learn_and_adds_the_product_to_the_rest(sizes):
    """On one device and on eight. Scales are larger than needed, so that quantising again gives other bytes."""
    cfg = config("fp8", sizes)
    mesh = make_mesh(cfg.mesh, jax.devices()[: np.prod(sizes)])
    recipe = recipe_of(cfg, pretraining(cfg), mesh)
    with jax.set_mesh(mesh):
        weights = weights_on(mesh)
        base = mark(LORA, frozen(recipe.execution, weights.params))
        base = jax.tree.map(
            lambda w: dataclasses.replace(w, scales=w.scales * 1.5) if isinstance(w, Fp8Weight) else w,
            base,
            is_leaf=lambda leaf: isinstance(leaf, Fp8Weight),
        )
        state = jax.jit(functools.partial(first_state, cfg, LORA))(base, weights.router_bias)
        pairs = moved(state)["params"]
        experts = pairs["moe_layers"]["moe"]["gate_up_ED2F"]
        experts["lora_b_EUO"] = experts["lora_b_EUO"] * (jnp.arange(cfg.model.num_experts) != 1)[None, :, None, None]
        still = pairs["moe_layers"]["attention"]["o_NHD"]
        still["lora_b_UO"] = jnp.zeros_like(still["lora_b_UO"])
        adapted = adapt(base, pairs)
        whole = merged(Weights(adapted, {})).params
    adapted, whole = jax.device_get(adapted), jax.device_get(whole)
    count = 0
    for path, old in jax.tree_util.tree_leaves_with_path(adapted, is_leaf=is_weight):
        if not isinstance(old, Adapted):
            continue
        name, new = leaf_name(path), functools.reduce(lambda node, entry: node[entry.key], path, whole)
        a, b = halves(old)
        for index in np.ndindex(*b.shape[:-2]):
            before = Fp8Weight(None, old.base.values[index], old.base.scales[index])
            after = Fp8Weight(None, new.values[index], new.scales[index])
            if not b[index].any():
                count += 1
                assert before.values.tobytes() == after.values.tobytes(), path
                assert before.scales.tobytes() == after.scales.tobytes(), path
                continue
            wanted = np.asarray(dequantized(name, before)) + old.scale * (a[index] @ b[index]).reshape(
                before.values.shape
            )
            error = np.abs(np.asarray(dequantized(name, after)) - wanted)
            assert np.all(error <= np.abs(wanted) / 16 + np.abs(wanted).max() / 448 / 256), path
    assert count == 1 + 1  # the attention's output, and an expert

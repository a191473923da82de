"""The train step of `v3_5b` lowers with cuDNN attention for NVIDIA GPUs on a machine that has none.

It proves that the kernel behind `flash._opaque` traces inside the checked shard_map, differentiates under the
recomputation policy with the types that its inputs have, and reaches the program as cuDNN's custom calls on 192/128
head dims, forward and backward. It cannot prove speed, or that cuDNN accepts them.
"""

import dataclasses
import functools
import re
from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny, v3_5b
from deepseek_jax.config import from_config_dict
from deepseek_jax.inference import prefill
from deepseek_jax.inference.cache import CACHE_SPECS, make_cache
from deepseek_jax.inference.decode import decode_execution
from deepseek_jax.inference.generate import expert_mesh
from deepseek_jax.inference.row_sampling import ANY
from deepseek_jax.inference.row_state import empty_state
from deepseek_jax.inference.speculative import Kind, speculate
from deepseek_jax.inference.weights import decode_weights, weight_specs
from deepseek_jax.model import transformer
from deepseek_jax.model.packed import Rows
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parameters import ROWS
from deepseek_jax.plan.memory import abstract_inputs
from deepseek_jax.training.objective import pretraining
from deepseek_jax.training.step import jit_train_step
from pallas_kernels import dispatch


@pytest.fixture
def hopper_by_name(monkeypatch):
    """Answer for the machine that is meant: JAX asks cuDNN for its version and the GPU for its generation.

    It asks before it lowers.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: capability == "9.0")


def lower(attention, precision="bf16"):
    tree = v3_5b.get_config()
    tree.mesh.update({"data": 2, "expert": 4})
    tree.training.update({"batch_size": (("constant", 1.0, 8),), "micro_batch_size": 8})
    tree.execution.update({"attention": attention, "precision": precision, "scan_unroll": 1})
    config = from_config_dict(tree)
    return lower_step(config, "gpu")


class MeshOf:
    """A mesh of devices that this machine lacks."""

    def __init__(self, shape, devices):
        self.shape, self.devices = shape, devices


def lower_step(config, platform):
    """The text of the step for CUDA, with every "auto" as on a mesh of `platform`."""
    mesh = make_mesh(config.mesh)
    devices = np.array([SimpleNamespace(platform=platform)])
    with jax.set_mesh(mesh):
        step = jit_train_step(config, pretraining(config), MeshOf(mesh.shape, devices))
        return step.trace(*abstract_inputs(config, mesh)).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("platform", "precision", "kinds"),
    [("gpu", "fp32", {"HIGHEST"}), ("cpu", "fp32", {"HIGHEST", "DEFAULT"}), ("gpu", "bf16", {"DEFAULT"})],
)
def test_fp32_is_multiplied_as_fp32_on_a_gpu(platform, precision, kinds):
    """By default XLA multiplies FP32 in TF32 there; the router asks for FP32.

    With BF16 activations the router multiplies BF16 parts.
    """
    tree = tiny.get_config()
    tree.execution.update({"attention": "xla", "precision": precision})
    text = lower_step(from_config_dict(tree), platform)
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    precisions = [re.search(r"precision = \[(\w+), \1\]", line)[1] for line in products]
    assert set(precisions) == kinds
    assert precision == "fp32" or not any(
        re.search(r"\(tensor<[\dx]+xf32>, tensor<[\dx]+xf32>\)", line) for line in products
    )


def collectives(text):
    kinds = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")
    return {kind: text.count(f"stablehlo.{kind}") for kind in kinds}


def test_cudnn_attention_reaches_the_program_forward_and_backward(hopper_by_name):
    text = lower("auto")
    calls = re.findall(r"@(__cudnn\$\w+)\(.*?: \((tensor<.*?)\) -> (.*)", text)
    names = [name for name, _, _ in calls]
    # One per stack of layers (dense, MoE). A third forward call would be attention recomputed, which the saved output
    # avoids.
    assert sorted(names) == ["__cudnn$fmhaSoftmax"] * 2 + ["__cudnn$fmhaSoftmaxBackward"] * 2
    for name, operands, results in calls:
        assert operands.startswith(
            "tensor<1x4096x16x192xbf16>, tensor<1x4096x16x192xbf16>, tensor<1x4096x16x128xbf16>"
        ), (name, operands)
        assert (
            "tensor<1x16x4096x128xbf16>" in results
            if name == "__cudnn$fmhaSoftmax"
            else "tensor<1x16x4096x192xbf16>" in results
        ), results


def calls(text, kernel):
    """How often a program calls the function that holds a kernel."""
    functions = text.split("func.func ")
    (name,) = [re.match(r"(?:private |public )?@(\w+)", f)[1] for f in functions if f"{kernel}_mosaic_gpu" in f]
    return text.count(f"call @{name}(")


@pytest.mark.slow
def test_fp8_hands_cudnn_the_output_that_e5m6_keeps(hopper_by_name, monkeypatch):
    """One layer by the kernels of Hopper: packed once, unpacked for the core's derivative and the weight gradient."""
    monkeypatch.setattr(dispatch, "_hardware", lambda: ("gpu", dispatch.HOPPER))
    tree = v3_5b.get_config()
    tree.model.update({"num_layers": 1, "num_dense_layers": 1})
    tree.training.update({"batch_size": (("constant", 1.0, 8),), "micro_batch_size": 8})
    tree.execution.update({"precision": "fp8"})
    tree.mesh.data = 8
    text = lower_step(from_config_dict(tree), "gpu")
    assert [len(re.findall(rf"@__cudnn\$fmhaSoftmax{name}\(", text)) for name in ("", "Backward")] == [1, 1]
    assert [calls(text, kernel) for kernel in ("e5m6_pack", "e5m6_unpack")] == [1, 2]


def test_cudnn_attention_brings_no_collective_of_its_own(hopper_by_name):
    """A kernel differentiated with wrong types has its gradients summed over devices again: the counts would differ."""
    assert collectives(lower("cudnn")) == collectives(lower("xla"))


def test_fp32_refuses_cudnn():
    with pytest.raises(ValueError, match="'cudnn' needs precision 'bf16'"):
        lower("cudnn", precision="fp32")


@pytest.mark.slow
def test_fp8_reaches_the_program_as_kernels(hopper_by_name, monkeypatch):
    """On a mesh, inside the checked shard_map: XLA multiplies in no linear layer, and no gradient is summed twice."""
    monkeypatch.setattr(dispatch, "_hardware", lambda: ("gpu", "9.0"))
    fp8, bf16 = (lower("auto", precision) for precision in ("fp8", "bf16"))
    assert "f8E4M3" not in "".join(line for line in fp8.splitlines() if "stablehlo.dot_general" in line)
    assert len(products(fp8)) < len(products(bf16)) / 3  # router, head and the sums of their gradients
    assert fp8.count("mosaic_gpu") > 60
    actual, expected = collectives(fp8), collectives(bf16)
    agreed = actual.pop("all_reduce") - expected.pop("all_reduce")
    told = actual.pop("all_gather") - expected.pop("all_gather")
    assert actual == expected
    # Scales of each stack of a weight: attention's five and two of the dense layer; five, two shared and two of the
    # experts. Devices agree on those of blocks that lie on several of them, and tell each other the others.
    assert agreed == 2 * 2  # kv_b and q_b: 64 and 192 rows a device
    assert told == 7 + 9 - agreed + 1  # and of gradients in the backward pass; forward they share the routes' array


def products(text):
    return [line for line in text.splitlines() if "stablehlo.dot_general" in line]


def test_prefill_attends_through_the_call_that_training_makes(hopper_by_name):
    """A row per sequence, 192/128 dims, one call for each kind of layer; behind a prefix, too."""
    tree = v3_5b.get_config()
    tree.model.num_layers = 2
    tree.execution.update({"attention": "cudnn", "exchange": "local", "experts": "grouped", "remat": "none"})
    config = from_config_dict(tree)
    mesh = expert_mesh(config.model, 1)
    model, execution = config.model, config.execution

    def on_mesh(tree, specs):
        return jax.tree.map(lambda leaf, spec: leaf.update(sharding=jax.NamedSharding(mesh, spec)), tree, specs)

    with jax.set_mesh(mesh):
        init = functools.partial(transformer.init, model)
        weights = jax.eval_shape(lambda key: decode_weights(model, execution, init(key), mesh), jax.random.key(0))
        cache = on_mesh(jax.eval_shape(lambda: make_cache(model, execution, 32, 512)), CACHE_SPECS)
        shapes = ((32, model.vocab_size), "float32"), ((16384,), "int32"), ((32,), "int32")
        arrays = [on_mesh(jax.ShapeDtypeStruct(*shape), jax.P(ROWS)) for shape in shapes]
        run = jax.jit(functools.partial(prefill.prefill, model, execution, Rows(32, 512), True))
        program = run.trace(on_mesh(weights, weight_specs(weights)), cache, *arrays)
        text = program.lower(lowering_platforms=("cuda",)).as_text()
    q, v = "tensor<32x512x16x192xbf16>", "tensor<32x512x16x128xbf16>"
    assert re.findall(r"fmhaSoftmax\(.*?: \((tensor<.*?)\) ->", text) == [f"{q}, {q}, {v}"] * 2


@pytest.mark.slow
def test_a_step_with_drafts_runs_the_kernels_of_decoding(monkeypatch):
    """Of attention and of few experts: in two kinds of layer with three queries, in the MTP layer with one, too."""
    monkeypatch.setattr(dispatch, "_hardware", lambda: ("gpu", dispatch.HOPPER))
    tree = v3_5b.get_config()
    tree.model.update({"num_layers": 2, "num_mtp_layers": 1})
    config = from_config_dict(tree)
    mesh, model = expert_mesh(config.model, 1), config.model
    with jax.set_mesh(mesh):
        execution = dataclasses.replace(decode_execution(config, mesh), precision="bf16")

        def on_mesh(tree, specs):
            return jax.tree.map(lambda leaf, spec: leaf.update(sharding=jax.NamedSharding(mesh, spec)), tree, specs)

        def placed(key):
            return decode_weights(model, execution, transformer.init(model, key), mesh, drafts=True)

        weights = jax.eval_shape(placed, jax.random.key(0))
        shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, empty_state(32, model.vocab_size)))
        progress, settings, seen = jax.tree.map(
            lambda leaf: leaf.update(sharding=jax.NamedSharding(mesh, jax.P(ROWS))), shapes
        )
        pages = jax.ShapeDtypeStruct((3, 256, 64, 576), "bfloat16", sharding=jax.NamedSharding(mesh, CACHE_SPECS.pages))
        load = (1, model.num_moe_layers, model.num_experts), "int32"
        rest = ((32, model.width), "bfloat16"), ((32, 8), "int32"), ((32,), "bool"), load
        draft_BD, tables_BJ, run_B, load_RLE = (on_mesh(jax.ShapeDtypeStruct(*shape), jax.P(ROWS)) for shape in rest)
        rows = progress, draft_BD, settings, seen, tables_BJ, run_B, load_RLE
        run = jax.jit(functools.partial(speculate, model, execution, Kind(2, 32, ANY)))
        text = (
            run.trace(on_mesh(weights, weight_specs(weights)), pages, *rows)
            .lower(lowering_platforms=("cuda",))
            .as_text()
        )
    kernels = Counter(re.findall(r"\w*?([a-z]\w*)_mosaic_gpu", text))
    shapes = {"mla_decode", "mla_decode_combine", "experts_decode_gate_up", "experts_decode_down"}
    assert all(kernels[name] == 2 for name in shapes), kernels  # three queries of a row, and one
    assert kernels["routing"] == kernels["decode_latents"] == 2, kernels  # the MTP layer runs in the same ones

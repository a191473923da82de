"""Attention implementations agree inside the checked shard_map of the step, under its recomputation policy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from deepseek_jax.config import from_config_dict
from deepseek_jax.model import flash, transformer
from deepseek_jax.model.chunked_attention import Masks, chunked
from deepseek_jax.model.recompute import KEPT
from deepseek_jax.parallel.program import resolve
from deepseek_jax.parameters import PARAMETERS, ROWS, Fp8Weight, P, leaf_name, matrix_shape, num_lead_dims
from pallas_kernels.quantized import E4M3, scales_shape
from tests.support import small
from tests.support.meshes import mesh_of
from tests.support.network import apply

B, S, N, Q, H = 8, 256, 2, 48, 32
SCALE = 0.13
NUM_LAYERS = 2
ROUNDING = 1e-6  # FP32, sums of at most 256 terms in another order


def inputs():
    rng = np.random.default_rng(0)
    q, k, v, g = (rng.normal(size=(B, S, N, dim)).astype(np.float32) for dim in (Q, Q, H, H))
    segments = np.ones((B, S), np.int32)
    segments[:, 100:], segments[0, 200:] = 2, 0
    return q, k, v, segments, g


def splash(q, k, v, segments):
    return flash._splash(SCALE, q, k, v, segments, packs=False)[0]


def xla(q, k, v, segments):
    masks = Masks(None, segments, segments)
    return chunked(q, k, v, masks, SCALE, 64, False)[0]


def layers(core):
    """A scan of two layers that recompute all that the model does not keep.

    Return output and gradients by q, k, v; each device has its own rows.
    """

    def local(q, k, v, segments, g):
        def forward(q, k, v):
            def body(x, _):
                return x + core(q * 1.0, k, x, segments), None

            policy = jax.checkpoint_policies.save_only_these_names(*KEPT)
            return jax.lax.scan(jax.checkpoint(body, policy=policy, prevent_cse=False), v, jnp.zeros(NUM_LAYERS))[0]

        out, pull = jax.vjp(forward, q, k, v)
        return out, *pull(g)

    return jax.jit(jax.shard_map(local, in_specs=(P(ROWS),) * 5, out_specs=(P(ROWS),) * 4))


@pytest.fixture
def interpreted(monkeypatch):
    """The TPU kernel, interpreted."""
    make = functools.partial(splash_attention_kernel.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha", make)


@pytest.fixture
def arrays():
    mesh = mesh_of(data=2, expert=4)
    with jax.set_mesh(mesh):
        yield [jax.device_put(a, P(ROWS)) for a in inputs()]


def test_splash_equals_xla_in_value_and_gradients(interpreted, arrays):
    for name, got, want in zip(("out", "q", "k", "v"), layers(splash)(*arrays), layers(xla)(*arrays), strict=True):
        assert np.linalg.norm(got - want) <= ROUNDING * np.linalg.norm(want), name


def test_splash_runs_once_forward_and_brings_no_collective(interpreted, arrays):
    """Three kernels: forward, dq, dkv. A fourth would be the forward again, for a result that the policy dropped."""
    text = str(layers(splash).trace(*arrays).jaxpr)
    assert text.count("pallas_call[") == 3
    assert "psum" not in text


def test_splash_refuses_odd_lengths(arrays):
    with pytest.raises(ValueError, match="sequence_length = 200.*multiple of 128"):
        layers(splash).trace(*(a[:, :200] for a in arrays))


def test_attention_output_is_saved_once(capsys):
    """Selective recomputation keeps one output and one logsumexp per layer.

    At V3's width a second copy is 134 MB per sequence.
    """
    tree = small.config_dict()
    tree.model.update({"num_layers": 1, "num_mtp_layers": 0})
    tree.execution.remat = "selective"
    config = resolve(from_config_dict(tree), "cpu", expert_devices=1)
    params, router_bias = jax.eval_shape(lambda: transformer.init(config.model, jax.random.key(0)))

    def loss(params, batch):
        return apply(config, params, router_bias, batch).hidden_BSD.sum()

    jax.ad_checkpoint.print_saved_residuals(loss, params, small.batch(rows=2))
    saved = sorted(line.split()[0] for line in capsys.readouterr().out.splitlines() if "named 'attention_out'" in line)
    assert saved == ["f32[2,64,4,16]", "f32[2,64,4]"]


@pytest.mark.parametrize("remat", ["selective", "none"])
def test_fp8_keeps_attentions_output_once_in_twelve_bits(capsys, remat):
    """Of 2 x 128 tokens of 4 heads x 32 channels: 192 bytes a token, one scale, four logsumexps; never BF16."""
    tree = small.fp8_config_dict()
    tree.model.update({"num_layers": 1, "num_mtp_layers": 0, "num_dense_layers": 1})
    tree.execution.remat = remat
    config = resolve(from_config_dict(tree), "cpu", expert_devices=1)
    params, router_bias = jax.eval_shape(lambda: transformer.init(config.model, jax.random.key(0)))

    def in_fp8(path, leaf):
        name = leaf_name(path)
        if PARAMETERS[name].precision != "fp8":
            return jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16)
        matrix = matrix_shape(leaf.shape, num_lead_dims(name, leaf.ndim), PARAMETERS[name].input_dims)
        scales = jax.ShapeDtypeStruct(scales_shape(matrix, "block"), jnp.float32)
        return Fp8Weight(leaf, jax.ShapeDtypeStruct(leaf.shape, E4M3), scales)

    def loss(params, batch):
        return apply(config, params, router_bias, batch).hidden_BSD.sum()

    params = jax.tree.map_with_path(in_fp8, params)
    jax.ad_checkpoint.print_saved_residuals(loss, params, small.batch(rows=2, length=128))
    lines = capsys.readouterr().out.splitlines()
    saved = sorted(line.split()[0] for line in lines if "named 'attention_out'" in line)
    assert saved == ["f32[1,256]", "f32[2,128,4]", "u8[256,192]"]
    outputs = ("bf16[2,128,4,32]", "bf16[256,128]")
    assert len([line for line in lines if line.startswith(outputs) and "flash.py" in line]) == 0


def test_what_e5m6_costs_the_gradients():
    """Of queries and keys 0.55% beside BF16's 0.30%, measured; values and the output itself have no part in it."""
    rng = np.random.default_rng(0)
    q, k, v, g = (jnp.asarray(rng.normal(size=(2, 128, 1, dim)), jnp.bfloat16) for dim in (192, 192, 128, 128))

    def run(precision, dtype):
        execution = small.config().with_(execution={"precision": precision, "attention": "xla"}).execution
        out, pull = jax.vjp(
            lambda *qkv: flash.attend(execution, *qkv, None, SCALE)[0], *(x.astype(dtype) for x in (q, k, v))
        )
        return [np.asarray(x, np.float32) for x in (out, *pull(g.astype(dtype)))]

    want, bf16, fp8 = run("fp32", jnp.float32), run("bf16", jnp.bfloat16), run("fp8", jnp.bfloat16)
    errors = [
        [np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(got, want, strict=True)] for got in (bf16, fp8)
    ]
    assert errors[0][0] == errors[1][0] and errors[0][3] == errors[1][3]
    for exact, packed in zip(errors[0][1:3], errors[1][1:3], strict=True):
        assert exact < packed < 2.5 * exact < 0.01

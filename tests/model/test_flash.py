"""Attention implementations agree inside the checked shard_map of the step, under its recomputation policy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from deepseek_jax.config import Mesh, from_config_dict
from deepseek_jax.model import flash, transformer
from deepseek_jax.model.recompute import KEPT
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.program import resolve
from deepseek_jax.parameters import ROWS, P
from tests.support import small
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
    return flash._splash(SCALE, q, k, v, segments)


def xla(q, k, v, segments):
    return flash._xla(q, k, v, segments, SCALE, 64)


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
    make = functools.partial(splash_attention_kernel.make_splash_mha_single_device, interpret=True)
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha_single_device", make)


@pytest.fixture
def arrays():
    mesh = make_mesh(Mesh(pipe=1, data=2, node=1, expert=4, tensor=1))
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

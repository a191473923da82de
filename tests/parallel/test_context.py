"""Devices that share rows: chunks cover them with equal work, attention is that of whole rows, latents alone travel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from configs import deepseek_v3_128k
from deepseek_jax.config import Mesh, from_config_dict
from deepseek_jax.model.attention import Attention, expanded
from deepseek_jax.model.rope import rotary_table
from deepseek_jax.parallel import context
from deepseek_jax.parallel.collectives import GATHER, SCATTER, traced_collectives
from deepseek_jax.parallel.mesh import check_fit, make_mesh
from deepseek_jax.parallel.program import resolve
from deepseek_jax.parameters import CONTEXT, P
from pallas_kernels.lowering import manual_axes
from tests.support import small

DEVICES, BATCH, LENGTH = 4, 2, 512
SHARED = {"pipe": 1, "data": 1, "node": 1, "expert": 1, "tensor": 1}


def mesh_of(devices: int = DEVICES) -> jax.sharding.Mesh:
    return make_mesh(Mesh(**SHARED, context=devices), jax.devices()[:devices])


def model():
    """YaRN is on, so that positions matter in both of its ways."""
    tree = small.config_dict()
    tree.model.update({"init_std": 0.2})
    tree.model.yarn.update({"enabled": True, "original_length": 64})
    return from_config_dict(tree).model


def test_chunks_cover_the_row_and_cost_alike():
    with jax.set_mesh(mesh_of()):
        order = context.order_of_devices(64).reshape(DEVICES, -1)
        held = jax.jit(jax.shard_map(lambda: context.places(64), in_specs=(), out_specs=P(CONTEXT)))()
    np.testing.assert_array_equal(np.asarray(held).reshape(DEVICES, -1), order)
    assert sorted(order.reshape(-1)) == list(range(64))
    assert len(set((order + 1).sum(1))) == 1  # keys that a device's queries see


def test_what_all_that_share_rows_have_counts_once():
    def local():
        one = jax.lax.pcast(jnp.ones(1), CONTEXT, to="varying")
        return jax.lax.psum(context.once(one), CONTEXT), context.total(one)

    with jax.set_mesh(mesh_of()):
        once, total = jax.jit(jax.shard_map(local, in_specs=(), out_specs=(P(), P(CONTEXT))))()
    assert once.tolist() == [1] and total.tolist() == [DEVICES] * DEVICES


@functools.cache
def arrays():
    """An attention layer's parts, its input, and packed documents that begin inside chunks and at their edges."""
    attention = Attention(model(), nnx.Rngs(params=1))
    graph, params = nnx.split(attention)
    rng = np.random.default_rng(0)
    x_BSD, g_BSD = rng.normal(size=(2, BATCH, LENGTH, model().width)).astype(np.float32)
    starts = np.stack([np.isin(np.arange(LENGTH), begins) for begins in ([100, 128, 450], [64, 65, 300])])
    segments = np.cumsum(starts, axis=1).astype(np.int32) + 1
    segments[1, 480:] = 0
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1))
    return graph, params, x_BSD, g_BSD, segments, positions


def attend(implementation: str, devices: int, precision: str = "fp32"):
    """Return output and gradients (by the input and by the weights) of a layer whose rows so many devices share."""
    graph, params, x_BSD, g_BSD, segments, positions = arrays()
    dtype = jnp.bfloat16 if precision == "bf16" else jnp.float32
    params, x_BSD, g_BSD = jax.tree.map(lambda a: a.astype(dtype), (params, x_BSD, g_BSD))
    config = small.config().with_(execution={"precision": precision})
    execution = resolve(config.with_(execution={"attention_chunk": 64}), "cpu", 1).execution
    execution = type(execution)(**{**vars(execution), "attention": implementation})

    def layer(params, x_BSD, positions_BS, segments_BM):
        table = rotary_table(model(), positions_BS)
        return expanded(execution, table, segments_BM)(nnx.merge(graph, params), x_BSD, None)[0]

    def local(params, x_BSD, g_BSD, positions_BM, segments_BM):
        params = manual_axes.vary(params, frozenset({CONTEXT}))
        run = functools.partial(layer, positions_BS=context.local(positions_BM), segments_BM=segments_BM)
        out_BSD, pull = jax.vjp(run, params, x_BSD)
        d_params, d_x = pull(g_BSD)
        return out_BSD, d_x, jax.lax.psum(d_params, CONTEXT)

    with jax.set_mesh(mesh_of(devices)):
        order = context.order_of_devices(LENGTH) if devices > 1 else np.arange(LENGTH)
        split = P(None, CONTEXT)
        specs = (P(), split, split, P(), P())
        run = jax.jit(jax.shard_map(local, in_specs=specs, out_specs=(split, split, P())))
        put = [jax.device_put(x[:, order], split) for x in (x_BSD, g_BSD)]
        put += [jax.device_put(x, P()) for x in (positions, segments)]
        params = jax.device_put(params, P())
        traced = traced_collectives(run.trace(params, *put).jaxpr.jaxpr)
        out, d_x, d_params = jax.device_get(run(params, *put))
    back = np.argsort(order)
    return (out[:, back], d_x[:, back], *jax.tree.leaves(d_params)), traced


@pytest.fixture
def interpreted(monkeypatch):
    make = functools.partial(splash_attention_kernel.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha", make)


@functools.cache
def whole():
    return attend("xla", 1)[0]


@pytest.mark.parametrize("implementation", ["xla", "splash"])
def test_attention_is_that_of_whole_rows(implementation, interpreted):
    """Output and all gradients, packed and with YaRN. Sums in FP32 in another order: measured 1e-6."""
    got, _ = attend(implementation, DEVICES)
    for mine, want in zip(got, whole(), strict=True):
        assert np.linalg.norm(mine - want) <= 5e-6 * np.linalg.norm(want)


@pytest.mark.slow
def test_attention_in_bf16_is_as_near_as_that_of_whole_rows():
    """Each gradient's distance from FP32 is that of one device in BF16: measured 0.98 to 1.26 times as far."""
    got, alone = (attend("xla", devices, "bf16")[0] for devices in (DEVICES, 1))
    for mine, other, want in zip(got, alone, whole(), strict=True):
        mine, other = (np.linalg.norm(a.astype(np.float32) - want) for a in (mine, other))
        assert mine <= 1.4 * other <= 0.05 * np.linalg.norm(want)


def test_latents_alone_travel():
    """C + R values of each token forward, as many backward; keys and values of all heads are 5 times as many here."""
    _, traced = attend("xla", DEVICES)
    entry = model().kv_latent + model().rotary_dim
    moved = [one for one in traced if one.kind in (GATHER, SCATTER)]
    assert [(one.kind, one.axes, one.shape) for one in moved] == [
        (GATHER, (CONTEXT,), (BATCH, LENGTH // DEVICES, entry)),
        (SCATTER, (CONTEXT,), (BATCH, LENGTH, entry)),
    ]


def test_v3_gathers_576_values_of_a_token():
    """1,152 bytes a token and layer in BF16, where keys and values of 128 heads are 81,920."""
    v3 = from_config_dict(deepseek_v3_128k.get_config()).model
    attention = jax.eval_shape(lambda: Attention(v3, nnx.Rngs(params=0)))
    tokens, devices = 32768, 8

    def local(x_BSD):
        layer = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.bfloat16), attention)
        _, entry = layer.project(x_BSD, rotary_table(v3, context.places(tokens)[None]))
        return context.gathered(jnp.concatenate(entry, axis=-1))

    with jax.set_mesh(mesh_of(devices)):
        split = P(None, CONTEXT, None)
        run = jax.jit(jax.shard_map(local, in_specs=split, out_specs=P(None, None, CONTEXT)))
        x = jax.ShapeDtypeStruct(
            (1, tokens, v3.width), jnp.bfloat16, sharding=jax.NamedSharding(mesh_of(devices), split)
        )
        (one,) = traced_collectives(run.trace(x).jaxpr.jaxpr)
    assert (one.kind, one.axes) == (GATHER, (CONTEXT,))
    assert one.bytes * devices / tokens == 2 * 576 == 1152


def test_what_cannot_be_shared_is_refused():
    tree = small.config_dict()
    tree.mesh.update({"data": 1, "context": 8})
    tree.data.sequence_length = 72
    config = from_config_dict(tree)
    with pytest.raises(ValueError, match=r"sequence_length = 72 cannot be cut into 16 chunks.*is 64 or 80"):
        check_fit(config, mesh_of(8))
    with pytest.raises(ValueError, match=r"'cudnn' takes whole rows, and 8 devices share one.*use 'auto' or 'xla'"):
        resolve(config.with_(execution={"attention": "cudnn", "precision": "bf16"}), "gpu", 1, context=8)
    assert resolve(config.with_(execution={"precision": "bf16"}), "gpu", 1, context=8).execution.attention == "xla"
    with pytest.raises(ValueError, match=r"config.mesh.context = 8: decoding does not split sequences"):
        context.refuse_context(mesh_of(8), "decoding")


class Device:
    """A device of a process, as `readers` sees it."""

    def __init__(self, process_index):
        self.process_index = process_index


@pytest.mark.parametrize(
    ("sizes", "processes", "want"),
    [
        ((1, 1, 2, 1, 2, 1), (0, 0, 1, 1), (0, 1)),  # both processes have all rows
        ((1, 2, 2, 1, 1, 1), (0, 0, 1, 1), (0, 2)),  # each has rows of its own
        ((1, 2, 2, 1, 1, 1), (1, 1, 0, 0), (1, 2)),
        ((1, 1, 4, 1, 1, 1), (0, 1, 2, 3), (0, 1)),
    ],
)
def test_processes_that_share_rows_read_the_same(sizes, processes, want):
    assert context.readers(fake_mesh(sizes, processes)) == want


def fake_mesh(sizes, processes):
    class FakeMesh:
        shape = dict(zip(("pipe", "data", "context", "node", "expert", "tensor"), sizes, strict=True))
        devices = np.array([Device(index) for index in processes]).reshape(sizes)

    return FakeMesh()


def test_processes_that_share_some_rows_are_refused():
    with pytest.raises(ValueError, match="processes share some of their rows and not others"):
        context.readers(fake_mesh((1, 1, 2, 1, 3, 1), (0, 0, 1, 1, 2, 2)))

"""A checkpoint whose experts lay on several devices has each of them, and restores onto any other mesh.

Every expert, moment, bias and average has values of its own, so an expert that is lost, repeated or swapped shows
(KempnerForge #202 and UniRL #158 kept one rank's).
"""

import math

import jax
import numpy as np
import pytest

from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.training import pretrain
from deepseek_jax.training.checkpoint import Checkpoints, Progress
from deepseek_jax.training.state import abstract_state
from tests.support import small

pytestmark = pytest.mark.xdist_group("experts_apart")  # what one worker made or compiled, its other tests use

DATA = {"row": 7, "sources": [{"document": 3, "token": 11}]}
MESHES = [(1, 1, 8), (1, 1, 1), (4, 2, 1)]


def config(sizes):
    return small.config(sizes).with_(model={"num_layers": 2, "vocab_size": 64}, optimizer={"ema_decay": 0.9})


def mesh_of(sizes):
    return make_mesh(config(sizes).mesh, jax.devices()[: np.prod(sizes)])


def numbers(abstract):
    """A state of random numbers, no two of them equal in FP32, on the mesh of `abstract`."""
    rng = np.random.default_rng(0)

    def put(leaf):
        values = rng.normal(size=leaf.shape) if np.issubdtype(leaf.dtype, np.floating) else np.full(leaf.shape, 3)
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(lambda leaf: put(leaf) if leaf.dtype != jax.numpy.bfloat16 else put_bf16(rng, leaf), abstract)


def put_bf16(rng, leaf):
    return jax.device_put(jax.numpy.asarray(rng.normal(size=leaf.shape), leaf.dtype), leaf.sharding)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with a checkpoint of (data 2, expert 4), and its state on the host."""
    workdir, sizes = tmp_path_factory.mktemp("run"), (2, 1, 4)
    mesh = mesh_of(sizes)
    with jax.set_mesh(mesh):
        state = numbers(abstract_state(config(sizes), mesh))
        checkpoints = Checkpoints(workdir, 2)
        progress = Progress(step=3, tokens_seen=2**40 + 1, data=DATA)
        checkpoints.save(state, progress, config(sizes), {"tokenizer.json": "{}"}, mesh)
        checkpoints.close()
    return workdir, jax.device_get(state)


def begin(workdir, sizes, change=lambda abstract: abstract, changes=()):
    """Continue as a trainer does."""
    mesh = mesh_of(sizes)
    checkpoints = Checkpoints(workdir, 2)
    try:
        with jax.set_mesh(mesh):
            run = config(sizes).with_(optimizer=dict(changes))
            abstract = change(abstract_state(run, mesh))
            return pretrain.begin(checkpoints, run, workdir, mesh, abstract, lambda: pytest.fail("a silent restart"))
    finally:
        checkpoints.close()


@pytest.mark.parametrize("sizes", MESHES, ids=small.mesh_name)
def test_every_expert_is_there_on_any_mesh(saved, sizes):
    workdir, want = saved
    state, progress = begin(workdir, sizes)
    assert progress == Progress(step=3, tokens_seen=2**40 + 1, data=DATA)
    assert set(state) == {"params", "router_bias", "optimizer", "ema", "step", "skipped"}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), want)
    for part in (state["params"], state["ema"], state["optimizer"][1].mu, state["optimizer"][1].nu):
        for layer in (part["moe_layers"], part["mtp_layers"]["block"]):
            for name in ("down_EFD", "gate_up_ED2F"):
                experts = np.float32(layer["moe"][name])[0]
                assert len(np.unique(experts.reshape(len(experts), -1), axis=0)) == 16
    for bias_LE in jax.tree.leaves(state["router_bias"]):
        assert len(np.unique(np.asarray(bias_LE))) == bias_LE.size > 0
    gate_up = state["params"]["moe_layers"]["moe"]["gate_up_ED2F"]
    assert gate_up.addressable_shards[0].data.shape[1] == 16 // math.prod(sizes)  # whole experts are stored apart


def test_the_average_moves_to_host_memory_and_back(saved, tmp_path):
    """From devices to hosts by a checkpoint, on another mesh, and from there back to devices, bit for bit."""
    (workdir, want), sizes = saved, (4, 2, 1)
    state, progress = begin(workdir, sizes, changes={"ema_memory": "host"})
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state["ema"])} == {"pinned_host"}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state["params"])} == {"device"}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), want)
    mesh = mesh_of(sizes)
    with jax.set_mesh(mesh):
        checkpoints = Checkpoints(tmp_path, 2)
        on_host = config(sizes).with_(optimizer={"ema_memory": "host"})
        checkpoints.save(state, progress, on_host, {"tokenizer.json": "{}"}, mesh)
        checkpoints.close()
    state, _ = begin(tmp_path, (2, 1, 4))
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state)} == {"device"}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), want)


def renamed(abstract):
    """One moment under another name, as a changed prefix would have it: missing by one name, extra by the other."""
    mu = abstract["optimizer"][1].mu
    optimizer = list(abstract["optimizer"])
    optimizer[1] = optimizer[1]._replace(mu={("embedding" if k == "embed_VD" else k): v for k, v in mu.items()})
    return abstract | {"optimizer": tuple(optimizer)}


CHANGES = {
    "renamed": (renamed, r"step 3 lacks .*mu\['embedding'\] .*it has, and the config has not, .*mu\['embed_VD'\]"),
    "extra in the checkpoint": (
        lambda abstract: {name: abstract[name] for name in abstract if name != "ema"},
        r"step 3 has, and the config has not, \['ema'\]",
    ),
    "missing": (lambda abstract: abstract | {"average": abstract["step"]}, r"step 3 lacks \['average'\] \(1 in all\)"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_missing_or_extra_array_is_refused_by_name(saved, change):
    """Never initialised anew (NeMo-RL #3345), never set aside as damaged."""
    workdir, _ = saved
    function, message = CHANGES[change]
    with pytest.raises(ValueError, match=message):
        begin(workdir, (1, 1, 1), function)
    assert not (workdir / "checkpoints" / "damaged").exists()

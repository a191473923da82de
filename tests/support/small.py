"""The one small configuration of the full-model tests, its batch, and its step, compiled once per mesh and worker.

A full model costs some twenty seconds to compile, so tests of the whole step share `on_mesh`: put them into its xdist
group, `@pytest.mark.xdist_group(small.GROUP)`.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import tiny
from deepseek_jax.config import Config, from_config_dict
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.program import resolve_for
from deepseek_jax.parameters import ROWS, P, Weights
from deepseek_jax.training import step as step_lib
from deepseek_jax.training.objective import pretraining
from deepseek_jax.training.optimizer import Rates
from deepseek_jax.training.state import create_state
from tests.support import compiling

Sizes = tuple[int, int, int]  # data, node, expert
MESHES: tuple[Sizes, ...] = ((1, 1, 1), (2, 1, 4), (2, 2, 2))  # (1, 1, 8): tests/training/test_equal_steps.py
GROUP = "small"  # of all meshes, as most tests compare one with one device
RATES = Rates(np.float32(1e-3), np.float32(0.3), np.float32(1e-3))


def config_dict() -> ConfigDict:
    """Every mechanism: MTP, groups, shared expert, packing with masks, two micro-batches of eight rows."""
    config = tiny.get_config()
    config.name = "small"
    config.model.update(
        {
            "vocab_size": 512,
            "width": 64,
            "num_layers": 3,
            "query_latent": 32,
            "kv_latent": 32,
            "content_dim": 16,
            "rotary_dim": 8,
            "value_dim": 16,
            "dense_hidden": 128,
            "expert_hidden": 32,
            # the recipe's, as b2 below: tolerances were measured with these, whatever `tiny` is tuned to
            "residual_init_scale": 1.0,
        }
    )
    config.optimizer.b2 = 0.95
    config.data.update({"sequence_length": 64, "mask_documents": True})
    config.training.update({"batch_size": (("constant", 1.0, 16),), "micro_batch_size": 8})
    config.execution.update({"expert_block": 16, "scan_unroll": 1, "gather": "layer", "loss_chunk": 64})
    return config


def fp8_config_dict() -> ConfigDict:
    """The same in FP8, with dims that products in groups of 128 allow.

    It has no MTP layer, which compiles as long as all other layers.
    """
    config = config_dict()
    config.model.update(
        {
            "width": 128,
            "query_latent": 128,
            "kv_latent": 128,
            "value_dim": 32,
            "expert_hidden": 128,
            "num_mtp_layers": 0,
        }
    )
    config.data.sequence_length = 128  # 128 tokens for each of eight devices
    config.execution.precision = "fp8"
    return config


def config(sizes: Sizes = (1, 1, 1), fp8: bool = False, interleave: int = 1) -> Config:
    """The small configuration on a mesh of `sizes`; interleaved, a micro-batch is the whole batch."""
    tree = fp8_config_dict() if fp8 else config_dict()
    tree.execution.interleave = interleave
    tree.training.micro_batch_size *= 1 if interleave == 1 else 2
    tree.mesh.update(dict(zip(("data", "node", "expert"), sizes, strict=True)))
    return from_config_dict(tree)


def batch(seed: int = 0, rows: int = 16, length: int = 64, vocab: int = 512) -> dict[str, np.ndarray]:
    """Random tokens: two documents per row, one row with padding at its end."""
    tokens = np.random.default_rng(seed).integers(0, vocab, (rows, length + 1)).astype(np.int32)
    segments = np.ones((rows, length), np.int32)
    segments[:, 30:] = 2
    segments[0, 50:] = 0
    weights = (segments > 0).astype(np.float32)
    weights[:, 29] = 0.0  # the first document's last token has no target of its own
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    arrays = {"tokens_BS": tokens[:, :-1], "targets_BS": tokens[:, 1:], "positions_BS": positions}
    return {name: np.ascontiguousarray(a) for name, a in arrays.items()} | {
        "segment_ids_BS": segments,
        "loss_weights_BS": weights,
    }


def put(arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Place a batch on the current mesh."""
    return {name: jax.device_put(a, P(ROWS, None)) for name, a in arrays.items()}


def mesh_name(sizes: Sizes) -> str:
    """The name of a mesh, for the ids of tests."""
    return "mesh-" + "x".join(map(str, sizes))


class OnMesh(NamedTuple):
    """A compiled step on a mesh: `step(state, batch, RATES) -> (grads, sums, norms, state, metrics)`.

    The state is not donated.
    """

    config: Config
    recipe: step_lib.Recipe
    mesh: jax.sharding.Mesh
    state: Any
    step: Any


def whole_step(recipe: step_lib.Recipe, state: Any, arrays: dict[str, jax.Array], rates: Rates) -> tuple:
    """Take a step as `train_step` does; return `(grads, sums, norms, state, metrics)`."""
    weights = Weights(state["params"], state["router_bias"])
    grads, sums, norms = step_lib.gradients(recipe, weights, arrays, rates)
    return grads, sums, norms, *step_lib.update(recipe, state, grads, sums, norms, rates)


@functools.cache
def on_mesh(sizes: Sizes, fp8: bool = False, interleave: int = 1) -> OnMesh:
    """Initial state and compiled step of the small model; use the results under `jax.set_mesh(result.mesh)`."""
    cfg = config(sizes, fp8, interleave)
    mesh = make_mesh(cfg.mesh, jax.devices()[: np.prod(sizes)])
    recipe = step_lib.recipe_of(cfg, pretraining(cfg), mesh)
    step = functools.partial(whole_step, recipe)
    with jax.set_mesh(mesh):
        state = create_state(cfg)
        arrays = put(batch(length=cfg.data.sequence_length))
        options = compiling.RUN_OFTEN if fp8 else None  # a step in FP8 takes 8 s of CPU at level 0
        compiled = jax.jit(step).lower(state, arrays, RATES).compile(options)
        return OnMesh(resolve_for(cfg, mesh), recipe, mesh, state, compiled)

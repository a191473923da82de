"""MLPerf Training v6's DeepSeek-V3: the published recipe, and two steps of it in miniature."""

import jax
import numpy as np
import pytest

from configs import mlperf_v6_deepseek_v3
from deepseek_jax.config import from_config_dict
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.training.objective import pretraining
from deepseek_jax.training.optimizer import rates
from deepseek_jax.training.state import create_state
from deepseek_jax.training.step import jit_train_step
from tests.support import small


def test_the_recipe_is_the_published_one():
    config = from_config_dict(mlperf_v6_deepseek_v3.get_config())
    assert (config.model.vocab_size, config.data.sequence_length) == (128000, 4096)
    assert config.training.batch_size[-1][2] >= 15360
    assert config.optimizer.learning_rate[0][2] == round(2.4e-5 * (config.training.batch_size[-1][2] / 16384) ** 0.5, 9)
    assert config.training.eval_batches * config.training.micro_batch_size == 1024
    after = 1e-8 + (2.4e-5 - 1e-8) * (1 + np.cos(np.pi * 100 / 12000)) / 2
    assert config.optimizer.learning_rate[-1][2] == pytest.approx(after, rel=1e-6)


@pytest.mark.slow
def test_two_steps_in_miniature():
    """The benchmark's losses, optimizer and schedule with the model and rows of the small configuration."""
    tree, tiny = mlperf_v6_deepseek_v3.get_config(), small.config_dict()
    for section in ("model", "data", "execution", "mesh"):
        tree[section].update(tiny[section])
    tree.mesh.update({"data": 1, "node": 1, "expert": 1})
    tree.training.update({"batch_size": (("constant", 1.0, 16),), "micro_batch_size": 8})
    config = from_config_dict(tree)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        state, batch = create_state(config), small.put(small.batch())
        step = jit_train_step(config, pretraining(config), mesh)
        losses = []
        for number in range(2):
            state, metrics = step(state, batch, rates(config, number, number * 16 * 64))
            losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(512), rel=0.02)
    assert losses[1] < losses[0]

"""The linear layers of one small model, taken once for all tests."""

import functools

import jax

from configs import tiny
from deepseek_jax.config import from_config_dict
from deepseek_jax.model import transformer
from deepseek_jax.parallel.program import resolve
from experiments.studies import linears
from tests.support import small


@functools.cache
def taken():
    """The linears of a dense layer and a MoE layer, and the parameters."""
    tree = tiny.get_config()
    tree.model.update(small.fp8_config_dict().model)
    tree.model.update(
        {"num_layers": 2, "num_experts": 4, "experts_per_token": 2, "num_groups": 2, "num_kept_groups": 1}
    )
    config = resolve(from_config_dict(tree), "cpu", 1)
    weights = jax.device_get(transformer.init(config.model, jax.random.key(0)))
    return weights.params, linears.take(config, weights, small.batch(rows=4, length=64))

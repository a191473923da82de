"""Host memory is refused where there is none, where nothing can be put there, and where asking for it says nothing."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from deepseek_jax.config import from_config_dict
from deepseek_jax.parallel.host_memory import check_host_memory
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.program import resolve_for
from tests.support import small


def test_a_device_without_host_memory_is_named():
    device = SimpleNamespace(
        device_kind="Calculator",
        addressable_memories=lambda: [SimpleNamespace(kind=kind) for kind in ("device", "paper")],
    )
    mesh = SimpleNamespace(devices=np.array([device]))
    with pytest.raises(ValueError, match=r"remat = 'offload' .* Calculator has \['device', 'paper'\]; .*remat=full"):
        check_host_memory(mesh, "execution.remat", "offload", "full")


def test_a_pipeline_does_not_offload():
    config = small.config().with_(execution={"remat": "offload"})
    assert resolve_for(config, make_mesh(config.mesh, jax.devices()[:1])).execution.remat == "offload"
    config = config.with_(mesh={"pipe": 2})
    with pytest.raises(ValueError, match=r"remat = 'offload' does not exist for a pipeline .*remat=full"):
        resolve_for(config, make_mesh(config.mesh, jax.devices()[:2]))


def test_an_average_that_is_not_kept_lies_nowhere():
    tree = small.config_dict()
    tree.optimizer.ema_memory = "host"
    with pytest.raises(
        ValueError, match=r"ema_memory = 'host' says nothing with optimizer.ema_decay = 0.*set ema_decay"
    ):
        from_config_dict(tree)

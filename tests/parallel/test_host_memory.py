"""Host memory is refused where there is none, where nothing can be put there, and where asking for it says nothing."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from deepseek_jax.config import from_config_dict
from deepseek_jax.parallel import program
from deepseek_jax.parallel.host_memory import check_host_memory
from deepseek_jax.parallel.mesh import check_fit, make_mesh
from deepseek_jax.parallel.program import resolve_for, resolve_for_training
from deepseek_jax.plan.meshes import require_fit
from deepseek_jax.training.objective import pretraining
from deepseek_jax.training.step import jit_eval_step, jit_train_step
from tests.support import small


def test_a_device_without_host_memory_is_named():
    device = SimpleNamespace(
        device_kind="Calculator",
        addressable_memories=lambda: [SimpleNamespace(kind=kind) for kind in ("device", "paper")],
    )
    mesh = SimpleNamespace(devices=np.array([device]))
    with pytest.raises(ValueError, match=r"remat = 'offload' .* Calculator has \['device', 'paper'\]; .*remat=full"):
        check_host_memory(mesh, "execution.remat", "offload", "full")


def test_a_pipeline_does_not_offload_in_a_run_nor_in_a_plan():
    config = small.config().with_(execution={"remat": "offload"})
    assert resolve_for(config, make_mesh(config.mesh, jax.devices()[:1])).execution.remat == "offload"
    config = config.with_(mesh={"pipe": 2})
    refusal = r"remat = 'offload' with mesh.pipe = 2 does not exist.*remat=full"
    with pytest.raises(ValueError, match=refusal):
        check_fit(config, make_mesh(config.mesh, jax.devices()[:2]))
    with pytest.raises(ValueError, match=refusal):
        require_fit(config, 2)


@pytest.fixture
def nowhere(monkeypatch):
    """No device of this machine has host memory; the settings that asked are returned."""
    asked = []

    def refuse(mesh, key, value, instead):
        asked.append(key)
        raise ValueError(f"{key} = {value!r}; use --config.{key}={instead}")

    monkeypatch.setattr(program, "check_host_memory", refuse)
    return asked


def test_only_a_train_step_is_refused_for_its_average(nowhere):
    """Prefill, decode and evaluation keep none, whatever the config of the run says."""
    config = small.config().with_(optimizer={"ema_decay": 0.9, "ema_memory": "host"})
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    resolve_for(config, mesh)
    jit_eval_step(config, pretraining(config), mesh)
    assert nowhere == []
    with pytest.raises(ValueError, match=r"ema_memory=device"):
        resolve_for_training(config, mesh)
    with pytest.raises(ValueError, match=r"ema_memory=device"):
        jit_train_step(config, pretraining(config), mesh)


def test_layer_inputs_are_refused_where_no_host_memory_is(nowhere):
    config = small.config().with_(execution={"remat": "offload"})
    with pytest.raises(ValueError, match=r"execution.remat=full"):
        resolve_for(config, make_mesh(config.mesh, jax.devices()[:1]))


def test_an_average_that_is_not_kept_lies_nowhere():
    tree = small.config_dict()
    tree.optimizer.ema_memory = "host"
    with pytest.raises(ValueError, match=r"ema_memory = 'host' .* optimizer.ema_decay = 0.*set ema_decay"):
        from_config_dict(tree)

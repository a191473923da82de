"""The numbers of devices that a plan offers are those that a run accepts."""

import importlib

import jax
import pytest

from deepseek_jax.config import from_config_dict
from deepseek_jax.parallel.mesh import check_fit, make_mesh
from deepseek_jax.plan import meshes
from deepseek_jax.plan.counts import bytes_per_device, state_of
from tests.support import small
from tests.support.configs import CONFIGS


def load(name):
    return from_config_dict(importlib.import_module(f"configs.{name}").get_config())


def runs(config, num_devices):
    """Whether a run on that many devices of this machine gets past its checks."""
    try:
        check_fit(config, make_mesh(config.mesh, jax.devices()[:num_devices]))
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_offered_is_what_a_run_accepts(precision):
    tree = small.fp8_config_dict() if precision == "fp8" else small.config_dict()
    tree.mesh.update({"data": -1, "node": 1, "expert": 2})
    tree.data.sequence_length = 64
    config = from_config_dict(tree)
    fits = {fit.num_devices: fit for fit in meshes.find_fits(config, most=8)}
    for count in range(1, 9):
        as_written = count in fits and not fits[count].changes
        assert as_written == runs(config, count), count
        assert count not in fits or runs(fits[count].config, count), count
    assert set(fits) == {1, 2, 4, 8}
    # In FP8 a device needs two rows of 64 tokens.
    changed = {"mesh.expert": 1}, {}, {}, {"training.micro_batch_size": 16} if precision == "fp8" else {}
    assert tuple(fit.changes for fit in fits.values()) == changed


@pytest.mark.parametrize("name", ["deepseek_v2", "moe_1b"])
def test_no_number_is_passed_over(name):
    config = load(name)
    one_by_one = [count for count in range(1, 66) if meshes.find_fit(config, count) is not None]
    assert [fit.num_devices for fit in meshes.find_fits(config, most=65)] == one_by_one


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_starts_as_it_is_shipped(name):
    config = load(name)
    assert any(not fit.changes for fit in meshes.find_fits(config, most=128)), "no number of devices"


def test_moonlight_is_for_a_node_of_eight():
    """And its state leaves a card of 80 GB half of its memory for activations."""
    config = load("moonlight_16b")
    fit = meshes.fit_as_written(config, 8)
    assert fit.mesh.shape["expert"] == 8 and config.training.micro_batch_size == 64
    assert sum(bytes_per_device(config, state_of(config), fit.mesh).values()) < 0.5 * 80e9
    assert meshes.smallest_micro_batch(fit) == 8


def test_v2_and_v3():
    """As shipped on any mesh that shares the experts; where batches are too small for it, devices share sequences."""
    as_written = [fit.num_devices for fit in meshes.find_fits(load("deepseek_v2"), most=256) if not fit.changes]
    assert as_written == [32, 64, 128]
    v2 = {fit.num_devices: fit.changes for fit in meshes.find_fits(load("deepseek_v2"))}
    assert v2[768] == {"training.micro_batch_size": 768}
    assert v2[1024] == {"mesh.context": 4, "training.micro_batch_size": 256}
    v3 = {fit.num_devices: fit.changes for fit in meshes.find_fits(load("deepseek_v3"))}
    assert list(v3)[-9:] == [128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    assert [v3[count] for count in (192, 1024)] == [{"training.micro_batch_size": count} for count in (192, 1024)]
    assert v3[2048] == {"mesh.context": 2, "training.micro_batch_size": 1024}


@pytest.mark.parametrize(
    ("devices", "least", "most"), [(128, 1, 1.001), (1024, 1.01, 1.05), (2048, 1.03, 1.08), (192, 2.9, 3)]
)
def test_a_plan_counts_what_several_devices_store(devices, least, most):
    """Beside weights in even parts. No dim of V3's experts has a factor 3, so a data axis of three saves nothing."""
    config = load("deepseek_v3")
    fit, state = meshes.find_fit(config, devices), state_of(config)
    parts = bytes_per_device(fit.config, state, fit.mesh)
    even = sum(leaf.size for leaf in jax.tree.leaves(state["params"])) / devices
    assert least <= parts["weights"] / (4 * even) <= most
    assert parts["moments"] == pytest.approx(parts["gradients"], rel=1e-3)  # two in BF16, one in FP32


def test_a_refusal_says_what_works():
    config = load("deepseek_v3")
    with pytest.raises(ValueError, match="size = 128.* works on 256 with --config.training.micro_batch_size=256"):
        meshes.require_fit(config, 256)
    with pytest.raises(ValueError, match="^160 devices do not work; .* work: 1, 2, 3, 4, .*, 2048. Of 160"):
        meshes.require_fit(config, 160)
    assert meshes.require_fit(config, 128).changes == {}


def test_a_plan_names_no_flag_that_it_lacks():
    config = load("tiny").with_(mesh={"data": -1, "expert": 16})
    with pytest.raises(ValueError, match="use a multiple of 16 devices") as refusal:
        meshes.require_fit(config, 8)
    assert "--cpu_devices" not in str(refusal.value)


def test_the_smallest_micro_batch_is_one_that_works():
    config = load("deepseek_v3")
    assert meshes.smallest_micro_batch(meshes.fit_as_written(config, 64)) == 64
    assert meshes.smallest_micro_batch(meshes.fit_as_written(config, 128)) == 128

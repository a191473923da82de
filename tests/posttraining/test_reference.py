"""The KL's reference on disk: what a run that continues compares with, and what is refused."""

import contextlib
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from deepseek_jax.parameters import Weights
from deepseek_jax.posttraining.grpo import refuse_two_threads
from deepseek_jax.posttraining.reference import open_reference
from deepseek_jax.posttraining.settings import read
from deepseek_jax.training.checkpoint import Progress
from deepseek_jax.training.saved import stored_steps
from tests.posttraining.test_grpo import settings
from tests.posttraining.test_sft import TOKENIZER, one_device


def weights_of(value):
    return Weights({"head_DV": jax.numpy.full((8, 4), float(value))}, {"bias": jax.numpy.full((2,), float(value))})


@pytest.fixture
def opened(tmp_path):
    """(step, position) -> the reference of a run at `step`; each call is another process of the same run."""
    config, posttraining = read(settings(reference_every=2, training__keep_checkpoints=2))
    mesh = one_device(config)
    TOKENIZER.save(tmp_path / "tokenizer.json")
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), weights_of(0))
    parts = SimpleNamespace(abstract=abstract._asdict(), origin=lambda: weights_of(0))
    with contextlib.ExitStack() as resources, jax.set_mesh(mesh):

        def open_at(step, position):
            progress = Progress(step=step, tokens_seen=0, data=position)
            return open_reference(config, posttraining.grpo, parts, mesh, tmp_path, weights_of(0), progress, resources)

        yield open_at


def test_a_run_continues_with_the_reference_of_its_checkpoint(opened, tmp_path):
    first = opened(0, None)
    assert first.state()["reference_step"] == 0 and not stored_steps(tmp_path / "reference")  # it is the origin's
    assert [step for step in range(9) if first.is_due(step)] == [2, 4, 6, 8]
    positions = {}
    for step in (2, 4, 6, 8, 10):
        first.replace(step, weights_of(step))
        if step != 6:  # it was in no checkpoint of the run
            positions[step] = first.state()
    assert stored_steps(tmp_path / "reference") == [2, 4, 8, 10]  # of two checkpoints, and two in the making
    again = opened(5, positions[4])  # the checkpoints behind did not come to their end
    again.check(positions[4])
    assert again.step == 4 and float(again.weights.params["head_DV"][0, 0]) == 4.0
    assert float(again.weights.router_bias["bias"][0]) == 4.0
    assert stored_steps(tmp_path / "reference") == [2, 4]
    again.replace(6, weights_of(7))
    assert again.state() | {"reference": ""} == {"reference": "", "reference_step": 6}
    assert np.all(opened(7, again.state()).weights.params["head_DV"] == 7.0)
    origin = opened(1, first.state() | {"reference_step": 0})  # it died before its first reference was in a checkpoint
    assert origin.step == 0 and not stored_steps(tmp_path / "reference")
    with pytest.raises(ValueError, match="initial_weights are other weights than this run began with"):
        origin.check(positions[4])


def test_a_reference_that_is_lost_is_refused_with_its_step(opened, tmp_path):
    first = opened(0, None)
    first.replace(2, weights_of(2))
    position = first.state()
    shutil.rmtree(tmp_path / "reference")
    with pytest.raises(ValueError, match="reference lacks the KL reference of step 2; put it back"):
        opened(3, position)


def test_two_threads_need_one_device():
    config, posttraining = read(settings(staleness=1))
    refuse_two_threads(posttraining.grpo, one_device(config))
    with pytest.raises(ValueError, match="staleness = 1 needs one device, and the mesh has 8"):
        refuse_two_threads(posttraining.grpo, jax.make_mesh((8,), ("data",)))

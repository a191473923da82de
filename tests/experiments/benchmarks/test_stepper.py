"""Scaling compares a mesh with one device that has the same work."""

import jax
import pytest

from deepseek_jax.parallel.mesh import check_fit, make_mesh
from experiments.benchmarks import stepper
from tests.support import small


def test_one_device_has_what_each_of_the_mesh_has():
    config = small.config((2, 2, 2))
    alone, share = stepper.one_device(config, 8, 16)
    assert share == 2 and alone.training.micro_batch_size == 1 and alone.training.batch_size == (("constant", 1.0, 2),)
    assert (alone.model, alone.data, alone.loss) == (config.model, config.data, config.loss)
    mesh = make_mesh(alone.mesh, jax.devices()[:1])
    check_fit(alone, mesh)


def test_the_line_and_the_figure_agree():
    percent, line = stepper.scaling(4, 300_000.0, 80_000.0)
    assert percent == pytest.approx(93.75)
    assert line == "4 devices: 300,000 tokens/s, 75,000 per device, 93.8 % of one device's 80,000"


def test_steps_are_taken_in_turn():
    order = []

    class Fake:
        def __init__(self, name):
            self.name = name

        def run(self):
            order.append(self.name)

    stepper.time_in_turn(Fake("mesh"), Fake("alone"), 3)
    assert order == ["mesh", "alone"] * 3


@pytest.mark.parametrize(
    ("error", "message"),
    [("RESOURCE_EXHAUSTED: Out of memory", "does not hold small and its 2 sequences"), ("INTERNAL: other", None)],
)
def test_a_device_that_is_too_small_is_said(error, message, monkeypatch):
    def refuse(*_):
        raise jax.errors.JaxRuntimeError(error)

    monkeypatch.setattr(stepper, "Stepper", refuse)
    config = small.config((2, 2, 2))
    arguments = config, 16, make_mesh(config.mesh), lambda config, size: iter(())
    if message is None:
        with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
            stepper.open_alone(*arguments)
    else:
        assert message in stepper.open_alone(*arguments)

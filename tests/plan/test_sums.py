"""Which gradients cost what: those that the program lends to products, those of layers that lie apart, the others.

`tests/parallel/test_gradient_sums.py` holds these against the traced step.
"""

import pytest

from deepseek_jax.config import from_config_dict
from deepseek_jax.plan import sums
from deepseek_jax.plan.counts import bytes_per_device, state_of
from deepseek_jax.plan.meshes import require_fit
from tests.support import small

EXPERTS = 4 * 16 * 3 * 64 * 32  # FP32 bytes of the experts of a layer


def gradients(micro_batches, **execution):
    """Of all layers: a dense one, two MoE layers, and MTP's, which has experts, too."""
    tree = small.config_dict()
    tree.mesh.update({"data": 1, "node": 1, "expert": 1})
    tree.execution.update({"precision": "bf16", "gather": "step", "scan_unroll": 2} | execution)
    tree.training.micro_batch_size = 16 // micro_batches
    fit = require_fit(from_config_dict(tree), 1)
    state = state_of(fit.config)
    found = {pipe: sums.gradients_of(fit.config, state, fit.mesh, pipe) for pipe in (False, True)}
    whole = bytes_per_device(fit.config, state, fit.mesh)["gradients"]
    assert all(sum(map(sum, of.values())) == whole for of in found.values())
    return found


@pytest.mark.parametrize(
    ("execution", "micro_batches", "layers"),
    [
        ({}, 2, (3, 3)),
        ({}, 1, (0, 3)),  # the one micro-batch has no sum, but a pipeline's begins with zeros
        ({"scan_unroll": 1}, 2, (1, 3)),  # the MTP layer is alone, and a pipeline unrolls all
        ({"gather": "layer"}, 2, (0, 0)),
        ({"precision": "fp32"}, 2, (0, 0)),
    ],
)
def test_products_add_to_the_sums_of_experts_where_the_program_lends_them(execution, micro_batches, layers):
    """Without a pipeline, and with one."""
    found = gradients(micro_batches, **execution)
    for pipe, expected in zip((False, True), layers, strict=True):
        assert sum(of.lent for of in found[pipe].values()) == expected * EXPERTS
        lying = {top for top, of in found[pipe].items() if of.lent or of.apart}
        layers_apart = {0: set(), 1: {"dense_layers", "mtp_layers"}, 3: {"dense_layers", "moe_layers", "mtp_layers"}}
        assert lying == layers_apart[3 if pipe else expected]


def test_a_parameter_costs_a_quarter_where_its_product_adds():
    """16 bytes a micro-batch, 12 in a layer that lies apart, 4: only the sum is read."""
    assert [sums.Gradients(**{kind: 4.0}).each for kind in sums.Gradients._fields] == [4, 12, 16]
    several, one = (sums.gradient_traffic({"a": sums.Gradients(4.0), "b": sums.Gradients(0.0, 4.0)}, n) for n in (8, 1))
    assert several == 8 * (4 + 12) + 2 * (4 + 8)  # sums of zero, and stacked at the end
    assert one == 8

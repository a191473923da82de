"""The goldens can tell a right router from the known wrong ones."""

import json

import numpy as np
import pytest

from tests.golden import hf_checkpoint


def released(case):
    folder = hf_checkpoint.FOLDER / case
    return json.loads((folder / "config.json").read_text())


def select(scores_TE, hf, mask):
    """Return each token's experts, ascending: group scores, then the best of the kept groups, others set to `mask`."""
    grouped = np.sort(scores_TE.reshape(len(scores_TE), hf["n_group"], -1), axis=-1)
    group_TG = grouped[..., -1] if hf["scoring_func"] == "softmax" else grouped[..., -2:].sum(-1)
    kept_TG = group_TG >= np.sort(group_TG, axis=-1)[:, [-hf["topk_group"]]]
    kept_TE = np.repeat(kept_TG, hf["n_routed_experts"] // hf["n_group"], axis=1)
    best = np.argsort(-np.where(kept_TE, scores_TE, mask), axis=-1)[:, : hf["num_experts_per_tok"]]
    return np.sort(best, axis=-1)


def router_scores(case):
    golden = hf_checkpoint.read(case)
    logits_LTE = golden.expected["router_input_LTD"][:1] @ golden.params["moe_layers"]["moe"]["router_DE"][:1]
    return golden, 1 / (1 + np.exp(-logits_LTE[0])), golden.router_bias["moe_layers"]["moe"]["bias_E"][0]


@pytest.mark.parametrize(("case", "mask_can_be_zero"), [("base", True), ("negative_bias", False)])
def test_goldens_tell_routers_apart(case, mask_can_be_zero):
    """The rule gives the oracle; without the bias, or with a mask of 0.0 on negative scores, many tokens differ."""
    hf = released(case)
    golden, scores_TE, bias_E = router_scores(case)
    right = golden.expected["experts_LTK"][0]
    np.testing.assert_array_equal(select(scores_TE + bias_E, hf, -np.inf), right)
    assert (select(scores_TE, hf, -np.inf) != right).any(-1).mean() > 0.2
    zero_masked = (select(scores_TE + bias_E, hf, 0.0) != right).any(-1).mean()
    assert zero_masked == 0.0 if mask_can_be_zero else zero_masked > 0.9
    assert (scores_TE + bias_E < 0).all() != mask_can_be_zero
    if case == "base":
        assert (bias_E > 0).any() and (bias_E < 0).any()


def test_expected_weights_come_from_unbiased_scores():
    golden, scores_TE, bias_E = router_scores("base")
    chosen_TK = golden.expected["experts_LTK"][0]

    def gates(values_TE):
        picked = np.take_along_axis(values_TE, chosen_TK, axis=-1)
        return 2.5 * picked / picked.sum(-1, keepdims=True)

    np.testing.assert_allclose(golden.expected["weights_LTK"][0], gates(scores_TE), rtol=1e-5)
    assert np.abs(golden.expected["weights_LTK"][0] - gates(scores_TE + bias_E)).max() > 0.1

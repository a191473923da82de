"""The reader of the golden checkpoints, and that the goldens can tell a right router from the known wrong ones."""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from deepseek_jax.model import transformer
from deepseek_jax.parallel.mesh import make_mesh
from tests.golden import hf_checkpoint


def flatten(tree, prefix=""):
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {path: leaf for key, value in tree.items() for path, leaf in flatten(value, f"{prefix}/{key}").items()}


def released(case):
    folder = hf_checkpoint.FOLDER / case
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


@pytest.mark.parametrize("case", hf_checkpoint.CASES)
def test_every_stored_number_arrives_once(case):
    hf, tensors = released(case)
    golden = hf_checkpoint.read(case)
    copies = hf["num_nextn_predict_layers"] * 2 * hf["vocab_size"] * hf["hidden_size"]  # of embedding and head
    biases = sum(leaf.size for leaf in flatten(golden.router_bias).values()) if hf["scoring_func"] == "sigmoid" else 0
    ours = sum(leaf.size for leaf in flatten(golden.params).values()) + biases
    assert ours == sum(tensor.size for tensor in tensors.values()) - copies
    assert all(leaf.dtype == np.float32 and np.isfinite(leaf).all() for leaf in flatten(golden.params).values())


@pytest.mark.parametrize("case", hf_checkpoint.CASES)
def test_trees_are_those_of_init(case):
    golden = hf_checkpoint.read(case)
    with jax.set_mesh(make_mesh(golden.config.mesh, jax.devices()[:1])):
        ours = jax.eval_shape(
            functools.partial(transformer.init, golden.config.model), jax.eval_shape(lambda: jax.random.key(0))
        )
    shapes = [jax.tree.map(lambda leaf: leaf.shape, trees) for trees in (ours, (golden.params, golden.router_bias))]
    assert shapes[0] == shapes[1]


def test_layout_of_one_of_each_kind():
    """Element by element, in the letters of the tree: which row of the file is which entry of ours."""
    hf, tensors = released("base")
    params = hf_checkpoint.read("base").params
    attention, moe = params["moe_layers"]["attention"], params["moe_layers"]["moe"]
    content, rotary, value = hf["qk_nope_head_dim"], hf["qk_rope_head_dim"], hf["v_head_dim"]
    layer, head, row, column = 1, 2, 3, 5
    name = f"model.layers.{layer + 1}"  # one dense layer comes first
    q_b, kv_b = tensors[f"{name}.self_attn.q_b_proj.weight"], tensors[f"{name}.self_attn.kv_b_proj.weight"]
    assert (
        attention["q_b_ANQ"][layer, column, head, content + row]
        == q_b[head * (content + rotary) + content + row, column]
    )
    assert (
        attention["kv_b_CNX"][layer, column, head, content + row]
        == kv_b[head * (content + value) + content + row, column]
    )
    assert (
        attention["o_NHD"][layer, head, row, column]
        == tensors[f"{name}.self_attn.o_proj.weight"][column, head * value + row]
    )
    up = tensors[f"{name}.mlp.experts.7.up_proj.weight"]
    assert moe["gate_up_ED2F"][layer, 7, column, 1, row] == up[row, column]
    merge = tensors["model.layers.4.eh_proj.weight"]
    assert params["mtp_layers"]["merge_2DD"][1, 1, row, column] == merge[column, hf["hidden_size"] + row]


def test_reader_refuses_what_does_not_belong():
    hf, tensors = released("base")
    model = hf_checkpoint.read_model(hf)
    with pytest.raises(ValueError, match="no tensor 'model.norm.weight'"):
        hf_checkpoint.read_trees(
            {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}, model
        )
    with pytest.raises(ValueError, match="unknown tensors"):
        hf_checkpoint.read_trees(tensors | {"model.layers.1.self_attn.q_proj.weight": np.zeros(1)}, model)
    with pytest.raises(ValueError, match="differs from the shared tensor"):
        hf_checkpoint.read_trees(
            tensors | {"model.layers.3.embed_tokens.weight": 2 * tensors["model.embed_tokens.weight"]}, model
        )


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
    hf, _ = released(case)
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

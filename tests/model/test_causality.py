"""Causality by differentiating: which tokens can move which prediction, of the main head and of two MTP depths.

Every position of the row holds another token id, so the gradient of an output with respect to row v of the embedding
table is its gradient with respect to the token at position v, wherever that token enters: as input, or shifted into an
MTP layer. Rows are tested packed and not packed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import from_config_dict
from deepseek_jax.model import transformer
from deepseek_jax.parallel.program import resolve
from deepseek_jax.training.objective import mtp_targets
from tests.support import small
from tests.support.network import apply

S, DEPTHS = 14, 2
pytestmark = pytest.mark.xdist_group("causality")  # one compiled gradient serves all tests of this file


def make_batch(case):
    segments = np.ones((1, S), np.int32)
    if case == "packed":
        segments[:, 6:] = 2
        segments[:, 12:] = 0
    ids = np.arange(S + 1, dtype=np.int32)[np.newaxis]
    weights = (segments > 0).astype(np.float32)
    return {
        "tokens_BS": ids[:, :-1],
        "targets_BS": ids[:, 1:],
        "positions_BS": ids[:, :-1],
        "segment_ids_BS": segments,
        "loss_weights_BS": weights,
    }


@functools.cache
def model():
    tree = small.config_dict()
    tree.model.update({"num_layers": 2, "num_mtp_layers": DEPTHS, "vocab_size": 32, "init_std": 0.1})
    tree.execution.update({"attention_chunk": 4, "expert_block": 4})  # the row spans four chunks
    config = resolve(from_config_dict(tree), "cpu", 1)
    return config, *transformer.init(config.model, jax.random.key(0))


@functools.cache
def compiled():
    """Outputs [1 + depths, S], and the pullback to the tokens: [1 + depths, S] to [V].

    An output is a random projection of a hidden state.
    """
    config, params, bias = model()
    direction_D = jax.random.normal(jax.random.key(1), (config.model.width,))

    def outputs(embed_VD, batch):
        output = apply(config, params | {"embed_VD": embed_VD}, bias, batch)
        return jnp.stack([hidden_BSD[0] @ direction_D for hidden_BSD in (output.hidden_BSD, *output.mtp_hidden)])

    def run(batch, cotangent):
        out, pull = jax.vjp(lambda embed_VD: outputs(embed_VD, batch), params["embed_VD"])
        return out, jnp.abs(pull(cotangent)[0]).max(-1)

    return jax.jit(run)


@functools.cache
def dependence(case):
    """[1 + depths, S, S + 1] bools: does output d at position i depend on token v?"""
    batch, one_hot = make_batch(case), np.eye((1 + DEPTHS) * S, dtype=np.float32).reshape(-1, 1 + DEPTHS, S)
    rows = [np.asarray(compiled()(batch, cotangent)[1]) != 0 for cotangent in one_hot]
    assert not np.stack(rows)[:, S + 1 :].any()
    return np.stack(rows)[:, : S + 1].reshape(1 + DEPTHS, S, S + 1)


def test_main_head_sees_all_tokens_up_to_its_own():
    np.testing.assert_array_equal(dependence("one document")[0], np.tri(S, S + 1, dtype=bool))


@pytest.mark.parametrize("depth", range(1, DEPTHS + 1))
def test_mtp_sees_depth_tokens_more_and_never_its_target(depth):
    """Position i of depth k depends on exactly the tokens up to i + k; it predicts token i + k + 1."""
    carries_loss = slice(0, S - depth)
    np.testing.assert_array_equal(
        dependence("one document")[depth, carries_loss], np.tri(S, S + 1, k=depth, dtype=bool)[carries_loss]
    )


def test_packed_documents_are_independent():
    """Wherever a position carries loss it depends on exactly the past (and `depth` next tokens) of its own document."""
    batch, segments = make_batch("packed"), np.append(make_batch("packed")["segment_ids_BS"][0], -1)
    same_document = segments[:S, None] == segments[None]
    for depth in range(1 + DEPTHS):
        weights_BS = mtp_targets(batch, depth)[1] if depth else batch["loss_weights_BS"]
        positions = np.flatnonzero(np.asarray(weights_BS)[0])
        assert len(positions) == 12 - 2 * depth  # two documents of six tokens
        want = same_document & np.tri(S, S + 1, k=depth, dtype=bool)
        np.testing.assert_array_equal(dependence("packed")[depth, positions], want[positions], err_msg=f"depth {depth}")


@pytest.mark.parametrize("changed", [3, 6, 11])
def test_a_later_token_changes_nothing_before_it(changed):
    """Replace the tokens from `changed` on: routing is discrete, so no gradient would show what it does.

    Outputs are near 10. Here the earlier ones are bit-equal, which is not promised: rows of one expert share a matmul.
    """
    none = np.zeros((1 + DEPTHS, S), np.float32)
    batch, other = make_batch("one document"), make_batch("one document")
    other["tokens_BS"] = np.where(np.arange(S) >= changed, 31 - other["tokens_BS"], other["tokens_BS"])
    other["targets_BS"] = np.where(np.arange(1, S + 1) >= changed, 31 - other["targets_BS"], other["targets_BS"])
    before, after = compiled()(batch, none)[0], compiled()(other, none)[0]
    for depth in range(1 + DEPTHS):
        np.testing.assert_allclose(after[depth, : changed - depth], before[depth, : changed - depth], rtol=0, atol=1e-5)
        assert abs(after[depth, changed - depth] - before[depth, changed - depth]) > 1e-2

"""The FLOP formula against published and independently computed numbers (spec sections 1.3 and 13)."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from configs.deepseek_v3 import get_config
from deepseek_jax.config import from_config_dict
from deepseek_jax.training.flops import flops_per_token, model_flops_utilization, peak_flops

V3 = from_config_dict(get_config()).model
# The 236B shape of spec section 1.2, with V2's vocabulary.
V2 = dataclasses.replace(
    V3,
    vocab_size=102400,
    width=5120,
    num_layers=60,
    num_dense_layers=1,
    dense_hidden=12288,
    num_experts=160,
    num_shared_experts=2,
    experts_per_token=6,
    expert_hidden=1536,
    num_mtp_layers=0,
)


@pytest.mark.parametrize(
    ("model", "causal", "gigaflops"),
    [(V3, True, 250.4), (V3, False, 281.2), (V2, True, 155.3)],
    ids=["671B causal", "671B full", "236B causal"],
)
def test_published_flops_per_token(model, causal, gigaflops):
    assert round(flops_per_token(model, 4096, causal, mtp=False) / 1e9, 1) == gigaflops


def test_matmul_weights_of_671b():
    """6N without attention products: what remains when the sequence has no length."""
    assert round(flops_per_token(V3, 0, causal=False, mtp=False) / 1e9, 1) == 219.7


def test_mtp_adds_one_layer_a_merge_and_a_head():
    """Active weights of one MTP layer with its head: 2.541B less the embedding (spec section 1.3).

    Attention grows by one layer.
    """
    added = flops_per_token(V3, 0, causal=False, mtp=True) - flops_per_token(V3, 0, causal=False, mtp=False)
    assert added / 6e9 == pytest.approx(2.541 - 0.927, abs=1e-3)


def test_mfu_of_the_report():
    """Spec section 13, item 18: 1541.7 tokens/s per GPU is 39.0% causal and 43.8% full of 989 TFLOPS."""
    for causal, percent in ((True, 39.0), (False, 43.8)):
        flops = flops_per_token(V3, 4096, causal, mtp=False)
        assert round(100 * model_flops_utilization(flops, 1541.7, peak_flops("NVIDIA H200")), 1) == percent


def test_no_query_latent_counts_its_one_matrix():
    lite = dataclasses.replace(V3, query_latent=0)
    difference = flops_per_token(V3, 1, True, mtp=False) - flops_per_token(lite, 1, True, mtp=False)
    assert difference == 6 * 61 * (1536 * (7168 + 128 * 192) - 7168 * 128 * 192)


def test_weights_equal_a_count_of_xla():
    """The forward pass of one expert-sized FFN, as XLA counts it: 2 FLOPs per weight and token, a third of ours."""
    tokens, width, hidden = 32, 64, 48

    def ffn(x_TD, gate_up_DF, down_FD):
        return (x_TD @ gate_up_DF)[:, :hidden] @ down_FD

    shapes = (tokens, width), (width, 2 * hidden), (hidden, width)
    compiled = jax.jit(ffn).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()
    small = dataclasses.replace(V3, width=width, num_layers=1, num_dense_layers=1, dense_hidden=hidden)
    none = dataclasses.replace(small, dense_hidden=0)
    ours = flops_per_token(small, 0, causal=False, mtp=False) - flops_per_token(none, 0, causal=False, mtp=False)
    assert compiled.cost_analysis()["flops"] == pytest.approx(tokens * ours / 3, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
    ],
)
def test_longest_name_wins(kind, teraflops):
    assert peak_flops(kind) == teraflops * 1e12


def test_unknown_device_has_no_peak():
    assert peak_flops("cpu") is None


def test_of_frozen_weights_no_gradient_is_counted():
    """Of 6 FLOPs per weight 2 are its gradient; the weights of adapters have all 6."""
    whole, bare = (flops_per_token(V3, length, causal=True, mtp=False) for length in (4096, 0))
    adapted = flops_per_token(V3, 4096, causal=True, mtp=False, adapters=1e6)
    assert adapted == pytest.approx(whole - bare / 3 + 6e6, rel=1e-12)

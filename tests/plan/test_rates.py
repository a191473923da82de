"""The shares of the rates are those of the records, and a layer of V3 takes what was measured."""

import importlib
import json
import statistics
from pathlib import Path

import pytest

from deepseek_jax.config import from_config_dict
from deepseek_jax.plan import rates, work
from deepseek_jax.plan.chips import CHIPS, find_topology
from deepseek_jax.training.flops import flops_per_token
from tests.support.configs import CONFIGS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
H100 = CHIPS["h100"]


def load(name):
    return from_config_dict(importlib.import_module(f"configs.{name}").get_config())


def records(name, mode="rate"):
    return [r for r in json.loads((RESULTS / name).read_text()) if r["mode"] == mode]


def best(name, dims, peak):
    """The largest share of the peak in a file of records, for shapes that have the values of `dims`."""
    found = [r["value"] for r in records(name) if dims.items() <= r["shape"].items()]
    return max(found) * 1e12 / peak


def test_shares_of_products_are_those_of_the_kernels_records():
    for contraction, share in rates.FP8_PRODUCT.items():
        shape = {"m": 8192 if contraction == 4096 else 4096, "k": contraction}
        assert share == pytest.approx(best("pallas_kernels_h100_matmul.json", shape, H100.peak_fp8), abs=1e-3), shape
    for table, name, peak in (
        (rates.FP8_WEIGHTS, "pallas_kernels_h100_gradients.json", H100.peak_fp8),
        (rates.BF16_WEIGHTS, "pallas_kernels_h100_gradients_bf16.json", H100.peak_bf16),
    ):
        for tokens, share in table.items():
            shape = next(r["shape"] for r in records(name) if r["shape"]["rows"] // r["shape"]["groups"] == tokens)
            assert share == pytest.approx(best(name, shape, peak), abs=1e-3), (name, tokens)
    for contraction in (2048, 7168):
        name = "pallas_kernels_h100_grouped_matmul_bf16.json"
        assert rates.BF16_PRODUCT[contraction] == pytest.approx(
            best(name, {"k": contraction}, H100.peak_bf16), abs=1e-3
        )
    xla = [r["yardstick"] for r in records("pallas_kernels_h100_matmul.json") if r["shape"]["k"] == 512]
    xla = max(y["value"] for y in xla if y["name"] == "XLA BF16")
    assert rates.BF16_PRODUCT[512] == pytest.approx(xla * 1e12 / H100.peak_bf16, abs=1e-3)


def test_shares_of_memory_links_and_attention_are_those_of_the_records():
    moved = {tuple(r["shape"].items()) + (r["op"],): r["value"] for r in records("pallas_kernels_h100_quantize.json")}
    assert statistics.median(moved.values()) * 1e9 / H100.hbm == pytest.approx(rates.MEMORY, abs=2e-3)
    flops = flops_per_token(load("deepseek_v3").model, 4096, True, False) - flops_per_token(
        load("deepseek_v3").model, 0, True, False
    )
    layer = records("layer/layer_h200.json", "time in attention_core")[0]["value"] / 1e3
    step = records("v3_5b_h200_fp8.json", "time in attention_core")[0]["value"] / 1e3 / 12
    assert pytest.approx(flops / 61 * 4096 / statistics.mean((layer, step)) / 989e12, abs=2e-3) == rates.ATTENTION


def test_a_layer_of_v3_takes_what_was_measured():
    """What no record has, is set by this layer: "other", "route" and WHOLE."""
    config = load("deepseek_v3")
    layers = work.moe_layer(config.model, 4096, "fp8", experts=4)
    predicted = 4096 * sum(sum(work.seconds(CHIPS["h200"], config, part, 4096, "selective")) for part in layers)
    measured = records("layer/layer_h200.json", "time in kernels")[0]["value"] / 1e3
    assert predicted == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("name", CONFIGS)
def test_products_and_attention_are_the_models_flops(name):
    """Every weight that a token meets, three times: what `training.flops` counts on another way, but for the router."""
    config = load(name)
    layers, heads = work.layers_of(config, config.model.num_experts)
    parts = [*layers, *heads]
    counted = sum(6 * p.inputs * p.outputs * p.rows for part in parts for p in part.products)
    counted += sum(part.attention for part in parts)
    moe = config.model.num_moe_layers + config.model.num_mtp_layers
    counted += 6 * moe * config.model.width * config.model.num_experts
    assert counted == pytest.approx(flops_per_token(config.model, config.data.sequence_length, True, True), rel=1e-9)


def test_shares_lie_between_their_records_and_rise_with_the_contraction():
    shares = [rates.share_of_peak(k, rates.FP8_PRODUCT) for k in (512, 600, 1000, 1536, 3000, 16384, 10**6)]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.511, 0.739)


@pytest.mark.parametrize("table", [rates.FP8_PRODUCT, rates.BF16_WEIGHTS], ids=["product", "gradient"])
def test_below_its_records_a_product_takes_a_time_that_is_linear_in_the_contraction(table):
    """Through the two shortest of the records."""
    first, second = sorted(table)[:2]
    times = [k / rates.share_of_peak(k, table) for k in (first / 4, first / 2, first, second)]
    assert times[1] - times[0] == pytest.approx((times[2] - times[1]) / 2)
    assert (times[3] - times[2]) / (second - first) == pytest.approx((times[2] - times[1]) / (first / 2))
    assert times[0] > times[2] / 4


def test_few_rows_of_an_expert_waste_tiles():
    """Of 512 rows a group needs up to five tiles of 128, which is counted; what is not grouped wastes nothing."""
    config = load("v3_5b").with_(execution={"precision": "bf16"})
    for sharing, factor in ((64, (1 + 128 / 512) / (1 + 128 / 4096)), (1, 1.0)):
        one = work.Work((work.Product(2048, 2048, 8, sharing),))
        few, many = (work.seconds(H100, config, one, tokens, "none")[0] for tokens in (4096, 8 * 4096))
        assert few / many == pytest.approx(factor)


def test_more_is_computed_again_more_time_passes():
    config = load("deepseek_v3")
    layer = work.moe_layer(config.model, 4096, "fp8", experts=4)[0]
    times = [sum(work.seconds(H100, config, layer, 4096, remat)) for remat in ("none", "selective", "full")]
    assert times[0] < times[1] < times[2]


def test_a_chip_without_fp8_is_refused():
    with pytest.raises(ValueError, match=r"v5p has no FP8 products; plan with --config\.execution\.precision=bf16"):
        rates.product_rate(CHIPS["v5p"], "fp8", rates.FORWARD, 4096)


@pytest.mark.parametrize(
    ("text", "chip", "devices"),
    [
        ("h800:2048", "h800", 2048),
        ("v5p:8x8x16", "v5p", 1024),
        ("tpu7x:4x4x8", "tpu7x", 256),
        ("tpu7x:256", "tpu7x", 512),
    ],
)
def test_topologies(text, chip, devices):
    assert find_topology(text) == (CHIPS[chip], devices)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h200", "has no number of devices; write h200:64"),
        ("v5p:", "write v5p:4x4x4"),
        ("h200:0", "has no number"),
        ("h200:8x8", "no torus: write one number of cards"),
        ("v5p:8x8", "has 2 sides, and v5p has a torus of 3 dims"),
        ("v5p:64x64x64", "a pod of v5p has: 8960 chips|a pod of v5p 8960"),
        ("v5p:2x2x64", r"compiled for as 8x8x4; write v5p:8x8x4"),
        ("abacus:8", "chip 'abacus' is unknown"),
    ],
)
def test_bad_topologies_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        find_topology(text)

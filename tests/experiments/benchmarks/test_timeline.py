"""`experiments.benchmarks.timeline` finds stages, layers and overlap in a trace, and refuses what is no trace."""

import re

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import timeline, timeline_drawing

ATTENTION = "jit(run)/jvp(attention)/attention_core/dot_product_attention_fwd"
BACK = "jit(run)/transpose(jvp(attention))/checkpoint/attention_core/dot_product_attention_bwd"


def events(interleaved=1):
    """Three layers of 10 ms a pass: attention, then dispatch on the wire beside the shared expert, then experts."""
    found = []
    for number in range(6):
        start, op = 10e6 * number, ATTENTION if number < 3 else BACK
        found += [(start + 1e5 * part, 1e6, "flash", op) for part in range(interleaved)]
        found += [
            (start + 1.5e6, 1e5, "small", op),  # a shorter kernel of the core marks no layer
            (start + 2e6, 3e6, "ncclDevKernel_AllGather", "jit(run)/jvp(dispatch)/all_gather"),
            (start + 3e6, 1e6, "matmul", "jit(run)/jvp(ffn)/matmul"),
            (start + 5e6, 4e6, "grouped", "jit(run)/jvp(experts)/grouped"),
        ]
    return [*found, (60e6, 1e6, "ncclDevKernel_ReduceScatter", ""), (61e6, 1e6, "fusion_1", "jit(run)/jvp(attention)")]


def test_stages():
    kernels = timeline.kernels_of(events())
    assert {k.name: k.stage for k in kernels} == {
        "flash": "attention",
        "small": "attention",
        "ncclDevKernel_AllGather": "dispatch",
        "matmul": "shared expert, dense FFN",
        "grouped": "expert products",
        "ncclDevKernel_ReduceScatter": "weights",
        "fusion_1": "attention",
    }
    assert all(k.stage in timeline_drawing.COLORS for k in kernels)
    assert set(timeline.STAGES.values()) <= set(timeline_drawing.COLORS)


@pytest.mark.parametrize("interleaved", [1, 2])
def test_a_layer_goes_from_its_attention_to_the_next(interleaved):
    kernels = timeline.kernels_of(events(interleaved))
    assert timeline.layer_window(kernels, 3, 1, "forward") == (10.0, 20.0)
    assert timeline.layer_window(kernels, 3, 0, "backward") == (30.0, 40.0)


def test_layers_that_are_not_there_are_refused():
    kernels = timeline.kernels_of(events())
    with pytest.raises(ValueError, match="layer = 2 has no next one among 3 layers; take 0 to 1"):
        timeline.layer_window(kernels, 3, 2, "forward")
    with pytest.raises(ValueError, match="3 attention cores, which are not as many for each of 4 layers"):
        timeline.layer_window(kernels, 4, 0, "forward")
    with pytest.raises(ValueError, match="has 0 attention cores"):
        timeline.layer_window([], 4, 0, "forward")


def test_overlap():
    """Dispatch takes 3 ms of the layer, 1 ms of it beside the shared expert; kernels are cut at the window's edges."""
    kernels = timeline.kernels_of(events())
    assert timeline.overlap(kernels, (10.0, 20.0)) == pytest.approx((3.0, 6.1, 1.0, 1.9))
    assert timeline.overlap(kernels, (13.5, 14.5)) == pytest.approx((1.0, 0.5, 0.5, 0.0))


def test_drawing(tmp_path):
    """Each panel has its bars in two lanes; long ones are named."""
    kernels = timeline.kernels_of(events())
    windows = {name: timeline.layer_window(kernels, 3, 1, name) for name in timeline_drawing.PASSES}
    figure = timeline_drawing.draw(kernels, windows, "three layers")
    figure.savefig(tmp_path / "layer.png")
    for axes in figure.axes:
        lanes = [round(bars.get_paths()[0].get_extents().y0 + 0.4) for bars in axes.collections]
        assert (lanes.count(timeline_drawing.COMMUNICATION), lanes.count(timeline_drawing.COMPUTATION)) == (1, 4)
        named = {text.get_text() for text in axes.texts}
        assert named == {"attention", "dispatch", "shared expert, dense FFN", "expert products"}
        assert "communication 3.00, of it 1.00 beside computation" in axes.get_title()


def test_what_is_no_trace_of_a_gpu_is_refused(tmp_path):
    path = tmp_path / "trace.xplane.pb"
    path.write_bytes(b"not a trace")
    with pytest.raises(ValueError, match=re.escape(f"{path} is no trace")):
        timeline.read(path)
    with pytest.raises(ValueError, match="No such file"):
        timeline.read(tmp_path / "missing")
    with jax.profiler.trace(tmp_path / "cpu"):
        jnp.ones(8).block_until_ready()
    (path,) = (tmp_path / "cpu").glob("**/*.xplane.pb")
    with pytest.raises(ValueError, match="has no GPU 0, but no device; name another"):
        timeline.read(path)

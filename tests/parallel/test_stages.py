"""Stages: every layer is in one of them, weights reach the devices that run them, gradients come back once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import deepseek_v3
from deepseek_jax.config import from_config_dict
from deepseek_jax.parallel.mesh import check_fit, make_mesh
from deepseek_jax.parallel.stage_weights import collect, distribute
from deepseek_jax.parallel.stages import Span, holding_of, split_layers
from deepseek_jax.parameters import P, layout_of, partition_specs
from deepseek_jax.pipeline.schedules import schedule
from tests.support import small


def without_pipe(axes):
    return (
        (tuple(axis for axis in axes if axis != "pipe") if isinstance(axes, tuple) else axes)
        if axes != "pipe"
        else None
    )


def model(**changes):
    return dataclasses.replace(small.config().model, **changes)


@pytest.mark.parametrize(
    ("layers", "dense", "mtp", "stages"),
    [(2, 1, 0, 2), (4, 0, 1, 2), (3, 3, 0, 3), (61, 3, 1, 16), (61, 3, 1, 32), (7, 2, 2, 4), (1, 0, 1, 2)],
)
def test_every_layer_is_in_one_stage_and_none_has_two_more_than_another(layers, dense, mtp, stages):
    split = split_layers(model(num_layers=layers, num_dense_layers=dense, num_mtp_layers=mtp), stages)
    of_dense = [i for s in split for i in range(s.dense_layers.first, sum(s.dense_layers))]
    of_moe = [i for s in split for i in range(s.moe_layers.first, sum(s.moe_layers))]
    assert of_dense == list(range(dense)) and of_moe == list(range(layers - dense))
    counts = [s.dense_layers.number + s.moe_layers.number + mtp * s.is_last for s in split]
    assert max(counts) - min(counts) <= 1 and counts == sorted(counts, reverse=True)
    assert [s.is_first for s in split] == [True] + [False] * (stages - 1)
    assert [s.is_last for s in split] == [False] * (stages - 1) + [True]


def test_v3_on_16_stages():
    split = split_layers(from_config_dict(deepseek_v3.get_config()).model, 16)
    assert split[0][:2] == (Span(0, 3), Span(0, 1))  # the report's first stage, with the embedding
    assert split[15][:2] == (Span(3, 0), Span(56, 2))  # the MTP layer and the head come on top


def test_fewer_layers_than_stages_are_refused():
    with pytest.raises(ValueError, match=r"2 layers and 1 MTP layers, too few for 4 stages.*lower mesh.pipe"):
        split_layers(model(num_layers=2), 4)


@pytest.mark.parametrize("name", ["dualpipe", "dualpipev"])
def test_devices_hold_the_layers_of_their_chunks(name):
    """Seven layers, of which two dense, on four stages of two devices or two stages in two copies."""
    placement = schedule(name, 2, 4).placement
    split = split_layers(model(num_layers=7, num_dense_layers=2, num_mtp_layers=0), placement.num_stages)
    holding = holding_of(placement, split)
    for device, chunk in np.ndindex(2, 2):
        stage = split[placement.stage(device, chunk)]
        for stack in ("dense_layers", "moe_layers"):
            first, count = getattr(stage, stack)
            start = holding.starts[stack][chunk]
            assert holding.layers[stack][device, start : start + count].tolist() == list(range(first, first + count))


@pytest.mark.parametrize(("name", "copies"), [("dualpipev", 1), ("dualpipe", 2)])
def test_weights_reach_their_stages_and_gradients_are_summed_over_copies(name, copies):
    """On (pipe 2, data 2, expert 2): what comes back of weights as gradients is the weights, once for each copy."""
    cfg = small.config((2, 1, 2)).with_(mesh={"pipe": 2})
    mesh = make_mesh(cfg.mesh, jax.devices())
    placement = schedule(name, 2, 4).placement
    split = split_layers(model(num_layers=5, num_dense_layers=0, num_mtp_layers=0), placement.num_stages)
    holding = holding_of(placement, split)
    rng = np.random.default_rng(0)
    shapes = {"down_EFD": (5, 8, 4, 16), "router_DE": (5, 16, 8), "norm_D": (5, 16)}
    params = {"moe_layers": {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}}
    params["embed_VD"] = rng.normal(size=(6, 16)).astype(np.float32)

    used = np.zeros_like(holding.layers["moe_layers"], bool)
    for device, chunk in np.ndindex(2, 2):
        start, number = holding.starts["moe_layers"][chunk], split[placement.stage(device, chunk)].moe_layers.number
        used[device, start : start + number] = True

    def there_and_back(params):
        mine = collect(params, holding)
        real = jnp.asarray(used)[jax.lax.axis_index("pipe")]

        def once(path, g):  # a slot that is not used has no gradient; one device has that of the embedding
            of_layers = path[0].key == "moe_layers"
            mask = real.reshape(-1, *[1] * (g.ndim - 1)) if of_layers else jax.lax.axis_index("pipe") == 0
            return jnp.where(mask, g, 0.0)

        return distribute(jax.tree_util.tree_map_with_path(once, mine), params, holding), mine["moe_layers"]

    with jax.set_mesh(mesh):
        specs = partition_specs(params)
        placed = jax.tree.map(jax.device_put, params, specs)
        held = {n: P("pipe", *map(without_pipe, layout[1:])) for n, layout in specs["moe_layers"].items()}
        back, mine = jax.jit(jax.shard_map(there_and_back, in_specs=(specs,), out_specs=(specs, held)))(placed)
    for leaf_name, want in params["moe_layers"].items():
        np.testing.assert_allclose(back["moe_layers"][leaf_name], copies * want, rtol=1e-6, err_msg=leaf_name)
        got = np.asarray(mine[leaf_name]).reshape(holding.layers["moe_layers"].size, *want.shape[1:])
        np.testing.assert_array_equal(got, want[holding.layers["moe_layers"].ravel()], err_msg=leaf_name)
    np.testing.assert_array_equal(back["embed_VD"], params["embed_VD"])


def test_every_split_weight_is_split_over_pipe_and_nothing_changes_without():
    for pipe in (1, 2):
        mesh = make_mesh(small.config((2, 1, 2)).with_(mesh={"pipe": pipe}).mesh, jax.devices()[: 4 * pipe])
        with jax.set_mesh(mesh):
            layouts = [
                layout_of("down_EFD", (5, 8, 4, 16), 8),
                layout_of("down_EFD", (5, 6, 4, 16), 6),
                layout_of("q_a_DA", (5, 16, 4), 8),
                layout_of("norm_D", (5, 16), 8),
            ]
            axes = [str(layout).count("pipe") for layout in layouts]
            assert axes == ([1, 1, 1, 0] if pipe == 2 else [0, 0, 0, 0])


# fmt: skip
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"execution": {"schedule": "dualpipev"}}, "dualpipev fills its pipeline.*take at least 4.*16 / 8 = 2 micro"),
        (
            {"execution": {"schedule": "interleaved"}, "training": {"batch_size": (("constant", 1.0, 24),)}},
            "3 do not divide",
        ),
        ({"execution": {"interleave": 2}}, "execution.interleave = 2 with mesh.pipe = 2.*dualpipev"),
        ({"execution": {"gather": "kept", "remat": "selective"}}, "'kept' with mesh.pipe = 2.*use gather = 'layer'"),
        ({"loss": {"batch_balance_weight": 0.1}}, "batch_balance_weight = 0.1.*is not built.*sequence_balance_weight"),
        ({"model": {"num_layers": 1, "num_mtp_layers": 0}}, "1 layers and 0 MTP layers, too few for 2 stages"),
    ],
)
def test_what_cannot_be_a_pipeline_is_refused(changes, message):
    config = small.config((2, 1, 2)).with_(mesh={"pipe": 2}).with_(**changes)
    with pytest.raises(ValueError, match=message):
        check_fit(config, make_mesh(config.mesh, jax.devices()))

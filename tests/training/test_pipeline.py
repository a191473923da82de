"""A step over a pipeline is the step of one device: every schedule, and experts, MTP, packing and FP8 with some.

Loss, every gradient, norms, counts and biases after one step and after three, as `tests.training.test_equal_steps`. The
table of schedules has dense layers, which compile fast; what else is in a stage runs in seven cells.
"""

import functools
import itertools
from pathlib import Path

import jax
import numpy as np
import pytest

from deepseek_jax.parallel.mesh import check_fit, make_mesh
from deepseek_jax.parallel.stages import program_of
from deepseek_jax.parameters import Weights
from deepseek_jax.pipeline.schedules import SCHEDULES
from deepseek_jax.training import step as step_lib
from deepseek_jax.training.checkpoint import Checkpoints, Progress
from deepseek_jax.training.objective import pretraining
from deepseek_jax.training.state import abstract_state, create_state
from tests.support import small
from tests.training import test_equal_steps as equal

pytestmark = pytest.mark.xdist_group("pipeline")

STEPS = 3
DENSE = {"num_layers": 4, "num_dense_layers": 4, "num_mtp_layers": 0}
MOE = {"num_layers": 2, "num_dense_layers": 1, "num_mtp_layers": 0}
MTP = {"num_layers": 3, "num_dense_layers": 1, "num_mtp_layers": 1}


def config(pipe, sizes=(1, 1, 1), num_cuts=1, model=(), execution=(), **changes):
    """A model as narrow as that of `test_equal_steps`, which does not depend on `pipe`, `sizes` and `num_cuts`."""
    fp8 = dict(execution).get("precision") == "fp8"
    cfg = small.config(sizes, fp8)
    narrow = {} if fp8 else {"width": 32, "vocab_size": equal.VOCAB}
    return cfg.with_(
        model=narrow | dict(model),
        data={} if fp8 else {"sequence_length": equal.LENGTH},
        loss={"sequence_balance_weight": 0.01},
        training={"micro_batch_size": equal.ROWS // num_cuts},
        mesh={"pipe": pipe},
        execution={"remat": "none"} | dict(execution),
        **changes,
    )


def whole_rows(seed):
    """One document a row, without padding."""
    return small.batch(seed, rows=equal.ROWS, length=equal.LENGTH, vocab=equal.VOCAB) | {
        "segment_ids_BS": np.ones((equal.ROWS, equal.LENGTH), np.int32),
        "loss_weights_BS": np.ones((equal.ROWS, equal.LENGTH), np.float32),
    }


@functools.cache
def initial_state(cfg):
    """The initial state on the host."""
    with jax.set_mesh(make_mesh(cfg.mesh, jax.devices()[:1])):
        return jax.device_get(create_state(cfg))


@functools.cache
def run(cfg, batches=equal.batch, steps=STEPS):
    """Take `steps` steps; return (gradients, sums, state, metrics) of the first and of the last."""
    mesh = make_mesh(cfg.mesh, jax.devices()[: cfg.mesh.pipe * cfg.mesh.data * cfg.mesh.node * cfg.mesh.expert])
    check_fit(cfg, mesh)
    recipe = step_lib.recipe_of(cfg, pretraining(cfg), mesh)

    def step(state, arrays, rates):
        grads, sums, norms = step_lib.gradients(recipe, Weights(state["params"], state["router_bias"]), arrays, rates)
        return grads, sums, *step_lib.update(recipe, state, grads, sums, norms, rates)

    alone = cfg.with_(mesh={"pipe": 1, "data": 1, "node": 1, "expert": 1}, execution={"schedule": "1f1b"})
    start = initial_state(alone.with_(training={"micro_batch_size": equal.ROWS}))
    taken = []
    with jax.set_mesh(mesh):
        state = jax.device_put(start, jax.tree.map(lambda leaf: leaf.sharding, abstract_state(cfg, mesh)))
        compiled = jax.jit(step).lower(state, small.put(batches(0)), small.RATES).compile()
        for i in range(steps):
            taken.append(compiled(state, small.put(batches(i)), small.RATES))
            state = taken[-1][2]
        return jax.device_get((taken[0], taken[-1]))


def assert_equal(got, want):
    """Measured: gradients 8e-7 apart in the first step, and 2e-5 in the third."""
    for one, other, tolerance in zip(got, want, (5e-6, 5e-5), strict=True):
        equal.assert_equal_steps(one, other, tolerance)


DENSE_CELLS = [
    pytest.param(name, pipe, id=f"{name}-{pipe}", marks=[] if (name, pipe) == ("dualpipev", 2) else pytest.mark.slow)
    for name, pipe in [(name, 4 if name in ("dualpipe", "interleaved") else 2) for name in SCHEDULES]
]


@pytest.mark.parametrize(("name", "pipe"), DENSE_CELLS)
def test_every_schedule_is_one_device(name, pipe):
    """Stages of one layer, or two of two; DualPipeV's table has every kind of cell, interleaved a ring of four."""
    kinds = {int(kind) for kind in program_of("dualpipev", 2, 8).kind.flat}
    assert kinds == {0, 1, 2, 3, 4, 5}
    model = DENSE | ({"num_layers": 8, "num_dense_layers": 8} if name == "interleaved" else {})
    cfg = config(pipe, num_cuts=8, model=model, execution={"schedule": name})
    assert_equal(run(cfg), run(config(1, model=model)))


# A pair of these is in one of the cells below, is refused by a rule, or was never run: `pairs` says which.
FEATURES = {
    "data": {"mesh": {"data": 2}},
    "expert": {"mesh": {"expert": 2}},
    "node": {"mesh": {"node": 2}},
    "context": {"mesh": {"context": 2}},
    "MTP": {"model": {"num_mtp_layers": 1, "num_layers": 3}},
    "packing": {"data": {"mask_documents": True}},
    "BF16": {"execution": {"precision": "bf16"}},
    "FP8": {"execution": {"precision": "fp8"}},
    "selective": {"execution": {"remat": "selective"}},
    "step": {"execution": {"gather": "step"}},
    "1f1b": {"execution": {"schedule": "1f1b"}},
    "gpipe": {"execution": {"schedule": "gpipe"}},
    "interleaved": {"execution": {"schedule": "interleaved"}, "model": {"num_layers": 4}},
    "zb1p": {"execution": {"schedule": "zb1p"}},
    "dualpipe": {"execution": {"schedule": "dualpipe"}},
    "dualpipev": {"execution": {"schedule": "dualpipev"}, "model": {"num_layers": 4}},
    "interleave": {"execution": {"interleave": 2}},
    "batch-wise": {"loss": {"batch_balance_weight": 0.1}},
}
CHOICES = "schedule", "precision"  # keys that two features may set to different values
FP8 = {"precision": "fp8"}
# A route that rounding flips moves the gradients of experts by some percent, so in BF16 every token takes every expert.
EVERY_EXPERT = {"experts_per_token": 16, "num_groups": 1, "num_kept_groups": 1}
BF16 = {"precision": "bf16"}
CELLS = {
    "data expert MTP packing selective 1f1b": (config(2, (2, 1, 2), 4, MTP, {"remat": "selective"}), equal.batch),
    "node expert step packing 1f1b": (config(2, (1, 2, 2), 4, MOE, {"gather": "step", "remat": "full"}), equal.batch),
    "data step gpipe": (config(2, (2, 1, 1), 4, MOE, {"gather": "step", "schedule": "gpipe"}), whole_rows),
    "MTP packing step dualpipev": (
        config(2, (1, 1, 1), 4, MTP, {"schedule": "dualpipev", "gather": "step"}),
        equal.batch,
    ),
    "expert packing zb1p": (config(2, (1, 1, 2), 2, MOE, {"schedule": "zb1p"}), equal.batch),
    "BF16 data expert MTP packing dualpipev": (
        config(2, (2, 1, 2), 4, MTP | EVERY_EXPERT, BF16 | {"schedule": "dualpipev"}),
        equal.batch,
    ),
    "FP8 packing 1f1b": (config(2, (1, 1, 1), 4, {"num_layers": 2}, FP8), functools.partial(small.batch, length=128)),
}


def features_of(name, cfg, batches):
    """What the name of a cell says must be what its configuration does."""
    has = set(name.split())
    execution = cfg.execution
    found = {axis for axis in ("data", "node", "expert") if getattr(cfg.mesh, axis) > 1}
    found |= {"MTP"} if cfg.model.num_mtp_layers else set()
    found |= {execution.precision.upper()} - {"FP32"}
    found |= {"selective"} & {execution.remat} | {"step"} & {execution.gather}
    found |= {execution.schedule}
    found |= set() if batches is whole_rows else {"packing"}
    assert has == found, name
    return has


def pairs():
    """Return {(feature, feature): "equal", "refused: ...", "either", or "" for what no cell has together}."""
    table = {}
    tested = [features_of(name, *cell) for name, cell in CELLS.items()]
    tested += [{name, "packing"} for name in SCHEDULES]  # with dense layers
    for both in itertools.combinations_with_replacement(FEATURES, 2):
        chosen = [[FEATURES[feature].get("execution", {}).get(key) for feature in both] for key in CHOICES]
        if any(one and other and one != other for one, other in chosen):
            table[both] = "either"
            continue
        changes = {}
        for feature in both:
            for section, values in FEATURES[feature].items():
                changes[section] = changes.get(section, {}) | values
        cfg = small.config((1, 1, 1), fp8="FP8" in both).with_(mesh={"pipe": 2}, training={"micro_batch_size": 4})
        cfg = cfg.with_(**changes)
        sizes = [getattr(cfg.mesh, axis) for axis in ("pipe", "data", "context", "node", "expert")]
        try:
            check_fit(cfg, make_mesh(cfg.mesh, jax.devices()[: np.prod(sizes)]))
        except ValueError as error:
            table[both] = f"refused: {error}"
        else:
            table[both] = "equal" if any(set(both) <= features for features in tested) else ""
    return table


def table_of_pairs():
    """The table of docs/pipeline.md: =, refused, - for one or the other, or empty."""
    table = pairs()
    names = list(FEATURES)
    signs = {"equal": "=", "either": "-", "": ""}
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for i, row in enumerate(names):
        cells = [table[names[j], row] if j <= i else None for j in range(len(names))]
        lines.append(f"| {row} | {' | '.join('' if c is None else signs.get(c, 'refused') for c in cells)} |")
    return "\n".join(lines)


def test_docs_have_the_table_of_pairs():
    """Of what runs together with a pipeline; what is refused says why."""
    assert table_of_pairs() in (Path(__file__).parents[2] / "docs" / "pipeline.md").read_text(), table_of_pairs()
    refused = {both: text for both, text in pairs().items() if text.startswith("refused")}
    assert {feature for feature in FEATURES if (feature, feature) in refused} == {"context", "interleave", "batch-wise"}
    assert all("with mesh.pipe = 2" in text for text in refused.values())


def distances(got, want):
    """Return {path: relative L2 distance} of gradients."""
    apart = jax.tree.map(lambda one, other: np.linalg.norm(one - other) / np.linalg.norm(other), got, want)
    return {jax.tree_util.keystr(path): value for path, value in jax.tree_util.tree_leaves_with_path(apart)}


def assert_near(got, want):
    """A step in FP8, where another sum moves a number to the next one: measured 6e-5 in one leaf, 0 in most."""
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(got[3][name], want[3][name], rtol=1e-5, err_msg=name)
    for path, apart in distances(got[0], want[0]).items():
        assert apart <= 5e-4, (path, apart)


def assert_as_near(got, alone, want):
    """In BF16 each gradient is as far from FP32 as that of one device: measured 0.85 to 1.36 times."""
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(got[3][name], want[3][name], rtol=1e-3, err_msg=name)
    mine, other = distances(got[0], want[0]), distances(alone[0], want[0])
    for path, apart in mine.items():
        assert apart <= 1.5 * other[path] <= 0.03, (path, apart, other[path])


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_what_is_in_a_stage_is_that_of_one_device(name):
    """In FP8 one device has the same micro-batches: the scales of weights' gradients are of 128 tokens."""
    cfg, batches = CELLS[name]
    fp8, bf16 = (cfg.execution.precision == precision for precision in ("fp8", "bf16"))
    alone = cfg.with_(
        mesh={"pipe": 1, "data": 1, "node": 1, "expert": 1},
        training={} if fp8 else {"micro_batch_size": equal.ROWS},
        execution={"schedule": "1f1b", "gather": "layer", "remat": "none"},
    )
    got, want = (run(c, batches, 1 if fp8 or bf16 else STEPS) for c in (cfg, alone))
    if fp8:
        assert_near(got[0], want[0])
    elif bf16:
        assert_as_near(got[0], want[0], run(alone.with_(execution={"precision": "fp32"}), batches, 1)[0])
    else:
        assert_equal(got, want)


@pytest.mark.slow
def test_dims_that_do_not_divide():
    """Half of a width of 28 lies on two of the four devices of a stage; each part is stored twice."""
    cfg = config(2, (2, 1, 2), 4, MOE | {"width": 28}, {"gather": "layer"})
    assert_equal(run(cfg), run(config(1, model=MOE | {"width": 28})))


def test_a_checkpoint_of_a_pipeline_is_one_of_any_mesh(tmp_path):
    """Saved on (pipe 2, data 2), restored on (data 4) and on another pipeline, bit for bit."""
    cfg = config(2, (2, 1, 1), 4, MOE)
    rng, saved = np.random.default_rng(0), None
    for pipe, data in ((2, 2), (1, 4), (4, 1)):
        other = cfg.with_(mesh={"pipe": pipe, "data": data})
        mesh = make_mesh(other.mesh, jax.devices()[:4])
        checkpoints = Checkpoints(tmp_path, 1)
        with jax.set_mesh(mesh):
            shapes = abstract_state(other, mesh)
            if saved is None:
                saved = jax.tree.map(lambda leaf: rng.integers(0, 9, leaf.shape).astype(leaf.dtype), shapes)
                placed = jax.tree.map(lambda a, leaf: jax.device_put(a, leaf.sharding), saved, shapes)
                checkpoints.save(placed, Progress(step=1, tokens_seen=1, data={}), other, {}, mesh)
            else:
                restored = checkpoints.restore(shapes, mesh)[0]
                jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), saved)
        checkpoints.close()


def test_evaluation_on_a_pipeline_is_that_of_one_device():
    """Each device of a pipeline runs all layers, and one of them counts; those that share rows count their tokens."""
    sums = []
    for pipe, data, context in ((1, 1, 1), (2, 2, 1), (1, 1, 2)):
        cfg = config(pipe, (data, 1, 1), 1, MTP).with_(mesh={"context": context})
        mesh = make_mesh(cfg.mesh, jax.devices()[: pipe * data * context])
        with jax.set_mesh(mesh):
            shapes = abstract_state(cfg, mesh)
            rng = np.random.default_rng(0)
            state = jax.tree.map(lambda leaf, rng=rng: 0.05 * rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)
            weights = jax.tree.map(
                lambda a, leaf: jax.device_put(a, leaf.sharding),
                Weights(state["params"], state["router_bias"]),
                Weights(shapes["params"], shapes["router_bias"]),
            )
            evaluate = step_lib.jit_eval_step(cfg, pretraining(cfg), mesh)
            sums.append(jax.device_get(evaluate(weights, small.put(equal.batch(0)))))
    for other in sums[1:]:
        for name in ("loss_sum", "mtp_loss_sum"):
            np.testing.assert_allclose(other[name], sums[0][name], rtol=1e-6)
        np.testing.assert_array_equal(other["weight_sum"], sums[0]["weight_sum"])
        np.testing.assert_array_equal(other["counts_LE"], sums[0]["counts_LE"])

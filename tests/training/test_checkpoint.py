"""Checkpoints: bit equality on any mesh, damage of every kind, full disks, and what a kill leaves behind."""

import contextlib
import copy
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from configs.deepseek_v3 import get_config
from deepseek_jax.config import from_config_dict
from deepseek_jax.training import checkpoint, pretrain
from deepseek_jax.training.checkpoint import Checkpoints, Progress, SaveError
from deepseek_jax.training.fingerprint import fingerprints

# What one worker made or compiled, its other tests use.
pytestmark = [pytest.mark.xdist_group("checkpoint"), pytest.mark.usefixtures("absl_to_caplog")]

CONFIG = from_config_dict(get_config())
TOKENIZER = {"tokenizer.json": '{"vocab": ["a", "é"]}', "tokenizer_config.json": "{}"}


def make_mesh(data: int, expert: int) -> jax.sharding.Mesh:
    return jax.make_mesh((data, expert), ("data", "expert"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)


def make_state(mesh: jax.sharding.Mesh, seed: int) -> dict:
    generator = np.random.default_rng(seed)

    def put(value, *spec):
        return jax.device_put(np.asarray(value), NamedSharding(mesh, jax.P(*spec)))

    def normal(*shape):
        return generator.normal(size=shape).astype(np.float32)

    params = {"w_EDF": put(normal(8, 32, 128), "expert", "data"), "norm_D": put(normal(16)), "flag": put([True, False])}
    moments = {name: value.astype(jnp.bfloat16) for name, value in params.items()}
    return {
        "params": params,
        "router_bias": {"bias_E": put(normal(3, 8), None, "expert")},
        "optimizer": (optax.ScaleByAdamState(count=put(np.int32(seed)), mu=moments, nu=moments), optax.EmptyState()),
        "step": put(np.int32(seed)),
    }


def abstract(state: dict) -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def equal(a: dict, b: dict) -> bool:
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y)), a, b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(jax.tree.leaves(same))


@contextlib.contextmanager
def opened(workdir, keep=2):
    checkpoints = Checkpoints(workdir, keep)
    yield checkpoints
    checkpoints.close()


def write(workdir, steps, mesh, keep=2) -> None:
    with jax.set_mesh(mesh), opened(workdir, keep) as checkpoints:
        for step in steps:
            progress = Progress(step=step, tokens_seen=step * 2**40, data={"row": step})
            checkpoints.save(make_state(mesh, step), progress, CONFIG, TOKENIZER, mesh)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A workdir with the checkpoints of steps 1, 2 and 3, of which retention has removed the first."""
    workdir = tmp_path_factory.mktemp("run")
    write(workdir, (1, 2, 3), make_mesh(2, 4))
    return workdir


@pytest.fixture
def workdir(original, tmp_path):
    return shutil.copytree(original, tmp_path / "run")


def restore(workdir, mesh, step=None, keep=2):
    with jax.set_mesh(mesh), opened(workdir, keep) as checkpoints:
        return checkpoints.restore(abstract(make_state(mesh, 0)), mesh, step)


@pytest.mark.parametrize("shape", [(2, 4), (1, 8), (4, 2), (1, 1)])
def test_restores_bit_equal_onto_any_mesh(original, shape, caplog):
    mesh = make_mesh(*shape)
    state, progress, tokenizer = restore(original, mesh)
    expected = make_state(mesh, 3)
    assert equal(state, expected)
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, abstract(expected))
    assert progress == Progress(step=3, tokens_seen=3 * 2**40, data={"row": 3})
    assert tokenizer == TOKENIZER
    assert ("mesh = " in caplog.text) == (shape != (2, 4))


def test_retention_keeps_the_newest(original):
    with opened(original, None) as checkpoints:
        assert checkpoints.steps() == [2, 3]


def test_a_part_of_the_state_is_read_alone(original):
    mesh = make_mesh(1, 8)
    whole = make_state(mesh, 3)
    part = {name: whole[name] for name in ("params", "router_bias")}
    with jax.set_mesh(mesh), opened(original, None) as checkpoints:
        state, _, _ = checkpoints.restore(abstract(part), mesh)
    assert equal(state, part)


def test_no_checkpoint_is_no_state(tmp_path):
    assert restore(tmp_path, make_mesh(1, 1)) is None
    with pytest.raises(ValueError, match="experiments.train"):
        Checkpoints(tmp_path / "elsewhere", None)


def test_an_absent_step_is_refused(original):
    with pytest.raises(ValueError, match=r"no checkpoint of step 1; it has \[2, 3\]"):
        restore(original, make_mesh(1, 1), step=1)


def test_fingerprints_see_one_bit_and_not_the_mesh():
    states = [make_state(make_mesh(*shape), 5) for shape in ((2, 4), (8, 1))]
    before = fingerprints(states[0])
    assert before == fingerprints(states[1])
    array = np.array(states[0]["params"]["w_EDF"])
    for index in np.random.default_rng(0).integers(array.size, size=20):
        flipped = copy.copy(array)
        flipped.reshape(-1).view(np.uint32)[index] ^= np.uint32(1 << (index % 32))
        assert fingerprints({"x": flipped}) != fingerprints({"x": array})
    assert fingerprints({"x": array[::-1]}) != fingerprints({"x": array})


def flip(path, generator):
    content = bytearray(path.read_bytes())
    content[generator.integers(len(content))] ^= 1 << generator.integers(8)
    path.write_bytes(content)


DAMAGE = {
    "flip": flip,
    "truncate": lambda path, _: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "delete": lambda path, _: path.unlink(),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_any_file_is_harmless_or_detected(original, tmp_path, kind, caplog):
    mesh, generator = make_mesh(2, 4), np.random.default_rng(1)
    names = sorted(path.relative_to(original) for path in (original / "checkpoints" / "3").rglob("*") if path.is_file())
    detected = 0
    for number, name in enumerate(names):
        workdir = shutil.copytree(original, tmp_path / str(number))
        DAMAGE[kind](workdir / name, generator)
        caplog.clear()
        state, progress, tokenizer = restore(workdir, mesh)
        assert equal(state, make_state(mesh, progress.step)) and tokenizer == TOKENIZER, name
        if progress.step == 2:
            detected += 1
            assert f"{workdir / 'checkpoints' / '3'} is damaged" in caplog.text
            assert (workdir / "checkpoints" / "damaged" / "3").exists()
            write(workdir, (3,), mesh)  # the way is free for the run that continues
    assert detected >= 5  # the arrays, their index, the record and the tokenizer


def test_a_flipped_bit_that_decodes_is_seen_by_the_fingerprints(original, tmp_path, caplog):
    """Arrays are compressed without a checksum, so Orbax and TensorStore read many a flipped bit as a value."""
    mesh, generator = make_mesh(2, 4), np.random.default_rng(2)
    largest = max((original / "checkpoints" / "3").rglob("*"), key=lambda path: path.stat().st_size).relative_to(
        original
    )
    for number in range(8):
        workdir = shutil.copytree(original, tmp_path / str(number))
        flip(workdir / largest, generator)
        state, progress, _ = restore(workdir, mesh)
        assert equal(state, make_state(mesh, progress.step))
    assert "arrays have changed" in caplog.text


def test_no_intact_checkpoint_is_refused_and_nothing_moved(workdir):
    for step in ("2", "3"):
        (workdir / "checkpoints" / step / "run" / "metadata").write_text("{")
    with pytest.raises(ValueError, match=r"(?s)no intact .*checkpoints/3: .*checkpoints/2: .*another --workdir"):
        restore(workdir, make_mesh(2, 4))
    with opened(workdir, None) as checkpoints:
        assert checkpoints.steps() == [2, 3]


def test_who_only_reads_leaves_a_damaged_checkpoint_where_it_is(workdir):
    (workdir / "checkpoints" / "3" / "run" / "metadata").write_text("{")
    assert restore(workdir, make_mesh(2, 4), keep=None)[1].step == 2
    assert (workdir / "checkpoints" / "3").exists() and not (workdir / "checkpoints" / "damaged").exists()


def test_a_damaged_step_asked_for_by_number_names_the_others(workdir):
    (workdir / "checkpoints" / "3" / "run" / "metadata").write_text("{")
    with pytest.raises(ValueError, match=r"(?s)checkpoints/3: .*the others are \[2\]"):
        restore(workdir, make_mesh(2, 4), step=3)


def test_leftovers_of_an_unfinished_save_are_removed(workdir):
    leftover = shutil.copytree(workdir / "checkpoints" / "3", workdir / "checkpoints" / "4.orbax-checkpoint-tmp")
    with opened(workdir, None):
        assert leftover.exists()  # a reader removes nothing: the run may be writing
    _, progress, _ = restore(workdir, make_mesh(2, 4))
    assert progress.step == 3 and not leftover.exists()


def test_a_half_deleted_old_checkpoint_does_no_harm(workdir):
    """Retention was killed while it removed an old checkpoint."""
    shutil.rmtree(workdir / "checkpoints" / "2" / "state")
    mesh = make_mesh(2, 4)
    assert restore(workdir, mesh)[1].step == 3
    write(workdir, (4, 5), mesh)
    with opened(workdir, None) as checkpoints:
        assert checkpoints.steps() == [4, 5]


def test_a_full_disk_while_saving_is_a_clear_error(workdir):
    """A limit on the size of files makes real writes fail in the background, as a full disk does, without a mount."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    mesh = make_mesh(2, 4)
    checkpoints = Checkpoints(workdir, 3)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with jax.set_mesh(mesh), pytest.raises(SaveError, match="(?s)File too large.*step 3 is intact.*ulimit -f"):
            checkpoints.save(make_state(mesh, 4), Progress(step=4, tokens_seen=4, data=None), CONFIG, TOKENIZER, mesh)
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    state, progress, _ = restore(workdir, mesh)
    assert progress.step == 3 and equal(state, make_state(mesh, 3))


def begin(workdir, config, mesh):
    """Continue as a trainer does."""
    with jax.set_mesh(mesh), opened(workdir) as checkpoints:
        shapes = abstract(make_state(mesh, 0))
        return pretrain.begin(checkpoints, config, workdir, mesh, shapes, lambda: pytest.fail("a silent restart"))


def test_a_checkpoint_of_another_config_is_refused(workdir, caplog):
    """config.json is lost, or only the checkpoints were copied."""
    mesh = make_mesh(2, 4)
    assert begin(workdir, CONFIG, mesh)[1].step == 3
    assert begin(workdir, CONFIG.with_(mesh={"data": 2}), mesh)[1].step == 3
    assert "mesh.data: -1 in the checkpoint of step 3, 2 given" in caplog.text
    for section, value in (("optimizer", {"b2": 0.9}), ("training", {"batch_size": (("constant", 1.0, 128.0),)})):
        with pytest.raises(ValueError, match=rf"{section}\.{next(iter(value))}: .* of step 3, .* given"):
            begin(workdir, CONFIG.with_(**{section: value}), mesh)
    with pytest.raises(ValueError, match="less than the 3,298,534,883,328 tokens"):
        begin(workdir, CONFIG.with_(training={"num_tokens": 1e12}), mesh)
    assert begin(workdir, CONFIG.with_(training={"num_tokens": 2e13}), mesh)[1].tokens_seen == 3 * 2**40
    assert "from 14,800,000,000,000 to 20,000,000,000,000" in caplog.text
    assert not (workdir / "checkpoints" / "damaged").exists()


LOSSES = {
    "deleted": lambda folder: shutil.rmtree(folder),
    "emptied": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    "a link to an empty folder": lambda folder: (shutil.rmtree(folder), folder.symlink_to(folder.parent / "empty")),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_that_lost_its_checkpoints_does_not_start_again(workdir, loss):
    (workdir / "empty").mkdir()
    LOSSES[loss](workdir / "checkpoints")
    before = sorted(workdir.rglob("*"))
    for keep in (2, None):
        with pytest.raises(ValueError, match=r"gone: .*saved\.json says that step 3 was saved"):
            Checkpoints(workdir, keep)
    assert sorted(workdir.rglob("*")) == before


def test_a_run_that_died_before_its_first_checkpoint_starts_again(tmp_path):
    mesh = make_mesh(1, 1)
    (tmp_path / "checkpoints" / f"1{checkpoint.TMP_SUFFIX}").mkdir(parents=True)  # killed in its first save
    assert restore(tmp_path, mesh) is None
    write(tmp_path, (1,), mesh)
    assert json.loads((tmp_path / "saved.json").read_text()) == {"step": 1}


def test_the_first_complete_save_is_noted_while_the_run_goes_on(tmp_path):
    mesh = make_mesh(1, 1)
    with jax.set_mesh(mesh), opened(tmp_path) as checkpoints:
        checkpoints.save(make_state(mesh, 1), Progress(step=1, tokens_seen=1, data=None), CONFIG, TOKENIZER, mesh)
        while not (tmp_path / "saved.json").exists():
            checkpoints.check()
        assert checkpoints.steps() == [1] and (tmp_path / "checkpoints" / "1").is_dir()


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/damaged"])
@pytest.mark.parametrize("kind", ["is a file", "is a link to a folder that does not exist"])
def test_what_is_in_the_way_of_checkpoints_is_refused(workdir, name, kind):
    path = workdir / name
    if name == "checkpoints":
        path.rename(workdir / "elsewhere")
    path.write_text("") if "file" in kind else path.symlink_to(workdir / "gone")
    for keep in (2, None):
        with pytest.raises(ValueError, match=f"{path} {kind}"):
            Checkpoints(workdir, keep)


def test_a_reader_takes_the_newest_when_the_run_removes_what_it_reads(workdir, caplog, monkeypatch):
    """The run keeps one checkpoint: while the reader opens step 3, step 4 is complete and step 3 goes."""
    mesh = make_mesh(2, 4)
    read = Checkpoints._read_arrays

    def late(self, step, shapes):
        if step == 3:
            write(workdir, (4,), mesh, keep=1)
        return read(self, step, shapes)

    monkeypatch.setattr(Checkpoints, "_read_arrays", late)
    state, progress, _ = restore(workdir, mesh, keep=None)
    assert progress.step == 4 and equal(state, make_state(mesh, 4))
    assert "damaged" not in caplog.text
    with pytest.raises(ValueError, match=r"has no checkpoint of step 3; it has \[4\]"):
        restore(workdir, mesh, step=3, keep=None)

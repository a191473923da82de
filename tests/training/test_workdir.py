"""The workdir: one writer, one configuration, and nothing left by a start that failed."""

import os
import re
import shutil

import jax
import pytest

from configs.deepseek_v3 import get_config as get_v3
from deepseek_jax.config import from_config_dict
from deepseek_jax.data.bpe import byte_tokenizer, train_bpe
from deepseek_jax.locks import LOCK
from deepseek_jax.parallel.mesh import AXES
from deepseek_jax.parallel.watch import ProcessError
from deepseek_jax.training import pretrain, workdir
from deepseek_jax.training.continuation import check_continues, check_length, say_division
from deepseek_jax.training.workdir import (
    TOKENIZER_RECORD,
    check_workdir,
    claim_workdir,
    occupied,
    put_tokenizer,
    read_config,
    read_tokenizer,
)

pytestmark = pytest.mark.usefixtures("absl_to_caplog")

CONFIG = from_config_dict(get_v3())
TOKENIZER = {"tokenizer.json": '{"vocab": ["a", "é"]}', "tokenizer_config.json": "{}"}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(workdir, "WAIT_SECONDS", 0.0)


def tree(folder) -> dict:
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*") if path.name != LOCK}


# --- one writer ---------------------------------------------------------------------------------------------------


def test_a_second_trainer_is_refused_at_the_door(tmp_path):
    run = tmp_path / "run"
    with occupied(run):
        claim_workdir(run, CONFIG)
        (run / "metrics.jsonl").write_text('{"step": 1, "tokens_seen": 1}\n')
        (run / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)  # a save of the first one
        before = tree(run)
        with pytest.raises(ValueError, match=rf"run is in use by process {os.getpid()} on host .* since"):
            pretrain.train(CONFIG, run)
        assert tree(run) == before
    assert tree(run) == before
    assert not (run / LOCK).exists()


BAD_FOLDERS = {
    "is a file": lambda folder: folder / "file",
    "cannot be made: Not a directory": lambda folder: folder / "file" / "run",
    "cannot be made: File name too long": lambda folder: folder / ("x" * 300),
    "a link to a folder that does not exist": lambda folder: folder / "link",
    "cannot be made: No such file": lambda _: workdir.Path("/proc/run"),
    "/dev/null/run cannot be made": lambda _: workdir.Path("/dev/null/run"),
}


@pytest.mark.parametrize("message", BAD_FOLDERS)
def test_what_cannot_be_a_workdir_is_refused(message, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message), occupied(BAD_FOLDERS[message](tmp_path)):
        pass
    assert sorted(tmp_path.rglob("*")) == before


# --- what a failed start leaves -----------------------------------------------------------------------------------


def test_a_start_that_fails_leaves_no_workdir(tmp_path):
    run = tmp_path / "runs" / "a"
    with pytest.raises(ValueError, match="bad"), occupied(run):
        put_tokenizer(run, TOKENIZER)
        (run / "checkpoints").mkdir()
        raise ValueError("bad")
    assert not list(tmp_path.iterdir())


def test_a_start_that_fails_removes_only_what_it_made(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "scratch").mkdir()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "scratch")
    before = tree(tmp_path)
    with pytest.raises(KeyboardInterrupt), occupied(tmp_path):
        put_tokenizer(tmp_path, TOKENIZER)
        raise KeyboardInterrupt
    assert tree(tmp_path) == before
    with pytest.raises(KeyboardInterrupt), occupied(tmp_path):
        (tmp_path / "tokens-0123").mkdir()  # known by its content
        raise KeyboardInterrupt
    assert (tmp_path / "tokens-0123").exists()


def test_a_run_that_owns_its_workdir_keeps_everything_after_an_error(tmp_path):
    with pytest.raises(ValueError, match="bad"), occupied(tmp_path):
        put_tokenizer(tmp_path, TOKENIZER)
        claim_workdir(tmp_path, CONFIG)
        raise ValueError("bad")
    assert read_tokenizer(tmp_path) == TOKENIZER and read_config(tmp_path) == CONFIG


def test_the_tokenizer_of_a_killed_start_is_made_anew(tmp_path, caplog):
    put_tokenizer(tmp_path, TOKENIZER)
    (tmp_path / LOCK).write_text("process 1 on host x since then")  # the system has released its lock
    with occupied(tmp_path):
        assert not (tmp_path / "tokenizer.json").exists()
    assert "was killed" in caplog.text


def test_a_tokenizer_of_unknown_origin_is_refused_and_kept(tmp_path):
    put_tokenizer(tmp_path, TOKENIZER)
    with pytest.raises(ValueError, match=r"holds tokenizer\.json but no run"), occupied(tmp_path):
        pass
    assert read_tokenizer(tmp_path) == TOKENIZER
    (tmp_path / TOKENIZER_RECORD).write_text("{}")  # the next start compares it
    with occupied(tmp_path):
        assert read_tokenizer(tmp_path) == TOKENIZER


# --- whose configuration ------------------------------------------------------------------------------------------


def test_another_config_is_refused_with_each_difference(tmp_path):
    claim_workdir(tmp_path, CONFIG)
    check_workdir(tmp_path, CONFIG)
    with pytest.raises(ValueError, match="model.width: 7168 in the workdir, 512 given") as caught:
        check_workdir(tmp_path, CONFIG.with_(model={"width": 512}, optimizer={"b1": 0.5}, mesh={"data": 3}))
    assert "optimizer.b1: 0.9 in the workdir, 0.5 given" in str(caught.value)
    assert "another --workdir" in str(caught.value)
    with pytest.raises(ValueError, match="holds a run with another config; leave --config out:"):
        check_workdir(tmp_path, CONFIG.with_(model={"width": 512}), "leave --config out")
    assert "mesh.data" not in str(caught.value)  # it may differ, so it is no reason
    with pytest.raises(ValueError, match="execution.precision: 'fp8' in the workdir, 'bf16' given"):
        check_workdir(tmp_path, CONFIG.with_(execution={"precision": "bf16"}))


def test_what_does_not_change_the_run_may_change(tmp_path, caplog):
    claim_workdir(tmp_path, CONFIG)
    check_workdir(tmp_path, CONFIG.with_(mesh={"expert": 4}, training={"log_every": 7}))
    assert "mesh.expert: 8 in the workdir, 4 given" in caplog.text


def test_checking_makes_nothing(tmp_path):
    check_workdir(tmp_path / "new", CONFIG)
    assert not (tmp_path / "new").exists()


def moved(config, path: str, **values):
    return config.with_(data={"sources": tuple(type(s)(path=path, weight=1.0) for s in config.data.sources), **values})


def test_a_corpus_may_move_once_there_is_a_checkpoint(tmp_path):
    """The loader then compares the content; before that nothing would."""
    claim_workdir(tmp_path, CONFIG)
    with pytest.raises(ValueError, match=r"data\.sources"):
        check_workdir(tmp_path, moved(CONFIG, "elsewhere"))
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    check_workdir(tmp_path, moved(CONFIG, "elsewhere"))
    twice = CONFIG.with_(data={"sources": CONFIG.data.sources * 2})
    with pytest.raises(ValueError, match=r"data\.sources"):
        check_workdir(tmp_path, twice)


def test_a_tokenizer_may_move_and_not_change(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    byte_tokenizer().save(run / "tokenizer.json")
    byte_tokenizer().save(tmp_path / "moved.json")
    train_bpe(["aa aa aa bb bb"], 270).save(tmp_path / "other.json")
    config = CONFIG.with_(data={"tokenizer": "/old/tokenizer.json"})
    claim_workdir(run, config)
    (run / "checkpoints" / "5").mkdir(parents=True)
    check_workdir(run, config)
    check_workdir(run, config.with_(data={"tokenizer": str(tmp_path / "moved.json")}))
    with pytest.raises(ValueError, match="another tokenizer"):
        check_workdir(run, config.with_(data={"tokenizer": str(tmp_path / "other.json")}))
    with pytest.raises(ValueError, match=r"data\.tokenizer: '/old"):
        check_workdir(run, config.with_(data={"tokenizer": "byte"}))


def test_a_stored_config_with_other_keys_is_compared_as_it_is(tmp_path):
    with pytest.raises(ValueError, match=r"seed: \(absent\) in the checkpoint, 0 given(?s:.*)and \d+ more$"):
        check_continues({"model": 1}, CONFIG, tmp_path, "the checkpoint", trained=True)


def test_another_length_says_what_it_does_to_the_schedules(caplog):
    linear = CONFIG.with_(optimizer={"learning_rate": (("linear", 1.0, 0.0),), "warmup_steps": 0})
    linear = linear.with_(
        optimizer={"learning_rate": (("constant", 0.5, 1.0), ("linear", 1.0, 0.0))}, training={"num_tokens": 1000.0}
    )
    stored = {"training": {"num_tokens": 1000.0}}
    check_length(stored, linear, 9, 750)
    assert not caplog.text
    check_length(stored, linear.with_(training={"num_tokens": 1500.0}), 9, 1000)
    assert "from 1,000 to 1,500" in caplog.text
    assert re.search(r"at token 1,000 optimizer\.learning_rate goes from 0 to 0\.66", caplog.text)
    check_length(stored, linear.with_(training={"num_tokens": 800.0}), 9, 800)
    with pytest.raises(ValueError, match="is less than the 801 tokens .* add --config.training.num_tokens=1000,"):
        check_length(stored, linear.with_(training={"num_tokens": 800.0}), 9, 801)
    check_length(stored, linear, 9, 1001)  # the last batch of a complete run ends beyond its length


DIVISIONS = {
    "fewer": (
        (4, 8, 8),
        r"4 devices share a micro-batch of 8 .* before 8 one of 8: .* take 2 times .*; (.*) keeps them",
    ),
    "fewer, smaller": ((4, 4, 16), ""),
    "fewer, smaller, evaluated as often": ((4, 4, 8), r"read 32 sequences, before 64; (.*) keeps them comparable"),
    "as many, larger": ((8, 16, 8), r"8 devices share a micro-batch of 16 .* take 2 times .*; (.*) keeps them"),
    "more": ((16, 16, 4), ""),
    "of no batch": (
        (5, 20, 8),
        r"5 devices share a micro-batch of 20 .* 4 times the memory of a device\n.* read 160 sequences, before 64$",
    ),
    "another pipeline": ((4, 8, 8, 2), r"mesh\.pipe = 2, before 1: the memory of a device cannot be compared$"),
    "another pipeline, larger": (
        (4, 16, 8, 2),
        r"cannot be compared\n.* read 128 sequences, before 64; .*eval_batches=4 keeps them comparable$",
    ),
}


@pytest.mark.parametrize(("given", "says"), DIVISIONS.values(), ids=DIVISIONS)
def test_another_number_of_devices_says_what_keeps_the_memory(given, says, caplog):
    """The record is of 8 devices, micro-batches of 8 and 8 of them an evaluation; the flags that it names are quiet."""
    devices, size, batches, *pipe = given
    config = CONFIG.with_(
        training={"batch_size": (("constant", 1.0, 48),), "micro_batch_size": size, "eval_batches": batches}
    )
    record = {
        "config": {"training": {"micro_batch_size": 8, "eval_batches": 8}},
        "environment": {"mesh": {"pipe": 1, "data": 4, "node": 1, "expert": 2, "tensor": 1}},
    }
    mesh = jax.sharding.AbstractMesh((*(pipe or (1,)), devices, 1, 1, 1, 1), AXES)
    say_division(record, config, mesh)
    lines = dict.fromkeys(caplog.text.splitlines())  # absl's logger has two handlers here
    assert len(lines) == says.count(r"\n") + bool(says)
    found = re.search(says, "\n".join(lines)) if says else None
    assert bool(found) == bool(caplog.text)
    if found and found.groups():
        flags = dict(re.findall(r"training\.(\w+)=(\d+)", found[1]))
        caplog.clear()
        say_division(record, config.with_(training={name: int(value) for name, value in flags.items()}), mesh)
        assert flags and not caplog.text


def test_no_micro_batch_is_named_that_a_run_refuses(caplog):
    """Eight devices shared the tokens of two rows. A row of them cannot be divided among four."""
    record = {
        "config": {"training": {"micro_batch_size": 2, "eval_batches": 8}},
        "environment": {"mesh": {"pipe": 1, "data": 2, "context": 4, "node": 1, "expert": 1, "tensor": 1}},
    }
    config = CONFIG.with_(training={"batch_size": (("constant", 1.0, 48),), "micro_batch_size": 4, "eval_batches": 4})
    say_division(record, config, jax.sharding.AbstractMesh((1, 4, 1, 1, 1, 1), AXES))
    assert caplog.text.strip().endswith("activations take 4 times the memory of a device")


# --- damaged files ------------------------------------------------------------------------------------------------

BAD_CONFIGS = {
    "not valid JSON": lambda path: path.write_text('{"name":'),
    "nested too deeply": lambda path: path.write_text("[" * 200_000),
    "not UTF-8": lambda path: path.write_bytes(b'{"name": "caf\xe9"}'),
    "holds a list": lambda path: path.write_text("[]"),
    "lacks": lambda path: path.write_text("{}"),
    "is a folder": lambda path: path.mkdir(),
    "is a FIFO": os.mkfifo,
    "No such file": lambda path: path.symlink_to("gone"),
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_a_damaged_config_is_refused(message, tmp_path):
    BAD_CONFIGS[message](tmp_path / "config.json")
    for read in (lambda: read_config(tmp_path), lambda: check_workdir(tmp_path, CONFIG)):
        with pytest.raises(ValueError, match=rf"config\.json.* {message}|config\.json.*{message}"):
            read()


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no run.*experiments.train"):
        read_config(tmp_path)
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no run: config.json is missing; train on with"):
        read_config(tmp_path)


def test_a_link_at_the_old_temporary_name_is_not_followed(tmp_path):
    foreign = tmp_path / "foreign"
    foreign.write_text("theirs")
    (tmp_path / "config.json.tmp").symlink_to(foreign)
    (tmp_path / "config.json").symlink_to(foreign)
    claim_workdir(tmp_path, CONFIG)
    assert foreign.read_text() == "theirs" and read_config(tmp_path) == CONFIG


def test_the_tokenizer_comes_back_and_another_one_is_refused(tmp_path):
    put_tokenizer(tmp_path, TOKENIZER)
    assert read_tokenizer(tmp_path) == TOKENIZER
    put_tokenizer(tmp_path, TOKENIZER)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not the tokenizer of the checkpoint"):
        put_tokenizer(tmp_path, TOKENIZER)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    for read in (lambda: put_tokenizer(tmp_path, TOKENIZER), lambda: read_tokenizer(tmp_path)):
        with pytest.raises(ValueError, match=r"tokenizer\.json is not UTF-8"):
            read()
    shutil.rmtree(tmp_path)
    with pytest.raises(ValueError, match="No such file"):
        read_tokenizer(tmp_path)


def test_all_processes_of_a_run_hear_of_a_disk_that_fails(tmp_path, monkeypatch):
    """The first process raised its OSError before it had told the others, which waited for it."""
    said = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(workdir.multihost_utils, "broadcast_one_to_all", lambda text: said.append(text) or text)
    monkeypatch.setattr(workdir, "locked", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left", "a\udce9")))
    with pytest.raises(OSError, match="No space left"), occupied(tmp_path):
        pass
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(workdir.multihost_utils, "broadcast_one_to_all", lambda _: said[0])
    with pytest.raises(ProcessError, match="first process cannot use the workdir: .*No space left"), occupied(tmp_path):
        pass


def test_all_processes_of_a_run_hear_of_a_refusal(tmp_path, monkeypatch):
    """The first process has the lock; the others wait for its word."""
    said = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(workdir.multihost_utils, "broadcast_one_to_all", lambda text: said.append(text) or text)
    with occupied(tmp_path), pytest.raises(ValueError, match="in use by process"), occupied(tmp_path):
        pass
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(workdir.multihost_utils, "broadcast_one_to_all", lambda _: said[1])
    with pytest.raises(ValueError, match="in use by process"), occupied(tmp_path):
        pass
    monkeypatch.setattr(workdir.multihost_utils, "broadcast_one_to_all", lambda _: said[0])
    with occupied(tmp_path):
        assert not (tmp_path / LOCK).exists()

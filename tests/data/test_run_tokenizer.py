"""The tokenizer in a workdir: used where it is the run's, made again where a failed start left another."""

import os
import threading

import pytest

from deepseek_jax.data import bpe as bpe_module
from deepseek_jax.data.bpe import byte_tokenizer, train_bpe
from deepseek_jax.data.pipeline import open_tokenizer
from deepseek_jax.data.run_tokenizer import RECORD, make_tokenizer
from deepseek_jax.data.tokenizer import Tokenizer
from tests.support.patience import SECONDS


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text("".join(f"word{j} of {i * j}\n" for j in range(20)))
    return folder


def test_the_tokenizer_of_a_failed_start_is_not_the_next_ones(tmp_path, make_config, corpus, caplog):
    work = tmp_path / "run"
    assert open_tokenizer(make_config(corpus, vocab_size=300), work).vocab_size == 300
    assert open_tokenizer(make_config(corpus, vocab_size=350), work).vocab_size == 350
    assert f"{work / 'tokenizer.json'} was left by a start with another configuration or corpus" in caplog.text
    assert Tokenizer.load(work / "tokenizer.json").vocab_size == 350
    as_bytes = open_tokenizer(make_config(corpus, tokenizer="byte", vocab_size=400), work)
    assert as_bytes.fingerprint == byte_tokenizer().fingerprint
    assert Tokenizer.load(work / "tokenizer.json").fingerprint == as_bytes.fingerprint


def test_a_changed_corpus_or_file_makes_another_tokenizer(tmp_path, make_config, corpus):
    work, config = tmp_path / "run", make_config(corpus, vocab_size=300)
    first = open_tokenizer(config, work)
    for i in range(20):  # among the first of them is one of the train split
        (corpus / f"a{i}.txt").write_text(f"quite other {i} letters: xyzzy xyzzy xyzzy\n" * 50)
    assert open_tokenizer(config, work).fingerprint != first.fingerprint
    byte_tokenizer().save(tmp_path / "given.json")
    config = make_config(corpus, tokenizer=str(tmp_path / "given.json"), vocab_size=300)
    assert open_tokenizer(config, work).vocab_size == 262
    first.save(tmp_path / "given.json")
    assert open_tokenizer(config, work).fingerprint == first.fingerprint


def test_the_same_start_again_trains_no_second_time(tmp_path, make_config, corpus):
    config = make_config(corpus, vocab_size=300)
    first = open_tokenizer(config, tmp_path / "run")
    again = make_tokenizer(config, tmp_path / "run", (pytest.fail("the corpus was read") for _ in "x"))
    assert again.fingerprint == first.fingerprint


@pytest.mark.parametrize("owned", ["no record", "config.json"])
def test_a_given_tokenizer_and_that_of_a_run_are_used_as_they_are(tmp_path, make_config, corpus, owned):
    work = tmp_path / "run"
    open_tokenizer(make_config(corpus, tokenizer="byte", vocab_size=300), work)
    if owned == "config.json":
        (work / "config.json").write_text("{}")
    else:
        (work / RECORD).unlink()
    assert open_tokenizer(make_config(corpus, vocab_size=300), work).vocab_size == 262


def test_a_tokenizer_put_in_the_place_of_a_left_over_one_is_not_overwritten(tmp_path, make_config, corpus, bpe):
    work = tmp_path / "run"
    open_tokenizer(make_config(corpus, tokenizer="byte"), work)
    bpe.save(work / "tokenizer.json")
    with pytest.raises(ValueError, match=f"is not the tokenizer that {RECORD} beside it speaks of; remove {RECORD} to"):
        open_tokenizer(make_config(corpus), work)
    (work / RECORD).unlink()
    assert open_tokenizer(make_config(corpus), work).fingerprint == bpe.fingerprint


@pytest.mark.parametrize("keeps", ["record", "record and tokenizer_config.json"])
def test_a_kill_while_saving_leaves_what_the_next_start_makes_again(tmp_path, make_config, corpus, bpe, keeps):
    work = tmp_path / "run"
    open_tokenizer(make_config(corpus, tokenizer="byte"), work)
    (work / "tokenizer.json").unlink()
    if keeps == "record":
        (work / "tokenizer_config.json").unlink()
    assert open_tokenizer(make_config(corpus, vocab_size=300), work).vocab_size == 300


def test_a_missing_tokenizer_config_is_written_again(tmp_path, make_config, corpus):
    config = make_config(corpus, vocab_size=300)
    first = open_tokenizer(config, tmp_path)
    content = (tmp_path / "tokenizer_config.json").read_bytes()
    (tmp_path / "tokenizer_config.json").unlink()
    assert open_tokenizer(config, tmp_path).fingerprint == first.fingerprint
    assert (tmp_path / "tokenizer_config.json").read_bytes() == content


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"\xff\xfe\x00", "tokenizer.json is not a readable tokenizer.json .*not UTF-8"),
        ("tokenizer.json", b"[" * 100_000, "tokenizer.json is not a readable tokenizer.json"),
        ("tokenizer.json", b"{}", "tokenizer.json is not a readable tokenizer.json"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json holds a list, not a dict"),
        (
            "tokenizer_config.json",
            b'{"bos_token": 0}',
            "tokenizer_config.json: bos_token is 0, not the text of a token",
        ),
        ("tokenizer_config.json", b'{"eos_token": {"id": 1}}', "eos_token is {'id': 1}, not the text of a token"),
        ("tokenizer_config.json", b'{"pad_token": {"content": 3}}', "pad_token is {'content': 3}, not the text"),
    ],
)
def test_damaged_files_of_a_tokenizer_are_named(tmp_path, make_config, corpus, name, content, message):
    byte_tokenizer().save(tmp_path / "tokenizer.json")
    (tmp_path / name).write_bytes(content)
    for config, work in (
        (make_config(corpus), tmp_path),
        (make_config(corpus, tokenizer=str(tmp_path / "tokenizer.json")), tmp_path / "run"),
    ):
        with pytest.raises(ValueError, match=message):
            open_tokenizer(config, work)
    assert not (tmp_path / "run").exists()


def test_what_is_no_file_is_no_tokenizer(tmp_path, make_config, corpus):
    os.mkfifo(tmp_path / "fifo")
    for path, kind in ((tmp_path / "fifo", "a FIFO"), ("/dev/zero", "a device"), (corpus, "a folder")):
        with pytest.raises(ValueError, match=f"{path} is {kind}; put a regular file there"):
            open_tokenizer(make_config(corpus, tokenizer=str(path)), tmp_path / "run")
    with pytest.raises(ValueError, match="data.tokenizer = gs://x/tokenizer.json is an address"):
        open_tokenizer(make_config(corpus, tokenizer="gs://x/tokenizer.json"), tmp_path / "run")


def test_a_tokenizer_with_ids_beyond_the_model_is_refused_from_the_workdir_too(tmp_path, make_config, corpus, bpe):
    bpe.save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer.json needs 700 ids and model.vocab_size = 300"):
        open_tokenizer(make_config(corpus, vocab_size=300), tmp_path)


def test_ctrl_c_ends_the_training_of_a_bpe_at_once(monkeypatch):
    """The Rust side does not look for signals; the main thread does."""
    stop, ended = threading.Event(), []

    class InterruptedThread(threading.Thread):
        def join(self, timeout=None):
            raise KeyboardInterrupt

    def texts():
        yield "a text"
        ended.append(stop.wait(SECONDS))

    monkeypatch.setattr(bpe_module, "Thread", InterruptedThread)
    with pytest.raises(KeyboardInterrupt):
        train_bpe(texts(), 300)
    assert not ended  # it still trains
    stop.set()


def test_an_error_of_the_corpus_comes_out_of_the_training_as_it_is():
    def texts():
        yield "a text"
        raise ValueError("a.txt is not UTF-8 text")

    with pytest.raises(ValueError, match="^a.txt is not UTF-8 text$"):
        train_bpe(texts(), 300)

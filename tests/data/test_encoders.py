"""Ids do not depend on who encodes, and no process stays behind."""

import gc
import operator
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from deepseek_jax.data import token_cache
from deepseek_jax.data.encoders import BATCHES_PER_PROCESS, Encoders
from deepseek_jax.data.token_cache import open_corpus
from deepseek_jax.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from tests.support.array_records import write_array_record
from tests.support.patience import wait_for

ROOT = Path(__file__).parents[2]


@pytest.fixture
def started(monkeypatch):
    """The processes started by a test. All must have ended, and been waited for, when it ends."""
    processes, popen = [], subprocess.Popen

    def start(*args, **kwargs):
        processes.append(popen(*args, **kwargs))
        return processes[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    yield processes
    assert all(process.returncode is not None for process in processes)


@pytest.fixture
def cores(monkeypatch):
    """Sets the number of cores, and makes the smallest corpus a large one of many batches."""
    monkeypatch.setattr(token_cache, "SMALL_CORPUS", 0)
    monkeypatch.setattr(token_cache, "BATCH_CHARACTERS", 5000)
    return lambda count: monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count)))


def test_the_cache_does_not_depend_on_the_number_of_processes(
    tmp_path, make_config, corpus_folder, bpe, cores, started, monkeypatch
):
    write_array_record(tmp_path / "ids.array_record", [np.arange(i + 1, dtype="<i4").tobytes() for i in range(20)])
    lines = ['{"text": "' + text + '"}\n' for text in (*SPECIAL_TOKENS, "", "x" * 9000, "東京は3\U0001f52c")]
    (tmp_path / "a.jsonl").write_text("broken\n".join(lines), "utf-8")
    config = make_config(corpus_folder, tmp_path / "ids.array_record", tmp_path / "a.jsonl", on_error="skip")
    caches = []
    for num_cores in (1, 3, 4):
        cores(num_cores)
        if num_cores > 1:
            monkeypatch.setattr(Tokenizer, "encode_batch", lambda *_: pytest.fail("encoded in this process"))
        open_corpus(config, bpe, tmp_path / str(num_cores))
        caches.append({path.name: path.read_bytes() for path in (tmp_path / str(num_cores)).glob("tokens-*/*")})
    assert len(caches[0]) == 3 * 2 * 3 + 1  # three sources, two splits, three files each, about.json
    assert caches[0] == caches[1] == caches[2]
    assert 3 < len(started) <= 3 + 4


def test_a_small_corpus_and_few_cores_start_no_process(
    tmp_path, make_config, corpus_folder, bpe, cores, started, monkeypatch
):
    cores(2)
    open_corpus(make_config(corpus_folder), bpe, tmp_path / "few cores")
    cores(64)
    monkeypatch.setattr(token_cache, "SMALL_CORPUS", 10**6)
    open_corpus(make_config(corpus_folder), bpe, tmp_path / "small")
    assert not started


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        # of the tokenizer, in a process
        (b"good evil", "corpus: bad.txt cannot be tokenised: .* WordLevel error: Missing .UNK. token"),
        # of the reader, while processes work
        (b"good \xff", r"bad.txt is not UTF-8 text \(line 1\); repair or remove it"),
    ],
)
def test_an_error_is_raised_here_and_leaves_nothing(tmp_path, make_config, words, cores, started, bad, error):
    (tmp_path / "corpus").mkdir()
    for i in range(9):
        # different, so that some of the first are held out
        (tmp_path / "corpus" / f"a{i}.txt").write_text("good " * (2000 + i))
    (tmp_path / "corpus" / "bad.txt").write_bytes(bad)
    for i in range(9):
        (tmp_path / "corpus" / f"c{i}.txt").write_text("good " * 2000)
    cores(3)
    (tmp_path / "work").mkdir()
    with pytest.raises(Exception, match=error) as caught:
        open_corpus(make_config(tmp_path / "corpus"), words, tmp_path / "work")
    assert 0 < len(started) <= 3
    assert not list((tmp_path / "work").iterdir())
    # also while the traceback holds its frames
    assert caught.tb and all(process.returncode is not None for process in started)


def test_order_and_bound_of_what_is_read_ahead(bpe, started):
    # some slow, some empty
    batches = [[f"text {i} {j}" * (1 if i % 7 else 5000) for j in range(i % 4)] for i in range(1, 41)]
    batches.insert(0, ["slow " * 50_000])
    unread = iter(batches)
    with bpe.encoders(2) as encoders:
        for i, ids in enumerate(encoders.map(unread)):
            assert ids == bpe.encode_batch(batches[i])
            assert len(batches) - operator.length_hint(unread) - i <= 2 * BATCHES_PER_PROCESS
    assert len(started) == 2


def test_texts_without_work_start_no_process(bpe, started):
    with bpe.encoders(2) as encoders:
        assert list(encoders.map([[], []])) == [[], []]
    assert not started


def test_special_tokens_that_a_file_calls_ordinary_stay_text(bpe, started):
    encoder = tokenizers.Tokenizer.from_str(bpe._file)
    encoder.add_tokens(["<｜User｜>"])
    tokenizer = Tokenizer(encoder, *SPECIAL_TOKENS[:3])
    texts = ["<｜User｜>a" + "".join(SPECIAL_TOKENS)]
    with tokenizer.encoders(1) as encoders:
        (answer,) = encoders.map([texts])
    assert list(answer[0]) == tokenizer.encode(texts[0])
    assert not set(answer[0]) & set(tokenizer.special_ids.values())


def test_a_killed_process_is_an_error(bpe, started):
    def batches():
        yield ["first"]
        started[0].kill()
        started[0].wait()
        for _ in range(20):
            yield ["more"]

    with (
        bpe.encoders(2) as encoders,
        pytest.raises(ChildProcessError, match="a process that tokenises ended with status -9"),
    ):
        list(encoders.map(batches()))


# A program that no process could import once more: it comes from standard input, and guards nothing.
PROGRAM = """
import os, signal, sys
import tokenizers
from deepseek_jax.data.encoders import Encoders

signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the tests were started by may ignore it
encoder = tokenizers.Tokenizer(tokenizers.models.WordLevel({"good": 0}, unk_token="good"))
with Encoders(encoder, 2) as encoders:
    for i, _ in enumerate(encoders.map(["good " * 10_000] for _ in range(1000))):
        if i == 10:
            for process in encoders._processes:
                pid = process._process.pid
                print(pid, "jax" in open(f"/proc/{pid}/maps").read(), flush=True)
            END
"""


# Ctrl-C goes to the whole group
KILL, INTERRUPT, EXIT = ("os.kill(os.getpid(), signal.SIGKILL)", "os.killpg(0, signal.SIGINT)", "sys.exit(3)")


@pytest.mark.parametrize(("end", "status"), [(KILL, -9), (INTERRUPT, -2), (EXIT, 3)])
def test_no_process_outlives_a_program(end, status):
    program = subprocess.run(
        [sys.executable, "-"],
        input=PROGRAM.replace("END", end),
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        start_new_session=True,
    )
    assert program.returncode == status
    assert program.stderr.count("Traceback") == (status == -2)  # the program's own
    lines = [line.split() for line in program.stdout.splitlines()]
    assert [jax for _, jax in lines] == ["False", "False"]
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid, _ in lines))


def test_texts_that_cannot_be_sent_leave_no_second_error(bpe, started, monkeypatch):
    """The error's frames held a view of a BytesIO; collecting them printed BufferError."""
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    with Encoders(bpe._encoder, 1) as encoders:
        list(encoders.map([["a"]]))
        started[0].kill()
        started[0].wait()
        with pytest.raises(ChildProcessError) as raised:
            list(encoders.map([["a" * 10**6]]))
        error = raised.value
        error.cycle = error  # as a Future and its error have one
        del raised, error
        gc.collect()
    assert not unraisable

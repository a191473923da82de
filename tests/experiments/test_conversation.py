"""A conversation in the terminal, with keys and a model that the tests make up."""

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_jax.data.bpe import byte_tokenizer
from deepseek_jax.data.chat import ChatTemplate
from experiments import conversation
from experiments.conversation import converse, read_terminal

TEMPLATE = ChatTemplate("{% for m in messages %}[{{ m.role[0] }}:{{ m.content }}]{% endfor %}")


def talk(typed, reply):
    """What the terminal shows, and what the model was asked."""
    shown, asked, keys = [], [], iter(typed)

    def read():
        key = next(keys, EOFError())
        if isinstance(key, BaseException):
            raise key
        return key

    def answer(ids):
        asked.append(byte_tokenizer().decode(ids))
        yield from reply(len(asked))

    converse(TEMPLATE, byte_tokenizer(), answer, read, shown.append)
    return "".join(shown), asked


def test_the_history_is_kept_until_a_new_conversation_begins():
    shown, asked = talk(["hi", "  ", "two\nlines", "/new", "again"], lambda i: ["re", f"ply {i}"])
    assert shown == "reply 1\nreply 2\nreply 3\n\n"
    assert asked == ["[u:hi]", "[u:hi][a:reply 1][u:two\nlines]", "[u:again]"]


def test_interrupt_ends_a_reply_and_what_came_of_it_stays():
    def reply(i):
        yield "begun"
        if i == 1:
            raise KeyboardInterrupt
        yield ", ended"

    shown, asked = talk(["a", KeyboardInterrupt(), "b"], reply)
    assert shown == "begun\n\nbegun, ended\n\n" and asked == ["[u:a]", "[u:a][a:begun][u:b]"]


def test_a_message_that_cannot_be_answered_leaves_the_conversation_as_it_was():
    def reply(i):
        if i == 2:
            raise ValueError("the conversation is too long")
        yield "yes"

    shown, asked = talk(["a", "b", "c"], reply)
    assert shown == "yes\n(the conversation is too long)\nyes\n\n" and asked[2] == "[u:a][a:yes][u:c]"


def test_lines_of_a_pipe_are_messages(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\nthree"))
    assert [read_terminal() for _ in range(3)] == ["one", "", "three"]
    with pytest.raises(EOFError):
        read_terminal()


def test_pasted_lines_are_one_message():
    """On a terminal: two lines that come at once, then one alone, then Ctrl-D."""
    program = (
        "import sys\nfrom experiments.conversation import read_terminal\n"
        "try:\n    while True: print(repr(read_terminal()), flush=True)\nexcept EOFError: print('END')"
    )
    mine, theirs = pty.openpty()
    root = Path(conversation.__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=root, stdin=theirs, stdout=subprocess.PIPE, text=True
    )
    try:
        os.write(mine, b"first\nsecond\n")
        assert process.stdout.readline().removeprefix("> ") == "'first\\nsecond'\n"
        os.write(mine, b"alone\n")
        assert process.stdout.readline().removeprefix("> ") == "'alone'\n"
        os.write(mine, b"\x04")
        assert process.stdout.readline().removeprefix("> ") == "END\n"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        os.close(mine)
        os.close(theirs)

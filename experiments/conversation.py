"""A conversation in the terminal: the turns of a person and the replies of a model, until Ctrl-D."""

import contextlib
import select
import sys
from collections.abc import Callable, Iterator

from deepseek_jax.data.chat import ChatTemplate
from deepseek_jax.data.tokenizer import Tokenizer

NEW = "/new"
HELP = f"Ctrl-C ends a reply, Ctrl-D the conversation; {NEW} begins a new one."
PASTE_SECONDS = 0.05  # within which the next line of what is pasted is there

Message = dict[str, str]
Reply = Callable[[list[int]], Iterator[str]]  # from the ids of a conversation to pieces of text


def converse(
    template: ChatTemplate, tokenizer: Tokenizer, reply: Reply, read: Callable[[], str], write: Callable[[str], None]
) -> None:
    """Read messages and write replies until `read` raises EOFError.

    A message that cannot be answered (the conversation has become too long) gets a line that says why, and leaves the
    conversation as it was. A reply that Ctrl-C ends stays in the conversation as far as it came.
    """
    messages: list[Message] = []
    while True:
        try:
            message = read()
        except KeyboardInterrupt:  # of what has been typed so far
            write("\n")
            continue
        except EOFError:
            write("\n")
            return
        if message.strip() == NEW:
            messages = []
            continue
        if not message.strip():
            continue
        asked = [*messages, {"role": "user", "content": message}]
        pieces: list[str] = []
        try:
            ids = template.encode(tokenizer, asked)
            with contextlib.suppress(KeyboardInterrupt):
                for piece in reply(ids):
                    pieces.append(piece)
                    write(piece)
        except ValueError as error:
            write(f"({error})\n")
            continue
        write("\n")
        messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]


def read_terminal() -> str:
    """Return the next message from standard input: a line, or on a terminal all lines that are pasted at once.

    Raises:
        EOFError: there is no more.
    """
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, PLC0415  # input() then edits lines, and takes a pasted text as one
    lines = [input("> ")]
    while select.select([sys.stdin], [], [], PASTE_SECONDS)[0]:
        try:
            lines.append(input())
        except EOFError:
            break
    return "\n".join(lines)

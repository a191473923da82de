"""What a reply's text means, while it comes: reasoning, content, calls of tools.

    reader = chat.reader()
    for delta in ...:
        pieces = reader.push(delta.text)       # Reasoning | Content | CallStart | CallArguments
    pieces = reader.finish()

However the text is cut, the pieces joined are the same. Nothing raises, and nothing is lost but the tokens that give
structure and the line breaks beside them:

- Reasoning that is open when the text ends was reasoning; there is no content then. Reasoning is never opened in the
  middle of a reply, where `<think>` is a part of the text.
- Tokens of calls end reasoning that was not closed.
- A call without a name or without arguments in braces is content, its tokens spelled out.

The tokens come as *marks*: texts that stand for them (`Job.spelled`). A mark is one lone surrogate. Decoding UTF-8
never makes one, so nothing that a model spells in ordinary tokens is taken for structure: a string in the arguments of
a call may well have "<｜tool▁call▁end｜>" in it. No delta cuts a mark, and no stop string matches a part of one.
"""

import re
import secrets
from collections.abc import Mapping
from typing import NamedTuple

from deepseek_jax.data.deepseek_chat import CALL, CALLS, END_CALL, END_CALLS, SEPARATOR
from deepseek_jax.data.tokenizer import THINK_TOKENS
from deepseek_jax.inference.job import STOP
from deepseek_jax.serving.tool_calls import CallArguments, CallStart, CallText

THINK, END_THINK = THINK_TOKENS
STRUCTURE = (THINK, END_THINK, CALLS, END_CALLS, CALL, END_CALL, SEPARATOR)


class Reasoning(NamedTuple):
    """The next characters of what the model thinks before it answers."""

    text: str


class Content(NamedTuple):
    """The next characters of the answer."""

    text: str


Piece = Reasoning | Content | CallStart | CallArguments


def mark(name: str) -> str:
    """Return the mark of one of the tokens `STRUCTURE`."""
    return chr(0xD800 + STRUCTURE.index(name))


class ReplyReader:
    """Reads one reply."""

    def __init__(self, marks: Mapping[str, str], thinking: bool):
        """Begin a reply.

        Args:
            marks: what stands in the text for a token, to the token's name.
            thinking: whether the prompt has opened the reasoning.
        """
        self._marks = dict(marks)
        self._pattern = re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))) or "(?!)")
        self._read = self._thinking if thinking else self._start
        self._fresh = True  # line breaks that come now belong to the token before them
        self._cut = ""  # may be the beginning of a mark
        self._held = ""  # blanks, which may belong to the token behind them
        self._call = CallText()
        self._index: int | None = None  # of the call, once it has begun
        self._num_calls = 0
        self._pieces: list[Piece] = []

    def push(self, text: str) -> list[Piece]:
        """Return the pieces that `text` completes."""
        text, position = self._cut + text, 0
        for found in self._pattern.finditer(text):
            self._text(text[position : found.start()])
            self._token(self._marks[found[0]])
            position = found.end()
        cut = max((_overlap(text[position:], mark) for mark in self._marks), default=0)
        self._text(text[position : len(text) - cut])
        self._cut = text[len(text) - cut :]
        return self._taken()

    def finish(self) -> list[Piece]:
        """Return the rest, when no more text comes."""
        self._text(self._cut)
        self._cut = ""
        if self._read == self._in_call:
            self._end_call(closed=False)
        elif self._held and self._read != self._between_calls:
            self._emit(Reasoning(self._held) if self._read == self._thinking else Content(self._held))
        return self._taken()

    def finish_reason(self, reason: str) -> str:
        """Return OpenAI's word for the end of this reply, where the engine says `reason`."""
        return "tool_calls" if reason == STOP and self._num_calls else reason

    def _taken(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _emit(self, piece: Piece) -> None:
        last = self._pieces[-1] if self._pieces else None
        match piece, last:
            case (Reasoning(new), Reasoning(old)) | (Content(new), Content(old)):
                self._pieces[-1] = piece._replace(text=old + new)
            case CallArguments(index, new), CallArguments(same, old) if index == same:
                self._pieces[-1] = CallArguments(index, old + new)
            case _:
                self._pieces.append(piece)

    def _text(self, text: str) -> None:
        if text:
            self._read(text)

    def _token(self, name: str) -> None:
        """Take one of the tokens `STRUCTURE`."""
        state = self._read
        match name:
            case "<think>" if state == self._start or (state == self._thinking and self._fresh):
                self._enter(self._thinking)
            case "</think>" if state in (self._start, self._thinking):
                self._enter(self._content)
            case _ if name == SEPARATOR and state == self._in_call:
                self._arguments(self._call.separate())
            case _ if name in (CALLS, CALL):
                if state == self._in_call:
                    self._end_call(closed=True)
                self._enter(self._between_calls if name == CALLS else self._in_call)
            case _ if name in (END_CALL, END_CALLS) and state == self._in_call:
                if self._end_call(closed=True):
                    self._enter(self._between_calls if name == END_CALL else self._content)
                else:
                    self._text(name)
            case _ if name == END_CALLS and state == self._between_calls:
                self._enter(self._content)
            case _:
                self._text(name)

    def _enter(self, state) -> None:
        self._read, self._fresh, self._held = state, True, ""
        if state == self._in_call:
            self._call, self._index = CallText(), None

    # ---- what text means, by where the reply stands

    def _start(self, text: str) -> None:
        """Nothing but blanks has come."""
        self._between_calls(text)

    def _thinking(self, text: str) -> None:
        text = self._without_breaks(self._held + text)
        body = text.rstrip("\n")
        self._held = text[len(body) :]
        if body:
            self._emit(Reasoning(body))

    def _content(self, text: str) -> None:
        text = self._without_breaks(text)
        if text:
            self._emit(Content(text))

    def _between_calls(self, text: str) -> None:
        self._held += text
        if self._held.strip():
            text, self._read, self._held, self._fresh = self._held, self._content, "", False
            self._content(text)

    def _in_call(self, text: str) -> None:
        self._arguments(self._call.push(text))
        if self._call.malformed:
            self._end_call(closed=False)

    def _without_breaks(self, text: str) -> str:
        if self._fresh:
            text = text.lstrip("\n")
            self._fresh = not text
        return text

    def _arguments(self, text: str) -> None:
        if text and self._call.name is not None:
            if self._index is None:
                self._index = self._num_calls
                self._num_calls += 1
                self._emit(CallStart(self._index, f"call_{secrets.token_hex(12)}", self._call.name))
            self._emit(CallArguments(self._index, text))

    def _end_call(self, closed: bool) -> bool:
        """End the call, as content if it is malformed; return whether it was a call."""
        self._arguments(self._call.finish(closed))
        called = not self._call.malformed
        self._read, self._fresh = self._content, False
        if not called:
            self._emit(Content(self._call.raw))
        return called


def _overlap(text: str, mark: str) -> int:
    """Return the length of the longest end of `text` that `mark` begins with, and goes on behind."""
    longest = min(len(text), len(mark) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(mark[:size])), 0)

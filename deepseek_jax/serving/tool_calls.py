"""One call of a tool, read while it is written.

    V3, R1    <call>function<sep>NAME\\n```json\\n{...}\\n```<end>
    V3.1      <call>NAME<sep>{...}<end>

Models mix the two, so both are read whatever the model is. A call has begun when its name is complete and the first
brace of its arguments is there: from then on its arguments are passed on as they come. What never gets so far is
malformed, and a part of the text.
"""

import re
from typing import NamedTuple

from deepseek_jax.data.deepseek_chat import CALL, SEPARATOR

MOST_HEADER = 512  # characters before the arguments; what is longer is no call

_FENCE = r"(?:```(?:json)?[ \t]*\n\s*)?"
_NAME = r"([^\s`{}]{1,256})"
_V3_HEADER = re.compile(rf"\s*{_NAME}[ \t]*\n\s*{_FENCE}(?=\{{)")
_V31_HEADER = re.compile(rf"\s*{_FENCE}(?=\{{)")
# a call without arguments
_EMPTY = r"\s*(?:```(?:json)?\s*(?:```)?)?\s*"
_V3_EMPTY = re.compile(rf"\s*{_NAME}{_EMPTY}")
_V31_EMPTY = re.compile(_EMPTY)
_PLAIN_NAME = re.compile(rf"\s*{_NAME}\s*")


class CallStart(NamedTuple):
    """A call begins: its number among the calls of the reply, an id of its own, the name of its tool."""

    number: int
    id: str
    name: str


class CallArguments(NamedTuple):
    """The next characters of a call's arguments."""

    number: int
    text: str


class CallText:
    """What stands in one call, while it comes.

    Attributes:
        name: of the tool, once the call has begun.
        malformed: it will never be a call.
        raw: while it has no name: all that has come, the tokens that structure it by their names.
    """

    def __init__(self) -> None:
        """Begin behind the token `CALL`."""
        self.name: str | None = None
        self.malformed = False
        self.raw = CALL
        self._before = ""
        self._after: str | None = None  # the separator
        self._held = ""  # blanks and a fence, which may be the end

    def push(self, text: str) -> str:
        """Take text and return the arguments that are known by now."""
        if self.name is not None:
            return self._arguments(text)
        self.raw += text
        if self._after is None:
            self._before += text
        else:
            self._after += text
            rest = self._begin(_V3_HEADER, _V31_HEADER)
            if rest is not None:
                return self._arguments(rest)
        self.malformed = len(self._before) + len(self._after or "") > MOST_HEADER
        return ""

    def separate(self) -> str:
        """Take the token `SEPARATOR`, and return arguments as `push`."""
        if self.name is not None or self._after is not None:
            return self.push(SEPARATOR)
        self._after = ""
        self.raw += SEPARATOR
        return ""

    def finish(self, closed: bool) -> str:
        """End the call and return the rest of its arguments.

        Args:
            closed: by its token, and not because the text ended.
        """
        if self.name is None:
            if closed and self._begin(_V3_EMPTY, _V31_EMPTY) == "":
                return "{}"
            self.malformed = True
            return ""
        fence = self._held.strip()
        return "" if fence == "```" or (closed and not fence) else self._held.rstrip() if closed else self._held

    def _begin(self, v3: re.Pattern, v31: re.Pattern) -> str | None:
        """Find the name and return what follows the header; None if there is none so far."""
        name = _PLAIN_NAME.fullmatch(self._before)
        if name is None or self._after is None:
            return None
        longest = MOST_HEADER - len(self._before)
        header = v3.match(self._after, 0, longest) if name[1] == "function" else None
        found = header[1] if header else name[1]
        header = header or v31.match(self._after, 0, longest)
        if header is None:
            return None
        self.name = found
        return self._after[header.end() :]

    def _arguments(self, text: str) -> str:
        text = self._held + text
        body = text.rstrip()
        marks = min(len(body) - len(body.rstrip("`")), 3)
        start = len(body[: len(body) - marks].rstrip())
        self._held = text[start:]
        return text[:start]

"""The text of one sequence while its tokens come, and where it ends."""

from collections.abc import Iterable, Mapping, Sequence

from deepseek_jax.data.tokenizer import StreamDecoder, Tokenizer
from deepseek_jax.inputs import shown

STOP, LENGTH = "stop", "length"  # why a text ended: at EOS or a stop string, or with the last token asked for


class Text:
    """Turns ids into text that will not change any more: the pieces that it returns, joined, are the text.

    Attributes:
        reason: `STOP`, `LENGTH`, or None while tokens can follow.
        end: the EOS or stop token at which it ended.
        num_tokens: up to the end of the text, those of a stop string included, EOS and a stop token not.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str | int] = (),
        ignore_eos: bool = False,
        spelled: Mapping[int, str] | None = None,
    ):
        """Start a text that ends before the first of `stop`: strings, which may span tokens, and ids of tokens.

        It ends at EOS, too, unless `ignore_eos`. The texts of `spelled` stand for its tokens.
        """
        if isinstance(stop, str):
            raise ValueError(f"stop is the text {shown(repr(stop))}; give a list of texts")
        if "" in stop:
            raise ValueError("a stop string is empty; give at least one character, or none")
        self.reason: str | None = None
        self.end: int | None = None
        self.num_tokens = 0
        self._stop = tuple(text for text in stop if isinstance(text, str))
        self._ends = {token for token in stop if not isinstance(token, str)}
        if not ignore_eos:
            self._ends.add(tokenizer.eos)
        self._spelled = spelled or {}
        self._decoder = StreamDecoder(tokenizer)  # a character may span tokens
        self._held = ""  # may be the beginning of a stop string

    @property
    def ends(self) -> frozenset[int]:
        """Ids that end it."""
        return frozenset(self._ends)

    def push(self, ids: Iterable[int]) -> str:
        """Return the text that `ids` complete, which may be empty; ids after the end are ignored."""
        return "".join(self._push(int(token)) for token in ids if self.reason is None)

    def finish(self) -> str:
        """Return the rest, when no more ids come: what was held back, and U+FFFD if the last character lacks bytes."""
        if self.reason is not None:
            return ""
        return self._end(LENGTH)

    def _push(self, token: int) -> str:
        if token in self._ends:
            self.end = token
            return self._end(STOP)
        self.num_tokens += 1
        if token in self._spelled:
            self._held += self._decoder.finish() + self._spelled[token]
        else:
            self._held += self._decoder.push([token])
        starts = [start for start in map(self._held.find, self._stop) if start >= 0]
        if starts:
            self.reason, text = STOP, self._held[: min(starts)]
            return text
        safe = len(self._held) - max((_overlap(self._held, stop) for stop in self._stop), default=0)
        text, self._held = self._held[:safe], self._held[safe:]
        return text

    def _end(self, reason: str) -> str:
        self.reason = reason
        return self._held + self._decoder.finish()


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)

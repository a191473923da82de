"""Log-probabilities of tokens, in the form of completions and in that of chat."""

import codecs
from collections.abc import Sequence
from typing import Any

from deepseek_jax.inference.completions import TokenLogprob
from deepseek_jax.serving.fields import finite
from deepseek_jax.serving.model import Model

LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


class CompletionLogprobs:
    """The four lists of one completion: tokens, their log-probabilities, the most probable ones, where they begin."""

    def __init__(self, model: Model):
        """Begin at the first character."""
        self._model = model
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def prompt(
        self, ids: Sequence[int], found: Sequence[TokenLogprob | None], text: str | None, bos_added: bool
    ) -> dict[str, list]:
        """Return the lists of an echoed prompt, in front of all others.

        Args:
            ids: of the prompt.
            found: of each; None for the first one, which nothing precedes.
            text: the prompt, if it came as text: special tokens in it have a length then.
            bos_added: whether the first id is not in the text.
        """
        lists: dict[str, list] = {name: [] for name in LISTS}
        for i, (token, one) in enumerate(zip(ids, found, strict=True)):
            spelled = text is not None and not (bos_added and i == 0)
            self._append(lists, token, one, spelled)
        if text is not None:
            self._offset = len(text)
        return lists

    def push(self, found: Sequence[TokenLogprob]) -> dict[str, list]:
        """Return the lists of tokens that follow."""
        lists: dict[str, list] = {name: [] for name in LISTS}
        for one in found:
            self._append(lists, one.token, one, False)
        return lists

    def _append(self, lists: dict[str, list], token: int, one: TokenLogprob | None, spelled: bool) -> None:
        lists["tokens"].append(self._model.spell(token))
        lists["token_logprobs"].append(None if one is None else finite(one.logprob))
        lists["top_logprobs"].append(None if one is None else self._tops(one))
        lists["text_offset"].append(self._offset)
        special = self._model.special_texts.get(token)
        if special is None:
            self._offset += len(self._decoder.decode(self._model.tokenizer.token_bytes[token]))
        elif spelled:
            self._offset += len(special)

    def _tops(self, one: TokenLogprob) -> dict[str, float]:
        """Return the most probable tokens and the chosen one by text; of several with one text the most probable."""
        tops: dict[str, float] = {}
        for token, logprob in [*one.top, (one.token, one.logprob)]:
            text = self._model.spell(token)
            tops[text] = max(finite(logprob), tops.get(text, finite(logprob)))
        return tops


def joined(lists: Sequence[dict[str, list]]) -> dict[str, list]:
    """Return lists one behind the other."""
    return {name: [entry for part in lists for entry in part[name]] for name in LISTS}


def chat_logprobs(model: Model, found: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Return the entries of `logprobs.content`."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        special = model.special_texts.get(token)
        piece = special.encode() if special else model.tokenizer.token_bytes[token]
        return {"token": model.spell(token), "logprob": finite(logprob), "bytes": list(piece)}

    return [
        entry(one.token, one.logprob) | {"top_logprobs": [entry(token, logprob) for token, logprob in one.top]}
        for one in found
    ]

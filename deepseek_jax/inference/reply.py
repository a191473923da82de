"""What the host makes of a job's tokens: text, log-probabilities, routes, and the deltas that tell of them."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference.completions import Drawn, TokenLogprob
from deepseek_jax.inference.job import LENGTH, Delta, Grammar, Job, Listener, Usage
from deepseek_jax.inference.sampling import NO_TOKEN, Logprobs
from deepseek_jax.inference.text import Text

NOT_NUMBERS = "the logits are NaN or infinite: the weights are damaged"


class Reply:
    """The text of one job while it comes.

    Attributes:
        job: what was asked for.
        masks: where there is a grammar, what the next token may be, what it is drafted as, and what may follow that; as
            `Device.set_mask` takes them.
        num_logprobs: most probable tokens that come with each; None without log-probabilities.
        is_unheard: the listener has raised, which the log says once.
    """

    def __init__(self, job: Job, tokenizer: Tokenizer, listener: Listener, vocab_size: int):
        """Begin an empty text; ValueError if a stop string is empty, or what `job.grammar` raises."""
        self.job = job
        self._listener = listener
        self.is_unheard = False
        self._text = Text(tokenizer, job.stop, job.ignore_eos, job.spelled)
        own = job.own.num_logprobs
        self.num_logprobs = job.sampling.num_logprobs if own is None else own
        self._prompt_logprobs: list[TokenLogprob | None] | None = None if job.prompt_logprobs is None else [None]
        self._routes: list[np.ndarray] = []
        self._num_routed = 0
        self._has_begun = False
        self._cached = self._drafted = self._accepted = 0
        self._grammar = job.grammar() if job.grammar else None
        num_words = -(-vocab_size // 32)
        self.masks = np.zeros(num_words, np.int32), NO_TOKEN, np.zeros(num_words, np.int32)
        if self._grammar:
            self._grammar.fill(self.masks[0])

    @property
    def num_tokens(self) -> int:
        """Tokens of the text so far."""
        return self._text.num_tokens

    @property
    def wants_whole_prompt(self) -> bool:
        """Whether log-probabilities of the prompt are still to come, so none of it may be skipped."""
        return self._prompt_logprobs is not None and len(self._prompt_logprobs) < len(self.job.prompt)

    def begin(self, num_cached: int) -> bool:
        """Note how much of the prompt was cached; return whether it is the first time."""
        is_first, self._has_begun, self._cached = not self._has_begun, True, num_cached
        return is_first

    def add_prompt_logprobs(self, begin: int, logprobs: Logprobs) -> None:
        """Take those of the tokens behind the prompt's token `begin`; what has come before changes nothing."""
        known = self._prompt_logprobs
        if known is None or begin + 1 > len(known):
            return
        first = len(known) - begin - 1
        targets = self.job.prompt[len(known) : begin + 1 + len(logprobs.chosen_B)]
        leaves: Any = (leaf[first:] for leaf in logprobs[:3])
        rest = Logprobs(*leaves)
        known.extend(_token_logprobs(targets, rest, self.job.prompt_logprobs))

    def add_routes(self, begin: int, routes_TLK: np.ndarray) -> None:
        """Take those of the tokens from position `begin` on that have not come before."""
        new = routes_TLK[max(self._num_routed - begin, 0) :]
        if len(new):
            self._routes.append(new)
            self._num_routed = begin + len(routes_TLK)

    def add_drafts(self, drafted: int, accepted: int) -> None:
        """Count drafts."""
        self._drafted += drafted
        self._accepted += accepted

    def receive(self, ids: Sequence[int], logprobs: Logprobs | None, version: int, guess: int = NO_TOKEN) -> str | None:
        """Take the next tokens, and tell the listener; return why the text has ended, if it has.

        `guess` is what the next token may be drafted as, if the grammar lets it come.

        Raises:
            ValueError: the logits were not numbers.
            RuntimeError: the grammar gives up.
        """
        if NO_TOKEN in ids:
            raise ValueError(NOT_NUMBERS)
        text, before = self._text, self._text.num_tokens
        piece = text.push(ids)
        kept, reason = list(ids[: text.num_tokens - before]), text.reason
        if self._grammar and kept:
            for token in kept:
                self._grammar.accept(token)
            if reason is None:
                self._look_ahead(self._grammar, guess)
        if reason is None and text.num_tokens >= self.job.max_new_tokens:
            piece, reason = piece + text.finish(), LENGTH
        if self.job.keep_end and text.end is not None:
            kept.append(text.end)
        found = None
        if logprobs is not None and self.num_logprobs is not None:
            found = _token_logprobs(kept, logprobs, self.num_logprobs)
            if self.job.kept and logprobs.kept is not None:
                drawn = map(Drawn, logprobs.kept.words_BW, logprobs.kept.drawn_B.tolist())
                found = [entry._replace(drawn=each) for entry, each in zip(found, drawn, strict=False)]
        elif self.num_logprobs is not None:
            found = []
        self._tell(piece, kept, found, reason, version, None)
        return reason

    def finish(self, reason: str, version: int, error: str | None = None) -> None:
        """Tell the listener that the job ends here."""
        self._tell(self._text.finish(), [], None if self.num_logprobs is None else [], reason, version, error)

    def _look_ahead(self, grammar: Grammar, guess: int) -> None:
        """Ask the grammar what may come next, and what behind `guess`."""
        words_W, _, behind_W = self.masks
        grammar.fill(words_W)
        may_come = guess != NO_TOKEN and words_W[guess // 32] >> guess % 32 & 1
        if may_come:
            grammar.accept(guess)
            grammar.fill(behind_W)
            grammar.rollback(1)
        self.masks = words_W, guess if may_come else NO_TOKEN, behind_W

    def _tell(
        self,
        text: str,
        ids: list[int],
        logprobs: list[TokenLogprob] | None,
        reason: str | None,
        version: int,
        error: str | None,
    ) -> None:
        usage = Usage(len(self.job.prompt), self._cached, self._text.num_tokens, self._drafted, self._accepted)
        prompt_logprobs, routes_TLK = None, None
        if self._prompt_logprobs is not None and not self.wants_whole_prompt:
            prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, None
        if self._routes:
            routes_TLK, self._routes = np.concatenate(self._routes), []
        delta = Delta(text, ids, logprobs, reason, usage, version, prompt_logprobs, routes_TLK, error)
        try:
            self._listener(delta)
        except Exception:  # of somebody else's code: the other jobs go on
            if not self.is_unheard:
                logging.getLogger(__name__).exception("a listener has raised; its job is cancelled")
            self.is_unheard = True


def _token_logprobs(ids: Sequence[int], logprobs: Logprobs, count: int | None) -> list[TokenLogprob]:
    """Return those of `ids`, which `logprobs` begins with, and `count` of the most probable with each."""
    num = len(ids)
    if count == 0:
        return [TokenLogprob(int(t), value, []) for t, value in zip(ids, logprobs.chosen_B[:num].tolist(), strict=True)]
    chosen, tops = (
        logprobs.chosen_B[:num].tolist(),
        zip(logprobs.top_ids_BK[:num, :count].tolist(), logprobs.top_BK[:num, :count].tolist(), strict=True),
    )
    return [
        TokenLogprob(int(token), value, list(zip(*top, strict=True)))
        for token, value, top in zip(ids, chosen, tops, strict=True)
    ]

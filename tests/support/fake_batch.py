"""A device side of the engine without a model: pages keep ids, and the next token is a function of what is read.

A wrong page, an entry that is not written, a table that came too late: each gives another token, or raises.
"""

import numpy as np

from deepseek_jax.inference.page_pool import PAGE_SIZE
from deepseek_jax.inference.requests import check_bias
from deepseek_jax.inference.sampling import NO_TOKEN, Logprobs
from deepseek_jax.inference.step import StepResult
from deepseek_jax.parameters import Weights

UNWRITTEN = -(10**9)
VERSION = 1000  # what a version of the weights adds to an entry


def next_token(entries, vocab_size, salt=0):
    """Return the token after entries, one of the ordinary ones."""
    weights = np.arange(1, len(entries) + 1, dtype=np.int64) * 2654435761 % 1000003
    return int((np.dot(np.asarray(entries, np.int64) + 7, weights) + salt % 2**32 * 7919) % (vocab_size - 8))


def text_ids(prompt, num_tokens, vocab_size, ends=(), version=0, salt=0):
    """Return what follows a prompt, up to an end."""
    entries, made = [token + VERSION * version for token in prompt], []
    for _ in range(num_tokens):
        token = next_token(entries, vocab_size, salt)
        if token in ends:
            break
        made.append(token)
        entries.append(token + VERSION * version)
    return made


def fake_weights(version):
    """Return weights for `FakeBatch.update_weights`; those of version None do not fit."""
    return Weights({"head_DV": np.zeros((1, 300)), "version": version}, {})


def logprob(entries, target):
    return -float((sum(entries) + target) % 97) / 10 - 0.01


class FakeStep:
    def __init__(self, result):
        self._result = result

    def read(self):
        if isinstance(self._result, Exception):
            raise self._result
        return self._result


class FakeBatch:
    num_rows, num_pages, num_positions, vocab_size = 4, 64, 1024, 262
    most_prefill_tokens, most_pieces, num_devices, num_drafts, eos = 128, 16, 1, 0, 1
    burst, burst_rows, bulk = 1, 0, False

    def __init__(self, before=None, **sizes):
        self.__dict__.update(sizes)
        self.pages = np.full((self.num_devices, self.num_pages, PAGE_SIZE), UNWRITTEN, np.int64)
        self.version = 0
        self.before = before  # called before each step
        self.rows = {}
        self.log = []  # (prompt tokens, decoding rows) of each step
        self.num_bursts = 0
        self.fails_at = None

    def fail_at(self, step):
        """Let this step fail when it is read."""
        self.fails_at = step

    def check(self, job):
        check_bias(job.own, self.vocab_size)

    def expert_load(self):
        return np.zeros((1, 2), np.int64)

    def open_row(self, row, settings):
        assert row not in self.rows
        pages = self.pages[row * self.num_devices // self.num_rows]
        self.rows[row] = Row(settings, self.eos, pages)

    def close_row(self, row):
        del self.rows[row]

    def set_table(self, row, pages):
        self.rows[row].table = np.array(pages)

    def set_mask(self, row, words_W, draft, behind_W):
        bits = (np.unpackbits(words.view(np.uint8), bitorder="little") for words in (words_W, behind_W))
        masks = [*map(np.flatnonzero, bits)]
        assert draft == NO_TOKEN or draft in masks[0], "a draft is a token that may come"
        self.rows[row].masks, self.rows[row].draft = masks, draft if self.num_drafts else NO_TOKEN

    def update_weights(self, weights):
        if weights.params["version"] is None:
            raise ValueError("the weights do not fit")
        self.version = weights.params["version"]

    def step(self, pieces, decodes_B, num_tokens=1):
        if self.before:
            self.before()
        if self.fails_at is not None and len(self.log) == self.fails_at:
            return FakeStep(RuntimeError("XLA: the device is gone\nmore"))
        assert sum(len(piece.ids) for piece in pieces) <= self.most_prefill_tokens * self.num_devices
        assert not any(decodes_B[piece.row] for piece in pieces)
        self.log.append((sum(len(piece.ids) for piece in pieces), int(decodes_B.sum())))
        assert num_tokens == 1 or (num_tokens == self.burst and not pieces)
        assert num_tokens == 1 or (decodes_B.reshape(self.num_devices, -1).nonzero()[1] < self.burst_rows).all()
        self.num_bursts += num_tokens > 1
        shape = self.num_rows, num_tokens * (self.num_drafts + 1)
        tokens, counts = np.zeros(shape, np.int32), np.zeros(self.num_rows, np.int32)
        drafts = np.zeros((self.num_rows, num_tokens, 2), np.int32)
        chosen, prompts = np.zeros(shape, np.float32), {}
        for piece in pieces:
            row = self.rows[piece.row]
            prompts |= self._evaluate(piece, row)
            row.write(piece.ids, self.version)
            if piece.is_last and row.left:
                self._choose(piece.row, tokens, counts, chosen)
        for number in np.flatnonzero(decodes_B):
            row = self.rows[number]
            assert num_tokens == 1 or not row.settings.masked
            for turn in range(0 if row.ended else num_tokens):
                drafts[number, turn] = self._decode(number, tokens, counts, chosen)
                if row.ended:
                    break
        top = np.repeat(chosen[..., None], 20, 2)
        ids = np.repeat(tokens[..., None], 20, 2)
        ended = np.array([number in self.rows and self.rows[number].ended for number in range(self.num_rows)])
        guesses = self._guesses(decodes_B)
        return FakeStep(StepResult(tokens, counts, ended, Logprobs(chosen, ids, top), prompts, guesses, {}, drafts))

    def _decode(self, number, tokens, counts, chosen):
        """Choose a token of a row, and as many more as drafts stand; return how many there were, and stood."""
        row, before = self.rows[number], counts[number]
        drafted = int(row.draft != NO_TOKEN) if row.settings.masked else self.num_drafts
        accepted = row.last % (drafted + 1)
        while not row.ended and counts[number] - before <= accepted:
            row.write([row.last], self.version)
            self._choose(number, tokens, counts, chosen)
            if row.settings.masked:
                accepted = int(row.last == row.draft)
                row.draft = NO_TOKEN
        made = counts[number] - before
        row.spoil(drafted + 1 - made)
        return drafted, made - 1

    def _guesses(self, decodes_B):
        """What masked rows draft: mostly the token that they get if their mask stays as it is."""
        guesses = np.full(self.num_rows, NO_TOKEN)
        for number in np.flatnonzero(decodes_B) if self.num_drafts else ():
            row = self.rows[number]
            if row.settings.masked and not row.ended:
                token = next_token([*row.read(), row.last + VERSION * self.version], self.vocab_size)
                guesses[number] = row.mask[token % len(row.mask)] if token % 3 else token
        return guesses

    def _choose(self, number, tokens, counts, chosen):
        row = self.rows[number]
        entries = row.read()
        salt = row.settings.seed + row.settings.number if row.settings.sampling.temperature else 0
        token = next_token(entries, self.vocab_size, salt)
        if row.settings.masked:
            row.mask = row.masks.pop(0)
            token = int(row.mask[token % len(row.mask)])
        tokens[number, counts[number]], chosen[number, counts[number]] = token, logprob(entries, token)
        counts[number] += 1
        row.last, row.left = token, row.left - 1
        row.ended = token in row.ends or row.left == 0

    def _evaluate(self, piece, row):
        if not piece.logprobs:
            return {}
        ids = [*piece.ids, *([] if piece.following is None else [piece.following])]
        before = row.read().tolist()
        entries = [token + VERSION * self.version for token in ids]
        values = [logprob([*before, *entries[: i + 1]], ids[i + 1]) for i in range(len(ids) - 1)]
        values = np.array(values, np.float32)
        return {piece.row: Logprobs(values, np.zeros((len(values), 20), int), np.zeros((len(values), 20)))}


class Row:
    def __init__(self, settings, eos, pages):
        self.settings, self.table, self.mask, self.pages = settings, None, None, pages
        self.masks, self.draft = [], NO_TOKEN
        self.length, self.left, self.last, self.ended = settings.length, settings.max_new_tokens, None, False
        self.ends = {*settings.end_ids} | ({eos} if not settings.ignore_eos else set())

    def write(self, ids, version):
        for token in ids:
            self._put(self.length, token + VERSION * version)
            self.length += 1

    def spoil(self, num_tokens):
        """Write what drafts that were not accepted leave."""
        for position in range(self.length, self.length + num_tokens):
            self._put(position, UNWRITTEN)

    def read(self):
        entries = self.pages[self.table].reshape(-1)[: self.length]
        assert len(entries) == self.length and (entries != UNWRITTEN).all(), "an entry that is not written is read"
        return entries

    def _put(self, position, entry):
        self.pages[self.table[position // PAGE_SIZE], position % PAGE_SIZE] = entry

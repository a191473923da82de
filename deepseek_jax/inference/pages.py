"""Which pages of the latent cache hold a sequence's tokens: the host's side of the paged cache.

The device has one array of pages, `PAGE_SIZE` tokens each, and a table of page numbers per sequence. This module fills
the tables; of several devices each has a pool of its own. It knows token ids and no entry of the cache:

    pool = PagePool(num_pages=1000)
    sequence = PagedSequence.open(pool, prompt)  # shares the full pages of a prefix that are known
    copies = sequence.reserve(num_tokens)        # room for the next tokens; pages to copy first
    sequence.fill(row)                           # its row of the device's table
    ...                                          # the device copies pages, then writes num_tokens entries
    sequence.commit(ids)                         # these tokens are there; full pages are known from now on
    sequence.close()                             # full pages stay until somebody needs the room

Sharing. A full page can be found by its token ids, all that come before, and the salt of its sequence: whatever else
changes the entries, such as the adapter or the version of the weights. A page that becomes full when its like is known
is given back, and the sequence takes the known one: two requests with one prompt, computed at the same time, hold it
once.

    pages of 4 tokens: A has the ids 0 1 2 3 | 4 5 6 7 | 8, B opens with 0 1 2 3 | 4 5 9

    root -- 0123: page 0 (A, B) -- 4567: page 1 (A)      A's table: 0 1 2      B's table: 0 3
                                                         pages 2 and 3 are not full: nobody finds them

Writing. Nobody writes where others read. `fork` shares all pages of a sequence, the partly filled last one too, and a
sequence that makes room in a page that another one holds gets a copy. One that had room there before the fork goes on
behind the tokens that both have. A known page that only one sequence holds, and is about to write into (after
`shrink`), is known no more, nor are those that follow it.

Lookahead. Where the entry of a token depends on the one that follows, as that of the MTP layer does, the pool has a
`lookahead` of 1. A page is then known only with the token behind it, so a full page whose last entry is not final is
found by nobody, and who goes on behind it writes into it: after `fork` or `shrink` it is copied as a partly filled one
is. A sequence that was opened must go on with the token of its prompt, which the entries that it found depend on. With
pages of 4 tokens:

    A has 0 1 2 3       nobody finds the page: entry 3 waits for a token
    A has 0 1 2 3 | 4   a prompt 0 1 2 3 4 .. finds it, a prompt 0 1 2 3 9 .. does not

The count is exact. A sequence has all pages of the room that it has reserved; a full cache refuses with `FullError` and
changes nothing, so an engine can close a sequence, whose full pages are found again, and go on.

Every operation takes time for the pages that it touches, however many there are. With 100,000 pages on one core:
opening, filling and closing a sequence 8 us a page, evictions included; finding a page 3 us; `reserve` and `commit` of
one token 1.3 us together; a table's row of ten pages 0.5 us.
"""

from array import array
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from deepseek_jax.inference.page_pool import PAGE_SIZE, PagePool


class Copy(NamedTuple):
    """A page that the device copies, in all layers, before it writes. Copies are carried out in their order."""

    source: int
    target: int


class PagedSequence:
    """The pages of one sequence: as many tokens as `len` says are written, and there is room for some more."""

    def __init__(self, pool: PagePool, salt: Hashable, generation: int, ids: array, table: array, promised: array):
        """Begin with `ids` in the pages `table`, which are held for it; `open` and `fork` call this.

        The entries of `ids` are those of a sequence that goes on with `promised`.
        """
        self._pool = pool
        self._salt = salt
        self._generation = generation
        self._table = table
        self._ids = ids  # those written
        self._promised = promised
        self._room = len(ids)  # tokens that it may have written without another `reserve`
        self._is_open = True

    @classmethod
    def open(cls, pool: PagePool, ids: Sequence[int], salt: Hashable = None) -> "PagedSequence":
        """Return a sequence that begins with the full pages of `ids` that are known.

        At least one id is left to run through the model, because the logits after it are wanted. `len(sequence)` tells
        how many tokens need no prefill. `salt` is what else the entries depend on: sequences with different salts share
        nothing.
        """
        prompt = array("i", ids)
        table = array("i", pool.find(prompt if pool.lookahead else prompt[:-1], salt))
        length = PAGE_SIZE * len(table)
        promised = prompt[length : length + pool.lookahead] if length else array("i")
        return cls(pool, salt, pool.generation, prompt[:length], table, promised)

    def __len__(self) -> int:
        """Return the number of tokens that are written."""
        return len(self._ids)

    @property
    def num_pages(self) -> int:
        """Pages that it holds, those of reserved room included."""
        return len(self._table)

    @property
    def num_reserved(self) -> int:
        """Tokens for which there is room, beyond those that are written."""
        return self._room - len(self._ids)

    def reserve(self, num_tokens: int) -> list[Copy]:
        """Make room for `num_tokens` beyond those that are written; return the pages to copy first, one or none.

        Raises:
            FullError: there are not enough pages. Nothing has changed then.
        """
        self._check_open()
        length, pool = len(self._ids), self._pool
        if length + num_tokens <= self._room:
            return []
        first = length if self._promised else max(length - pool.lookahead, 0)  # entry that it writes
        starts_inside = first < PAGE_SIZE * -(-length // PAGE_SIZE) and self._room == length  # where it has no room yet
        must_copy = starts_inside and pool.is_shared(self._table[-1])
        taken = pool.take(-(-(length + num_tokens) // PAGE_SIZE) - len(self._table) + must_copy)
        copies = []
        if must_copy:
            copies = [Copy(self._table[-1], taken.pop())]
            pool.release(self._table[-1:])
            self._table[-1] = copies[0].target
        elif starts_inside:
            pool.unshare(self._table[-1])
        self._table.extend(taken)
        self._room = PAGE_SIZE * len(self._table)
        return copies

    def commit(self, ids: Sequence[int]) -> None:
        """Append tokens that the device has written, or writes before anything that it is given later.

        Raises:
            ValueError: there are more than `num_reserved`, or the first is not the one that the prompt had there.
        """
        self._check_open()
        if len(ids) > self.num_reserved:
            raise ValueError(f"{len(ids)} tokens are written and {self.num_reserved} reserved; call reserve first")
        num_final, lookahead = self._pool.num_final(len(self._ids)), self._pool.lookahead
        if self._promised and len(ids):
            if ids[0] != self._promised[0]:
                raise ValueError(
                    f"token {ids[0]} follows the pages that were found for a prompt with {self._promised[0]}; write the"
                    " prompt first"
                )
            self._promised = array("i")
        self._ids.extend(array("i", ids))
        if self._generation != self._pool.generation:
            return
        for i in range(num_final, self._pool.num_final(len(self._ids))):
            page_ids = self._ids[i * PAGE_SIZE : (i + 1) * PAGE_SIZE + lookahead]
            before = self._table[i - 1] if i else None
            self._table[i] = self._pool.share(self._table[i], before, page_ids, self._salt)

    def completes(self, num_tokens: int) -> bool:
        """Whether it has more pages that others may find, and that may change with that, with so many tokens."""
        return self._pool.num_final(num_tokens) > self._pool.num_final(len(self._ids))

    def shrink(self, num_tokens: int) -> None:
        """Keep the first `num_tokens`, and give back the pages beyond them, reserved ones too."""
        self._check_open()
        if not 0 <= num_tokens <= len(self._ids):
            raise ValueError(f"a sequence of {len(self._ids)} tokens cannot keep {num_tokens}")
        num_pages = -(-num_tokens // PAGE_SIZE)
        # Where it goes back into what is written, a fork may read; `reserve` finds out.
        self._room = min(self._room, PAGE_SIZE * num_pages) if num_tokens == len(self._ids) else num_tokens
        self._pool.release(self._table[num_pages:])
        del self._table[num_pages:]
        if num_tokens < len(self._ids):
            self._promised = array("i")
        del self._ids[num_tokens:]

    def fork(self) -> "PagedSequence":
        """Return another sequence with the same tokens in the same pages, without reserved room.

        With a lookahead its last entry is one that follows from what it writes next.
        """
        self._check_open()
        table = self._table[: -(-len(self._ids) // PAGE_SIZE)]
        self._pool.hold(table)
        return PagedSequence(self._pool, self._salt, self._generation, self._ids[:], table, self._promised[:])

    def close(self) -> None:
        """Let all pages go; the full ones stay known until they are evicted. A closed sequence stays closed."""
        if self._is_open:
            self._pool.release(self._table)
            self._is_open = False
            self._table, self._ids, self._room = array("i"), array("i"), 0

    def fill(self, row_P: np.ndarray) -> None:
        """Write the page numbers into an int32 row of the device's table, and leave what lies beyond them."""
        row_P[: len(self._table)] = self._table

    def _check_open(self) -> None:
        if not self._is_open:
            raise ValueError("the sequence is closed; open another one")

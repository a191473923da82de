"""The host's side of the paged cache: 10,000 random operations against a simulated device, then cases by name."""

import random
from collections import Counter

import numpy as np
import pytest

from deepseek_jax.inference import page_pool, pages
from deepseek_jax.inference.page_pool import PAGE_SIZE, FullError, PagePool
from deepseek_jax.inference.pages import PagedSequence


class Device:
    """Pages of token ids, and of those that follow: what the device's array of entries would hold."""

    def __init__(self, num_pages, page_size=PAGE_SIZE):
        self.pages, self.next, self.size = *np.full((2, num_pages, page_size), -1), page_size

    def append(self, sequence, ids, spare=0, found=False):
        """Reserve, copy, write and commit `ids`; `spare` more tokens are reserved.

        The entry of the token before them is written again for the one that follows, unless it was `found` so.
        """
        for source, target in sequence.reserve(len(ids) + spare):
            self.pages[target], self.next[target] = self.pages[source], self.next[source]
        table, start = table_of(sequence), len(sequence)
        for position, token in enumerate(ids, start=start):
            self.pages[table[position // self.size], position % self.size] = token
            before = position - 1
            if before >= start or (before >= 0 and not found):
                self.next[table[before // self.size], before % self.size] = token
        if len(ids):
            last = start + len(ids) - 1
            self.next[table[last // self.size], last % self.size] = -2  # follows from a token that is not written
        sequence.commit(ids)

    def read(self, sequence):
        return self.pages[table_of(sequence)].ravel()[: len(sequence)].tolist()

    def read_next(self, sequence):
        return self.next[table_of(sequence)].ravel()[: len(sequence)].tolist()


def table_of(sequence):
    row = np.full(sequence.num_pages, -1, np.int32)
    sequence.fill(row)
    return row.tolist()


def check_books(pool, sequences):
    """No page is lost or in two hands, and every count is that of the tables."""
    tables = [table_of(sequence) for sequence in sequences]
    holders = Counter(page for table in tables for page in table)
    assert all(len(set(table)) == len(table) for table in tables)
    assert pool._holders == [holders[page] for page in range(pool.num_pages)]
    everywhere = [*pool._free, *pool._kept, *holders]
    assert sorted(everywhere) == list(range(pool.num_pages))
    assert pool.num_available == pool.num_pages - len(holders)
    found, trees = {}, list(pool._roots.values())
    assert all(root.children for root in trees)
    while trees:
        node = trees.pop()
        trees.extend(node.children.values())
        found |= {child.page: child for child in node.children.values()}
    assert found == {page: node for page, node in enumerate(pool._nodes) if node is not None}
    assert set(pool._kept) <= set(found) and not set(pool._free) & set(found)
    order = {page: i for i, page in enumerate(pool._kept)}
    for page, i in order.items():  # what follows a kept page is kept, and goes before it
        assert all(order[child.page] < i for child in found[page].children.values())


class Model:
    """Sequences as lists of ids, and the same operations on them and on the pages."""

    def __init__(self, rng, num_pages, page_size, lookahead):
        self.rng, self.size = rng, page_size
        self.pool, self.device = PagePool(num_pages, lookahead), Device(num_pages, page_size)
        self.promised = {}  # with a lookahead: the token that a sequence which was just opened must go on with
        self.ids, self.salts, self.generations = {}, {}, {}  # of the open sequences
        self.generation, self.done = 0, Counter()

    def some(self, most):
        return self.rng.randint(0, most)

    def open(self):
        texts = [ids for ids in self.ids.values() if ids] or [[1]]
        prompt = self.rng.choice(texts)[: self.some(6 * self.size)] + self.new_ids(2 * self.size)
        salt = self.rng.choice("ab")
        sequence, most = PagedSequence.open(self.pool, prompt, salt), max(0, len(prompt) - 1) // self.size
        known = max((self.common(prompt, other) for other in self.ids if self.is_kin(other, salt)), default=0)
        assert min(known, most) * self.size <= len(sequence) <= most * self.size and len(sequence) % self.size == 0
        self.ids[sequence], self.salts[sequence] = prompt[: len(sequence)], salt
        self.generations[sequence] = self.generation
        if len(sequence) and self.pool.lookahead:
            self.promised[sequence] = prompt[len(sequence)]
        self.done["shared"] += len(sequence) > 0
        self.append(sequence, prompt[len(sequence) :])

    def is_kin(self, other, salt):
        return self.salts[other] == salt and self.generations[other] == self.generation

    def common(self, prompt, other):
        """Full pages that a prompt has in common with an open sequence, with the tokens that they depend on."""
        ids = self.ids[other]
        different = (i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b)
        return self.pool.num_final(next(different, min(len(prompt), len(ids))))

    def new_ids(self, most):
        return [self.rng.choice((3, 4)) for _ in range(self.some(most))]

    def append(self, sequence, ids):
        spare, length = self.some(self.size), len(sequence)
        if sequence in self.promised and ids:
            ids = [self.promised[sequence], *ids[1:]]
        first = length if sequence in self.promised else max(0, length - self.pool.lookahead)
        inside = first < -(-length // self.size) * self.size and not sequence.num_reserved
        last = table_of(sequence)[first // self.size] if inside else None
        shared = sum(last in table_of(other) for other in self.ids) > 1
        missing = -(-(length + len(ids) + spare) // self.size) - sequence.num_pages
        wanted = max(0, missing + shared) if len(ids) + spare else 0
        if wanted > self.pool.num_available:
            before = table_of(sequence), list(self.pool._free), list(self.pool._kept)
            with pytest.raises(FullError, match=f"the cache is full: {wanted} pages of"):
                sequence.reserve(len(ids) + spare)
            assert before == (table_of(sequence), list(self.pool._free), list(self.pool._kept))
            self.done["full"] += 1
            self.close()  # preempt
            return
        self.done["copied"] += shared and len(ids) + spare > 0
        self.device.append(sequence, ids, spare, found=sequence in self.promised)
        self.ids[sequence] = self.ids[sequence] + ids
        if ids:
            self.promised.pop(sequence, None)

    def close(self):
        sequence = self.rng.choice(list(self.ids))
        sequence.close()
        del self.ids[sequence], self.salts[sequence], self.generations[sequence]
        self.promised.pop(sequence, None)

    def check(self):
        """Each sequence reads its own ids, and where entries depend on the next one, they depend on its own."""
        for sequence, ids in self.ids.items():
            assert self.device.read(sequence) == ids
            if self.pool.lookahead:
                following = [*ids[1:], self.promised[sequence]] if sequence in self.promised else ids[1:]
                assert self.device.read_next(sequence)[: len(following)] == following

    def step(self):
        kind = self.rng.choices(
            ("open", "append", "fork", "shrink", "close", "forget"), weights=(20, 40, 10, 15, 15 + len(self.ids), 0.2)
        )[0]
        self.done[kind] += 1
        if kind == "forget":
            self.pool.forget()
            self.generation += 1
        elif kind == "open" or not self.ids:
            self.open()
        elif kind == "close":
            self.close()
        else:
            sequence = self.rng.choice(list(self.ids))
            if kind == "append":
                self.append(sequence, self.new_ids(2 * self.size))
            elif kind == "shrink":
                keep = max(0, len(sequence) - self.some(self.size + 2)) if self.some(1) else len(sequence)
                sequence.shrink(keep)
                if keep < len(self.ids[sequence]):
                    self.promised.pop(sequence, None)
                self.ids[sequence] = self.ids[sequence][:keep]
                assert sequence.num_pages == -(-keep // self.size)
            else:
                other = sequence.fork()
                self.ids[other], self.salts[other] = self.ids[sequence], self.salts[sequence]
                self.generations[other] = self.generations[sequence]
                if sequence in self.promised:
                    self.promised[other] = self.promised[sequence]


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize(("page_size", "num_steps"), [(4, 10_000), (PAGE_SIZE, 1_000)])
def test_random_operations_lose_no_page_and_mix_no_tokens(page_size, num_steps, lookahead, monkeypatch):
    """After every operation the books balance, and each sequence reads its own ids from its pages."""
    monkeypatch.setattr(page_pool, "PAGE_SIZE", page_size)
    monkeypatch.setattr(pages, "PAGE_SIZE", page_size)
    model = Model(random.Random(1), 40, page_size, lookahead)
    for _ in range(num_steps):
        model.step()
        check_books(model.pool, list(model.ids))
        model.check()
    assert min(model.done.values()) > 0 and model.pool.num_evicted > 10, model.done
    assert {"shared", "full", "copied", "forget"} <= set(model.done)
    while model.ids:
        model.close()
    assert model.pool.num_available == 40


def started(pool, device, prompt, salt=None):
    """A sequence whose whole prompt is written, and how much of it was found."""
    sequence = PagedSequence.open(pool, prompt, salt)
    num_found = len(sequence)
    device.append(sequence, prompt[num_found:])
    assert device.read(sequence) == prompt
    return sequence, num_found


@pytest.mark.parametrize(
    ("num_tokens", "num_found"), [(0, 0), (1, 0), (63, 0), (64, 0), (65, 64), (128, 64), (129, 128), (1000, 960)]
)
@pytest.mark.parametrize("ended", [True, False])
def test_a_prompt_finds_its_full_pages_but_for_its_last_token(num_tokens, num_found, ended):
    """Of an open sequence, and of one that has ended."""
    pool, device, prompt = PagePool(100), Device(100), list(range(num_tokens))
    first, _ = started(pool, device, prompt)
    if ended:
        first.close()
        assert (pool.num_kept, pool.num_free) == (num_tokens // 64, 100 - num_tokens // 64)
    second, got = started(pool, device, prompt)
    assert got == num_found
    check_books(pool, [second] if ended else [first, second])


def test_a_prefix_outlives_the_request_that_made_it():
    pool, device = PagePool(3), Device(3)
    first, _ = started(pool, device, list(range(70)))
    second, num_found = started(pool, device, list(range(64)) + [99])
    first.close()
    first.close()  # a cancelled request may end twice
    assert num_found == 64 and (pool.num_free, pool.num_kept) == (1, 0)
    third = PagedSequence.open(pool, [5])
    device.append(third, [5])
    with pytest.raises(FullError, match="1 pages of 64 tokens are wanted, and sequences hold 3 of 3"):
        PagedSequence.open(pool, [6]).reserve(1)
    assert device.read(second) == [*range(64), 99]


def test_the_oldest_is_evicted_first_and_a_prefix_after_what_follows():
    pool, device = PagePool(6), Device(6)
    old, new = list(range(130)), list(range(500, 700))
    for prompt in (old, new):
        started(pool, device, prompt)[0].close()
    assert (pool.num_kept, pool.num_free) == (5, 1)
    device.append(PagedSequence.open(pool, [7]), [7] * 65)  # two pages: the free one, and the second of `old`
    assert pool.num_evicted == 1
    for prompt, num_found in ((old, 64), (new, 192)):
        sequence = PagedSequence.open(pool, prompt)
        assert len(sequence) == num_found
        sequence.close()
    device.append(PagedSequence.open(pool, [8]), [8])  # `old` was used before `new`: its first page goes now
    assert [len(PagedSequence.open(pool, prompt)) for prompt in (old, new)] == [0, 192]


def test_with_a_lookahead_a_page_is_found_with_the_token_that_follows_it():
    """Its last entry depends on that token; a sequence that was opened cannot go on with another one."""
    pool, device, prompt = PagePool(10, lookahead=1), Device(10), list(range(64))
    first, _ = started(pool, device, prompt)
    assert len(PagedSequence.open(pool, [*prompt, 64])) == 0
    device.append(first, [64])
    assert [len(PagedSequence.open(pool, [*prompt, *more])) for more in ([], [99], [64])] == [0, 0, 64]
    second = PagedSequence.open(pool, [*prompt, 64, 65])
    assert second.reserve(2) == []
    with pytest.raises(ValueError, match="token 99 follows the pages that were found for a prompt with 64"):
        second.commit([99, 65])
    second.commit([64, 65])
    fork = first.fork()
    fork.shrink(64)  # goes back, to another token: the full page is copied, and its last entry written again
    (copy,) = fork.reserve(1)
    device.pages[copy.target], device.next[copy.target] = device.pages[copy.source], device.next[copy.source]
    device.append(fork, [99])
    assert device.read_next(first)[63] == 64 and device.read_next(fork)[63] == 99
    assert len(PagedSequence.open(pool, [*prompt, 99])) == 64
    with pytest.raises(ValueError, match="lookahead = 2 must be 0, or 1"):
        PagePool(1, lookahead=2)


def test_nothing_is_shared_across_salts_or_after_forget():
    pool, device, prompt = PagePool(20), Device(20), list(range(100))
    first, _ = started(pool, device, prompt, "adapter")
    assert [len(PagedSequence.open(pool, prompt, salt)) for salt in (None, "adapter")] == [0, 64]
    pool.forget()
    device.append(first, list(range(100)))  # goes on with the old weights: nobody may find it
    assert len(PagedSequence.open(pool, prompt, "adapter")) == 0 and device.read(first) == prompt * 2
    first.close()
    assert pool.num_kept == 0


def test_a_collision_of_hashes_shares_nothing(monkeypatch):
    class Same(bytes):
        def __hash__(self):
            return 0

    monkeypatch.setattr(page_pool, "_key", lambda ids: Same(ids.tobytes()))
    pool, device = PagePool(20), Device(20)
    started(pool, device, list(range(130)))
    assert len(PagedSequence.open(pool, [*range(64), *range(66)])) == 64
    assert len(PagedSequence.open(pool, [*range(64), *range(64, 130)])) == 128
    assert len(PagedSequence.open(pool, [1, *range(1, 130)])) == 0


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="num_pages = 0 must be at least 1"):
        PagePool(0)
    sequence = PagedSequence.open(PagePool(2), [1])
    sequence.reserve(3)
    with pytest.raises(ValueError, match="65 tokens are written and 64 reserved"):
        sequence.commit([1] * 65)
    with pytest.raises(ValueError, match="a sequence of 0 tokens cannot keep 1"):
        sequence.shrink(1)
    sequence.close()
    with pytest.raises(ValueError, match="the sequence is closed"):
        sequence.reserve(1)

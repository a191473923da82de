"""The pages of a latent cache, as the host counts them: free, held by sequences, or kept for a prompt that repeats.

A full page is known by its ids, all that come before, and a salt. Known pages are a tree: below a page lie, by their
ids, the pages that have followed it. Looking up a page hashes its ids, and the dictionary then compares them, so ids
with equal hashes share nothing.

Some entries depend on tokens that follow: that of the MTP layer on one (`model.drafter`). A pool with a `lookahead` of
one knows a page by its ids and the next. So a page is known only when the token behind it is there, and a prompt finds
it if it goes on with that token.

A page that no sequence holds stays in the tree, and is taken when no page is free, the longest unused first. A sequence
holds every page before a page that it holds, and lets the last go first, so no page is taken before those that follow
it. `pages.PagedSequence` is who holds.
"""

from array import array
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence

PAGE_SIZE = 64  # tokens, FlashMLA's


class FullError(ValueError):
    """More pages are wanted than are free or kept for nobody."""


class _Node:
    """A full page that can be found: what it holds below its parent, and what has followed it."""

    __slots__ = ("children", "key", "page", "parent")

    def __init__(self, page: int, parent: "_Node | None", key: Hashable):
        self.page = page
        self.parent = parent
        self.key = key
        self.children: dict[Hashable, _Node] = {}


class PagePool:
    """The pages of one cache."""

    def __init__(self, num_pages: int, lookahead: int = 0):
        """Begin with `num_pages` free pages, numbered from 0; entries depend on `lookahead` tokens that follow."""
        if num_pages < 1:
            raise ValueError(f"num_pages = {num_pages} must be at least 1; a page holds {PAGE_SIZE} tokens")
        if lookahead not in (0, 1):
            raise ValueError(f"lookahead = {lookahead} must be 0, or 1 where an MTP layer has entries, too")
        self.num_pages = num_pages
        self.lookahead = lookahead
        self.num_evicted = 0  # pages taken from the tree so far
        self._free = list(range(num_pages - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()  # held by nobody, in the tree; the longest unused first
        self._holders = [0] * num_pages  # sequences that hold a page
        self._nodes: list[_Node | None] = [None] * num_pages
        self._roots: dict[Hashable, _Node] = {}  # one tree per salt
        self._generation = 0

    @property
    def num_free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def num_kept(self) -> int:
        """Pages that no sequence holds and a prompt may find; they are evicted when pages are wanted."""
        return len(self._kept)

    @property
    def num_available(self) -> int:
        """Pages that a sequence can get: free or kept."""
        return len(self._free) + len(self._kept)

    @property
    def generation(self) -> int:
        """How often all has been forgotten."""
        return self._generation

    def find(self, ids: array, salt: Hashable) -> list[int]:
        """Return the full pages that are known to begin with `ids`, held for one sequence."""
        found, node = [], self._roots.get(salt)
        for start in range(0, self.num_final(len(ids)) * PAGE_SIZE, PAGE_SIZE):
            node = node and node.children.get(_key(ids[start : start + PAGE_SIZE + self.lookahead]))
            if node is None:
                break
            found.append(node.page)
        self.hold(found)
        return found

    def num_final(self, num_tokens: int) -> int:
        """Return how many pages of so many tokens are full, with entries that will not change any more."""
        return max(num_tokens - self.lookahead, 0) // PAGE_SIZE

    def forget(self) -> None:
        """Let nobody find what is there now: the weights have changed. Open sequences keep their pages."""
        self._generation += 1
        self._roots.clear()
        self._free.extend(self._kept)
        self._kept.clear()
        self._nodes = [None] * self.num_pages

    def take(self, num_pages: int) -> list[int]:
        """Return pages for one sequence; refuse, with nothing changed, if there are not as many."""
        if num_pages > self.num_available:
            num_held = self.num_pages - self.num_available
            raise FullError(
                f"the cache is full: {num_pages} pages of {PAGE_SIZE} tokens are wanted, and sequences hold {num_held}"
                f" of {self.num_pages}; end a sequence, or make a larger cache"
            )
        while len(self._free) < num_pages:
            page, _ = self._kept.popitem(last=False)
            self._unlist(page)
            self._free.append(page)
            self.num_evicted += 1
        taken = [self._free.pop() for _ in range(num_pages)]
        for page in taken:
            self._holders[page] = 1
        return taken

    def is_shared(self, page: int) -> bool:
        """Whether more than one sequence holds a page."""
        return self._holders[page] > 1

    def hold(self, pages: Iterable[int]) -> None:
        """Hold pages for one more sequence."""
        for page in pages:
            self._holders[page] += 1
            self._kept.pop(page, None)

    def release(self, pages: Sequence[int]) -> None:
        """Let pages that follow each other go, the last first."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if self._nodes[page] is None:
                self._free.append(page)
            else:
                self._kept[page] = None

    def share(self, page: int, before: int | None, ids: array, salt: Hashable) -> int:
        """Let a full page be found behind the page `before`; return the page that is found there, it or its like.

        `ids` are those of the page and the `lookahead` behind it.
        """
        key = _key(ids)
        if before is None:
            parent = self._roots.setdefault(salt, _Node(-1, None, salt))
        else:
            parent = self._nodes[before]
            assert parent is not None, "the pages before a full page are known"
        node = parent.children.get(key)
        if node is None:
            self._nodes[page] = parent.children[key] = _Node(page, parent, key)
            return page
        if node.page != page:
            self.hold([node.page])
            self.release([page])
        return node.page

    def unshare(self, page: int) -> None:
        """Let nobody find a page that one sequence holds, and with it all that follow, which nobody holds."""
        node, followers = self._nodes[page], []
        if node is None:
            return
        found = [node]
        while found:
            node = found.pop()
            followers.extend(node.children.values())
            found.extend(node.children.values())
        for node in reversed(followers):
            del self._kept[node.page]
            self._unlist(node.page)
            self._free.append(node.page)
        self._unlist(page)

    def _unlist(self, page: int) -> None:
        """Take a page that no other follows out of the tree."""
        node = self._nodes[page]
        assert node is not None and node.parent is not None and not node.children, "only leaves leave the tree"
        del node.parent.children[node.key]
        self._nodes[page] = None
        if node.parent.parent is None and not node.parent.children:
            del self._roots[node.parent.key]


def _key(ids: array) -> Hashable:
    """Return what a page of ids is looked up by."""
    return ids.tobytes()

"""The pages of one data shard: who holds which, taken on demand and given back. Knows numbers only."""

from collections import OrderedDict
from collections.abc import Iterable


class PagePool:
    """Pages 0 to `num_pages` - 1, each free or held by one sequence or several.

    A page that was marked by `keep` stays as it is when nobody holds it any more: it is free, and can be shared again
    until it is allocated, which happens to it after all that are not kept, and to those released longest ago first.

    Attributes:
        num_pages: of the whole pool.
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages))
        self._free_kept: OrderedDict[int, None] = OrderedDict()  # released longest ago first
        self._kept = [False] * num_pages
        self._holders = [0] * num_pages

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free) + len(self._free_kept)

    def num_held(self, pages: Iterable[int]) -> int:
        """How many of `pages` somebody holds."""
        return sum(self._holders[page] > 0 for page in pages)

    def allocate(self, count: int) -> list[int]:
        """`count` free pages, held once and not kept; ask `num_free` before."""
        if count > self.num_free:
            raise ValueError(f"{count} pages wanted, {self.num_free} of {self.num_pages} are free")
        taken = [self._take_free() for _ in range(count)]
        for page in taken:
            self._holders[page], self._kept[page] = 1, False
        return taken

    def _take_free(self) -> int:
        return self._free.pop() if self._free else self._free_kept.popitem(last=False)[0]

    def keep(self, pages: Iterable[int]) -> None:
        """Marks pages, which somebody holds, as worth finding again."""
        for page in pages:
            self._check_held(page)
            self._kept[page] = True

    def share(self, pages: Iterable[int]) -> None:
        """Counts one more holder of each page, which is held or kept."""
        for page in pages:
            if page in self._free_kept:
                del self._free_kept[page]
            else:
                self._check_held(page)
            self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Counts one holder of each page less; what nobody holds any more is free."""
        for page in pages:
            self._check_held(page)
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free_up(page)

    def _free_up(self, page: int) -> None:
        if self._kept[page]:
            self._free_kept[page] = None
        else:
            self._free.append(page)

    def _check_held(self, page: int) -> None:
        if not self._holders[page]:
            raise ValueError(f"page {page} is free: nobody holds it")

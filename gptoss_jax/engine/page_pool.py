"""The pages of one data shard: who holds which, taken on demand and given back. Knows numbers only."""

from collections.abc import Iterable


class PagePool:
    """Pages 0 to `num_pages` - 1, each free or held by one sequence or several.

    Attributes:
        num_pages: of the whole pool.
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages))
        self._holders = [0] * num_pages

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` free pages, held once; ask `num_free` before."""
        if count > self.num_free:
            raise ValueError(f"{count} pages wanted, {self.num_free} of {self.num_pages} are free")
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """Counts one more holder of each page, which somebody holds already."""
        for page in pages:
            self._check_held(page)
            self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Counts one holder of each page less; what nobody holds any more is free."""
        for page in pages:
            self._check_held(page)
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)

    def _check_held(self, page: int) -> None:
        if not self._holders[page]:
            raise ValueError(f"page {page} is free: nobody holds it")

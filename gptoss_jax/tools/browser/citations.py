"""What an answer cites: marks such as 【3†L9-L11】, resolved to pages that the browser has shown."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gptoss_jax.tools.browser.page import Page

_CITATION = re.compile(r"【(\d{1,6})†L(\d{1,9})(?:-L?(\d{1,9}))?(?:†[^】]*)?】")


@dataclass(frozen=True)
class Citation:
    """A mark in an answer, and what it stands for.

    Attributes:
        start: of the mark in the text, in characters.
        end: the character after it.
        url: of the page.
        title: of the page.
        lines: of the page, the first and the last; None where a search's result is cited.
    """

    start: int
    end: int
    url: str
    title: str
    lines: tuple[int, int] | None


def citations(text: str, pages: Sequence[Page]) -> list[Citation]:
    """The marks of a text that name a page and lines of it; others stand for nothing, and are left out.

    What is cited from results, of a search or of `find`, is the page whose link stands above.

    Args:
        text: a final answer.
        pages: `BrowserTool.pages`.
    """
    found = (_resolved(mark, pages) for mark in _CITATION.finditer(text))
    return [citation for citation in found if citation]


def _resolved(mark: re.Match[str], pages: Sequence[Page]) -> Citation | None:
    cursor, first, last = int(mark[1]), int(mark[2]), int(mark[3] or mark[2])
    if cursor >= len(pages) or not first <= last < len(pages[cursor].lines):
        return None
    page = pages[cursor]
    if not page.is_results:
        return Citation(mark.start(), mark.end(), page.url, page.title, (first, last))
    link = page.link_before(last)
    if link is None:
        return None
    line = (link.line, link.line) if page.url and link.line is not None else None
    return Citation(mark.start(), mark.end(), link.url, link.title, line)

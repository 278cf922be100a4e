"""A page as the model reads it: numbered lines of at most 80 characters, links as marks, and matches found in it.

The forms are those of OpenAI's simple_browser, which the models were trained with.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from urllib.parse import quote

WIDTH = 80
_MAX_MATCHES, _LINES_OF_A_MATCH = 50, 4
_LINK = re.compile(r"【(\d+)†([^†】]+)((?:†[^†】]+)?)】")


class BrowserError(Exception):
    """What keeps a page from being shown, in one line that the model reads."""


@dataclass(frozen=True)
class Link:
    """Where a mark `【id†text】` leads.

    Attributes:
        url: the page.
        title: of the page, where it is known.
        line: where on the page, or None for its beginning.
    """

    url: str
    title: str = ""
    line: int | None = None


@dataclass(frozen=True)
class Page:
    """Text with marks, and where they lead.

    Attributes:
        url: what it is opened by; "" for results of a search.
        title: what stands above it.
        text: with marks `【id†text】` or `【id†text†domain】`.
        links: by their ids.
        is_results: results of a search or of `find`, which quote other pages.
    """

    url: str
    title: str
    text: str
    links: dict[int, Link] = field(default_factory=dict)
    is_results: bool = False

    @cached_property
    def lines(self) -> list[str]:
        """As they are numbered."""
        return [line for paragraph in self.text.split("\n") for line in _wrapped(paragraph)]

    def link_before(self, line: int) -> Link | None:
        """The last link whose mark stands at this line or above it."""
        for text in reversed(self.lines[: line + 1]):
            if marks := _LINK.findall(text):
                return self.links.get(int(marks[-1][0]))
        return None


def plain(text: str) -> str:
    """Text of others without what the browser's marks are made of, so that no page can write a mark."""
    return text.replace("【", "〖").replace("】", "〗").replace("\u200b", "")


def mark(number: int, text: str, domain: str = "") -> str:
    """A link in a text."""
    text = " ".join(text.replace("†", "‡").split())
    return f"【{number}†{text}†{domain}】" if domain else f"【{number}†{text}】"


def found(page: Page, pattern: str) -> Page:
    """Where a text, in any case, stands in a page: another page, whose links lead to the matches."""
    matches = list(_matches(page, pattern))
    shown = [f"# {mark(n, f'match at L{line}')}\n{text}" for n, (line, text) in enumerate(matches)]
    return Page(
        url=f"{page.url}/find?pattern={quote(pattern)}",
        title=f"Find results for text: `{pattern}` in `{page.title}`",
        text="\n\n".join(shown) or f"No `find` results for pattern: `{pattern}`",
        links={n: Link(page.url, page.title, line) for n, (line, _) in enumerate(matches)},
        is_results=True,
    )


def _matches(page: Page, pattern: str) -> Iterator[tuple[int, str]]:
    lines = _without_marks("\n".join(page.lines)).split("\n")
    line, count = 0, 0
    while line < len(lines) and count < _MAX_MATCHES:
        if pattern.lower() not in lines[line].lower():
            line += 1
            continue
        yield line, "\n".join(lines[line : line + _LINES_OF_A_MATCH])
        line, count = line + _LINES_OF_A_MATCH, count + 1


def _without_marks(text: str) -> str:
    """The links' texts alone, on the lines where they were."""
    return _LINK.sub(lambda link: link[2] + "\n" * link[3].count("\n"), text)


def _wrapped(paragraph: str) -> Iterator[str]:
    start = 0
    while len(paragraph) - start > WIDTH:
        space = paragraph.rfind(" ", start, start + WIDTH)
        end = space + 1 if space > start else start + WIDTH
        yield paragraph[start:end]
        start = end
    yield paragraph[start:]

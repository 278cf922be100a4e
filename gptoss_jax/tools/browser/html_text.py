"""HTML -> a page: text with links as marks, by the standard library's parser, in bounded time."""

import re
import time
from html.parser import HTMLParser
from urllib.parse import urljoin, urlsplit

from gptoss_jax.tools.browser.page import BrowserError, Link, Page, mark, plain

_SKIPPED = frozenset({"script", "style", "noscript", "template", "svg", "math", "iframe", "object", "select"})
_BLOCKS = frozenset(
    "address article aside blockquote br dd details div dl dt fieldset figcaption figure footer form h1 h2 h3 h4 h5 h6 "
    "header hr li main nav ol option p pre section summary table tbody tfoot thead tr ul".split()
)
_CELLS = frozenset({"td", "th"})
_CHUNK, _MAX_SECONDS = 1 << 13, 5.0
_MAX_UNFINISHED = 1 << 14  # characters of a tag, which the parser reads again with each chunk


def html_page(html: str, url: str) -> Page:
    """What a browser would show of HTML, as text.

    Raises:
        BrowserError: it takes too long, which takes HTML that is made to.
    """
    reader, ends_at = _Reader(url), time.thread_time() + _MAX_SECONDS
    html = plain(html)
    for start in range(0, len(html), _CHUNK):
        if time.thread_time() > ends_at:
            raise BrowserError(f"the HTML of {url[:200]} takes more than {_MAX_SECONDS:g} seconds of CPU time to read")
        reader.feed(html[start : start + _CHUNK])
        reader.drop_unfinished()
    # No reader.close(): at the end of a text, its time grows with the square of unfinished tags.
    return Page(url, " ".join(reader.title.split()) or url, _tidied("".join(reader.parts)), reader.links)


def _tidied(text: str) -> str:
    lines = [line.strip(" ") if not line.startswith("\t") else line[1:].rstrip() for line in text.split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


class _Reader(HTMLParser):
    """Collects text. A line of `pre` begins with a tab, so that `_tidied` leaves its spaces."""

    def __init__(self, url: str):
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.links: dict[int, Link] = {}
        self.title = ""
        self._url, self._domain = url, urlsplit(url).netloc
        self._ids: dict[str, int] = {}
        self._skipped = self._preformatted = self._images = 0
        self._in_title = False
        self._link: tuple[str, int] | None = None  # where it leads, and the first of its parts

    def drop_unfinished(self) -> None:
        """Forget the beginning of what does not end; scripts and comments may be long, and their end still counts."""
        if len(self.rawdata) > _MAX_UNFINISHED:
            begins = "" if self.cdata_elem else "<!--" if self.rawdata.startswith("<!--") else None
            self.rawdata = "" if begins is None else begins + self.rawdata[-16:]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in _SKIPPED:
            self._skipped += 1
        elif tag == "title" and not self.title:
            self._in_title = True
        elif self._skipped:
            return
        elif tag == "a":
            self._end_link()
            self._link = (given.get("href") or "", len(self.parts))
        elif tag == "img":
            name = given.get("alt") or given.get("title")
            self.parts.append(f"[Image {self._images}: {name}]" if name else f"[Image {self._images}]")
            self._images += 1
        elif tag in _CELLS:
            self.parts.append(" ")
        elif tag in _BLOCKS:
            self._start_block(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in _SKIPPED:
            self._skipped = max(0, self._skipped - 1)
        elif tag == "title":
            self._in_title = False
        elif tag == "a":
            self._end_link()
        elif tag in _BLOCKS and not self._skipped:
            self._preformatted = max(0, self._preformatted - (tag == "pre"))
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data
        elif self._preformatted:
            self.parts.append(data.replace("\n", "\n\t"))
        elif not self._skipped:
            self.parts.append(re.sub(r"\s+", " ", data))

    def parse_marked_section(self, i: int, report: int = 1) -> int:
        """`<![...>` is a comment to browsers; the parser before Python 3.14 raises AssertionError for most."""
        del report
        return self.parse_bogus_comment(i)

    def _start_block(self, tag: str) -> None:
        if tag.startswith("h") and tag[1:].isdigit():
            self.parts.append(f"\n\n{'#' * int(tag[1:])} ")
        else:
            self.parts.append({"li": "\n  * ", "p": "\n\n", "pre": "\n\n\t", "hr": "\n* * *\n"}.get(tag, "\n"))
        self._preformatted += tag == "pre"

    def _end_link(self) -> None:
        if self._link is None:
            return
        (href, first), self._link = self._link, None
        text = " ".join("".join(self.parts[first:]).split())
        if not text or href.startswith(("#", "mailto:", "javascript:", "data:")):
            return
        try:
            target = urljoin(self._url, href.strip()).partition("#")[0]
            domain = urlsplit(target).netloc
        except ValueError:  # a broken host, such as http://[
            return
        number = self._ids.setdefault(target, len(self._ids))
        self.links[number] = Link(target)
        self.parts[first:] = [mark(number, text, "" if domain == self._domain else domain)]

"""Pages of a folder: .txt, .md and .html files, searched by SQLite's full-text index in the order of bm25.

The folder is read once, in the beginning. What a model asks for is looked up among the names that were found then: no
call opens a file.
"""

import os
import posixpath
import re
import sqlite3
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from gptoss_jax.errors import GptossError, one_line
from gptoss_jax.tools.browser.html_text import html_page
from gptoss_jax.tools.browser.page import BrowserError, Link, Page, mark, plain

_MAX_FILE_BYTES = 4 << 20
_MAX_WORDS = 32
_APPLICATION, _SCHEMA = 0x67707462, """
CREATE TABLE IF NOT EXISTS files (id INTEGER PRIMARY KEY, url TEXT UNIQUE, stamp TEXT, source TEXT);
CREATE VIRTUAL TABLE IF NOT EXISTS pages USING fts5(title, text);
"""  # fmt: skip
_RANKED = """
SELECT url, title, snippet(pages, 1, '', '', ' ... ', 40) FROM pages JOIN files ON files.id = pages.rowid
WHERE pages MATCH ? ORDER BY bm25(pages, 4, 1), url LIMIT ?
"""
_MARKDOWN_LINK = re.compile(r"(?<!!)\[([^\[\]]+)\]\(<?([^()\s<>]+)>?(?:\s[^()]*)?\)")
_UNSPEAKABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_KINDS = (".txt", ".md", ".markdown", ".html", ".htm")


class LocalFolder:
    """A backend of documents on this machine.

    Hidden files, links, what is no regular file, and files of more than 4 MiB are left out: `skipped` names the last. A
    page's URL is its path in the folder.

    Args:
        folder: the documents.
        index: a file to keep the index in, so that the next start reads changed files only; None keeps it in memory.

    Raises:
        GptossError: no folder, no document in it, an index that is no such file, or an SQLite without FTS5.
    """

    def __init__(self, folder: Path, index: Path | None = None):
        if not folder.is_dir():
            raise GptossError(f"{one_line(str(folder))} is no folder; expected one of .txt, .md or .html documents")
        self._lock = threading.Lock()  # one connection, whatever thread asks
        self.skipped: tuple[str, ...] = ()
        try:
            self._database = sqlite3.connect(index or ":memory:", check_same_thread=False, timeout=30)
            self._prepare(index)
            self._read(folder)
        except sqlite3.Error as error:
            raise GptossError(f"the index of {one_line(str(folder))} ({index or 'in memory'}): {error}") from None

    def search(self, query: str, limit: int) -> Page:
        """Documents that hold any of the words, best first."""
        words = [word.lower() for word in re.findall(r"\w+", query)[:_MAX_WORDS]]
        if not words:
            raise BrowserError(f"no words to search for in {query[:100]!r}")
        with self._lock:
            rows = self._database.execute(_RANKED, (" OR ".join(f'"{word}"' for word in words), limit)).fetchall()
        shown = [f"  * {mark(n, title, url)} {' '.join(text.split())}" for n, (url, title, text) in enumerate(rows)]
        links = {n: Link(url, title, self._best_line(url, words)) for n, (url, title, _) in enumerate(rows)}
        text = "\n\n".join(("# Search Results", *(shown or ["No results"])))
        return Page("", plain(query), text, links, is_results=True)

    def fetch(self, url: str, *, as_source: bool) -> Page:
        """A document by its path in the folder."""
        name = url.partition("#")[0]
        with self._lock:
            row = self._database.execute(
                "SELECT url, source FROM files WHERE url IN (?, ?)", (name, unquote(name))
            ).fetchone()
        if row is None:
            raise BrowserError(f"there is no page {url[:200]!r} here; search, and open a result by its id")
        return _page(row[0], row[1], as_source)

    def close(self) -> None:
        """Close the index."""
        with self._lock:
            self._database.close()

    def _prepare(self, index: Path | None) -> None:
        [application] = self._database.execute("PRAGMA application_id").fetchone()
        [tables] = self._database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables and application != _APPLICATION:
            raise GptossError(f"{index} is a database of something else; name another file for the index")
        self._database.execute(f"PRAGMA application_id = {_APPLICATION}")
        self._database.executescript(_SCHEMA)

    def _read(self, folder: Path) -> None:
        """Brings the index to what lies in the folder, in one transaction."""
        skipped, urls = [], set()
        with self._database as database:
            for path in _documents(folder):
                url = _url(path.relative_to(folder))
                found = _contents(path)
                if found is None:
                    continue
                stamp, data = found
                if len(data) > _MAX_FILE_BYTES:
                    skipped.append(url)
                    continue
                urls.add(url)
                if not database.execute("SELECT 1 FROM files WHERE url = ? AND stamp = ?", (url, stamp)).fetchone():
                    self._forget(url)
                    self._add(url, stamp, data.decode(errors="replace"))
            for (url,) in database.execute("SELECT url FROM files").fetchall():
                if url not in urls:
                    self._forget(url)
        self.skipped = tuple(skipped)
        if not urls:
            raise GptossError(f"{one_line(str(folder))} holds no document; expected {', '.join(_KINDS)} files")

    def _add(self, url: str, stamp: str, source: str) -> None:
        try:
            page = _page(url, source, as_source=False)
        except BrowserError as error:
            raise GptossError(f"{one_line(url)}: {error}") from None
        added = self._database.execute("INSERT INTO files (url, stamp, source) VALUES (?, ?, ?)", (url, stamp, source))
        text = re.sub(r"【\d+†([^†】]+)[^】]*】", r"\1", page.text)
        self._database.execute(
            "INSERT INTO pages (rowid, title, text) VALUES (?, ?, ?)", (added.lastrowid, page.title, text)
        )

    def _forget(self, url: str) -> None:
        self._database.execute("DELETE FROM pages WHERE rowid IN (SELECT id FROM files WHERE url = ?)", (url,))
        self._database.execute("DELETE FROM files WHERE url = ?", (url,))

    def _best_line(self, url: str, words: list[str]) -> int:
        """The first line that holds the most of the words."""
        lines = [line.lower() for line in self.fetch(url, as_source=False).lines]
        return max(range(len(lines)), key=lambda n: (sum(word in lines[n] for word in words), -n), default=0)


def _documents(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):  # which follows no links
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(_KINDS) and not name.startswith("."):
                yield Path(parent, name)


def _url(path: Path) -> str:
    """A path as text of one line: control characters, and bytes that are no UTF-8, are spelled out."""
    return _UNSPEAKABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), path.as_posix())


def _contents(path: Path) -> tuple[str, bytes] | None:
    """When a file was changed, and its bytes, as far as they count; None for a link, a pipe and their like."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if path.is_symlink():
            return None
        raise GptossError(f"{one_line(str(path))} cannot be read: {error.strerror}") from None
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return None
        return f"{status.st_mtime_ns} {status.st_size}", file.read(_MAX_FILE_BYTES + 1)


def _page(url: str, source: str, as_source: bool) -> Page:
    kind = posixpath.splitext(url)[1].lower()
    if not as_source and kind in (".html", ".htm"):
        return html_page(source, url)
    text = plain(source).replace("\r\n", "\n")
    if as_source or kind == ".txt":
        return Page(url, url, text)
    return _markdown_page(url, text)


def _markdown_page(url: str, text: str) -> Page:
    """Markdown as it is written, but its links are marks."""
    ids: dict[str, int] = {}

    def marked(link: re.Match[str]) -> str:
        target = link[2]
        if target.startswith("#"):
            return link[1]
        if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", target):
            target = posixpath.normpath(posixpath.join(posixpath.dirname(url), target.partition("#")[0]))
        return mark(ids.setdefault(target, len(ids)), link[1])

    text = _MARKDOWN_LINK.sub(marked, text)
    heading = re.search(r"^# +(.+)$", text, re.MULTILINE)
    return Page(
        url, heading[1].strip() if heading else url, text, {number: Link(target) for target, number in ids.items()}
    )

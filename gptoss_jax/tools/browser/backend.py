"""Where pages come from: what the browser asks of a folder of documents, or of hosts."""

from typing import Protocol, runtime_checkable

from gptoss_jax.tools.browser.page import Page


@runtime_checkable
class Backend(Protocol):
    """A source of pages. Both methods raise `page.BrowserError` for what cannot be shown, and end by themselves."""

    def search(self, query: str, limit: int) -> Page:
        """Results of a search, the best first, each a link (`Page.is_results`)."""
        ...

    def fetch(self, url: str, *, as_source: bool) -> Page:
        """The page of a URL; `as_source`: as it is written, without reading HTML or Markdown."""
        ...

    def close(self) -> None:
        """Let go of files and connections."""
        ...

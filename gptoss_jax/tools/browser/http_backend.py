"""Pages of named hosts over HTTP: GET alone, to public addresses alone, bounded in bytes and time.

A host's name is resolved once per request, every address that comes back must be public, and the connection goes to one
of these addresses, so that no second answer of a name server can lead elsewhere. Each redirect is checked like a URL.
"""

import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import NamedTuple
from urllib.parse import quote, urljoin, urlsplit

from gptoss_jax.errors import GptossError, short
from gptoss_jax.tools.browser.html_text import html_page
from gptoss_jax.tools.browser.page import BrowserError, Page, plain

_HOST = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*(:\d{1,5})?")
_PORTS = {"http": 80, "https": 443}
_REDIRECTS, _MAX_REDIRECTS = (301, 302, 303, 307, 308), 5
_MAX_URL_CHARACTERS, _AS_WRITTEN = 2048, "/%:@!$&'()*+,;=~"
_HTML = ("text/html", "application/xhtml+xml")
_TEXT = re.compile(r"text/[a-z0-9.+-]+|application/(xhtml\+xml|json|xml)")
_CHARSET = re.compile(  # Python has others under such names that are no text, or slow
    r"utf-?(8|16)|us-ascii|iso-8859-\d+|windows-125\d|shift_jis|euc-(jp|kr)|gbk?|gb(2312|18030)|big5|koi8-[ru]"
)
_GLOBAL_IPV6 = ipaddress.ip_network(
    "2000::/3"
)  # outside it are addresses that carry one of IPv4 inside, and local ones

Resolve = Callable[[str, int], list[str]]
Connect = Callable[[str, int, float], socket.socket]


class _Target(NamedTuple):
    scheme: str
    host: str
    port: int
    path: str  # with the query, as it is sent


class _Reply(NamedTuple):
    status: int
    kind: str
    charset: str
    location: str | None
    body: bytes
    is_cut: bool


def _addresses(host: str, port: int) -> list[str]:
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def _connection(address: str, port: int, seconds: float) -> socket.socket:
    return socket.create_connection((address, port), seconds)


class HttpBackend:
    """A backend of hosts that are named one by one.

    It sends no cookies and no credentials, obeys no proxy, and cannot search.

    Args:
        hosts: "docs.example.org", or "docs.example.org:8080"; without a port those of http and https are meant.
        max_bytes: of a page; more is cut, and the page says so.
        seconds: of a page with its redirects, name look-ups aside.
        resolve: (host, port) -> addresses.
        connect: (address, port, seconds) -> a socket.
        tls: whose certificates are taken; the system's authorities unless given.

    Raises:
        GptossError: no host, or what is none.
    """

    def __init__(
        self,
        hosts: Collection[str],
        *,
        max_bytes: int = 2 << 20,
        seconds: float = 20.0,
        resolve: Resolve = _addresses,
        connect: Connect = _connection,
        tls: ssl.SSLContext | None = None,
    ):
        if isinstance(hosts, str) or not hosts:
            raise GptossError(f"hosts is {short(hosts)}, expected a list of hosts that may be opened")
        for host in hosts:
            if not _HOST.fullmatch(host):
                raise GptossError(
                    f"the host {short(host)} is not of the form docs.example.org or docs.example.org:8080"
                )
        self._hosts, self._max_bytes, self._seconds = frozenset(hosts), max_bytes, seconds
        self._resolve, self._connect = resolve, connect
        self._tls = tls or ssl.create_default_context()

    def search(self, query: str, limit: int) -> Page:
        """Hosts have no search of one form: says what can be done instead."""
        raise BrowserError(f"search is not available; open a page by its URL, on {', '.join(sorted(self._hosts))}")

    def fetch(self, url: str, *, as_source: bool) -> Page:
        """GET, through at most five redirects."""
        ends_at, before = time.monotonic() + self._seconds, ""
        for _ in range(_MAX_REDIRECTS + 1):
            target = self._checked(url)
            if before == "https" and target.scheme == "http":
                raise BrowserError("a redirect from https to http is refused")
            try:
                reply = self._get(target, ends_at)
            except (OSError, http.client.HTTPException) as error:
                raise BrowserError(f"{url}: {_reason(error, ends_at)}") from None
            if reply.location is None:
                return _page(url, reply, as_source)
            url, before = _joined(url, reply.location), target.scheme
        raise BrowserError(f"more than {_MAX_REDIRECTS} redirects, the last to {url[:200]}")

    def close(self) -> None:
        """There is nothing to let go of: each request has a connection of its own."""

    def _checked(self, url: str) -> _Target:
        """What a URL asks for, if it may be asked."""
        if len(url) > _MAX_URL_CHARACTERS:
            raise BrowserError(f"a URL of {len(url):,} characters, of {_MAX_URL_CHARACTERS:,} at most")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise BrowserError(f"{url[:200]!r} is no URL") from None
        if parts.scheme not in _PORTS or not parts.hostname:
            raise BrowserError(f"{url[:200]!r} is refused: only http:// and https:// pages can be opened")
        if "@" in parts.netloc:
            raise BrowserError("URLs with a user or a password are refused")
        host, usual = parts.hostname.rstrip("."), _PORTS[parts.scheme]
        port = port or usual
        if f"{host}:{port}" not in self._hosts and (host not in self._hosts or port != usual):
            raise BrowserError(
                f"{parts.netloc[:200]!r} is not among the hosts that may be opened: {', '.join(sorted(self._hosts))}"
            )
        path = quote(parts.path or "/", safe=_AS_WRITTEN)
        query = f"?{quote(parts.query, safe=_AS_WRITTEN + '?')}" if parts.query else ""
        return _Target(parts.scheme, host, port, path + query)

    def _get(self, target: _Target, ends_at: float) -> _Reply:
        address = self._public_address(target)
        secured = self._connect(address, target.port, max(0.1, ends_at - time.monotonic()))
        if target.scheme == "https":
            secured = self._tls.wrap_socket(secured, server_hostname=target.host, do_handshake_on_connect=False)
        connection = http.client.HTTPConnection(target.host, target.port)
        connection.default_port = _PORTS[target.scheme]  # pyright: ignore[reportAttributeAccessIssue]
        connection.sock, connection.auto_open = secured, 0
        headers = {"User-Agent": "gptoss-jax", "Accept": "text/*, application/json", "Accept-Encoding": "identity"}
        with secured, _shut_at(secured, ends_at):
            if isinstance(secured, ssl.SSLSocket):
                secured.do_handshake()
            connection.request("GET", target.path, headers=headers)
            reply = self._reply(connection.getresponse())
            if time.monotonic() >= ends_at:  # a body that is shut ends like one that is whole
                raise TimeoutError
            return reply

    def _public_address(self, target: _Target) -> str:
        addresses = self._resolve(target.host, target.port)
        for address in addresses:
            if not is_public(address):
                raise BrowserError(f"{target.host} has the address {address}, which is not public: refused")
        if not addresses:
            raise BrowserError(f"{target.host} has no address")
        return addresses[0]

    def _reply(self, response: http.client.HTTPResponse) -> _Reply:
        location = response.getheader("Location") if response.status in _REDIRECTS else None
        kind, charset = response.headers.get_content_type(), response.headers.get_content_charset("utf-8")
        if location is not None:
            return _Reply(response.status, kind, charset, location, b"", False)
        if response.status != 200:
            raise BrowserError(f"the server answers {response.status} {plain(response.reason)[:100]}")
        if not _TEXT.fullmatch(kind) or response.getheader("Content-Encoding", "identity") != "identity":
            raise BrowserError(f"the page is {kind[:100]}, and only uncompressed text can be opened")
        body = response.read(self._max_bytes + 1)
        is_cut = len(body) > self._max_bytes or bool(response.length)  # or fewer bytes came than were announced
        return _Reply(200, kind, charset, None, body[: self._max_bytes], is_cut)


def _joined(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError:
        raise BrowserError(f"the server redirects to {location[:200]!r}, which is no URL") from None


def is_public(address: str) -> bool:
    """Whether an address is of the public internet, as are those that it may carry inside."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address) and (ip not in _GLOBAL_IPV6 or ip.sixtofour or ip.teredo):
        return False
    return ip.is_global and not ip.is_multicast


@contextmanager
def _shut_at(connection: socket.socket, ends_at: float) -> Iterator[None]:
    """Ends a connection at a time, however slowly bytes drop in: a socket's own limit is for each of them."""

    def shut() -> None:
        try:
            socket.socket.shutdown(connection, socket.SHUT_RDWR)  # not TLS's, which is no other thread's to call
        except OSError:  # it has ended
            pass

    timer = threading.Timer(max(0.0, ends_at - time.monotonic()), shut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _reason(error: Exception, ends_at: float) -> str:
    if isinstance(error, TimeoutError) or time.monotonic() >= ends_at:
        return "it takes too long to answer"
    return plain(str(error))[:200] or type(error).__name__


def _page(url: str, reply: _Reply, as_source: bool) -> Page:
    charset = reply.charset if _CHARSET.fullmatch(reply.charset) else "utf-8"
    text = reply.body.decode(charset, errors="replace")
    page = html_page(text, url) if reply.kind in _HTML and not as_source else Page(url, url, plain(text))
    cut = f"\n\n(The page is longer: {len(reply.body):,} bytes of it were read.)" if reply.is_cut else ""
    return Page(url, page.title, f"\nURL: {url}\n{page.text}{cut}", page.links)

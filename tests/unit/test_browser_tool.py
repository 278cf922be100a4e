"""The browser tool: pages as models were trained to read them, documents, named hosts, citations."""

import json
import os
import socket
import sqlite3
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gptoss_jax.errors import GptossError
from gptoss_jax.tools.browser import html_text
from gptoss_jax.tools.browser.browser_tool import BrowserTool
from gptoss_jax.tools.browser.citations import citations
from gptoss_jax.tools.browser.html_text import html_page
from gptoss_jax.tools.browser.http_backend import HttpBackend, is_public
from gptoss_jax.tools.browser.local_folder import LocalFolder
from gptoss_jax.tools.browser.page import BrowserError, Page, found

# For nothing but this file's server: docs.example.org, 2020 to 2120, signed by itself.
CERTIFICATE = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgLZEkAdw1Q2YL2kXX
m+2V3Xmgr2HjtMK40ZrhMsGPmCWhRANCAASt7mVwdEc+ra2t2o74mrYrvxE3eU4Q
hbBOc+cHqxGzZFbo5v5Rq5sna11iDG6s3CR0SNV/40ZvHorEgi2FEpRn
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBZTCCAQugAwIBAgIBATAKBggqhkjOPQQDAjAbMRkwFwYDVQQDDBBkb2NzLmV4
YW1wbGUub3JnMCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAbMRkw
FwYDVQQDDBBkb2NzLmV4YW1wbGUub3JnMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcD
QgAEre5lcHRHPq2trdqO+Jq2K78RN3lOEIWwTnPnB6sRs2RW6Ob+UaubJ2tdYgxu
rNwkdEjVf+NGbx6KxIIthRKUZ6M+MDwwGwYDVR0RBBQwEoIQZG9jcy5leGFtcGxl
Lm9yZzAdBgNVHQ4EFgQUH2yIvo07rBb6MxcIyczjer7w/N4wCgYIKoZIzj0EAwID
SAAwRQIgTZd2G0hBcNpxo21c0VserZGi1IMUCtxSBavEppLYbZgCIQDNGXQklg7X
lbB+eflle/PXNwBUYtHywQPuukEtpTt70w==
-----END CERTIFICATE-----
"""
PUBLIC = "93.184.216.34"
NO_AUTHORITY = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # reading the system's takes longer than most cases


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A few documents, one of each kind."""
    documents = tmp_path / "documents"
    (documents / "birds").mkdir(parents=True)
    (documents / "birds" / "heron.md").write_text(
        "# The heron\n\nA wading bird. See [the stork](stork.html), [fish](../fish.txt) and "
        "[the web](https://example.org/a).\n\n"
        + "\n".join(f"Line {n} of it." for n in range(60))
        + "\nIt eats perch.\n"
    )
    (documents / "birds" / "stork.html").write_text(
        "<html><head><title>The stork &amp; its nest</title><script>var heron = 1;</script></head><body><h2>Nest</h2>"
        "<p>Storks  nest on\nroofs. <a href='heron.md'>Herons</a> do not.</p><ul><li>one<li>two</ul></body></html>"
    )
    (documents / "fish.txt").write_text("Perch, heron, pike.\nThe perch is food of the heron. Perch!\n")
    (documents / "picture.png").write_bytes(b"heron")
    return documents


@pytest.fixture
def browser(folder: Path):
    """A browser over the documents."""
    tool = BrowserTool(LocalFolder(folder))
    yield tool
    tool.close()


def _call(tool: BrowserTool, function: str, **arguments) -> str:
    output = tool.call(f"browser.{function}", json.dumps(arguments))
    assert not output.failed, output.text
    return output.text


def _refused(tool: BrowserTool, function: str, **arguments) -> str:
    output = tool.call(f"browser.{function}", json.dumps(arguments))
    assert output.failed and "\n" not in output.text
    return output.text


def test_a_model_searches_opens_follows_and_finds(browser):
    """Guards the forms that models were trained with: cursors, headings, numbered lines, marks, places of matches."""
    assert _call(browser, "search", query="perch").splitlines()[:6] == [
        "[0] perch",
        "**viewing lines [0 - 5] of 5**",
        "",
        "L0: # Search Results",
        "L1: ",
        "L2:   * 【0†fish.txt†fish.txt】 Perch, heron, pike. The perch is food of the heron. ",
    ]
    opened = _call(browser, "open", id=1)  # the heron, near the line that has the word
    assert opened.startswith("[1] The heron (birds/heron.md)\n**viewing lines [60 - 65] of 65**\n\nL60: Line 56 of it.")
    top = _call(browser, "open", loc=0, num_lines=5).splitlines()
    assert top[1] == "**viewing lines [0 - 4] of 65**"
    assert top[5:7] == [
        "L2: A wading bird. See 【0†the stork】, 【1†fish】 and 【2†the web】.",
        "L3: ",
    ]
    assert _call(browser, "open", id=0, cursor=2).splitlines() == [
        "[3] The stork & its nest (birds/stork.html)",
        "**viewing lines [0 - 5] of 5**",
        "",
        "L0: ## Nest",
        "L1: ",
        "L2: Storks nest on roofs. 【0†Herons】 do not.",
        "L3: ",
        "L4: * one",
        "L5: * two",
    ]
    assert _call(browser, "find", pattern="PERCH", cursor=1).splitlines() == [
        "[4] Find results for text: `PERCH` in `The heron` (birds/heron.md/find?pattern=PERCH)",
        "**viewing lines [0 - 2] of 2**",
        "",
        "L0: # 【0†match at L64】",
        "L1: It eats perch.",
        "L2: ",
    ]
    assert "viewing lines [60 - 65]" in _call(browser, "open", id=0)
    assert "No `find` results for pattern: `condor`" in _call(browser, "find", pattern="condor")
    source = _call(browser, "open", id="birds/stork.html", view_source=True)
    assert source.startswith("[7] birds/stork.html (view-source:birds/stork.html)") and "<script>" in source
    assert "<script>" not in _call(browser, "open", id="birds/stork.html")
    assert "<script>" in _call(browser, "open", view_source=True)


def test_citations_name_pages_and_lines(browser):
    """Guards what people are shown as sources: pages, not results of a search; nothing for marks that lead nowhere."""
    _call(browser, "search", query="perch")
    _call(browser, "open", id=1)
    _call(browser, "find", pattern="perch")
    text = "a【1†L62-L64】b【1†L3】【0†L2】【2†L1】 【9†L1】【1†L99】【1†L5-L2】【1†x】【1†L62-64】"
    cited = citations(text, browser.pages)
    heron = ("birds/heron.md", "The heron")
    assert [(c.url, c.title, c.lines) for c in cited] == [
        (*heron, (62, 64)), (*heron, (3, 3)), ("fish.txt", "fish.txt", None), (*heron, (64, 64)), (*heron, (62, 64)),
    ]  # fmt: skip
    assert [text[c.start : c.end] for c in cited][:3] == ["【1†L62-L64】", "【1†L3】", "【0†L2】"]


@pytest.mark.parametrize(
    ("recipient", "arguments", "fault"),
    [
        ("browser.search", "{", "Invalid function arguments: '{', expected a JSON object"),
        ("browser.search", "[" * 100_000, "Invalid function arguments"),
        ("browser.search", "[1]", "expected a JSON object"),
        ("browser.search", "{}", "search needs query"),
        ("browser.search", '{"query": 3}', "query is 3, expected text"),
        ("browser.search", '{"query": "?!"}', "no words to search for in '?!'"),
        ("browser.search", '{"query": "a", "topn": "many"}', "topn is 'many', expected a number"),
        ("browser.search", '{"query": "a", "topn": NaN}', "expected a number"),
        ("browser.search", '{"query": "a", "page": 2}', "search has no argument 'page'; it takes query, topn"),
        ("browser.open", '{"cursor": 5}', "Cursor `5` is out of range. Available cursor indices: [0 - 0]."),
        ("browser.open", '{"cursor": -2}', "out of range"),
        ("browser.open", '{"id": 77}', "Invalid link id `77`."),
        ("browser.open", '{"loc": 99999}', "Invalid location parameter: `99999`. Cannot exceed page maximum of"),
        ("browser.open", '{"view_source": 1}', "view_source is 1, expected true or false"),
        ("browser.open", '{"id": 1e400}', "id is inf, expected a number"),
        ("browser.find", '{"pattern": "x"}', "Cannot run `find` on search results page or find results page"),
        ("browser.close", "{}", "Unknown function: 'close'; there are search, open, find"),
        ("browser", "{}", "Unknown function"),
        ("browser.__init__", "{}", "Unknown function"),
    ],
)
def test_a_models_mistake_is_an_output(browser, recipient, arguments, fault):
    """Guards the loop: whatever a model writes, it reads one line that says what was wrong; no page gets a number."""
    _call(browser, "search", query="heron")
    output = browser.call(recipient, arguments)
    assert output.failed and fault in output.text and "\n" not in output.text and len(output.text) < 2100
    assert len(browser.pages) == 1


def test_nothing_is_open_before_the_first_page(browser):
    """Guards the defaults, which mean the last page."""
    assert _refused(browser, "open") == _refused(browser, "find", pattern="x") == "No pages to access!"


@pytest.mark.parametrize(
    "query", ['"', "a AND", "NEAR(", "title:heron*", "heron' OR 1=1 --", "-heron", "heron\0", "é" * 9]
)
def test_any_query_is_words_alone(browser, query):
    """Guards the index's own language, which a query must not be read as."""
    assert _call(browser, "search", query=f"{query} heron").count("†") >= 3


def test_no_call_reaches_a_file_outside_the_folder(folder, tmp_path):
    """Guards the machine's files: by .., absolute paths, schemes, links to files and folders, hidden files, pipes."""
    secret = tmp_path / "secret.txt"
    secret.write_text("heron secret")
    (folder / "link.txt").symlink_to(secret)
    (folder / "linked").symlink_to(tmp_path)
    (folder / ".hidden.txt").write_text("heron secret")
    (folder / ".git").mkdir()
    (folder / ".git" / "config.txt").write_text("heron secret")
    os.mkfifo(folder / "pipe.txt")
    (folder / "huge.txt").write_bytes(b"heron " * 800_000)
    (folder / "【0.md").write_text("[x](../../secret.txt) [y](file:///etc/passwd) heron")
    backend = LocalFolder(folder)
    tool = BrowserTool(backend)
    assert backend.skipped == ("huge.txt",)
    shown = _call(tool, "search", query="heron secret", topn=20)
    assert "link" not in shown and "hidden" not in shown and "config" not in shown
    in_it = "link.txt linked/secret.txt .hidden.txt .git/config.txt pipe.txt huge.txt birds/../fish.txt . \0".split(" ")
    outside = "../secret.txt birds/../../secret.txt %2e%2e/secret.txt ..%2fsecret.txt /etc/passwd file:///etc/passwd"
    for url in (str(secret), f"file://{secret}", "", *in_it, *outside.split()):
        assert "there is no page" in _refused(tool, "open", id=url)
    for link in range(2):
        _call(tool, "open", id="【0.md")
        assert "there is no page" in _refused(tool, "open", id=link)
    folder.joinpath("fish.txt").unlink()
    folder.joinpath("fish.txt").symlink_to(secret)
    assert "secret" not in _call(tool, "open", id="fish.txt")  # as it was read in the beginning
    tool.close()


def test_any_file_name_is_a_url_of_one_line(tmp_path):
    """Guards folders of others: names in any script, with line breaks, escape sequences, or bytes that are no text."""
    names = ["höron ☃/日本　語.md".encode(), b"new\nline\x1b[2J.txt", b"no\xff\xfeutf.txt"]
    for name in names:
        path = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(b"heron")
    tool = BrowserTool(LocalFolder(tmp_path, index=tmp_path / "index"))
    shown = _call(tool, "search", query="heron")
    urls = ["höron ☃/日本　語.md", r"new\nline\x1b[2J.txt", r"no\udcff\udcfeutf.txt"]
    assert all(url in shown or url.replace("　", " ") in shown for url in urls)
    for url in urls:
        assert "L0: heron" in _call(tool, "open", id=url)
    tool.close()


def test_an_index_is_kept_and_follows_the_folder(folder, tmp_path, monkeypatch):
    """Guards the second start: unchanged files are not read again, changed and deleted ones are not as they were."""
    index, added = tmp_path / "index", []
    add = LocalFolder._add
    monkeypatch.setattr(LocalFolder, "_add", lambda self, url, *rest: (added.append(url), add(self, url, *rest))[1])
    LocalFolder(folder, index).close()
    LocalFolder(folder, index).close()
    assert added == ["fish.txt", "birds/heron.md", "birds/stork.html"]
    (folder / "birds" / "stork.html").unlink()
    (folder / "fish.txt").write_text("Nothing but pike, and it is long now.")
    backend = LocalFolder(folder, index)
    assert added[3:] == ["fish.txt"]
    assert [link.url for link in backend.search("storks perch pike", 9).links.values()] == [
        "fish.txt",
        "birds/heron.md",
    ]
    backend.close()


def test_what_is_no_folder_of_documents_is_one_line(folder, tmp_path):
    """Guards people: each mistake is named, and a database of something else is not written to."""
    (tmp_path / "empty").mkdir()
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE mine (x)")
    database.close()
    (tmp_path / "text").write_text("this is no database, and long enough to be seen as none")
    for arguments, fault in (
        ((tmp_path / "none",), "none is no folder; expected one of .txt, .md or .html documents"),
        ((tmp_path / "empty",), "empty holds no document; expected .txt, .md"),
        ((folder, other), "is a database of something else; name another file"),
        ((folder, tmp_path / "text"), "file is not a database"),
        ((folder, tmp_path / "none" / "index"), "unable to open database file"),
    ):
        with pytest.raises(GptossError) as error:
            LocalFolder(*arguments)
        assert fault in str(error.value) and "\n" not in str(error.value)


def test_what_is_shown_is_bounded(tmp_path):
    """Guards the model's context, whatever a page holds or a call asks; the next call goes on where it was cut."""
    text = "\n".join(["word " * 300] * 200 + ["x" * 500_000])
    (tmp_path / "long.txt").write_text(text)
    tool = BrowserTool(LocalFolder(tmp_path), max_characters=2000)
    for arguments in ({}, {"num_lines": 100_000}, {"loc": 3900}):
        assert len(_call(tool, "open", id="long.txt", **arguments)) < 2000 + 90 + 150
    lines = tool.pages[0].lines
    assert "".join(lines) == text.replace("\n", "") and max(map(len, lines)) == 80
    last = int(_call(tool, "open", id="long.txt").splitlines()[-1].partition(":")[0].removeprefix("L"))
    assert _call(tool, "open", loc=last + 1).splitlines()[3].startswith(f"L{last + 1}: ")


def test_pages_cannot_write_marks(folder):
    """Guards citations and links against pages that spell them."""
    (folder / "false.md").write_text("A false 【0†link†evil.example】 and [a † b](fish.txt) 【1†L3】")
    tool = BrowserTool(LocalFolder(folder))
    assert _call(tool, "open", id="false.md").endswith("L0: A false 〖0†link†evil.example〗 and 【0†a ‡ b】 〖1†L3〗")


def test_find_looks_past_marks_and_keeps_line_numbers():
    """Guards the line numbers of matches on pages whose links are wrapped."""
    long = "a long text of a link that is wrapped for sure " * 2
    page = Page("u", "t", f"【0†{long}†some.example.org】 and then\nneedle here\n【1†needle】 too")
    lines = page.lines
    first = next(n for n, line in enumerate(lines) if "needle here" in line)
    assert found(page, "Needle").text.startswith(f"# 【0†match at L{first}】\nneedle here\nneedle too")


def test_html_is_text_with_links():
    """Guards what models read of the web: no scripts, images named, entities, tables, spaces of code, a link's host."""
    page = html_page(
        "<title>T\n t</title><style>x</style><noscript>n</noscript>"
        "<p>a<b>b</b> &lt;c&gt;<br>d</p><pre>  if x:\n    y</pre><table><tr><td>1<td>2</tr></table>"
        "<img alt='A cat'><img><a href='/p?q=1#f'>one</a> <a href='http://other.example/x'>two <i>2</i></a>"
        "<a href='javascript:x'>three</a> <a href='#top'>four</a> <a href='p?q=1'>five</a><a href='http://[bad'>six</a>"
        "<svg><title>no</title><text>no</text></svg><a>seven",
        "https://docs.example.org/",
    )
    assert page.title == "T t"
    assert page.text.splitlines() == [
        "ab <c>", "d", "", "  if x:", "    y", "", "1 2", "",
        "[Image 0: A cat][Image 1]【0†one】 【1†two 2†other.example】three four 【0†five】sixseven",
    ]  # fmt: skip
    assert [link.url for link in page.links.values()] == ["https://docs.example.org/p?q=1", "http://other.example/x"]


@pytest.mark.parametrize(
    "part", ["<!--", "<a ", "<![", "</", "&", "<a href='", "<?", "<svg>", "<a href=x>", "<b", "<script>"]
)
def test_hostile_html_takes_bounded_time(part):
    """Guards the tool's time: Python's parser has had inputs on which its time grows with their square."""
    began = time.process_time()
    html_page(part * (200_000 // len(part)), "u")
    assert time.process_time() - began < 4


def test_html_that_takes_long_is_refused(monkeypatch):
    """Guards against input that nobody has thought of."""
    monkeypatch.setattr(html_text, "_MAX_SECONDS", 0.0)
    with pytest.raises(BrowserError, match="the HTML of u takes more than 0 seconds of CPU time"):
        html_page("<p>" * 100_000, "u")


class Web:
    """Servers over socket pairs: what they answer by host and path, what they were sent, and where connections went."""

    def __init__(
        self, pages: dict[str, bytes], addresses: dict[str, list[str]] | None = None, serve: Callable | None = None
    ):
        self.pages, self.addresses, self.serve = pages, addresses or {}, serve or self.answer
        self.resolved: list[str] = []
        self.connected: list[tuple[str, int]] = []
        self.requests: list[bytes] = []

    def resolve(self, host: str, port: int) -> list[str]:
        self.resolved.append(host)
        return self.addresses.get(host, [PUBLIC])

    def connect(self, address: str, port: int, seconds: float) -> socket.socket:
        self.connected.append((address, port))
        ours, theirs = socket.socketpair()
        ours.settimeout(seconds)
        threading.Thread(target=self.serve, args=(theirs,), daemon=True).start()
        return ours

    def answer(self, connection: socket.socket) -> None:
        with connection:
            request = b""
            while not request.endswith(b"\r\n\r\n"):
                data = connection.recv(4096)
                if not data:
                    return
                request += data
            self.requests.append(request)
            host = request.partition(b"Host: ")[2].partition(b"\r\n")[0].decode()
            try:
                connection.sendall(self.pages[host + request.split()[1].decode()])
            except OSError:
                pass  # the client has had enough

    def backend(self, *hosts: str, **options) -> HttpBackend:
        hosts, options = hosts or ("docs.example.org",), {"tls": NO_AUTHORITY, **options}
        return HttpBackend(hosts, resolve=self.resolve, connect=self.connect, **options)


def _page(body: bytes, kind: str = "text/html; charset=utf-8", more: str = "") -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n{more}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _redirect(location: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nSet-Cookie: a=b\r\nContent-Length: 0\r\n\r\n".encode()


def test_a_page_of_a_named_host_is_shown():
    """Guards the plain case, what is sent (no cookies, after a redirect that sets one too), and links on pages."""
    body = "<title>Docs</title><p>Read <a href='/b c?d=é'>this</a>.".encode()
    web = Web({
        "docs.example.org/": _redirect("/a?x=1"),
        "docs.example.org/a?x=1": _page(body),
        "docs.example.org/b%20c?d=%C3%A9": _page("café".encode("latin-1"), "text/plain; charset=iso-8859-1"),
    })  # fmt: skip
    tool = BrowserTool(web.backend())
    assert _call(tool, "open", id="http://docs.example.org").splitlines() == [
        "[0] Docs (http://docs.example.org/a?x=1)", "**viewing lines [0 - 2] of 2**", "",
        "L0: ", "L1: URL: http://docs.example.org/a?x=1", "L2: Read 【0†this】.",
    ]  # fmt: skip
    assert _call(tool, "open", id=0).endswith("L2: café")
    assert web.connected == [(PUBLIC, 80)] * 3 and web.resolved == ["docs.example.org"] * 3
    assert web.requests[1].decode().splitlines()[:5] == [
        "GET /a?x=1 HTTP/1.1", "Host: docs.example.org", "User-Agent: gptoss-jax",
        "Accept: text/*, application/json", "Accept-Encoding: identity",
    ]  # fmt: skip
    assert _refused(tool, "search", query="x") == "search is not available; open a page by its URL, on docs.example.org"
    assert citations("【0†L2】", tool.pages)[0].url == "http://docs.example.org/a?x=1"


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        (
            "http://example.org/",
            "'example.org' is not among the hosts that may be opened: docs.example.org, other.example:81",
        ),
        ("http://docs.example.org.evil.example/", "is not among"),
        ("http://docs.example.org:8080/", "is not among"),
        ("http://other.example/", "is not among"),
        ("https://127.0.0.1/", "is not among"),
        ("http://[::1]/", "is not among"),
        ("http://docs.example.org@evil.example/", "a user or a password"),
        ("http://user:word@docs.example.org/", "a user or a password"),
        ("http://evil.example\\@docs.example.org/", "a user or a password"),
        ("file:///etc/passwd", "only http:// and https://"),
        ("ftp://docs.example.org/", "only http:// and https://"),
        ("docs.example.org/x", "only http:// and https://"),
        ("data:text/html,x", "only http:// and https://"),
        ("http:///etc/passwd", "only http:// and https://"),
        ("http://[bad/", "is no URL"),
        ("http://docs.example.org:99999/", "is no URL"),
        ("http://docs.example.org/" + "x" * 4000, "a URL of 4,024 characters, of 2,048 at most"),
    ],
)
def test_other_urls_are_refused_before_a_name_is_resolved(url, fault):
    """Guards the allow-list, against every way to write another host."""
    web = Web({})
    tool = BrowserTool(web.backend("docs.example.org", "other.example:81"))
    assert fault in _refused(tool, "open", id=url)
    assert web.resolved == [] == web.connected


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
     "255.255.255.255", "240.0.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fec0::1", "ff02::1",
     "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:7f00:1::", "2001:db8::1",
     "localhost", ""],
)  # fmt: skip
def test_addresses_of_this_machine_and_its_network_are_refused(address):
    """Guards services that trust the machine, such as a cloud's metadata, when a named host's name leads there."""
    assert not is_public(address)
    web = Web({}, {"docs.example.org": [PUBLIC, address]})
    assert "is not public: refused" in _refused(BrowserTool(web.backend()), "open", id="https://docs.example.org/")
    assert web.connected == []


def test_public_addresses_pass_and_are_the_ones_connected_to():
    """Guards against a check that refuses all, and against a name that is resolved again between check and use."""
    assert all(map(is_public, (PUBLIC, "8.8.8.8", "2606:4700::1111")))
    answers = [["2606:4700::1111"], ["127.0.0.1"]]
    web = Web({"docs.example.org/": _page(b"x", "text/plain")})
    web.resolve = lambda host, port: answers.pop(0)
    tool = BrowserTool(web.backend())
    _call(tool, "open", id="http://docs.example.org/")
    assert web.connected == [("2606:4700::1111", 80)] and len(answers) == 1
    assert "127.0.0.1, which is not public" in _refused(tool, "open", id="http://docs.example.org/")


@pytest.mark.parametrize(
    ("location", "fault"),
    [
        ("http://evil.example/", "is not among the hosts"),
        ("//evil.example/", "is not among the hosts"),
        ("http://inside.example/", "10.0.0.1, which is not public"),
        ("file:///etc/passwd", "only http:// and https://"),
        ("http://u:p@docs.example.org/", "a user or a password"),
        ("/", "more than 5 redirects"),
        ("http://[bad", "is no URL"),
    ],
)
def test_every_redirect_is_checked(location, fault):
    """Guards the allow-list against a named host that sends the browser elsewhere, and against circles."""
    web = Web({"docs.example.org/": _redirect(location)}, {"inside.example": ["10.0.0.1"]})
    assert fault in _refused(
        BrowserTool(web.backend("docs.example.org", "inside.example")), "open", id="http://docs.example.org/"
    )
    assert {address for address, _ in web.connected} == {PUBLIC} and len(web.connected) <= 6


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        (_page(b"x", "image/png"), "the page is image/png, and only uncompressed text"),
        (_page(b"x", "application/octet-stream"), "only uncompressed text"),
        (_page(b"x", more="Content-Encoding: gzip\r\n"), "only uncompressed text"),
        (b"HTTP/1.1 404 Not\x1bFound\r\nContent-Length: 0\r\n\r\n", "the server answers 404 Not"),
        (b"HTTP/1.1 304 Not Modified\r\n\r\n", "the server answers 304"),
        (b"SSH-2.0-x\r\n", "http://docs.example.org/: "),
        (b"", "http://docs.example.org/: "),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n", "got more than 100 headers"),
    ],
)
def test_what_is_no_page_is_one_line(reply, fault):
    """Guards the loop against servers: each way to answer badly is an output."""
    tool = BrowserTool(Web({"docs.example.org/": reply}).backend())
    text = _refused(tool, "open", id="http://docs.example.org/")
    assert fault in text and text.isprintable()


@pytest.mark.parametrize("charset", ["punycode", "zlib", "hex", "unicode_escape", "no-such", "utf-7", "utf-16"])
def test_charsets_are_those_of_texts(charset):
    """Guards the reader against names that Python has other decoders under."""
    web = Web(
        {
            "docs.example.org/": _page(
                "wörd".encode("utf-16" if charset == "utf-16" else "utf-8"), f"text/plain; charset={charset}"
            )
        }
    )
    assert _call(BrowserTool(web.backend()), "open", id="http://docs.example.org/").endswith("L2: wörd")


def test_a_page_is_cut_at_its_bytes():
    """Guards memory against a page without end, and readers against half a page; that it was cut is said."""
    begins = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"
    pages = {"/": b"\r\n" + b"word " * 2_000_000, "/half": b"Content-Length: 9\r\n\r\nab"}
    web = Web({f"docs.example.org{path}": begins + rest for path, rest in pages.items()})
    tool = BrowserTool(web.backend(max_bytes=1000))
    for path, count in (("", "1,000"), ("half", "2")):
        shown = _call(tool, "open", id=f"http://docs.example.org/{path}")
        assert shown.endswith(f"(The page is longer: {count} bytes of it were read.)")


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("prefix", [b"", b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n"])
def test_a_server_that_drips_is_left_in_time(scheme, prefix):
    """Guards the tool's time: a limit for each byte is none for a page, in headers, bodies and TLS's greeting."""

    def drip(connection: socket.socket) -> None:
        with connection:
            try:
                connection.sendall(prefix)
                while True:
                    connection.sendall(b"\x16" if scheme == "https" else b"a")
                    time.sleep(0.1)
            except OSError:
                pass

    web, began = Web({}), time.monotonic()
    web.serve = drip
    fault = _refused(BrowserTool(web.backend(seconds=0.5)), "open", id=f"{scheme}://docs.example.org/")
    assert "it takes too long to answer" in fault or scheme == "https"
    assert 0 < time.monotonic() - began < 10


def test_https_checks_the_certificate_for_the_hosts_name(tmp_path):
    """Guards TLS although the connection goes to an address: the name is sent, and the certificate must be its own."""
    (tmp_path / "both.pem").write_text(CERTIFICATE)
    server, trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=tmp_path / "both.pem")
    server.load_cert_chain(tmp_path / "both.pem")
    names = []
    server.sni_callback = lambda connection, name, context: names.append(name)
    web = Web({"docs.example.org/": _page(b"secure", "text/plain")})
    answer = web.answer

    def secured(connection: socket.socket) -> None:
        with connection:
            try:
                answer(server.wrap_socket(connection, server_side=True))
            except OSError:
                pass  # the client does not trust it

    web.serve = secured
    tool = BrowserTool(web.backend("docs.example.org", "other.example.org", tls=trusting))
    assert _call(tool, "open", id="https://docs.example.org/").endswith("L2: secure")
    assert names == ["docs.example.org"] and web.connected == [(PUBLIC, 443)]
    assert "certificate" in _refused(tool, "open", id="https://other.example.org/")
    assert "certificate" in _refused(BrowserTool(web.backend()), "open", id="https://docs.example.org/")


def test_https_is_not_left_for_http():
    """Guards a page's secrecy against a server that leads down."""
    backend = Web({}).backend()
    backend._get = lambda target, ends_at: type("Reply", (), {"location": "http://docs.example.org/"})()  # pyright: ignore
    assert "a redirect from https to http is refused" in _refused(
        BrowserTool(backend), "open", id="https://docs.example.org/"
    )


@pytest.mark.parametrize(
    "hosts", [(), "docs.example.org", ["*"], ["http://a.example"], ["A.example"], ["a.example/"], ["a b"]]
)
def test_hosts_are_named_one_by_one(hosts):
    """Guards against an allow-list that means something else than it says."""
    with pytest.raises(GptossError, match=r"hosts? .*(expected a list|is not of the form)"):
        HttpBackend(hosts)

"""Does the page's server give what it should, to whom it should, and nothing that could act?"""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Iterator
from importlib.resources import files

import pytest

from coordinator.about import AboutPeer
from coordinator.chain import Chain
from coordinator.errors import UsageError
from coordinator.overview import ScoreHistory, make_overview
from coordinator.web import Latest, WebServer, is_own_host
from tests.fakes import CALL_SECONDS, NOW, make_heartbeat, make_spec, peer

SCRIPT = "<script>alert(1)</script>"
PAGE = files("coordinator").joinpath("page")


@pytest.fixture(scope="module")
def server() -> Iterator[WebServer]:
    chain = Chain(make_spec())
    heard = {peer("a"): make_heartbeat(chain, about=AboutPeer(name=SCRIPT))}
    overview = make_overview(chain, heard, ScoreHistory(), now=NOW)
    with WebServer("127.0.0.1", 0, Latest(overview, lambda: "# the card\n")) as server:
        server.start()
        yield server


def ask(
    server: WebServer, path: str, method: str = "GET", host: str | None = None
) -> tuple[int, dict[str, str], str]:
    address = server.url.removeprefix("http://").rstrip("/")
    connection = http.client.HTTPConnection(address, timeout=CALL_SECONDS)
    try:
        connection.request(method, path, headers={"Host": host or address})
        reply = connection.getresponse()
        return reply.status, dict(reply.getheaders()), reply.read().decode()
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("path", "content_type", "text"),
    [
        ("/", "text/html; charset=utf-8", "<!doctype html>"),
        ("/monitor.css", "text/css; charset=utf-8", "prefers-color-scheme: dark"),
        ("/monitor.js", "text/javascript; charset=utf-8", "api/state"),
        ("/icon.svg", "image/svg+xml", "<svg"),
        ("/api/state?x=1", "application/json", '"version":1'),
        ("/metrics", "text/plain; version=0.0.4; charset=utf-8", "cold_swarm_round 0.0"),
        ("/card.md", "text/markdown; charset=utf-8", "# the card"),
    ],
)
def test_every_path_has_its_type_and_may_do_nothing_but_show(
    server: WebServer, path: str, content_type: str, text: str
) -> None:
    status, headers, body = ask(server, path)
    assert (status, headers["Content-Type"]) == (200, content_type)
    assert text in body
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "Access-Control-Allow-Origin" not in headers
    assert ask(server, path, "HEAD")[::2] == (200, "")


def test_the_state_is_the_overview(server: WebServer) -> None:
    (told,) = json.loads(ask(server, "/api/state")[2])["peers"]
    assert (told["name"], told["peer_id"], told["status"]) == (SCRIPT, peer("a"), "live")


@pytest.mark.parametrize(
    "path", ["/x", "/../pyproject.toml", "/page/index.html", "//etc/passwd", "/%2e%2e/x"]
)
def test_there_is_nothing_else(server: WebServer, path: str) -> None:
    assert ask(server, path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_can_be_changed(server: WebServer, method: str) -> None:
    assert ask(server, "/api/state", method)[0] == 501


def test_a_name_of_another_site_gets_nothing(server: WebServer) -> None:
    status, _, body = ask(server, "/api/state", host="evil.example:8080")
    assert status == 421
    assert SCRIPT not in body


@pytest.mark.parametrize(
    ("host", "is_own"),
    [
        ("127.0.0.1:8080", True),
        ("[::1]:8080", True),
        ("localhost", True),
        ("192.0.2.7:80", True),
        ("monitor.lan", True),
        ("evil.example", False),
        ("evil.example:8080", False),
        ("localhost.evil.example", False),
        ("", False),
    ],
)
def test_which_host_is_ours(host: str, is_own: bool) -> None:
    assert is_own_host(host, "monitor.lan") is is_own


def test_a_port_that_is_taken_is_told(server: WebServer) -> None:
    port = int(server.url.rstrip("/").rpartition(":")[2])
    with pytest.raises(
        UsageError, match=rf"127\.0\.0\.1 port {port}: Address already in use; choose another"
    ):
        WebServer("127.0.0.1", port, Latest())
    with pytest.raises(UsageError, match=r"no-such-host\.invalid"):
        WebServer("no-such-host.invalid", 0, Latest())


def test_it_ends_while_a_client_sends_nothing() -> None:
    with WebServer("127.0.0.1", 0, Latest()) as server:
        server.start()
        host, _, port = server.url.removeprefix("http://").rstrip("/").partition(":")
        idle = socket.create_connection((host, int(port)), timeout=CALL_SECONDS)
    idle.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=CALL_SECONDS)


def test_a_server_that_was_never_started_ends() -> None:
    with WebServer("127.0.0.1", 0, Latest()) as server:
        assert server.url.startswith("http://127.0.0.1:")


def test_the_page_needs_no_other_host_and_makes_no_markup_of_text() -> None:
    sources = {name: PAGE.joinpath(name).read_text() for name in ("index.html", "monitor.css", "monitor.js")}
    for name, source in sources.items():
        addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+\S*", source))
        assert addresses <= {'http://www.w3.org/2000/svg";'}, name  # a name, never fetched
        assert "url(" not in source
        assert "@import" not in source
    for danger in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "new Function"):
        assert danger not in sources["monitor.js"]
    assert not re.search(r"\son\w+=|style=|<script>|<style", sources["index.html"])


def test_the_scripts_ids_are_in_the_page() -> None:
    page = PAGE.joinpath("index.html").read_text()
    ids = set(re.findall(r'\$\("([\w-]+)"\)', PAGE.joinpath("monitor.js").read_text()))
    assert len(ids) > 20
    assert [name for name in ids if f'id="{name}"' not in page] == []

"""Addresses, and bytes that arrive whole in spite of what a server does."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from system.servers import FaultServer

from lit_transfer.data import reach, transfer
from lit_transfer.errors import UserError

CONTENT = bytes(range(256)) * 800
TIMEOUT_S = 0.4


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(transfer, "BACKOFF_S", 0.01)
    with FaultServer({"a.tar": CONTENT}) as running:
        yield running


def whole(url: str, timeout_s: float = TIMEOUT_S) -> bytes:
    return b"".join(reach.stream(url, timeout_s=timeout_s))


@pytest.mark.parametrize(
    "address",
    ["pipe:cat /etc/passwd", "pipe://x", "ftp://h/a", "hf://a/b", "ssh://host", "PIPE:x", "https:/h/a", "http://",
     "s3:///k", "file://host/a", "file:a", "s3:a.tar", "http:a.tar", "HTTPS:a", "gs:bucket/a", "http://[::1/a"],
)  # fmt: skip
def test_other_schemes_and_addresses_without_a_place_are_refused(address: str) -> None:
    with pytest.raises(UserError, match=r"write|not read"):
        reach.check(address)
    for ask in (reach.is_remote, reach.size, reach.stream, lambda a: reach.read(a, 0, 1)):
        with pytest.raises(UserError):
            ask(address)


@pytest.mark.parametrize(
    ("address", "remote"),
    [("data/a.tar", False), ("./run:1/a.tar", False), ("a:b.tar", False), ("/a", False), ("file:///a/b", False),
     ("https://h/a", True), ("http://h:80/a", True), ("s3://b/k", True), ("gs://b/k", True), ("HTTPS://h/a", True)],
)  # fmt: skip
def test_what_is_remote(address: str, remote: bool) -> None:
    assert reach.is_remote(address) is remote


@pytest.mark.parametrize(
    ("address", "plain"),
    [("https://user:pass@h/a.tar?X-Amz-Signature=1", "https://h/a.tar"), ("https://h/a?b@c", "https://h/a"),
     ("s3://b/what?.tar", "s3://b/what?.tar"), ("data/a?b", "data/a?b"), ("https://u:p@h", "https://h")],
)  # fmt: skip
def test_credentials_are_not_shown(address: str, plain: str) -> None:
    assert reach.shown(address) == plain


def test_a_signed_query_stays_behind_the_path() -> None:
    assert reach.join("https://h/train/?sig=1", "000.tar") == "https://h/train/000.tar?sig=1"
    assert reach.join("s3://b", "000.tar") == "s3://b/000.tar"
    assert reach.join("data", "000.tar") == "data/000.tar"


@pytest.mark.parametrize(
    "name", ["a#1.tar", "a?.tar", "50%.tar", "50%25.tar", "a b.tar", "ä 漢.tar", "a+b&c=d;e@f:g.tar", "deep/a#1/b.tar"]
)
def test_any_name_below_a_web_address_is_reached(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with FaultServer({f"data/{name}": CONTENT, "data/a": b"another"}) as server:
        for place in (f"{server.url}/data", f"{server.url}/data/?sig=1"):
            assert whole(reach.join(place, name)) == CONTENT
            assert server.requests[-1].query == place.partition("?")[2]
    assert reach.join("s3://b/data", name) == f"s3://b/data/{name}", "an object's name is sent quoted, and stays plain"
    assert reach.join("data", name) == f"data/{name}"


def test_local_files(tmp_path: Path) -> None:
    file = tmp_path / "with space.tar"
    file.write_bytes(CONTENT)
    for address in (str(file), file.as_uri()):
        assert reach.size(address) == len(CONTENT)
        assert reach.read(address, 5, 9) == CONTENT[5:9]
        assert b"".join(reach.stream(address, 7)) == CONTENT[7:]
    assert reach.list_files(str(tmp_path), ".tar") == [str(file)]
    with pytest.raises(UserError, match="ends after"):
        reach.read(str(file), len(CONTENT) - 1, len(CONTENT) + 1)
    with pytest.raises(UserError, match="No such file"):
        reach.size(str(tmp_path / "other.tar"))


FORGIVEN = {
    "cut": [None, "bytes=102400-"],
    "cut_unframed": None,
    "unframed": None,
    "stall": [None, "bytes=1000-"],
    "silent": [None, None],
    "broken": [None, None],
    "busy": [None, None],
    "chunked": [None],
    "cut_chunked": [None, "bytes=102400-"],
    "moved": [None, None],
    "denied": [None, None],
    "expired": [None, None],
    "no_ranges": [None],
}


@pytest.mark.parametrize("fault", FORGIVEN)
def test_one_failure_is_forgiven_and_gone_on_from(server: FaultServer, fault: str) -> None:
    server.retry_after = "0"
    server.order("a.tar", fault)
    if FORGIVEN[fault] is None:  # an early end could not be told from the end
        with pytest.raises(UserError, match="states no length"):
            whole(f"{server.url}/a.tar")
        server.order("a.tar", fault)
        known = transfer.Version(len(CONTENT))
        assert b"".join(reach.stream(f"{server.url}/a.tar", expected=known, timeout_s=TIMEOUT_S)) == CONTENT
    else:
        assert whole(f"{server.url}/a.tar") == CONTENT
        assert server.asked("a.tar") == FORGIVEN[fault]


@pytest.mark.parametrize("fault", ["stall", "silent", "trickle", "cut", "broken", "busy"])
def test_what_goes_on_failing_ends_in_an_error_in_the_time_stated(
    server: FaultServer, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "ATTEMPTS", 3)
    server.order("a.tar", *[fault] * 30)
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"^{server.url}/a\.tar: .* 3 times in a row"):
        whole(f"{server.url}/a.tar?sig=SECRET", 0.2)
    assert time.monotonic() - began < transfer.longest_wait_s(0.2) + 1
    assert len(server.requests) == 3


def test_progress_starts_the_count_anew(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PROGRESS_BYTES", 100)
    server.order("a.tar", *["cut"] * 9)
    assert whole(f"{server.url}/a.tar") == CONTENT


def test_the_server_says_how_long_to_wait(server: FaultServer) -> None:
    server.order("a.tar", "busy")
    assert whole(f"{server.url}/a.tar", 5.0) == CONTENT
    first, second = server.requests
    assert second.time_s - first.time_s >= 1
    server.retry_after = "Wed, 21 Oct 2015 07:28:00 GMT"
    server.order("a.tar", "busy")
    assert whole(f"{server.url}/a.tar") == CONTENT
    server.retry_after = "3600"  # no longer than a stall may last
    server.order("a.tar", "busy")
    assert whole(f"{server.url}/a.tar") == CONTENT


@pytest.mark.parametrize(
    ("faults", "message"),
    [(["page"], "web page"), (["missing"], "does not exist"), (["cut", "changed"], "not what it was"),
     (["denied", "denied"], r"refused \(status 403\)"),
     (["expired", "expired"], r"refused \(status 400, ExpiredToken\)")],
)  # fmt: skip
def test_what_cannot_pass_is_said_at_once(server: FaultServer, faults: list[str], message: str) -> None:
    server.order("a.tar", *faults)
    with pytest.raises(UserError, match=message) as caught:
        whole(f"{server.url}/a.tar?sig=SECRET")
    assert "SECRET" not in str(caught.value)
    assert len(server.requests) == len(faults)


def test_ranges(server: FaultServer) -> None:
    url = f"{server.url}/a.tar"
    assert reach.size(url) == len(CONTENT)
    assert reach.read(url, 1000, 1100) == CONTENT[1000:1100]
    server.order("a.tar", "wrong_range")
    assert reach.read(url, 1000, 1100) == CONTENT[1000:1100]
    server.order("a.tar", "no_ranges")
    with pytest.raises(UserError, match="no parts of a file"):
        reach.read(url, 1000, 1100)
    with pytest.raises(UserError, match="ends after"):
        reach.read(url, len(CONTENT) - 10, len(CONTENT) + 10)
    with pytest.raises(UserError, match="shorter than expected"):
        reach.read(url, len(CONTENT) + 10, len(CONTENT) + 20)
    server.order("a.tar", "cut", "no_ranges")
    assert whole(url) == CONTENT, "a server without ranges begins anew; what is known is skipped"


def test_one_connection_serves_many_ranges(server: FaultServer) -> None:
    opened = server.count_connections()
    for at in range(20):
        reach.read(f"{server.url}/a.tar", at, at + 50)
    assert len(opened) == 1


def test_a_web_server_has_no_listing() -> None:
    with pytest.raises(UserError, match="does not list"):
        reach.list_files("https://u:SECRET@host/a?sig=SECRET", ".tar")


def test_proxies_come_from_the_environment(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert whole("http://shards.invalid/a.tar") == CONTENT
    assert server.requests[-1].headers["host"] == "shards.invalid"


def test_user_and_password_are_sent_and_not_said(
    server: FaultServer, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    server.order("a.tar", "cut")
    url = server.url.replace("://", "://user:SECRET@") + "/a.tar?sig=SECRET"
    assert whole(url) == CONTENT
    assert server.requests[-1].headers["authorization"].startswith("Basic ")
    assert server.requests[-1].query == "sig=SECRET"
    assert "SECRET" not in caplog.text + "".join(capfd.readouterr())

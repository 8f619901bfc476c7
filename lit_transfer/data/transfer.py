"""Bytes over HTTP that arrive whole: by range, retried, resumed after a break, and never waited for without end."""

from __future__ import annotations

import datetime
import email.utils
import functools
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import requests
import urllib3

from lit_transfer.errors import UserError, require

ATTEMPTS = 6
"""Failures in a row, without `PROGRESS_BYTES` between them, that end in an error."""
BACKOFF_S = 1.0
"""Pause after the first failure; it doubles with each one, unless the server names a pause with Retry-After."""
PROGRESS_BYTES = 1 << 20
PIECE_BYTES = 1 << 20
SLOWEST_BYTES_PER_S = 1024
"""A server that brings less than this over `timeout_s` is stalled."""

Auth = Callable[[requests.PreparedRequest], requests.PreparedRequest]

for _name in ("urllib3", "botocore", "google.auth"):  # what they log at level DEBUG holds addresses with tokens
    logging.getLogger(_name).setLevel(logging.INFO)


@dataclass(frozen=True)
class Source:
    """What is asked for.

    Args:
        shown: its address for people, without credentials.
        request: the address to ask, and what signs the request; called for each attempt, since both expire.
        renew: drop credentials that were refused, so that `request` reads them again.
        remedy: what to check where credentials are refused.
    """

    shown: str
    request: Callable[[], tuple[str, Auth | None]]
    renew: Callable[[], None]
    remedy: str


@dataclass(frozen=True)
class Version:
    """Which content an address has, as far as its server says: length in bytes, and ETag or date of change."""

    size: int | None = None
    tag: str | None = None

    def is_same(self, other: Version) -> bool:
        """Whether nothing that both know differs."""
        pairs = ((self.size, other.size), (self.tag, other.tag))
        return all(ours is None or theirs is None or ours == theirs for ours, theirs in pairs)


class Changed(UserError):
    """The content of an address is no longer what it was when its first bytes were read."""


class _Broken(Exception):
    """A failure that may pass: the same request can be made again."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class _Denied(Exception):
    """Credentials were refused, or have expired."""


@dataclass(frozen=True)
class _Answer:
    """A response whose body holds the bytes [start, end); `end` is None where the body marks its own end."""

    response: requests.Response
    start: int
    end: int | None
    version: Version


def longest_wait_s(timeout_s: float) -> float:
    """The longest that a server without progress can take before `transfer` raises, in seconds."""
    return ATTEMPTS * 2 * timeout_s + sum(max(timeout_s, BACKOFF_S * 2.0**n) for n in range(ATTEMPTS - 1))


def transfer(
    source: Source, start: int, stop: int | None, *, timeout_s: float, expected: Version, by_range: bool = False
) -> Iterator[bytes]:
    """The bytes [start, stop) in pieces; `stop` None is the end.

    Args:
        source: where they are.
        start: first byte.
        stop: the byte after the last one.
        timeout_s: seconds without a byte, or with hardly any, after which a connection is given up.
        expected: what the content must be; what it leaves open is taken from the first answer.
        by_range: refuse a server that can only send all of it.

    Raises:
        UserError: there is no such content, it is not readable, or it did not arrive in spite of retries.
        Changed: the content is another than expected.
    """
    at, patience = start, _Patience(source, timeout_s)
    while stop is None or at < stop:
        before = at
        try:
            with _opened(source, at, stop, timeout_s) as answer:
                expected = _pinned(source, expected, answer, by_range and at > 0)
                for piece in _pieces(answer, at, expected.size, timeout_s):
                    at += len(piece)
                    yield piece
            return
        except (_Broken, _Denied) as fault:
            patience.lose(fault, progress_bytes=at - before)


def describe(source: Source, *, timeout_s: float) -> Version:
    """Length and version of the content, from a request for its first byte; raises as `transfer` does."""
    patience = _Patience(source, timeout_s)
    while True:
        try:
            with _opened(source, 0, 1, timeout_s) as answer:
                return answer.version
        except (_Broken, _Denied) as fault:
            patience.lose(fault, progress_bytes=0)


class _Patience:
    """What is forgiven: fewer than `ATTEMPTS` failures in a row, and credentials that were refused once."""

    def __init__(self, source: Source, timeout_s: float) -> None:
        self.source = source
        self.timeout_s = timeout_s
        self.failures = 0
        self.renewed = False

    def lose(self, fault: _Broken | _Denied, progress_bytes: int) -> None:
        """Wait until it makes sense to ask again, or raise a `UserError`."""
        shown = self.source.shown
        if isinstance(fault, _Denied):
            if self.renewed and progress_bytes == 0:
                raise UserError(f"{shown}: access was refused ({fault}); {self.source.remedy}.") from None
            self.renewed = True
            self.source.renew()
            return
        self.failures = 1 if progress_bytes >= PROGRESS_BYTES else self.failures + 1
        if self.failures >= ATTEMPTS:
            raise UserError(f"{shown}: {fault}, {ATTEMPTS} times in a row; check the server and the network.") from None
        pause_s = BACKOFF_S * 2 ** (self.failures - 1) * random.uniform(0.5, 1)
        time.sleep(pause_s if fault.wait_s is None else min(fault.wait_s, self.timeout_s))


@contextmanager
def _opened(source: Source, start: int, stop: int | None, timeout_s: float) -> Iterator[_Answer]:
    """Ask once. Raises `_Broken` or `_Denied` where it may be asked again, else a `UserError`."""
    url, auth = source.request()
    headers = {"Accept-Encoding": "identity"}  # a compressed body would have other offsets
    if start > 0 or stop is not None:
        headers["Range"] = f"bytes={start}-" + ("" if stop is None else str(stop - 1))
    try:
        response = _session(os.getpid()).get(url, headers=headers, auth=auth, stream=True, timeout=timeout_s)
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, requests.TooManyRedirects) as error:
        raise UserError(f"{source.shown} leads nowhere ({type(error).__name__}); check the address.") from None
    except requests.RequestException as error:
        raise _Broken(_reason(error, timeout_s)) from None
    with response:
        _check_status(source, response)
        yield _read_headers(source, response, start)


def _check_status(source: Source, response: requests.Response) -> None:
    status = response.status_code
    if status in (200, 206):
        media = response.headers.get("Content-Type", "")
        require(
            not media.startswith("text/html"),
            f"{source.shown}: the server sent a web page, maybe to log in, in place of the file; check the address.",
        )
        return
    if status in (408, 425, 429) or status >= 500:
        raise _Broken(f"the server answered with status {status}", _retry_after_s(response))
    code = _error_code(response)
    told = f"status {status}" + (f", {code}" if code else "")
    if status in (401, 403) or "Expired" in code:
        raise _Denied(told)
    what = {404: "does not exist", 410: "does not exist any more", 416: "is shorter than expected"}
    region = response.headers.get("x-amz-bucket-region")
    remedy = f"set AWS_REGION to {region}" if region else "check the address"
    raise UserError(f"{source.shown} {what.get(status, f'cannot be read ({told})')}; {remedy}.")


def _read_headers(source: Source, response: requests.Response, start: int) -> _Answer:
    headers = response.headers
    tag = headers.get("ETag") or headers.get("Last-Modified")
    if response.status_code == 206:
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", headers.get("Content-Range", ""))
        if found is None or int(found[1]) != start:
            raise _Broken(f"the server answered a request for the bytes from {start} with others")
        size = None if found[3] == "*" else int(found[3])
        return _Answer(response, start, int(found[2]) + 1, Version(size, tag))
    length = headers.get("Content-Length", "")
    size = int(length) if length.isdigit() else None
    return _Answer(response, 0, size, Version(size, tag))


def _pinned(source: Source, expected: Version, answer: _Answer, must_be_range: bool) -> Version:
    """What is known of the content, after checking that the answer is of the same."""
    require(
        not must_be_range or answer.response.status_code == 206,
        f"{source.shown}: the server sends no parts of a file; give data.cache room for whole shards.",
    )
    found = answer.version
    if not expected.is_same(found):
        sizes = f"has {found.size} bytes, not {expected.size}" if expected.size != found.size else "has another version"
        raise Changed(f"{source.shown} is not what it was: it {sizes}; prepare or copy the dataset again.")
    size = expected.size if found.size is None else found.size
    require(
        size is not None or answer.end is not None or bool(answer.response.raw.chunked),
        f"{source.shown}: the server states no length, so an early end would pass for the whole; use one that does.",
    )
    return Version(size, found.tag or expected.tag)


def _pieces(answer: _Answer, at: int, size: int | None, timeout_s: float) -> Iterator[bytes]:
    """The body from byte `at` on. Raises `_Broken` where it ends early or hardly moves."""
    raw, position = answer.response.raw, answer.start
    end = size if answer.end is None else answer.end
    waited_s, arrived = 0.0, 0
    while end is None or position < end:
        before = time.monotonic()
        try:
            piece = raw.read1(PIECE_BYTES)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise _Broken(_reason(error, timeout_s)) from None
        if not piece:
            break
        waited_s, arrived = waited_s + time.monotonic() - before, arrived + len(piece)
        if waited_s > timeout_s:
            if arrived < SLOWEST_BYTES_PER_S * timeout_s:
                raise _Broken(f"the server sent only {arrived} bytes in {waited_s:.0f} s")
            waited_s, arrived = 0.0, 0
        skipped = min(len(piece), max(0, at - position))  # a server without ranges begins anew
        position += len(piece)
        if skipped < len(piece):
            yield piece[skipped:]
    if end is not None and position < end:
        raise _Broken(f"the connection ended after {position} of {end} bytes")


def _reason(error: Exception, timeout_s: float) -> str:
    """What went wrong, without the address: it may be signed."""
    if isinstance(error, requests.exceptions.SSLError):
        return "the server's certificate was not accepted"
    if isinstance(error, requests.exceptions.ProxyError):
        return "the proxy could not be reached"
    if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError | TimeoutError):
        return f"the server sent nothing for {timeout_s:g} s"
    if isinstance(error, requests.ConnectionError):
        return "no connection could be made"
    return "the connection broke"


def _error_code(response: requests.Response) -> str:
    """The code in a bucket's error document, such as ExpiredToken; else nothing."""
    try:
        text = response.raw.read1(4096, decode_content=True)
    except (urllib3.exceptions.HTTPError, OSError):
        return ""
    found = re.search(rb"<Code>(\w+)</Code>", text)
    return found[1].decode() if found else ""


def _retry_after_s(response: requests.Response) -> float | None:
    """Seconds that the server asks to wait: a number or a date (RFC 9110, 10.2.3)."""
    value = response.headers.get("Retry-After", "")
    if re.fullmatch("[0-9]+", value):
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    if date.tzinfo is None:  # written with the zone -0000, or none
        date = date.replace(tzinfo=datetime.UTC)
    return max(0.0, (date - datetime.datetime.now(datetime.UTC)).total_seconds())


@functools.lru_cache(maxsize=1)
def _session(pid: int) -> requests.Session:
    """This process's connections: a forked child must not share a socket with its parent."""
    return requests.Session()

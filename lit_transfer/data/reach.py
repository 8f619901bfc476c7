"""Addresses of shards: paths, file://, https://, http://, s3:// and gs://; nothing else, and never a command."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import SplitResult, quote, unquote, urlsplit, urlunsplit

from lit_transfer.data import buckets, transfer
from lit_transfer.data.transfer import Source, Version
from lit_transfer.errors import UserError, require

SCHEMES = ("file", "https", "http", "s3", "gs")
TIMEOUT_S = 30.0
"""Seconds without a byte after which a connection is given up and tried again, where nothing else is said."""
ANYTHING = Version()
"""Expects nothing of a content."""
_PIECE_BYTES = 1 << 20
# A file may be named a:b.tar; what webdataset or a typing error would make of these words is refused all the same.
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://|(pipe|file|https?|s3|gs):", re.IGNORECASE)


def check(address: str) -> None:
    """Refuse an address of a scheme that is not read; plain paths pass.

    Raises:
        UserError: such a scheme, or no host or bucket.
    """
    scheme = _scheme(address)
    if scheme is None:
        return
    require(
        scheme in SCHEMES,
        f"'{scheme}:' addresses are not read, only paths and {', '.join(f'{name}://' for name in SCHEMES)}; "
        "copy the files to one of these, or rename a file of such a name.",
    )
    try:
        parts = _split(address)
    except ValueError:  # an unfinished [IPv6] host
        raise UserError(f"'{shown(address)}' is not an address; write {scheme}://HOST/path.") from None
    require(
        address.partition(":")[2].startswith("//") and (bool(parts.hostname) != (scheme == "file")),
        f"'{shown(address)}' has no host or bucket where one belongs; write "
        + ("file:///folder/name." if scheme == "file" else f"{scheme}://NAME/path."),
    )


def is_remote(address: str) -> bool:
    """Whether an address lies on another machine; checks it."""
    check(address)
    return _scheme(address) not in (None, "file")


def local_path(address: str) -> Path:
    """The path that a local address names."""
    assert not is_remote(address)
    return Path(unquote(_split(address).path) if _scheme(address) else address)


def join(address: str, name: str) -> str:
    """The address of a file in a folder; a signed query stays behind the path.

    `name` is the plain one: where an address cannot hold it, it is quoted, as it must not be in a bucket.
    """
    if not is_remote(address):
        return str(local_path(address) / name)
    parts = _split(address)
    if parts.scheme in ("http", "https"):
        name = quote(name)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def shown(address: str) -> str:
    """The address for people and logs: without user, password and signed query."""
    scheme = _scheme(address)
    if scheme is None:
        return address
    head, slashes, tail = address.partition("//")
    plain = re.sub(r"^[^/?#]*@", "", tail)
    return head + slashes + (plain if scheme in ("s3", "gs") else re.split(r"[?#]", plain)[0])


def describe(address: str, *, timeout_s: float = TIMEOUT_S) -> Version:
    """Length in bytes, and ETag or date of change. Raises a `UserError` where there is nothing to read."""
    if is_remote(address):
        return transfer.describe(_source(address), timeout_s=timeout_s)
    with _open_local(address) as file:
        status = os.fstat(file.fileno())
    return Version(status.st_size, str(status.st_mtime_ns))


def size(address: str, *, timeout_s: float = TIMEOUT_S) -> int:
    """Length in bytes."""
    length = describe(address, timeout_s=timeout_s).size
    if length is None:
        raise UserError(f"{shown(address)}: the server does not say how long it is; use one that does.")
    return length


def read(address: str, start: int, stop: int, *, timeout_s: float = TIMEOUT_S) -> bytes:
    """The bytes [start, stop).

    Raises:
        UserError: they cannot be read, the file is shorter, or the server sends only whole files.
    """
    if is_remote(address):
        pieces = transfer.transfer(_source(address), start, stop, timeout_s=timeout_s, expected=ANYTHING, by_range=True)
        data = b"".join(pieces)[: stop - start]
    else:
        with _open_local(address) as file:
            data = os.pread(file.fileno(), stop - start, start)
    require(
        len(data) == stop - start,
        f"{shown(address)} ends after {start + len(data)} bytes, not {stop}; copy or prepare it again.",
    )
    return data


def stream(
    address: str, start: int = 0, *, expected: Version = ANYTHING, timeout_s: float = TIMEOUT_S
) -> Iterator[bytes]:
    """The bytes from `start` to the end, in pieces; a broken connection is resumed while the content stays the same.

    Args:
        address: what to read.
        start: first byte.
        expected: what the content must be, as far as it is known.
        timeout_s: seconds without a byte after which a connection is given up.

    Raises:
        UserError: it cannot be read, or not to the end.
        transfer.Changed: it is not, or no longer, what was expected.
    """
    if is_remote(address):
        return transfer.transfer(_source(address), start, None, timeout_s=timeout_s, expected=expected)
    return _stream_local(address, start)


def list_files(address: str, suffix: str, *, timeout_s: float = TIMEOUT_S) -> list[str]:
    """Addresses of all files below a folder, or a bucket's prefix, that end in `suffix`; sorted.

    Raises:
        UserError: it cannot be listed; a web server never can.
    """
    if not is_remote(address):
        return sorted(str(path) for path in local_path(address).rglob(f"*{suffix}") if path.is_file())
    scheme, bucket, prefix = _scheme(address), _split(address).netloc, _split(address).path.lstrip("/")
    if scheme in ("http", "https"):
        raise UserError(
            f"{shown(address)} is on a web server, which does not list its files; "
            "name them, as in 'folder/{000..012}.tar'."
        )
    prefix = f"{prefix.rstrip('/')}/" if prefix else ""  # so that train does not find train_old
    listing = buckets.list_s3 if scheme == "s3" else buckets.list_gs
    return sorted(f"{scheme}://{bucket}/{key}" for key in listing(bucket, prefix, timeout_s) if key.endswith(suffix))


def _open_local(address: str) -> BinaryIO:
    try:
        return local_path(address).open("rb")
    except OSError as error:
        raise UserError(f"'{address}' cannot be read ({error.strerror}); check the path.") from None


def _stream_local(address: str, start: int) -> Iterator[bytes]:
    with _open_local(address) as file:
        file.seek(start)
        while piece := file.read(_PIECE_BYTES):
            yield piece


def _scheme(address: str) -> str | None:
    found = _SCHEME.match(address)
    return (found[1] or found[2]).lower() if found else None


def _split(address: str) -> SplitResult:
    if _scheme(address) in ("s3", "gs"):  # an object's name may hold any character
        head, _, tail = address.partition("://")
        bucket, _, key = tail.partition("/")
        return SplitResult(head.lower(), bucket, f"/{key}", "", "")
    return urlsplit(address)


def _source(address: str) -> Source:
    parts = _split(address)
    if parts.scheme == "s3":
        return buckets.s3_object(parts.netloc, parts.path[1:])
    if parts.scheme == "gs":
        return buckets.gs_object(parts.netloc, parts.path[1:])
    remedy = "check the user and password of the address or of ~/.netrc, or sign it anew"
    return Source(shown(address), lambda: (address, None), lambda: None, remedy)

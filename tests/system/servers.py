"""Real servers on the loopback: one whose faults are ordered, nginx, and S3 by moto."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
import requests


@dataclass(frozen=True)
class Request:
    """What a server was asked."""

    path: str
    query: str
    headers: dict[str, str]
    time_s: float


@dataclass
class FaultServer:
    """Serves `files` by path, or by path and query, with ranges; a request uses up the first fault ordered for a path.

    Faults: `cut` half of the body and a closed connection, `cut_unframed` the same without a length, `unframed` all of
    it without a length, `stall` 1000 bytes and silence, `silent` nothing, `trickle` a byte now and then, `busy` 503
    with Retry-After, `broken` 500, `page` HTML with status 200, `changed` another ETag, `flip` a wrong bit,
    `wrong_range` the bytes after those asked for, `no_ranges` all of it, `chunked` framed by itself, `cut_chunked`,
    `missing` 404, `denied` 403, `expired` the 400 of S3, `moved` a redirect to the same file.
    """

    files: dict[str, bytes]
    faults: defaultdict[str, deque[str]] = field(default_factory=lambda: defaultdict(deque))
    requests: list[Request] = field(default_factory=list)
    retry_after: str = "1"
    token: bytes = b"{}"
    url: str = ""
    closing: threading.Event = field(default_factory=threading.Event)

    def order(self, path: str, *faults: str) -> None:
        self.faults[path].extend(faults)

    def asked(self, path: str) -> list[str | None]:
        """The ranges that were asked for, in order; None is all of it."""
        return [request.headers.get("range") for request in self.requests if request.path == path]

    def count_connections(self) -> list[int]:
        """A list that grows by one with each connection."""
        opened, accept = [], self._server.get_request

        def counting() -> tuple:
            opened.append(1)
            return accept()

        self._server.get_request = counting  # type: ignore[method-assign]
        return opened

    def __enter__(self) -> FaultServer:
        outer = self

        class Handler(_FaultHandler):
            server_state = outer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _FaultHandler(BaseHTTPRequestHandler):
    server_state: FaultServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None: ...

    def do_GET(self) -> None:
        state = self.server_state
        target = self.path.partition("://")[2].partition("/")[2] if "://" in self.path else self.path[1:]  # by proxy
        path, _, query = target.partition("?")
        path = unquote(path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        state.requests.append(Request(path, query, headers, time.monotonic()))
        fault = state.faults[path].popleft() if state.faults[path] else ""
        try:
            self._answer(path if f"{path}?{query}" not in state.files else f"{path}?{query}", fault)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def do_POST(self) -> None:
        """The token of a service account."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self._send(200, {"Content-Type": "application/json"}, self.server_state.token)

    def _answer(self, path: str, fault: str) -> None:
        plain = {
            "busy": (503, {"Retry-After": self.server_state.retry_after}, b""),
            "broken": (500, {}, b""),
            "page": (200, {"Content-Type": "text/html; charset=utf-8"}, b"<html>Please log in</html>"),
            "missing": (404, {}, b""),
            "denied": (403, {}, b""),
            "expired": (400, {}, b"<Error><Code>ExpiredToken</Code></Error>"),
            "moved": (302, {"Location": f"/{path}?moved"}, b""),
        }
        if fault == "silent":
            self.server_state.closing.wait(60)
            self.close_connection = True
        elif fault in plain:
            self._send(*plain[fault])
        elif path not in self.server_state.files:
            self._send(*plain["missing"])
        else:
            self._file(self.server_state.files[path], fault)

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _file(self, content: bytes, fault: str) -> None:
        asked, start, stop = self.headers.get("Range"), 0, len(content)
        if asked and fault != "no_ranges":
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(len(content), int(last) + 1 if last else len(content))
            if start >= len(content):
                return self._send(416, {"Content-Range": f"bytes */{len(content)}"}, b"")
            start += fault == "wrong_range"
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        else:
            self.send_response(200)
        body = bytearray(content[start:stop])
        if fault == "flip":
            body[len(body) // 2] ^= 1
        self.send_header("ETag", '"other"' if fault == "changed" else '"first"')
        self._frame(len(body), fault)
        self.end_headers()
        self._body(bytes(body), fault)
        return None

    def _frame(self, length: int, fault: str) -> None:
        if "chunked" in fault:
            self.send_header("Transfer-Encoding", "chunked")
        elif "unframed" in fault:
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(length))

    def _body(self, body: bytes, fault: str) -> None:
        self.close_connection |= fault not in ("", "changed", "flip", "wrong_range", "no_ranges", "chunked")
        if fault in ("cut", "cut_unframed"):
            body = body[: len(body) // 2]
        if fault == "stall":
            self.wfile.write(body[:1000])
            self.server_state.closing.wait(60)
        elif fault == "trickle":
            for byte in body:
                self.wfile.write(bytes([byte]))
                if self.server_state.closing.wait(0.05):
                    return
        elif "chunked" in fault:
            half = len(body) // 2
            for part in (body[:half],) if fault == "cut_chunked" else (body[:half], body[half:], b""):
                self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        else:
            self.wfile.write(body)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Nginx:
    """nginx over a folder; it can be killed and started again at the same address."""

    def __init__(self, folder: Path, root: Path, bytes_per_s: int = 0) -> None:
        found = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin:/sbin")
        if found is None:
            assert "CI" not in os.environ, "nginx is not installed; .ci/run must do it"
            pytest.skip("nginx is not installed, so no real web server was tried: apt-get install nginx-light")
        folder.mkdir(exist_ok=True)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "access.log"
        self.config = folder / "nginx.conf"
        self.command = [found, "-p", str(folder), "-c", str(self.config), "-e", str(folder / "error.log")]
        temporary = " ".join(
            f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        user = "user root;" if Path("/proc/self").stat().st_uid == 0 else ""
        self.config.write_text(
            f"daemon off; master_process off; {user} pid {folder}/pid; events {{}} http {{ {temporary} "
            f'log_format ours "$request_uri $status $body_bytes_sent $http_range"; access_log {self.log} ours; '
            f"server {{ listen 127.0.0.1:{self.port}; root {root}; limit_rate {bytes_per_s}; }} }}"
        )

    def start(self) -> None:
        self.process = subprocess.Popen(self.command)
        wait_for(self.port)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Nginx:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


@contextmanager
def s3_server() -> Iterator[str]:
    """The address of an S3 server without content."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def wait_for(port: int) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError(f"no server on port {port}")


def check_authorisation(url: str, at_action: int) -> None:
    """Have moto check credentials from so many requests on."""
    requests.post(f"{url}/moto-api/reset-auth", data=str(at_action), timeout=10).raise_for_status()

"""Fetch listed videos over HTTP: from allowed hosts, within limits, resuming what was cut off."""

from __future__ import annotations

import http.client
import ipaddress
import random
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar
from urllib.parse import SplitResult, urljoin, urlsplit

from pydantic import Field

from evatok.config import Config
from evatok.video.decode import DecodeError, MediaLimits, probe
from evatok.video.guard import Guard

T = TypeVar("T")

_CHUNK = 1 << 16
_PROBES = 4  # finished files that are looked into at once, each in a child process
_REDIRECTS = 5
_REDIRECTED = (301, 302, 303, 307, 308)
_TYPES = ("video/", "application/octet-stream", "binary/octet-stream")


class DownloadConfig(Config):
    """What may be fetched, and how hard it is tried."""

    hosts: tuple[str, ...] = Field(
        default=(),
        description="hosts that may be asked: names, *.name for all below it, or literal addresses",
    )
    concurrency: int = Field(default=16, gt=0, description="files at once")
    bytes: int = Field(default=256 << 20, gt=0, description="largest file")
    seconds: float = Field(
        default=300.0, gt=0, description="longest time for one file, all attempts together"
    )
    attempts: int = Field(default=5, gt=0, description="per file, where trying again makes sense")


@dataclass(frozen=True)
class Download:
    """A file to fetch: `url` into `path`, which is only there when it is complete and a video."""

    url: str
    path: Path


class _RetryError(Exception):
    """Worth another attempt, after `wait` seconds if the server named a time."""

    def __init__(self, detail: str, wait: float = 0.0) -> None:
        super().__init__(detail)
        self.wait = wait


def download_all(
    items: Iterable[tuple[T, Download | None]], config: DownloadConfig, limits: MediaLimits
) -> Iterator[tuple[T, DecodeError | None]]:
    """Each item with the reason why its file is not there, None if it is; in order, a bounded number at once.

    An item without a Download is passed through.
    """
    waiting = iter(items)
    guards: SimpleQueue[Guard] = SimpleQueue()

    def probed(path: str) -> object:
        guard = guards.get()
        try:
            return guard(probe, path, limits)
        finally:
            guards.put(guard)

    with ExitStack() as stack:
        for _ in range(_PROBES):
            guards.put(stack.enter_context(Guard(limits.time_limit)))
        pool = stack.enter_context(ThreadPoolExecutor(config.concurrency))

        def submit(item: tuple[T, Download | None]) -> tuple[T, Future[DecodeError | None]]:
            return item[0], pool.submit(_fetched, item[1], config, probed)

        window = [submit(item) for item in islice(waiting, 4 * config.concurrency)]
        while window:
            thing, future = window.pop(0)
            yield thing, future.result()
            window.extend(submit(item) for item in islice(waiting, 1))


def _fetched(
    item: Download | None, config: DownloadConfig, probed: Callable[[str], object]
) -> DecodeError | None:
    try:
        if item is not None and not item.path.exists():
            fetch(item, config, probed)
    except DecodeError as error:
        return error
    return None


def fetch(item: Download, config: DownloadConfig, probed: Callable[[str], object] = probe) -> None:
    """Download one file; a part left by an earlier try is continued. `probed` looks into what has come.

    Raises DecodeError: `outside` (host or address not allowed), `http` (the server does not give a video),
    `too_large`, `timeout`, or what the probe of the finished file says.
    """
    item.path.parent.mkdir(parents=True, exist_ok=True)
    part = item.path.with_name(item.path.name + ".part")
    deadline = time.monotonic() + config.seconds
    for attempt in range(config.attempts):
        try:
            _receive(item.url, part, config, deadline)
            break
        except ValueError as error:
            raise DecodeError("outside", f"{item.url}: no address that can be followed ({error})") from None
        except (_RetryError, OSError, http.client.HTTPException) as error:
            wait = max(getattr(error, "wait", 0.0), 0.5 * 2**attempt * random.uniform(0.5, 1.0))
            if time.monotonic() + wait > deadline:
                raise DecodeError(
                    "timeout", f"{item.url}: not done within {config.seconds:g} s ({error})"
                ) from None
            if attempt + 1 == config.attempts:
                raise DecodeError(
                    "http", f"{item.url}: {config.attempts} attempts failed ({error})"
                ) from None
            time.sleep(wait)
    try:
        probed(str(part))
    except DecodeError as error:
        _discard(part)
        raise DecodeError(error.code, f"{item.url}: {error.detail}") from None
    part.replace(item.path)
    _discard(part)


def _receive(url: str, part: Path, config: DownloadConfig, deadline: float) -> None:
    """Append to `part` until it is complete."""
    mark = part.with_name(part.name + ".etag")
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "evatok", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if mark.exists():
            headers["If-Range"] = mark.read_text()
    with _answer(url, headers, config, deadline) as answer:
        if answer.status == 416:
            _discard(part)
            raise _RetryError("the part at hand does not fit the file")
        if answer.status in (408, 425, 429) or answer.status >= 500:
            after = answer.headers.get("Retry-After", "")
            raise _RetryError(f"status {answer.status}", float(after) if after.isdigit() else 0.0)
        if answer.status not in (200, 206):
            raise DecodeError("http", f"{url}: status {answer.status} {answer.reason}")
        kind = answer.headers.get_content_type()
        if not kind.startswith(_TYPES):
            raise DecodeError("http", f"{url}: {kind} instead of a video")
        resumed = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(
            f"bytes {have}-"
        )
        total = (have if resumed else 0) + int(answer.headers.get("Content-Length") or 0)
        if total > config.bytes:
            raise DecodeError("too_large", f"{url}: {total} bytes, allowed are {config.bytes}")
        if tag := answer.headers.get("ETag"):
            mark.write_text(tag)
        received = have if resumed else 0
        with part.open("ab" if resumed else "wb") as file:
            while chunk := answer.read1(_CHUNK):
                received += len(chunk)
                if received > config.bytes:
                    _discard(part)
                    raise DecodeError("too_large", f"{url}: more than {config.bytes} bytes")
                file.write(chunk)
                if time.monotonic() > deadline:
                    raise _RetryError(f"{received} bytes so far")
        if received < total:
            raise _RetryError(f"cut off at {received} of {total} bytes")


@contextmanager
def _answer(
    url: str, headers: dict[str, str], config: DownloadConfig, deadline: float
) -> Iterator[http.client.HTTPResponse]:
    """The response at the end of the redirects; every address on the way is checked."""
    for _ in range(_REDIRECTS + 1):
        connection = _connected(url, config, deadline)
        try:
            parts = urlsplit(url)
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers=headers)
            answer = connection.getresponse()
            if answer.status not in _REDIRECTED:
                yield answer
                return
            url = urljoin(url, answer.headers.get("Location", ""))
        finally:
            connection.close()
    raise DecodeError("http", f"{url}: more than {_REDIRECTS} redirects")


def _connected(url: str, config: DownloadConfig, deadline: float) -> http.client.HTTPConnection:
    """A connection to an address that was checked, so that a name cannot point elsewhere in between."""
    parts = _allowed(url, config)
    assert parts.hostname is not None
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    address = _public_address(url, parts.hostname, port, config)
    patience = max(0.1, min(30.0, deadline - time.monotonic()))
    plain = socket.create_connection((address, port), timeout=patience)
    connection = http.client.HTTPConnection(parts.hostname, port, timeout=patience)
    connection.sock = (
        ssl.create_default_context().wrap_socket(plain, server_hostname=parts.hostname) if secure else plain
    )
    return connection


def _allowed(url: str, config: DownloadConfig) -> SplitResult:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        raise DecodeError("outside", f"{url}: only plain http and https addresses are followed")
    if not any(fnmatch(parts.hostname, host.lower()) for host in config.hosts):
        raise DecodeError("outside", f"{url}: the host {parts.hostname} is not among the allowed ones")
    return parts


def _public_address(url: str, host: str, port: int, config: DownloadConfig) -> str:
    """Its address. A private one must be allowed literally."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        if ipaddress.ip_address(address).is_global or address in config.hosts:
            return address
    raise DecodeError("outside", f"{url}: {host} is at {', '.join(addresses)}, which is no public address")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    part.with_name(part.name + ".etag").unlink(missing_ok=True)

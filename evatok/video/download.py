"""Fetch listed videos over HTTP: from allowed hosts, within limits, resuming what was cut off."""

from __future__ import annotations

import errno
import http.client
import ipaddress
import os
import random
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar
from urllib.parse import SplitResult, urljoin, urlsplit

from pydantic import Field

from evatok.config import Config
from evatok.errors import UserError
from evatok.video.decode import DecodeError, MediaLimits, probe
from evatok.video.guard import Guard

T = TypeVar("T")

_CHUNK = 1 << 16
_PROBES = 4  # finished files that are looked into at once, each in a child process
_REDIRECTS = 5
_REDIRECTED = (301, 302, 303, 307, 308)
_AHEAD = 1 << 16  # items after one that is still being fetched
_SILENT = 100  # files in a row that nobody answered for: then it is the network
# What the operating system says where it is the fault of one name alone.
_BAD_NAME = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EINVAL, errno.EILSEQ)
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


class _NoAnswerError(DecodeError):
    """No attempt got an answer that settles whether the file can be had."""


class _RetryError(Exception):
    """Worth another attempt, after `wait` seconds if the server named a time."""

    def __init__(self, detail: str, wait: float = 0.0) -> None:
        super().__init__(detail)
        self.wait = wait


def download_all(
    items: Iterable[tuple[T, Download | None]], config: DownloadConfig, limits: MediaLimits
) -> Iterator[tuple[T, DecodeError | None]]:
    """Each item with the reason why its file is not there, None if it is; in order, a bounded number at once.

    An item without a Download is passed through. One that takes long does not hold up the others. Raises
    UserError where files cannot be written, and when nobody answers for many files in a row; the same call
    goes on from there.
    """
    waiting = iter(items)
    guards: SimpleQueue[Guard] = SimpleQueue()
    stop = threading.Event()

    def probed(path: str) -> object:
        guard = guards.get()
        try:
            return guard(probe, path, limits)
        finally:
            guards.put(guard)

    def fetched(item: Download) -> DecodeError | None:
        try:
            fetch(item, config, probed, stop)
        except DecodeError as error:
            return error
        return None

    with ExitStack() as stack:
        for _ in range(_PROBES):
            guards.put(stack.enter_context(Guard(limits.time_limit)))
        pool = ThreadPoolExecutor(config.concurrency)
        stack.callback(pool.shutdown, cancel_futures=True)
        stack.callback(stop.set)
        window: deque[tuple[T, Future[DecodeError | None] | None]] = deque()
        pending: set[Future[DecodeError | None]] = set()
        ended: SimpleQueue[Future[DecodeError | None]] = SimpleQueue()  # in the order of their ends
        silent = 0
        while True:
            room = min(4 * config.concurrency - len(pending), _AHEAD - len(window))
            for thing, item in islice(waiting, room):
                future = None
                if item is not None and not os.path.exists(item.path):
                    future = pool.submit(fetched, item)
                    pending.add(future)
                    future.add_done_callback(ended.put)
                window.append((thing, future))
            if not window:
                return
            while window and window[0][1] not in pending:
                thing, future = window.popleft()
                yield thing, future.result() if future else None
            if pending:
                pending.remove(future := ended.get())
                error = future.result()
                silent = silent + 1 if isinstance(error, _NoAnswerError) else 0
                if silent == _SILENT:
                    raise UserError(_nobody_answers(error))


def _nobody_answers(last: DecodeError | None) -> str:
    return (
        f"No server answered for {_SILENT} files in a row, the last: {last}\n"
        "Look after the network, then run the same command again: it goes on where this one stopped. A host "
        "that is gone for good can be taken out of index.source.fetch.hosts; its rows are then rejected."
    )


def fetch(
    item: Download,
    config: DownloadConfig,
    probed: Callable[[str], object] = probe,
    stop: threading.Event | None = None,
) -> None:
    """Download one file; a part left by an earlier try is continued. `probed` looks into what has come.

    Raises DecodeError: `outside` (host or address not allowed), `http` (the server does not give a video),
    `too_large`, `timeout`, or what the probe of the finished file says. Raises UserError where the file
    cannot be written. Once `stop` is set it ends soon, with some DecodeError.
    """
    stop = stop or threading.Event()
    with _stored(item):
        item.path.parent.mkdir(parents=True, exist_ok=True)
    part = item.path.with_name(item.path.name + ".part")
    deadline = time.monotonic() + config.seconds
    for attempt in range(config.attempts):
        try:
            _receive(item, part, config, deadline, stop)
            break
        except ValueError as error:
            raise DecodeError("outside", f"{item.url}: no address that can be followed ({error})") from None
        except (_RetryError, OSError, http.client.HTTPException) as error:
            pause = max(getattr(error, "wait", 0.0), 0.5 * 2**attempt * random.uniform(0.5, 1.0))
            if time.monotonic() + pause > deadline or stop.is_set():
                raise _NoAnswerError(
                    "timeout", f"{item.url}: not done within {config.seconds:g} s ({error})"
                ) from None
            if attempt + 1 == config.attempts:
                raise _NoAnswerError(
                    "http", f"{item.url}: {config.attempts} attempts failed ({error})"
                ) from None
            stop.wait(pause)
    try:
        probed(str(part))
    except DecodeError as error:
        _discard(part)
        raise DecodeError(error.code, f"{item.url}: {error.detail}") from None
    with _stored(item):
        part.replace(item.path)
        _discard(part)


@contextmanager
def _stored(item: Download) -> Iterator[None]:
    """Storage of ours that fails: it is this name's own fault, or the next file will fare no better."""
    try:
        yield
    except OSError as error:
        if error.errno in _BAD_NAME:
            raise DecodeError("outside", f"{item.path}: no file can have this name ({error})") from None
        raise UserError(
            f"{item.path}: the download cannot be written ({error.strerror or error}). Make room or see to "
            "the permissions, then run the same command again: what was downloaded is kept."
        ) from None


def _receive(
    item: Download, part: Path, config: DownloadConfig, deadline: float, stop: threading.Event
) -> None:
    """Append to `part` until it is complete."""
    url = item.url
    mark = part.with_name(part.name + ".etag")
    headers = {"User-Agent": "evatok", "Accept-Encoding": "identity"}
    with _stored(item):
        have = part.stat().st_size if part.exists() else 0
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
            raise _RetryError(f"status {answer.status}", float(after) if after.isdecimal() else 0.0)
        if answer.status not in (200, 206):
            raise DecodeError("http", f"{url}: status {answer.status} {answer.reason}")
        kind = answer.headers.get_content_type()
        if not kind.startswith(_TYPES):
            raise DecodeError("http", f"{url}: {kind} instead of a video")
        resumed = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(
            f"bytes {have}-"
        )
        length = answer.headers.get("Content-Length") or "0"
        if not length.isdecimal():
            raise DecodeError("http", f"{url}: its Content-Length is {length!r}")
        total = (have if resumed else 0) + int(length)
        if total > config.bytes:
            raise DecodeError("too_large", f"{url}: {total} bytes, allowed are {config.bytes}")
        received = have if resumed else 0
        with ExitStack() as stack:
            with _stored(item):
                if tag := answer.headers.get("ETag"):
                    mark.write_text(tag)
                file = stack.enter_context(part.open("ab" if resumed else "wb", buffering=0))
            while chunk := answer.read1(_CHUNK):
                received += len(chunk)
                if received > config.bytes:
                    _discard(part)
                    raise DecodeError("too_large", f"{url}: more than {config.bytes} bytes")
                with _stored(item):
                    if file.write(chunk) < len(chunk):
                        raise OSError(errno.ENOSPC, "only a part could be written")
                if stop.is_set():
                    break
        if stop.is_set() or time.monotonic() > deadline:
            raise _RetryError(f"{received} bytes so far")
        if received < total:
            raise _RetryError(f"cut off at {received} of {total} bytes")


@contextmanager
def _answer(
    url: str, headers: dict[str, str], config: DownloadConfig, deadline: float
) -> Iterator[http.client.HTTPResponse]:
    """The response at the end of the redirects; every address on the way is checked."""
    for _ in range(_REDIRECTS + 1):
        with _connected(url, config, deadline) as connection:
            parts = urlsplit(url)
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers=headers)
            answer = connection.getresponse()
            if time.monotonic() > deadline:
                raise _RetryError("no whole answer so far")
            if answer.status not in _REDIRECTED:
                yield answer
                return
            url = urljoin(url, answer.headers.get("Location", ""))
    raise DecodeError("http", f"{url}: more than {_REDIRECTS} redirects")


@contextmanager
def _connected(url: str, config: DownloadConfig, deadline: float) -> Iterator[http.client.HTTPConnection]:
    """A connection to an address that was checked, so that a name cannot point elsewhere in between.

    It is shut at the deadline, however little at a time the server sends.
    """
    parts = _allowed(url, config)
    assert parts.hostname is not None
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    address = _public_address(url, parts.hostname, port, config)
    left = max(0.1, deadline - time.monotonic())
    plain = socket.create_connection((address, port), timeout=min(30.0, left))
    # The other end of a copy: wrapping for TLS takes the socket itself away.
    with plain, plain.dup() as line:
        timer = threading.Timer(left, _shut, (line,))
        timer.daemon = True
        timer.start()
        connection = http.client.HTTPConnection(parts.hostname, port)
        try:
            connection.sock = (
                ssl.create_default_context().wrap_socket(plain, server_hostname=parts.hostname)
                if secure
                else plain
            )
            yield connection
        finally:
            timer.cancel()
            connection.close()


def _shut(line: socket.socket) -> None:
    with suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)


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

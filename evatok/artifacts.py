"""Where a run lives and how a stage's result is published: whole or not at all.

A run is ``<storage>/<name>/<stage>/``; storage is a local folder or any file system that ``pyarrow.fs``
or ``fsspec`` knows (``s3://``, ``gs://``, ...). A stage is done when ``manifest.json`` is there, which is
written last. ``started.json`` says which config an unfinished stage was begun with, so that a resumed
stage never mixes two configs.
"""

from __future__ import annotations

import _thread
import builtins
import contextlib
import fcntl
import functools
import hashlib
import io
import json
import os
import platform
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Literal
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pydantic import Field

from evatok.config import Config
from evatok.errors import UserError

MANIFEST = "manifest.json"
STARTED = "started.json"
CURVES = "curves"
_CHUNK = 1 << 24  # bytes copied at once
_PARTIAL = ".partial-"  # prefix of files and folders that are not published yet


@dataclass(frozen=True)
class Location:
    """A folder on a file system. Names are relative paths below it and cannot leave it. Picklable."""

    fs: Any
    path: str
    uri: str

    @classmethod
    def parse(cls, uri: str | Path) -> Location:
        """A local path (absolute or relative to the working directory) or a URI.

        All addresses of one bucket share one client. Raises UserError when no file system answers to the
        URI's scheme.
        """
        text = str(uri).removeprefix("file://")
        if "://" not in text:
            path = str(Path(text).expanduser().absolute())
            return cls(pafs.LocalFileSystem(), path, path)
        root, below, query = _split(text)
        try:
            fs, base = _file_system(root + query)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            fs, path = _fsspec(text)
            return cls(fs, path.rstrip("/"), text.rstrip("/"))
        path = f"{base.rstrip('/')}/{unquote(below)}" if below else base
        return cls(fs, path, f"{root}/{below}{query}" if below else root + query)

    def __truediv__(self, name: str) -> Location:
        return Location(self.fs, f"{self.path}/{_checked(name)}", self.address(name))

    def address(self, name: str) -> str:
        """The URI of a file below this folder: `parse` finds it again, whatever characters it has."""
        if isinstance(self.fs, (pafs.LocalFileSystem, pafs.PyFileSystem)):
            return f"{self.uri}/{name}"
        root, below, query = _split(self.uri)
        return "/".join(filter(None, (root, below, quote(name)))) + query

    def split(self) -> tuple[str, str]:
        """URI of the folder that this one lies in, and its name there."""
        address, mark, options = self.uri.partition("?")
        parent, _, name = address.rpartition("/")
        return parent + mark + options, name

    def __str__(self) -> str:
        return self.uri

    def local(self) -> Path | None:
        """The folder as a local path, None when it is remote."""
        return Path(self.path) if isinstance(self.fs, pafs.LocalFileSystem) else None

    def exists(self, name: str = "") -> bool:
        return bool(self.fs.get_file_info(self._at(name)).type != pafs.FileType.NotFound)

    def list(self, name: str = "") -> builtins.list[str]:
        """Sorted names of the files and folders directly in this folder; empty when it is missing."""
        selector = pafs.FileSelector(self._at(name), allow_not_found=True)
        found = (info.base_name for info in self.fs.get_file_info(selector))
        return sorted(entry for entry in found if entry and not entry.startswith(_PARTIAL))

    def delete(self, name: str = "") -> None:
        """Remove a file or a folder with everything in it; nothing happens when it is missing."""
        target = self._at(name)
        kind = self.fs.get_file_info(target).type
        if kind == pafs.FileType.Directory:
            self.fs.delete_dir(target)
        elif kind != pafs.FileType.NotFound:
            self.fs.delete_file(target)

    def read_bytes(self, name: str) -> bytes:
        """Raises FileNotFoundError."""
        with self.fs.open_input_stream(self._at(name)) as stream:
            return bytes(stream.readall())

    def write_bytes(self, name: str, data: bytes) -> None:
        """Publish a file: readers see the earlier content or the new one, never a part.

        Locally by rename; object stores publish when the upload is closed.
        """
        self._publish(name, io.BytesIO(data))

    def write_file(self, name: str, path: Path) -> None:
        """Publish the content of a local file, as ``write_bytes`` does."""
        with path.open("rb") as source:
            self._publish(name, source)

    def _publish(self, name: str, source: IO[bytes]) -> None:
        folder = self.local()
        if folder is None:
            self.fs.create_dir(self._at(name).rpartition("/")[0], recursive=True)
            with self.fs.open_output_stream(self._at(name)) as stream:
                shutil.copyfileobj(source, stream, _CHUNK)
            return
        target = folder / _checked(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{_PARTIAL}{uuid.uuid4().hex}")
        try:
            with partial.open("wb") as file:
                shutil.copyfileobj(source, file, _CHUNK)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    def read_json(self, name: str) -> Any:
        return json.loads(self.read_bytes(name))

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, (json.dumps(value, indent=2) + "\n").encode())

    def read_table(
        self, name: str, columns: Sequence[str] | None = None, where: pc.Expression | None = None
    ) -> pa.Table:
        """A Parquet file, or all Parquet files of a folder; of the rows those that ``where`` holds for."""
        return pq.read_table(
            self._at(name), columns=columns and [*columns], filesystem=self.fs, filters=where
        )

    def write_table(self, name: str, table: pa.Table) -> None:
        """Publish a Parquet file."""
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer)
        self.write_bytes(name, buffer.getvalue().to_pybytes())

    def upload(self, local_dir: str | Path, name: str = "") -> None:
        """Publish a local folder as ``name``, in place of what was there. Locally by rename."""
        folder = self.local()
        if folder is None:
            self.delete(name)
            self.fs.create_dir(self._at(name), recursive=True)
            pafs.copy_files(
                str(local_dir),
                self._at(name),
                source_filesystem=pafs.LocalFileSystem(),
                destination_filesystem=self.fs,
            )
            return
        target = folder / _checked(name) if name else folder
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{_PARTIAL}{uuid.uuid4().hex}")
        try:
            shutil.copytree(local_dir, partial)
            self.delete(name)
            partial.replace(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def download(self, name: str, local_dir: str | Path) -> Path:
        """Copy the folder ``name`` (or the one file ``name``) into ``local_dir``; returns the copy."""
        info = self.fs.get_file_info(self._at(name))
        if info.type == pafs.FileType.NotFound:
            raise FileNotFoundError(f"{self.uri}/{name}")
        local = Path(local_dir)
        local.mkdir(parents=True, exist_ok=True)
        target = local / info.base_name if info.type == pafs.FileType.File else local
        pafs.copy_files(
            self._at(name),
            str(target),
            source_filesystem=self.fs,
            destination_filesystem=pafs.LocalFileSystem(),
        )
        return target

    def copy(self, source: Location, skip: Sequence[str] = ()) -> None:
        """Copy what is in ``source`` here, except the names in ``skip``; the manifest comes last."""
        for name in sorted(source.list(), key=lambda name: name == MANIFEST):
            if name in skip:
                continue
            if source.fs.get_file_info(source._at(name)).type == pafs.FileType.File:
                self.write_bytes(name, source.read_bytes(name))
                continue
            self.fs.create_dir(self._at(name), recursive=True)
            pafs.copy_files(
                source._at(name), self._at(name), source_filesystem=source.fs, destination_filesystem=self.fs
            )

    def _at(self, name: str) -> str:
        return f"{self.path}/{_checked(name)}" if name else self.path


class Manifest(Config):
    """What a stage was made from; ``manifest.json`` (done) or ``started.json`` (begun) of its folder.

    ``config``: by section of the experiment, what counts in the fingerprint. ``seconds``: of the attempt that
    finished.
    """

    stage: str
    state: Literal["started", "done"]
    config: dict[str, Any]
    fingerprint: str
    inputs: dict[str, str]
    versions: dict[str, str]
    seed: int
    started: datetime
    finished: datetime | None = None
    seconds: float = 0.0
    metrics: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Artifact:
    """A finished stage: its folder and its manifest."""

    location: Location
    manifest: Manifest


def read_manifest(location: Location) -> Manifest | None:
    """The manifest of a stage's folder: done, else started, else None.

    Raises UserError when the file is there and not one of ours.
    """
    for name in (MANIFEST, STARTED):
        try:
            return Manifest.model_validate(location.read_json(name))
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise UserError(
                f"{location.uri}/{name} is not a readable manifest ({error}).\n"
                "Delete that folder, or run again with --redo STAGE."
            ) from error
    return None


def publish(location: Location, manifest: Manifest) -> None:
    """Write the manifest under the name that its state has."""
    name = MANIFEST if manifest.state == "done" else STARTED
    location.write_bytes(name, (manifest.model_dump_json(indent=2) + "\n").encode())


def fingerprint(settings: Mapping[str, Any], inputs: Mapping[str, str], version: int, seed: int) -> str:
    """Identity of what a stage will make, 16 hex digits.

    ``settings``: what it depends on, as plain data (``config.identity``); ``inputs``: the fingerprints of the
    stages it reads; ``version``: of the stage's code.
    """
    content = {"settings": dict(settings), "inputs": dict(inputs), "version": version, "seed": seed}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers, without importing them."""
    found = {"python": platform.python_version()}
    for package in ("evatok", "torch", "ray", "deepspeed", "av", "numpy", "pyarrow"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


class CurveWriter:
    """Training curves of a stage: JSONL segments ``curves/<first step>.jsonl``.

    One writer at a time. Rows: ``{"step", "samples", "time", "split", <metric>: float}``, steps not
    decreasing. The first row after a resume drops what an earlier attempt wrote from that step on.
    """

    def __init__(self, location: Location):
        self._location = location
        self._rows: list[dict[str, Any]] = []
        self._begun = False

    def write(self, row: Mapping[str, Any]) -> None:
        if not self._begun:
            self._drop_from(row["step"], row["split"])
            self._begun = True
        self._rows.append(dict(row))

    def flush(self) -> None:
        if not self._rows:
            return
        name = f"{CURVES}/{self._rows[0]['step']:012d}.jsonl"
        earlier = _read_rows(self._location, name) if self._location.exists(name) else []
        self._publish(name, [*earlier, *self._rows])
        self._rows = []

    def _publish(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        self._location.write_bytes(name, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def _drop_from(self, step: int, split: str) -> None:
        for segment in self._location.list(CURVES):
            name = f"{CURVES}/{segment}"
            rows = _read_rows(self._location, name)
            kept = [r for r in rows if r["step"] < step or (r["step"] == step and r["split"] != split)]
            if not kept:
                self._location.delete(name)
            elif len(kept) < len(rows):
                self._publish(name, kept)


def read_curves(location: Location) -> list[dict[str, Any]]:
    """What ``CurveWriter`` left in a stage's folder: one row per step and split, by step."""
    rows = [row for name in location.list(CURVES) for row in _read_rows(location, f"{CURVES}/{name}")]
    latest = {(row["step"], row["split"]): row for row in rows}
    return sorted(latest.values(), key=lambda row: row["step"])


def _read_rows(location: Location, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in location.read_bytes(name).splitlines()]


LEASE_SECONDS = 60.0


@contextlib.contextmanager
def exclusive(location: Location, patience: float = 0.0) -> Iterator[None]:
    """Hold a run's folder for this process; a second driver gets UserError instead of the folder.

    Locally an advisory file lock, which the kernel frees when the holder dies. Elsewhere a lease, renewed
    while held; the one of a dead holder lapses after LEASE_SECONDS, and that long is waited in any case.
    ``patience``: seconds to wait for a living holder.
    """
    folder = location.local()
    deadline = time.monotonic() + max(patience, 0.0 if folder else LEASE_SECONDS)
    while True:
        with _file_lock(folder) if folder else _lease(location) as holder:
            if holder is None:
                yield
                return
        if time.monotonic() >= deadline:
            raise UserError(
                f"{location.uri} is in use by {holder or 'another process'}.\n"
                "Wait for it to end, or stop it, or give this experiment another name (--set name=...)."
            )
        time.sleep(min(1.0, LEASE_SECONDS / 10))


@contextlib.contextmanager
def _file_lock(folder: Path) -> Iterator[str | None]:
    """Yields None when the lock is ours, else who holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}. Choose another storage.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            yield file.read().strip()
            return
        file.truncate(0)
        file.write(_me())
        file.flush()
        yield None


@contextlib.contextmanager
def _lease(location: Location) -> Iterator[str | None]:
    """Yields None when the lease is ours, else who holds it.

    A holder whose lease lapsed (storage out of reach) is interrupted if it is the main thread, and raises
    UserError.
    """
    name, mine = "lease.json", uuid.uuid4().hex
    released, lost = threading.Event(), threading.Event()
    main = threading.current_thread() is threading.main_thread()

    def sign() -> None:
        location.write_json(name, {"id": mine, "holder": _me(), "until": time.time() + LEASE_SECONDS})

    def current() -> dict[str, Any]:
        with contextlib.suppress(FileNotFoundError):
            return dict(location.read_json(name))
        return {"id": "", "holder": "", "until": 0.0}

    def renew() -> None:
        signed = time.monotonic()
        while not released.wait(LEASE_SECONDS / 4):
            try:
                if current()["id"] == mine:
                    sign()
                    signed = time.monotonic()
                    continue
            except (OSError, ValueError):
                if time.monotonic() < signed + LEASE_SECONDS:
                    continue
            lost.set()
            if main:
                _thread.interrupt_main()
            return

    if (holder := current())["until"] > time.time():
        yield holder["holder"]
        return
    sign()
    # A rival who signed at the same moment has overwritten us by then.
    time.sleep(min(1.0, LEASE_SECONDS / 10))
    if (holder := current())["id"] != mine:
        yield holder["holder"]
        return
    thread = threading.Thread(target=renew, name="evatok-lease", daemon=True)
    thread.start()
    try:
        yield None
    finally:
        released.set()
        thread.join()
        if lost.is_set():
            raise UserError(
                f"{location.uri}: storage did not answer for {LEASE_SECONDS:.0f} seconds, and this process"
                " lost its hold on the run. What was finished is kept; run again to go on."
            )
        if current()["id"] == mine:
            location.delete(name)


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _checked(name: str) -> str:
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
        raise ValueError(f"not a name below a folder: {name!r}")
    return name


def _split(uri: str) -> tuple[str, str, str]:
    """``scheme://bucket``, the path below it, and ``?options`` or nothing; the path is percent-encoded."""
    address, mark, query = uri.partition("?")
    scheme, _, rest = address.partition("://")
    authority, _, path = rest.partition("/")
    return f"{scheme}://{authority}", path.rstrip("/"), mark + query


@functools.lru_cache(maxsize=64)
def _file_system(root: str) -> tuple[Any, str]:
    """The client of a bucket, and the bucket's path on it. Making one may ask the network."""
    found: tuple[Any, str] = pafs.FileSystem.from_uri(root)
    return found


def _fsspec(uri: str) -> tuple[Any, str]:
    import fsspec  # type: ignore[import-untyped]

    try:
        fs, path = fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError) as error:
        raise UserError(
            f"{uri}: no file system for this address ({error}). Use a local path or a URI such as s3://bucket/folder."
        ) from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(fs)), path

"""What a source lists: videos, before anything is known of their content."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import pyarrow.fs as pafs

from evatok.artifacts import Location
from evatok.errors import UserError
from evatok.video.decode import MediaLimits, Reason

OUTSIDE: tuple[Reason, str] = ("outside", "its path leaves the data root, or can be no path")
_LONGEST_NAME = 255  # bytes, on every file system in use
_LONGEST_PATH = 4095


@dataclass(frozen=True)
class Video:
    """A file that should hold a video.

    `name`: unique in its source, stable over reruns. `split`: None lets the index draw one. `motion`: known
    complexity of each temporal block, for synthetic videos. `problem`: reason and detail for which it is
    rejected without being looked for. `state`: size in bytes and time of change in nanoseconds of the file,
    where listing it told. `part`: of a mixture.
    """

    name: str
    uri: str
    label: str | None = None
    caption: str | None = None
    split: str | None = None
    motion: tuple[float, ...] | None = None
    problem: tuple[Reason, str] | None = None
    state: tuple[int, int] | None = None
    part: str = ""


class Source(Protocol):
    """Where videos come from: a config that can list them."""

    def videos(self, workspace: Location, limits: MediaLimits | None = None) -> Iterator[Video]:
        """All videos, in a stable order; `workspace`: the folder for what the source makes itself.

        `limits`: what a file that the source fetches may ask of us.

        Raises UserError when the source as a whole is not there or not what it should be.
        """
        ...


def files(root: Location, suffixes: tuple[str, ...]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Relative paths of all files below `root` with one of these suffixes, sorted, and their `Video.state`.

    Holds the entries of one folder at each depth. A path that is not UTF-8 has surrogates for its odd bytes.
    """
    if root.local() is not None:
        yield from _local_files(root.path.rstrip("/"), suffixes)
        return
    start = len(root.path.rstrip("/")) + 1

    def walk(path: str) -> Iterator[pafs.FileInfo]:
        found = root.fs.get_file_info(pafs.FileSelector(path))
        folders = pafs.FileType.Directory
        for info in sorted(found, key=lambda i: i.base_name + "/" * (i.type == folders)):
            if info.type == folders:
                yield from walk(info.path)
            elif info.type == pafs.FileType.File and info.base_name.lower().endswith(suffixes):
                yield info

    for info in walk(root.path):
        yield info.path[start:], (info.size, info.mtime_ns or 0)


def _local_files(root: str, suffixes: tuple[str, ...]) -> Iterator[tuple[str, tuple[int, int]]]:
    """A link to a folder is followed unless that was visited before, as the folders that it lies in were."""
    visited: set[tuple[int, int]] = set()

    def walk(path: str) -> Iterator[os.DirEntry[str]]:
        with os.scandir(path or "/") as entries:
            found = sorted(entries, key=lambda entry: entry.name + "/" * _is(entry.is_dir))
        for entry in found:
            if _is(entry.is_dir):
                if not (entry.is_symlink() and _identity(entry.stat()) in visited):
                    visited.add(_identity(entry.stat()))
                    yield from walk(entry.path)
            elif entry.name.lower().endswith(suffixes) and _is(entry.is_file):
                yield entry

    visited.add(_identity(os.stat(root or "/")))
    for entry in walk(root):
        state = entry.stat()
        yield entry.path[len(root) + 1 :], (state.st_size, state.st_mtime_ns)


def _is(kind: Callable[[], bool]) -> bool:
    """Whether an entry is of a kind, which a link that leads to itself is not."""
    try:
        return kind()
    except OSError:
        return False


def _identity(state: os.stat_result) -> tuple[int, int]:
    return state.st_dev, state.st_ino


def folder(uri: str, purpose: str) -> Location:
    """The folder that a config names. Raises UserError when it is not there."""
    location = Location.parse(uri)
    if location.fs.get_file_info(location.path).type != pafs.FileType.Directory:
        raise UserError(f"{uri}: no such folder ({purpose}).")
    return location


def below(root: Location, name: str) -> str | None:
    """The URI of `name` under `root`; None when it would leave the root or no file can have it."""
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or "\0" in name:
        return None
    address = root.address(name)
    if root.local() is not None:
        longest = max(len(part.encode()) for part in parts)
        if longest > _LONGEST_NAME or len(address.encode()) > _LONGEST_PATH:
            return None
    return address

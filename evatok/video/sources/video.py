"""What a source lists: videos, before anything is known of their content."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import pyarrow.fs as pafs

from evatok.artifacts import Location
from evatok.errors import UserError
from evatok.video.decode import Reason

OUTSIDE: tuple[Reason, str] = ("outside", "its path leaves the data root")


@dataclass(frozen=True)
class Video:
    """A file that should hold a video.

    `name`: unique in its source, stable over reruns. `split`: None lets the index draw one. `motion`: known
    complexity of each temporal block, for synthetic videos. `problem`: reason and detail for which it is
    rejected without being looked for. `part`: of a mixture.
    """

    name: str
    uri: str
    label: str | None = None
    caption: str | None = None
    split: str | None = None
    motion: tuple[float, ...] | None = None
    problem: tuple[Reason, str] | None = None
    part: str = ""


class Source(Protocol):
    """Where videos come from: a config that can list them."""

    def videos(self, workspace: Location) -> Iterator[Video]:
        """All videos, in a stable order; `workspace`: the folder for what the source makes itself.

        Raises UserError when the source as a whole is not there or not what it should be.
        """
        ...


def files(root: Location, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Relative paths of all files below `root` with one of these suffixes, sorted."""
    selector = pafs.FileSelector(root.path, recursive=True)
    found = (info.path for info in root.fs.get_file_info(selector) if info.type == pafs.FileType.File)
    start = len(root.path.rstrip("/")) + 1
    yield from sorted(path[start:] for path in found if path.lower().endswith(suffixes))


def folder(uri: str, purpose: str) -> Location:
    """The folder that a config names. Raises UserError when it is not there."""
    location = Location.parse(uri)
    if location.fs.get_file_info(location.path).type != pafs.FileType.Directory:
        raise UserError(f"{uri}: no such folder ({purpose}).")
    return location


def below(root: Location, name: str) -> str | None:
    """The URI of `name` under `root`; None when it would leave the root."""
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        return None
    return root.address(name)

"""UCF-101 as it ships: a folder per class, official lists of classes and splits."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from evatok.artifacts import Location
from evatok.config import Config
from evatok.errors import UserError
from evatok.video.decode import MediaLimits
from evatok.video.sources.video import Video, below, folder


class Ucf101Source(Config):
    """The videos that the official lists name, with their class as label."""

    kind: Literal["ucf101"] = "ucf101"
    path: str = Field(description="folder or URI with one folder of .avi files per class")
    lists: str = Field(description="folder with classInd.txt, trainlist0N.txt and testlist0N.txt")
    fold: Literal[1, 2, 3] = Field(default=1, description="which of the three official splits")

    def videos(self, workspace: Location, limits: MediaLimits | None = None) -> Iterator[Video]:
        """Listed videos whose file is missing end in the rejected table."""
        root = folder(self.path, "index.source.path")
        lists = folder(self.lists, "index.source.lists")
        classes = {line.split()[1] for line in _lines(lists, "classInd.txt")}
        for split in ("train", "test"):
            for line in _lines(lists, f"{split}list{self.fold:02d}.txt"):
                name = line.split()[0]
                label = name.partition("/")[0]
                uri = below(root, name)
                if label not in classes or uri is None:
                    yield Video(name, name, split=split, problem=("outside", "not a video of a listed class"))
                else:
                    yield Video(name, uri, label=label, split=split)


def _lines(lists: Location, name: str) -> list[str]:
    try:
        text = lists.read_bytes(name).decode()
    except FileNotFoundError:
        raise UserError(
            f"{lists}: {name} is missing. The official UCF-101 lists come as one archive."
        ) from None
    return [line for line in text.splitlines() if line.strip()]

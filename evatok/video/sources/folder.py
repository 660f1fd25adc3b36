"""A folder of videos or images, at any depth: an image is a video of one frame."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from evatok.artifacts import Location
from evatok.config import Config
from evatok.errors import UserError
from evatok.video.decode import MediaLimits
from evatok.video.sources.video import Video, files, folder

VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".gif", ".mpg", ".mpeg", ".ts", ".wmv", ".flv")
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
SUFFIXES = VIDEOS + IMAGES


class FolderSource(Config):
    """Every video and image file below a folder."""

    kind: Literal["folder"] = "folder"
    path: str = Field(description="folder or URI that holds the videos")

    def videos(self, workspace: Location, limits: MediaLimits | None = None) -> Iterator[Video]:
        """Files whose name is not UTF-8 are rejected. Raises UserError without such a folder or file."""
        root = folder(self.path, "index.source.path")
        count = 0
        for name, state in files(root, SUFFIXES):
            count += 1
            try:
                name.encode()
            except UnicodeEncodeError:
                shown = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
                yield Video(shown, root.address(shown), problem=("outside", "its name is not UTF-8"))
            else:
                yield Video(name, root.address(name), state=state)
        if not count:
            raise UserError(
                f"{self.path}: no video file and no image in this folder. "
                f"Looked for {', '.join(SUFFIXES)} at any depth."
            )

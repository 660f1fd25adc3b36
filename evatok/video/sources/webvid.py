"""WebVid: a CSV of captions, videos under videos/<page_dir>/<videoid>.mp4."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from evatok.artifacts import Location
from evatok.config import Config
from evatok.video.sources.table import rows
from evatok.video.sources.video import Video, below, folder


class WebVidSource(Config):
    """The rows of a WebVid CSV, with the name as caption."""

    kind: Literal["webvid"] = "webvid"
    path: str = Field(description="folder or URI that holds videos/")
    csv: str = Field(description="CSV with the columns videoid, contentUrl, duration, page_dir, name")

    def videos(self, workspace: Location) -> Iterator[Video]:
        """Rows without a page_dir are looked for in videos/ itself."""
        root = folder(self.path, "index.source.path")
        for row in rows(self.csv, ("videoid", "page_dir", "name")):
            name = video_name(row)
            uri = below(root / "videos", name)
            caption = row["name"] or None
            if uri is None or not row["videoid"]:
                yield Video(name, name, caption=caption, problem="its path leaves the data root")
            else:
                yield Video(name, uri, caption=caption)


def video_name(row: dict[str, str]) -> str:
    """The path of a row's video below videos/."""
    return "/".join(part for part in (row["page_dir"], f"{row['videoid']}.mp4") if part)

"""WebVid: a CSV of captions, videos under videos/<page_dir>/<videoid>.mp4."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from evatok.artifacts import Location
from evatok.config import OPERATIONAL, Config
from evatok.errors import UserError
from evatok.video.decode import MediaLimits
from evatok.video.download import Download, DownloadConfig, download_all
from evatok.video.sources.table import rows
from evatok.video.sources.video import OUTSIDE, Video, below, folder


class WebVidSource(Config):
    """The rows of a WebVid CSV, with the name as caption."""

    kind: Literal["webvid"] = "webvid"
    path: str = Field(description="folder or URI that holds videos/")
    csv: str = Field(description="CSV with the columns videoid, contentUrl, duration, page_dir, name")
    download: Annotated[bool, OPERATIONAL] = Field(default=False, description="fetch missing videos first")
    fetch: Annotated[DownloadConfig, OPERATIONAL] = Field(
        default=DownloadConfig(), description="what may be fetched, and within which limits"
    )

    def videos(self, workspace: Location, limits: MediaLimits | None = None) -> Iterator[Video]:
        """Rows without a page_dir are looked for in videos/ itself."""
        root = folder(self.path, "index.source.path") / "videos"
        listed = ((_video(root, row), row.get("contentUrl", "")) for row in self._rows())
        if not self.download:
            yield from (video for video, _ in listed)
            return
        if root.local() is None:
            raise UserError(
                f"{self.path}: videos are downloaded into a local folder; copy them on from there."
            )
        if not self.fetch.hosts:
            raise UserError("index.source.fetch.hosts is empty: name the hosts that may be downloaded from.")
        wanted = (
            (video, Download(url, Path(video.uri)) if video.problem is None else None)
            for video, url in listed
        )
        for video, error in download_all(wanted, self.fetch, limits or MediaLimits()):
            yield video if error is None else replace(video, problem=(error.code, error.detail))

    def _rows(self) -> Iterator[dict[str, str]]:
        columns = ("videoid", "page_dir", "name")
        return rows(self.csv, (*columns, "contentUrl") if self.download else columns)


def _video(root: Location, row: dict[str, str]) -> Video:
    name = "/".join(part for part in (row["page_dir"], f"{row['videoid']}.mp4") if part)
    caption = row["name"] or None
    uri = below(root, name) if row["videoid"] else None
    if uri is None:
        return Video(name, name, caption=caption, problem=OUTSIDE)
    return Video(name, uri, caption=caption)

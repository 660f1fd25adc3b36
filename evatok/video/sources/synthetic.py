"""Videos that we render and encode ourselves, with known motion."""

import tempfile
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from evatok.artifacts import Location
from evatok.config import Config
from evatok.video.decode import MediaLimits
from evatok.video.sources.video import Video
from evatok.video.synthetic import read_truth, write_videos

VIDEOS = "videos"


class SyntheticSource(Config):
    """Seeded videos, written once into the index's folder."""

    kind: Literal["synthetic"] = "synthetic"
    count: int = Field(default=60, gt=0, description="videos to write")
    seed: int = Field(default=0, ge=0, description="the same seed gives the same videos")
    blocks: int = Field(default=16, gt=0, description="temporal blocks of 4 frames per video")
    size: int = Field(default=96, ge=16, multiple_of=2, description="height and width, pixels")
    texture: bool = Field(default=True, description="of the surfaces; without it small models learn faster")

    def videos(self, workspace: Location, limits: MediaLimits | None = None) -> Iterator[Video]:
        """Writes what is not there yet; the kind of motion is the label."""
        plain = "" if self.texture else "-plain"
        root = workspace / f"{VIDEOS}-{self.count}-{self.seed}-{self.blocks}-{self.size}{plain}"
        with tempfile.TemporaryDirectory(prefix="evatok-videos-") as folder:
            if not root.exists("truth.json"):
                write_videos(
                    folder,
                    self.count,
                    self.seed,
                    blocks=self.blocks,
                    size=self.size,
                    texture=self.texture,
                )
                root.upload(folder)
        for video in read_truth(root):
            yield Video(video.name, root.address(video.name), label=video.label, motion=video.motion)

"""Several sources in one index, whose clips take turns by weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from evatok.artifacts import Location
from evatok.config import Config
from evatok.video.decode import MediaLimits
from evatok.video.order import turn_edges
from evatok.video.sources.folder import FolderSource
from evatok.video.sources.kinetics import KineticsSource
from evatok.video.sources.synthetic import SyntheticSource
from evatok.video.sources.ucf101 import Ucf101Source
from evatok.video.sources.video import Video
from evatok.video.sources.webvid import WebVidSource

OneSource = Annotated[
    FolderSource | KineticsSource | SyntheticSource | Ucf101Source | WebVidSource,
    Field(discriminator="kind"),
]


class Part(Config):
    source: OneSource
    weight: float = Field(default=1.0, gt=0, description="how often its turn comes, relative to the others")
    images: bool = Field(
        default=False,
        description="its files are images: tokenizers also train on each as a clip of one block; the turns of"
        " the mixture are then whole steps, and nothing else uses the images",
    )


class MixtureSource(Config):
    """The videos of all parts; a clip of each comes as often as its weight says, however large it is."""

    kind: Literal["mixture"] = "mixture"
    parts: dict[str, Part] = Field(min_length=1, description="sources by a name of your own")

    @model_validator(mode="after")
    def _everyone_has_a_turn(self) -> MixtureSource:
        turns = np.diff(turn_edges([part.weight for part in self.parts.values()]))
        for name, number in zip(self.parts, turns):
            if not number:
                raise ValueError(
                    f"the weight of part {name!r} is below 1/1000 of all weights, so that its turn never "
                    "comes; raise it, or leave the part out"
                )
        if len(image_parts(self)) == len(self.parts):
            raise ValueError(
                "every part is of images; for images alone leave `images` out and set index.frames 1"
            )
        return self

    def videos(self, workspace: Location, limits: MediaLimits | None = None) -> Iterator[Video]:
        """Names begin with the part's. Images are all to train on: nothing is measured on them."""
        for name, part in self.parts.items():
            for video in part.source.videos(workspace, limits):
                split = "train" if part.images else video.split
                yield replace(video, name=f"{name}/{video.name}", part=name, split=split)


def image_parts(source: OneSource | MixtureSource) -> list[str]:
    """Names of the parts whose files are images."""
    parts = source.parts if isinstance(source, MixtureSource) else {}
    return [name for name, part in parts.items() if part.images]


def part_problems(key: str, part: str | None, source: OneSource | MixtureSource) -> Iterator[tuple[str, str]]:
    """(dotted key, problem) where ``part`` names no part of ``source`` with videos; None names them all."""
    images = image_parts(source)
    with_videos = [name for name in getattr(source, "parts", ()) if name not in images]
    if part is None or part in with_videos:
        return
    what = "is of images, which nothing but training uses" if part in images else "is no part of index.source"
    yield key, f"{part!r} {what}; there are {', '.join(with_videos) or 'none: index.source is no mixture'}"

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
        return self

    def videos(self, workspace: Location, limits: MediaLimits | None = None) -> Iterator[Video]:
        """Names begin with the part's."""
        for name, part in self.parts.items():
            for video in part.source.videos(workspace, limits):
                yield replace(video, name=f"{name}/{video.name}", part=name)

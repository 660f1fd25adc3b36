"""Sources of videos. A new one is a file here whose config lists `Video`s, and a name in `OneSource`."""

from typing import Annotated

from pydantic import Field

from evatok.video.sources.folder import FolderSource
from evatok.video.sources.kinetics import KineticsSource
from evatok.video.sources.mixture import MixtureSource, OneSource
from evatok.video.sources.synthetic import SyntheticSource
from evatok.video.sources.ucf101 import Ucf101Source
from evatok.video.sources.video import Source, Video
from evatok.video.sources.webvid import WebVidSource

AnySource = Annotated[OneSource | MixtureSource, Field(discriminator="kind")]

__all__ = [
    "AnySource",
    "FolderSource",
    "KineticsSource",
    "MixtureSource",
    "Source",
    "SyntheticSource",
    "Ucf101Source",
    "Video",
    "WebVidSource",
]

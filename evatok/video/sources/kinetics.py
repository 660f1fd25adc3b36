"""Kinetics: CSVs of trimmed YouTube segments."""

from collections.abc import Iterator
from itertools import chain
from typing import Literal

from pydantic import Field

from evatok.artifacts import Location
from evatok.config import Config
from evatok.errors import UserError
from evatok.video.decode import MediaLimits
from evatok.video.sources.table import rows
from evatok.video.sources.video import OUTSIDE, Video, below, folder

_COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")


class KineticsSource(Config):
    """The segments of Kinetics CSVs whose files were trimmed by whoever fetched them."""

    kind: Literal["kinetics"] = "kinetics"
    path: str = Field(description="folder or URI that holds the videos")
    csv: str | tuple[str, ...] = Field(
        min_length=1,
        description=f"CSV with the columns {', '.join(_COLUMNS)}, or a list of them: one per split",
    )
    pattern: str = Field(
        default="{label}/{youtube_id}_{time_start:06d}_{time_end:06d}.mp4",
        description="where a segment's file is below `path`, in terms of the columns",
    )

    def videos(self, workspace: Location, limits: MediaLimits | None = None) -> Iterator[Video]:
        """The validation split counts as test."""
        root = folder(self.path, "index.source.path")
        tables = (self.csv,) if isinstance(self.csv, str) else self.csv
        for row in chain.from_iterable(rows(table, _COLUMNS) for table in tables):
            split = "test" if row["split"].startswith("val") else row["split"]
            try:
                times = {column: int(float(row[column])) for column in ("time_start", "time_end")}
            except (ValueError, OverflowError) as error:
                name = "/".join(row[column] for column in _COLUMNS)
                yield Video(name, name, split=split, problem=("missing", f"its row names no file: {error}"))
                continue
            name = self._name(row, times)
            uri = below(root, name)
            if uri is None:
                yield Video(name, name, split=split, problem=OUTSIDE)
            else:
                yield Video(name, uri, label=row["label"] or None, split=split)

    def _name(self, row: dict[str, str], times: dict[str, int]) -> str:
        try:
            return self.pattern.format(**{**row, **times})
        except (KeyError, ValueError, IndexError) as error:
            raise UserError(
                f"index.source.pattern {self.pattern!r} cannot be filled in ({error}); "
                f"allowed names: {', '.join(_COLUMNS)}."
            ) from None

"""The clip index: one Parquet row per clip, read only where it is asked for.

Ten million rows stay on storage. A lookup reads the row groups it needs and keeps the last few of them, and a
selection is an array of row numbers.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from evatok.artifacts import Location
from evatok.errors import UserError
from evatok.video.decode import ClipFormat, DecodeError, VideoInfo
from evatok.video.order import ClipOrder, MixedOrder, Order

CLIPS = "clips.parquet"
REJECTED = "rejected.parquet"
PREPARED = "prepared"  # clips decoded once, if anybody asked for that
BAD = "bad"  # notes about clips that turned out to be dangerous when they were decoded
_SOURCES = b"evatok-sources"

SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),  # unique
        ("uri", pa.string()),
        ("start", pa.float64()),  # seconds on the stream's clock
        ("fps", pa.float32()),  # sampling rate; 0: every frame
        ("frames", pa.int32()),
        ("width", pa.int32()),  # as displayed
        ("height", pa.int32()),
        ("label", pa.string()),
        ("caption", pa.string()),
        ("split", pa.string()),
        ("motion", pa.list_(pa.float32())),  # per temporal block, where the source knows it
    ]
)
REJECTED_SCHEMA = pa.schema([("uri", pa.string()), ("code", pa.string()), ("detail", pa.string())])

# A lookup of one clip reads one group: small groups keep that cheap, and 10 million rows are 2,442 of them.
_ROWS_PER_GROUP = 4096
_GROUPS_KEPT = 64


@dataclass(frozen=True)
class SourceShare:
    """`clips` rows of an index that come from one source, and how often its turn comes in the order."""

    name: str
    clips: int
    weight: float


@dataclass(frozen=True)
class ClipIndex:
    """Clips of an index, all of them or a selection. Picklable and cheap to send.

    `version`: modification time of the file, nanoseconds. `rows`: clips of the whole index.
    `selected` int64 [clips]: row of the whole index for each clip of this view; None for the whole index.
    """

    location: Location
    version: int
    rows: int
    selected: NDArray[np.int64] | None = None

    @classmethod
    def open(cls, location: Location) -> ClipIndex:
        """The index in the folder `location`. Raises UserError where there is none."""
        version = location.fs.get_file_info(f"{location.path}/{CLIPS}").mtime_ns
        if version is None:
            raise UserError(
                f"{location}: no clip index here ({CLIPS} is missing). Make one with `evatok index`."
            )
        return cls(location, version, int(_file(location.uri, version).edges[-1]))

    def __len__(self) -> int:
        return self.rows if self.selected is None else len(self.selected)

    def take(self, clips: NDArray[np.int64]) -> pa.Table:
        """These clips of the view, in that order, with a column `row`: int64, row of the whole index.

        Raises IndexError for a clip outside the view.
        """
        clips = np.asarray(clips, np.int64)
        if clips.size and (clips.min() < 0 or clips.max() >= len(self)):
            raise IndexError(f"clips {clips.min()}..{clips.max()} of an index of {len(self)}")
        rows = clips if self.selected is None else self.selected[clips]
        edges = _file(self.location.uri, self.version).edges
        groups = np.searchsorted(edges, rows, side="right") - 1
        needed, at = np.unique(groups, return_inverse=True)
        lengths = edges[needed + 1] - edges[needed]
        offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
        tables = [_group(self.location.uri, self.version, int(group)) for group in needed]
        table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
        taken = table.take(pa.array(offsets[at] + rows - edges[groups]))
        return taken.append_column("row", pa.array(rows, pa.int64()))

    def select(self, **wanted: str) -> ClipIndex:
        """The clips whose columns have these values: select(split="train")."""
        mask = np.ones(len(self), bool)
        for name, value in wanted.items():
            mask &= pc.fill_null(pc.equal(self.column(name), value), False).to_numpy(zero_copy_only=False)
        chosen = np.flatnonzero(mask)
        return replace(self, selected=chosen if self.selected is None else self.selected[chosen])

    def column(self, name: str) -> pa.ChunkedArray:
        """One column over all clips of the view. Text comes dictionary-encoded."""
        kept = [name] if SCHEMA.field(name).type == pa.string() else []
        table = pq.read_table(
            f"{self.location.path}/{CLIPS}", columns=[name], filesystem=self.location.fs, read_dictionary=kept
        )
        values = table.column(name)
        return values if self.selected is None else values.take(pa.array(self.selected))

    def labels(self) -> list[str]:
        """The distinct labels of the view in alphabetical order; a clip's label number is its place here."""
        return sorted(value for value in pc.unique(self.column("label")).to_pylist() if value is not None)

    def order(self, seed: int) -> Order:
        """The endless order of this view's clips; several sources are mixed by their weights."""
        sources = _file(self.location.uri, self.version).sources
        edges = np.cumsum([0, *(source.clips for source in sources)])
        held = edges if self.selected is None else np.searchsorted(self.selected, edges)
        parts = [(int(clips), source.weight) for clips, source in zip(np.diff(held), sources) if clips]
        if len(parts) < 2:
            return ClipOrder(len(self), seed)
        return MixedOrder(tuple(clips for clips, _ in parts), tuple(weight for _, weight in parts), seed)

    def part(self, name: str) -> ClipIndex:
        """The clips of one part of a mixture. Raises UserError when there is no such part."""
        sources = _file(self.location.uri, self.version).sources
        edges = np.cumsum([0, *(source.clips for source in sources)])
        names = [source.name for source in sources]
        if name not in names:
            raise UserError(f"{self.location}: no part {name!r} in this index; there are {names or 'none'}.")
        low, high = edges[names.index(name) : names.index(name) + 2]
        held = np.arange(self.rows) if self.selected is None else self.selected
        return replace(self, selected=held[(held >= low) & (held < high)])

    def known_bad(self) -> frozenset[int]:
        """Rows of the whole index whose decoding took a process down or never ended, here or elsewhere."""
        return frozenset(int(name.partition(".")[0]) for name in self.location.list(BAD))

    def report_bad(self, clip: dict[str, Any], error: DecodeError) -> None:
        """Note on storage that nobody should try this clip again."""
        note = {"clip_id": clip["clip_id"], "uri": clip["uri"], "code": error.code, "detail": error.detail}
        self.location.write_json(f"{BAD}/{clip['row']}.json", note)


def write_index(
    location: Location, clips: pa.Table, rejected: pa.Table, sources: Sequence[SourceShare] = ()
) -> None:
    """Publish both tables of an index, clips last. `sources`: of the rows, in their order, if several.

    Where the same clips are there already, what was made from them stays too.
    """
    location.write_bytes(REJECTED, _parquet(rejected.cast(REJECTED_SCHEMA)))
    shares = json.dumps([asdict(source) for source in sources])
    data = _parquet(clips.cast(SCHEMA).replace_schema_metadata({_SOURCES: shares}))
    if location.exists(CLIPS) and location.read_bytes(CLIPS) == data:
        return
    for stale in (BAD, PREPARED):
        location.delete(stale)
    location.write_bytes(CLIPS, data)


def clip_starts(info: VideoInfo, clip_format: ClipFormat, stride: int, limit: int | None) -> list[float]:
    """Where the clips of a video begin, seconds: every `stride` sampled frames, at most `limit` of them."""
    times = info.times
    if clip_format.fps:
        duration = info.end - float(times[0])
        sampled = int(np.ceil(duration * clip_format.fps - 1e-6))
    else:
        sampled = len(times)
    firsts = range(0, sampled - clip_format.frames + 1, stride)[:limit]
    if clip_format.fps:
        return [float(times[0]) + first / clip_format.fps for first in firsts]
    return [float(times[first]) for first in firsts]


def _parquet(table: pa.Table) -> bytes:
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, row_group_size=_ROWS_PER_GROUP)
    return bytes(buffer.getvalue())


@dataclass(frozen=True)
class _File:
    """An open Parquet file; `edges` int64 [groups + 1]: first row of each row group, then the row count."""

    parquet: pq.ParquetFile
    edges: NDArray[np.int64]
    sources: tuple[SourceShare, ...]
    lock: threading.Lock  # a reader is not for several threads at once


@lru_cache(maxsize=4)
def _file(uri: str, version: int) -> _File:
    location = Location.parse(uri)
    parquet = pq.ParquetFile(f"{location.path}/{CLIPS}", filesystem=location.fs)
    metadata = parquet.metadata
    lengths = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    shares = json.loads((parquet.schema_arrow.metadata or {}).get(_SOURCES, b"[]"))
    sources = tuple(SourceShare(**share) for share in shares)
    return _File(parquet, np.cumsum([0, *lengths], dtype=np.int64), sources, threading.Lock())


@lru_cache(maxsize=_GROUPS_KEPT)
def _group(uri: str, version: int, group: int) -> pa.Table:
    file = _file(uri, version)
    with file.lock:
        return file.parquet.read_row_group(group)

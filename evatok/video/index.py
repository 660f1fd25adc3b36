"""The clip index: one Parquet row per clip, read only where it is asked for.

Ten million rows stay on storage. A lookup reads the row groups it needs and keeps the last few of them, and a
selection is an array of row numbers.
"""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from evatok.artifacts import Location
from evatok.errors import UserError
from evatok.video.decode import ClipFormat, DecodeError, MediaLimits, VideoInfo
from evatok.video.order import ClipOrder, MixedOrder, Order

CLIPS = "clips.parquet"
REJECTED = "rejected.parquet"
PREPARED = "prepared"  # clips decoded once, if anybody asked for that
BAD = "bad"  # notes about clips that turned out to be dangerous when they were decoded
_SOURCES = b"evatok-sources"
_LIMITS = b"evatok-limits"

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

# A lookup of one clip reads one group. Small ones without statistics keep that cheap (0.1 ms for an address),
# and still the file's list of groups takes 0.7 kB for each of them: 7 MB with 10 million rows.
_ROWS_PER_GROUP = 1024
_GROUPS_KEPT = 256


@dataclass(frozen=True)
class SourceShare:
    """`clips` rows of an index that come from one source, and how often its turn comes in the order.

    `images`: each is one image.
    """

    name: str
    clips: int
    weight: float
    images: bool = False


@dataclass(frozen=True)
class ClipIndex:
    """Clips of an index, all of them or a selection. Picklable and cheap to send.

    `version`: modification time of the file, nanoseconds. `rows`: clips of the whole index. `limits`: what
    its files were allowed to ask of us when they were indexed, and are when their clips are decoded.
    `selected` int64 [clips]: row of the whole index for each clip of this view, ascending; None for the whole
    index.
    """

    location: Location
    version: int
    rows: int
    limits: MediaLimits
    selected: NDArray[np.int64] | None = None

    @classmethod
    def open(cls, location: Location) -> ClipIndex:
        """The index in the folder `location`. Raises UserError where there is none."""
        version = location.fs.get_file_info(f"{location.path}/{CLIPS}").mtime_ns
        if version is None:
            raise UserError(
                f"{location}: no clip index here ({CLIPS} is missing). Make one with `evatok index`."
            )
        file = _file(location.uri, version)
        return cls(location, version, int(file.edges[-1]), file.limits)

    def __len__(self) -> int:
        return self.rows if self.selected is None else len(self.selected)

    def take(self, clips: NDArray[np.int64], columns: Sequence[str] = tuple(SCHEMA.names)) -> pa.Table:
        """These clips of the view, in that order, with a column `row`: int64, row of the whole index.

        Only the named columns are read. Raises IndexError for a clip outside the view.
        """
        clips = np.asarray(clips, np.int64)
        if clips.size and (clips.min() < 0 or clips.max() >= len(self)):
            raise IndexError(f"clips {clips.min()}..{clips.max()} of an index of {len(self)}")
        rows = clips if self.selected is None else self.selected[clips]
        file = _file(self.location.uri, self.version)
        groups = np.searchsorted(file.edges, rows, side="right") - 1
        needed, at = np.unique(groups, return_inverse=True)
        lengths = file.edges[needed + 1] - file.edges[needed]
        offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
        tables = file.groups([int(group) for group in needed], tuple(columns))
        table = pa.concat_tables(tables) if tables else SCHEMA.empty_table().select(list(columns))
        taken = table.take(pa.array(offsets[at] + rows - file.edges[groups]))
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

    def videos(self) -> NDArray[np.int32]:
        """For each clip of the view a number of the video that it is cut from."""
        numbers: NDArray[np.int32] = (
            self.column("uri").unify_dictionaries().combine_chunks().indices.to_numpy()
        )
        return numbers

    def labels(self) -> list[str]:
        """The distinct labels of the view in alphabetical order; a clip's label number is its place here."""
        return sorted(value for value in pc.unique(self.column("label")).to_pylist() if value is not None)

    def order(self, seed: int, batch: int = 1) -> Order:
        """The endless order of this view's clips; several sources are mixed by their weights.

        Where images are among them, every `batch` positions from a multiple of it on are of one source.
        """
        parts = [(source, high - low) for source, low, high in self._sources() if high > low]
        if len(parts) < 2:
            return ClipOrder(len(self), seed)
        run = batch if any(source.images for source, _ in parts) else 1
        return MixedOrder(
            tuple(clips for _, clips in parts), tuple(source.weight for source, _ in parts), seed, run
        )

    def part(self, name: str) -> ClipIndex:
        """The clips of one part of a mixture. Raises UserError when there is no such part."""
        names = [source.name for source, *_ in self._sources()]
        if name not in names:
            raise UserError(f"{self.location}: no part {name!r} in this index; there are {names or 'none'}.")
        return self._of(lambda source: source.name == name)

    def without_images(self) -> ClipIndex:
        """The clips that are cut from videos."""
        if not any(source.images for source, *_ in self._sources()):
            return self
        return self._of(lambda source: not source.images)

    def _of(self, wanted: Callable[[SourceShare], bool]) -> ClipIndex:
        rows = np.arange(self.rows) if self.selected is None else self.selected
        chosen = [rows[low:high] for source, low, high in self._sources() if wanted(source)]
        return replace(self, selected=np.concatenate(chosen))

    def _sources(self) -> list[tuple[SourceShare, int, int]]:
        """The sources, each with its first clip in this view and the one after its last."""
        sources = _file(self.location.uri, self.version).sources
        edges = np.cumsum([0, *(source.clips for source in sources)])
        if self.selected is not None:
            edges = np.searchsorted(self.selected, edges)
        places: list[int] = edges.tolist()
        return list(zip(sources, places, places[1:]))

    def known_bad(self) -> frozenset[int]:
        """Rows of the whole index whose decoding took a process down or never ended, here or elsewhere."""
        return frozenset(int(name.partition(".")[0]) for name in self.location.list(BAD))

    def report(self, row: int, error: DecodeError) -> None:
        """Note on storage that nobody should try the clip again, if its decoder died or never ended."""
        if error.code in ("crash", "timeout"):
            whole = replace(self, selected=None)
            (clip,) = whole.take(np.asarray([row]), ("clip_id", "uri")).to_pylist()
            self.location.write_json(
                f"{BAD}/{row}.json", {**clip, "code": error.code, "detail": error.detail}
            )


class IndexWriter:
    """Writes an index a batch at a time, in a `with` block; both tables are published at its end, clips last.

    Where the same clips are there already, what was made from them stays too. `shares`: of the rows, in their
    order, if they come from several sources; may be set until the end.
    """

    def __init__(self, location: Location, limits: MediaLimits) -> None:
        self.shares: Sequence[SourceShare] = ()
        self._location, self._limits = location, limits
        self._waiting: list[pa.Table] = []

    def __enter__(self) -> IndexWriter:
        self._stack = ExitStack()
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="evatok-index-"))
        self._path = Path(folder) / CLIPS
        self._clips = pq.ParquetWriter(self._path, SCHEMA, write_statistics=False)
        self._rejected = pq.ParquetWriter(Path(folder) / REJECTED, REJECTED_SCHEMA)
        return self

    def write(self, clips: pa.Table) -> None:
        """Append clips."""
        self._waiting.append(clips.cast(SCHEMA))
        if sum(table.num_rows for table in self._waiting) >= _ROWS_PER_GROUP:
            table = pa.concat_tables(self._waiting)
            whole = table.num_rows // _ROWS_PER_GROUP * _ROWS_PER_GROUP
            self._clips.write_table(table.slice(0, whole), row_group_size=_ROWS_PER_GROUP)
            self._waiting = [table.slice(whole)]

    def reject(self, videos: pa.Table) -> None:
        """Append to the table of what cannot be used."""
        self._rejected.write_table(videos.cast(REJECTED_SCHEMA))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if kind is None and any(table.num_rows for table in self._waiting):
                self._clips.write_table(pa.concat_tables(self._waiting), row_group_size=_ROWS_PER_GROUP)
            shares = json.dumps([asdict(share) for share in self.shares])
            self._clips.add_key_value_metadata({_SOURCES: shares, _LIMITS: self._limits.model_dump_json()})
            self._clips.close()
            self._rejected.close()
            if kind is None:
                self._publish()

    def _publish(self) -> None:
        self._location.write_file(REJECTED, self._path.with_name(REJECTED))
        if _same(self._path, self._location):
            return
        for stale in (BAD, PREPARED):
            self._location.delete(stale)
        self._location.write_file(CLIPS, self._path)


def write_index(
    location: Location,
    clips: pa.Table,
    rejected: pa.Table,
    sources: Sequence[SourceShare] = (),
    limits: MediaLimits | None = None,
) -> None:
    """Publish an index whose clips are in memory, as `IndexWriter` does."""
    with IndexWriter(location, limits or MediaLimits()) as writer:
        writer.shares = sources
        writer.write(clips)
        writer.reject(rejected)


def _same(path: Path, location: Location) -> bool:
    """Whether the file of that name in `location` has the same content."""
    if location.fs.get_file_info(f"{location.path}/{path.name}").size != path.stat().st_size:
        return False
    with path.open("rb") as mine, location.fs.open_input_stream(f"{location.path}/{path.name}") as theirs:
        while chunk := mine.read(1 << 20):
            if chunk != theirs.read(len(chunk)):
                return False
    return True


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


@dataclass(frozen=True)
class _File:
    """An open Parquet file; `edges` int64 [groups + 1]: first row of each row group, then the row count."""

    parquet: pq.ParquetFile
    edges: NDArray[np.int64]
    sources: tuple[SourceShare, ...]
    limits: MediaLimits
    kept: dict[tuple[int, tuple[str, ...]], pa.Table] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)  # a reader is not for several threads

    def groups(self, numbers: Sequence[int], columns: tuple[str, ...]) -> list[pa.Table]:
        """These columns of these row groups; what is not at hand is read at once."""
        with self.lock:
            found = {n: self.kept[n, columns] for n in numbers if (n, columns) in self.kept}
            missing = [n for n in numbers if n not in found]
            if missing:
                table = self.parquet.read_row_groups(missing, columns=list(columns))
                offset = 0
                for n in missing:
                    rows = np.arange(offset, offset + self.edges[n + 1] - self.edges[n])
                    # A copy: a slice would keep the whole reading in memory.
                    found[n] = self.kept[n, columns] = table.take(pa.array(rows))
                    offset += len(rows)
                for old in list(self.kept)[:-_GROUPS_KEPT]:
                    del self.kept[old]
        return [found[n] for n in numbers]


def open_parquet(location: Location, name: str) -> tuple[pq.ParquetFile, NDArray[np.int64]]:
    """A file to read row groups of, and int64 [groups + 1]: first row of each group, then the row count."""
    parquet = pq.ParquetFile(f"{location.path}/{name}", filesystem=location.fs, pre_buffer=True)
    lengths = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    return parquet, np.cumsum([0, *lengths], dtype=np.int64)


@lru_cache(maxsize=4)
def _file(uri: str, version: int) -> _File:
    parquet, edges = open_parquet(Location.parse(uri), CLIPS)
    notes = parquet.metadata.metadata or {}
    return _File(
        parquet,
        edges,
        tuple(SourceShare(**share) for share in json.loads(notes.get(_SOURCES, b"[]"))),
        MediaLimits.model_validate_json(notes.get(_LIMITS, b"{}")),
    )

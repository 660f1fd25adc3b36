"""What a source lists, on storage for the tasks to read: the driver holds a few numbers per video."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from evatok.artifacts import Location
from evatok.video.index import open_parquet
from evatok.video.sources import Video

LISTING = "listing.parquet"
_AT_ONCE = 1024  # videos whose files are looked for together; rows of a row group
_GROUPS_AT_ONCE = 16
_REQUESTS = 64  # to a remote storage at once

SCHEMA = pa.schema(
    [
        ("key", pa.uint64()),  # of the name
        ("uri", pa.string()),
        ("bytes", pa.int64()),  # of the file; -1: missing
        ("modified", pa.int64()),  # nanoseconds
        ("draw", pa.float64()),  # the video's own random number, 0 to 1
        ("code", pa.string()),  # why it is rejected without being probed
        ("detail", pa.string()),
        ("name", pa.string()),
        ("part", pa.string()),  # of a mixture
        ("label", pa.string()),
        ("caption", pa.string()),
        ("split", pa.string()),
        ("motion", pa.list_(pa.float32())),
    ]
)
_OF_VIDEO = ("uri", "name", "part", "label", "caption", "split", "motion")


@dataclass(frozen=True)
class Listing:
    """The videos of a source, each name once, in the order of the source.

    `rows` int64 [n]: where each stands in the file. Of each video: `keys` uint64, `bytes` and `modified`
    int64 of its file, `draws` float64, `sound` bool: to be probed, `free` bool: without a split of its own.
    """

    location: Location
    version: int
    rows: NDArray[np.int64]
    keys: NDArray[np.uint64]
    bytes: NDArray[np.int64]
    modified: NDArray[np.int64]
    draws: NDArray[np.float64]
    sound: NDArray[np.bool_]
    free: NDArray[np.bool_]

    @classmethod
    def write(cls, videos: Iterable[Video], location: Location, seed: int) -> Listing:
        """Write what is listed into `location`, with the size and time of change of every file."""
        kept: list[pa.Table] = []
        with tempfile.TemporaryDirectory(prefix="evatok-listing-") as folder:
            path = Path(folder) / LISTING
            with pq.ParquetWriter(path, SCHEMA, write_statistics=False) as writer:
                for batch in _batches(iter(videos)):
                    table = _table(batch, seed)
                    writer.write_table(table)
                    kept.append(_numbers(table))
            location.write_file(LISTING, path)
        version = location.fs.get_file_info(f"{location.path}/{LISTING}").mtime_ns
        numbers = pa.concat_tables([_numbers(SCHEMA.empty_table()), *kept])
        rows = np.sort(np.unique(numbers["key"].to_numpy(), return_index=True)[1])
        return cls(location, version, rows, *(column.to_numpy()[rows] for column in numbers.columns))

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self) -> Iterator[tuple[slice, pa.Table]]:
        """Some videos at a time: which ones, and their rows."""
        file, _ = _opened(self.location.uri, self.version)
        first = 0
        for low in range(0, file.num_row_groups, _GROUPS_AT_ONCE):
            table = file.read_row_groups(list(range(low, min(low + _GROUPS_AT_ONCE, file.num_row_groups))))
            start, stop = np.searchsorted(self.rows, [first, first + table.num_rows])
            yield slice(start, stop), table.take(pa.array(self.rows[start:stop] - first))
            first += table.num_rows


def read_rows(location: Location, version: int, rows: NDArray[np.int64]) -> list[dict[str, Any]]:
    """In a task: key, uri, part, bytes and modified at these ascending rows of a listing."""
    file, edges = _opened(location.uri, version)
    groups = np.searchsorted(edges, rows, side="right") - 1
    found: list[dict[str, Any]] = []
    for group in np.unique(groups):
        table = file.read_row_group(int(group), columns=["key", "uri", "part", "bytes", "modified"])
        found += table.take(pa.array(rows[groups == group] - edges[group])).to_pylist()
    return found


@lru_cache(maxsize=2)
def _opened(uri: str, version: int) -> tuple[pq.ParquetFile, NDArray[np.int64]]:
    """The file, and the first row of each row group."""
    return open_parquet(Location.parse(uri), LISTING)


def _numbers(table: pa.Table) -> pa.Table:
    """What the driver keeps, in the order of `Listing`."""
    return (
        table.select(["key", "bytes", "modified", "draw"])
        .append_column("sound", table["code"].is_null())
        .append_column("free", table["split"].is_null())
    )


def _table(videos: list[Video], seed: int) -> pa.Table:
    columns = {name: [getattr(video, name) for video in videos] for name in _OF_VIDEO}
    columns["key"] = [_hashed(video.name) for video in videos]
    columns["draw"] = [_hashed(f"{seed}/{video.name}") / 2**64 for video in videos]
    columns["bytes"], columns["modified"] = _file_states(videos)
    problems = [_problem(video, size) for video, size in zip(videos, columns["bytes"])]
    columns["code"] = [code for code, _ in problems]
    columns["detail"] = [detail and f"{v.uri}: {detail}" for v, (_, detail) in zip(videos, problems)]
    return pa.table(columns, schema=SCHEMA)


def _problem(video: Video, size: int) -> tuple[str | None, str | None]:
    if video.problem:
        return video.problem
    if size < 0:
        return "missing", "no such file"
    return (None, None) if size else ("empty", "zero bytes")


def _file_states(videos: list[Video]) -> tuple[list[int], list[int]]:
    """Size and time of change of every file; the storage is asked only where the source did not say."""
    sizes = [-1 if video.state is None else video.state[0] for video in videos]
    changes = [-1 if video.state is None else video.state[1] for video in videos]
    sought = [k for k, video in enumerate(videos) if video.problem is None and video.state is None]
    if sought:
        # These videos are of one source and live on one file system.
        places = [Location.parse(videos[k].uri) for k in sought]
        for k, info in zip(sought, _file_infos(places[0], [place.path for place in places])):
            if info.type == pafs.FileType.File:
                sizes[k], changes[k] = info.size, info.mtime_ns
    return sizes, changes


def _file_infos(anywhere: Location, paths: list[str]) -> list[pafs.FileInfo]:
    """In the order of `paths`. A remote storage takes a request for each, so many are asked at once."""
    if anywhere.local() is not None:
        return list(anywhere.fs.get_file_info(paths))
    each = -(-len(paths) // _REQUESTS)
    slices = [paths[low : low + each] for low in range(0, len(paths), each)]
    with ThreadPoolExecutor(len(slices)) as pool:
        return [info for infos in pool.map(anywhere.fs.get_file_info, slices) for info in infos]


def _hashed(text: str) -> int:
    """64 bits that are the text's own: a video's split outlives other videos."""
    digest = hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _batches(videos: Iterator[Video]) -> Iterator[list[Video]]:
    for _, part in groupby(videos, key=lambda video: video.part):
        while batch := list(islice(part, _AT_ONCE)):
            yield batch

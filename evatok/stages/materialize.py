"""Decode every clip of an index once, for data sets that fit on the storage."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
from numpy.typing import NDArray

from evatok.artifacts import Location
from evatok.video.decode import ClipFormat, DecodeError, MediaLimits, decode_clip
from evatok.video.guard import Guard
from evatok.video.index import PREPARED, ClipIndex
from evatok.video.prepared import CLIPS_PER_FILE, LAYOUT, PreparedClips, file_name, write_prepared

if TYPE_CHECKING:
    from collections.abc import Callable

    from evatok.distributed.fanout import Progress, ShardOutput

_RECORDS = "prepared-records"


def materialize(
    location: Location,
    frames: int,
    size: int,
    limits: MediaLimits,
    on_progress: Callable[[Progress], None] | None = None,
    label_selector: dict[str, str] | None = None,
) -> int:
    """Prepare the clips of the index in `location` at `size` pixels; needs a connected Ray.

    Files in this format that are there and whole are kept. `label_selector`: labels of the nodes that may
    decode. Returns how many clips could not be decoded.
    """
    from evatok.distributed.fanout import fan_out
    from evatok.distributed.schedule import Shard

    index = ClipIndex.open(location)
    there = PreparedClips.open(location / PREPARED)
    if there is not None and not there.serve(ClipFormat(frames=frames, size=size)):
        # The records first: they must never outlive the files they vouch for.
        location.delete(_RECORDS)
        location.delete(PREPARED)
    key = f"{LAYOUT}-{index.version}-{frames}-{size}"
    _forget_missing(location, key)
    spec = (index, ClipFormat(frames=frames, size=size), limits)
    shards = [
        Shard(_record_name(first), min(CLIPS_PER_FILE, len(index) - first), (*spec, first))
        for first in range(0, len(index), CLIPS_PER_FILE)
    ]
    done = fan_out(
        shards,
        _prepare,
        location / _RECORDS,
        key=key,
        state=functools.partial(Guard, limits.time_limit),
        label_selector=label_selector,
        on_progress=on_progress,
    )
    PreparedClips(location / PREPARED, frames, size).finish()
    return len(done.rejected)


def _forget_missing(location: Location, key: str) -> None:
    """Remove the records of files that are not there with the size they were written with."""
    from evatok.distributed.fanout import whole_shards

    selector = pafs.FileSelector((location / PREPARED).path, allow_not_found=True)
    sizes = {info.base_name: info.size for info in location.fs.get_file_info(selector)}
    for record in whole_shards(location / _RECORDS, key):
        first = record["row"][0].as_py()
        if sizes.get(file_name(first)) != record["bytes"][0].as_py():
            location.delete(f"{_RECORDS}/{_record_name(first)}")


def _record_name(first: int) -> str:
    return f"{first:010d}.parquet"


def _prepare(spec: tuple[ClipIndex, ClipFormat, MediaLimits, int], guard: Guard) -> ShardOutput:
    from evatok.distributed.fanout import ShardOutput

    index, clip_format, limits, first = spec
    rows = np.arange(first, min(first + CLIPS_PER_FILE, len(index)))
    clips: list[NDArray[np.uint8] | None] = []
    rejected = []
    for clip in index.take(rows).to_pylist():
        try:
            clips.append(guard(decode_clip, clip["uri"], clip["start"], clip_format.of(clip), None, limits))
        except DecodeError as error:
            clips.append(None)
            rejected.append({"uri": clip["uri"], "code": error.code, "detail": error.detail})
    size = write_prepared(index.location / PREPARED, first, clips)
    return ShardOutput(pa.table({"row": rows, "bytes": np.full(len(rows), size)}), rejected)

"""Index: every video of a source is probed once; what can be used is cut into clips, the rest is named."""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import groupby, islice
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
from numpy.typing import NDArray
from pydantic import Field

from evatok.artifacts import Location
from evatok.config import OPERATIONAL, Config, identity
from evatok.errors import UserError
from evatok.stages.materialize import materialize
from evatok.stages.stage import Stage, StageContext
from evatok.video.decode import ClipFormat, DecodeError, MediaLimits, probe
from evatok.video.guard import Guard
from evatok.video.index import CLIPS, REJECTED, REJECTED_SCHEMA, SCHEMA, SourceShare, clip_starts, write_index
from evatok.video.sources import AnySource, MixtureSource, Video
from evatok.video.synthetic import BLOCK

if TYPE_CHECKING:
    from evatok.distributed.fanout import ShardOutput

PROBED = "probed.parquet"  # what is known of every file, so that only new and changed ones are probed again
VERSION = 1
_PROBES = "probes"
_KEY = b"evatok-index"
_LISTED_AT_ONCE = 1024
_VIDEOS_PER_TASK = 128

_LISTED = pa.schema(
    [
        ("name", pa.string()),
        ("uri", pa.string()),
        ("part", pa.string()),  # of a mixture
        ("label", pa.string()),
        ("caption", pa.string()),
        ("split", pa.string()),
        ("motion", pa.list_(pa.float32())),
        ("bytes", pa.int64()),  # of the file; null: missing
        ("modified", pa.int64()),  # nanoseconds
        ("code", pa.string()),  # why it is rejected without being probed
        ("detail", pa.string()),
        ("draw", pa.float64()),  # the video's own random number, 0 to 1
    ]
)
_PROBED = pa.schema(
    [
        ("name", pa.string()),
        ("bytes", pa.int64()),
        ("modified", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("starts", pa.list_(pa.float64())),  # of its clips, seconds
        ("code", pa.string()),  # null: usable
        ("detail", pa.string()),
    ]
)


_OF_VIDEO = ("name", "uri", "part", "label", "caption", "split", "motion")


class IndexConfig(Config):
    """Which videos, and how they are cut into clips."""

    source: AnySource
    frames: int = Field(default=16, gt=0, description="frames per clip")
    fps: float = Field(default=0.0, ge=0, description="sampling rate; 0 takes every frame (WebVid: 3)")
    stride: int = Field(default=16, gt=0, description="sampled frames from the start of a clip to the next")
    clips_per_video: int | None = Field(default=None, gt=0, description="at most so many; none: all")
    test_fraction: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="share of videos held out where the source has no split of its own",
    )
    limits: MediaLimits = MediaLimits()
    materialize: Annotated[int, OPERATIONAL] = Field(
        default=0,
        ge=0,
        description="decode every clip once at so many pixels and keep it; 0: decode each time",
    )
    videos_per_task: Annotated[int, OPERATIONAL] = Field(default=_VIDEOS_PER_TASK, gt=0)


Report = Callable[[int, int], None]


def build_index(
    config: IndexConfig, location: Location, seed: int, on_progress: Report | None = None
) -> dict[str, Any]:
    """Write the index of `config.source` into `location`; needs a connected Ray.

    Run again in the same place it probes new and changed files only (by size and time of change).
    `on_progress` is told the videos probed and all that are to be. Returns the headline counts. Raises
    UserError when the source has no usable video.
    """
    listed = _listed(config, location, seed)
    known = _known(config, location)
    place = _place_in(known, listed)
    todo = np.flatnonzero((place < 0) & listed["code"].is_null().to_numpy(zero_copy_only=False))
    fresh = _probed(config, location, listed.take(pa.array(todo)), on_progress)
    place[todo] = known.num_rows + np.arange(len(todo))
    videos = pa.concat_tables([known, fresh]).take(pa.array(place, mask=place < 0))
    for column in ("name", "bytes", "modified"):
        videos = videos.set_column(videos.schema.get_field_index(column), column, listed[column])
    code = pc.coalesce(listed["code"], videos["code"])
    detail = pc.coalesce(listed["detail"], videos["detail"])
    rejected = pa.table([listed["uri"], code, detail], REJECTED_SCHEMA).filter(pc.is_valid(code))
    usable = pc.is_null(code)
    clips = _clips(config, listed.filter(usable), videos.filter(usable))
    if not clips.num_rows:
        raise UserError(_nothing_usable(config, rejected))
    write_index(location, clips, rejected, _shares(config, listed.filter(usable), videos.filter(usable)))
    location.write_table(PROBED, videos.replace_schema_metadata({_KEY: _key(config)}))
    location.delete(_PROBES)
    splits = Counter(clips["split"].to_pylist())
    return {
        "videos": len(clips["uri"].unique()),
        "clips": clips.num_rows,
        "train_clips": splits["train"],
        "test_clips": splits["test"],
        "rejected": rejected.num_rows,
        "rejected_by_code": dict(sorted(Counter(rejected["code"].to_pylist()).items())),
        "probed": len(todo),
    }


def _listed(config: IndexConfig, location: Location, seed: int) -> pa.Table:
    """Every video that the source names, once, with its file's size and time of change."""
    tables = []
    for videos in _batches(config.source.videos(location), _LISTED_AT_ONCE):
        columns = {name: [getattr(video, name) for video in videos] for name in _OF_VIDEO}
        columns["bytes"], columns["modified"] = _file_states(videos)
        columns["draw"] = [_draw(seed, video.name) for video in videos]
        problems = [_problem(video, size) for video, size in zip(videos, columns["bytes"])]
        columns["code"] = [code for code, _ in problems]
        columns["detail"] = [detail and f"{v.uri}: {detail}" for v, (_, detail) in zip(videos, problems)]
        tables.append(pa.table(columns, schema=_LISTED))
    listed = pa.concat_tables(tables).combine_chunks() if tables else _LISTED.empty_table()
    first = pc.index_in(listed["name"], value_set=listed["name"])
    return listed.filter(pc.equal(first, pa.array(np.arange(listed.num_rows, dtype=np.int32))))


def _problem(video: Video, size: int | None) -> tuple[str | None, str | None]:
    if video.problem:
        return video.problem
    if size is None:
        return "missing", "no such file"
    return (None, None) if size else ("empty", "zero bytes")


def _file_states(videos: list[Video]) -> tuple[list[int | None], list[int | None]]:
    sizes: list[int | None] = [None] * len(videos)
    changes: list[int | None] = [None] * len(videos)
    sought = [k for k, video in enumerate(videos) if video.problem is None]
    if sought:
        # These videos are of one source and live on one file system.
        places = [Location.parse(videos[k].uri) for k in sought]
        infos = places[0].fs.get_file_info([place.path for place in places])
        for k, info in zip(sought, infos):
            if info.type == pafs.FileType.File:
                sizes[k], changes[k] = info.size, info.mtime_ns
    return sizes, changes


def _draw(seed: int, name: str) -> float:
    """A number from 0 to 1 that is the video's own: its split outlives other videos."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _known(config: IndexConfig, location: Location) -> pa.Table:
    """What an earlier index in this place found, if it was made with the same settings."""
    if not location.exists(PROBED):
        return _PROBED.empty_table()
    table = location.read_table(PROBED)
    if (table.schema.metadata or {}).get(_KEY) != _key(config).encode():
        return _PROBED.empty_table()
    # A video that ran out of time may have met a busy machine.
    return table.select(_PROBED.names).filter(
        pc.or_kleene(pc.is_valid(table["starts"]), pc.not_equal(table["code"], "timeout"))
    )


def _place_in(known: pa.Table, listed: pa.Table) -> NDArray[np.int64]:
    """Row of `known` for each listed video whose file is unchanged, else -1."""
    place: NDArray[np.int64] = (
        pc.fill_null(pc.index_in(listed["name"], value_set=known["name"]), -1).to_numpy().astype(np.int64)
    )
    found = np.flatnonzero(place >= 0)
    before = known.take(pa.array(place[found]))
    now = listed.take(pa.array(found))
    same = pc.and_(pc.equal(before["bytes"], now["bytes"]), pc.equal(before["modified"], now["modified"]))
    place[found[~pc.fill_null(same, False).to_numpy(zero_copy_only=False)]] = -1
    return place


def _probed(config: IndexConfig, location: Location, todo: pa.Table, report: Report | None) -> pa.Table:
    """Probe these videos in tasks: one row each, in their order."""
    from evatok.distributed.fanout import fan_out
    from evatok.distributed.schedule import Shard, shard_ranges

    if not todo.num_rows:
        return _PROBED.empty_table()
    names, uris = todo["name"].to_pylist(), todo["uri"].to_pylist()
    size = max(1, min(config.videos_per_task, todo.num_rows // 8))
    shards = [
        Shard(f"{low:09d}.parquet", high - low, (config, names[low:high], uris[low:high]))
        for low, high in shard_ranges(todo.num_rows, size)
    ]
    state = hashlib.sha256(_key(config).encode())
    for column in ("name", "bytes", "modified"):
        state.update(json.dumps(todo[column].to_pylist()).encode())
    fan_out(
        shards,
        _probe_shard,
        location / _PROBES,
        key=state.hexdigest(),
        state=functools.partial(Guard, config.limits.time_limit),
        on_progress=(lambda progress: report(progress.items, progress.total)) if report else None,
    )
    return location.read_table(_PROBES).select(_PROBED.names)


def _probe_shard(spec: tuple[IndexConfig, list[str], list[str]], guard: Guard) -> ShardOutput:
    from evatok.distributed.fanout import ShardOutput

    config, names, uris = spec
    found = [_probe_video(config, name, uri, guard) for name, uri in zip(names, uris)]
    return ShardOutput(pa.Table.from_pylist(found, _PROBED))


def _probe_video(config: IndexConfig, name: str, uri: str, guard: Guard) -> dict[str, Any]:
    try:
        info = guard(probe, uri, config.limits)
    except DecodeError as error:
        return {"name": name, "code": error.code, "detail": error.detail}
    cut = ClipFormat(frames=config.frames, fps=config.fps)
    starts = clip_starts(info, cut, config.stride, config.clips_per_video)
    if not starts:
        seconds = info.end - float(info.times[0])
        return {
            "name": name,
            "code": "too_short",
            "detail": f"{uri}: {len(info.times)} frames, {seconds:.2f} s",
        }
    return {"name": name, "width": info.width, "height": info.height, "starts": starts}


def _clips(config: IndexConfig, listed: pa.Table, videos: pa.Table) -> pa.Table:
    """A row for each start of each video."""
    starts = videos["starts"].combine_chunks()
    starts = starts.chunk(0) if isinstance(starts, pa.ChunkedArray) else starts
    counts = pc.list_value_length(starts).to_numpy(zero_copy_only=False)
    owner = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    of_clip = listed.take(pa.array(owner))
    shapes = videos.select(["width", "height"]).take(pa.array(owner))
    digits = pc.utf8_lpad(pa.array(number).cast(pa.string()), 5, "0")
    columns = {
        "clip_id": pc.binary_join_element_wise(of_clip["name"], digits, "#"),
        "uri": of_clip["uri"],
        "start": pc.list_flatten(starts),
        "fps": np.full(len(owner), config.fps, np.float32),
        "frames": np.full(len(owner), config.frames, np.int32),
        "width": shapes["width"],
        "height": shapes["height"],
        "label": of_clip["label"],
        "caption": of_clip["caption"],
        "split": _splits(config, listed).take(pa.array(owner)),
        "motion": _motion(config, listed["motion"], owner, number),
    }
    return pa.table(columns, schema=SCHEMA)


def _shares(config: IndexConfig, listed: pa.Table, videos: pa.Table) -> list[SourceShare]:
    """How many clips each part of a mixture has, in the order of the rows."""
    if not isinstance(config.source, MixtureSource):
        return []
    counts = pc.list_value_length(videos["starts"])
    return [
        SourceShare(
            name, int(pc.sum(counts.filter(pc.equal(listed["part"], name))).as_py() or 0), part.weight
        )
        for name, part in config.source.parts.items()
    ]


def _splits(config: IndexConfig, listed: pa.Table) -> pa.ChunkedArray:
    """The source's own split of each video, else a drawn one that leaves neither side empty."""
    draws = listed["draw"].to_numpy()
    test = draws < config.test_fraction
    free = np.flatnonzero(listed["split"].is_null().to_numpy())
    if len(free) > 1 and 0 < config.test_fraction < 1:
        test[free[np.argmin(draws[free])]] = True
        test[free[np.argmax(draws[free])]] = False
    return pc.coalesce(listed["split"], pa.array(np.where(test, "test", "train")))


def _motion(
    config: IndexConfig, motion: pa.ChunkedArray, owner: NDArray[np.int64], number: NDArray[np.int64]
) -> pa.Array:
    kind = SCHEMA.field("motion").type
    if motion.null_count == len(motion) or config.fps or config.stride % BLOCK or config.frames % BLOCK:
        return pa.nulls(len(owner), kind)
    known = motion.to_pylist()
    blocks, step = config.frames // BLOCK, config.stride // BLOCK
    cut = [known[video][k * step : k * step + blocks] for video, k in zip(owner, number)]
    return pa.array(cut, kind)


def _nothing_usable(config: IndexConfig, rejected: pa.Table) -> str:
    where = getattr(config.source, "path", config.source.kind)
    counts = Counter(rejected["code"].to_pylist())
    reasons = ", ".join(f"{count} {code}" for code, count in counts.most_common())
    first = rejected["detail"][0].as_py() if rejected.num_rows else "nothing was listed"
    return (
        f"{where}: none of its {rejected.num_rows} files is a video of {config.frames} frames ({reasons}).\n"
        f"The first: {first}"
    )


def _key(config: IndexConfig) -> str:
    """Identifies the settings that a probe's result depends on."""
    plain = identity(config)
    cut = {name: plain[name] for name in ("frames", "fps", "stride", "clips_per_video", "limits")}
    return hashlib.sha256(json.dumps([VERSION, cut], sort_keys=True).encode()).hexdigest()


def _batches(videos: Iterator[Video], size: int) -> Iterator[list[Video]]:
    for _, part in groupby(videos, key=lambda video: video.part):
        while batch := list(islice(part, size)):
            yield batch


def run(context: StageContext) -> dict[str, Any]:
    """The stage: see `build_index` and `materialize`."""
    config, location = context.config, context.location
    counts = build_index(
        config, location, context.seed, lambda done, total: context.progress(done, total, "videos")
    )
    if config.materialize:
        counts["undecodable"] = materialize(
            location,
            config.frames,
            config.materialize,
            config.limits,
            lambda done, total: context.progress(done, total, "clips"),
        )
    return counts


STAGE = Stage(
    name="index",
    config=IndexConfig,
    run=run,
    outputs=(CLIPS, REJECTED, PROBED),
    version=VERSION,
)

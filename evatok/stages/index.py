"""Index: every video of a source is probed once; what can be used is cut into clips, the rest is named."""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field, model_validator

from evatok.artifacts import Location
from evatok.config import OPERATIONAL, Config, identity
from evatok.errors import UserError
from evatok.stages.fanning import follow
from evatok.stages.listing import LISTING, Listing, read_rows
from evatok.stages.materialize import materialize
from evatok.stages.stage import Stage, StageContext
from evatok.video.decode import STORAGE_PATIENCE, ClipFormat, DecodeError, MediaLimits, StorageError, probe
from evatok.video.guard import Guard
from evatok.video.index import CLIPS, REJECTED, REJECTED_SCHEMA, SCHEMA, IndexWriter, SourceShare, clip_starts
from evatok.video.sources import AnySource, MixtureSource
from evatok.video.sources.mixture import image_parts
from evatok.video.synthetic import BLOCK

if TYPE_CHECKING:
    from evatok.distributed.fanout import Progress, ShardOutput

PROBED = "probed.parquet"  # what is known of every file, so that only new and changed ones are probed again
VERSION = 1
_PROBES = "probes"
_PROBING = 3  # raise it when rows of probes change their meaning
_KEY = b"evatok-index"
_VIDEOS_PER_TASK = 128

# What may be mended without a change of the file: it is probed again in every index.
_PASSING = ("timeout", "missing", "storage")

_PROBED = pa.schema(
    [
        ("key", pa.uint64()),  # of the video's name
        ("bytes", pa.int64()),
        ("modified", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("starts", pa.list_(pa.float64())),  # of its clips, seconds
        ("code", pa.string()),  # null: usable
        ("detail", pa.large_string()),
    ]
)


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

    @model_validator(mode="after")
    def _images_are_held(self) -> IndexConfig:
        if self.frames == 1 and (images := image_parts(self.source)):
            raise ValueError(
                f"parts {images} of the source are of images, and with frames 1 every clip is one: leave"
                " their `images` out"
            )
        return self


Report = Callable[["Progress"], None]


def build_index(
    config: IndexConfig,
    location: Location,
    seed: int,
    on_progress: Report | None = None,
    label_selector: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Write the index of `config.source` into `location`; needs a connected Ray.

    Run again in the same place it probes new and changed files only (by size and time of change), also where
    the earlier run was killed. `on_progress` is told of the probing, in videos. `label_selector`: labels of
    the nodes that may probe. Returns the headline counts. Raises UserError when the source has no usable
    video.
    """
    listing = Listing.write(config.source.videos(location, config.limits), location, seed)
    known = _known(config, location)
    place = _place_in(known, listing)
    todo = np.flatnonzero((place < 0) & listing.sound)
    fresh = _probed(config, listing, todo, on_progress, label_selector)
    place[todo] = known.num_rows + np.arange(len(todo))
    videos = _contiguous(known, fresh)
    del known, fresh
    counts = _write(config, location, listing, videos, place)
    location.delete(_PROBES)
    location.delete(LISTING)
    return {**counts, "probed": len(todo)}


def _write(
    config: IndexConfig, location: Location, listing: Listing, videos: pa.Table, place: NDArray[np.int64]
) -> dict[str, Any]:
    """Publish the index and what is known of every file, some videos at a time; returns the counts.

    `videos`: rows of probes; `place`: the row of each listed video, -1 without one.
    """
    splits: Counter[str] = Counter()
    codes: Counter[str] = Counter()
    shares: Counter[str] = Counter()
    usable_videos = 0
    first = ""
    test = _drawn_for_test(config, listing, videos, place)
    with (
        tempfile.TemporaryDirectory(prefix="evatok-probed-") as folder,
        IndexWriter(location, config.limits) as index,
    ):
        path = Path(folder) / PROBED
        schema = _PROBED.with_metadata({_KEY: _key(config)})
        with pq.ParquetWriter(path, schema, write_statistics=False) as probed:
            for these, listed in listing.batches():
                at = place[these]
                found = videos.take(pa.array(at, mask=at < 0))
                probed.write_table(found.filter(pa.array(at >= 0)).cast(schema))
                code = pc.coalesce(listed["code"], found["code"])
                detail = pc.coalesce(listed["detail"], found["detail"].cast(pa.string()))
                rejected = pa.table([listed["uri"], code, detail], REJECTED_SCHEMA).filter(pc.is_valid(code))
                index.reject(rejected)
                codes.update(_counted(rejected["code"]))
                first = first or next(iter(rejected["detail"].slice(0, 1).to_pylist()), "")
                usable = pc.is_null(code)
                listed, found = listed.filter(usable), found.filter(usable)
                split = pc.coalesce(
                    listed["split"],
                    pa.array(np.where(test[these], "test", "train")).filter(usable.combine_chunks()),
                )
                clips = _clips(config, listed, found, split)
                index.write(clips)
                usable_videos += listed.num_rows
                splits.update(_counted(clips["split"]))
                clips_of = pa.table({"part": listed["part"], "clips": pc.list_value_length(found["starts"])})
                for part in clips_of.group_by("part").aggregate([("clips", "sum")]).to_pylist():
                    shares[part["part"]] += part["clips_sum"]
        if not usable_videos:
            raise UserError(_nothing_usable(config, codes, first))
        if isinstance(config.source, MixtureSource):
            index.shares = [
                SourceShare(name, shares[name], part.weight, part.images)
                for name, part in config.source.parts.items()
            ]
        location.write_file(PROBED, path)
    return {
        "videos": usable_videos,
        "clips": splits.total(),
        "train_clips": splits["train"],
        "test_clips": splits["test"],
        "rejected": codes.total(),
        "rejected_by_code": dict(sorted(codes.items())),
    }


def _counted(column: pa.ChunkedArray) -> dict[str, int]:
    return {entry["values"]: entry["counts"] for entry in pc.value_counts(column).to_pylist()}


def _known(config: IndexConfig, location: Location) -> pa.Table:
    """What earlier indexes in this place found with the same settings, whether they were finished or not."""
    from evatok.distributed.fanout import whole_shards

    key, tables = _key(config), [_PROBED.empty_table()]
    if location.exists(PROBED):
        table = location.read_table(PROBED)
        if (table.schema.metadata or {}).get(_KEY) == key.encode():
            tables.append(table.replace_schema_metadata())
    for attempt in location.list(_PROBES):
        tables += whole_shards(location / _PROBES / attempt, key)
    known = pa.concat_tables(tables)
    return known.filter(pc.invert(pc.is_in(known["code"], pa.array(_PASSING))))


def _place_in(known: pa.Table, listing: Listing) -> NDArray[np.int64]:
    """Row of `known` for each listed video whose file is unchanged, else -1."""
    keys = known["key"].to_numpy()
    order, sought = np.argsort(keys, kind="stable"), np.argsort(listing.keys)
    # Searching in order spares the processor's cache. The last row of a key is the latest.
    at = np.empty(len(listing), np.int64)
    at[sought] = np.searchsorted(keys[order], listing.keys[sought], side="right") - 1
    place = np.where(at >= 0, order[at] if len(order) else -1, -1)
    for name, now in (("key", listing.keys), ("bytes", listing.bytes), ("modified", listing.modified)):
        if len(order):
            place[known[name].to_numpy()[place] != now] = -1
    return place


def _contiguous(*tables: pa.Table) -> pa.Table:
    """The rows of all tables in one piece, so that any of them are taken without looking at the others."""
    whole = pa.concat_tables(tables)
    return pa.table({name: whole[name].combine_chunks() for name in whole.column_names}, schema=_PROBED)


def _probed(
    config: IndexConfig,
    listing: Listing,
    todo: NDArray[np.int64],
    report: Report | None,
    label_selector: dict[str, str] | None,
) -> pa.Table:
    """Probe these videos of the listing in tasks: one row each, in their order."""
    from evatok.distributed.fanout import fan_out, whole_shards
    from evatok.distributed.schedule import Shard, shard_ranges

    if not len(todo):
        return _PROBED.empty_table()
    size = max(1, min(config.videos_per_task, len(todo) // 8))
    rows, where = listing.rows[todo], (listing.location, listing.version)
    shards = [
        Shard(f"{low:09d}.parquet", high - low, (config, *where, rows[low:high]))
        for low, high in shard_ranges(len(todo), size)
    ]
    # Another set of videos has another folder: shards of the earlier one stay, and are known next time.
    attempt = hashlib.sha256(_key(config).encode())
    for column in (listing.keys, listing.bytes, listing.modified):
        attempt.update(column[todo].tobytes())
    target = listing.location / _PROBES / attempt.hexdigest()[:16]
    fan_out(
        shards,
        _probe_shard,
        target,
        key=_key(config),
        state=functools.partial(Guard, config.limits.time_limit),
        label_selector=label_selector,
        on_progress=report,
    )
    return pa.concat_tables(whole_shards(target, _key(config)))


def _probe_shard(spec: tuple[IndexConfig, Location, int, NDArray[np.int64]], guard: Guard) -> ShardOutput:
    """Rejects a file that its storage keeps failing to deliver; raises StorageError if that is most files."""
    from evatok.distributed.fanout import ShardOutput

    config, location, version, rows = spec
    listed = read_rows(location, version, rows)
    found: list[dict[str, Any]] = [{} for _ in listed]
    sought = list(range(len(listed)))
    for pause in (0.0, *STORAGE_PATIENCE):
        time.sleep(pause)
        failed = []
        for k in sought:
            try:
                found[k] = _probe_video(config, listed[k]["uri"], listed[k]["part"], guard)
            except StorageError as error:
                failed.append(k)
                found[k] = {"code": "storage", "detail": str(error)}
                if 2 * len(failed) > len(listed):
                    raise
        if not (sought := failed):
            break
    table = pa.Table.from_pylist([{**video, **result} for video, result in zip(listed, found)], _PROBED)
    return ShardOutput(table)


def _probe_video(config: IndexConfig, uri: str, part: str, guard: Guard) -> dict[str, Any]:
    try:
        info = guard(probe, uri, config.limits)
    except DecodeError as error:
        return {"code": error.code, "detail": error.detail}
    if part in image_parts(config.source):
        return {"width": info.width, "height": info.height, "starts": [float(info.times[0])]}
    cut = ClipFormat(frames=config.frames, fps=config.fps)
    starts = clip_starts(info, cut, config.stride, config.clips_per_video)
    if not starts:
        seconds = info.end - float(info.times[0])
        return {"code": "too_short", "detail": f"{uri}: {len(info.times)} frames, {seconds:.2f} s"}
    return {"width": info.width, "height": info.height, "starts": starts}


def _clips(config: IndexConfig, listed: pa.Table, videos: pa.Table, split: pa.ChunkedArray) -> pa.Table:
    """A row for each start of each video."""
    starts = videos["starts"].combine_chunks()
    counts = pc.list_value_length(starts).to_numpy(zero_copy_only=False).astype(np.int64)
    owner = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    of_clip = listed.select(["name", "uri", "part", "label", "caption"]).take(pa.array(owner))
    shapes = videos.select(["width", "height"]).take(pa.array(owner))
    image = pc.is_in(of_clip["part"], pa.array(image_parts(config.source), pa.string()))
    digits = pc.utf8_lpad(pa.array(number).cast(pa.string()), 5, "0")
    columns = {
        "clip_id": pc.binary_join_element_wise(of_clip["name"], digits, "#"),
        "uri": of_clip["uri"],
        "start": pc.list_flatten(starts),
        "fps": np.where(image, 0, config.fps).astype(np.float32),
        "frames": np.where(image, 1, config.frames).astype(np.int32),
        "width": shapes["width"],
        "height": shapes["height"],
        "label": of_clip["label"],
        "caption": of_clip["caption"],
        "split": split.take(pa.array(owner)),
        "motion": _motion(config, listed["motion"], owner, number),
    }
    return pa.table(columns, schema=SCHEMA)


def _drawn_for_test(
    config: IndexConfig, listing: Listing, videos: pa.Table, place: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Which videos the draw holds out, where their source has no split; neither side is left empty."""
    test = listing.draws < config.test_fraction
    usable = np.append(videos["code"].is_null().to_numpy(), False)[place]  # -1 takes the last
    free = np.flatnonzero(listing.free & usable)
    if len(free) > 1 and 0 < config.test_fraction < 1:
        test[free[np.argmin(listing.draws[free])]] = True
        test[free[np.argmax(listing.draws[free])]] = False
    return test


def _motion(
    config: IndexConfig, motion: pa.ChunkedArray, owner: NDArray[np.int64], number: NDArray[np.int64]
) -> pa.Array:
    kind = SCHEMA.field("motion").type
    if motion.null_count == len(motion) or config.fps or config.stride % BLOCK or config.frames % BLOCK:
        return pa.nulls(len(owner), kind)
    known = motion.to_pylist()
    blocks, step = config.frames // BLOCK, config.stride // BLOCK
    cut = [
        None if (paces := known[video]) is None else paces[k * step : k * step + blocks]
        for video, k in zip(owner, number)
    ]
    return pa.array(cut, kind)


def _nothing_usable(config: IndexConfig, codes: Counter[str], first: str) -> str:
    where = getattr(config.source, "path", config.source.kind)
    reasons = ", ".join(f"{count} {code}" for code, count in codes.most_common())
    return (
        f"{where}: none of its {codes.total()} files is a video of {config.frames} frames ({reasons}).\n"
        f"The first: {first or 'nothing was listed'}"
    )


def _key(config: IndexConfig) -> str:
    """Identifies the settings that a probe's result depends on."""
    plain = identity(config)
    cut = {name: plain[name] for name in ("frames", "fps", "stride", "clips_per_video", "limits")}
    if images := image_parts(config.source):
        cut["images"] = images
    return hashlib.sha256(json.dumps([VERSION, _PROBING, cut], sort_keys=True).encode()).hexdigest()


def run(context: StageContext) -> dict[str, Any]:
    """The stage: see `build_index` and `materialize`."""
    config, location = context.config, context.location
    place = context.resources.groups.selector("decode")
    counts = build_index(config, location, context.seed, follow(context, "videos", lambda _: {}), place)
    if config.materialize:
        counts["undecodable"] = materialize(
            location,
            config.frames,
            config.materialize,
            config.limits,
            follow(context, "clips", lambda _: {}),
            place,
        )
    return counts


STAGE = Stage(
    name="index",
    config=IndexConfig,
    run=run,
    outputs=(CLIPS, REJECTED, PROBED),
    version=VERSION,
)

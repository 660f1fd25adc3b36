"""The index stage: good clips in, bad files named, nothing probed twice, splits by video."""

from __future__ import annotations

import os
import shutil
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from evatok.artifacts import Location
from evatok.distributed.stream import ClipFetch
from evatok.errors import UserError
from evatok.experiment import read_experiment
from evatok.stages.curate import CurateClips
from evatok.stages.curate import draw as curate_draw
from evatok.stages.fanning import ClipReader
from evatok.stages.frechet import FrechetClips
from evatok.stages.frechet import draw as frechet_draw
from evatok.stages.index import (
    _KEY,
    _PROBED,
    PROBED,
    IndexConfig,
    _key,
    _known,
    _place_in,
    _probe_shard,
    _write,
    build_index,
    run,
)
from evatok.stages.listing import Listing
from evatok.stages.materialize import materialize
from evatok.stages.stage import LABEL, Groups, Resources
from evatok.stages.tokens import open_clips
from evatok.video.decode import ClipFormat, DecodeError, MediaLimits, StorageError, VideoInfo
from evatok.video.index import REJECTED_SCHEMA, SCHEMA, ClipIndex, IndexWriter, write_index
from evatok.video.order import ClipOrder
from evatok.video.sources import FolderSource, SyntheticSource, Video, WebVidSource
from evatok.video.synthetic import write_videos


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    write_videos(folder, 8, seed=0, blocks=8, size=32)
    (folder / "truth.json").unlink()
    return folder


def folder_index(path, **settings) -> IndexConfig:
    return IndexConfig(source=FolderSource(path=str(path)), **settings)


def test_good_and_broken_files_are_each_accounted_for_once(ray_cluster, videos, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(videos, folder)
    good = sorted(folder.glob("*.mp4"))
    (folder / "text.mp4").write_text("not a video " * 99)
    (folder / "empty.mp4").touch()
    (folder / "half.mp4").write_bytes(good[0].read_bytes()[:500])
    (folder / "deep").mkdir()
    good[1].rename(folder / "deep" / "moved.MP4")
    told = []
    location = Location.parse(tmp_path / "index")
    counts = build_index(folder_index(folder), location, seed=0, on_progress=told.append)
    assert counts["videos"] == 8
    assert counts["clips"] == 16 == counts["train_clips"] + counts["test_clips"]
    assert counts["rejected_by_code"] == {"empty": 1, "unreadable": 2}
    assert (told[-1].items, told[-1].total) == (10, 10)
    index = ClipIndex.open(location)
    clips = index.take(pc.indices_nonzero(pc.is_valid(index.column("uri"))).to_numpy().astype("int64"))
    assert len(set(clips["clip_id"].to_pylist())) == 16
    assert "deep/moved.MP4#00001" in clips["clip_id"].to_pylist()
    by_video = {}
    for uri, split in zip(clips["uri"].to_pylist(), clips["split"].to_pylist()):
        by_video.setdefault(uri, set()).add(split)
    assert all(len(splits) == 1 for splits in by_video.values())
    assert set.union(*by_video.values()) == {"train", "test"}
    rejected = location.read_table("rejected.parquet").to_pylist()
    assert sorted(os.path.basename(row["uri"]) for row in rejected) == ["empty.mp4", "half.mp4", "text.mp4"]
    assert all(row["uri"] in row["detail"] for row in rejected)
    assert not location.exists("shards")


def test_a_second_index_probes_new_and_changed_files_only(ray_cluster, videos, tmp_path):
    folder = tmp_path / "growing"
    shutil.copytree(videos, folder)
    location = Location.parse(tmp_path / "index")
    first = build_index(folder_index(folder), location, seed=0)
    before = location.read_table("clips.parquet").to_pylist()
    assert first["probed"] == 8
    assert build_index(folder_index(folder), location, seed=0)["probed"] == 0
    assert location.read_table("clips.parquet").to_pylist() == before
    names = sorted(file.name for file in folder.glob("*.mp4"))
    shutil.copy(folder / names[0], folder / "zz_new.mp4")
    shutil.copy(folder / names[1], folder / names[2])
    (folder / names[3]).unlink()
    third = build_index(folder_index(folder), location, seed=0)
    assert (third["probed"], third["videos"]) == (2, 8)
    # Who stays keeps its split.
    splits = {row["uri"]: row["split"] for row in before}
    for row in location.read_table("clips.parquet").to_pylist():
        if row["uri"] in splits and names[2] not in row["uri"]:
            assert row["split"] == splits[row["uri"]] or len(set(splits.values())) == 1
    # Another way to cut needs every file again; another share of test videos none.
    assert build_index(folder_index(folder, test_fraction=0.5), location, seed=0)["probed"] == 0
    assert build_index(folder_index(folder, stride=8), location, seed=0)["probed"] == 8


def test_an_index_that_was_killed_is_resumed_although_a_file_came_and_one_was_mended(
    ray_cluster, videos, tmp_path, monkeypatch
):
    from evatok.distributed.fanout import Job, make_shard

    folder = tmp_path / "growing"
    shutil.copytree(videos, folder)
    location = Location.parse(tmp_path / "index")
    names = sorted(file.name for file in folder.glob("*.mp4"))

    def direct(function, uri, *rest):
        if uri.endswith(names[0]):
            raise DecodeError("missing", f"{uri}: no permission")
        return function(uri, *rest)

    def killed(shards, work, target, *, key, **_):
        """The driver dies before the last shard; one file was not readable by us at that time."""
        for shard in shards[:-1]:
            make_shard(Job(work, None, target, key), direct, shard)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("evatok.distributed.fanout.fan_out", killed)
        with pytest.raises(KeyboardInterrupt):
            build_index(folder_index(folder), location, seed=0)
    shutil.copy(folder / names[0], folder / "aa_new.mp4")
    counts = build_index(folder_index(folder), location, seed=0)
    assert counts["videos"] == 9
    assert counts["probed"] == 3  # the last shard, the new file and the one without permission


def test_a_storage_that_fails_ends_the_task_and_rejects_nothing(tmp_path):
    listing, _, _ = many_videos(Location.parse(tmp_path), 3, 1)
    config = folder_index("/videos")

    def out_of_order(function, uri, *rest):
        raise StorageError(f"{uri}: 503 Slow Down")

    with pytest.raises(StorageError, match=r"\.mp4: 503"):
        _probe_shard((config, listing.location, listing.version, listing.rows), out_of_order)


def test_a_file_that_alone_cannot_be_delivered_is_rejected_and_probed_again_next_time(tmp_path, monkeypatch):
    monkeypatch.setattr("evatok.stages.index.STORAGE_PATIENCE", (0.0, 0.0))
    location = Location.parse(tmp_path)
    listing, _, _ = many_videos(location, 8, 1)
    config = folder_index("/videos")
    asked = Counter()

    def archived(function, uri, *rest):
        asked[uri] += 1
        if uri.endswith("3.mp4") or (uri.endswith("4.mp4") and asked[uri] == 1):
            raise StorageError(f"{uri}: 403 InvalidObjectState")
        return VideoInfo(64, 48, np.arange(16) / 8, "h264")

    spec = (config, listing.location, listing.version, listing.rows)
    found = _probe_shard(spec, archived).table
    assert [(k, code) for k, code in enumerate(found["code"].to_pylist()) if code] == [(3, "storage")]
    assert "InvalidObjectState" in found["detail"][3].as_py()
    location.write_table(PROBED, found.replace_schema_metadata({_KEY: _key(config)}))
    assert _known(config, location).num_rows == 7


def test_files_of_a_remote_storage_are_looked_for_at_once(tmp_path, monkeypatch):
    together = threading.Barrier(32)
    look = MemoryFileSystem.info

    def info(system, path, **options):
        together.wait(timeout=10)
        return look(system, path, **options)

    fsspec.filesystem("memory").pipe("/bucket/5.mp4", b"video")
    listed = [Video(f"{k}.mp4", f"memory://bucket/{k}.mp4") for k in range(32)]
    monkeypatch.setattr(MemoryFileSystem, "info", info)
    listing = Listing.write(listed, Location.parse(tmp_path), seed=0)
    assert listing.bytes.tolist() == [5 if k == 5 else -1 for k in range(32)]


def test_the_clips_of_many_videos_are_written_in_bounded_memory(tmp_path):
    """200,000 videos of 5 clips: a million rows cost the driver less than their size."""
    location = Location.parse(tmp_path)
    config = IndexConfig(source=FolderSource(path="/videos"), test_fraction=0.1)
    listing, videos, place = many_videos(location, 200_000, 5)
    before = pa.total_allocated_bytes()
    peaks = []
    write = IndexWriter.write

    def watched(self, clips):
        write(self, clips)
        peaks.append(pa.total_allocated_bytes() - before)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(IndexWriter, "write", watched)
        counts = _write(config, location, listing, videos, place)
    assert (counts["videos"], counts["clips"]) == (199_999, 999_995)
    assert max(peaks) < 64 << 20
    index = ClipIndex.open(location)
    rows = index.take(np.array([4, 5, 999_994]), ["clip_id", "uri", "start"]).to_pylist()
    assert [row["clip_id"] for row in rows] == [
        "0000001.mp4#00004",
        "0000002.mp4#00000",
        "0199999.mp4#00004",
    ]
    assert rows[2]["start"] == 4.0
    assert location.read_table("probed.parquet").num_rows == 200_000
    assert _place_in(_known(config, location), listing).min() >= -1


def many_videos(location, count, clips):
    """A listing of files that do not exist, and what probes of them found; the first is damaged."""
    listed = (
        Video(
            name := f"{k:07d}.mp4",
            f"s3://bucket-of-many/videos/{name}",
            caption="a dog " * 9,
            state=(k + 1, 7),
        )
        for k in range(count)
    )
    listing = Listing.write(listed, location, seed=0)
    starts = pa.ListArray.from_arrays(
        pa.array(np.arange(count + 1) * clips, pa.int32()), np.tile(np.arange(float(clips)), count)
    )
    damaged = pa.array(np.arange(count) == 0)
    columns = {
        "key": listing.keys,
        "bytes": listing.bytes,
        "modified": listing.modified,
        "width": np.full(count, 640, np.int32),
        "height": np.full(count, 360, np.int32),
        "starts": pc.if_else(damaged, None, starts),
        "code": pc.if_else(damaged, "unreadable", pa.scalar(None, pa.string())),
        "detail": pc.if_else(damaged, "damaged", pa.scalar(None, pa.large_string())),
    }
    return listing, pa.table(columns, schema=_PROBED), np.arange(count)


def test_synthetic_videos_bring_their_truth(ray_cluster, tmp_path):
    location = Location.parse(tmp_path)
    config = IndexConfig(source=SyntheticSource(count=6, blocks=8, size=32), stride=8)
    counts = build_index(config, location, seed=0)
    assert counts["clips"] == 6 * 3
    rows = location.read_table("clips.parquet").to_pylist()
    assert all(len(row["motion"]) == 4 for row in rows)
    assert rows[0]["motion"][2:] == rows[1]["motion"][:2]
    assert ClipIndex.open(location).labels() == ["drift", "orbit", "pan", "spin", "swarm", "zoom"]
    assert build_index(config, location, seed=0)["probed"] == 0


def test_a_folder_of_images_becomes_clips_of_one_frame(ray_cluster, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    random = np.random.default_rng(0)
    originals = {}
    for number, suffix in enumerate(("png", "jpg", "PNG", "jpeg", "webp")):
        blocks = random.integers(0, 255, (6, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        image = Image.fromarray(blocks)
        image.save(folder / f"{number}.{suffix}", quality=95)
        originals[f"{number}.{suffix}#00000"] = blocks
    experiment = read_experiment(Path(__file__).parents[2] / "experiments" / "image.yaml")
    config = experiment.index.model_copy(update={"source": FolderSource(path=str(folder))})
    location = Location.parse(tmp_path / "index")
    counts = build_index(config, location, seed=0)
    assert (counts["clips"], counts["rejected"]) == (5, 0)
    found, clips, rejected = ClipReader(ClipIndex.open(location)).read(
        np.arange(5), ClipFormat(frames=config.frames, size=48)
    )
    assert not rejected
    for entry, clip in zip(found, clips):
        assert clip.shape == (3, 1, 48, 48)
        difference = clip[:, 0].transpose(1, 2, 0).astype(int) - originals[entry["clip_id"]][:, 8:56]
        assert np.abs(difference).mean() < 25


def test_probing_and_preparing_run_where_the_resources_put_decoding(videos, tmp_path, monkeypatch):
    asked = []

    def fan_out(*_, label_selector, **options):
        asked.append(label_selector)
        return SimpleNamespace(rejected=[])

    monkeypatch.setattr("evatok.distributed.fanout.fan_out", fan_out)
    monkeypatch.setattr(
        "evatok.distributed.fanout.whole_shards",
        lambda target, key: [] if "prepared" in target.uri else [_PROBED.empty_table()],
    )
    monkeypatch.setattr("evatok.stages.index._write", lambda *_: {})
    monkeypatch.setattr("evatok.stages.index.follow", lambda *_: None)
    location = Location.parse(tmp_path)
    write_index(location, SCHEMA.empty_table(), REJECTED_SCHEMA.empty_table())
    context = SimpleNamespace(
        config=folder_index(videos, materialize=32),
        location=location,
        seed=0,
        resources=Resources(groups=Groups(decode="cpus")),
    )
    assert run(context)["undecodable"] == 0
    assert asked == [{LABEL: "cpus"}] * 2


def test_a_mixture_remembers_whose_turn_comes_how_often(ray_cluster, videos, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    shutil.copy(sorted(videos.glob("*.mp4"))[0], few)
    parts = {
        "many": {"source": {"kind": "folder", "path": str(videos)}, "weight": 1},
        "few": {"source": {"kind": "folder", "path": str(few)}, "weight": 3},
    }
    config = IndexConfig.model_validate({"source": {"kind": "mixture", "parts": parts}, "test_fraction": 0})
    counts = build_index(config, Location.parse(tmp_path / "index"), seed=0)
    assert counts["videos"] == 9
    index = ClipIndex.open(Location.parse(tmp_path / "index")).select(split="train")
    order = index.order(seed=1)
    assert (order.parts, order.weights) == ((16, 2), (1.0, 3.0))
    assert len(index.part("few")) == 2
    rows = index.take(order.rows(0, 1000))
    assert sum(name.startswith("few/") for name in rows["clip_id"].to_pylist()) == 750


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Five images, each of one brightness."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(5):
        Image.new("RGB", (48, 40), (40 * number,) * 3).save(folder / f"{number}.png")
    return folder


def videos_and(pictures: Path, videos: Path, **settings) -> IndexConfig:
    parts = {
        "films": {"source": {"kind": "folder", "path": str(videos)}, "weight": 2},
        "pictures": {"source": {"kind": "folder", "path": str(pictures)}, "images": True},
    }
    source = {"kind": "mixture", "parts": parts}
    return IndexConfig.model_validate({"source": source, "test_fraction": 0, "frames": 8, **settings})


def test_images_beside_videos_are_clips_of_one_frame_that_come_a_batch_at_a_time(
    ray_cluster, videos, pictures, tmp_path
):
    location = Location.parse(tmp_path / "index")
    counts = build_index(videos_and(pictures, videos, fps=6), location, seed=0)
    assert counts["rejected"] == 0
    index = ClipIndex.open(location).select(split="train")
    table = index.take(np.arange(len(index)))
    image = np.asarray([name.startswith("pictures/") for name in table["clip_id"].to_pylist()])
    assert image.sum() == 5
    assert table["frames"].to_numpy().tolist() == np.where(image, 1, 8).tolist()
    assert table["fps"].to_numpy().tolist() == np.where(image, 0, 6).tolist()
    assert len(index.without_images()) == (~image).sum()
    assert len(index.part("pictures").without_images()) == 0
    batches = image[index.order(seed=1, batch=6).rows(0, 6 * 999)].reshape(999, 6)
    assert (batches.all(1) == batches.any(1)).all()
    assert batches.mean() == pytest.approx(1 / 3, abs=0.01)
    alone = index.without_images().order(seed=1, batch=6)
    assert alone == ClipOrder(len(index.without_images()), 1)


def test_files_that_become_images_are_probed_again(ray_cluster, videos, pictures, tmp_path):
    location = Location.parse(tmp_path / "index")
    config = videos_and(pictures, videos)
    films = config.source.parts["films"]
    taken_for_videos = config.source.parts["pictures"].model_copy(update={"images": False})
    source = config.source.model_copy(update={"parts": {"films": films, "pictures": taken_for_videos}})
    counts = build_index(config.model_copy(update={"source": source}), location, seed=0)
    assert counts["rejected_by_code"] == {"too_short": 5}
    assert build_index(config, location, seed=0)["rejected"] == 0
    assert build_index(config, location, seed=0)["probed"] == 0


def test_images_that_have_no_videos_beside_them_are_refused():
    parts = {"pictures": {"source": {"kind": "folder", "path": "/nowhere"}, "images": True}}
    with pytest.raises(ValueError, match=r"set index\.frames 1"):
        IndexConfig.model_validate({"source": {"kind": "mixture", "parts": parts}})
    parts["films"] = {"source": {"kind": "folder", "path": "/nowhere"}}
    with pytest.raises(ValueError, match="leave their `images` out"):
        IndexConfig.model_validate({"source": {"kind": "mixture", "parts": parts}, "frames": 1})


def test_nothing_but_training_draws_images(ray_cluster, videos, pictures, tmp_path):
    location = Location.parse(tmp_path / "index")
    build_index(videos_and(pictures, videos, test_fraction=0.5), location, seed=0)
    index, drawn = ClipIndex.open(location), []
    assert set(index.part("pictures").column("split").to_pylist()) == {"train"}
    context = SimpleNamespace(seed=0, log=lambda line: None)
    drawn.append(curate_draw(index, CurateClips(train=100, test=100), context))
    drawn.append(frechet_draw(index, FrechetClips(split="train"), seed=0))
    experiment = SimpleNamespace(tokens=SimpleNamespace(part=None))
    generating = SimpleNamespace(inputs={"index": SimpleNamespace(location=location)}, experiment=experiment)
    drawn.append(open_clips(generating).selected)
    for rows in drawn:
        assert len(rows)
        assert set(index.take(rows)["frames"].to_pylist()) == {8}


@pytest.mark.parametrize("prepared", [False, True])
def test_an_image_is_held_for_the_whole_clip_and_replaced_by_an_image(
    ray_cluster, videos, pictures, tmp_path, prepared
):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    location = Location.parse(tmp_path / "index")
    build_index(videos_and(folder, videos), location, seed=0)
    if prepared:
        assert materialize(location, 8, 32, MediaLimits()) == 0
    else:
        (folder / "3.png").write_bytes(b"no image")
    index = ClipIndex.open(location)
    names = index.column("clip_id").to_pylist()
    rows = np.asarray([names.index(f"pictures/{number}.png#00000") for number in range(5)])
    found = ClipFetch(index, ClipFormat(frames=8, size=32), seed=0)(np.arange(5), rows)
    assert found["still"].all()
    grey = [0, 40, 80, 120 if prepared else 160, 160]
    assert found["replaced"].tolist() == [False, False, False, not prepared, False]
    for clip, brightness in zip(found["clip"], grey):
        np.testing.assert_allclose(clip, brightness, atol=2)
    film = ClipFetch(index, ClipFormat(frames=8, size=32), seed=0)(np.arange(1), np.zeros(1, np.int64))
    assert not film["replaced"][0]
    assert not film["still"].any()


def test_only_clips_of_videos_whose_truth_is_known_bring_it(ray_cluster, pictures, tmp_path):
    parts = {
        "made": {"source": {"kind": "synthetic", "count": 2, "size": 32}},
        "pictures": {"source": {"kind": "folder", "path": str(pictures)}, "images": True},
    }
    config = IndexConfig.model_validate({"source": {"kind": "mixture", "parts": parts}})
    build_index(config, Location.parse(tmp_path), seed=0)
    index = ClipIndex.open(Location.parse(tmp_path))
    for clip in index.take(np.arange(len(index))).to_pylist():
        assert (clip["motion"] is not None) == clip["clip_id"].startswith("made/")


def test_folders_without_a_usable_video_are_the_users_to_mend(ray_cluster, tmp_path):
    empty = tmp_path / "nothing"
    empty.mkdir()
    text = tmp_path / "texts"
    text.mkdir()
    for number in range(3):
        (text / f"{number}.mp4").write_text("renamed " * 50)
    for folder, says in (
        (empty, "no video file"),
        (text, "3 unreadable"),
        (tmp_path / "no", "no such folder"),
    ):
        with pytest.raises(UserError, match=says) as raised:
            build_index(folder_index(folder), Location.parse(tmp_path / "index"), seed=0)
        assert str(folder) in str(raised.value)


def test_thousands_of_rows_without_a_file_cost_no_probe(ray_cluster, videos, tmp_path):
    root = tmp_path / "webvid"
    (root / "videos" / "0001").mkdir(parents=True)
    good = sorted(videos.glob("*.mp4"))
    shutil.copy(good[0], root / "videos" / "0001" / "1.mp4")
    shutil.copy(good[1], root / "videos" / "2.mp4")
    lines = ["videoid,contentUrl,duration,page_dir,name", "1,u,PT1S,0001,one", "2,u,PT1S,,without a page"]
    lines += [f"{k},u,PT1S,0001,gone {k}" for k in range(100, 5100)]
    lines += ["../../../etc/passwd,u,PT1S,0001,evil", "7,u,PT1S,/etc,evil too", ",u,PT1S,0001,nameless"]
    (root / "list.csv").write_text("\n".join(lines))
    location = Location.parse(tmp_path / "index")
    source = WebVidSource(path=str(root), csv=str(root / "list.csv"))
    counts = build_index(IndexConfig(source=source), location, seed=0)
    assert (counts["videos"], counts["probed"]) == (2, 2)
    assert counts["rejected_by_code"] == {"missing": 5000, "outside": 3}
    captions = {row["caption"] for row in location.read_table("clips.parquet").to_pylist()}
    assert captions == {"one", "without a page"}

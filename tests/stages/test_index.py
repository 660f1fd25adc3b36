"""The index stage: good clips in, bad files named, nothing probed twice, splits by video."""

from __future__ import annotations

import os
import shutil

import pyarrow.compute as pc
import pytest

from evatok.artifacts import Location
from evatok.errors import UserError
from evatok.stages.index import IndexConfig, build_index
from evatok.video.index import ClipIndex
from evatok.video.sources import FolderSource, SyntheticSource, WebVidSource
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

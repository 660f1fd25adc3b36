"""Sources list what the data sets' own files say, with labels, captions and splits."""

from __future__ import annotations

import os

import pytest

from evatok.artifacts import Location
from evatok.errors import UserError
from evatok.video.sources import (
    FolderSource,
    KineticsSource,
    MixtureSource,
    SyntheticSource,
    Ucf101Source,
    WebVidSource,
)


@pytest.fixture
def workspace(tmp_path) -> Location:
    return Location.parse(tmp_path / "workspace")


def test_a_folder_is_listed_in_order_at_any_depth(tmp_path, workspace):
    for name in ("b/2.MOV", "a.mp4", "b/c/3.webm", "notes.txt", "b/1.gif", "b.png", "b-c/4.JPG"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    videos = list(FolderSource(path=str(tmp_path)).videos(workspace))
    names = ["a.mp4", "b-c/4.JPG", "b.png", "b/1.gif", "b/2.MOV", "b/c/3.webm"]
    assert [video.name for video in videos] == names == sorted(names)
    for video in videos:
        info = workspace.fs.get_file_info(video.uri)
        assert video.state == (info.size, info.mtime_ns)


def test_a_name_that_is_not_utf8_is_rejected_by_a_readable_one(tmp_path, workspace):
    for name in (b"a\xff.mp4", b"a\xfe.mp4", b"b.mp4"):
        (tmp_path / os.fsdecode(name)).touch()
    videos = list(FolderSource(path=str(tmp_path)).videos(workspace))
    assert [(video.name, bool(video.problem)) for video in videos] == [
        ("a\\xfe.mp4", True),
        ("a\\xff.mp4", True),
        ("b.mp4", False),
    ]


def test_a_part_of_a_mixture_whose_turn_would_never_come_is_refused():
    parts = {name: {"source": {"kind": "synthetic"}, "weight": w} for name, w in (("big", 3000), ("dust", 1))}
    with pytest.raises(ValueError, match="'dust' is below 1/1000"):
        MixtureSource.model_validate({"parts": parts})
    MixtureSource.model_validate({"parts": {**parts, "dust": {**parts["dust"], "weight": 3}}})


def test_links_that_lead_back_multiply_no_file(tmp_path, workspace):
    (tmp_path / "clips" / "deep").mkdir(parents=True)
    (tmp_path / "clips" / "deep" / "a.mp4").touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "b.mp4").touch()
    (tmp_path / "clips" / "deep" / "up").symlink_to(tmp_path / "clips")
    (tmp_path / "clips" / "other").symlink_to(elsewhere)
    (tmp_path / "clips" / "self.mp4").symlink_to("self.mp4")
    (tmp_path / "clips" / "z.mp4").symlink_to(elsewhere / "b.mp4")
    videos = list(FolderSource(path=str(tmp_path / "clips")).videos(workspace))
    assert [video.name for video in videos] == ["deep/a.mp4", "other/b.mp4", "z.mp4"]


def test_webvid_rows_with_quotes_gaps_and_tricks(tmp_path, workspace):
    (tmp_path / "list.csv").write_bytes(
        b"\xef\xbb\xbfvideoid,contentUrl,duration,page_dir,name\r\n"
        b'1,u,PT1S,0001_0050,"a ""quoted"", comma"\r\n'
        b"2,u,PT1S,,no page\r\n"
        b"3,u,PT1S,../..,escape\r\n"
        b"4,u,PT1S,/abs,absolute\r\n"
        b",u,PT1S,0001_0050,no id\r\n"
        b"5,u\r\n"
    )
    source = WebVidSource(path=str(tmp_path), csv=str(tmp_path / "list.csv"))
    videos = list(source.videos(workspace))
    assert [video.problem is None for video in videos] == [True, True, False, False, False, True]
    assert videos[0].caption == 'a "quoted", comma'
    assert videos[0].uri == f"{tmp_path}/videos/0001_0050/1.mp4"
    assert videos[1].uri == f"{tmp_path}/videos/2.mp4"
    assert (videos[5].uri, videos[5].caption) == (f"{tmp_path}/videos/5.mp4", None)


def test_a_csv_without_the_columns_names_them(tmp_path, workspace):
    (tmp_path / "list.csv").write_text("id,title\n1,a\n")
    with pytest.raises(UserError, match="no column videoid, page_dir, name"):
        list(WebVidSource(path=str(tmp_path), csv=str(tmp_path / "list.csv")).videos(workspace))
    with pytest.raises(UserError, match=r"absent\.csv"):
        list(WebVidSource(path=str(tmp_path), csv=str(tmp_path / "absent.csv")).videos(workspace))


def test_ucf101_follows_the_official_lists(test_data, workspace):
    source = Ucf101Source(
        path=str(test_data / "clips" / "ucf101"), lists=str(test_data / "metadata" / "ucf101"), fold=1
    )
    videos = list(source.videos(workspace))
    assert len(videos) == 9537 + 3783
    assert {video.split for video in videos} == {"train", "test"}
    assert len({video.label for video in videos}) == 101
    groups = {int(video.name.split("_g")[1][:2]) for video in videos if video.split == "test"}
    assert groups == set(range(1, 8))


def test_ucf101_without_its_lists_says_what_is_missing(tmp_path, workspace):
    with pytest.raises(UserError, match=r"classInd\.txt"):
        list(Ucf101Source(path=str(tmp_path), lists=str(tmp_path)).videos(workspace))


def test_kinetics_rows_name_their_segments(test_data, tmp_path, workspace):
    csv = test_data / "metadata" / "kinetics" / "kinetics-600_val.csv"
    videos = list(KineticsSource(path=str(tmp_path), csv=str(csv)).videos(workspace))
    assert len(videos) == 29093
    assert videos[0].name == "abseiling/yq_M1PMw2hY_000038_000048.mp4"
    assert (videos[0].label, videos[0].split) == ("abseiling", "test")
    flat = KineticsSource(path=str(tmp_path), csv=str(csv), pattern="{split}/{youtube_id}.mp4")
    assert next(iter(flat.videos(workspace))).uri == f"{tmp_path}/val/yq_M1PMw2hY.mp4"
    wrong = KineticsSource(path=str(tmp_path), csv=str(csv), pattern="{video}.mp4")
    with pytest.raises(UserError, match="youtube_id"):
        list(wrong.videos(workspace))


def test_kinetics_rows_without_times_are_rejected_alone(tmp_path, workspace):
    (tmp_path / "list.csv").write_text(
        "label,youtube_id,time_start,time_end,split\nrun,a,1,11,train\nrun,b,,,train\nrun,c,1,inf,val\n"
        f"run,{'d' * 300},1,11,train\nrun,e,2,12,train\n"
    )
    videos = list(KineticsSource(path=str(tmp_path), csv=str(tmp_path / "list.csv")).videos(workspace))
    assert [video.problem and video.problem[0] for video in videos] == [
        None,
        "missing",
        "missing",
        "outside",
        None,
    ]
    assert len({video.name for video in videos}) == 5
    deep = KineticsSource(path=str(tmp_path), csv=str(tmp_path / "list.csv"), pattern="n/" * 2100 + "a.mp4")
    assert {video.problem and video.problem[0] for video in deep.videos(workspace)} == {"outside", "missing"}


def test_kinetics_takes_the_lists_of_several_splits_in_turn(tmp_path, workspace):
    for split in ("train", "val"):
        row = f"run,of_{split},1,11,{split}"
        (tmp_path / f"{split}.csv").write_text(f"label,youtube_id,time_start,time_end,split\n{row}\n")
    lists = [str(tmp_path / f"{split}.csv") for split in ("train", "val")]
    source = KineticsSource.model_validate({"path": str(tmp_path), "csv": lists})
    assert [video.split for video in source.videos(workspace)] == ["train", "test"]


def test_synthetic_videos_are_written_once(tmp_path, workspace):
    source = SyntheticSource(count=3, blocks=2, size=32)
    first = list(source.videos(workspace))
    changed = [workspace.fs.get_file_info(video.uri).mtime_ns for video in first]
    assert list(source.videos(workspace)) == first
    assert [workspace.fs.get_file_info(video.uri).mtime_ns for video in first] == changed
    assert [video.label for video in first] == ["drift", "orbit", "spin"]
    assert all(len(video.motion) == 2 for video in first)

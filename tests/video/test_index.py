"""The clip index: lookups, selections and labels equal what was written, and stay lazy."""

from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa
import pytest

from evatok.artifacts import Location
from evatok.errors import UserError
from evatok.video.decode import ClipFormat, VideoInfo
from evatok.video.index import REJECTED_SCHEMA, SCHEMA, ClipIndex, clip_starts, write_index


def table(clips: int) -> pa.Table:
    number = np.arange(clips)
    return pa.table(
        {
            "clip_id": [f"v{k // 4}#{k % 4}" for k in number],
            "uri": [f"/videos/v{k // 4}.mp4" for k in number],
            "start": number / 10,
            "fps": np.zeros(clips, np.float32),
            "frames": np.full(clips, 16, np.int32),
            "width": np.full(clips, 96, np.int32),
            "height": np.full(clips, 96, np.int32),
            "label": [None if k % 7 == 0 else f"kind{k % 3}" for k in number],
            "caption": pa.nulls(clips, pa.string()),
            "split": ["test" if k % 5 == 0 else "train" for k in number],
            "motion": pa.nulls(clips, pa.list_(pa.float32())),
        },
        schema=SCHEMA,
    )


@pytest.fixture
def index(tmp_path) -> ClipIndex:
    location = Location.parse(tmp_path)
    write_index(location, table(10_000), REJECTED_SCHEMA.empty_table())
    return ClipIndex.open(location)


def test_lookups_over_many_row_groups_keep_the_order_asked_for(index):
    clips = np.asarray([9_999, 0, 4_096, 4_095, 17, 17, 8_500])
    found = index.take(clips)
    assert found["row"].to_pylist() == clips.tolist()
    assert found["clip_id"].to_pylist() == [f"v{k // 4}#{k % 4}" for k in clips]
    assert index.take(np.asarray([], np.int64)).num_rows == 0


def test_a_selection_counts_its_own_clips_and_knows_the_rows_of_the_whole(index):
    train = index.select(split="train")
    assert len(train) == 8_000
    assert train.take(np.asarray([0, 4]))["row"].to_pylist() == [1, 6]
    both = train.select(label="kind1")
    rows = both.take(np.arange(len(both)))
    assert set(rows["split"].to_pylist()) == {"train"}
    assert set(rows["label"].to_pylist()) == {"kind1"}
    assert both.column("start").to_pylist() == rows["start"].to_pylist()


def test_labels_are_sorted_and_without_the_missing_one(index):
    assert index.labels() == ["kind0", "kind1", "kind2"]


def test_an_index_travels_without_its_rows(index):
    assert len(pickle.dumps(index)) < 2_000
    again = pickle.loads(pickle.dumps(index.select(split="test")))  # noqa: S301
    assert again.take(np.asarray([3]))["row"].to_pylist() == [15]


def test_a_new_index_in_the_same_place_is_seen(index):
    index.take(np.asarray([5]))
    write_index(index.location, table(12), REJECTED_SCHEMA.empty_table())
    assert len(ClipIndex.open(index.location)) == 12


def test_clips_outside_of_the_index_are_refused(index, tmp_path):
    with pytest.raises(IndexError):
        index.take(np.asarray([10_000]))
    with pytest.raises(UserError, match="no clip index here"):
        ClipIndex.open(Location.parse(tmp_path / "elsewhere"))


@pytest.mark.parametrize(
    ("fps", "stride", "limit", "expected"),
    [
        (0, 16, None, [0.0, 1.6, 3.2]),
        (0, 10, 2, [0.0, 1.0]),
        (0, 40, None, [0.0]),
        (4, 4, None, [0.0, 1.0]),
        (20, 32, None, [0.0, 1.6, 3.2]),
        (2, 16, None, []),
    ],
)
def test_clips_begin_every_stride_sampled_frames(fps, stride, limit, expected):
    info = VideoInfo(96, 96, np.arange(50) / 10, "h264")  # 5 s
    starts = clip_starts(info, ClipFormat(frames=16, fps=fps), stride, limit)
    np.testing.assert_allclose(starts, expected)

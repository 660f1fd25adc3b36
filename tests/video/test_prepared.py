"""A prepared clip is the clip that was prepared, or its file is named as damaged."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from evatok.artifacts import Location
from evatok.video.decode import DecodeError
from evatok.video.prepared import DamagedError, PreparedClips, file_name, write_prepared


def write_clips(folder, clips) -> PreparedClips:
    location = Location.parse(folder)
    write_prepared(location, 0, clips)
    PreparedClips(location, 4, 16).finish()
    return PreparedClips.open(location)


def test_no_damaged_byte_gives_wrong_pixels(tmp_path):
    draw = np.random.default_rng(0)
    clips = [draw.integers(0, 256, (3, 4, 16, 16), np.uint8) for _ in range(3)]
    prepared = write_clips(tmp_path / "whole", clips)
    np.testing.assert_array_equal(prepared.clip(2), clips[2])
    whole = (tmp_path / "whole" / file_name(0)).read_bytes()
    noticed = []
    for number in range(60):
        damaged = bytearray(whole)
        damaged[int(draw.integers(len(whole)))] ^= 1 << int(draw.integers(8))
        folder = tmp_path / str(number)
        prepared = write_clips(folder, clips[:1])
        (folder / file_name(0)).write_bytes(damaged)
        for row, clip in enumerate(clips):
            try:
                np.testing.assert_array_equal(prepared.clip(row), clip)
            except DamagedError as error:
                noticed.append(str(folder / file_name(0)) in error.detail)
    assert len(noticed) > 30
    assert all(noticed)


def test_a_file_that_is_gone_is_damaged_and_a_clip_that_could_not_be_decoded_is_not(tmp_path):
    prepared = write_clips(tmp_path, [None])
    with pytest.raises(DecodeError) as raised:
        prepared.clip(0)
    assert not isinstance(raised.value, DamagedError)
    with pytest.raises(DamagedError, match=file_name(64)) as raised:
        prepared.clip(64)
    assert pickle.loads(pickle.dumps(raised.value)).detail == raised.value.detail  # noqa: S301


def test_files_of_an_earlier_layout_are_not_taken(tmp_path):
    location = Location.parse(tmp_path)
    location.write_json("format.json", {"frames": 4, "size": 16})
    assert PreparedClips.open(location) is None

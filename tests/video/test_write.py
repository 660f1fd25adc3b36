"""Written clips come back as they were."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from evatok.video.decode import ClipFormat, decode_clip, probe
from evatok.video.write import write_video


def test_an_mp4_keeps_frames_rate_and_colours(tmp_path, moving):
    clip = moving(20, seed=1).transpose(3, 0, 1, 2)
    write_video(tmp_path / "clip.mp4", clip, fps=12.5)
    info = probe(str(tmp_path / "clip.mp4"))
    assert (info.width, info.height, len(info.times)) == (48, 48, 20)
    assert info.fps == pytest.approx(12.5)
    back = decode_clip(str(tmp_path / "clip.mp4"), 0.0, ClipFormat(frames=20, size=48))
    assert np.abs(back.astype(int) - clip).mean() < 8


def test_odd_sizes_are_padded_to_even_ones(tmp_path, moving):
    write_video(tmp_path / "odd.mp4", moving(4, height=49, width=51).transpose(3, 0, 1, 2), fps=8)
    info = probe(str(tmp_path / "odd.mp4"))
    assert (info.width, info.height) == (52, 50)


def test_a_gif_shows_every_frame(tmp_path, moving):
    write_video(tmp_path / "clip.gif", moving(6).transpose(3, 0, 1, 2), fps=8)
    with Image.open(tmp_path / "clip.gif") as image:
        assert image.n_frames == 6
        assert image.info["duration"] == 120


def test_other_suffixes_are_refused(tmp_path, moving):
    with pytest.raises(ValueError, match=r"\.mp4 or \.gif"):
        write_video(tmp_path / "clip.webm", moving(4).transpose(3, 0, 1, 2), fps=8)

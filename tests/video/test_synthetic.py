"""Synthetic videos: seeded, labelled, and moving as much as they say."""

from __future__ import annotations

import numpy as np

from evatok.artifacts import Location
from evatok.video.decode import ClipFormat, decode_clip, probe
from evatok.video.synthetic import KINDS, read_truth, render, write_videos


def test_the_truth_about_motion_holds_in_the_files(tmp_path):
    videos = write_videos(tmp_path, 18, seed=0, blocks=12, size=64)
    changes: dict[float, list[float]] = {}
    for video in videos:
        clip = decode_clip(str(tmp_path / video.name), 0.0, ClipFormat(frames=48, size=64)).astype(int)
        step = np.abs(np.diff(clip, axis=1)).mean(axis=(0, 2, 3))  # [47]: into frame 1, 2, ...
        for block in range(1, 12):
            # A block after grain or a cut changes once more when that ends.
            within = step[4 * block - 1 : 4 * block + 3]
            changes.setdefault(video.motion[block], []).append(float(within[1:].mean()))
            if video.motion[block] == 1.0:
                changes.setdefault(2.0, []).append(float(within[0]))
    typical = {motion: float(np.median(values)) for motion, values in changes.items()}
    assert typical[0.0] < 0.5 < typical[0.25] < typical[0.5] < typical[0.75]
    assert typical[2.0] > 4 * typical[0.5]  # the cut itself


def test_the_same_seed_gives_the_same_files_and_another_seed_others(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_videos(tmp_path / name, 6, seed, blocks=2, size=32)
    files = {name: [f.read_bytes() for f in sorted((tmp_path / name).glob("*.mp4"))] for name in "abc"}
    assert files["a"] == files["b"] != files["c"]


def test_labels_and_truth_are_read_back(tmp_path):
    written = write_videos(tmp_path, 7, seed=0, blocks=3, size=32)
    assert read_truth(Location.parse(tmp_path)) == written
    assert [video.label for video in written] == [*KINDS, KINDS[0]]
    assert len(probe(str(tmp_path / written[0].name)).times) == 12


def test_without_texture_the_same_scenes_have_smooth_surfaces():
    def roughness(seed: int, texture: bool) -> float:
        draw = np.random.default_rng(seed)
        frames = render("drift", np.array(["slow"] * 2), 32, draw, texture=texture)
        return float(np.median(np.abs(np.diff(frames.astype(float), axis=2))))

    pairs = [(roughness(seed, True), roughness(seed, False)) for seed in range(12)]
    assert {plain for _, plain in pairs} == {0.0}
    assert sum(textured > 1 for textured, _ in pairs) >= 4

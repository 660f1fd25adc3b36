"""Clips equal what a full sequential decode gives, in every container and with every oddity."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import socket
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path

import av
import fsspec
import numpy as np
import psutil
import pytest
from fsspec.implementations.memory import MemoryFile

from evatok.video.decode import ClipFormat, DecodeError, MediaLimits, StorageError, decode_clip, probe
from evatok.video.index import clip_starts

SHORT = ClipFormat(frames=8, size=48)

KINDS = {
    "b-frames.mp4": {"options": {"bf": "3", "g": "12"}},
    "long-group.mp4": {"options": {"bf": "2", "g": "250"}},
    "open-group.mp4": {"options": {"bf": "3", "g": "10", "x264-params": "open-gop=1:b-adapt=0"}},
    "intra-refresh.mp4": {"options": {"x264-params": "intra-refresh=1:keyint=10:bframes=0"}},
    "h264.mkv": {"options": {"bf": "2", "g": "12"}},
    "h264.avi": {"options": {"bf": "2", "g": "12"}},
    "h264.mov": {"options": {"bf": "2", "g": "12"}},
    "h264.ts": {"options": {"bf": "2", "g": "12"}},
    "raw.h264": {"options": {"bf": "2", "g": "12"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2", "g": "12"}},
    "mpeg4-plain.avi": {"codec": "mpeg4", "options": {"g": "12"}},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "vp8.webm": {"codec": "libvpx", "options": {"g": "12", "deadline": "realtime", "cpu-used": "8"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "12", "deadline": "realtime", "cpu-used": "8"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"bf": "2", "g": "12"}},
    "paletted.gif": {"codec": "gif", "pix_fmt": "rgb8", "rate": 20},
    "lossless.mkv": {"codec": "ffv1", "pix_fmt": "bgr0"},
}


@pytest.mark.parametrize("name", KINDS)
def test_every_clip_of_a_file_equals_the_sequential_decode(name, tmp_path, write, moving, decoded):
    path = write(tmp_path / name, moving(60), **KINDS[name])
    reference = decoded(path)
    info = probe(str(path))
    assert len(info.times) == len(reference)
    for first in range(0, len(reference) - SHORT.frames + 1, 5):
        clip = decode_clip(str(path), float(info.times[first]), SHORT)
        expected = reference[first : first + SHORT.frames].transpose(1, 0, 2, 3)
        np.testing.assert_array_equal(clip, expected, err_msg=f"{name} from frame {first}")


def test_clips_of_real_files_equal_the_sequential_decode(test_data):
    patterns = ("formats/*.m*", "ucf101/*/*_g0[14]_c01.avi", "ucf101/*/*_g24_c01.avi", "train/vision*")
    files = [file for pattern in patterns for file in sorted((test_data / "clips").glob(pattern))]
    files = [file for file in files if file.stat().st_size < 1_000_000]
    assert len(files) > 15
    for file in files:
        info = probe(str(file))
        count = min(len(info.times), 60)
        whole = decode_clip(str(file), float(info.times[0]), ClipFormat(frames=count - 2, size=32))
        for first in range(0, count - 18, 13):
            clip = decode_clip(str(file), float(info.times[first]), ClipFormat(size=32))
            np.testing.assert_array_equal(clip, whole[:, first : first + 16], err_msg=f"{file} {first}")


def test_a_variable_frame_rate_is_cut_by_time_and_not_by_frame_number(tmp_path, write, moving, decoded):
    gaps = np.random.default_rng(0).choice([10, 33, 40, 200], 80)
    ticks = np.cumsum(gaps)
    path = write(tmp_path / "vfr.mp4", moving(80), ticks=[int(t) for t in ticks], options={"g": "20"})
    reference, info = decoded(path), probe(str(path))
    np.testing.assert_allclose(np.diff(info.times), gaps[1:] / 1000, atol=1e-3)
    for first in (0, 17, 41, 72):
        clip = decode_clip(str(path), float(info.times[first]), SHORT)
        np.testing.assert_array_equal(clip, reference[first : first + 8].transpose(1, 0, 2, 3))
    # Four frames per second: each instant shows the last frame that began before it.
    start, sampled = float(info.times[9]), ClipFormat(frames=8, size=48, fps=4)
    shown = [int(np.searchsorted(info.times, start + k / 4 + 1e-4, side="right")) - 1 for k in range(8)]
    clip = decode_clip(str(path), start, sampled)
    np.testing.assert_array_equal(clip, reference[shown].transpose(1, 0, 2, 3))


def test_every_clip_that_a_variable_frame_rate_is_offered_for_can_be_cut(tmp_path, write, moving):
    """The frames at the end follow quickly, so that the mean interval is far longer than the last."""
    ticks = [*range(0, 2000, 200), *range(2000, 2200, 10)]
    path = write(tmp_path / "vfr.mp4", moving(len(ticks)), ticks=ticks)
    info, sampled = probe(str(path)), ClipFormat(frames=8, size=48, fps=14)
    assert info.end == pytest.approx(2.2)
    for start in clip_starts(info, sampled, stride=1, limit=None):
        decode_clip(str(path), start, sampled)


def test_sampling_faster_than_the_video_repeats_frames(tmp_path, write, moving, decoded):
    path = write(tmp_path / "slow.mp4", moving(10), rate=5)
    clip = decode_clip(str(path), 0.0, ClipFormat(frames=20, size=48, fps=10))
    np.testing.assert_array_equal(clip, decoded(path).repeat(2, axis=0).transpose(1, 0, 2, 3))


def test_a_phone_video_with_a_display_matrix_is_upright(tmp_path, write, moving, decoded):
    frames = moving(8, height=48, width=96)
    path = write(
        tmp_path / "portrait.mp4", frames, prepare=lambda _, stream: stream.set_display_rotation(-90)
    )
    info = probe(str(path))
    assert (info.width, info.height) == (48, 96)
    clip = decode_clip(str(path), 0.0, SHORT)
    upright = np.rot90(decoded(path), -1, axes=(2, 3))
    np.testing.assert_array_equal(clip, upright[:, :, 24:72].transpose(1, 0, 2, 3))


def test_pixels_that_are_not_square_count_in_the_displayed_size(tmp_path, write, moving):
    def squeeze(_, stream):
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)

    path = write(tmp_path / "anamorphic.mp4", moving(8), prepare=squeeze)
    info = probe(str(path))
    assert (info.width, info.height) == (96, 48)
    assert decode_clip(str(path), 0.0, SHORT).shape == (3, 8, 48, 48)


@pytest.mark.parametrize(("height", "width"), [(47, 63), (63, 47), (1, 33)])
def test_odd_sizes_are_scaled_and_cut_to_the_square(height, width, tmp_path, write, moving):
    frames = np.full((8, height, width, 3), 90, np.uint8)
    path = write(tmp_path / "odd.mkv", frames, codec="ffv1", pix_fmt="bgr0")
    assert (probe(str(path)).height, probe(str(path)).width) == (height, width)
    clip = decode_clip(str(path), 0.0, ClipFormat(frames=8, size=32))
    assert clip.shape == (3, 8, 32, 32)
    assert np.abs(clip.astype(int) - 90).max() <= 2


def test_a_file_without_durations_is_measured_by_its_packets(tmp_path, write, moving, decoded):
    path = write(tmp_path / "live.mkv", moving(40), container_options={"live": "1"})
    assert len(probe(str(path)).times) == 40
    clip = decode_clip(str(path), float(probe(str(path)).times[20]), SHORT)
    np.testing.assert_array_equal(clip, decoded(path)[20:28].transpose(1, 0, 2, 3))


def test_the_main_video_is_found_among_several_streams(tmp_path, moving):
    path = tmp_path / "many.mkv"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000)
        pictures = container.add_stream("libx264", rate=24)
        pictures.height = pictures.width = 48
        pictures.pix_fmt = "yuv420p"
        for image in moving(30):
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        for k in range(20):
            noise = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            noise.sample_rate, noise.pts = 16000, 1024 * k
            container.mux(sound.encode(noise))
        container.mux(pictures.encode())
        container.mux(sound.encode())
    assert len(probe(str(path)).times) == 30
    assert decode_clip(str(path), 0.0, SHORT).shape == (3, 8, 48, 48)


def test_text_that_is_not_utf8_does_not_matter(tmp_path, write, moving):
    def title(container, _):
        container.metadata["title"] = "TITLEHERE"

    path = write(tmp_path / "latin.mp4", moving(20), prepare=title)
    data = path.read_bytes()
    assert b"TITLEHERE" in data
    path.write_bytes(data.replace(b"TITLEHERE", b"T\xefTL\xc9\xff\xfe\xc0R"))
    assert decode_clip(str(path), 0.0, SHORT).shape == (3, 8, 48, 48)


def test_crop_and_flip_follow_from_the_draw_alone(tmp_path, write, moving):
    path = str(write(tmp_path / "wide.mp4", moving(8, height=48, width=120)))
    varied = ClipFormat(frames=8, size=48, crop="random", flip=True)

    def cut(seed):
        return decode_clip(path, 0.0, varied, np.random.default_rng(seed))

    np.testing.assert_array_equal(cut(5), cut(5))
    assert len({cut(seed).tobytes() for seed in range(12)}) > 8
    centered = decode_clip(path, 0.0, SHORT, np.random.default_rng(5))
    np.testing.assert_array_equal(centered, decode_clip(path, 0.0, SHORT))
    flipped = ClipFormat(frames=8, size=48, flip=True)
    both = {decode_clip(path, 0.0, flipped, np.random.default_rng(seed)).tobytes() for seed in range(12)}
    assert both == {centered.tobytes(), centered[..., ::-1].tobytes()}


def test_bad_files_say_what_is_wrong_with_them(tmp_path, write, moving):
    good = write(tmp_path / "good.mp4", moving(20))
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(good.read_bytes()[:2000])  # the index of an mp4 stands at its end
    text = tmp_path / "text.mp4"
    text.write_text("not a video\n" * 400)
    empty = tmp_path / "empty.mp4"
    empty.touch()
    sound = tmp_path / "sound.wav"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
        silence.sample_rate = 16000
        container.mux(stream.encode(silence))
    codes = {}
    for file in (cut, text, empty, sound, tmp_path / "absent.mp4", tmp_path):
        with pytest.raises(DecodeError) as raised:
            probe(str(file))
        codes[file.name] = raised.value.code
        assert str(file) in raised.value.detail
    assert codes == {
        "cut.mp4": "unreadable",
        "text.mp4": "unreadable",
        "empty.mp4": "empty",
        "sound.wav": "no_video",
        "absent.mp4": "missing",
        tmp_path.name: "missing",
    }


def test_limits_refuse_what_asks_too_much(tmp_path, write, moving):
    path = str(write(tmp_path / "video.mp4", moving(30)))
    for limits, code in (
        (MediaLimits(pixels=2000), "too_large"),
        (MediaLimits(seconds=0.5), "too_long"),
        (MediaLimits(frames=10), "too_long"),
        (MediaLimits(time_limit=1e-9), "timeout"),
    ):
        with pytest.raises(DecodeError) as raised:
            probe(path, limits)
        assert raised.value.code == code, limits
    with pytest.raises(DecodeError, match="too_short"):
        decode_clip(path, 1.1, SHORT)


def test_files_on_another_file_system_are_read_through_arrow(tmp_path, write, moving):
    path = write(tmp_path / "remote.mp4", moving(20))
    np.testing.assert_array_equal(
        decode_clip(f"file://{path}", 0.0, SHORT), decode_clip(str(path), 0.0, SHORT)
    )


def noise(frames: int) -> np.ndarray:
    """Frames that no codec can make small."""
    return np.random.default_rng(0).integers(0, 256, (frames, 160, 160, 3), np.uint8)


def test_a_remote_file_is_read_in_few_requests(tmp_path, monkeypatch, write):
    path = write(tmp_path / "video.mp4", noise(60), options={"crf": "4"})
    assert path.stat().st_size > 1 << 20
    fsspec.filesystem("memory").pipe("/bucket/few.mp4", path.read_bytes())
    requests = []
    whole = MemoryFile.read
    monkeypatch.setattr(MemoryFile, "read", lambda *asked: requests.append(asked[1:]) or whole(*asked))
    probe("memory://bucket/few.mp4")
    assert len(requests) <= 8


def test_frames_arrive_undamaged_from_a_file_cut_short(tmp_path: Path, write, moving, decoded):
    path = write(tmp_path / "whole.mkv", moving(60), options={"g": "10"})
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.6)])
    count = len(probe(str(cut)).times)
    assert 20 < count < 60
    clip = decode_clip(str(cut), float(probe(str(cut)).times[8]), SHORT)
    np.testing.assert_array_equal(clip, decoded(path)[8:16].transpose(1, 0, 2, 3))


def test_a_playlist_in_disguise_reaches_no_other_machine(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/piece.ts"
        playlist = tmp_path / "playlist.mp4"
        lines = ["#EXTM3U", "#EXT-X-TARGETDURATION:5", "#EXTINF:5,", address, "#EXT-X-ENDLIST"]
        for name in ("playlist.mp4", "playlist.m3u8"):
            playlist = tmp_path / name
            playlist.write_text("\n".join(lines))
            with pytest.raises(DecodeError):
                probe(str(playlist), MediaLimits(time_limit=5))
        with pytest.raises(TimeoutError):
            server.accept()


def test_decoding_keeps_no_memory(tmp_path, write, moving):
    path = str(write(tmp_path / "video.mp4", moving(40, height=96, width=96)))
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(Path(path).read_bytes()[:3000])

    def resident() -> float:
        return psutil.Process().memory_info().rss / 2**20

    def work(times: int) -> None:
        for k in range(times):
            decode_clip(path, 0.5 + 0.01 * (k % 5), SHORT)
            with pytest.raises(DecodeError):
                decode_clip(str(bad), 0.0, SHORT)

    work(60)
    before = resident()
    work(400)
    assert resident() < before + 20


@contextmanager
def every_file_number_taken():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
    taken = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        yield
    finally:
        for number in taken:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_storage_that_fails_is_not_the_fault_of_the_file(tmp_path, monkeypatch, write):
    path = write(tmp_path / "video.mp4", noise(60), options={"crf": "4"})
    fsspec.filesystem("memory").pipe("/bucket/video.mp4", path.read_bytes())
    whole = MemoryFile.read

    def read(file, size=-1):
        if file.tell() > 0:
            raise OSError(errno.EIO, "503 Slow Down")
        return whole(file, size)

    monkeypatch.setattr(MemoryFile, "read", read)
    with pytest.raises(StorageError, match=r"memory://bucket/video\.mp4: .*503 Slow Down"):
        probe("memory://bucket/video.mp4")
    with pytest.raises(StorageError, match="503"):
        decode_clip("memory://bucket/video.mp4", 0.5, SHORT)
    with every_file_number_taken(), pytest.raises(StorageError, match="Too many open files"):
        probe(str(path))
    assert pickle.loads(pickle.dumps(StorageError("a: b"))).args == ("a: b",)  # noqa: S301


def test_a_file_whose_references_cannot_be_opened_is_its_own_fault(tmp_path):
    playlist = tmp_path / "playlist.mp4"
    playlist.write_text("\n".join(["ffconcat version 1.0", "file absent.mp4"]))
    with pytest.raises(DecodeError) as raised:
        probe(str(playlist))
    assert raised.value.code == "unreadable"

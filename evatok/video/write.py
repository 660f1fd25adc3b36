"""Clips into files that people and browsers open: H.264 mp4 and GIF."""

import itertools
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

_CRF = 18  # near lossless to the eye


def write_video(path: str | Path, clip: NDArray[np.uint8], fps: float, *, crf: int = _CRF) -> None:
    """Write `clip` uint8 [C, F, H, W] (RGB) as in `write_frames`."""
    write_frames(path, clip.transpose(1, 2, 3, 0), fps, crf=crf)


def write_frames(
    path: str | Path, frames: Iterable[NDArray[np.uint8]], fps: float, *, crf: int = _CRF
) -> None:
    """Write frames uint8 [H, W, C] (RGB), at least one, at `fps` per second as .mp4 or .gif, one at a time.

    An mp4 of odd height or width repeats its last row or column, since 4:2:0 needs even ones.
    Raises ValueError for another suffix.
    """
    path = Path(path)
    if path.suffix == ".mp4":
        write_mp4(path, frames, fps, crf=crf)
    elif path.suffix == ".gif":
        images = (Image.fromarray(np.ascontiguousarray(frame)) for frame in frames)
        next(images).save(path, save_all=True, append_images=images, duration=round(1000 / fps), loop=0)
    else:
        raise ValueError(f"{path}: a clip is written as .mp4 or .gif")


def write_mp4(
    path: str | Path,
    frames: Iterable[NDArray[np.uint8]],
    fps: float,
    *,
    crf: int = _CRF,
    group: int = 0,
    preset: str = "fast",
) -> None:
    """Write `frames` uint8 [H, W, C] each as H.264. `group`: frames per keyframe, 0 leaves it to x264."""
    remaining = iter(frames)
    first = next(remaining)
    height, width = first.shape[:2]
    odd = ((0, height % 2), (0, width % 2), (0, 0))
    options = {"crf": str(crf), "preset": preset, "threads": "1"}
    if group:
        options["g"] = str(group)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width = height + height % 2, width + width % 2
        stream.pix_fmt = "yuv420p"
        for frame in itertools.chain([first], remaining):
            picture = np.ascontiguousarray(np.pad(frame, odd, mode="edge"))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())

"""Clips into files that people and browsers open: H.264 mp4 and GIF."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

_CRF = 18  # near lossless to the eye


def write_video(path: str | Path, clip: NDArray[np.uint8], fps: float, *, crf: int = _CRF) -> None:
    """Write `clip` uint8 [C, F, H, W] (RGB) at `fps` frames per second as .mp4 or .gif.

    An mp4 of odd height or width repeats its last row or column, since 4:2:0 needs even ones.
    Raises ValueError for another suffix.
    """
    path = Path(path)
    frames = np.ascontiguousarray(clip.transpose(1, 2, 3, 0))  # [F, H, W, C]
    if path.suffix == ".mp4":
        write_mp4(path, frames, fps, crf=crf)
    elif path.suffix == ".gif":
        images = [Image.fromarray(frame) for frame in frames]
        images[0].save(path, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
    else:
        raise ValueError(f"{path}: a clip is written as .mp4 or .gif")


def write_mp4(
    path: str | Path,
    frames: NDArray[np.uint8],
    fps: float,
    *,
    crf: int = _CRF,
    group: int = 0,
    preset: str = "fast",
) -> None:
    """Write `frames` uint8 [F, H, W, C] as H.264. `group`: frames per keyframe, 0 leaves it to x264."""
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    options = {"crf": str(crf), "preset": preset, "threads": "1"}
    if group:
        options["g"] = str(group)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())

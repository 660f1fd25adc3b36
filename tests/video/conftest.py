"""Media files of every kind, written on the spot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

Frames = NDArray[np.uint8]


def moving_frames(count: int, height: int = 48, width: int = 48, seed: int = 0) -> Frames:
    """Frames that all differ: a textured square that moves and a brightness that climbs. [F, H, W, 3]"""
    draw = np.random.default_rng(seed)
    backdrop = draw.integers(40, 120, (height // 4 + 1, width // 4 + 1, 3)).repeat(4, 0).repeat(4, 1)
    frames = np.empty((count, height, width, 3), np.uint8)
    for k in range(count):
        frames[k] = backdrop[:height, :width] + 2 * (k % 50)
        x = (3 * k) % (width - 12)
        frames[k, 8:20, x : x + 12] = (250, 30, 5 * (k % 50))
    return frames


def write_media(
    path: Path,
    frames: Frames,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rate: int = 24,
    options: dict[str, str] | None = None,
    ticks: Sequence[int] | None = None,
    container_options: dict[str, str] | None = None,
    prepare: Callable[[Any, Any], None] | None = None,
) -> Path:
    """`ticks`: presentation times in 1/1000 s, for a variable frame rate. `prepare(container, stream)`."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        if ticks is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if prepare:
            prepare(container, stream)
        for k, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if ticks is not None:
                frame.pts, frame.time_base = ticks[k], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def sequential(path: Path) -> Frames:
    """Every frame of a file, decoded from its beginning without seeking: [F, 3, H, W]."""
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.best("video")
        images = [
            frame.reformat(format="gbrp", interpolation="BILINEAR").to_ndarray()
            for frame in container.decode(stream)
        ]
    return np.stack(images).transpose(0, 3, 1, 2)


@pytest.fixture
def write() -> Callable[..., Path]:
    return write_media


@pytest.fixture
def moving() -> Callable[..., Frames]:
    return moving_frames


@pytest.fixture
def decoded() -> Callable[[Path], Frames]:
    return sequential

"""Clips out of media files with PyAV: seek, decode no further than needed, scale in libswscale.

Times are seconds on the stream's own clock (presentation timestamp x time base), so a clip is found again
exactly, whatever the frame rate does in between.

A file that cannot be used raises DecodeError, for good. A storage that does not deliver a file raises
StorageError: the same call may succeed later.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import IO, Any, Literal, get_args

import av
import numpy as np
import pyarrow as pa
from av.stream import Discard
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray
from pyarrow import fs as pafs
from pydantic import Field

from evatok.artifacts import Location
from evatok.config import Config

Reason = Literal[
    "missing",  # no such file, or not readable by us
    "outside",  # its path leaves the data root, or its address is not an allowed one
    "http",  # no server gives it
    "empty",  # zero bytes
    "unreadable",  # no demuxer accepts it: truncated header, wrong type, text
    "no_video",  # readable, but nothing to see
    "no_frames",  # a video stream without one decodable frame
    "too_large",  # more pixels per frame than allowed
    "too_long",  # longer or more frames than allowed
    "too_short",  # fewer frames than a clip
    "corrupt",  # frames are damaged or cannot be decoded
    "timeout",  # took longer than the time limit
    "crash",  # the decoder took its process down
    "storage",  # the storage keeps failing to deliver it, and it alone
]
REASONS: tuple[str, ...] = get_args(Reason)


class DecodeError(Exception):
    """A media file that cannot be used: `code` is one of `REASONS`, `detail` names the file, for people."""

    def __init__(self, code: Reason, detail: str) -> None:
        super().__init__(code, detail)
        self.code = code
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.detail} [{self.code}]"


class StorageError(OSError):
    """The storage of a media file failed, which says nothing about the file; the message names both."""


STORAGE_PATIENCE = (1.0, 4.0, 16.0)
"""Seconds to wait, time after time, before a storage that failed is asked again."""


class MediaLimits(Config):
    """What a media file may ask of us before it is refused."""

    pixels: int = Field(default=2**25, gt=0, description="largest frame, width x height (2**25 is 8K)")
    seconds: float = Field(default=6 * 3600.0, gt=0, description="longest video, seconds")
    frames: int = Field(default=1_000_000, gt=0, description="most frames in a video")
    time_limit: float = Field(
        default=60.0, gt=0, description="longest time spent on one file or clip, seconds"
    )


class ClipFormat(Config):
    """The shape of a clip and how it is cut from a video."""

    frames: int = Field(default=16, gt=0, description="frames per clip, F")
    size: int = Field(
        default=128, gt=0, description="height and width, pixels: the short side is scaled to it"
    )
    fps: float = Field(
        default=0.0, ge=0, description="frames per second sampled by timestamp; 0 takes every frame"
    )
    crop: Literal["center", "random"] = Field(
        default="center", description="where the square lies on the long side"
    )
    flip: bool = Field(default=False, description="mirror half of the clips left to right")
    still: bool = Field(default=False, description="one frame of the file, an image, held for the whole clip")

    def of(self, clip: Mapping[str, Any]) -> ClipFormat:
        """As a row of the index is cut: at its sampling rate, and held where it has one frame."""
        still = clip["frames"] == 1 and self.frames > 1
        return self.model_copy(update={"fps": clip["fps"], "still": still})

    def drawn(self, draw: np.random.Generator | None) -> tuple[float, bool]:
        """Where on the long side the square lies, 0 to 1, and whether the clip is mirrored."""
        offset, mirror = (0.5, 1.0) if draw is None else draw.random(2)
        return offset if self.crop == "random" else 0.5, self.flip and mirror < 0.5


@dataclass(frozen=True)
class VideoInfo:
    """What a probe found. `times` [frames] float64: presentation time of every frame, seconds, ascending."""

    width: int
    height: int
    times: NDArray[np.float64]
    codec: str

    @property
    def fps(self) -> float:
        """Mean frame rate, frames per second; 0 for a single frame."""
        span = float(self.times[-1] - self.times[0])
        return (len(self.times) - 1) / span if span > 0 else 0.0

    @property
    def end(self) -> float:
        """When the last frame stops being shown, seconds: it is shown for as long as the one before it."""
        last, before = self.times[-1], self.times[max(0, len(self.times) - 2)]
        return float(2 * last - before)


def probe(uri: str, limits: MediaLimits | None = None) -> VideoInfo:
    """Read every packet's timestamp and decode the first frame.

    Width and height are as displayed: after rotation and with square pixels. Raises DecodeError and
    StorageError.
    """
    limits = limits or MediaLimits()
    with _opened(uri, limits) as (container, stream):
        ticks: list[int] = []
        untimed = 0
        deadline = time.monotonic() + limits.time_limit
        first: av.VideoFrame | None = None
        origin: int | None = None
        for packet in container.demux(stream):
            _check_deadline(deadline, uri, limits)
            origin = packet.dts if origin is None else origin
            if first is None:
                first = next(iter(packet.decode()), None)
            if not packet.size or packet.is_discard:
                continue
            tick = _tick(container, packet)
            if tick is None:
                untimed += 1
            else:
                ticks.append(tick)
            if len(ticks) + untimed > limits.frames:
                raise DecodeError("too_long", f"{uri}: more than {limits.frames} frames")
        if first is None:
            raise DecodeError("no_frames", f"{uri}: no frame of its video stream can be decoded")
        if untimed:
            times = np.arange(len(ticks) + untimed, dtype=np.float64) / float(_nominal_rate(stream))
        else:
            # In AVI a frame's time is when it leaves the decoder, which may be a few packets late.
            late = first.dts - origin if container.format.name == "avi" and first.dts is not None else 0
            times = (np.sort(np.asarray(ticks, np.float64)) + late) * float(stream.time_base)
        info = VideoInfo(*_displayed_size(first, stream), times, stream.codec_context.name)
        if info.end - float(times[0]) > limits.seconds:
            raise DecodeError("too_long", f"{uri}: longer than {limits.seconds:g} s")
        return info


def decode_clip(
    uri: str,
    start: float,
    clip_format: ClipFormat,
    draw: np.random.Generator | None = None,
    limits: MediaLimits | None = None,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """The clip that begins at `start` seconds: uint8 [C, F, H, W], RGB, contiguous.

    With fps 0: the F consecutive frames from the first one at or after `start`. With fps > 0: frame k is the
    one on screen at start + k / fps. A still one is its first frame, F times. `draw` decides a random crop
    and the flip; without it the crop is central and nothing is mirrored. `out`: an array of the clip's shape
    to fill and return. Raises DecodeError and StorageError.
    """
    limits = limits or MediaLimits()
    canvas = _Canvas(clip_format, *clip_format.drawn(draw), out)
    try:
        _cut(uri, start, clip_format, canvas, limits, seek=True)
    except _SeekMissedError:
        _cut(uri, start, clip_format, canvas, limits, seek=False)
    return canvas.finish()


class _Canvas:
    """The clip being filled: scales each frame so that its short side fits, and keeps the square."""

    def __init__(
        self, clip_format: ClipFormat, offset: float, mirrored: bool, out: NDArray[np.uint8] | None
    ) -> None:
        size = clip_format.size
        self.clip = np.empty((3, clip_format.frames, size, size), np.uint8) if out is None else out
        self._size, self._offset, self._mirrored = size, offset, mirrored
        self._still = clip_format.still

    def begin(self, stream: av.VideoStream) -> None:
        """Start with the first frame, of this stream."""
        self._stream = stream
        self._scaler = VideoReformatter()
        self._scaled: tuple[int, int] | None = None
        self._quarters = 0
        self._before: av.VideoFrame | None = None

    def put(self, k: int, frame: av.VideoFrame) -> None:
        if frame is self._before:
            self.clip[:, k] = self.clip[:, k - 1]
            return
        if self._scaled is None:
            width, height = _square_pixels(frame, self._stream)
            scale = self._size / min(width, height)
            self._scaled = max(self._size, round(width * scale)), max(self._size, round(height * scale))
            self._quarters = _quarter_turns(frame)
        width, height = self._scaled
        planar = self._scaler.reformat(
            frame, width=width, height=height, format="gbrp", interpolation=Interpolation.BILINEAR, threads=1
        )
        x, y = round(self._offset * (width - self._size)), round(self._offset * (height - self._size))
        for channel, plane in zip((1, 2, 0), planar.planes):
            pixels = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
            square = pixels[y : y + self._size, x : x + self._size]
            # What is turned afterwards is mirrored afterwards.
            self.clip[channel, k] = square[:, ::-1] if self._mirrored and not self._quarters else square
        self._before = frame

    def finish(self) -> NDArray[np.uint8]:
        if self._still:
            self.clip[:, 1:] = self.clip[:, :1]
        if self._quarters:
            upright = np.rot90(self.clip, self._quarters, axes=(2, 3))
            self.clip[:] = (upright[..., ::-1] if self._mirrored else upright).copy()
        return self.clip


def _cut(
    uri: str, start: float, clip_format: ClipFormat, canvas: _Canvas, limits: MediaLimits, *, seek: bool
) -> None:
    wanted = 1 if clip_format.still else clip_format.frames
    step = 1 / clip_format.fps if clip_format.fps else 0.0
    with _opened(uri, limits) as (container, stream):
        canvas.begin(stream)
        # Half a tick of slack: `start` went through float64 seconds.
        slack = float(stream.time_base) / 2
        frames = _frames_near(container, stream, start + slack, uri, limits) if seek else None
        shown: av.VideoFrame | None = None
        filled = 0
        last = interval = 0.0
        for moment, frame in frames or _frames(container, stream, uri, limits):
            if frame.is_corrupt and frames is not None:
                raise _SeekMissedError
            if frame.is_corrupt:
                raise DecodeError("corrupt", f"{uri}: damaged frame at {moment:.3f} s")
            if not step:
                if moment >= start - slack:
                    canvas.put(filled, frame)
                    filled += 1
            else:
                if shown is None:
                    shown = frame
                while filled < wanted and start + filled * step < moment - slack:
                    canvas.put(filled, shown)
                    filled += 1
                interval, last, shown = moment - last, moment, frame
            if filled == wanted:
                break
        while step and shown is not None and filled < wanted and start + filled * step < last + interval:
            canvas.put(filled, shown)
            filled += 1
        if filled < wanted:
            raise DecodeError("too_short", f"{uri}: {filled} of {wanted} frames from {start:.3f} s on")


_READ = 1 << 20  # bytes asked of a remote storage at once; libav reads local files by itself


@contextmanager
def _opened(uri: str, limits: MediaLimits) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The container and its main video stream; every fault of the file leaves as DecodeError."""
    try:
        with (
            _source(uri) as source,
            av.open(
                source,
                # Some good files carry text that is not UTF-8.
                metadata_errors="replace",
                options={"max_pixels": str(limits.pixels)},
                # The frame rate is measured from timestamps, so libav need not decode to guess it. A playlist
                # that calls itself a video must not make us ask other machines.
                container_options={"fpsprobesize": "0", "protocol_whitelist": "file"},
                buffer_size=_READ,
                timeout=limits.time_limit,
            ) as container,
        ):
            stream = container.streams.best("video")
            if stream is None:
                raise DecodeError("no_video", f"{uri}: no video stream")
            if stream.codec_context is None:
                raise DecodeError("no_video", f"{uri}: its video codec is not known here")
            if stream.width * stream.height > limits.pixels:
                raise DecodeError("too_large", f"{uri}: {stream.width} x {stream.height} pixels")
            for other in container.streams:
                if other.index != stream.index:
                    other.discard = Discard.all
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            stream.codec_context.options = {"max_pixels": str(limits.pixels)}
            yield container, stream
    except (DecodeError, StorageError):
        raise
    except av.error.ExitError as error:
        raise DecodeError("timeout", f"{uri}: no answer within {limits.time_limit:g} s") from error
    except (av.FFmpegError, OSError, ValueError, ArithmeticError, MemoryError, TypeError) as error:
        raise DecodeError("unreadable", f"{uri}: {error}") from error


@contextmanager
def _source(uri: str) -> Iterator[str | IO[bytes]]:
    """What PyAV opens: a local path as it is, anything else through pyarrow's filesystems.

    Where the storage failed, that is raised in place of whatever libav made of it.
    """
    try:
        location = Location.parse(uri)
        info = location.fs.get_file_info(location.path)
        if info.type != pafs.FileType.File:
            raise DecodeError("missing", f"{uri}: no such file")
        if info.size == 0:
            raise DecodeError("empty", f"{uri}: zero bytes")
        if location.local() is not None:
            try:
                yield location.path
            except av.FFmpegError as error:
                if isinstance(error, OSError):
                    _read_through(location.path, error)
                raise
            return
        with location.fs.open_input_file(location.path) as handle:
            watched = _Watched(handle)
            try:
                yield watched  # type: ignore[misc]
            finally:
                if watched.fault is not None:
                    raise watched.fault
    except av.FFmpegError:
        raise
    except (PermissionError, FileNotFoundError) as error:
        raise DecodeError("missing", f"{uri}: {error.strerror or error}") from error
    except OSError as error:
        raise StorageError(f"{uri}: {error}") from error


_BUSY = (errno.EMFILE, errno.ENFILE)


def _read_through(path: str, error: OSError) -> None:
    """Raise OSError if a local file cannot be read: then it was not its content that libav failed on."""
    if error.errno in _BUSY:
        raise OSError(error.errno, error.strerror)
    with open(path, "rb") as file:
        while file.read(1 << 20):
            pass


class _Watched:
    """A file that remembers why it could not be read, and ends there, as libav would have it."""

    def __init__(self, handle: pa.NativeFile) -> None:
        self.fault: OSError | None = None
        self._handle = handle

    def read(self, size: int) -> bytes:
        if self.fault is None:
            try:
                return bytes(self._handle.read(size))
            except OSError as error:
                self.fault = error
        return b""

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._handle.seek(offset, whence))

    def tell(self) -> int:
        return int(self._handle.tell())

    def seekable(self) -> bool:
        return True


# Containers that keep an index of keyframes. In others a seek is a guess at a byte position, and the
# timestamps after it may be guesses too.
_INDEXED = ("mov,mp4", "matroska", "avi")


class _SeekMissedError(Exception):
    """No seek landed at or before the wanted time: the file has to be read from its beginning."""


def _frames_near(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    start: float,
    uri: str,
    limits: MediaLimits,
) -> Iterator[tuple[float, av.VideoFrame]] | None:
    """Frames from the keyframe at or before `start` on; None where `start` is the beginning of the file.

    A seek may land too late (leading frames of an open group of pictures cannot be shown, and some indexes
    are wrong) or on a keyframe that leans on earlier frames. Then it is tried again from further back.
    """
    if stream.start_time is None or start < (stream.start_time + 1) * float(stream.time_base):
        return None
    if not container.format.name.startswith(_INDEXED):
        raise _SeekMissedError
    for target in (start, start - 1, start - 4, start - 16):
        try:
            container.seek(max(stream.start_time, int(target / stream.time_base)), stream=stream)
        except av.FFmpegError:
            break
        frames = _frames(container, stream, uri, limits)
        head = next(frames, None)
        if head is None:
            continue
        moment, frame = head
        if frame.dts is not None and moment <= start and not frame.is_corrupt:
            return chain([head], frames)
    raise _SeekMissedError


def _frames(
    container: av.container.InputContainer, stream: av.VideoStream, uri: str, limits: MediaLimits
) -> Iterator[tuple[float, av.VideoFrame]]:
    """(time in seconds, frame) in order of presentation from where the container stands."""
    deadline = time.monotonic() + limits.time_limit
    base, interval = float(stream.time_base), 1 / float(_nominal_rate(stream))
    moment: float | None = None
    for packet in container.demux(stream):
        _check_deadline(deadline, uri, limits)
        for frame in packet.decode():
            tick = _tick(container, frame)
            guess = 0.0 if moment is None else moment + interval
            moment = guess if tick is None else tick * base
            yield moment, frame


def _tick(container: av.container.InputContainer, timed: av.VideoFrame | av.Packet) -> int | None:
    """The presentation time of a frame or packet in ticks of its stream.

    AVI stores decoding times alone, and what libav makes of them for B-frames is not always in order; there
    the decoding time of the packet that brought a frame out is the better clock.
    """
    tick: int | None = timed.pts
    return timed.dts if tick is None or container.format.name == "avi" else tick


def _check_deadline(deadline: float, uri: str, limits: MediaLimits) -> None:
    if time.monotonic() > deadline:
        raise DecodeError("timeout", f"{uri}: not done within {limits.time_limit:g} s")


def _nominal_rate(stream: av.VideoStream) -> Fraction:
    return Fraction(stream.average_rate or stream.guessed_rate or 25)


def _quarter_turns(frame: av.VideoFrame) -> int:
    """Counterclockwise quarter turns that put the frame upright."""
    return round(float(frame.rotation) / 90) % 4


def _square_pixels(frame: av.VideoFrame, stream: av.VideoStream) -> tuple[int, int]:
    aspect = stream.sample_aspect_ratio or 1
    return max(1, round(frame.width * aspect)), frame.height


def _displayed_size(frame: av.VideoFrame, stream: av.VideoStream) -> tuple[int, int]:
    width, height = _square_pixels(frame, stream)
    return (height, width) if _quarter_turns(frame) % 2 else (width, height)

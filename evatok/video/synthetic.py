"""Seeded H.264 videos whose motion is known block by block.

A video has a kind (its label), a scene with more or less detail, and a pace for every temporal block: blocks
that stand still, creep, rush, cut to another scene or drown in grain. So some blocks deserve many tokens,
others few, and the truth is at hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evatok.artifacts import Location
from evatok.video.write import write_mp4

Image = NDArray[np.float32]

BLOCK = 4  # frames per temporal block
FPS = 24.0
TRUTH = "truth.json"

# Motion complexity of a block, from 0 (nothing changes) to 1 (nothing stays).
MOTION = {"still": 0.0, "slow": 0.25, "fast": 0.5, "grain": 0.75, "cut": 1.0}
_SPEED = {"still": 0.0, "slow": 0.02, "fast": 0.12, "grain": 0.02, "cut": 0.02}  # half widths per frame
_PACES = tuple(MOTION)
_TEMPERS = np.array(
    [
        [0.80, 0.15, 0.00, 0.00, 0.05],
        [0.25, 0.55, 0.10, 0.00, 0.10],
        [0.10, 0.20, 0.50, 0.05, 0.15],
        [0.25, 0.20, 0.20, 0.15, 0.20],
    ]
)


@dataclass(frozen=True)
class SyntheticVideo:
    """One written file: `label` is its kind, `motion` the complexity of each temporal block, 0 to 1."""

    name: str
    label: str
    motion: tuple[float, ...]


def write_videos(
    folder: str | Path,
    count: int,
    seed: int,
    *,
    blocks: int = 16,
    size: int = 96,
    group: int = 16,
    texture: bool = True,
) -> list[SyntheticVideo]:
    """Write `count` mp4 files of `blocks` temporal blocks, size x size pixels, and the truth about them.

    The same arguments give the same pictures. `group`: frames per keyframe. `texture`: of the surfaces, in
    some of the scenes. The file `truth.json` comes last: it marks the folder as complete.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    videos = []
    for number in range(count):
        draw = np.random.default_rng((seed, number))
        kind = KINDS[number % len(KINDS)]
        paces = draw.choice(_PACES, size=blocks, p=draw.choice(_TEMPERS))
        name = f"{kind}_{number:05d}.mp4"
        frames = render(kind, paces, size, draw, texture=texture)
        write_mp4(folder / name, frames, FPS, group=group, preset="veryfast")
        videos.append(SyntheticVideo(name, kind, tuple(MOTION[pace] for pace in paces)))
    truth = [asdict(video) for video in videos]
    (folder / TRUTH).write_text(json.dumps(truth, indent=1))
    return videos


def read_truth(folder: Location) -> list[SyntheticVideo]:
    """What `write_videos` left in `folder`. Raises FileNotFoundError where it has not finished."""
    return [
        SyntheticVideo(video["name"], video["label"], tuple(video["motion"]))
        for video in folder.read_json(TRUTH)
    ]


def render(
    kind: str, paces: NDArray[np.str_], size: int, draw: np.random.Generator, *, texture: bool = True
) -> NDArray[np.uint8]:
    """The frames of a video of this kind: uint8 [blocks * BLOCK, size, size, 3]."""
    frames = np.empty((len(paces) * BLOCK, size, size, 3), np.uint8)
    scene = _Scene(kind, size, draw, texture)
    moment = 0.0
    for block, pace in enumerate(paces):
        if pace == "cut":
            scene = _Scene(kind, size, draw, texture)
        for k in range(block * BLOCK, (block + 1) * BLOCK):
            picture = scene.at(moment)
            if pace == "grain":
                picture = picture + draw.normal(0, 0.12, picture.shape).astype(np.float32)
            frames[k] = np.clip(picture * 255, 0, 255)
            moment += _SPEED[str(pace)]
    return frames


class _Scene:
    """A backdrop with texture, and things on it that move with the clock of the scene."""

    def __init__(self, kind: str, size: int, draw: np.random.Generator, texture: bool) -> None:
        self.kind = kind
        axis = np.linspace(-1, 1, size, dtype=np.float32)
        self.y, self.x = np.meshgrid(axis, axis, indexing="ij")
        self.soft = 3.0 / size
        self.colors = draw.uniform(0.05, 0.95, (8, 3)).astype(np.float32)
        detail = draw.choice([0.0, 0.04, 0.12], p=[0.4, 0.35, 0.25])
        self.waves = draw.normal(0, 1, (5, 2)).astype(np.float32) * draw.uniform(3, 14)
        self.phases = draw.uniform(0, 2 * np.pi, 5).astype(np.float32)
        self.detail = np.float32(detail if texture else 0)
        self.things = int(draw.integers(1, 4))
        self.places = draw.uniform(-0.6, 0.6, (24, 2)).astype(np.float32)
        self.ways = draw.normal(0, 1, (24, 2)).astype(np.float32)
        self.ways /= np.linalg.norm(self.ways, axis=1, keepdims=True)
        self.sizes = draw.uniform(0.15, 0.35, 24).astype(np.float32)
        self.turn = float(draw.choice([-1, 1]))
        self.still = self.backdrop()

    def at(self, moment: float) -> Image:
        """The picture at `moment`: float32 [size, size, 3], about 0 to 1."""
        return KINDS_DRAWN[self.kind](self, np.float32(moment))

    def backdrop(self, shift: float = 0.0) -> Image:
        """What lies behind the things, `shift` half widths further to the right."""
        slope = (self.y + 1)[..., None] / 2
        picture = self.colors[0] * (1 - slope) + self.colors[1] * slope
        if self.detail:
            x = self.x + np.float32(shift)
            texture = sum(np.sin(a * x + b * self.y + p) for (a, b), p in zip(self.waves, self.phases))
            picture = picture + self.detail * np.asarray(texture, np.float32)[..., None]
        return np.asarray(picture, np.float32)

    def paint(self, picture: Image, inside: Image, color: int, stripes: Image | None = None) -> None:
        """Lay a thing over the picture; `inside`: distance to its edge, positive within, half widths."""
        cover = np.clip(inside / self.soft + 0.5, 0, 1)
        touched = np.flatnonzero(cover.any(axis=1))
        if not touched.size:
            return
        rows = slice(touched[0], touched[-1] + 1)
        cover = cover[rows, :, None]
        paint = self.colors[color % 8]
        if stripes is not None and self.detail:
            paint = paint + 3 * self.detail * np.sign(np.sin(stripes[rows] * 12))[..., None]
        picture[rows] += (paint - picture[rows]) * cover


def _drift(scene: _Scene, moment: np.float32) -> Image:
    """Discs that fly straight and bounce off the edges."""
    picture = scene.still.copy()
    for k in range(scene.things):
        x, y = _bounced(scene.places[k] + scene.ways[k] * moment)
        distance = np.hypot(scene.x - x, scene.y - y)
        scene.paint(picture, scene.sizes[k] - distance, 2 + k, scene.x - x)
    return picture


def _orbit(scene: _Scene, moment: np.float32) -> Image:
    """Squares that circle the middle."""
    picture = scene.still.copy()
    for k in range(scene.things):
        angle = scene.turn * moment * 2 + k * 2 * np.pi / scene.things
        x, y = 0.55 * np.cos(angle), 0.55 * np.sin(angle)
        distance = np.maximum(np.abs(scene.x - x), np.abs(scene.y - y))
        scene.paint(picture, scene.sizes[k] * 0.8 - distance, 2 + k, scene.y - y)
    return picture


def _spin(scene: _Scene, moment: np.float32) -> Image:
    """A bar, or a cross of bars, that turns on the spot."""
    picture = scene.still.copy()
    for k in range(scene.things):
        angle = scene.turn * moment * 2 + k * np.pi / scene.things
        along = np.cos(angle) * scene.x + np.sin(angle) * scene.y
        across = -np.sin(angle) * scene.x + np.cos(angle) * scene.y
        inside = np.minimum(0.75 - np.abs(along), 0.5 * scene.sizes[0] - np.abs(across))
        scene.paint(picture, inside, 2 + k, along)
    return picture


def _zoom(scene: _Scene, moment: np.float32) -> Image:
    """Rings that grow out of the middle."""
    picture = scene.still.copy()
    rings = np.hypot(scene.x, scene.y) * (2 + 2 * scene.things) - scene.turn * 2 * moment
    inside = (np.abs(rings % 2 - 1) - 0.5) / (2 + 2 * scene.things)
    scene.paint(picture, np.asarray(inside, np.float32), 2, np.arctan2(scene.y, scene.x))
    return picture


def _pan(scene: _Scene, moment: np.float32) -> Image:
    """A camera that pans over a wide backdrop with posts standing in it."""
    shift = float(scene.turn * moment)
    picture = scene.backdrop(shift)
    for k in range(4):
        x = (k + scene.places[k, 0] - shift + 2) % 4 - 2
        inside = np.minimum(scene.sizes[k] * 0.6 - np.abs(scene.x - x), scene.y - scene.places[k, 1])
        scene.paint(picture, inside, 2 + k, scene.y)
    return picture


def _swarm(scene: _Scene, moment: np.float32) -> Image:
    """Many dots, each on its own way."""
    picture = scene.still.copy()
    for k in range(6 * scene.things):
        x, y = _bounced(scene.places[k] + scene.ways[k] * moment)
        scene.paint(picture, scene.sizes[k] * 0.3 - np.hypot(scene.x - x, scene.y - y), 2 + k)
    return picture


def _bounced(place: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(np.abs((place + 0.8) % 3.2 - 1.6) - 0.8, np.float32)


KINDS_DRAWN: dict[str, Callable[[_Scene, np.float32], Image]] = {
    "drift": _drift,
    "orbit": _orbit,
    "spin": _spin,
    "zoom": _zoom,
    "pan": _pan,
    "swarm": _swarm,
}
KINDS = tuple(KINDS_DRAWN)

"""Distances between sets of videos by the features of a frozen network: Frechet distance, precision, recall.

A number is only comparable with numbers of the same network and weights, so its name carries both:
``frechet[i3d@1e67ab2c]``. Only the I3D weights of the field's protocol may be called FVD.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]

NEIGHBOURS = 3
FEWEST_CLIPS = NEIGHBOURS + 1
"""What distance, precision and recall need on both sides."""


class FeatureNetwork(Protocol):
    """Clips, float in [0, 1] [B, C, F, H, W] -> features, float [B, D]. ``name``: as in ``i3d@1e67ab2c``."""

    name: str

    def __call__(self, clips: Tensor) -> Tensor: ...


class I3D:
    """The field's video network: Kinetics-400 I3D as a TorchScript file, logits [B, 400] as features.

    The file is the one that StyleGAN-V and LARP evaluate with; it rescales and resizes by itself.
    """

    def __init__(self, file: Path) -> None:
        self._file = file.read_bytes()  # not the network: TorchScript does not pickle, and workers need it
        self.name = f"i3d@{hashlib.sha256(self._file).hexdigest()[:8]}"
        self._network: torch.jit.ScriptModule | None = None

    def to(self, device: torch.device | str) -> I3D:
        """Load the network there; not picklable from then on."""
        self._network = torch.jit.load(io.BytesIO(self._file), map_location=device).eval()  # type: ignore[no-untyped-call]
        return self

    @torch.no_grad()
    def __call__(self, clips: Tensor) -> Tensor:
        network = self._network or self.to(clips.device)._network
        assert network is not None
        pixels = clips.float().clamp(0, 1) * 255
        features: Tensor = network(pixels, rescale=True, resize=True, return_features=True)
        return features.flatten(1)


@dataclass(frozen=True)
class FeatureStatistics:
    """Count, mean [D] and scatter (sum of outer products about the mean) [D, D] of features, in float64."""

    count: int
    mean: Floats
    scatter: Floats

    @classmethod
    def of(cls, features: Tensor | Floats) -> FeatureStatistics:
        """features: [N, D]."""
        x = np.asarray(features, dtype=np.float64)
        centred = x - x.mean(0)
        return cls(len(x), x.mean(0), centred.T @ centred)

    def __add__(self, other: FeatureStatistics) -> FeatureStatistics:
        """Of both sets together (Chan, Golub and LeVeque): features need not be kept."""
        count = self.count + other.count
        gap = other.mean - self.mean
        mean = self.mean + gap * (other.count / count)
        between = np.outer(gap, gap) * (self.count * other.count / count)
        return FeatureStatistics(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Floats:
        """Unbiased, [D, D]."""
        return self.scatter / (self.count - 1)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of two Gaussians, never negative.

    The trace of the root is that of (A^(1/2) B A^(1/2))^(1/2), which is symmetric: eigenvalues in float64
    stay real where fewer clips than feature dimensions make the covariances singular. Raises ValueError
    for sets of fewer than two.
    """
    if min(a.count, b.count) < 2:
        raise ValueError(f"a Frechet distance needs two or more on both sides, not {a.count} and {b.count}")
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ b.covariance @ root).clip(min=0)).sum()
    gap = a.mean - b.mean
    distance = gap @ gap + np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared
    return max(float(distance), 0.0)


def precision_recall(real: Tensor, generated: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Shares of generated features on the real manifold, and of real ones on the generated manifold.

    real, generated: [N, D]; a manifold is the union of balls about its points that reach their
    ``neighbours``-th nearest (Kynkaanniemi et al. 2019). Needs more than ``neighbours`` points on both sides.
    """
    if min(len(real), len(generated)) <= neighbours:
        raise ValueError(f"{neighbours} neighbours need more than {neighbours} points on both sides")
    return _inside(generated, real, neighbours), _inside(real, generated, neighbours)


def _inside(points: Tensor, manifold: Tensor, neighbours: int, rows: int = 1024) -> float:
    manifold = manifold.double()
    # The nearest neighbour of a point in its own set is itself.
    reach = torch.cat(
        [torch.cdist(part, manifold).kthvalue(neighbours + 1).values for part in torch.split(manifold, rows)]
    )
    inside = [(torch.cdist(part, manifold) <= reach).any(1) for part in torch.split(points.double(), rows)]
    return float(torch.cat(inside).double().mean())

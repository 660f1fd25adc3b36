"""The proxy reward: z-scored quality against z-scored length (paper section 3.2, eq. 3 and 5-8)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from evatok.assignment.space import AssignmentSpace, hashed
from evatok.errors import UserError

HIGHER_IS_BETTER = {
    **dict.fromkeys(("lpips", "lpips-vgg", "lpips-squeeze", "mse", "dssim"), False),
    **dict.fromkeys(("psnr", "ssim"), True),
}


@dataclass(frozen=True)
class RewardWeights:
    """``w_q`` prices quality and ``w_l = 2 - w_q`` prices tokens, both in [0, 2] (paper 4.2; default of 4.3).

    A tensor w_q that broadcasts with the qualities, such as [B, 1], gives every clip its own weight.
    """

    w_q: float | Tensor = 1.2

    def __post_init__(self) -> None:
        lowest, highest = torch.as_tensor(self.w_q).aminmax()
        if not (lowest >= 0 and highest <= 2):
            raise UserError(f"w_q is {self.w_q}: the weight of quality must lie in [0, 2] (w_l = 2 - w_q)")

    @property
    def w_l(self) -> float | Tensor:
        return 2 - self.w_q


@dataclass(frozen=True)
class RewardStatistics:
    """What the z-scores of eq. 6 and 7 subtract and divide by: quality in its own unit, length in tokens."""

    quality_mean: float
    quality_std: float
    length_mean: float
    length_std: float

    @classmethod
    def measure(cls, quality: Iterable[Tensor], space: AssignmentSpace) -> "RewardStatistics":
        """Statistics over all clips and assignments of the reward table, given in parts [n, size] (eq. 6).

        Float64 sums; parts are read once, so a table larger than memory can be streamed. UserError when
        the table holds no finite spread (no clips, or all qualities equal).
        """
        count, total, squares = 0, 0.0, 0.0
        shift: float | None = None
        for part in quality:
            values = part.double()
            if values.numel() == 0:
                continue
            # Shifted sums: LPIPS spreads little around its mean, and the raw squares would cancel.
            shift = float(values.flatten()[0]) if shift is None else shift
            count += values.numel()
            total += float((values - shift).sum())
            squares += float((values - shift).square().sum())
        mean = total / count if count else math.nan
        std = math.sqrt(max(squares / count - mean * mean, 0.0)) if count else math.nan
        if shift is None or not std > 0 or not math.isfinite(std):
            raise UserError(
                f"the reward needs qualities that differ and are finite: {count} values with deviation {std}"
                " were given; score more clips with curate"
            )
        return cls(shift + mean, std, *length_statistics(space))


def length_statistics(space: AssignmentSpace) -> tuple[float, float]:
    """Exact mean and population deviation of the total tokens of a uniform assignment (eq. 7).

    Blocks are independent, so T choices give T times the mean and the variance of one. The paper's space
    gives 793.6 and 349.14.
    """
    count = len(space.choices)
    mean = sum(space.choices) / count
    variance = sum((choice - mean) ** 2 for choice in space.choices) / count
    if variance == 0:
        raise UserError(f"token choices {space.choices} leave nothing to choose: give at least two")
    return space.blocks * mean, math.sqrt(space.blocks * variance)


def reward(
    quality: Tensor, tokens: Tensor, metric: str, weights: RewardWeights, statistics: RewardStatistics
) -> Tensor:
    """Eq. 3: ``w_q * Q - w_l * L`` for quality [...] in the metric's unit and total tokens [...] (broadcast).

    Eq. 6 as printed grows with LPIPS, which is worse; here Q always grows with quality. A stored reward
    table therefore gives the reward under any weights without touching the proxy again:
    ``reward(table, space.totals(), "lpips", RewardWeights(0.8), statistics)``.
    """
    sign = 1 if HIGHER_IS_BETTER[metric] else -1
    q = sign * (quality - statistics.quality_mean) / statistics.quality_std
    length = (tokens - statistics.length_mean) / statistics.length_std
    return weights.w_q * q - weights.w_l * length.to(q.device)


def percentile(rewards: Tensor, chosen: Tensor) -> float:
    """Eq. 8: where the chosen assignments land between the worst (0) and the best (100), in percent.

    rewards: [N, size], the rewards of every assignment of N clips; chosen: int64 [N] indices. The three
    expectations are taken over clips before the ratio, as in the paper.
    """
    rewards = rewards.double()
    worst, best = rewards.amin(-1).mean(), rewards.amax(-1).mean()
    achieved = rewards.gather(-1, chosen.unsqueeze(-1)).mean()
    return float(100 * (achieved - worst) / (best - worst))


def block_loss(values: Tensor, metric: str) -> Tensor:
    """A metric's value on one block -> a loss: 0 for perfect, never negative, additive over blocks."""
    if metric == "psnr":
        return torch.pow(10.0, -values / 10)
    return 1 - values if metric == "ssim" else values


def clip_quality(mean_loss: Tensor, metric: str) -> Tensor:
    """The mean ``block_loss`` of a clip's blocks -> the clip's quality; its PSNR is that of its mean MSE."""
    if metric == "psnr":
        return -10 * mean_loss.clamp(min=1e-12).log10()
    return 1 - mean_loss if metric == "ssim" else mean_loss


def sample_weights(positions: Tensor, seed: int, low: float = 0.4, high: float = 2.0) -> Tensor:
    """Draw w_q uniformly in [low, high]: float32 [B], a pure function of (seed, global sample position).

    positions: int64 [B]. The default range is the sweep of paper 4.2; it trains a conditioned
    router.
    """
    unit = torch.from_numpy((hashed(positions, seed, 1)[:, 0] >> 11) * 2.0**-53).to(torch.float32)
    return (low + (high - low) * unit).to(positions.device)

"""Training the router on a reward table (evatok.md 4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from evatok.artifacts import Location
from evatok.assignment.reward import RewardStatistics, RewardWeights, reward, sample_weights
from evatok.assignment.space import AssignmentSpace
from evatok.assignment.table import RewardRows, RewardTable
from evatok.models.layers import without_autocast
from evatok.models.router import PricedHead, Router, RouterConfig, RouterObjective
from evatok.training.tasks import Batch, Metrics, Modules, Task

EVALUATED = (
    *("loss", "reward", "reward_best", "reward_worst", "reward_fixed", "top1", "top5"),
    *("tokens", "quality", "reward_percentile", "gain"),
)


@dataclass
class RouterTask(Task):
    """Learns from the rewards of all assignments of the clips in ``table``, found by the batch's ``row``.

    ``metric``: the quality that the rewards are made of. A conditioned router is trained under a w_q drawn
    for every clip and evaluated under ``weights``.
    """

    watched = ("reward", "top1")

    router: RouterConfig
    objective: RouterObjective
    table: Location
    metric: str
    weights: RewardWeights
    statistics: RewardStatistics
    seed: int

    @property
    def evaluated(self) -> tuple[str, ...]:
        return EVALUATED

    def build(self, device: torch.device) -> dict[str, nn.Module]:
        found = RewardTable.open(self.table).load([self.metric])
        self._rows, order = found.row.sort()
        self._quality = found.quality[self.metric][order]
        self._totals = AssignmentSpace.of(self.router).totals()
        self._fixed = self._mean_reward(found, self.weights).argmax()
        router = Router(self.router)
        if isinstance(router.head, PricedHead):
            # At w_q = 2 tokens are free, and the reward is twice the quality.
            router.head.expect(self._mean_reward(found, RewardWeights(2.0)) / 2)
        return {"model": router}

    def losses(self, modules: Modules, batch: Batch, step: int) -> Iterator[tuple[str, Tensor, Metrics]]:
        if self.router.conditioned:
            w_q = sample_weights(batch["position"].cpu(), self.seed)
            rewards = self._rewards(batch, RewardWeights(w_q.unsqueeze(1)))
            log_probs = modules["model"](batch["clip"], w_q.to(rewards.device))
        else:
            rewards = self._rewards(batch, self.weights)
            log_probs = modules["model"](batch["clip"])
        loss = self.objective.loss(log_probs, rewards)
        yield "model", loss, {"loss": loss, **self._figures(log_probs.detach(), rewards)}

    @without_autocast
    def evaluate(self, modules: Modules, batch: Batch) -> Metrics:
        """In full precision, as the router is used afterwards."""
        rewards = self._rewards(batch, self.weights)
        w_q = torch.full((len(rewards),), float(self.weights.w_q), device=rewards.device)
        log_probs = modules["model"](batch["clip"], *([w_q] if self.router.conditioned else []))
        chosen = log_probs.argmax(-1).cpu()
        ranked = log_probs.topk(min(5, log_probs.shape[1])).indices
        return {
            **self._figures(log_probs, rewards),
            "loss": self.objective.loss(log_probs, rewards),
            "reward_fixed": rewards[:, self._fixed].mean(),
            "top5": (ranked == rewards.argmax(-1, keepdim=True)).any(-1).float().mean(),
            "tokens": self._totals[chosen].float().mean(),
            "quality": self._quality[self._places(batch)].gather(1, chosen.unsqueeze(1)).mean(),
        }

    def summary(self, means: Mapping[str, float]) -> dict[str, float]:
        """Adds ``reward_percentile`` (eq. 8: the means over clips come before the ratio) and ``gain``.

        ``gain``: the percentile less that of the best fixed assignment of the training clips. It tells what
        looking at the clip brings, so it compares routers of different w_q, whose percentiles do not: where
        tokens cost most, the shortest assignment alone comes close to 100.
        """
        worst, best = means["reward_worst"], means["reward_best"]
        share = (means["reward"] - worst) / (best - worst)
        gain = (means["reward"] - means["reward_fixed"]) / (best - worst)
        return {**means, "reward_percentile": 100 * share, "gain": 100 * gain}

    def export(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        router = Router(self.router)
        router.load_state_dict(weights)
        router.save_pretrained(folder)

    def _rewards(self, batch: Batch, weights: RewardWeights) -> Tensor:
        """Rewards of every assignment, float32 [B, size], on the clips' device."""
        quality = self._quality[self._places(batch)]
        values = reward(quality, self._totals, self.metric, weights, self.statistics)
        return values.float().to(batch["clip"].device)

    def _mean_reward(self, rows: RewardRows, weights: RewardWeights) -> Tensor:
        """Of every assignment over the training clips, [size]."""
        quality = rows.quality[self.metric][torch.tensor([split == "train" for split in rows.split])]
        return reward(quality, self._totals, self.metric, weights, self.statistics).mean(0)

    def _places(self, batch: Batch) -> Tensor:
        """Where the clips stand in the table as it was loaded."""
        rows = batch["row"].cpu()
        places = torch.searchsorted(self._rows, rows).clamp(max=len(self._rows) - 1)
        if not torch.equal(self._rows[places], rows):
            unknown = rows[self._rows[places] != rows].tolist()
            raise RuntimeError(f"the reward table holds no clips with index rows {unknown}")
        return places

    def _figures(self, log_probs: Tensor, rewards: Tensor) -> dict[str, Tensor]:
        chosen = log_probs.argmax(-1)
        return {
            "reward": rewards.gather(-1, chosen.unsqueeze(-1)).mean(),
            "reward_best": rewards.amax(-1).mean(),
            "reward_worst": rewards.amin(-1).mean(),
            "top1": (chosen == rewards.argmax(-1)).float().mean(),
        }

"""What a policy is: a config that maps what is known of some clips to their assignments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from pydantic import Field
from torch import Tensor

from evatok.assignment.reward import RewardStatistics, RewardWeights, clip_quality
from evatok.assignment.search.tree import MEMORY, PrefixTree, leaf_losses
from evatok.assignment.space import AssignmentSpace
from evatok.config import Config
from evatok.errors import UserError
from evatok.metrics.pixels import QualityMetric
from evatok.models.router import Router
from evatok.models.tokenizer import VideoTokenizer

WEIGHTS = (0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
"""The sweep of w_q in paper 4.2."""


@dataclass(frozen=True)
class Sources:
    """What policies draw on; a policy needs only some of it and says what is missing.

    statistics: of ``metric``. training_quality: float [size], the mean quality of every assignment over the
    training rows of the reward table. w_q: weight of quality in the run's rewards. Networks and metric lie on
    the device of the clips.
    """

    space: AssignmentSpace
    tokenizer: VideoTokenizer | None = None
    metric: QualityMetric | None = None
    statistics: RewardStatistics | None = None
    router: Router | None = None
    training_quality: Tensor | None = None
    w_q: float = 1.2
    memory: int = MEMORY

    def to(self, device: torch.device | str) -> Sources:
        """Move networks and metric to the device of the clips, in place and ready for use."""
        for network in (self.tokenizer, self.router, self.metric):
            if network is not None:
                network.to(device).eval()
        return self


@dataclass(frozen=True)
class Evidence:
    """What is known of B clips, as plain tensors on the CPU.

    positions: int64 [B], global sample positions. losses: per depth t float64 [B, m ** (t + 1)], the block
    loss of every node of the prefix tree, NaN where it was not measured. scores: router log-probabilities
    [B, size] by the w_q they were asked at, None for the run's own. change: float [B, T].
    """

    positions: Tensor
    losses: list[Tensor] | None = None
    scores: Mapping[float | None, Tensor] = field(default_factory=dict)
    change: Tensor | None = None

    @staticmethod
    def cat(parts: Sequence[Evidence]) -> Evidence:
        """Join parts that hold the same kinds of evidence."""
        first = parts[0]
        losses = None
        if first.losses is not None:
            losses = [torch.cat(depth) for depth in zip(*(part.losses or [] for part in parts))]
        return Evidence(
            positions=torch.cat([part.positions for part in parts]),
            losses=losses,
            scores={w: torch.cat([part.scores[w] for part in parts]) for w in first.scores},
            change=None
            if first.change is None
            else torch.cat([part.change for part in parts if part.change is not None]),
        )

    def quality(self, metric: str) -> Tensor:
        """Clip quality of every assignment, float64 [B, size]; NaN where a node was not measured."""
        if self.losses is None:
            raise ValueError("this evidence holds no losses: gather it for a policy that measures")
        return clip_quality(leaf_losses(self.losses), metric)


class Assigner(Protocol):
    """A policy with its sources: clips [B, C, F, H, W] -> int64 [B, T] token counts on the CPU.

    positions: int64 [B] global sample positions (0, 1, ... by default), for policies that draw.
    """

    def __call__(self, clips: Tensor, positions: Tensor | None = None) -> Tensor: ...


class BasePolicy(Config):
    """A policy by its settings. Subclasses have a ``kind`` and one field that moves their mean tokens."""

    kind: str
    needs: ClassVar[tuple[str, ...]] = ()
    """The sources that ``assign`` and ``observe`` draw on, by their names in the remedies below."""
    oracle: ClassVar[bool] = False
    """Knows the outcome that it is judged by; a bound for the others, not a rival."""
    weighs: ClassVar[bool] = False
    """Trades quality for tokens as the run's reward does, so that it has a setting of its own."""
    reads_losses: ClassVar[bool] = False
    reads_change: ClassVar[bool] = False

    @property
    def knob(self) -> str:
        """Name of the field that moves the mean tokens."""
        raise NotImplementedError

    @property
    def whole_set(self) -> bool:
        """Assigns the clips of a set jointly, so that the result depends on which clips are in it."""
        return False

    def problems(self, space: AssignmentSpace) -> Iterator[str]:
        """What is wrong with the settings for these assignments, and what is allowed."""
        yield from ()

    def assign(self, evidence: Evidence, sources: Sources) -> Tensor:
        """int64 [B, T] token counts on the CPU, from evidence that was gathered for this policy."""
        raise NotImplementedError

    def sweep(self, sources: Sources) -> list[BasePolicy]:
        """This policy along its knob, from few tokens to many."""
        raise NotImplementedError

    def settled(self, sources: Sources) -> BasePolicy:
        """This policy with the run's own value for what it leaves open."""
        return self

    def score_weights(self, sources: Sources) -> tuple[float | None, ...]:
        """The w_q at which this policy asks the router."""
        return ()

    def measure(self, tree: PrefixTree, sources: Sources) -> None:
        """Evaluate the nodes that ``assign`` reads when this policy works alone."""
        tree.grow_all()

    def require(self, sources: Sources) -> None:
        """Raise UserError where a setting is impossible, or the sources lack what this policy draws on."""
        for problem in self.problems(sources.space):
            raise UserError(f"policy {self.kind}: {problem}")
        for name in self.missing(sources):
            raise UserError(f"policy {self.kind}: there is no {name} here; {_REMEDY[name]}")

    def missing(self, sources: Sources) -> list[str]:
        """Names of the sources that this policy draws on and that are not there."""
        there = {
            "proxy": sources.tokenizer is not None and sources.metric is not None,
            "router": sources.router is not None,
            "training table": sources.training_quality is not None,
            "statistics": sources.statistics is not None,
        }
        return [name for name in self.needs if not there[name]]

    def observe(self, clips: Tensor, positions: Tensor, sources: Sources) -> Evidence:
        """What this policy reads of the clips; measures no more than it needs. UserError as in ``require``.

        clips: [B, C, F, H, W] on the device of the sources' networks; positions: int64 [B].
        """
        self.require(sources)
        return _gather(clips, positions, sources, [self], lambda tree: self.measure(tree, sources))

    def bind(self, sources: Sources) -> Assigner:
        """This policy as a function of clips. UserError as in ``require``."""
        self.require(sources)

        def assign(clips: Tensor, positions: Tensor | None = None) -> Tensor:
            positions = torch.arange(len(clips)) if positions is None else positions
            return self.assign(self.observe(clips, positions, sources), sources)

        return assign


class WeightedPolicy(BasePolicy):
    """Policies that weigh quality against tokens as the reward does."""

    weighs: ClassVar[bool] = True
    w_q: float | None = Field(None, ge=0, le=2, description="reward weight of quality; none: the run's")

    @property
    def knob(self) -> str:
        return "w_q"

    def weights(self, sources: Sources) -> RewardWeights:
        """What the reward is weighed by."""
        return RewardWeights(sources.w_q if self.w_q is None else self.w_q)

    def settled(self, sources: Sources) -> BasePolicy:
        return self if self.w_q is not None else self.model_copy(update={"w_q": sources.w_q})

    def sweep(self, sources: Sources) -> list[BasePolicy]:
        return [self.model_copy(update={"w_q": w_q}) for w_q in WEIGHTS]


_REMEDY = {
    "proxy": "run the proxy stage, or choose a policy that measures nothing",
    "router": "run the router stage, or choose another policy",
    "training table": "run the curate stage, or choose another policy",
    "statistics": "run the curate stage, or choose another policy",
}


def gather(clips: Tensor, positions: Tensor, sources: Sources, policies: Iterable[BasePolicy]) -> Evidence:
    """Everything that ``policies`` read of the clips, each thing once: one whole prefix tree if any needs it.

    clips: [B, C, F, H, W] on the device of the sources' networks; positions: int64 [B].
    """
    policies = list(policies)
    for policy in policies:
        policy.require(sources)
    return _gather(clips, positions, sources, policies, PrefixTree.grow_all)


@torch.no_grad()
def _gather(
    clips: Tensor,
    positions: Tensor,
    sources: Sources,
    policies: Sequence[BasePolicy],
    grow: Callable[[PrefixTree], None],
) -> Evidence:
    losses = change = None
    if any(policy.reads_losses for policy in policies):
        assert sources.tokenizer is not None
        assert sources.metric is not None
        tree = PrefixTree(sources.tokenizer, clips, sources.space, [sources.metric], sources.memory)
        grow(tree)
        losses = [depth.cpu() for depth in tree.losses[sources.metric.name]]
    if any(policy.reads_change for policy in policies):
        change = block_change(clips, sources.space.blocks).cpu()
    weights = {w for policy in policies for w in policy.score_weights(sources)}
    return Evidence(
        positions=positions.cpu(),
        losses=losses,
        scores={w: _router_scores(sources, clips, w) for w in weights},
        change=change,
    )


def _router_scores(sources: Sources, clips: Tensor, w_q: float | None) -> Tensor:
    router = sources.router
    assert router is not None
    if not router.config.conditioned:
        return router(clips).cpu()  # type: ignore[no-any-return]
    asked = sources.w_q if w_q is None else w_q
    return router(clips, torch.full((len(clips),), asked, device=clips.device)).cpu()  # type: ignore[no-any-return]


def block_change(clips: Tensor, blocks: int) -> Tensor:
    """How much each block differs from the one before, mean absolute difference of pixels: float [B, T].

    Nothing precedes the first block, so it counts its difference from its own mean colour.
    """
    pixels = clips.float() / 255 if clips.dtype == torch.uint8 else clips.float()
    parts = pixels.unflatten(2, (blocks, -1)).transpose(1, 2)  # [B, T, C, P, H, W]
    first = parts[:, :1] - parts[:, :1].mean((3, 4, 5), keepdim=True)
    return torch.cat([first, parts[:, 1:] - parts[:, :-1]], 1).abs().flatten(2).mean(2)

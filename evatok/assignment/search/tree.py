"""The prefix tree of block evaluations that all searches walk.

A node is a clip together with the token counts of its first blocks. The proxy is block-causal, so a node's
last block is encoded, decoded and measured once for all assignments that begin with it, and the keys and
values of its earlier blocks are shared. The 625 assignments of four blocks cost 780 nodes instead of 2,500
block evaluations (design.md section 9).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evatok.assignment.reward import block_loss, clip_quality
from evatok.assignment.space import AssignmentSpace
from evatok.errors import UserError
from evatok.metrics.pixels import QualityMetric
from evatok.models.blocks import KvCache
from evatok.models.tokenizer import VideoTokenizer

MEMORY = 4 << 30
"""Default limit in bytes on the keys and values that a search holds."""


@dataclass(frozen=True)
class Nodes:
    """Nodes of one depth, ready to be extended by a block.

    clip, prefix: int64 [N]; prefix is the node's place among the ``m ** depth`` prefixes of its depth, in the
    space's order. The two caches hold the keys and values of the node's blocks; None at the root.
    """

    depth: int
    clip: Tensor
    prefix: Tensor
    encoder: KvCache | None = None
    decoder: KvCache | None = None

    def __len__(self) -> int:
        return self.clip.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the last block's keys and values; those of earlier blocks belong to the ancestors."""
        caches = [cache for cache in (self.encoder, self.decoder) if cache is not None]
        return sum(
            sum(store.counts) * 2 * len(store.keys) * store.keys[0][0].nbytes
            for cache in caches
            for store in cache.blocks[-1]
        )

    def select(self, rows: Tensor) -> Nodes:
        """The nodes at int64 positions [n]; copies no keys or values."""
        encoder = None if self.encoder is None else self.encoder.select(rows)
        decoder = None if self.decoder is None else self.decoder.select(rows)
        return Nodes(self.depth, self.clip[rows], self.prefix[rows], encoder, decoder)

    def split(self, count: int) -> list[Nodes]:
        """Parts of at most ``count`` nodes."""
        return [self.select(rows) for rows in torch.arange(len(self), device=self.clip.device).split(count)]

    @staticmethod
    def cat(parts: Sequence[Nodes]) -> Nodes:
        """Join nodes of the same depth."""
        if len(parts) == 1:
            return parts[0]
        encoders = [part.encoder for part in parts if part.encoder is not None]
        decoders = [part.decoder for part in parts if part.decoder is not None]
        return Nodes(
            parts[0].depth,
            torch.cat([part.clip for part in parts]),
            torch.cat([part.prefix for part in parts]),
            KvCache.cat(encoders) if encoders else None,
            KvCache.cat(decoders) if decoders else None,
        )


class BlockEvaluator:
    """Evaluates nodes of a batch of clips: one more block encoded, decoded and measured.

    clips: uint8 or float in [0, 1], [B, C, F, H, W] on the tokenizer's device.
    """

    def __init__(
        self,
        tokenizer: VideoTokenizer,
        clips: Tensor,
        space: AssignmentSpace,
        metrics: Sequence[QualityMetric],
    ) -> None:
        if not tokenizer.config.causal:
            raise UserError(
                "search needs a block-causal proxy, where no block depends on later ones: train it with"
                " model.causal: true"
            )
        self.tokenizer = tokenizer
        self.space = space
        self.metrics = metrics
        self.device = clips.device
        self.clips = clips.shape[0]
        self.evaluated = 0
        self.memory = tokenizer.prepare(clips)
        blocks = targets(clips, space.blocks).flatten(0, 1)
        self.references = [metric.prepare(blocks) for metric in metrics]

    def root(self) -> Nodes:
        """The empty prefix of every clip."""
        clip = torch.arange(self.clips, device=self.device)
        return Nodes(0, clip, torch.zeros_like(clip))

    def extend(self, nodes: Nodes, choice: int) -> tuple[Nodes, dict[str, Tensor]]:
        """Give the next block choice number ``choice``: the children and their values {metric: [N]}."""
        count = self.space.choices[choice]
        t = nodes.depth
        codes, encoder = self.tokenizer.encode_block(self.memory, t, count, nodes.encoder, nodes.clip)
        pixels, decoder = self.tokenizer.decode_block(codes, t, nodes.decoder)
        block = nodes.clip * self.space.blocks + t
        values = {
            metric.name: metric(pixels.float(), reference.select(block))
            for metric, reference in zip(self.metrics, self.references)
        }
        self.evaluated += len(nodes)
        prefix = nodes.prefix * len(self.space.choices) + choice
        return Nodes(t + 1, nodes.clip, prefix, encoder, decoder), values


class PrefixTree:
    """What is known of the tree of a batch of clips, and the nodes that can be extended next.

    ``losses[metric][t]``: float64 [B, m ** (t + 1)], the block loss of every node of depth t + 1, NaN where
    it was not evaluated. The tree is walked in breadth while its keys and values fit ``memory`` bytes, which
    makes the calls large, and in depth when they do not, which gives memory back.
    """

    def __init__(
        self,
        tokenizer: VideoTokenizer,
        clips: Tensor,
        space: AssignmentSpace,
        metrics: Sequence[QualityMetric],
        memory: int = MEMORY,
    ) -> None:
        self.space = space
        self.evaluator = BlockEvaluator(tokenizer, clips, space, metrics)
        m = len(space.choices)
        shapes = [(clips.shape[0], m ** (t + 1)) for t in range(space.blocks)]
        self.losses = {
            metric.name: [
                torch.full(shape, torch.nan, dtype=torch.float64, device=clips.device) for shape in shapes
            ]
            for metric in metrics
        }
        self._memory = memory
        self._call = nodes_at_once(tokenizer, memory)
        self._held = 0
        self._frontier: list[list[Nodes]] = [[] for _ in range(space.blocks)]
        self._push(self.evaluator.root())

    def grow(self, wanted: Callable[[Nodes], Tensor], *, keep: bool = False) -> None:
        """Evaluate the children that ``wanted(nodes) -> bool [N, m]`` asks for, until none is left.

        ``wanted`` is asked when the nodes are about to be extended, so what was learnt meanwhile counts.
        With ``keep`` the extended nodes stay in the frontier for another call of ``grow``.
        """
        kept = []
        with torch.inference_mode():
            while any(self._frontier):
                nodes = self._pop()
                if keep:
                    kept.append(nodes)
                mask = wanted(nodes).cpu()
                for choice in range(len(self.space.choices)):
                    rows = mask[:, choice].nonzero().squeeze(1)
                    if rows.shape[0]:
                        self._extend(nodes.select(rows.to(nodes.clip.device)), choice)
        for nodes in kept:
            self._push(nodes)

    def grow_all(self) -> None:
        """Evaluate every node."""
        self.grow(lambda nodes: torch.ones(len(nodes), len(self.space.choices), dtype=torch.bool))

    def quality(self, metric: str) -> Tensor:
        """The clip-level quality of every assignment, float32 [B, size]; NaN where a node is missing."""
        return clip_quality(leaf_losses(self.losses[metric]), metric).float()

    def _extend(self, nodes: Nodes, choice: int) -> None:
        children, values = self.evaluator.extend(nodes, choice)
        for metric, value in values.items():
            losses = self.losses[metric][nodes.depth]
            losses[children.clip, children.prefix] = block_loss(value.double(), metric)
        if children.depth < self.space.blocks:
            self._push(children)

    def _push(self, nodes: Nodes) -> None:
        self._frontier[nodes.depth].append(nodes)
        self._held += nodes.nbytes

    def _pop(self) -> Nodes:
        """The nodes of the next call: of one depth, no more than a call may hold."""
        waiting = [depth for depth, parts in enumerate(self._frontier) if parts]
        parts = self._frontier[waiting[0] if self._held < self._memory / 2 else waiting[-1]]
        taken = [parts.pop()]
        while parts and sum(map(len, taken)) + len(parts[-1]) <= self._call:
            taken.append(parts.pop())
        if len(taken[0]) > self._call:
            first, *rest = taken[0].split(self._call)
            parts.extend(reversed(rest))
            taken = [first]
        self._held -= sum(part.nbytes for part in taken)
        return Nodes.cat(taken)


def leaf_losses(losses: Sequence[Tensor]) -> Tensor:
    """Block losses per depth, ``[t]: [B, m ** (t + 1)]`` -> mean loss of every assignment [B, m ** T]."""
    size = losses[-1].shape[1]
    total = torch.zeros_like(losses[-1])
    for loss in losses:
        total += loss.repeat_interleave(size // loss.shape[1], dim=1)
    return total / len(losses)


def targets(clips: Tensor, blocks: int) -> Tensor:
    """Clips [B, C, F, H, W], uint8 or float in [0, 1] -> float blocks [B, T, C, P, H, W] in [0, 1]."""
    pixels = clips.float() / 255 if clips.dtype == torch.uint8 else clips.float()
    parts: Tensor = pixels.unflatten(2, (blocks, -1)).transpose(1, 2)
    return parts


def nodes_at_once(tokenizer: VideoTokenizer, memory: int) -> int:
    """How many nodes to extend at once, so that all their children take a quarter of ``memory`` bytes."""
    config = tokenizer.config
    element = tokenizer.patch_embed.weight.element_size()
    decoder = 2 * element * config.decoder.layers * config.decoder.width
    per_token = 2 * element * config.encoder.layers * config.encoder.width + decoder
    children = sum(count * per_token + config.patches * decoder for count in config.choices)
    # A perceptual metric keeps tens of float32 features per pixel.
    features = 64 * 4 * config.patch[0] * config.size**2
    return max(1, memory // (4 * (children + features)))

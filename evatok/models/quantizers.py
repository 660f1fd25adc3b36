"""Quantizers behind one interface: l2-normalised VQ (the paper's kind), FSQ, LFQ, residual VQ."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, distributed, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable, but the compiler is imported when called
from torch.utils.checkpoint import checkpoint

from evatok.config import Config
from evatok.models.layers import without_autocast

USAGE_STEPS = 100
"""Training steps over which a codebook's usage is measured."""

_CHUNK = 4096
_LFQ_GROUP = 8


ReviveAfter = Annotated[
    int,
    Field(
        ge=0,
        description="optimizer steps without use after which a code moves onto an input, 0: never (ours; the"
        " paper states nothing of the kind)",
    ),
]


class Quantization(NamedTuple):
    """Outcome of quantizing ``[N, dim]``.

    ``codes``: float ``[N, dim]``, straight-through. ``indices``: int64 ``[N]`` (residual VQ ``[N, depth]``).
    ``losses``: terms already weighted, to be added to the training loss as they are. ``metrics``: scalars.
    """

    codes: Tensor
    indices: Tensor
    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]


class VqConfig(Config):
    """Nearest of K unit vectors, trained by gradient with a commitment term (GigaTok's quantizer)."""

    kind: Literal["vq"] = "vq"
    size: int = Field(16384, gt=1, description="codes K; 8,192 for the final UCF+K600 tokenizers (4.1)")
    dim: int = Field(8, gt=0, description="channels of a code (GigaTok; not stated by the paper)")
    commitment: float = Field(0.25, ge=0, description="beta, weight of the commitment term (GigaTok)")
    entropy: float = Field(0.02, ge=0, description="gamma, weight of the entropy term (paper 3.1)")
    temperature: float = Field(0.01, gt=0, description="of the softmax in the entropy term (GigaTok, LARP)")
    revive_after: ReviveAfter = 100


class ResidualVqConfig(Config):
    """``depth`` codebooks, each on what the ones before left over; a token is ``depth`` indices."""

    kind: Literal["residual_vq"] = "residual_vq"
    size: int = Field(1024, gt=1, description="codes of each codebook")
    depth: int = Field(4, gt=0, description="codebooks")
    dim: int = Field(8, gt=0, description="channels of a code")
    commitment: float = Field(0.25, ge=0, description="weight of the commitment term")
    revive_after: ReviveAfter = 100


class FsqConfig(Config):
    """Finite scalar quantization (Mentzer et al., 2309.15505): each channel rounds to one of its levels."""

    kind: Literal["fsq"] = "fsq"
    levels: tuple[Annotated[int, Field(ge=2)], ...] = Field((8, 5, 5, 5), min_length=1)


class LfqConfig(Config):
    """Lookup-free quantization (MAGVIT-v2, 2310.05737): the sign of each channel; 2**bits codes."""

    kind: Literal["lfq"] = "lfq"
    bits: int = Field(14, gt=0, le=24)
    commitment: float = Field(0.25, ge=0, description="weight of the commitment term")
    entropy: float = Field(0.02, ge=0, description="weight of the entropy term")
    temperature: float = Field(0.01, gt=0, description="of the softmax in the entropy term")


QuantizerConfig = Annotated[VqConfig | ResidualVqConfig | FsqConfig | LfqConfig, Field(discriminator="kind")]


class Quantizer(nn.Module):
    """``dim`` channels in and out; ``codebook_size`` distinct indices; ``depth`` indices per token."""

    dim: int
    codebook_size: int
    depth: int = 1

    def forward(self, z: Tensor) -> Quantization:
        """Quantize ``z [N, dim]``; in training mode also with losses, and noted for ``end_step``."""
        raise NotImplementedError

    def end_step(self) -> None:
        """Learn from the forward passes of an optimizer step; every worker calls it, before the update."""

    def assign(self, z: Tensor) -> Tensor:
        """Indices ``[N]`` (or ``[N, depth]``) of ``z [N, dim]``; learns nothing, in bounded memory."""
        raise NotImplementedError

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes ``[N, dim]`` of indices ``[N]`` (or ``[N, depth]``)."""
        raise NotImplementedError


class Codebook(nn.Module):
    """K trained vectors that do not stay unused.

    A code that no training input chose for ``revive_after`` optimizer steps moves onto an input of the
    current step; before the first step all count as unused, so the codebook starts from data. The move is
    kept in a buffer added to the parameter: a sharded or mixed-precision optimizer owns the master copy of
    every parameter and would silently undo a write to it.

    Forward passes ``note`` what they saw; ``learn``, once per optimizer step on every worker, acts on it. So
    nothing but the choice of inputs depends on how a step is cut into micro-batches over workers.
    """

    offset: Tensor
    idle: Tensor
    step: Tensor

    def __init__(self, size: int, dim: int, revive_after: int) -> None:
        super().__init__()
        self.revive_after = revive_after
        self.weight = nn.Parameter(torch.randn(size, dim) * dim**-0.5)
        self.register_buffer("offset", torch.zeros(size, dim))
        # Steps since an input last chose the code; a move does not set it back.
        unused = max(revive_after, USAGE_STEPS)
        self.register_buffer("idle", torch.full((size,), unused, dtype=torch.int32))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._inputs: list[Tensor] = []
        self._used: list[Tensor] = []

    def vectors(self) -> Tensor:
        """All codes, float32 ``[K, dim]``."""
        return self.weight.float() + self.offset.float()

    def chosen(self, indices: Tensor) -> Tensor:
        """Which codes ``indices`` name: bool ``[K]``."""
        return torch.zeros_like(self.idle, dtype=torch.bool).index_fill_(0, indices, True)

    @_disable_dynamo
    @torch.no_grad()
    def note(self, z: Tensor, indices: Tensor) -> None:
        """Remember until the step ends that ``z [N, dim]`` chose ``indices [N]``."""
        if not self._inputs:
            # A copy, because a sharded optimizer takes the parameter away when the forward pass is over.
            self._weight = self.weight.detach().float().clone()
        self._inputs.append(z.detach())
        self._used.append(self.chosen(indices))

    @torch.no_grad()
    def learn(self) -> None:
        """Note which codes the step's inputs chose, over all workers, and move those idle for too long."""
        if not self._inputs:
            return
        z, weight = torch.cat(self._inputs), self._weight
        used = torch.stack(self._used).any(0).int()
        self._inputs, self._used = [], []
        del self._weight
        workers, rank = _world()
        if workers > 1:
            distributed.all_reduce(used, distributed.ReduceOp.MAX)
        self.idle.add_(1).masked_fill_(used.bool(), 0)
        if self.revive_after:
            due = (self.idle % self.revive_after == 0) | (self.step == 0)
            self._move(due & (self.idle > 0), z, weight, workers, rank)
        self.step.add_(1)

    def _move(self, dead: Tensor, z: Tensor, weight: Tensor, workers: int, rank: int) -> None:
        size, count = weight.shape[0], z.shape[0]
        # Evenly spaced inputs, another set every step: no random draw, so a resumed run repeats it.
        place = dead.cumsum(0) - 1
        rows = (place * count // dead.sum().clamp(min=1) + self.step * 7919) % count
        candidates = torch.where(z.isfinite().all(), z[rows], weight + self.offset.float())
        if workers > 1:
            mine = torch.arange(size, device=z.device) % workers == rank
            candidates = candidates * mine[:, None]
            distributed.all_reduce(candidates)
        # The weight, random at first, tells apart codes that landed on the same input.
        moved = candidates + 0.01 * weight - weight
        self.offset.copy_(torch.where(dead[:, None], moved, self.offset.float()))


class VectorQuantizer(Quantizer):
    """l2-normalised VQ: inputs and codes on the unit sphere, the nearest by cosine (evatok.md 1.3)."""

    def __init__(self, config: VqConfig) -> None:
        super().__init__()
        self.config = config
        self.dim, self.codebook_size = config.dim, config.size
        self.codebook = Codebook(config.size, config.dim, config.revive_after)

    @without_autocast
    def forward(self, z: Tensor) -> Quantization:
        unit, vectors = F.normalize(z.float(), dim=-1), self._vectors()
        indices = nearest(unit, vectors)
        codes = vectors[indices]
        losses = {}
        if self.training:
            if self.config.entropy:
                penalty = entropy_penalty(unit, vectors, self.config.temperature)
                losses["entropy"] = self.config.entropy * penalty
            losses["vq"] = F.mse_loss(codes, unit.detach())
            losses["commitment"] = self.config.commitment * F.mse_loss(unit, codes.detach())
            self.codebook.note(unit, indices)
        metrics = codebook_metrics([self.codebook], indices)
        return Quantization(unit + (codes - unit).detach(), indices, losses, metrics)

    def end_step(self) -> None:
        self.codebook.learn()

    @without_autocast
    def assign(self, z: Tensor) -> Tensor:
        return nearest(F.normalize(z.float(), dim=-1), self._vectors())

    def lookup(self, indices: Tensor) -> Tensor:
        return self._vectors()[indices]

    def _vectors(self) -> Tensor:
        return F.normalize(self.codebook.vectors(), dim=-1)


class ResidualVectorQuantizer(Quantizer):
    """A chain of Euclidean codebooks; the code is the sum of one vector from each."""

    def __init__(self, config: ResidualVqConfig) -> None:
        super().__init__()
        self.config = config
        self.dim, self.codebook_size, self.depth = config.dim, config.size, config.depth
        codebooks = [Codebook(config.size, config.dim, config.revive_after) for _ in range(config.depth)]
        self.codebooks = cast("list[Codebook]", nn.ModuleList(codebooks))

    @without_autocast
    def forward(self, z: Tensor) -> Quantization:
        z = z.float()
        indices, codes = self._chain(z)
        total = codes.sum(1)
        losses = {}
        if self.training:
            targets = z[:, None] - codes.detach().cumsum(1) + codes.detach()  # what each codebook was given
            losses["vq"] = F.mse_loss(codes, targets.detach()) * self.depth
            losses["commitment"] = self.config.commitment * F.mse_loss(z, total.detach())
            for codebook, rest, chosen in zip(self.codebooks, targets.unbind(1), indices.unbind(1)):
                codebook.note(rest, chosen)
        metrics = codebook_metrics(self.codebooks, indices)
        return Quantization(z + (total - z).detach(), indices, losses, metrics)

    def end_step(self) -> None:
        for codebook in self.codebooks:
            codebook.learn()

    @without_autocast
    def assign(self, z: Tensor) -> Tensor:
        return self._chain(z.float())[0]

    def lookup(self, indices: Tensor) -> Tensor:
        codes = [codebook.vectors()[indices[..., i]] for i, codebook in enumerate(self.codebooks)]
        return torch.stack(codes).sum(0)

    def _chain(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Indices ``[N, depth]`` and every codebook's vector ``[N, depth, dim]``."""
        rest, indices, codes = z.detach(), [], []
        for codebook in self.codebooks:
            vectors = codebook.vectors()
            indices.append(nearest(rest, vectors))
            codes.append(vectors[indices[-1]])
            rest = rest - codes[-1].detach()
        return torch.stack(indices, 1), torch.stack(codes, 1)


class FiniteScalarQuantizer(Quantizer):
    """FSQ: a bounded channel rounds to one of its levels, evenly spaced in [-1, 1]; nothing to learn."""

    levels: Tensor
    bases: Tensor

    def __init__(self, config: FsqConfig) -> None:
        super().__init__()
        self.dim, self.codebook_size = len(config.levels), math.prod(config.levels)
        bases = [math.prod(config.levels[:i]) for i in range(self.dim)]
        self.register_buffer("levels", torch.tensor(config.levels), persistent=False)
        self.register_buffer("bases", torch.tensor(bases), persistent=False)

    @without_autocast
    def forward(self, z: Tensor) -> Quantization:
        position = self._position(z)
        indices = self._index(position)
        codes = (position + (position.round() - position).detach()) / (self.levels - 1) * 2 - 1
        return Quantization(codes, indices, {}, histogram_metrics(indices, self.codebook_size))

    @without_autocast
    def assign(self, z: Tensor) -> Tensor:
        return self._index(self._position(z))

    def lookup(self, indices: Tensor) -> Tensor:
        digits = indices[..., None] // self.bases % self.levels
        return digits / (self.levels - 1) * 2 - 1

    def _position(self, z: Tensor) -> Tensor:
        return (z.float().tanh() + 1) / 2 * (self.levels - 1)

    def _index(self, position: Tensor) -> Tensor:
        # What is not a number gets some code: the loss is not finite either, and the step is skipped.
        return (position.nan_to_num().round().long() * self.bases).sum(-1)


class LookupFreeQuantizer(Quantizer):
    """LFQ: each channel's sign, scaled to a unit vector; MAGVIT-v2's entropy and commitment terms."""

    bases: Tensor

    def __init__(self, config: LfqConfig) -> None:
        super().__init__()
        self.config = config
        self.dim, self.codebook_size = config.bits, 2**config.bits
        self.register_buffer("bases", 2 ** torch.arange(config.bits), persistent=False)

    @without_autocast
    def forward(self, z: Tensor) -> Quantization:
        unit = F.normalize(z.float(), dim=-1)
        indices = self.assign(z)
        codes = self.lookup(indices)
        losses = {}
        if self.training:
            losses["commitment"] = self.config.commitment * F.mse_loss(unit, codes)
            if self.config.entropy:
                losses["entropy"] = self.config.entropy * self._entropy(unit)
        metrics = histogram_metrics(indices, self.codebook_size)
        return Quantization(unit + (codes - unit).detach(), indices, losses, metrics)

    def assign(self, z: Tensor) -> Tensor:
        return ((z > 0) * self.bases).sum(-1)

    def lookup(self, indices: Tensor) -> Tensor:
        return self._corners(indices, self.dim)

    def _corners(self, indices: Tensor, bits: int) -> Tensor:
        signs = indices[..., None] // self.bases[:bits] % 2 * 2 - 1
        return signs * float(self.dim**-0.5)

    def _entropy(self, unit: Tensor) -> Tensor:
        """The entropy term over groups of bits: exact per sample, an upper bound for the batch's entropy."""
        total = unit.new_zeros(())
        for part in torch.split(unit, _LFQ_GROUP, dim=-1):
            bits = part.shape[-1]
            corners = self._corners(torch.arange(2**bits, device=unit.device), bits)
            total = total + entropy_penalty(part, corners, self.config.temperature)
        return total


def build_quantizer(config: VqConfig | ResidualVqConfig | FsqConfig | LfqConfig) -> Quantizer:
    """The quantizer that ``config`` describes."""
    if isinstance(config, VqConfig):
        return VectorQuantizer(config)
    if isinstance(config, ResidualVqConfig):
        return ResidualVectorQuantizer(config)
    if isinstance(config, FsqConfig):
        return FiniteScalarQuantizer(config)
    return LookupFreeQuantizer(config)


def entropy_penalty(z: Tensor, vectors: Tensor, temperature: float) -> Tensor:
    """MAGVIT-v2's entropy term of ``z [N, dim]`` softly assigned to ``vectors [K, dim]``.

    The assignment is the softmax of minus the squared distances over ``temperature``, for vectors of one
    length. Mean entropy of a sample's assignment (low: confident) minus the entropy of the mean assignment
    (high: all codes in use); between -log K and log K. Holds part of the ``[N, K]`` table at a time.
    """
    parts = [
        checkpoint(_entropy_sums, part, vectors, temperature, use_reentrant=False, preserve_rng_state=False)
        for part in torch.split(z, _CHUNK)
    ]
    entropy, mass = (torch.stack(sums).sum(0) / len(z) for sums in zip(*parts))
    return entropy + (mass * mass.clamp(min=1e-8).log()).sum()


def _entropy_sums(z: Tensor, vectors: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Summed over the samples: the entropy of the assignment, and the assignment ``[K]``."""
    log_p = (2 * z @ vectors.t() / temperature).log_softmax(-1)
    p = log_p.exp()
    return -(p * log_p).sum(), p.sum(0)


def nearest(z: Tensor, vectors: Tensor) -> Tensor:
    """Indices ``[N]`` of the Euclidean nearest of ``vectors [K, dim]`` to ``z [N, dim]``, part by part."""
    half = vectors.square().sum(-1) / 2
    return torch.cat([(part @ vectors.t() - half).argmax(-1) for part in torch.split(z, _CHUNK)])


def codebook_metrics(codebooks: Iterable[Codebook], indices: Tensor) -> dict[str, Tensor]:
    """Usage (share of codes chosen here or in the last 100 steps, 0..1) and perplexity of this batch (1..K),
    mean over the codebooks. A code that moved onto an input is not in use before an input chooses it."""
    usage, perplexity = [], []
    for codebook, column in zip(codebooks, indices.view(len(indices), -1).unbind(1)):
        used = (codebook.idle < USAGE_STEPS) | codebook.chosen(column)
        usage.append(used.float().mean())
        perplexity.append(_perplexity(column, len(used)))
    return {
        "codebook_usage": torch.stack(usage).mean(),
        "codebook_perplexity": torch.stack(perplexity).mean(),
    }


def histogram_metrics(indices: Tensor, size: int) -> dict[str, Tensor]:
    """Share of codes that this batch uses (0..1) and its perplexity (1..size)."""
    counts = torch.bincount(indices, minlength=size)
    return {
        "codebook_usage": (counts > 0).float().mean(),
        "codebook_perplexity": _perplexity(indices, size),
    }


def _perplexity(indices: Tensor, size: int) -> Tensor:
    share = torch.bincount(indices, minlength=size) / max(indices.numel(), 1)
    return (-(share * share.clamp(min=1e-12).log()).sum()).exp()


def _world() -> tuple[int, int]:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size(), distributed.get_rank()
    return 1, 0

"""The router: a ViT that names a clip's best assignment in one pass (paper 3.3)."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from evatok.config import Config
from evatok.models.layers import TransformerSize, encoder_layer, without_autocast
from evatok.models.patches import centred, patchify
from evatok.models.pretrained import PretrainedModel
from evatok.models.tokenizer import Size

NEUTRAL_WEIGHT = 1.2


class RouterConfig(Config):
    """Shape of a router. The default is the paper's: 19.9 M parameters, one class per assignment."""

    frames: int = Field(16, gt=0, description="frames of a clip")
    size: int = Field(128, gt=0, description="pixels of a clip's side")
    patch: tuple[int, int, int] = Field((4, 8, 8), description="frames, rows and columns of a patch")
    choices: tuple[int, ...] = Field(
        (32, 64, 128, 256, 512), description="token choices of a block, ascending"
    )
    network: Size = Field(TransformerSize.preset("S"), description="preset name, or width, layers, heads")
    head: Literal["classes", "factorised"] = Field(
        "classes", description="one class per assignment, or one choice after the other (for many blocks)"
    )
    conditioned: bool = Field(False, description="takes the reward weight w_q as a second input")

    @model_validator(mode="after")
    def _patches_tile_the_clip(self) -> RouterConfig:
        for name, extent, step in zip(
            ("frames", "size", "size"), (self.frames, self.size, self.size), self.patch
        ):
            if step < 1 or extent % step:
                raise ValueError(f"{name} {extent} is not a multiple of its patch extent {step}")
        return self

    @property
    def blocks(self) -> int:
        """Temporal blocks of a clip."""
        return self.frames // self.patch[0]


class Router(PretrainedModel):
    """Clips -> log-probabilities of all assignments."""

    config: RouterConfig
    config_type = RouterConfig

    def __init__(self, config: RouterConfig) -> None:
        super().__init__(config)
        width = config.network.width
        side = config.size // config.patch[1], config.size // config.patch[2]
        self.patch = nn.Linear(3 * math.prod(config.patch), width)
        self.cls = nn.Parameter(torch.zeros(width))
        self.time_position = nn.Parameter(torch.empty(config.blocks, 1, width))
        self.space_position = nn.Parameter(torch.empty(side[0] * side[1], width))
        self.trunk = nn.TransformerEncoder(
            encoder_layer(config.network),
            config.network.layers,
            nn.LayerNorm(width),
            enable_nested_tensor=False,
        )
        if config.conditioned:
            self.weight = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.head: ClassHead | PricedHead | FactorisedHead
        if config.head == "factorised":
            self.head = FactorisedHead(config)
        else:
            self.head = PricedHead(config) if config.conditioned else ClassHead(config)
        self._initialise()

    def _initialise(self) -> None:
        # TransformerEncoder copies one layer, so every layer starts equal unless it is drawn again.
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def features(self, clips: Tensor, w_q: Tensor | None = None) -> Tensor:
        """The [CLS] feature and the mean patch feature of every block: [B, 1 + T, D].

        clips: uint8 or float in [0, 1], [B, C, F, H, W]; w_q: float [B] in [0, 2], needed exactly when the
        router is conditioned.
        """
        if (w_q is None) == self.config.conditioned:
            raise ValueError("w_q goes with a conditioned router, and only with one")
        patches = patchify(centred(clips), self.config.patch).flatten(2, 3)  # [B, T, h*w, voxels]
        x = self.patch(patches.to(self.patch.weight.dtype)) + self.time_position + self.space_position
        cls = self.cls.expand(len(clips), -1)
        if w_q is not None:
            cls = cls + self.weight((w_q - NEUTRAL_WEIGHT).unsqueeze(1).to(cls.dtype))
        x = self.trunk(torch.cat([cls.unsqueeze(1), x.flatten(1, 2)], 1))
        return torch.cat([x[:, :1], x[:, 1:].unflatten(1, (self.config.blocks, -1)).mean(2)], 1)

    def forward(self, clips: Tensor, w_q: Tensor | None = None) -> Tensor:
        """Log-probabilities float32 [B, m ** T], assignments in the order of ``AssignmentSpace``."""
        return self._score(self.features(clips, w_q), w_q)

    @without_autocast
    def _score(self, features: Tensor, w_q: Tensor | None) -> Tensor:
        features = features.to(self.patch.weight.dtype)
        if isinstance(self.head, PricedHead):
            assert w_q is not None
            return self.head(features, w_q).float()  # type: ignore[no-any-return]
        return self.head(features).float()  # type: ignore[no-any-return]


class ClassHead(nn.Module):
    """The paper's: m ** T classes from the [CLS] feature."""

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        self.classes = nn.Linear(config.network.width, len(config.choices) ** config.blocks)

    def forward(self, features: Tensor) -> Tensor:
        return self.classes(features[:, 0]).log_softmax(-1)  # type: ignore[no-any-return]


class PricedHead(nn.Module):
    """A class per assignment for every trade-off at once: quality from the [CLS] feature, length as it is.

    The logits have the form of the reward they rank by (eq. 3), ``w_q * quality - (2 - w_q) * length``, and
    the z-scored length of every assignment is known. The network adds what it sees in the clip to the mean
    quality that ``expect`` starts it from, so before any training it answers as the best fixed assignment
    does.
    """

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        totals = torch.tensor(config.choices, dtype=torch.float64)
        for _ in range(config.blocks - 1):
            totals = (totals[:, None] + torch.tensor(config.choices)).flatten()
        length = (totals - totals.mean()) / totals.std(unbiased=False).clamp(min=1e-12)
        self.length: Tensor
        self.register_buffer("length", length.float(), persistent=False)
        self.quality = nn.Linear(config.network.width, len(length))
        # One axis, because DeepSpeed sends no parameter without any.
        self.log_sharpness = nn.Parameter(torch.full((1,), 2.3))

    @torch.no_grad()
    def expect(self, quality: Tensor) -> None:
        """Start from the z-scored quality [size] that assignments have in the mean over clips."""
        self.quality.bias.copy_(quality)

    def forward(self, features: Tensor, w_q: Tensor) -> Tensor:
        w_q = w_q.unsqueeze(1)
        rewards = w_q * self.quality(features[:, 0]) - (2 - w_q) * self.length
        scores: Tensor = self.log_sharpness.exp() * rewards
        return scores.log_softmax(-1)


class FactorisedHead(nn.Module):
    """Block after block, each choice given the ones before: m outputs whatever the number of blocks.

    A recurrent cell starts from the [CLS] feature and reads each block's feature with the choice before it.
    """

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        width = config.network.width
        self.choices = len(config.choices)
        self.previous = nn.Embedding(self.choices + 1, width)
        self.cell = nn.GRUCell(width, width)
        self.choice = nn.Linear(width, self.choices)

    def step(self, state: Tensor, feature: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        """state, feature [N, D], previous choice int64 [N] (m: none) -> log-probabilities [N, m], state."""
        state = self.cell(feature + self.previous(previous), state)
        return self.choice(state).log_softmax(-1), state

    def forward(self, features: Tensor) -> Tensor:
        """All m ** T log-probabilities [B, m ** T]; the cell runs once per prefix."""
        batch, blocks = features.shape[0], features.shape[1] - 1
        state = features[:, 0]
        total = features.new_zeros(batch, 1)
        previous = torch.full((batch,), self.choices, device=features.device)
        for t in range(blocks):
            feature = features[:, t + 1].repeat_interleave(self.choices**t, 0)
            log_probs, state = self.step(state, feature, previous)
            total = (total.flatten().unsqueeze(1) + log_probs).view(batch, -1)
            state = state.repeat_interleave(self.choices, 0)
            previous = torch.arange(self.choices, device=features.device).repeat(batch * self.choices**t)
        return total

    def log_likelihood(self, features: Tensor, digits: Tensor) -> Tensor:
        """Log-probability [B] of the choices ``digits`` int64 [B, T], without the table."""
        state, total = features[:, 0], features.new_zeros(len(features))
        previous = torch.full((len(features),), self.choices, device=features.device)
        for feature, digit in zip(features[:, 1:].unbind(1), digits.unbind(1)):
            log_probs, state = self.step(state, feature, previous)
            total = total + log_probs.gather(1, digit.unsqueeze(1)).squeeze(1)
            previous = digit
        return total

    def most_likely(self, features: Tensor, width: int = 8) -> Tensor:
        """The likeliest choices int64 [B, T] that a beam of ``width`` prefixes finds."""
        batch, blocks = features.shape[0], features.shape[1] - 1
        state = features[:, 0].unsqueeze(1)  # [B, n, D]
        scores = features.new_zeros(batch, 1)
        digits = torch.empty(batch, 1, 0, dtype=torch.int64, device=features.device)
        previous = torch.full((batch, 1), self.choices, device=features.device)
        for t in range(blocks):
            feature = features[:, t + 1 : t + 2].expand_as(state)
            log_probs, flat = self.step(state.flatten(0, 1), feature.flatten(0, 1), previous.flatten())
            candidates = (scores.flatten().unsqueeze(1) + log_probs).view(batch, -1)
            scores, place = candidates.topk(min(width, candidates.shape[1]), dim=1)
            parent, previous = place // self.choices, place % self.choices
            rows = torch.arange(batch, device=features.device).unsqueeze(1)
            state = flat.view(batch, -1, flat.shape[-1])[rows, parent]
            digits = torch.cat([digits[rows, parent], previous.unsqueeze(-1)], -1)
        return digits[:, 0]


class RouterObjective(Config):
    """What the router learns from a clip's rewards of all assignments."""

    kind: Literal["hard", "soft", "expected"] = Field(
        "hard",
        description="hard: cross-entropy with the best assignment (paper 3.3); soft: with the softmax of all"
        " rewards; expected: the regret expected under the router's own probabilities",
    )
    temperature: float = Field(0.1, gt=0, description="of the soft targets, in units of reward")

    def loss(self, log_probs: Tensor, rewards: Tensor) -> Tensor:
        """Mean over the batch. log_probs, rewards: [B, size]; ties of the hard target: lowest index."""
        if self.kind == "hard":
            return F.nll_loss(log_probs, rewards.argmax(-1))
        if self.kind == "soft":
            return -(torch.softmax(rewards / self.temperature, -1) * log_probs).sum(-1).mean()
        regret = rewards.amax(-1, keepdim=True) - rewards
        return (log_probs.exp() * regret).sum(-1).mean()

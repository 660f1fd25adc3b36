"""The assignment space: every way to give each temporal block one of the token choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evatok.errors import UserError

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Blocked(Protocol):
    """A tokenizer, a router, or the config of one."""

    @property
    def choices(self) -> tuple[int, ...]: ...

    @property
    def blocks(self) -> int: ...


@dataclass(frozen=True)
class AssignmentSpace:
    """All ``len(choices) ** blocks`` assignments, each with an index (paper 3.2: 5 ** 4 = 625).

    The order is lexicographic in ascending choices with block 0 most significant, so the assignments
    that share their first blocks are neighbours: the nodes of a prefix tree are ranges of indices.
    """

    choices: tuple[int, ...]
    blocks: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", tuple(self.choices))
        if not self.choices or self.choices[0] < 1 or sorted(set(self.choices)) != list(self.choices):
            raise UserError(
                f"token choices {self.choices} are not allowed: give ascending, distinct, positive counts"
            )
        if self.blocks < 1:
            raise UserError(f"{self.blocks} temporal blocks are not allowed: a clip has at least one")

    @classmethod
    def of(cls, model: Blocked) -> AssignmentSpace:
        """Of the choices and blocks of a model."""
        return cls(model.choices, model.blocks)

    @property
    def size(self) -> int:
        """The number of assignments."""
        return int(len(self.choices) ** self.blocks)

    def digits(self, index: Tensor) -> Tensor:
        """index [...] -> which choice each block takes, int64 [..., T] in [0, len(choices))."""
        powers = len(self.choices) ** torch.arange(self.blocks - 1, -1, -1, device=index.device)
        return index.unsqueeze(-1) // powers % len(self.choices)

    def choice_index(self, tokens: Tensor) -> Tensor:
        """Token counts [...] -> positions in ``choices``, int64 [...]; UserError for any other count."""
        choices = torch.tensor(self.choices, device=tokens.device)
        found = torch.searchsorted(choices, tokens.contiguous()).clamp_(max=len(self.choices) - 1)
        if not torch.equal(choices[found], tokens.to(choices.dtype)):
            wrong = sorted(set(tokens[choices[found] != tokens].tolist()))
            raise UserError(f"token counts {wrong} are not among the token choices {self.choices}")
        return found

    def index(self, assignment: Tensor) -> Tensor:
        """Assignment int64 [..., T] of token counts -> index [...]; UserError for any other count."""
        if assignment.shape[-1] != self.blocks:
            raise UserError(
                f"an assignment of {assignment.shape[-1]} blocks was given: this space has {self.blocks}"
            )
        powers = len(self.choices) ** torch.arange(self.blocks - 1, -1, -1, device=assignment.device)
        return (self.choice_index(assignment) * powers).sum(-1)

    def assignment(self, index: Tensor) -> Tensor:
        """index [...] -> assignment int64 [..., T] of token counts."""
        return torch.tensor(self.choices, device=index.device)[self.digits(index)]

    def all(self) -> Tensor:
        """Every assignment in order: int64 [size, T] of token counts."""
        return self.assignment(torch.arange(self.size))

    def totals(self) -> Tensor:
        """Total tokens of every assignment in order: int64 [size]."""
        return self.all().sum(-1)

    def uniforms(self) -> Tensor:
        """The indices of the assignments that give every block the same count, ascending: int64 [m]."""
        return self.index(torch.tensor(self.choices).unsqueeze(1).expand(-1, self.blocks))

    def sample(self, positions: Tensor, seed: int) -> Tensor:
        """Draw uniformly: global sample positions int64 [B] -> assignments [B, T].

        A pure function of (seed, position), so resuming or splitting a batch over other workers draws the
        same assignment for the same clip.
        """
        digits = hashed(positions, seed, self.blocks) % np.uint64(len(self.choices))
        choices = torch.tensor(self.choices, device=positions.device)
        return choices[torch.from_numpy(digits.astype(np.int64)).to(positions.device)]

    def subtree(self, prefix: Sequence[int]) -> range:
        """The indices of all assignments whose first blocks have the token counts ``prefix``."""
        size = self.size
        start = 0
        if len(prefix) > self.blocks:
            raise UserError(f"a prefix of {len(prefix)} blocks was given: this space has {self.blocks}")
        for digit in self.choice_index(torch.tensor(prefix, dtype=torch.int64)).tolist():
            size //= len(self.choices)
            start += digit * size
        return range(start, start + size)


def hashed(positions: Tensor, seed: int, count: int) -> NDArray[np.uint64]:
    """``count`` uniform 64-bit numbers for each position [B], a pure function of (seed, position).

    A counter-based generator: the splitmix64 finaliser over counters spaced by the golden ratio.
    """
    start = np.uint64(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
    own: NDArray[np.uint64] = positions.cpu().numpy().astype(np.uint64)
    draws = np.add.outer(own * np.uint64(count), np.arange(1, count + 1, dtype=np.uint64))
    mixed: NDArray[np.uint64] = start + draws * _GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))

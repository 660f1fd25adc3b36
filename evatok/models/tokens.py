"""Ragged token sequences of a batch of clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from evatok.errors import UserError


@dataclass(frozen=True)
class Tokens:
    """Code indices of B clips, packed.

    ``indices``: int64 ``[N]``, sample by sample, block by block (residual VQ: ``[N, codebooks]``).
    ``lengths``: int64 ``[B, T]``, token count of every block; they sum to N.
    """

    indices: Tensor
    lengths: Tensor

    def __post_init__(self) -> None:
        if int(self.lengths.sum()) != self.indices.shape[0]:
            raise ValueError(
                f"{self.indices.shape[0]} indices for lengths that sum to {int(self.lengths.sum())}"
            )

    def __len__(self) -> int:
        return self.lengths.shape[0]

    def to(self, device: torch.device | str) -> Tokens:
        return Tokens(self.indices.to(device), self.lengths.to(device))

    def to_sequences(self) -> list[list[Tensor]]:
        """Indices per clip and block: B lists of T tensors ``[tokens of the block]``."""
        blocks = torch.split(self.indices, self.lengths.flatten().tolist())
        depth = self.lengths.shape[1]
        return [list(blocks[b * depth : (b + 1) * depth]) for b in range(len(self))]

    @classmethod
    def from_sequences(cls, sequences: Sequence[Sequence[Tensor]]) -> Tokens:
        """The inverse of ``to_sequences``."""
        lengths = torch.tensor([[len(block) for block in clip] for clip in sequences], dtype=torch.int64)
        return cls(torch.cat([block for clip in sequences for block in clip]), lengths)

    @classmethod
    def cat(cls, parts: Sequence[Tokens]) -> Tokens:
        """Batches of clips with equal numbers of blocks, one after the other."""
        return cls(torch.cat([part.indices for part in parts]), torch.cat([part.lengths for part in parts]))

    def save(self, path: str | Path, codebook: str = "", fps: float = 0.0) -> None:
        """Write a safetensors file.

        ``codebook``: what the indices mean, ``VideoTokenizer.codebook``. ``fps``: frames per second of the
        video, 0 where unknown.
        """
        tensors = {"indices": self.indices.contiguous().cpu(), "lengths": self.lengths.contiguous().cpu()}
        save_file(tensors, path, metadata={"codebook": codebook, "fps": f"{fps:.6g}"})

    @classmethod
    def load(cls, path: str | Path, codebook: str = "") -> Tokens:
        """Read what ``save`` wrote.

        Raises UserError if the file is none of ours, or if both codebooks are known and differ.
        """
        try:
            with safe_open(path, framework="pt") as file:
                written = (file.metadata() or {}).get("codebook", "")
                tokens = cls(file.get_tensor("indices"), file.get_tensor("lengths"))
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{path} is not a token file written by `evatok encode`: {error}") from error
        if codebook and written and codebook != written:
            raise UserError(
                f"{path} holds tokens of codebook {written}, but this model's is {codebook}. Use the model"
                " that the tokens were made with, or encode the clips again."
            )
        return tokens


def frame_rate(path: str | Path) -> float:
    """Frames per second of the video whose tokens ``Tokens.save`` wrote; 0 where unknown."""
    with safe_open(path, framework="pt") as file:
        return float((file.metadata() or {}).get("fps", 0))

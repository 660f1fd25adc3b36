"""The token sequence a generator models: ``[class] [len_1] tokens_1 ... [len_T] tokens_T``.

A length token stands before each block and names the block's token count, so no end token is needed
(evatok.md 6). A frame predictor puts the tokens of the given frames after the class token and predicts
everything that follows them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100
"""Target of a place where nothing is predicted (the default of ``torch.nn.functional.cross_entropy``)."""

NO_CLASS = -1
"""Label of a clip without a class; its sequence starts with the null class token."""


@dataclass(frozen=True)
class Vocabulary:
    """Token ids: codes, then length tokens, then classes, then the null class.

    Only codes and length tokens are ever predicted; class tokens are inputs alone.
    """

    codes: int
    choices: tuple[int, ...]
    classes: int

    @property
    def predicted(self) -> int:
        return self.codes + len(self.choices)

    @property
    def null(self) -> int:
        return self.predicted + self.classes

    @property
    def size(self) -> int:
        return self.null + 1

    def class_tokens(self, labels: Tensor) -> Tensor:
        """labels: int64 ``[...]`` in ``[0, classes)`` or ``NO_CLASS``."""
        return torch.where(labels == NO_CLASS, self.null, self.predicted + labels)

    def length_tokens(self, counts: Tensor) -> Tensor:
        """counts: int64 ``[...]``, each one of ``choices``."""
        choices = torch.tensor(self.choices, device=counts.device)
        return self.codes + torch.searchsorted(choices, counts.contiguous())

    def counts(self, length_tokens: Tensor) -> Tensor:
        """The inverse of ``length_tokens``."""
        return torch.tensor(self.choices, device=length_tokens.device)[length_tokens - self.codes]


@dataclass(frozen=True)
class PackedSequences:
    """Sequences laid end to end, without padding.

    tokens, targets, positions: int64 ``[N]``; targets are the next tokens, ``IGNORED`` inside a condition.
    lengths: int64 ``[B]``, the input tokens of each sequence (sum N).
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    lengths: Tensor


def write_sequences(
    vocabulary: Vocabulary, labels: Tensor, indices: Tensor, lengths: Tensor, condition: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Whole sequences, packed.

    labels: int64 ``[B]``. indices: int64 ``[N]`` codes, sample-major then block-major.
    lengths: int64 ``[B, t]`` token counts, t up to T blocks. condition: int64 ``[B, P]`` codes or None.
    Returns tokens int64 ``[M]`` and the sequences' lengths int64 ``[B]`` (sum M).
    """
    prefix = 0 if condition is None else condition.shape[1]
    block_sizes = lengths + 1
    sizes = 1 + prefix + block_sizes.sum(1)
    starts = sizes.cumsum(0) - sizes
    block_starts = starts[:, None] + 1 + prefix + block_sizes.cumsum(1) - block_sizes
    tokens = torch.empty(int(sizes.sum()), dtype=torch.int64, device=indices.device)
    is_code = torch.ones_like(tokens, dtype=torch.bool)
    is_code[starts] = False
    is_code[block_starts.flatten()] = False
    tokens[starts] = vocabulary.class_tokens(labels)
    tokens[block_starts.flatten()] = vocabulary.length_tokens(lengths).flatten()
    if condition is not None:
        places = starts[:, None] + 1 + torch.arange(prefix, device=starts.device)
        is_code[places.flatten()] = False
        tokens[places] = condition
    tokens[is_code] = indices
    return tokens, sizes


def read_sequence(vocabulary: Vocabulary, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int64 ``[N]`` and counts int64 ``[t]`` of one sequence without its class and condition."""
    is_length = tokens >= vocabulary.codes
    return tokens[~is_length], vocabulary.counts(tokens[is_length])


def pack(
    vocabulary: Vocabulary, labels: Tensor, indices: Tensor, lengths: Tensor, condition: Tensor | None = None
) -> PackedSequences:
    """Training inputs and targets of a batch; arguments as in ``write_sequences``."""
    whole, sizes = write_sequences(vocabulary, labels, indices, lengths, condition)
    ends = sizes.cumsum(0)
    is_first = torch.zeros_like(whole, dtype=torch.bool)
    is_last = torch.zeros_like(is_first)
    is_first[ends - sizes] = True
    is_last[ends - 1] = True
    inputs = sizes - 1
    starts = inputs.cumsum(0) - inputs
    total = int(inputs.sum())
    positions = torch.arange(total, device=whole.device) - torch.repeat_interleave(
        starts, inputs, output_size=total
    )
    targets = whole[~is_first]
    if condition is not None:
        targets = targets.masked_fill(positions < condition.shape[1], IGNORED)
    return PackedSequences(whole[~is_last], targets, positions, inputs)

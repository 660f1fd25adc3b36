"""Ragged token sequences."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evatok.errors import UserError
from evatok.models.tokens import Tokens


def some_tokens() -> Tokens:
    return Tokens(torch.arange(10), torch.tensor([[1, 3], [2, 4]]))


@given(st.lists(st.lists(st.integers(1, 5), min_size=2, max_size=2), min_size=1, max_size=4))
def test_sequences_hold_every_index_in_order_and_lead_back(rows: list[list[int]]) -> None:
    lengths = torch.tensor(rows)
    tokens = Tokens(torch.arange(int(lengths.sum())), lengths)
    sequences = tokens.to_sequences()
    assert [[len(block) for block in clip] for clip in sequences] == rows
    back = Tokens.from_sequences(sequences)
    assert torch.equal(back.indices, tokens.indices)
    assert torch.equal(back.lengths, lengths)


def test_batches_are_joined_clip_by_clip() -> None:
    joined = Tokens.cat([some_tokens(), some_tokens()])
    assert len(joined) == 4
    assert joined.indices.tolist() == [*range(10), *range(10)]


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    tokens = Tokens(torch.randint(100, (10, 3)), torch.tensor([[1, 3], [2, 4]]))
    tokens.save(tmp_path / "tokens.safetensors")
    loaded = Tokens.load(tmp_path / "tokens.safetensors")
    assert torch.equal(loaded.indices, tokens.indices)
    assert torch.equal(loaded.lengths, tokens.lengths)


def test_lengths_must_match_the_indices() -> None:
    with pytest.raises(ValueError, match="10 indices for lengths that sum to 9"):
        Tokens(torch.arange(10), torch.tensor([[4, 5]]))


def test_another_file_is_refused_with_a_user_error(tmp_path: Path) -> None:
    path = tmp_path / "tokens.safetensors"
    path.write_bytes(b"not a token file")
    with pytest.raises(UserError, match="is not a token file"):
        Tokens.load(path)
    with pytest.raises(UserError, match="is not a token file"):
        Tokens.load(tmp_path / "missing.safetensors")


def test_tokens_of_another_codebook_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokens.safetensors"
    some_tokens().save(path, codebook="1024@aaaaaaaa")
    Tokens.load(path)
    Tokens.load(path, codebook="1024@aaaaaaaa")
    with pytest.raises(UserError, match=r"1024@aaaaaaaa.*1024@bbbbbbbb"):
        Tokens.load(path, codebook="1024@bbbbbbbb")

"""The token table: encoded clips as the tokens stage leaves them and the generator is trained on.

A folder of Parquet files, one row per encoded clip, and ``vocabulary.json`` that says what the numbers mean.
``pandas.read_parquet(folder)`` reads the rows too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import Field
from torch import Tensor

from evatok.artifacts import Location
from evatok.config import Config, parse
from evatok.errors import UserError
from evatok.models.tokens import Tokens

SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),
        ("row", pa.int64()),  # of the clip index
        ("split", pa.string()),
        ("augmentation", pa.int32()),  # number of the pass over the clips
        ("label", pa.int64()),  # place in TokenVocabulary.labels, -1 for none
        ("indices", pa.list_(pa.int32())),  # codes, block by block
        ("lengths", pa.list_(pa.int32())),  # [T]
        ("condition", pa.list_(pa.int32())),  # codes of the given frames, empty without
    ]
)

ROWS = "table"
VOCABULARY = "vocabulary.json"


class TokenVocabulary(Config):
    """What the numbers of a token table mean."""

    codes: int = Field(gt=0, description="codebook size")
    choices: tuple[int, ...]
    blocks: int = Field(gt=0)
    labels: tuple[str, ...] = ()
    condition: tuple[int, ...] = Field((), description="assignment of the given blocks of a frame predictor")
    known_blocks: int = Field(0, ge=0, description="blocks that the given frames of a frame predictor fill")
    codebook: str = Field("", description="the tokenizer's codebook, as it names itself")


def to_table(
    clips: Sequence[Mapping[str, Any]],
    labels: Sequence[int],
    tokens: Tokens,
    condition: Tensor | None,
    augmentation: int,
) -> pa.Table:
    """Rows of encoded clips. ``clips``: index rows; ``condition``: int64 ``[B, P]`` or None."""
    indices = tokens.indices.to(torch.int32).numpy()
    edges = np.concatenate(([0], tokens.lengths.sum(1).cumsum(0).numpy())).astype(np.int32)
    columns = [
        pa.array([clip["clip_id"] for clip in clips], pa.string()),
        pa.array([clip["row"] for clip in clips], pa.int64()),
        pa.array([clip["split"] for clip in clips], pa.string()),
        pa.array([augmentation] * len(clips), pa.int32()),
        pa.array(labels, pa.int64()),
        pa.ListArray.from_arrays(pa.array(edges), pa.array(indices)),
        pa.array(tokens.lengths.tolist(), pa.list_(pa.int32())),
        pa.array([[]] * len(clips) if condition is None else condition.tolist(), pa.list_(pa.int32())),
    ]
    return pa.table(columns, schema=SCHEMA)


def read_vocabulary(location: Location) -> TokenVocabulary:
    """Of a tokens artifact. Raises UserError where there is none."""
    if not location.exists(VOCABULARY):
        raise UserError(f"{location.uri} holds no token table: run the tokens stage first")
    return parse(location.read_bytes(VOCABULARY), TokenVocabulary, f"{location.uri}/{VOCABULARY}")


def count_rows(location: Location, split: str) -> int:
    """Encoded clips of a split."""
    return len(location.read_table(ROWS, ["split"], pc.field("split") == split))


def mean_tokens(location: Location, split: str) -> float:
    """Codes of an encoded clip, mean over a split."""
    chosen = location.read_table(ROWS, ["lengths"], pc.field("split") == split)
    return float(pc.sum(pc.list_flatten(chosen["lengths"])).as_py() / len(chosen))


def read_rows(location: Location, split: str, columns: Sequence[str]) -> pa.Table:
    """These columns of all encoded clips of one split, in the order of the files, as one chunk.

    The lists have 64-bit offsets: all codes of a split may be more than 2**31. Raises UserError when there
    are no such clips.
    """
    chosen = location.read_table(ROWS, columns, pc.field("split") == split)
    if not len(chosen):
        raise UserError(f"{location.uri} has no encoded clips of the split {split!r}")
    fields = [SCHEMA.field(name) for name in columns]
    large = [f.with_type(pa.large_list(pa.int32())) if pa.types.is_list(f.type) else f for f in fields]
    return chosen.cast(pa.schema(large)).combine_chunks()


def ragged(rows: pa.Table) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    """Columns for ``GenerationTask.collate``: ragged ones as object arrays of int32 arrays."""
    columns: dict[str, np.ndarray[Any, np.dtype[Any]]] = {"label": rows["label"].to_numpy()}
    for name in ("indices", "lengths", "condition"):
        column = np.empty(len(rows), object)
        for place, value in enumerate(rows[name]):
            column[place] = value.values.to_numpy()
        columns[name] = column
    return columns

"""Encoded clips as a stream in the order of training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray

from evatok.artifacts import Location
from evatok.distributed.stream import Columns, ordered_stream
from evatok.training.token_table import ragged, read_rows
from evatok.video.order import ClipOrder


def token_stream(
    tokens: Location, split: str, seed: int, *, start: int, count: int, **blocks: Any
) -> ray.data.Dataset:
    """The encoded clips of a split at positions start, ..., start + count - 1 of their seeded order.

    Rows: label int64; indices, lengths, condition int32, ragged; position int64. The table stands in the
    object store once per node: tokens are three orders of magnitude smaller than the clips they come from.
    ``blocks``: as ``ordered_stream`` takes them.
    """
    rows = read_rows(tokens, split, ["label", "indices", "lengths", "condition"])
    order = ClipOrder(len(rows), seed)
    return ordered_stream(
        order, _TokenFetch(ray.put(rows)), start=start, count=count, name="tokens", **blocks
    )


@dataclass(frozen=True)
class _TokenFetch:
    table: ray.ObjectRef

    def __call__(self, positions: NDArray[np.int64], rows: NDArray[np.int64]) -> Columns:
        table: pa.Table = ray.get(self.table)
        return ragged(table.take(pa.array(rows)))

"""The reward table: per clip, the quality of every assignment, as the curate stage leaves it.

A folder of Parquet files, one row per clip: ``clip_id`` str, ``row`` int64 (of the clip index), ``split``
str, and one fixed-size list [size] per quality metric: the assignments in the order of the space. The
values are float32: rounded to float16, up to 5 % of the best assignments change at w_q 1.6 (128 clips), and
split into byte planes and compressed, five metrics of 625 assignments take 9 kB per clip as they are.
``pandas.read_parquet(folder)`` reads it too.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import torch
from torch import Tensor

from evatok.artifacts import Location
from evatok.errors import UserError


@dataclass(frozen=True)
class RewardRows:
    """Some clips of a reward table. ``row``: int64 [n]; ``quality``: float32 [n, size] per metric."""

    clip_id: list[str]
    row: Tensor
    split: list[str]
    quality: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.clip_id)

    def among(self, row: Tensor) -> "RewardRows":
        """Those of the clips that are at these rows of the clip index."""
        kept = torch.isin(self.row, row)
        return RewardRows(
            [clip for clip, keep in zip(self.clip_id, kept) if keep],
            self.row[kept],
            [split for split, keep in zip(self.split, kept) if keep],
            {metric: quality[kept] for metric, quality in self.quality.items()},
        )


def to_table(rows: RewardRows) -> pa.Table:
    """The rows as they are stored."""
    columns: dict[str, pa.Array] = {
        "clip_id": pa.array(rows.clip_id, pa.string()),
        "row": pa.array(rows.row.numpy(), pa.int64()),
        "split": pa.array(rows.split, pa.string()),
    }
    for metric, quality in rows.quality.items():
        values = pa.array(quality.to(torch.float32).contiguous().numpy().reshape(-1), pa.float32())
        columns[metric] = pa.FixedSizeListArray.from_arrays(values, quality.shape[1])
    return pa.table(columns)


def side_by_side(tables: Sequence[pa.Table]) -> pa.Table:
    """Join stored tables of the same clips, each with the next assignments of the space, into one.

    A clip that one of them lacks, because it could not be decoded that time, is left out.
    """
    shared = set.intersection(*(set(table["row"].to_pylist()) for table in tables))
    kept = [table.filter(pc.is_in(table["row"], pa.array(shared, pa.int64()))) for table in tables]
    parts = [_rows(_batch(table), _metrics(table.schema)) for table in kept]
    first = parts[0]
    joined = {name: torch.cat([part.quality[name] for part in parts], 1) for name in first.quality}
    return to_table(replace(first, quality=joined))


@dataclass(frozen=True)
class RewardTable:
    """A lazy view of a stored reward table, of all clips or of one split, in the order of the files."""

    dataset: pads.Dataset
    only: str | None = None

    @classmethod
    def open(cls, location: Location) -> "RewardTable":
        """Raises UserError when the folder holds no reward table."""
        paths = [f"{location.path}/{name}" for name in location.list() if name.endswith(".parquet")]
        if not paths:
            raise UserError(f"{location.uri} holds no reward table: run the curate stage first")
        return cls(pads.dataset(paths, format="parquet", filesystem=location.fs))

    def select(self, split: str) -> "RewardTable":
        return replace(self, only=split)

    @property
    def metrics(self) -> tuple[str, ...]:
        return _metrics(self.dataset.schema)

    @property
    def size(self) -> int:
        """Assignments per clip."""
        return int(self.dataset.schema.field(self.metrics[0]).type.list_size)

    def __len__(self) -> int:
        return int(self.dataset.count_rows(filter=self._filter()))

    def batches(self, metrics: Sequence[str] | None = None, rows: int = 1024) -> Iterator[RewardRows]:
        """Stream the table, at most ``rows`` clips at a time; only the named metrics are read."""
        chosen = self._checked(metrics)
        columns = ["clip_id", "row", "split", *chosen]
        for batch in self.dataset.to_batches(
            columns=columns, filter=self._filter(), batch_size=rows, batch_readahead=2, fragment_readahead=2
        ):
            if batch.num_rows:
                yield _rows(batch, chosen)

    def load(self, metrics: Sequence[str] | None = None) -> RewardRows:
        """The whole view in memory: 2,500 bytes per clip and metric for 625 assignments."""
        return _joined(self.batches(metrics), dict.fromkeys(self._checked(metrics), self.size))

    def _filter(self) -> pads.Expression | None:
        return None if self.only is None else pads.field("split") == self.only

    def _checked(self, metrics: Sequence[str] | None) -> tuple[str, ...]:
        missing = [name for name in metrics or () if name not in self.metrics]
        if missing:
            raise UserError(
                f"the reward table has no metric {missing[0]!r}, only {', '.join(self.metrics)}:"
                " add it to curate.metrics and run curate again"
            )
        return self.metrics if metrics is None else tuple(metrics)


def _metrics(schema: pa.Schema) -> tuple[str, ...]:
    return tuple(field.name for field in schema if pa.types.is_fixed_size_list(field.type))


def _batch(table: pa.Table) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([c.combine_chunks() for c in table.columns], schema=table.schema)


def _rows(batch: pa.RecordBatch, metrics: Sequence[str]) -> RewardRows:
    quality = {}
    for metric in metrics:
        column = batch.column(metric)
        values = torch.from_numpy(column.flatten().to_numpy().copy()).to(torch.float32)
        quality[metric] = values.reshape(batch.num_rows, column.type.list_size)
    row = torch.from_numpy(batch.column("row").to_numpy().copy())
    return RewardRows(batch.column("clip_id").to_pylist(), row, batch.column("split").to_pylist(), quality)


def _joined(parts: Iterable[RewardRows], sizes: Mapping[str, int]) -> RewardRows:
    found = list(parts)
    return RewardRows(
        clip_id=[clip for part in found for clip in part.clip_id],
        row=torch.cat([torch.zeros(0, dtype=torch.int64), *(part.row for part in found)]),
        split=[split for part in found for split in part.split],
        quality={
            metric: torch.cat([torch.zeros(0, size), *(part.quality[metric] for part in found)])
            for metric, size in sizes.items()
        },
    )

import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from evatok.artifacts import Location
from evatok.assignment.table import RewardRows, RewardTable, side_by_side, to_table
from evatok.errors import UserError


def rows(start, count, split="train", size=25):
    values = torch.rand(count, size, generator=torch.Generator().manual_seed(start))
    return RewardRows(
        clip_id=[f"clip{i}" for i in range(start, start + count)],
        row=torch.arange(start, start + count) * 10,
        split=[split] * count,
        quality={"lpips": values, "psnr": 20 + 10 * values},
    )


@pytest.fixture
def folder(tmp_path):
    parts = [rows(0, 5), rows(5, 4), rows(9, 3, "test")]
    for i, part in enumerate(parts):
        pq.write_table(to_table(part), tmp_path / f"{i:04d}.parquet")
    return tmp_path, parts


def test_table_comes_back_as_it_was_written_in_the_order_of_the_files(folder):
    path, parts = folder
    loaded = RewardTable.open(Location.parse(path)).load()
    assert loaded.clip_id == [f"clip{i}" for i in range(12)]
    assert loaded.row.tolist() == [10 * i for i in range(12)]
    for metric in ("lpips", "psnr"):
        assert torch.equal(loaded.quality[metric], torch.cat([part.quality[metric] for part in parts]))


def test_a_split_is_selected_and_counted(folder):
    table = RewardTable.open(Location.parse(folder[0]))
    assert (len(table), len(table.select("train")), len(table.select("test"))) == (12, 9, 3)
    assert table.select("test").load(["lpips"]).clip_id == ["clip9", "clip10", "clip11"]
    assert (table.metrics, table.size) == (("lpips", "psnr"), 25)
    assert len(table.select("val").load()) == 0


def test_streaming_reads_only_the_named_metrics_in_bounded_batches(folder):
    batches = list(RewardTable.open(Location.parse(folder[0])).batches(["psnr"], rows=2))
    assert all(len(batch) <= 2 and set(batch.quality) == {"psnr"} for batch in batches)
    assert sum(map(len, batches)) == 12


def test_pandas_reads_the_folder_in_one_line(folder):
    frame = pd.read_parquet(folder[0])
    assert frame.shape == (12, 5)
    assert np.stack(frame["lpips"]).shape == (12, 25)


def test_parts_of_the_space_join_side_by_side():
    whole = rows(0, 4)
    parts = [
        to_table(
            RewardRows(
                whole.clip_id, whole.row, whole.split, {m: q[:, cut] for m, q in whole.quality.items()}
            )
        )
        for cut in (slice(0, 5), slice(5, 25))
    ]
    assert side_by_side(parts).equals(to_table(whole))
    assert side_by_side([part.slice(0, 0) for part in parts]).schema == to_table(whole).schema


def test_a_clip_that_one_part_lacks_is_left_out():
    first, second = to_table(rows(0, 4)), to_table(rows(0, 4)).slice(1)
    assert side_by_side([first, second])["clip_id"].to_pylist() == rows(1, 3).clip_id


def test_missing_table_or_metric_is_told_to_the_user(folder, tmp_path):
    with pytest.raises(UserError, match="run the curate stage first"):
        RewardTable.open(Location.parse(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"no metric 'ssim', only lpips, psnr.*curate\.metrics"):
        RewardTable.open(Location.parse(folder[0])).load(["ssim"])


def test_reading_a_table_needs_no_ray():
    code = "import sys, evatok.assignment.table; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

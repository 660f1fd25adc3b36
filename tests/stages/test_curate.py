import errno
import os
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from evatok.artifacts import Artifact, Location, Manifest
from evatok.assignment.reward import length_statistics, percentile, reward
from evatok.assignment.search import brute_force
from evatok.assignment.space import AssignmentSpace
from evatok.assignment.table import RewardRows, RewardTable, to_table
from evatok.config import identity
from evatok.errors import UserError
from evatok.experiment import open_experiment
from evatok.metrics.perceptual import load_quality
from evatok.models.tokenizer import TokenizerConfig, VideoTokenizer
from evatok.stages.curate import (
    STAGE,
    CurateConfig,
    Scorer,
    divide,
    draw,
    join_parts,
    load_statistics,
    run,
    score,
    spare_memory,
)
from evatok.stages.fanning import ClipReader
from evatok.stages.stage import Resources, StageContext
from evatok.video.decode import ClipFormat, DecodeError, MediaLimits, decode_clip
from evatok.video.index import REJECTED_SCHEMA, SCHEMA, ClipIndex, write_index
from evatok.video.write import write_video

TINY = TokenizerConfig(
    frames=8,
    size=16,
    choices=(1, 2, 4),
    encoder={"width": 16, "layers": 1, "heads": 2},
    decoder={"width": 16, "layers": 1, "heads": 2},
    latent=8,
    quantizer={"kind": "fsq", "levels": (5, 5, 5)},
    align_layer=1,
)
SPACE = AssignmentSpace(TINY.choices, TINY.blocks)
CONFIG = CurateConfig(
    clips={"train": 20, "test": 4},
    metrics=("dssim", "psnr"),
    reward={"quality": "dssim"},
    clips_per_task=3,
    least_tasks=1,
)


class Watcher:
    def __init__(self):
        self.lines, self.seen = [], []

    def log(self, stage, message):
        self.lines.append(message)

    def progress(self, stage, done, total, unit, figures):
        self.seen.append((done, total, unit, figures))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """An index of 24 clips (clip 5 is no video) and a random proxy, as artifacts."""
    folder = tmp_path_factory.mktemp("sources")
    random = np.random.default_rng(0)
    rows = []
    for i in range(24):
        path = folder / f"{i:02d}.mp4"
        write_video(path, random.integers(0, 255, (3, 8, 32, 32), dtype=np.uint8), 8)
        rows.append(
            {"clip_id": f"c{i:02d}", "uri": str(path), "start": 0.0, "fps": 0.0, "frames": 8, "width": 32}
            | {"height": 32, "split": "test" if i % 6 == 0 else "train"}
        )
    (folder / "05.mp4").write_bytes(b"this is no video")
    places = {name: Location.parse(folder / name) for name in ("index", "proxy")}
    write_index(places["index"], pa.Table.from_pylist(rows, SCHEMA), REJECTED_SCHEMA.empty_table())
    torch.manual_seed(0)
    VideoTokenizer(TINY).save_pretrained(folder / "proxy" / "model")
    manifest = {"state": "done", "config": {}, "fingerprint": "f", "inputs": {}, "versions": {}, "seed": 0}
    now = datetime.now(timezone.utc)
    return {n: Artifact(place, Manifest(stage=n, started=now, **manifest)) for n, place in places.items()}


def context(sources, folder, config=CONFIG, location=None):
    return StageContext(
        stage="curate",
        run_id="test-curate-1",
        location=location or Location.parse(folder),
        inputs=sources,
        config=config,
        experiment=None,
        seed=3,
        resources=Resources(),
        listener=Watcher(),
    )


def expected_quality(sources, row):
    """Brute force on one clip of the index, decoded here."""
    clip = ClipIndex.open(sources["index"].location).take(np.array([row])).to_pylist()[0]
    pixels = decode_clip(clip["uri"], 0.0, ClipFormat(frames=8, size=16))
    proxy = VideoTokenizer.from_pretrained(sources["proxy"].location.local() / "model").eval()
    metrics = [load_quality(name) for name in CONFIG.metrics]
    return brute_force(proxy, torch.from_numpy(pixels[None]), SPACE, metrics)


@pytest.fixture(scope="module")
def curated(ray_cluster, sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("curate")
    where = context(sources, folder)
    return where, run(where)


def test_every_drawn_clip_has_one_row_with_the_brute_force_quality(curated, sources):
    table = RewardTable.open(curated[0].location / "table").load()
    assert sorted(table.clip_id) == [f"c{i:02d}" for i in range(24) if i != 5]
    assert table.split.count("test") == 4
    for row in (0, 17):
        at = table.row.tolist().index(row)
        for metric, values in expected_quality(sources, row).items():
            torch.testing.assert_close(table.quality[metric][at], values[0], atol=1e-4, rtol=1e-4)


def test_a_clip_that_cannot_be_decoded_is_listed_and_ends_nothing(curated):
    rejected = curated[0].location.read_table("rejected.parquet").to_pylist()
    assert len(rejected) == 1
    assert rejected[0]["uri"].endswith("05.mp4")
    assert rejected[0]["code"] == "unreadable"
    assert "c05" in rejected[0]["detail"]
    assert curated[1]["rejected"] == 1
    assert curated[1]["clips"] == 23


def test_statistics_are_those_of_the_training_clips_and_exact_for_length(curated):
    location = curated[0].location
    train = RewardTable.open(location / "table").select("train").load()
    for metric in CONFIG.metrics:
        found = load_statistics(location, metric)
        assert found.quality_mean == pytest.approx(train.quality[metric].double().mean().item())
        assert found.quality_std == pytest.approx(train.quality[metric].double().std(correction=0).item())
        assert (found.length_mean, found.length_std) == length_statistics(SPACE)
    with pytest.raises(UserError, match=r"no metric 'lpips'.*curate\.metrics"):
        load_statistics(location, "lpips")


def test_headlines_judge_constants_of_the_training_clips_on_the_held_out_ones(curated):
    location, headline = curated[0].location, curated[1]
    table = RewardTable.open(location / "table")
    statistics = load_statistics(location, "dssim")
    train, test = (
        reward(
            table.select(split).load().quality["dssim"].double(),
            SPACE.totals(),
            "dssim",
            CONFIG.reward.weights,
            statistics,
        )
        for split in ("train", "test")
    )
    static = train.mean(0).argmax()
    assert headline["static"] == SPACE.assignment(static).tolist()
    assert headline["static_percentile"] == pytest.approx(percentile(test, static.expand(4)))
    assert headline["best_tokens"] == pytest.approx(SPACE.totals()[test.argmax(1)].double().mean().item())


def test_progress_counts_clips_and_assignments(curated):
    done, total, unit, figures = curated[0].listener.seen[-1]
    assert (done, total, unit) == (24, 24, "clips")
    assert figures["assignments_per_second"] > 0
    assert figures["rejected"] == 1


def test_a_rerun_mends_a_damaged_shard_and_computes_nothing_else(curated, sources, tmp_path):
    folder = curated[0].location.local() / "table"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    damaged = sorted(before)[2]
    (folder / damaged).write_bytes(before[damaged][:-1] + b"?")
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    run(curated[0])
    assert {path.name for path in folder.iterdir() if path.stat().st_mtime_ns != times[path.name]} == {
        damaged
    }
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_rerun_with_other_task_sizes_keeps_what_is_finished(curated, sources):
    folder = curated[0].location.local() / "table"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    run(replace(curated[0], config=CONFIG.model_copy(update={"clips_per_task": 5})))
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_few_clips_are_split_by_subtree_into_the_same_table(curated, sources, tmp_path):
    few = CONFIG.model_copy(
        update={"clips": CONFIG.clips.model_copy(update={"train": 5, "test": 1}), "least_tasks": 12}
    )
    run(context(sources, tmp_path, few))
    whole = RewardTable.open(curated[0].location / "table").load()
    split = RewardTable.open(Location.parse(tmp_path) / "table").load()
    assert len(split) >= 5
    same = [whole.clip_id.index(clip) for clip in split.clip_id]
    for metric in CONFIG.metrics:
        torch.testing.assert_close(split.quality[metric], whole.quality[metric][same], atol=1e-5, rtol=1e-5)


class FullDisk(Location):
    def __truediv__(self, name):
        below = super().__truediv__(name)
        return FullDisk(below.fs, below.path, below.uri)

    def write_bytes(self, name, data):
        if name.startswith("00000015"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write_bytes(name, data)


def test_a_full_disk_is_a_clear_message_and_the_rerun_completes(curated, sources, tmp_path):
    place = Location.parse(tmp_path)
    with pytest.raises(RuntimeError, match=r"storage of .*table is full(.|\n)*Free some space"):
        run(context(sources, tmp_path, location=FullDisk(place.fs, place.path, place.uri)))
    run(context(sources, tmp_path))
    again, whole = (
        RewardTable.open(place / "table").load(),
        RewardTable.open(curated[0].location / "table").load(),
    )
    assert again.clip_id == whole.clip_id
    assert all(torch.equal(again.quality[metric], whole.quality[metric]) for metric in CONFIG.metrics)


def test_draw_is_seeded_sorted_and_takes_what_there_is(sources, tmp_path):
    index = ClipIndex.open(sources["index"].location)
    where = context(sources, tmp_path)
    few = CONFIG.clips.model_copy(update={"train": 6})
    rows = draw(index, few, where)
    assert np.array_equal(rows, draw(index, few, where))
    assert sorted(rows[:6].tolist()) == rows[:6].tolist()
    assert rows[6:].tolist() == [0, 6, 12, 18]
    assert not np.array_equal(rows, draw(index, few, replace(where, seed=4)))
    assert len(draw(index, CONFIG.clips.model_copy(update={"train": 1000}), where)) == 24
    assert "fewer than curate.clips.train = 1000" in where.listener.lines[-1]


def test_a_clip_that_one_part_could_not_decode_is_left_out_of_the_joined_table(tmp_path):
    location = Location.parse(tmp_path)
    parts = divide(3, 8, 9, SPACE)
    for number, part in enumerate(parts):
        rows = [row for row in range(part.start, part.stop) if (number, row) not in {(1, 0), (2, 0)}]
        quality = {"psnr": torch.full((len(rows), len(SPACE.subtree(part.prefix))), float(number))}
        table = to_table(
            RewardRows(
                [f"c{row}" for row in rows],
                torch.tensor(rows, dtype=torch.int64),
                ["train"] * len(rows),
                quality,
            )
        )
        location.write_table(f"parts/{part.name}", table)
    join_parts(location, parts)
    joined = RewardTable.open(location / "table").load()
    assert joined.clip_id == ["c1", "c2"]
    assert joined.quality["psnr"].shape == (2, SPACE.size)


class DeadlyReader(ClipReader):
    """Its decoder dies of clip 2 and never comes back from clip 3, as libav may of a file."""

    deaths = 0

    def read(self, rows, form, draw=lambda row: None):
        self._guard = self
        return super().read(rows, form, draw)

    def __call__(self, decode, uri, start, *rest):
        for name, code in (("02.mp4", "crash"), ("03.mp4", "timeout")):
            if uri.endswith(name):
                self.deaths += 1
                raise DecodeError(code, f"{uri}: lost")
        return decode(uri, start, *rest)


def test_a_clip_that_ends_its_decoder_is_noted_and_not_tried_again(sources, tmp_path):
    index = ClipIndex.open(sources["index"].location)
    write_index(
        Location.parse(tmp_path), index.take(np.arange(24)).drop_columns("row"), REJECTED_SCHEMA.empty_table()
    )
    index = ClipIndex.open(Location.parse(tmp_path))
    proxy = VideoTokenizer.from_pretrained(sources["proxy"].location.local() / "model")
    reader = DeadlyReader(index)
    scorer = Scorer(reader, proxy, tuple(load_quality(name) for name in CONFIG.metrics), "cpu", 1 << 30)()
    for _ in range(2):
        output = score((np.arange(1, 5), ()), scorer)
        assert output.table["clip_id"].to_pylist() == ["c01", "c04"]
        assert [item["uri"][-6:] for item in output.rejected] == ["02.mp4", "03.mp4"]
    assert reader.deaths == 2
    assert index.known_bad() == {2, 3}


def test_clips_are_decoded_within_the_limits_of_their_index(sources, tmp_path):
    rows = ClipIndex.open(sources["index"].location).take(np.arange(3)).drop_columns("row")
    limits = MediaLimits(pixels=32 * 32 - 1)
    write_index(Location.parse(tmp_path), rows, REJECTED_SCHEMA.empty_table(), limits=limits)
    reader = ClipReader(ClipIndex.open(Location.parse(tmp_path)))
    found, _, rejected = reader.read(np.arange(3), ClipFormat(frames=8, size=16))
    assert not found
    assert [item["code"] for item in rejected] == ["too_large"] * 3


def test_few_clips_are_divided_into_subtrees_and_many_are_not():
    assert {part.prefix for part in divide(500, 8, 64, SPACE)} == {()}
    few = divide(5, 8, 12, SPACE)
    assert [part.prefix for part in few[:3]] == [(1,), (2,), (4,)]
    assert len(few) == 15
    assert len({part.name for part in few}) == 15


def test_a_task_keeps_half_of_its_part_of_a_gpus_free_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (64 << 30, 80 << 30))
    assert spare_memory("cuda", 1.0) == 32 << 30
    assert spare_memory("cuda", 0.25) == 8 << 30
    assert spare_memory("cpu", 1.0) == 1 << 30


def test_a_limit_on_a_tasks_memory_is_kept(sources):
    proxy = VideoTokenizer.from_pretrained(sources["proxy"].location.local() / "model")
    reader = ClipReader(ClipIndex.open(sources["index"].location))
    assert Scorer(reader, proxy, (), "cpu", 5 << 20)().memory == 5 << 20
    assert Scorer(reader, proxy, (), "cpu")().memory == 1 << 30


def test_a_task_whose_clips_are_all_broken_gives_an_empty_table(sources):
    proxy = VideoTokenizer.from_pretrained(sources["proxy"].location.local() / "model")
    metrics = tuple(load_quality(name) for name in CONFIG.metrics)
    scorer = Scorer(ClipReader(ClipIndex.open(sources["index"].location)), proxy, metrics, "cpu", 1 << 30)
    output = score((np.array([5]), (2,)), scorer())
    assert output.table.num_rows == 0
    assert output.table.schema.field("psnr").type.list_size == 3
    assert output.rejected[0]["code"] == "unreadable"


def test_reward_must_take_a_recorded_metric_and_changes_nothing_that_is_made():
    config = CurateConfig(metrics=("psnr",))
    assert next(iter(STAGE.check(config, None)))[0] == "curate.reward.quality"
    other = CONFIG.model_copy(update={"reward": CONFIG.reward.model_copy(update={"w_q": 0.4})})
    assert identity(other) == identity(CONFIG)


@pytest.mark.parametrize(("frames", "refused"), [(24, False), (32, True)])
def test_more_assignments_than_can_be_scored_are_refused_before_anything_starts(frames, refused):
    model = TokenizerConfig(frames=frames)
    found = dict(STAGE.check(CurateConfig(), SimpleNamespace(proxy=SimpleNamespace(model=model))))
    assert bool(found) == refused
    if refused:
        assert "390,625" in found["proxy.model"]
        assert "20,000" in found["proxy.model"]


def test_pandas_reads_the_table_in_one_line(curated):
    assert len(pd.read_parquet(curated[0].location.local() / "table")) == 23


def test_a_proxy_that_is_not_causal_is_refused_early():
    tiny = Path(__file__).parents[2] / "experiments" / "tiny.yaml"
    with pytest.raises(UserError, match=r"proxy\.model\.causal: is false, but curate"):
        open_experiment(tiny, ["proxy.model.causal=false"])
    assert not open_experiment(tiny, ["tokenizer.model.causal=false"]).tokenizer.model.causal

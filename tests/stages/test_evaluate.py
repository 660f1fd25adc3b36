import json
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from evatok.artifacts import Artifact, Location, Manifest
from evatok.assignment.reward import RewardStatistics, percentile, reward
from evatok.assignment.search import full
from evatok.assignment.space import AssignmentSpace
from evatok.assignment.table import RewardRows, RewardTable, to_table
from evatok.errors import UserError
from evatok.experiment import open_experiment
from evatok.metrics.perceptual import load_quality
from evatok.models.router import Router, RouterConfig
from evatok.models.tokenizer import TokenizerConfig, VideoTokenizer
from evatok.report.page import render
from evatok.stages.curate import CurateConfig, write_statistics
from evatok.stages.evaluate import STAGE, EvaluateConfig, run
from evatok.stages.frechet import FrechetClips, draw
from evatok.stages.stage import Resources, StageContext
from evatok.video.decode import ClipFormat, decode_clip
from evatok.video.index import REJECTED_SCHEMA, SCHEMA, ClipIndex, SourceShare, write_index
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
CURATE = CurateConfig(metrics=("dssim", "psnr"), reward={"quality": "dssim"})
CLIPS, HELD_OUT = 22, 10


class Quiet:
    def log(self, stage, message):
        pass

    def progress(self, stage, done, total, unit, figures):
        pass


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Artifacts of a run before its evaluation: random models, and the proxy's true table of 22 clips."""
    folder = tmp_path_factory.mktemp("inputs")
    run_folder = Location.parse(folder)
    draws = np.random.default_rng(0)
    rows = []
    for i in range(CLIPS):
        path = folder / f"{i:02d}.mp4"
        pixels = draws.integers(0, 255, (3, 8, 4, 4), dtype=np.uint8).repeat(8, 2).repeat(8, 3)
        write_video(path, pixels, 8)
        rows.append(
            {"clip_id": f"c{i:02d}", "uri": str(path), "start": 0.0, "fps": 0.0, "frames": 8, "width": 32}
            | {"height": 32, "split": "test" if i < HELD_OUT else "train", "motion": [0.1, 0.9]}
        )
    write_index(run_folder / "index", pa.Table.from_pylist(rows, SCHEMA), REJECTED_SCHEMA.empty_table())
    torch.manual_seed(0)
    proxy, final = VideoTokenizer(TINY), VideoTokenizer(TINY)
    router = Router(
        RouterConfig(frames=8, size=16, choices=TINY.choices, network={"width": 16, "layers": 1, "heads": 2})
    )
    for name, model in (("proxy", proxy), ("tokenizer", final), ("router", router)):
        model.save_pretrained(folder / name / "model")
    clips = np.stack([decode_clip(row["uri"], 0.0, ClipFormat(frames=8, size=16)) for row in rows])
    metrics = [load_quality(name) for name in CURATE.metrics]
    quality = full(proxy.eval(), torch.from_numpy(clips), SPACE, metrics)
    table = RewardRows([r["clip_id"] for r in rows], torch.arange(CLIPS), [r["split"] for r in rows], quality)
    (run_folder / "curate").write_table("table/0.parquet", to_table(table))
    statistics = {m: RewardStatistics.measure([quality[m][HELD_OUT:]], SPACE) for m in CURATE.metrics}
    write_statistics(run_folder / "curate", statistics, SPACE)
    known = {"state": "done", "config": {}, "fingerprint": "f", "inputs": {}, "versions": {}, "seed": 0}
    now = datetime.now(timezone.utc)
    return {
        name: Artifact(run_folder / name, Manifest(stage=name, started=now, finished=now, **known))
        for name in STAGE.needs(EvaluateConfig())
    }


def context(inputs, folder, **changes):
    return StageContext(
        stage="evaluate",
        run_id="test-evaluate-1",
        location=Location.parse(folder),
        inputs=inputs,
        config=EvaluateConfig(samples=3, **changes),
        experiment=SimpleNamespace(curate=CURATE),
        seed=3,
        resources=Resources(),
        listener=Quiet(),
    )


def one_after_the_other(shards, work, target, *, state, **how):
    """Stands in for ``fan_out``: the same tasks in this process."""
    ready = state()
    for shard in shards:
        target.write_table(shard.name, work(shard.spec, ready).table)


@pytest.fixture(scope="module")
def in_process():
    """A context manager under which the stage needs no Ray."""

    @contextmanager
    def patched():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("evatok.distributed.fanout.fan_out", one_after_the_other)
            yield

    return patched


@pytest.fixture(scope="module")
def evaluated(in_process, inputs, tmp_path_factory):
    where = context(inputs, tmp_path_factory.mktemp("evaluate"))
    with in_process():
        return where.location, run(where)


def rows_of(location, **wanted):
    rows = location.read_table("clips.parquet").to_pylist()
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def test_a_clip_that_changed_since_it_was_curated_is_left_out(in_process, inputs, tmp_path):
    rows = ClipIndex.open(inputs["index"].location).take(np.arange(CLIPS)).drop_columns("row")
    uris = rows["uri"].to_pylist()
    uris[3] = str(tmp_path / "gone.mp4")
    place = Location.parse(tmp_path / "index")
    write_index(place, rows.set_column(1, "uri", pa.array(uris)), REJECTED_SCHEMA.empty_table())
    changed = inputs | {"index": Artifact(place, inputs["index"].manifest)}
    where = context(
        changed, tmp_path / "evaluate", policies=[{"kind": "oracle"}, {"kind": "uniform", "count": 2}]
    )
    with in_process():
        run(where)
    table = where.location.read_table("clips.parquet")
    assert set(table["clip_id"].to_pylist()) == {f"c{i:02d}" for i in range(HELD_OUT) if i != 3}


def test_every_policy_and_setting_has_a_row_for_every_held_out_clip(evaluated):
    location = evaluated[0]
    policies = location.read_json("policies.json")["policies"]
    assert {"uniform", "static", "random", "oracle", "router"} <= set(policies)
    for name, entry in policies.items():
        assert sum(point["headline"] for point in entry["points"]) == 1
        for point in entry["points"]:
            rows = rows_of(location, policy=name, label=point["label"])
            assert [row["clip_id"] for row in rows] == [f"c{i:02d}" for i in range(HELD_OUT)]
            assert point["mean_tokens"] == pytest.approx(np.mean([sum(r["assignment"]) for r in rows]))
            assert point["dssim"] == pytest.approx(np.mean([r["dssim"] for r in rows]))


def test_policies_without_a_setting_of_their_own_are_quoted_nearest_to_the_tokens_of_static(evaluated):
    location = evaluated[0]
    found = location.read_json("policies.json")
    (static,) = {sum(row["assignment"]) for row in rows_of(location, policy="static", headline=True)}
    assert found["budget"] == location.read_json("summary.json")["budget"] == static
    for name in ("uniform", "random", "ilp", "information", "difference", "threshold", "recurrent"):
        points = found["policies"][name]["points"]
        gap = {point["label"]: abs(np.log(point["mean_tokens"] / static)) for point in points}
        (shown,) = (point["label"] for point in points if point["headline"])
        assert gap[shown] == min(gap.values()), name
    for name in ("static", "oracle", "router"):
        (quoted,) = (point for point in found["policies"][name]["points"] if point["headline"])
        assert quoted["knob"] == (0 if name == "router" else CURATE.reward.w_q)


def test_settings_that_are_asked_for_are_quoted_and_two_of_a_kind_are_told_apart(
    in_process, inputs, tmp_path
):
    chosen = [{"kind": "uniform", "count": 4}, {"kind": "uniform", "count": 1}, {"kind": "ilp", "budget": 7}]
    where = context(inputs, tmp_path, policies=chosen)
    with in_process():
        run(where)
    summary = where.location.read_json("summary.json")["policies"]
    tokens = {name: entry["mean_tokens"] for name, entry in summary.items()}
    assert tokens == {"uniform": 8, "uniform-count=1": 2, "ilp": 7}


@pytest.mark.parametrize(
    ("config", "key", "said"),
    [
        ({"sample_policies": ["rooter"]}, "evaluate.sample_policies", "router"),
        ({"frechet": True}, "curate.clips.test", "is 3, but evaluate.frechet needs at least 4"),
        ({"policies": [{"kind": "oracle"}, {"kind": "ilp", "budget": 1}]}, "evaluate.policies.1", "takes, 2"),
    ],
)
def test_policies_that_cannot_be_are_named_before_anything_starts(config, key, said):
    experiment = SimpleNamespace(
        tokenizer=SimpleNamespace(model=TINY), curate=CurateConfig(clips={"test": 3})
    )
    (found,) = STAGE.check(EvaluateConfig(**config), experiment)
    assert found[0] == key
    assert said in found[1]


def test_qualities_are_those_of_reconstructing_with_each_tokenizer(evaluated, inputs):
    metric = load_quality("dssim")
    index = ClipIndex.open(inputs["index"].location)
    for stage, column in (("proxy", "dssim"), ("tokenizer", "final_dssim")):
        model = VideoTokenizer.from_pretrained(inputs[stage].location.local() / "model").eval()
        for row in rows_of(evaluated[0], policy="random", headline=True)[:4]:
            uri = index.take(np.array([int(row["clip_id"][1:])])).to_pylist()[0]["uri"]
            clip = torch.from_numpy(decode_clip(uri, 0.0, ClipFormat(frames=8, size=16)))[None]
            with torch.no_grad():
                decoded = model.decode(model.encode(clip, torch.tensor([row["assignment"]])))
            blocks = [x.unflatten(2, (2, 4)).transpose(1, 2)[0] for x in (decoded, clip.float() / 255)]
            assert row[column] == pytest.approx(float(metric(*blocks).mean()), abs=1e-4)


def test_the_oracle_has_the_best_reward_and_percentiles_are_those_of_equation_8(evaluated, inputs):
    location = evaluated[0]
    table = RewardTable.open(inputs["curate"].location / "table").select("test").load()
    statistics = inputs["curate"].location.read_json("statistics.json")
    known = RewardStatistics(
        statistics["dssim"]["mean"],
        statistics["dssim"]["std"],
        statistics["length"]["mean"],
        statistics["length"]["std"],
    )
    rewards = reward(table.quality["dssim"].double(), SPACE.totals(), "dssim", CURATE.reward.weights, known)
    summary = location.read_json("summary.json")
    assert summary["policies"]["oracle"]["reward_percentile"] == pytest.approx(100)
    for name in ("router", "static", "random"):
        assigned = torch.tensor([r["assignment"] for r in rows_of(location, policy=name, headline=True)])
        expected = percentile(rewards, SPACE.index(assigned))
        assert summary["policies"][name]["reward_percentile"] == pytest.approx(expected)


def test_samples_show_policies_side_by_side_from_the_shortest_to_the_longest(evaluated):
    location = evaluated[0]
    samples = location.read_json("samples.json")
    assert len(samples["clips"]) == 3
    shown = [clip["policies"] for clip in samples["clips"]]
    assert [column["policy"] for column in shown[0]] == ["uniform", "static", "router", "oracle"]
    oracle = [clip[-1]["tokens"] for clip in shown]
    assert oracle == sorted(oracle)
    for clip in samples["clips"]:
        assert clip["motion"] == pytest.approx([0.1, 0.9])
        with av.open(str(location.local() / clip["original"])) as original:
            assert (original.streams.video[0].width, original.streams.video[0].frames) == (128, 8)
        with av.open(str(location.local() / clip["policies"][0]["video"])) as film:
            assert (film.streams.video[0].width, film.streams.video[0].height) == (128, 256)


def test_the_summary_has_the_keys_that_eval_prints(evaluated):
    summary = evaluated[0].read_json("summary.json")
    assert summary["metric"] == "dssim"
    assert summary["clips"] == HELD_OUT
    for entry in summary["policies"].values():
        assert {"reward_percentile", "mean_tokens", "dssim", "psnr"} <= set(entry)
        for reference in ("uniform", "static"):
            saving = entry[f"token_saving_vs_{reference}"]
            assert saving is None or saving["low"] <= saving["value"] <= saving["high"]
    assert json.loads(json.dumps(evaluated[1])) == evaluated[1]


def test_the_report_draws_what_the_stage_leaves(evaluated, inputs, tmp_path):
    folder = Location.parse(tmp_path)
    for name in ("clips.parquet", "policies.json", "summary.json", "samples.json"):
        (folder / "evaluate").write_bytes(name, evaluated[0].read_bytes(name))
    for name in evaluated[0].list("samples"):
        (folder / "evaluate").write_bytes(f"samples/{name}", evaluated[0].read_bytes(f"samples/{name}"))
    page = render(folder)
    for section in ("quality", "strips", "tokens", "router"):
        assert f'<section id="{section}">' in page


class Means(nn.Module):
    """Stands in for I3D's TorchScript file: the mean colour of every frame half."""

    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        return x.mean(dim=[3, 4]).flatten(1)


def test_frechet_distances_carry_the_network_and_its_weights_in_their_name(
    in_process, inputs, tmp_path, monkeypatch
):
    (tmp_path / "i3d").mkdir()
    torch.jit.script(Means()).save(str(tmp_path / "i3d" / "i3d_torchscript.pt"))
    monkeypatch.setenv("EVATOK_WEIGHTS", str(tmp_path))
    where = context(inputs, tmp_path / "evaluate", frechet=True)
    with in_process():
        run(where)
    entry = where.location.read_json("summary.json")["policies"]["uniform"]
    (key,) = (name for name in entry if name.startswith("frechet"))
    assert key.startswith("frechet[i3d@")
    assert entry[key] > 0
    assert 0 <= entry[key.replace("frechet", "precision")] <= 1


def test_a_final_tokenizer_that_is_not_causal_is_scored_like_any_other(in_process, inputs, tmp_path):
    torch.manual_seed(1)
    holistic = VideoTokenizer(TINY.model_copy(update={"causal": False})).eval()
    holistic.save_pretrained(tmp_path / "tokenizer" / "model")
    final = Artifact(Location.parse(tmp_path / "tokenizer"), inputs["tokenizer"].manifest)
    where = context(inputs | {"tokenizer": final}, tmp_path / "evaluate", policies=[{"kind": "static"}])
    with in_process():
        run(replace(where, config=where.config.model_copy(update={"samples": 0})))
    metric = load_quality("dssim")
    row = rows_of(where.location, policy="static", headline=True)[0]
    uri = ClipIndex.open(inputs["index"].location).take(np.array([0])).to_pylist()[0]["uri"]
    clip = torch.from_numpy(decode_clip(uri, 0.0, ClipFormat(frames=8, size=16)))[None]
    decoded = holistic.decode(holistic.encode(clip, torch.tensor([row["assignment"]])))
    blocks = [x.unflatten(2, (2, 4)).transpose(1, 2)[0] for x in (decoded, clip.float() / 255)]
    assert row["final_dssim"] == pytest.approx(float(metric(*blocks).mean()), abs=1e-4)


def test_frechet_distances_may_have_clips_of_their_own(in_process, inputs, tmp_path, monkeypatch):
    (tmp_path / "i3d").mkdir()
    torch.jit.script(Means()).save(str(tmp_path / "i3d" / "i3d_torchscript.pt"))
    monkeypatch.setenv("EVATOK_WEIGHTS", str(tmp_path))
    chosen = ({"kind": "uniform", "count": 2}, {"kind": "router"}, {"kind": "oracle"})
    clips = {"split": "train", "count": 11}
    where = context(inputs, tmp_path / "evaluate", frechet=True, policies=chosen, frechet_clips=clips)
    with in_process():
        run(where)
    found = where.location.read_json("summary.json")["policies"]
    assert found["uniform"]["frechet_clips"] == found["router"]["frechet_clips"] == 11
    assert found["uniform"]["frechet_tokens"] == 4
    assert [any(key.startswith("frechet[") for key in found[name]) for name in found] == [True, True, False]


def test_one_clip_of_each_video_is_drawn_from_the_split_and_the_part(tmp_path):
    folder = Location.parse(tmp_path)
    rows = [
        {"clip_id": str(i), "uri": f"video{i // 4}.mp4", "split": "test" if i >= 20 else "train"}
        for i in range(24)
    ]
    sources = (SourceShare("a", 8, 1.0), SourceShare("b", 16, 1.0))
    write_index(folder, pa.Table.from_pylist(rows, SCHEMA), REJECTED_SCHEMA.empty_table(), sources)
    index = ClipIndex.open(folder)
    drawn = draw(index, FrechetClips(), 0)
    assert (drawn // 4).tolist() == [0, 1, 2, 3, 4]
    assert (draw(index, FrechetClips(part="b"), 0) // 4).tolist() == [2, 3, 4]
    assert draw(index, FrechetClips(one_per_video=False), 0).tolist() == list(range(20))
    assert len({tuple(draw(index, FrechetClips(count=2), seed)) for seed in range(9)}) > 1
    with pytest.raises(UserError, match="has 1 such clips"):
        draw(index, FrechetClips(split="test"), 0)


def test_too_few_held_out_clips_for_a_frechet_distance_are_the_users_to_mend(inputs, tmp_path):
    table = inputs["curate"].location.read_table("table")
    train = pa.compute.equal(table["split"], "train")
    kept = pa.concat_tables([table.filter(train), table.filter(pa.compute.invert(train)).slice(0, 3)])
    folder = Location.parse(tmp_path)
    (folder / "curate").write_table("table/0.parquet", kept)
    changed = {**inputs, "curate": Artifact(folder / "curate", inputs["curate"].manifest)}
    with pytest.raises(UserError, match="at least 4 held-out clips, and curate has 3"):
        run(context(changed, tmp_path / "evaluate", frechet=True))


def test_without_held_out_clips_it_says_what_to_change(inputs, tmp_path):
    table = inputs["curate"].location.read_table("table")
    folder = Location.parse(tmp_path)
    train = table.filter(pa.compute.equal(table["split"], "train"))
    (folder / "curate").write_table("table/0.parquet", train)
    changed = {**inputs, "curate": Artifact(folder / "curate", inputs["curate"].manifest)}
    with pytest.raises(UserError, match=r"curate\.clips\.test"):
        run(context(changed, tmp_path / "evaluate"))


def test_one_worker_and_several_agree_to_the_last_digit(ray_cluster, inputs, tmp_path, monkeypatch):
    found = []
    for workers in (1, 2):
        monkeypatch.setattr("evatok.distributed.fanout._slots", lambda *_, workers=workers: workers)
        where = context(inputs, tmp_path / str(workers))
        run(where)
        found.append(where.location)
    for name in ("summary.json", "policies.json", "samples.json", "clips.parquet"):
        assert found[0].read_bytes(name) == found[1].read_bytes(name)


def test_policies_weigh_as_the_runs_rewards_do(in_process, inputs, tmp_path):
    where = context(inputs, tmp_path)
    dear = CURATE.model_copy(update={"reward": CURATE.reward.model_copy(update={"w_q": 0.5})})
    with in_process():
        run(replace(where, experiment=SimpleNamespace(curate=dear)))
    summary = where.location.read_json("summary.json")
    assert summary["policies"]["oracle"]["reward_percentile"] == pytest.approx(100)
    assert {row["knob"] for row in rows_of(where.location, policy="static", headline=True)} == {0.5}


def test_uniform_is_measured_beside_whatever_is_compared_and_no_sample_needs_a_film(
    in_process, inputs, tmp_path
):
    chosen = ({"kind": "static"}, {"kind": "router"})
    where = context(inputs, tmp_path, policies=chosen)
    with in_process():
        run(replace(where, config=where.config.model_copy(update={"samples": 0})))
    summary = where.location.read_json("summary.json")
    assert set(summary["policies"]) == {"uniform", "static", "router"}
    assert "best_uniform" in summary["headline"]
    assert where.location.read_json("samples.json")["clips"] == []


def test_clips_of_a_part_that_the_source_does_not_have_are_refused_early():
    experiments = Path(__file__).parents[2] / "experiments"
    assert open_experiment(experiments / "ucf101_k600.yaml").evaluate.frechet_clips == FrechetClips(
        part="ucf101"
    )
    assert open_experiment(experiments / "k600_prediction.yaml").evaluate.frechet_clips is None
    with pytest.raises(UserError, match=r"'ucf' is no part of index\.source; there are ucf101, k600"):
        open_experiment(experiments / "ucf101_k600.yaml", ["evaluate.frechet_clips={part: ucf}"])
    with pytest.raises(UserError, match=r"frechet_clips: are used by `frechet`, which is false"):
        open_experiment(experiments / "tiny.yaml", ["evaluate.frechet_clips={}"])

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from evatok.artifacts import Artifact, Location
from evatok.config import parse
from evatok.metrics.frechet import FeatureStatistics, frechet_distance
from evatok.models.generator import Generator, GeneratorConfig
from evatok.models.tokenizer import TokenizerConfig, VideoTokenizer
from evatok.stages.fanning import ClipReader
from evatok.stages.generate import STAGE, GenerateConfig, Producer, _show, distances, produce, take_features
from evatok.stages.stage import Resources, StageContext
from evatok.video.index import REJECTED_SCHEMA, ClipIndex, write_index
from evatok.video.index import SCHEMA as INDEX_SCHEMA
from evatok.video.write import write_video

TINY = TokenizerConfig(
    frames=12,
    size=16,
    choices=(1, 2, 4),
    encoder={"width": 16, "layers": 1, "heads": 2},
    decoder={"width": 16, "layers": 1, "heads": 2},
    latent=8,
    quantizer={"kind": "fsq", "levels": (5, 5, 5)},
    align_layer=1,
)


class MeanColour:
    """Stands for I3D: three features."""

    name = "colour@0"

    def to(self, device):
        return self

    def __call__(self, clips):
        return clips.mean((2, 3, 4))


def producer(condition=None, features=None, reader=None, **config):
    torch.manual_seed(0)
    tokenizer = VideoTokenizer(TINY)
    generator = Generator(
        GeneratorConfig(
            codes=tokenizer.codes,
            choices=TINY.choices,
            blocks=TINY.blocks,
            labels=() if condition is not None else ("a", "b"),
            condition=(4, 1) if condition is not None else (),
            known_blocks=1 if condition is not None else 0,
            codebook=tokenizer.codebook,
            network={"size": {"width": 16, "layers": 1, "heads": 2}},
        )
    )
    return Producer(
        generator=generator,
        tokenizer=tokenizer,
        clips=reader,
        config=parse(str(config), GenerateConfig, "test"),
        features=features,
        condition=condition,
        seed=7,
        device="cpu",
    )()


def test_clips_are_the_same_however_they_are_split_over_tasks():
    maker = producer(shown=2, features=MeanColour())
    whole = produce(np.arange(6), maker).table
    parts = pa.concat_tables(produce(np.arange(start, start + 2), maker).table for start in (0, 2, 4))
    assert whole["label"].to_pylist() == [0, 1] * 3
    assert whole["seed"].to_pylist() == list(range(7, 13))
    for row, other in zip(whole.to_pylist(), parts.to_pylist()):
        assert (row["indices"], row["lengths"]) == (other["indices"], other["lengths"])
        assert np.allclose(row["features"], other["features"], atol=1e-5)
        assert (row["mp4"] is None) == (row["number"] >= 2)


def test_clips_are_sampled_in_the_precision_of_the_config():
    maker = producer(precision="bf16", shown=0)
    assert maker.generator.norm.weight.dtype == torch.bfloat16
    assert len(produce(np.arange(4), maker).table) == 4


def test_stage_generates_in_ray_tasks_and_reports_tokens(ray_cluster, tmp_path):
    maker = producer(clips=6, clips_per_task=4, shown=2)
    for name in ("tokenizer", "generator"):
        getattr(maker, name).save_pretrained(tmp_path / name / "model")
    write_index(Location.parse(tmp_path / "index"), INDEX_SCHEMA.empty_table(), REJECTED_SCHEMA.empty_table())
    context = StageContext(
        stage="generate",
        run_id="generate-test",
        location=Location.parse(tmp_path / "generate"),
        inputs={
            name: Artifact(Location.parse(tmp_path / name), None)
            for name in ("index", "tokenizer", "tokens", "generator")
        },
        config=maker.config,
        experiment=SimpleNamespace(tokens=SimpleNamespace(part=None)),
        seed=7,
        resources=Resources(),
        listener=SimpleNamespace(log=lambda *_: None, progress=lambda *_: None),
    )
    metrics = STAGE.run(context)
    here = produce(np.arange(6), maker).table
    made = context.location.read_table("table")
    assert made["indices"].to_pylist() == here["indices"].to_pylist()
    assert metrics["clips"] == 6
    assert metrics["mean_tokens"] == pytest.approx(np.mean([sum(row) for row in here["lengths"].to_pylist()]))
    assert len(context.location.read_json("samples.json")["clips"]) == 2


def test_budget_and_assignment_hold_in_every_clip():
    lengths = np.stack(produce(np.arange(8), producer(budget=5)).table["lengths"].to_numpy())
    assert lengths.sum(1).max() <= 5
    forced = np.stack(produce(np.arange(8), producer(assignment=[0, 4, 1])).table["lengths"].to_numpy())
    assert (forced[:, 1:] == [4, 1]).all()


def test_frame_predictor_goes_on_from_the_given_frames():
    condition = torch.randint(125, (2, 5))
    table = produce(np.arange(4), producer(condition)).table
    for row in table.to_pylist():
        assert row["indices"][:4] == condition[row["number"] % 2, :4].tolist()
        assert row["lengths"][:2] == [4, 1]


def test_shown_clips_are_listed_for_the_report(tmp_path):
    location = Location.parse(tmp_path)
    _show(location, produce(np.arange(4), producer(shown=3)).table, ("a", "b"))
    clips = location.read_json("samples.json")["clips"]
    assert [clip["title"] for clip in clips] == ["a", "b", "a"]
    assert all(location.read_bytes(clip["video"])[4:8] == b"ftyp" for clip in clips)
    assert all(sum(clip["assignment"]) == clip["tokens"] for clip in clips)


def test_features_of_real_clips_do_without_those_that_cannot_be_decoded(tmp_path):
    folder, rows = Location.parse(tmp_path), []
    for number in range(3):
        path = tmp_path / f"{number}.mp4"
        write_video(path, np.full((3, 12, 16, 16), 80 * number, np.uint8), 8)
        rows.append({"clip_id": f"c{number}", "uri": str(path), "start": 0.0, "fps": 0.0, "frames": 12})
    (tmp_path / "1.mp4").write_text("no video")
    write_index(folder, pa.Table.from_pylist(rows, INDEX_SCHEMA), REJECTED_SCHEMA.empty_table())
    maker = producer(features=MeanColour(), reader=ClipReader(ClipIndex.open(folder)))
    output = take_features(np.array([2, 1, 0]), maker)
    assert np.allclose(np.stack(output.table["features"].to_numpy()).mean(1), [160 / 255, 0], atol=0.03)
    assert [(item["uri"][-5:], item["code"]) for item in output.rejected] == [("1.mp4", "unreadable")]


def test_distance_is_named_after_its_network(tmp_path):
    location = Location.parse(tmp_path)
    maker = producer(features=MeanColour())
    first, second = produce(np.arange(8), maker).table, produce(np.arange(8, 16), maker).table
    location.write_table("table/0.parquet", first)
    location.write_table("reference/0.parquet", second.select(["features"]))
    found = distances(location, maker.features.name)
    a, b = (FeatureStatistics.of(np.stack(t["features"].to_numpy())) for t in (first, second))
    assert found["frechet[colour@0]"] == pytest.approx(frechet_distance(a, b), rel=1e-6)
    assert set(found) == {f"{name}[colour@0]" for name in ("frechet", "precision", "recall")}


@pytest.mark.parametrize(
    ("config", "labels", "class_dropout", "key"),
    [
        ({"assignment": [1, 1]}, True, 0.1, "generate.assignment"),
        ({"assignment": [1, 3, 1]}, True, 0.1, "generate.assignment"),
        ({"budget": 2}, True, 0.1, "generate.budget"),
        ({"sampling": {"guidance": 2}}, False, 0.1, "generate.sampling.guidance"),
        ({"sampling": {"guidance": 2}}, True, 0.0, "generate.sampling.guidance"),
    ],
)
def test_settings_that_cannot_work_are_named_before_anything_runs(config, labels, class_dropout, key):
    experiment = SimpleNamespace(
        tokenizer=SimpleNamespace(model=TINY),
        index=SimpleNamespace(source=SimpleNamespace(kind="ucf101")),
        tokens=SimpleNamespace(labels=labels, part=None, condition=()),
        generator=SimpleNamespace(network=SimpleNamespace(class_dropout=class_dropout)),
    )
    assert list(dict(STAGE.check(parse(str(config), GenerateConfig, "test"), experiment))) == [key]
    assert not list(STAGE.check(GenerateConfig(), experiment))


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"assignment": [4, 1, 0], "budget": 6}, None),
        ({"assignment": [4, 2, 0]}, "generate.assignment"),
        ({"budget": 5}, "generate.budget"),
        ({"assignment": [0, 0, 4], "budget": 8}, "generate.budget"),
    ],
)
def test_a_frame_predictors_assignment_and_budget_leave_room_for_its_condition(config, key):
    experiment = SimpleNamespace(
        index=SimpleNamespace(source=SimpleNamespace(kind="ucf101")),
        tokenizer=SimpleNamespace(model=TINY),
        tokens=SimpleNamespace(labels=False, part=None, condition=(4, 1)),
    )
    assert list(dict(STAGE.check(GenerateConfig(**config), experiment))) == ([key] if key else [])
    if key is None:
        table = produce(np.arange(4), producer(condition=torch.zeros(2, 5).long(), **config)).table
        assert table["lengths"].to_pylist() == [[4, 1, 1]] * 4


@pytest.mark.parametrize(
    ("source", "part", "fits"),
    [
        ({"kind": "folder"}, None, False),
        ({"kind": "ucf101"}, None, True),
        ({"kind": "mixture"}, "films", False),
        ({"kind": "mixture"}, None, True),
    ],
)
def test_guidance_needs_clips_that_have_classes(source, part, fits):
    parts = {"films": "webvid", "sports": "ucf101"}
    named = {
        name: SimpleNamespace(source=SimpleNamespace(kind=kind), images=False) for name, kind in parts.items()
    }
    experiment = SimpleNamespace(
        index=SimpleNamespace(source=SimpleNamespace(**source, parts=named)),
        tokenizer=SimpleNamespace(model=TINY),
        tokens=SimpleNamespace(labels=True, part=part, condition=()),
        generator=SimpleNamespace(network=SimpleNamespace(class_dropout=0.1)),
    )
    found = dict(STAGE.check(GenerateConfig(sampling={"guidance": 2}), experiment))
    assert list(found) == ([] if fits else ["generate.sampling.guidance"])

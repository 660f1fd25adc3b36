from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from evatok.artifacts import Artifact, Location
from evatok.assignment.policies import Sources
from evatok.assignment.space import AssignmentSpace
from evatok.config import parse
from evatok.models.router import Router, RouterConfig
from evatok.models.sequence import NO_CLASS
from evatok.models.tokenizer import TokenizerConfig, VideoTokenizer
from evatok.stages.fanning import ClipReader
from evatok.stages.stage import Resources, StageContext
from evatok.stages.tokens import STAGE, Encoder, TokensConfig, draw_clips, encode_clips
from evatok.training.token_table import SCHEMA, read_rows, read_vocabulary
from evatok.video.decode import ClipFormat, decode_clip
from evatok.video.index import REJECTED_SCHEMA, ClipIndex, write_index
from evatok.video.index import SCHEMA as INDEX_SCHEMA
from evatok.video.sources import MixtureSource
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
SPACE = AssignmentSpace(TINY.choices, TINY.blocks)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Five clips; clip 3 is no video, clip 4 has no label."""
    folder = tmp_path_factory.mktemp("clips")
    random = np.random.default_rng(0)
    rows = []
    for i in range(5):
        path = folder / f"{i}.mp4"
        write_video(path, random.integers(0, 255, (3, 12, 24, 32), dtype=np.uint8), 8)
        entry = {"clip_id": f"c{i}", "uri": str(path), "start": 0.0, "fps": 0.0, "frames": 12, "width": 32}
        rows.append(entry | {"height": 24, "split": "train", "label": None if i == 4 else "ab"[i % 2]})
    (folder / "3.mp4").write_bytes(b"this is no video")
    write_index(
        Location.parse(folder), pa.Table.from_pylist(rows, INDEX_SCHEMA), REJECTED_SCHEMA.empty_table()
    )
    return ClipIndex.open(Location.parse(folder))


def encoder(index, router=None, **config):
    torch.manual_seed(0)
    config = parse(str({"policy": {"kind": "uniform", "count": 2}} | config), TokensConfig, "test")
    return Encoder(
        clips=ClipReader(index),
        tokenizer=VideoTokenizer(TINY),
        sources=Sources(SPACE, router=router),
        config=config,
        labels=("a", "b"),
        seed=0,
        device="cpu",
    )()


def clip_of(index, row):
    entry = index.take(np.array([row])).to_pylist()[0]
    return torch.from_numpy(decode_clip(entry["uri"], 0.0, ClipFormat(frames=12, size=16)))[None]


def test_clips_become_rows_and_bad_ones_are_named(index):
    maker = encoder(index)
    output = encode_clips((np.arange(5), 0), maker)
    assert output.table.schema == SCHEMA
    assert output.table["clip_id"].to_pylist() == ["c0", "c1", "c2", "c4"]
    assert output.table["label"].to_pylist() == [0, 1, 0, NO_CLASS]
    assert output.table["lengths"].to_pylist() == [[2, 2, 2]] * 4
    assert [item["uri"].rpartition("/")[2] for item in output.rejected] == ["3.mp4"]
    expected = maker.tokenizer.encode(clip_of(index, 2), torch.tensor([[2, 2, 2]]))
    assert output.table["indices"][2].as_py() == expected.indices.tolist()


def test_an_augmented_pass_is_another_view_and_always_the_same_one(index):
    maker = encoder(index, passes=3)
    passes = [encode_clips((np.arange(3), k), maker).table["indices"].to_pylist() for k in (0, 1, 2, 1)]
    assert passes[1] == passes[3]
    assert len({str(entry) for entry in passes}) == 3


def test_frame_prediction_encodes_the_given_frames_alone_and_routes_within_the_prefix(index):
    torch.manual_seed(1)
    router = Router(
        RouterConfig(frames=12, size=16, choices=TINY.choices, network={"width": 16, "layers": 1, "heads": 2})
    )
    with torch.no_grad():
        router.head.classes.weight.normal_(std=1.0)
    maker = encoder(index, router, policy={"kind": "router"}, condition=[4, 1], given_frames=5)
    table = encode_clips((np.arange(3), 0), maker).table
    for row in range(3):
        clip = clip_of(index, row)
        with torch.no_grad():
            scores = router(clip)[0]
        best = max(SPACE.subtree((4, 1)), key=lambda place: float(scores[place]))
        assert table["lengths"][row].as_py() == SPACE.assignment(torch.tensor(best)).tolist()
        padded = torch.cat((clip[:, :, :5], clip[:, :, 4:5].expand(-1, -1, 7, -1, -1)), 2)
        alone = maker.tokenizer.encode(padded, torch.tensor([[4, 1, 4]])).indices[:5]
        assert table["condition"][row].as_py() == alone.tolist()
        # Block 0 is wholly given and the tokenizer is causal: sampling may take it over.
        assert table["indices"][row].as_py()[:4] == alone[:4].tolist()


def test_a_pass_draws_its_clips_of_every_video(tmp_path):
    lengths = [1, 5, 2, 7]
    uris = [f"{video}.mp4" for video, clips in enumerate(lengths) for _ in range(clips)]
    rows = [{"clip_id": str(i), "uri": uri, "start": 0.0, "fps": 0.0} for i, uri in enumerate(uris)]
    location = Location.parse(tmp_path)
    write_index(location, pa.Table.from_pylist(rows, INDEX_SCHEMA), REJECTED_SCHEMA.empty_table())
    index, train = ClipIndex.open(location), np.arange(1, len(uris))
    drawn = draw_clips(index, train, TokensConfig(passes=6, clips_per_video=2), seed=3)
    for part in drawn:
        assert [uris[row] for row in part] == [f"{video}.mp4" for video in (1, 1, 2, 2, 3, 3)]
        assert len(set(part)) == 6
    assert len({tuple(part) for part in drawn}) > 1
    assert len({row for part in drawn for row in part}) > 10
    assert draw_clips(index, train, TokensConfig(passes=2), seed=3) == [train, train]


def test_stage_encodes_every_pass_in_ray_tasks(index, ray_cluster, tmp_path, monkeypatch):
    maker = encoder(index, passes=2, clips_per_task=2)
    maker.tokenizer.save_pretrained(tmp_path / "tokenizer/model")
    monkeypatch.setattr("evatok.stages.tokens.policy_sources", lambda *_: Sources(SPACE))
    inputs = {"index": index.location, "tokenizer": Location.parse(tmp_path / "tokenizer")}
    context = StageContext(
        stage="tokens",
        run_id="tokens-test",
        location=Location.parse(tmp_path / "tokens"),
        inputs={name: Artifact(location, None) for name, location in inputs.items()},
        config=maker.config,
        experiment=SimpleNamespace(tokens=maker.config, curate=SimpleNamespace(reward=None)),
        seed=0,
        resources=Resources(),
        listener=SimpleNamespace(log=lambda *_: None, progress=lambda *_: None),
    )
    metrics = STAGE.run(context)
    assert (metrics["clips"], metrics["rejected"], metrics["mean_tokens"]) == (8, 1, 6.0)
    rows = read_rows(context.location, "train", ["clip_id", "augmentation", "indices"])
    assert rows["clip_id"].to_pylist() == ["c0", "c1", "c2", "c4"] * 2
    assert rows["augmentation"].to_pylist() == [0] * 4 + [1] * 4
    # As many clips at once as a task has: a close call between two codes may fall the other way with more.
    parts = [encode_clips((part, 0), maker).table for part in np.split(np.arange(5), [2, 4])]
    plain = pa.concat_tables(parts)
    assert rows["indices"].to_pylist()[:4] == plain["indices"].to_pylist()
    vocabulary = read_vocabulary(context.location)
    assert vocabulary.labels == ("a", "b")
    assert vocabulary.codebook == maker.tokenizer.codebook


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"condition": [3], "given_frames": 4}, "tokens.condition"),
        ({"condition": [4, 4, 4], "given_frames": 9}, "tokens.condition"),
        ({"condition": [4, 1], "given_frames": 4}, "tokens.given_frames"),
        ({"condition": [4], "given_frames": 3, "policy": {"kind": "oracle"}}, "tokens.policy"),
        ({"policy": {"kind": "budgeted", "budget": 9, "scope": "batch"}}, "tokens.policy"),
        ({"policy": {"kind": "uniform", "count": 3}}, "tokens.policy"),
        ({"part": "b"}, "tokens.part"),
        ({"part": "pictures"}, "tokens.part"),
    ],
)
def test_settings_that_do_not_fit_the_tokenizer_are_named_before_anything_runs(config, key):
    found = dict(STAGE.check(TokensConfig(**config), experiment_of(TINY)))
    assert list(found) == [key]
    assert not dict(STAGE.check(TokensConfig(part="a"), experiment_of(TINY)))


def test_residual_codes_are_refused():
    model = TINY.model_copy(update={"quantizer": SimpleNamespace(kind="residual_vq")})
    assert "tokenizer.model.quantizer.kind" in dict(STAGE.check(TokensConfig(), experiment_of(model)))


def experiment_of(model):
    folder = {"kind": "folder", "path": "/nowhere"}
    source = MixtureSource.model_validate(
        {"parts": {"a": {"source": folder}, "pictures": {"source": folder, "images": True}}}
    )
    return SimpleNamespace(index=SimpleNamespace(source=source), tokenizer=SimpleNamespace(model=model))

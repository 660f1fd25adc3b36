import argparse
import io
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from evatok.artifacts import Location
from evatok.cli.console import Console
from evatok.cli.generate import command, tile
from evatok.errors import UserError
from evatok.models.generator import Generator, GeneratorConfig
from evatok.models.tokenizer import TokenizerConfig, VideoTokenizer
from evatok.models.tokens import Tokens
from evatok.video.write import write_video

TINY = TokenizerConfig(
    frames=12,
    size=16,
    choices=(1, 2, 4),
    encoder={"width": 16, "layers": 1, "heads": 2},
    decoder={"width": 16, "layers": 1, "heads": 2},
    latent=8,
    quantizer={"kind": "vq", "size": 32, "dim": 4},
    align_layer=1,
)
CLASSES = ("ApplyLipstick", "Archery", "BabyCrawling")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with a random tokenizer and a random generator; called with changes of the generator's config."""
    experiment = SimpleNamespace(
        location=Location.parse(tmp_path / "run"),
        tokens=SimpleNamespace(given_frames=5),
        index=SimpleNamespace(fps=0.0),
    )
    monkeypatch.setattr("evatok.experiment.open_experiment", lambda *_: experiment)

    def make(**changes):
        torch.manual_seed(0)
        tokenizer = VideoTokenizer(TINY)
        tokenizer.save_pretrained(tmp_path / "run/tokenizer/model")
        config = {"codes": 32, "choices": TINY.choices, "blocks": 3, "labels": CLASSES}
        config |= {
            "codebook": tokenizer.codebook,
            "network": {"size": {"width": 16, "layers": 1, "heads": 2}},
        }
        Generator(GeneratorConfig(**(config | changes))).save_pretrained(tmp_path / "run/generator/model")
        return tokenizer

    return make


def generate(tmp_path, **options):
    names = (
        "classes",
        "guidance",
        "temperature",
        "top_k",
        "top_p",
        "budget",
        "assignment",
        "frames",
        "precision",
    )
    given = dict.fromkeys(names) | {"count": 2, "seed": 0, "keep": 1, "format": "mp4"} | options
    args = argparse.Namespace(experiment="run", output=str(tmp_path / "out"), **given)
    return command(args, Console(io.StringIO()))


def test_every_class_gets_its_clips_as_videos_token_files_and_a_grid(run, tmp_path):
    tokenizer = run()
    result = generate(tmp_path, classes=["archery", "2"], budget=6)
    assert [clip["class"] for clip in result["clips"]] == [
        "Archery",
        "Archery",
        "BabyCrawling",
        "BabyCrawling",
    ]
    assert [clip["seed"] for clip in result["clips"]] == [0, 1, 2, 3]
    for clip in result["clips"]:
        tokens = Tokens.load(clip["tokens_file"], tokenizer.codebook)
        assert tokens.lengths[0].tolist() == clip["assignment"]
        assert clip["tokens"] == sum(clip["assignment"]) <= 6
        with av.open(clip["file"]) as container:
            assert len(list(container.decode(video=0))) == 12
    with av.open(result["grid"]) as container:
        assert container.streams.video[0].width == 34


def test_clips_are_sampled_in_the_precision_asked_for(run, tmp_path, monkeypatch):
    run()
    seen, step = [], Generator.step

    def watched(self, *given):
        seen.append(self.norm.weight.dtype)
        return step(self, *given)

    monkeypatch.setattr(Generator, "step", watched)
    for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        assert len(generate(tmp_path / name, precision=name)["clips"]) == 2
        assert set(seen) == {kind}
        seen.clear()


def test_a_seed_gives_the_same_clip_again_alone(run, tmp_path):
    run()
    several = generate(tmp_path / "a", classes=["Archery"], count=3, seed=5, format="gif")
    alone = generate(tmp_path / "b", classes=["Archery"], count=1, seed=7, format="gif")
    first, second = (Tokens.load(clip["tokens_file"]) for clip in (several["clips"][2], alone["clips"][0]))
    assert torch.equal(first.indices, second.indices)


def test_generation_goes_on_from_the_blocks_of_a_token_file(run, tmp_path):
    run()
    whole = generate(tmp_path / "a", classes=["Archery"], count=1)["clips"][0]
    more = generate(tmp_path / "b", classes=["Archery"], count=2, frames=whole["tokens_file"], keep=2, seed=9)
    assert all(clip["assignment"][:2] == whole["assignment"][:2] for clip in more["clips"])


def test_frame_predictor_takes_the_first_frames_of_a_video(run, tmp_path):
    run(labels=(), condition=(4, 1), known_blocks=1)
    video = tmp_path / "given.mp4"
    write_video(video, np.random.default_rng(0).integers(0, 255, (3, 8, 16, 16), dtype=np.uint8), 8)
    clips = generate(tmp_path, frames=str(video))["clips"]
    assert [clip["assignment"][:2] for clip in clips] == [[4, 1], [4, 1]]
    with pytest.raises(UserError, match="goes on from given frames"):
        generate(tmp_path)
    forced = generate(tmp_path, frames=str(video), assignment="0,1,4")["clips"]
    assert [clip["assignment"] for clip in forced] == [[4, 1, 4]] * 2
    for options, words in (
        ({"assignment": "4,2,4"}, "first blocks of this frame predictor"),
        ({"assignment": "4,1,4", "budget": 8}, "at least 9"),
        ({"budget": 5}, "at least 6"),
        ({"classes": ["Archery"]}, "--class"),
    ):
        with pytest.raises(UserError, match=words):
            generate(tmp_path, frames=str(video), **options)
    short = tmp_path / "short.mp4"
    write_video(short, np.zeros((3, 3, 16, 16), np.uint8), 8)
    with pytest.raises(UserError, match="5 frames are needed"):
        generate(tmp_path, frames=str(short))


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({}, {"classes": ["Archary"]}, "nearest are Archery"),
        ({}, {"classes": ["3"]}, "numbers 0 to 2"),
        ({"labels": ()}, {"classes": ["Archery"]}, "without classes"),
        ({}, {"assignment": "1,2"}, "2 blocks: this generator makes 3"),
        ({}, {"assignment": "1,2,4,4"}, "4 blocks: this generator makes 3"),
        ({}, {"assignment": "1,x,4"}, "one number per block"),
        ({}, {"assignment": "1,3,4"}, "3 tokens in a block"),
        ({}, {"budget": 2}, "at least 3"),
        ({}, {"count": 0}, "at least 1"),
        ({}, {"guidance": -1.0}, "guidance"),
        ({}, {"frames": "clip.mp4"}, "encode the video"),
        (
            {"network": {"size": {"width": 16, "layers": 1, "heads": 2}, "class_dropout": 0}},
            {"guidance": 2.0},
            "class dropout",
        ),
        ({"codebook": "32@other"}, {}, "rerun with --redo tokens"),
    ],
)
def test_bad_input_is_one_clear_message(run, tmp_path, changes, options, words):
    run(**changes)
    with pytest.raises(UserError, match=words):
        generate(tmp_path, **options)


def test_token_files_of_another_codebook_or_with_too_few_blocks_are_refused(run, tmp_path):
    tokenizer = run()
    clip = Tokens(torch.zeros(3).long(), torch.ones(1, 3).long())
    clip.save(tmp_path / "other.safetensors", "32@other")
    clip.save(tmp_path / "own.safetensors", tokenizer.codebook)
    with pytest.raises(UserError, match="codebook"):
        generate(tmp_path, frames=str(tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match="fewer frames"):
        generate(tmp_path, frames=str(tmp_path / "own.safetensors"), keep=3)
    with pytest.raises(UserError, match="1 to 3 are allowed"):
        generate(tmp_path, frames=str(tmp_path / "own.safetensors"), keep=4)


def test_a_run_without_a_generator_says_what_to_do(run, tmp_path):
    with pytest.raises(UserError, match="evatok run"):
        generate(tmp_path)


def test_grid_is_about_square():
    pictures = [np.full((3, 2, 4, 6), k, np.uint8) for k in range(5)]
    grid = tile(pictures)
    assert grid.shape == (3, 2, 2 * 4 + 2, 3 * 6 + 4)
    assert (grid[:, :, 6:10, 8:14] == 4).all()
    assert (grid[:, :, 6:10, 16:] == 255).all()

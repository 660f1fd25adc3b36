"""The commands encode, decode and reconstruct on a finished run."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from evatok.cli import codec, main
from evatok.cli.codec import with_bar
from evatok.models.tokens import Tokens
from evatok.video.decode import probe
from evatok.video.synthetic import write_videos
from evatok.video.write import write_video


@pytest.fixture
def video(tmp_path: Path) -> str:
    return str(tmp_path / write_videos(tmp_path, 1, seed=5, blocks=8)[0].name)


def test_a_budget_is_kept_by_every_clip(tiny_run: Path, video: str, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.safetensors"
    assert main(["encode", str(tiny_run), video, "--budget", "20", "--output", str(tokens)]) == 0
    lengths = Tokens.load(tokens).lengths
    assert len(lengths) == 2
    assert (lengths.sum(1) <= 20).all()


def test_any_policy_can_assign(tiny_run: Path, video: str, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.safetensors"
    policy = ["--policy", "{kind: uniform, count: 4}"]
    assert main(["encode", str(tiny_run), video, *policy, "--output", str(tokens)]) == 0
    assert (Tokens.load(tokens).lengths == 4).all()


def test_only_what_the_policy_draws_on_must_be_there(
    tiny_run: Path, video: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = tmp_path / "tiny"
    for name in ("tokenizer", "router"):
        shutil.copytree(tiny_run / name, shared / name)
    shutil.copy(tiny_run / "experiment.yaml", shared)
    for words in ([], ["--budget", "20"], ["--policy", "{kind: uniform, count: 4}"]):
        assert main(["encode", str(shared), video, *words, "--output", str(tmp_path / "t.safetensors")]) == 0
    for policy, stage in (("oracle", "proxy"), ("static", "curate")):
        assert main(["encode", str(shared), video, "--policy", policy]) == 2
        assert f"run the {stage} stage" in capsys.readouterr().err


def test_the_policy_of_the_training_assigns_where_none_is_named(
    tiny_run: Path, video: str, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens.safetensors"
    words = ["--set", "tokenizer.policy={kind: uniform, count: 4}", "--output", str(tokens)]
    assert main(["encode", str(tiny_run), video, *words]) == 0
    assert (Tokens.load(tokens).lengths == 4).all()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--policy", "rooter"], "router"),
        (["--policy", "{kind: uniform, count: 3}"], "3"),
        (["--budget", "1"], "budget"),
        (["--budget", "20", "--policy", "router"], "exclude"),
    ],
)
def test_a_wrong_policy_is_the_users_to_mend(
    words: list[str], said: str, tiny_run: Path, video: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["encode", str(tiny_run), video, *words]) == 2
    assert said in capsys.readouterr().err


def test_a_short_or_broken_video_is_named(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short, broken = tmp_path / "short.mp4", tmp_path / "broken.mp4"
    write_video(short, np.zeros((3, 5, 32, 32), np.uint8), 8)
    broken.write_text("no video")
    for file in (short, broken, tmp_path / "absent.mp4"):
        assert main(["reconstruct", str(tiny_run), str(file)]) == 2
        assert file.name in capsys.readouterr().err


def test_a_file_that_holds_no_tokens_is_refused(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tokens.safetensors"
    file.write_text("none")
    assert main(["decode", str(tiny_run), str(file)]) == 2
    assert "tokens.safetensors" in capsys.readouterr().err


def test_the_bar_is_as_long_as_the_blocks_share() -> None:
    picture = np.zeros((3, 8, 4, 10), np.uint8)
    bars = with_bar(picture, np.array([0.5, 1.0]))[0, :, -1]
    assert (bars > 0).sum(1).tolist() == [5] * 4 + [10] * 4


def test_a_video_is_one_set_to_its_policy_however_it_is_cut_up(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = str(tmp_path / write_videos(tmp_path, 1, seed=6, blocks=20)[0].name)
    written = []
    for at_once in (8, 2):
        monkeypatch.setattr(codec, "CLIPS_AT_ONCE", at_once)
        file = tmp_path / f"{at_once}.safetensors"
        policy = ["--policy", "{kind: ilp, budget: 20}"]
        assert main(["encode", str(tiny_run), video, *policy, "--output", str(file)]) == 0
        written.append(Tokens.load(file))
    assert len(written[0]) == 5
    assert torch.equal(written[0].lengths, written[1].lengths)
    assert torch.equal(written[0].indices, written[1].indices)
    assert written[0].lengths.sum() <= 100


def test_a_decoded_video_plays_at_the_rate_of_the_encoded_one(
    tiny_run: Path, video: str, tmp_path: Path
) -> None:
    tokens, film = str(tmp_path / "tokens.safetensors"), str(tmp_path / "film.mp4")
    assert main(["encode", str(tiny_run), video, "--output", tokens]) == 0
    for words, fps in ((["--fps", "5"], 5), ([], probe(video).fps)):
        assert main(["decode", str(tiny_run), tokens, *words, "--output", film]) == 0
        assert probe(film).fps == pytest.approx(fps)


@pytest.mark.parametrize(("name", "said"), [("film.avi", ".mp4 or .gif"), ("absent/film.mp4", "no folder")])
def test_an_output_that_cannot_be_written_is_refused_at_once(
    name: str, said: str, tiny_run: Path, video: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reconstruct", str(tiny_run), video, "--output", str(tmp_path / name)]) == 2
    assert said in capsys.readouterr().err

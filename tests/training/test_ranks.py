"""Two processes under torchrun against one: every ZeRO stage, checkpoints across world sizes, a GAN."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from toy import ToyTask, toy_run

STAGES = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("alone")
    rows, trained = toy_run(folder)
    gan, _ = toy_run(tmp_path_factory.mktemp("gan"), ToyTask(adversarial=True))
    _, spared = toy_run(tmp_path_factory.mktemp("steep"), ToyTask(steep=(3, 7, 11)))
    return SimpleNamespace(
        folder=folder, losses=rows.losses, weights=trained.weights, gan=gan, spared=spared.weights
    )


@pytest.fixture(scope="module")
def pair(alone: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes left their losses, and their checkpoints."""
    folder = tmp_path_factory.mktemp("pair")
    script = Path(__file__).parent / "ranks.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*command, str(script), str(folder), str(alone.folder)], check=True, timeout=300)
    return folder


def result(pair: Path, stage: int) -> dict[str, list[float]]:
    return json.loads((pair / f"stage{stage}.json").read_text())


def assert_same_weights(found: dict[str, list[float]], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(torch.tensor(value), expected[name].flatten(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_two_workers_have_the_losses_of_one(alone: SimpleNamespace, pair: Path, stage: int) -> None:
    assert result(pair, stage)["rows"] == pytest.approx(alone.losses, rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_two_workers_end_with_the_weights_of_one(alone: SimpleNamespace, pair: Path, stage: int) -> None:
    assert_same_weights(result(pair, stage)["weights"], alone.weights)


def test_what_one_rank_cannot_build_is_told_by_all(pair: Path) -> None:
    assert {(pair / f"broken{rank}").read_text() for rank in range(2)} == {
        "no weights here (on worker 1 of 2)"
    }


@pytest.mark.parametrize("stage", STAGES)
def test_one_ranks_infinite_gradient_is_skipped_by_all_and_counted(
    alone: SimpleNamespace, pair: Path, stage: int
) -> None:
    assert result(pair, stage)["skipped"] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3]
    assert_same_weights(result(pair, stage)["spared"], alone.spared)


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_has_the_same_losses_bit_for_bit(pair: Path, stage: int) -> None:
    losses = result(pair, stage)
    assert losses["resumed"] == losses["rows"][6:]


@pytest.mark.parametrize("stage", STAGES)
def test_one_workers_checkpoint_goes_on_with_two(alone: SimpleNamespace, pair: Path, stage: int) -> None:
    assert result(pair, stage)["continued"] == pytest.approx(alone.losses[6:], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_two_workers_checkpoint_goes_on_with_one(
    alone: SimpleNamespace, pair: Path, stage: int, tmp_path: Path
) -> None:
    (tmp_path / "step-000000006").symlink_to(pair / f"stage{stage}" / "step-000000006")
    rows, _ = toy_run(tmp_path)
    assert rows.losses == pytest.approx(alone.losses[6:], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_a_discriminator_beside_the_model_trains_alike_at_every_stage(
    alone: SimpleNamespace, pair: Path, stage: int
) -> None:
    losses = result(pair, stage)
    assert losses["gan_loss"] == pytest.approx(alone.gan.losses, rel=1e-4)
    assert losses["gan"] == [
        pytest.approx(row["margin"], rel=1e-3, abs=1e-5) if "margin" in row else None for row in alone.gan
    ]

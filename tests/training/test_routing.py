"""The router trained by the loop on a reward table made up for the test."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from toy import Rows

from evatok.artifacts import Location
from evatok.assignment.reward import RewardStatistics, RewardWeights, percentile
from evatok.assignment.space import AssignmentSpace
from evatok.assignment.table import RewardRows, to_table
from evatok.models.router import Router, RouterConfig, RouterObjective
from evatok.training.checkpoint import FolderCheckpoints
from evatok.training.loop import TrainConfig, train
from evatok.training.routing import RouterTask
from evatok.training.tasks import Batch

SPACE = AssignmentSpace((4, 8, 16), 2)
ROUTER = {"frames": 8, "size": 16, "patch": (4, 8, 8), "choices": (4, 8, 16), "network": "nano"}
CLIPS = 32


def clip(row: int) -> torch.Tensor:
    """Rows 0, 3, 6, ... are dark and easy, the others are bright and need tokens."""
    return torch.full((3, 8, 16, 16), 30 if row % 3 == 0 else 200, dtype=torch.uint8)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Location:
    location = Location.parse(tmp_path_factory.mktemp("table"))
    draws = torch.Generator().manual_seed(0)
    rows = torch.randperm(CLIPS, generator=draws)
    need = torch.where(rows % 3 == 0, 0.0, 1.0).unsqueeze(1)
    quality = need * (1 - SPACE.totals() / 32) + 0.001 * torch.rand(CLIPS, SPACE.size, generator=draws)
    ids = [f"clip{row}" for row in rows.tolist()]
    table = to_table(RewardRows(ids, rows, ["train"] * CLIPS, {"dssim": quality}))
    location.write_table("00000000.parquet", table)
    return location


def task(table: Location, conditioned: bool = False, kind: str = "hard") -> RouterTask:
    return RouterTask(
        router=RouterConfig(**ROUTER, conditioned=conditioned),
        objective=RouterObjective(kind=kind),
        table=table,
        metric="dssim",
        weights=RewardWeights(1.2),
        statistics=RewardStatistics(0.2, 0.1, 18.0, 7.0),
        seed=0,
    )


def batch(positions: torch.Tensor) -> Batch:
    rows = positions % CLIPS
    clips = torch.stack([clip(row) for row in rows.tolist()])
    return {"clip": clips, "position": positions, "row": rows}


def run(folder: Path, built: RouterTask):
    rows = Rows()
    trained = train(
        built,
        TrainConfig(steps=60, global_batch=8, lr=3e-3, ema=0.8, log_every=1, eval_every=30),
        lambda start: (batch(torch.arange(at, at + 8)) for at in range(start, 10**6, 8)),
        seed=0,
        checkpoints=FolderCheckpoints(Location.parse(folder)),
        sinks=[rows],
        evaluation=[batch(torch.arange(CLIPS))],
    )
    return rows, trained


@pytest.mark.parametrize("kind", ["hard", "soft", "expected"])
@pytest.mark.parametrize("conditioned", [False, True])
def test_a_router_learns_which_clips_need_tokens(
    table: Location, tmp_path: Path, kind: str, conditioned: bool
) -> None:
    rows, _ = run(tmp_path, task(table, conditioned, kind))
    percentiles = [row["reward_percentile"] for row in rows if row["split"] == "eval"]
    assert len(percentiles) == 2
    assert percentiles[-1] > 95


def test_gain_is_the_distance_to_the_best_fixed_assignment_of_the_training_clips(table: Location) -> None:
    built = task(table)
    modules = built.build(torch.device("cpu"))
    clips = batch(torch.arange(CLIPS))
    means = {name: value.item() for name, value in built.evaluate(modules, clips).items()}
    rewards = built._rewards(clips, built.weights)
    fixed = rewards.mean(0).argmax().repeat(CLIPS)
    found = built.summary(means)
    assert found["gain"] == pytest.approx(found["reward_percentile"] - percentile(rewards, fixed), abs=1e-3)


def test_the_exported_router_loads(table: Location, tmp_path: Path) -> None:
    built = task(table)
    _, trained = run(tmp_path / "run", built)
    built.export(trained.weights, tmp_path / "model")
    router = Router.from_pretrained(tmp_path / "model")
    dark, bright = (router(clip(row).unsqueeze(0)).argmax(-1) for row in (0, 1))
    assert SPACE.totals()[dark] < SPACE.totals()[bright]


def test_a_clip_that_was_not_curated_is_an_error(table: Location, tmp_path: Path) -> None:
    built = task(table)
    modules = built.build(torch.device("cpu"))
    stranger = batch(torch.arange(4)) | {"row": torch.tensor([0, 1, 2, 999])}
    with pytest.raises(RuntimeError, match=r"no clips with index rows \[999\]"):
        next(built.losses(modules, stranger, 0))


def test_a_router_is_evaluated_in_full_precision_under_autocast(table: Location) -> None:
    built = task(table)
    modules = built.build(torch.device("cpu"))
    exact = built.evaluate(modules, batch(torch.arange(8)))
    with torch.autocast("cpu", torch.bfloat16):
        blurred = built.evaluate(modules, batch(torch.arange(8)))
    assert torch.equal(blurred["loss"], exact["loss"])

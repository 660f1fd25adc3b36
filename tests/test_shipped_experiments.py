"""Every experiment that is shipped can be planned, and those of the paper have its models."""

from pathlib import Path

import pytest

from evatok.experiment import experiment_type, open_experiment, plan

FOLDER = Path(__file__).parents[1] / "experiments"
PAPER = ("webvid", "ucf101_k600", "k600_prediction")  # the image variant's sizes are not stated

# Parameters in millions and how far off they may be: Tab. 3 and 7, Sec. 3.3.
STATED = {
    "tokenizer": (145, 1),
    "router": (19.9, 0.5),
    "generator_B": (99, 0.99),
    "generator_L": (327, 3.27),
    "generator_L-plus": (633, 6.33),
}


@pytest.fixture(autouse=True)
def real_chain() -> None:
    experiment_type.cache_clear()


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_a_shipped_experiment_can_be_planned(name: str, tmp_path: Path) -> None:
    experiment = open_experiment(FOLDER / f"{name}.yaml", [f"storage={tmp_path}"])
    planned = plan(experiment)
    assert {entry.state for entry in planned} == {"missing"}
    for entry in planned:
        for model, parameters in entry.describe(experiment).models.items():
            assert parameters > 0
            if name in PAPER and model in STATED:
                stated, tolerance = STATED[model]
                assert parameters / 1e6 == pytest.approx(stated, abs=tolerance)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_experiments_have_every_model_it_states(name: str) -> None:
    experiment = open_experiment(FOLDER / f"{name}.yaml")
    found = {model for entry in plan(experiment) for model in entry.describe(experiment).models}
    assert found >= ({"tokenizer", "router"} if name == "webvid" else set(STATED))

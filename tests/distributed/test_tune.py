"""Searching with Ray Tune: every trial once, bad ones stopped early, interrupted searches go on."""

import functools
import random
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest
import ray
from pydantic import ValidationError

from evatok.artifacts import Location
from evatok.distributed.fanout import ShardOutput, fan_out
from evatok.distributed.schedule import Shard
from evatok.distributed.tune import Asha, Finished, MissingObjectiveError, Parameter, _grid, search
from evatok.errors import UserError

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

SPACE = {"x": Parameter(uniform=(0.0, 1.0)), "shape": Parameter(choice=([1, 2], [3]))}


def quadratic(folder: Path):
    """A trial that leaves a file behind, so that the test can count what ran."""

    def trial(values, report):
        with open(f"{folder}/{values['x']}", "a") as file:
            file.write("ran\n")
        for step in range(1, 4):
            report(step, {"loss": (values["x"] - 0.3) ** 2 + 1 / step})
        return {"loss": (values["x"] - 0.3) ** 2, "tokens": 100 * values["x"] + len(values["shape"])}

    return trial


def run(
    trial,
    objectives,
    *,
    space=SPACE,
    finished=(),
    unfinished=(),
    trials=4,
    searcher="random",
    scheduler=None,
    seed=1,
    cpus=1,
    ends=None,
) -> list[Finished]:
    ends = [] if ends is None else ends
    screen = threading.Lock()  # like a terminal's progress bars, cannot be pickled

    def show(over: int) -> None:
        with screen:
            pass

    search(
        trial,
        space,
        objectives,
        trials=trials,
        finished=finished,
        unfinished=unfinished,
        searcher=searcher,
        scheduler=scheduler,
        seed=seed,
        cpus=cpus,
        gpus=0,
        concurrency=2,
        on_progress=show,
        on_end=ends.append,
    )
    return ends


@pytest.mark.parametrize("searcher", ["random", "optuna"])
def test_interrupted_search_runs_only_what_is_missing(ray_cluster, tmp_path, searcher):
    first = run(quadratic(tmp_path), {"loss": "min"}, trials=1, searcher=searcher)
    assert [one.state for one in first] == ["done"]
    assert all(one.metrics["tokens"] == 100 * one.values["x"] + len(one.values["shape"]) for one in first)
    begun = {"x": 0.123, "shape": [3]}
    again = functools.partial(run, quadratic(tmp_path), {"loss": "min"}, trials=3, searcher=searcher)
    second = again(finished=first, unfinished=[begun])
    assert len(second) == 2
    assert begun in [one.values for one in second]
    assert len(list(tmp_path.iterdir())) == 3
    assert all(path.read_text() == "ran\n" for path in tmp_path.iterdir())
    assert again(finished=first + second) == []


def test_grid_tries_every_combination_that_is_not_over():
    space = {"x": Parameter(choice=(1, 2)), "shape": Parameter(choice=([1, 2], [3]))}
    every = _grid(space, [])
    assert every == [{"x": x, "shape": shape} for x in (1, 2) for shape in ([1, 2], [3])]
    over = Finished(every[2], {"loss": 1.0}, "done")
    assert _grid(space, [over]) == [*every[:2], every[3]]


def test_several_objectives_reach_the_searcher(ray_cluster, tmp_path):
    ends = run(quadratic(tmp_path), {"loss": "min", "tokens": "min"}, searcher="optuna", trials=2)
    assert len(ends) == 2
    assert all({"loss", "tokens"} <= set(one.metrics) for one in ends)


def volume(points, corner=(2.0, 2.0)) -> float:
    """What the points leave behind them, up to the corner: larger for the better front of two minima."""
    found, lowest = 0.0, corner[1]
    for first, second in sorted(points):
        if first < corner[0] and second < lowest:
            found += (corner[0] - first) * (lowest - second)
            lowest = second
    return found


def test_front_of_a_search_is_not_dominated_by_the_grids_of_as_many_trials(ray_cluster):
    """Between the goals (0, 0) and (1, 0) nothing beats anything; every step aside is lost in both."""

    def losses(x, y):
        return x**2 + y**2, (x - 1) ** 2 + y**2

    def trial(values, report):
        return dict(zip(("first", "second"), losses(values["x"], values["y"]), strict=True))

    space = {"x": Parameter(uniform=(0, 1)), "y": Parameter(uniform=(-1, 1))}
    aims = {"first": "min", "second": "min"}
    ends = run(trial, aims, space=space, searcher="optuna", trials=16)
    found = [(one.metrics["first"], one.metrics["second"]) for one in ends]
    steps = [n / 3 for n in range(4)]
    grid = [losses(x, 2 * y - 1) for x in steps for y in steps]
    assert volume(found) > volume(grid)
    assert any(all(one[0] < other[0] or one[1] < other[1] for other in grid) for one in found)


def test_trial_that_falls_behind_is_stopped_and_its_cpu_is_free(ray_cluster, tmp_path):
    def trial(values, report):
        worse = values["x"]
        for step in range(1, 30):
            report(step, {"loss": worse})
            time.sleep(0.01 if worse < 0.5 else 0.2)
        return {"loss": worse}

    ends = run(trial, {"loss": "min"}, trials=4, scheduler=Asha(grace=2, factor=2))
    states = {one.state for one in ends}
    assert states == {"done", "stopped"}
    best = min(ends, key=lambda one: one.values["x"])
    assert best.state == "done"
    assert all(one.metrics["loss"] == one.values["x"] for one in ends)
    assert all((one.step == 29) == (one.state == "done") for one in ends)
    for _ in range(100):
        if ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]:
            return
        time.sleep(0.1)
    pytest.fail("a stopped trial kept its CPU")


def test_failing_trial_does_not_end_the_search(ray_cluster, tmp_path):
    def trial(values, report):
        if values["shape"] == [3]:
            raise ValueError("no")
        return {"loss": values["x"]}

    ends = run(trial, {"loss": "min"}, trials=3, seed=0)
    assert {one.state for one in ends} == {"done", "failed"}
    assert all((one.state == "failed") == (one.values["shape"] == [3]) for one in ends)
    assert all(one.error.strip().endswith("ValueError: no") for one in ends if one.state == "failed")


def test_error_of_a_trial_that_is_the_users_is_its_message_alone(ray_cluster):
    def trial(values, report):
        raise UserError("clip 7: too dark")

    (end,) = run(trial, {"loss": "min"}, trials=1)
    assert (end.error, end.mistake) == ("clip 7: too dark", True)


def test_missing_objective_ends_the_search_at_the_first_trial(ray_cluster):
    def trial(values, report):
        raise MissingObjectiveError("no loss here")

    ends = []
    with pytest.raises(MissingObjectiveError, match="no loss here"):
        run(trial, {"loss": "min"}, trials=9, ends=ends)
    assert len(ends) < 4


def halves(spec, state):
    return ShardOutput(pa.table({"n": [spec / 2]}))


@pytest.mark.timeout(240)
def test_fan_out_in_a_trial_uses_cpus_that_the_trial_does_not_hold(ray_cluster, tmp_path):
    def trial(values, report):
        target = Location.parse(tmp_path / str(values["x"]))
        done = fan_out([Shard("a.parquet", 1, 3)], halves, target, key="k")
        return {"loss": values["x"], "rows": float(done.rows)}

    for cpus in (1, 0.01):  # that of a trial that trains itself, and of one whose workers do
        ends = run(trial, {"loss": "min"}, trials=2, cpus=cpus, seed=int(100 * cpus))
        assert [(one.state, one.metrics["rows"]) for one in ends] == [("done", 1.0)] * 2


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({}, "exactly one"),
        ({"choice": [1], "uniform": [0, 1]}, "exactly one"),
        ({"uniform": [1, 0]}, "below the upper"),
        ({"loguniform": [0, 1]}, "above 0"),
        ({"choice": []}, "at least 1"),
        ({"integer": [0.5, 2]}, "integer"),
    ],
)
def test_range_that_makes_no_sense_is_refused(given, part):
    with pytest.raises(ValidationError, match=part):
        Parameter(**given)


def test_draws_stay_in_range_and_follow_the_seed():
    log, whole = Parameter(loguniform=(1e-5, 1e-2)), Parameter(integer=(1, 3))
    draws = [log.draw(random.Random(seed)) for seed in range(200)]
    assert all(1e-5 <= draw <= 1e-2 for draw in draws)
    assert sum(draw < 10**-3.5 for draw in draws) in range(70, 130)
    assert {whole.draw(random.Random(seed)) for seed in range(50)} == {1, 2, 3}
    assert log.draw(random.Random(5)) == log.draw(random.Random(5))

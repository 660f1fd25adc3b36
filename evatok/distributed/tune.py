"""Search a space of settings with Ray Tune. Keeps no state of its own: the caller records every trial.

A search that starts again is told what earlier ones found (``Finished``) and what they left unfinished, so it
needs neither Tune's pickled snapshots nor the same Ray version to go on.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from pydantic import Field, model_validator
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from evatok.config import Config

Values = dict[str, Any]
Report = Callable[[int, Mapping[str, float]], None]
Mode = Literal["min", "max"]
_SEED_STEP = 1_000_003


class Parameter(Config):
    """What one setting may be: exactly one of the keys is given."""

    choice: tuple[Any, ...] | None = Field(default=None, min_length=1, description="one of these values")
    uniform: tuple[float, float] | None = Field(default=None, description="lowest and highest value")
    loguniform: tuple[float, float] | None = Field(default=None, description="the same, on a log scale")
    integer: tuple[int, int] | None = Field(default=None, description="lowest and highest whole number")

    @model_validator(mode="after")
    def _one_form(self) -> Parameter:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of choice, uniform, loguniform, integer")
        bounds = self.uniform or self.loguniform or self.integer
        if bounds is not None and bounds[0] >= bounds[1]:
            raise ValueError(f"the lower bound {bounds[0]} must be below the upper bound {bounds[1]}")
        if self.loguniform is not None and self.loguniform[0] <= 0:
            raise ValueError("the lower bound of loguniform must be above 0")
        return self

    def ends(self) -> tuple[Any, ...]:
        """The values that stand for all: every choice, or both bounds."""
        return self.choice or self.uniform or self.loguniform or self.integer or ()

    def draw(self, source: random.Random) -> Any:
        """One value at random."""
        distribution = self.distribution()
        if isinstance(distribution, optuna.distributions.CategoricalDistribution):
            return json.loads(source.choice(distribution.choices))  # type: ignore[arg-type]
        low, high = distribution.low, distribution.high
        if isinstance(distribution, optuna.distributions.IntDistribution):
            return source.randint(low, high)
        if distribution.log:
            return low * (high / low) ** source.random()
        return source.uniform(low, high)

    def distribution(self) -> Any:
        """As Optuna has it. Choices become JSON text, since Optuna takes no lists."""
        if self.choice is not None:
            return optuna.distributions.CategoricalDistribution([json.dumps(c) for c in self.choice])
        if self.integer is not None:
            return optuna.distributions.IntDistribution(*self.integer)
        bounds = self.loguniform or self.uniform
        assert bounds is not None
        return optuna.distributions.FloatDistribution(*bounds, log=self.loguniform is not None)


class Asha(Config):
    """Stop trials that fall behind at the same step (Li et al., arXiv:1810.05934)."""

    kind: Literal["asha"] = "asha"
    grace: int = Field(ge=1, description="steps that every trial gets")
    factor: float = Field(default=3.0, gt=1, description="of the trials at a rung, one in this many goes on")


@dataclass(frozen=True)
class Finished:
    """A trial that is over: what it tried and found. ``state``: done, stopped early, or failed."""

    values: Values
    metrics: Mapping[str, float]
    state: Literal["done", "stopped", "failed"]


def search(
    trial: Callable[[Values, Report], Mapping[str, float]],
    space: Mapping[str, Parameter],
    objectives: Mapping[str, Mode],
    *,
    trials: int,
    finished: Sequence[Finished],
    unfinished: Sequence[Values],
    searcher: Literal["random", "optuna"],
    scheduler: Asha | None,
    seed: int,
    cpus: float,
    gpus: float,
    concurrency: int,
    on_progress: Callable[[int], None],
    on_end: Callable[[Finished], None],
) -> None:
    """Run trials until there are ``trials`` in all, ``finished`` ones counted. Ray must be connected.

    ``trial(values, report)`` runs in a process of its own that holds ``cpus`` and ``gpus``; it calls
    ``report(step, metrics)`` on the way, returns its final metrics, and finds its own earlier results when
    it is called with the values of an ``unfinished`` trial. ``on_end`` is called here, once per trial, as
    soon as it is over; ``on_progress`` with the number of trials that are over. With several objectives the
    first one decides which trials are stopped early.
    """
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    first = next(iter(objectives))

    def send(metrics: Mapping[str, float], step: int, *, whole: bool) -> None:
        known = {name: metrics.get(name, math.nan) for name in objectives}
        tune.report({**known, "found": dict(metrics), "step": step, "whole": whole})

    def run(config: Values) -> None:
        step = 0

        def report(at: int, metrics: Mapping[str, float]) -> None:
            nonlocal step
            if first in metrics:
                step = at
                send(metrics, at, whole=False)

        metrics = trial(_decoded(config, space), report)
        send(metrics, step + 1, whole=True)

    class Ends(tune.Callback):  # type: ignore[misc]
        """Tells the caller about each trial that is over."""

        def __init__(self) -> None:
            self.over = len(finished)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            whole = trial.last_result.get("whole", False)
            self._end(trial, "done" if whole else "stopped")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            self._end(trial, "failed")

        def _end(self, trial: Any, state: Literal["done", "stopped", "failed"]) -> None:
            found = trial.last_result.get("found", {})
            on_end(Finished(_decoded(trial.config, space), found, state))
            self.over += 1
            on_progress(self.over)

    if searcher == "random":
        left = _draw(space, trials, finished, unfinished, seed)
        param_space: Values = {"drawn": tune.grid_search([_encoded(values, space) for values in left])}
        algorithm, samples = None, 1
    else:
        left = [{}] * (trials - len(finished))
        param_space, samples = {}, len(left)
        algorithm = _optuna(space, objectives, finished, unfinished, seed)
    if not left:
        return
    # Tune keeps its own books here and prints about them; ours are the caller's.
    with (
        tempfile.TemporaryDirectory(prefix="evatok-tune-") as books,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        tune.Tuner(
            tune.with_resources(run, {"cpu": cpus, "gpu": gpus}),
            param_space=param_space,
            tune_config=tune.TuneConfig(
                search_alg=algorithm,
                scheduler=_scheduler(scheduler, first, objectives[first]),
                num_samples=samples,
                max_concurrent_trials=concurrency,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(name="evatok", storage_path=books, callbacks=[Ends()], verbose=0),
        ).fit()


def _draw(
    space: Mapping[str, Parameter],
    trials: int,
    finished: Sequence[Finished],
    unfinished: Sequence[Values],
    seed: int,
) -> list[Values]:
    """The values still to be tried. The n-th draw is a function of the seed, so restarts draw the same."""
    over = [one.values for one in finished]
    left = list(unfinished)
    for number in range(100 * trials):
        if len(over) + len(left) >= trials:
            break
        source = random.Random(seed * _SEED_STEP + number)
        values = {key: parameter.draw(source) for key, parameter in sorted(space.items())}
        if values not in over and values not in left:
            left.append(values)
    return left[: trials - len(over)]


def _optuna(
    space: Mapping[str, Parameter],
    objectives: Mapping[str, Mode],
    finished: Sequence[Finished],
    unfinished: Sequence[Values],
    seed: int,
) -> OptunaSearch:
    distributions = {key: parameter.distribution() for key, parameter in space.items()}

    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(
        storage=storage,
        study_name="evatok",
        directions=["minimize" if mode == "min" else "maximize" for mode in objectives.values()],
    )
    for one in finished:
        known = all(name in one.metrics for name in objectives)
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.COMPLETE if known else optuna.trial.TrialState.FAIL,
                values=[one.metrics[name] for name in objectives] if known else None,
                params=_encoded(one.values, space),
                distributions=distributions,
            )
        )
    for values in unfinished:
        study.enqueue_trial(_encoded(values, space))
    several = len(objectives) > 1
    return OptunaSearch(
        space=distributions,
        metric=list(objectives) if several else next(iter(objectives)),
        mode=list(objectives.values()) if several else next(iter(objectives.values())),
        sampler=optuna.samplers.TPESampler(seed=seed + len(finished), multivariate=False),
        storage=storage,
        study_name="evatok",
    )


def _encoded(values: Values, space: Mapping[str, Parameter]) -> Values:
    return {key: json.dumps(value) if space[key].choice else value for key, value in values.items()}


def _decoded(config: Values, space: Mapping[str, Parameter]) -> Values:
    values = config.get("drawn", config)
    return {key: json.loads(value) if space[key].choice else value for key, value in values.items()}


def _scheduler(asha: Asha | None, metric: str, mode: Mode) -> TrialScheduler:
    if asha is None:
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr="step",
        metric=metric,
        mode=mode,
        grace_period=asha.grace,
        reduction_factor=asha.factor,
        max_t=2**31,
    )

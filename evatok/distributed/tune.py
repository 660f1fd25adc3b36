"""Search a space of settings with Ray Tune. Keeps no state of its own: the caller records every trial.

A search that starts again is told what earlier ones found (``Finished``) and what they left unfinished, so it
needs neither Tune's pickled snapshots nor the same Ray version to go on.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import math
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
import ray
from pydantic import Field, model_validator
from ray import tune
from ray.exceptions import RayTaskError
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from evatok.config import Config
from evatok.errors import UserError

Values = dict[str, Any]
Report = Callable[[int, Mapping[str, float]], None]
Mode = Literal["min", "max"]
Searcher = Literal["random", "optuna", "grid"]
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


class MissingObjectiveError(UserError):
    """A trial that came to its end does not report an objective, so no other trial will: ends the search."""


@dataclass(frozen=True)
class Finished:
    """A trial that is over: what it tried and found. ``state``: done, stopped early, or failed.

    ``step``: of its newest report. ``error``: why it failed, with the traceback unless it is a ``mistake``,
    which is the user's to mend.
    """

    values: Values
    metrics: Mapping[str, float]
    state: Literal["done", "stopped", "failed"]
    step: int = 0
    error: str = ""
    mistake: bool = False


def search(
    trial: Callable[[Values, Report], Mapping[str, float]],
    space: Mapping[str, Parameter],
    objectives: Mapping[str, Mode],
    *,
    trials: int,
    finished: Sequence[Finished],
    unfinished: Sequence[Values],
    searcher: Searcher,
    scheduler: Asha | None,
    seed: int,
    cpus: float,
    gpus: float,
    concurrency: int,
    on_progress: Callable[[int], None],
    on_end: Callable[[Finished], None],
) -> None:
    """Run trials until there are ``trials`` in all, ``finished`` ones counted. Ray must be connected.

    A grid, for which every parameter is a choice, has its own number of them.

    ``trial(values, report)`` runs in a process of its own that holds ``cpus`` and ``gpus``; it calls
    ``report(step, metrics)`` on the way, returns its final metrics, and finds its own earlier results when
    it is called with the values of an ``unfinished`` trial. ``on_end`` is called here, once per trial, as
    soon as it is over; ``on_progress`` with the number of trials that are over. With several objectives the
    first one decides which trials are stopped early. A trial that fails does not end the search, unless it
    raises MissingObjectiveError, which is raised here then.
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

    in_vain = _InVain()

    class Ends(tune.Callback):  # type: ignore[misc]
        """Tells the caller about each trial that is over."""

        def __init__(self) -> None:
            self.over = len(finished)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            whole = trial.last_result.get("whole", False)
            self._end(trial, "done" if whole else "stopped")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            cause, text = _error(trial)
            if isinstance(cause, MissingObjectiveError):
                in_vain.cause = cause
            self._end(trial, "failed", text, isinstance(cause, UserError))

        def __reduce__(self) -> tuple[Any, ...]:
            return tune.Callback, ()  # Tune pickles it for books that nobody reads

        def _end(
            self,
            trial: Any,
            state: Literal["done", "stopped", "failed"],
            error: str = "",
            mistake: bool = False,
        ) -> None:
            last = trial.last_result
            found, step = last.get("found", {}), last.get("step", 0) - last.get("whole", False)
            on_end(Finished(_decoded(trial.config, space), found, state, step, error, mistake))
            self.over += 1
            on_progress(self.over)

    if searcher != "optuna":
        if searcher == "grid":
            left = _grid(space, finished)
        else:
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
            run_config=tune.RunConfig(
                name="evatok", storage_path=books, callbacks=[Ends()], stop=in_vain, verbose=0
            ),
        ).fit()
    if in_vain.cause is not None:
        raise in_vain.cause


class _InVain(tune.Stopper):  # type: ignore[misc]
    """Ends a search in which no trial can come to a good end; ``cause`` says why. Tune pickles it."""

    def __init__(self) -> None:
        self.cause: MissingObjectiveError | None = None

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.cause is not None


def _error(trial: Any) -> tuple[BaseException | None, str]:
    """What a failed trial raised, and the text for its record; None for a trial that was lost."""
    if trial.pickled_error_file is None:
        return None, Path(trial.error_file).read_text()
    error = ray.cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    if not isinstance(error, RayTaskError):
        return None, f"{type(error).__name__}: {error}"
    return error.cause, str(error.cause if isinstance(error.cause, UserError) else error)


def _grid(space: Mapping[str, Parameter], finished: Sequence[Finished]) -> list[Values]:
    """Every combination of the choices that is not over."""
    over = [one.values for one in finished]
    every = itertools.product(*(parameter.ends() for parameter in space.values()))
    left = (dict(zip(space, values, strict=True)) for values in every)
    return [values for values in left if values not in over]


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

"""What the stages that train hand on to the training."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from evatok.models.tokenizer import TokenizerConfig
from evatok.stages import generator, router
from evatok.stages.fitting import fit_stage
from evatok.stages.stage import Resources, StageContext


def test_a_run_says_how_often_dead_workers_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("evatok.distributed.train.fit", lambda *args, **options: asked.update(options) or {})
    context = SimpleNamespace(
        location=None, run_id="run", seed=0, resources=Resources(max_failures=7), progress=None
    )
    anything = cast(Any, SimpleNamespace(watched=()))
    fit_stage(cast(StageContext, context), anything, anything, anything, None)
    assert asked["max_failures"] == 7


@pytest.mark.parametrize("stage", ["router", "generator"])
def test_only_models_that_can_run_layers_again_may_be_asked_to(stage: str) -> None:
    module = {"router": router, "generator": generator}[stage]
    config = module.STAGE.config.model_validate({"train": {"steps": 1, "recompute": True}})
    proxy = SimpleNamespace(model=TokenizerConfig())
    experiment = SimpleNamespace(resources=Resources(workers=1), proxy=proxy)
    assert module.STAGE.check is not None
    assert list(dict(module.STAGE.check(config, experiment))) == [f"{stage}.train.recompute"]

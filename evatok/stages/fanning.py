"""Fan-outs over models as a stage: what curation, evaluation, encoding and generation have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from evatok.stages.stage import StageContext
from evatok.video.index import REJECTED, REJECTED_SCHEMA

if TYPE_CHECKING:
    from evatok.distributed.fanout import FanOutSummary, Progress, ShardOutput
    from evatok.distributed.schedule import Shard


def fan_out_models(
    context: StageContext,
    shards: Sequence[Shard],
    work: Callable[[Any, Any], ShardOutput],
    target: str,
    *,
    state: Callable[[], Any],
    show: Callable[[Progress], None],
) -> FanOutSummary:
    """``fan_out`` into ``target`` of the stage's folder, with the run's resources and node group.

    The stage's config says in ``gpu_per_task`` what share of a GPU a task holds where GPUs are used.
    """
    from evatok.distributed.fanout import fan_out

    resources = context.resources
    return fan_out(
        shards,
        work,
        context.location / target,
        key=context.run_id,
        state=state,
        cpus=resources.cpus_per_task,
        gpus=context.config.gpu_per_task if resources.use_gpu else 0.0,
        label_selector=resources.groups.selector("curate"),
        on_progress=show,
    )


def write_rejected(context: StageContext, done: FanOutSummary) -> int:
    """Leave a table of the clips that could not be used, each once; returns how many."""
    rejected = {item["uri"] + item["detail"]: item for item in done.rejected}
    context.location.write_table(REJECTED, pa.Table.from_pylist(list(rejected.values()), REJECTED_SCHEMA))
    return len(rejected)

"""Fan-outs as a stage: what index, curation, evaluation, encoding and generation have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from evatok.stages.stage import StageContext
from evatok.video.decode import ClipFormat, DecodeError, decode_clip
from evatok.video.guard import Guard
from evatok.video.index import REJECTED, REJECTED_SCHEMA, ClipIndex

if TYPE_CHECKING:
    from evatok.distributed.fanout import FanOutSummary, Progress, ShardOutput
    from evatok.distributed.schedule import Shard


def _per_second(progress: Progress) -> dict[str, float]:
    return {"clips_per_second": progress.rate}


def follow(
    context: StageContext,
    unit: str,
    figures: Callable[[Progress], dict[str, float]],
    *,
    parts: int = 1,
    assignments: int = 0,
) -> Callable[[Progress], None]:
    """What shows a fan-out's progress, ``figures`` beside it, and exports it as metrics.

    Both are told in ``unit``; ``parts`` items of the shards make up one. ``assignments``: scored for each.
    """
    from evatok.distributed.metrics import FanOutMetrics

    metrics = FanOutMetrics(context.run_id, assignments)

    def report(progress: Progress) -> None:
        whole = replace(
            progress,
            items=progress.items // parts,
            total=progress.total // parts,
            rate=progress.rate / parts,
        )
        metrics(whole)
        context.progress(whole.items, whole.total, unit, **figures(whole))

    return report


def fan_out_models(
    context: StageContext,
    shards: Sequence[Shard],
    work: Callable[[Any, Any], ShardOutput],
    target: str,
    *,
    state: Callable[[], Any],
    unit: str = "clips",
    figures: Callable[[Progress], dict[str, float]] = _per_second,
    parts: int = 1,
    assignments: int = 0,
) -> FanOutSummary:
    """``fan_out`` into ``target`` of the stage's folder, with the run's resources and node group.

    Progress goes where ``follow`` sends it. The stage's config says in ``gpu_per_task`` what share of a GPU a
    task holds where GPUs are used.
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
        on_progress=follow(context, unit, figures, parts=parts, assignments=assignments),
    )


class ClipReader:
    """Decodes clips of an index for the tasks of a process, in a child process that can be lost.

    Travels unstarted. A clip that takes the child down or never ends is noted in the index, and nobody tries
    it again.
    """

    def __init__(self, index: ClipIndex) -> None:
        self.index = index
        self._guard = Guard(index.limits.time_limit)

    def read(
        self,
        rows: NDArray[np.int64],
        form: ClipFormat,
        draw: Callable[[int], np.random.Generator | None] = lambda row: None,
    ) -> tuple[list[dict[str, Any]], list[NDArray[np.uint8]], list[dict[str, str]]]:
        """The rows of the index that can be decoded, their clips, and for the others what was wrong.

        Clips are uint8 [C, F, H, W], cut as ``form`` says at the index's sampling rate; ``draw`` gives what
        decides a row's crop and flip. Raises StorageError: that is not the fault of a clip.
        """
        found, clips, rejected = [], [], []
        bad = self.index.known_bad()
        for entry in self.index.take(rows).to_pylist():
            try:
                clips.append(self._clip(entry, form, draw(entry["row"]), bad))
                found.append(entry)
            except DecodeError as error:
                detail = f"{entry['clip_id']}: {error.detail}"
                rejected.append({"uri": entry["uri"], "code": error.code, "detail": detail})
        return found, clips, rejected

    def _clip(
        self,
        entry: dict[str, Any],
        form: ClipFormat,
        draw: np.random.Generator | None,
        bad: frozenset[int],
    ) -> NDArray[np.uint8]:
        if entry["row"] in bad:
            raise DecodeError("crash", f"{entry['uri']}: known to end its decoder")
        try:
            return self._guard(
                decode_clip, entry["uri"], entry["start"], form.of(entry), draw, self.index.limits
            )
        except DecodeError as error:
            self.index.report(entry["row"], error)
            raise


def write_rejected(context: StageContext, done: FanOutSummary) -> int:
    """Leave a table of the clips that could not be used, each once; returns how many."""
    rejected = {item["uri"] + item["detail"]: item for item in done.rejected}
    context.location.write_table(REJECTED, pa.Table.from_pylist(list(rejected.values()), REJECTED_SCHEMA))
    return len(rejected)

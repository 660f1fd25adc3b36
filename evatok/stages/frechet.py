"""Frechet distances of reconstructions, on the curated clips or on a larger set of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from evatok.assignment.table import RewardRows
from evatok.config import Config
from evatok.errors import UserError
from evatok.metrics.comparison import Point
from evatok.metrics.frechet import FeatureStatistics, frechet_distance, precision_recall
from evatok.stages.judge import Judge, assign_and_take_features, fan_out_over, ranges, take_features
from evatok.stages.stage import StageContext
from evatok.video.index import ClipIndex

if TYPE_CHECKING:
    from evatok.distributed.fanout import ShardOutput


class FrechetClips(Config):
    """Clips that need not have been curated, so that a set may be as large as a paper's."""

    split: Literal["train", "test"] = Field("train", description="split of the index")
    part: str | None = Field(None, description="only this part of a mixture; none: all clips of the split")
    one_per_video: bool = Field(True, description="of each video one of its clips, drawn at random (LARP)")
    count: int | None = Field(None, ge=2, description="at most so many, drawn at random; none: all")


def compare_features(
    context: StageContext,
    judge: Judge,
    known: RewardRows,
    points: Sequence[Point],
    wanted: FrechetClips | None,
) -> dict[str, dict[str, float]]:
    """Per policy at its headline setting: how far the set of reconstructions is from the originals.

    points: one per setting of the judge. ``wanted`` clips need not have been curated, so there only policies
    take part that go by no measured quality and assign each clip alone; they also get ``frechet_tokens``,
    their mean tokens, and ``frechet_clips``, the number of clips.
    """
    from evatok.distributed.schedule import Shard

    work: Callable[[Any, Judge], ShardOutput]
    if wanted is None:
        shown = [point for point in points if point.headline]
        names = [point.policy for point in shown]
        specs: list[Any] = [
            (known.row[start:stop].numpy(), [point.assignment[start:stop] for point in shown])
            for start, stop in ranges(len(known))
        ]
        count, work = len(known), take_features
    else:
        settings = [
            setting
            for setting, point in zip(judge.settings, points)
            if point.headline and not (setting.policy.reads_losses or setting.policy.whole_set)
        ]
        names = [setting.name for setting in settings]
        rows = draw(judge.clips.index, wanted, context.seed)
        policies = [setting.policy for setting in settings]
        specs = [(start, rows[start:stop], policies) for start, stop in ranges(len(rows))]
        count, work = len(rows), assign_and_take_features
    shards = [
        Shard(f"{start:08d}-{stop:08d}.parquet", stop - start, spec)
        for (start, stop), spec in zip(ranges(count), specs)
    ]
    fan_out_over(context, shards, work, "features", judge, "clips")
    table = context.location.read_table("features")
    assert judge.features is not None
    original = torch.from_numpy(np.stack(table["original"].to_numpy()))
    found = {}
    for number, name in enumerate(names):
        features = torch.from_numpy(np.stack(table[str(number)].to_numpy()))
        distance = frechet_distance(FeatureStatistics.of(original), FeatureStatistics.of(features))
        precision, recall = precision_recall(original, features)
        values = {"frechet": distance, "precision": precision, "recall": recall}
        found[name] = {f"{key}[{judge.features.name}]": value for key, value in values.items()}
        if wanted is not None:
            tokens = float(table[f"tokens-{number}"].to_numpy().mean())
            found[name] |= {"frechet_tokens": tokens, "frechet_clips": len(table)}
    return found


def draw(index: ClipIndex, wanted: FrechetClips, seed: int) -> NDArray[np.int64]:
    """Rows of the index, ascending. UserError where there are fewer than two."""
    view = index.without_images().select(split=wanted.split)
    if wanted.part is not None:
        view = view.part(wanted.part)
    order = np.random.default_rng(seed).permutation(len(view))
    if wanted.one_per_video:
        _, first = np.unique(view.videos()[order], return_index=True)
        order = order[np.sort(first)]
    chosen = np.sort(order[: wanted.count])
    if len(chosen) < 2:
        raise UserError(
            f"evaluate.frechet_clips: {index.location.uri} has {len(chosen)} such clips, and a distance of"
            " sets needs two at least"
        )
    return chosen if view.selected is None else view.selected[chosen]

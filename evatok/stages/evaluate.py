"""Evaluate: every policy on the same held-out clips.

The clips are those of curate's test split, so the proxy's quality of every assignment is known. One pass
scores the final tokenizer in the same way and gathers what the policies go by; every policy and setting is
then read off the tables, on both tokenizers.

A policy is quoted, and filmed, at one setting: at that of ``evaluate.policies``; else, if it weighs quality
against tokens, at the weight of the run's reward; else at the setting whose mean tokens come nearest to a
common budget, the tokens of ``static`` (the best fixed assignment of the training clips).

Leaves ``table/`` (quality of all assignments with the final tokenizer, see ``assignment.table``),
``clips.parquet`` (a row per policy, setting and clip; ``final_*`` is of the final tokenizer),
``policies.json`` (the curves), ``summary.json``
(headline numbers with intervals) and ``samples.json`` with ``samples/*.mp4`` (policies side by side).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from evatok import weights
from evatok.artifacts import Location, read_manifest
from evatok.assignment.policies import (
    KINDS,
    BasePolicy,
    Evidence,
    Policy,
    Sources,
    UniformPolicy,
    common_budget,
    default_policies,
)
from evatok.assignment.reward import HIGHER_IS_BETTER, RewardWeights, reward
from evatok.assignment.space import AssignmentSpace
from evatok.assignment.table import RewardRows, RewardTable
from evatok.config import OPERATIONAL, Config
from evatok.errors import UserError
from evatok.metrics.comparison import SAVINGS, Comparison, Point
from evatok.metrics.frechet import FEWEST_CLIPS, I3D
from evatok.metrics.perceptual import load_quality
from evatok.models.tokenizer import VideoTokenizer
from evatok.stages.fanning import ClipReader
from evatok.stages.frechet import FrechetClips, compare_features
from evatok.stages.judge import (
    Judge,
    Setting,
    fan_out_over,
    film_clip,
    ranges,
    score_clips,
    to_evidence,
)
from evatok.stages.sources import policy_sources
from evatok.stages.stage import Stage, StageContext
from evatok.video.index import ClipIndex
from evatok.video.sources.mixture import part_problems


class EvaluateConfig(Config):
    policies: tuple[Policy, ...] = Field(
        (),
        description="what is compared, and the settings that are quoted; with `uniform`, which the others are"
        " measured against, in any case; empty: all that can run, quoted at a common budget of tokens",
    )
    samples: int = Field(6, ge=0, description="clips shown under the policies side by side")
    sample_policies: tuple[str, ...] = Field(
        ("uniform", "static", "router", "oracle"), description="policies shown on the samples"
    )
    frechet: bool = Field(
        False, description="Frechet distance, precision and recall by I3D features (needs the weights i3d)"
    )
    frechet_clips: FrechetClips | None = Field(
        None,
        description="clips that `frechet` is measured on, for policies that go by no measured quality; none:"
        " curate's held-out clips, for every policy",
    )
    gpu_per_task: Annotated[float, OPERATIONAL] = Field(
        1.0, gt=0, le=1, description="share of a GPU that a task holds, with resources.use_gpu"
    )


def run(context: StageContext) -> dict[str, Any]:
    """Score, compare, film; returns the headline metrics."""
    config: EvaluateConfig = context.config
    judge, known = assemble(context)
    known, final, evidence = score(context, judge, known)
    rewards = all_rewards(known, judge.sources, context.experiment.curate.reward.weights)
    budget = common_budget(judge.sources)
    points = quoted(
        [measure(setting, evidence, judge.sources, final, known, rewards) for setting in judge.settings],
        budget,
    )
    metric = judge.metrics[0].name
    comparison = Comparison(
        points,
        rewards.amax(1).numpy(),
        rewards.amin(1).numpy(),
        metric,
        HIGHER_IS_BETTER[metric],
        context.seed,
    )
    location, space = context.location, judge.sources.space
    location.write_table("clips.parquet", per_clip(known, points))
    policies = {"metric": metric, "metrics": list(final), "choices": space.choices, "blocks": space.blocks}
    policies["budget"] = budget
    location.write_json("policies.json", {**policies, "clips": len(known), "policies": comparison.policies()})
    summary = {"budget": budget, **comparison.summary()}
    if config.frechet:
        found = compare_features(context, judge, known, points, config.frechet_clips)
        for policy, distances in found.items():
            summary["policies"][policy] |= distances
    location.write_json("summary.json", summary)
    film(context, judge, known, points, rewards)
    return headlines(summary)


def evaluation(run: Location) -> dict[str, Any]:
    """What ``evatok eval --json`` prints: {"budget", "clips", "metric", "policies", "generated"
    if there is any}.

    Per policy at its quoted setting: reward_percentile, mean_tokens, regret {"median", "90"} (over clips, of
    the reward lost to the best assignment), the metrics and the token savings {value, low, high} against
    uniform and static on the proxy, the same under "final" for the final tokenizer; "budget" is what policies
    without a setting of their own are quoted at.
    """
    summary: dict[str, Any] = (run / "evaluate").read_json("summary.json")
    del summary["headline"]
    generated = read_manifest(run / "generate")
    if generated is not None and generated.state == "done":
        summary["generated"] = generated.metrics
    return summary


def headlines(summary: dict[str, Any]) -> dict[str, Any]:
    """The few numbers of ``summary.json`` that a stage's end shows."""
    head = summary["headline"]
    found = {
        "clips": summary["clips"],
        "best_single_uniform_percentile": head["best_uniform"]["reward_percentile"],
        "best_single_uniform_tokens": head["best_uniform"]["tokens"],
        "best_single_uniform_reward": head["best_uniform"]["reward"],
        "oracle_reward": head["oracle_reward"],
        "quality_rises_with_tokens": head["rises_with_tokens"],
    }
    for name, entry in summary["policies"].items():
        found[f"{name}_percentile"] = entry["reward_percentile"]
        found[f"{name}_tokens"] = entry["mean_tokens"]
    if router := summary["policies"].get("router"):
        found |= {f"router_{name}": router[name]["value"] for name in SAVINGS if router[name]}
        found |= {f"router_regret_{name}": value for name, value in router["regret"].items()}
    return found


def assemble(context: StageContext) -> tuple[Judge, RewardRows]:
    """The models and policies, and the proxy's table of the held-out clips."""
    config: EvaluateConfig = context.config
    reward_config = context.experiment.curate.reward
    table = RewardTable.open(context.inputs["curate"].location / "table")
    known = table.select("test").load()
    if not len(known):
        raise UserError(
            "evaluate judges policies on curate's held-out clips, and there are none: set curate.clips.test "
            "above 0 and let the index have a test split"
        )
    if config.frechet and config.frechet_clips is None and len(known) < FEWEST_CLIPS:
        raise UserError(
            f"evaluate.frechet compares sets of at least {FEWEST_CLIPS} held-out clips, and curate has"
            f" {len(known)}: give more videos of the split test, or leave frechet out"
        )
    tokenizer = VideoTokenizer.from_artifact(context.inputs["tokenizer"].location)
    space = AssignmentSpace.of(tokenizer)
    sources = policy_sources(context.inputs, context.experiment.curate, space)
    judge = Judge(
        clips=ClipReader(ClipIndex.open(context.inputs["index"].location)),
        tokenizer=tokenizer,
        metrics=tuple(load_quality(name) for name in dict.fromkeys((reward_config.quality, *table.metrics))),
        sources=sources,
        settings=tuple(compared(config, sources)),
        features=I3D(weights.find("i3d")) if config.frechet else None,
        device="cuda" if context.resources.use_gpu else "cpu",
    )
    return judge, known


def score(
    context: StageContext, judge: Judge, known: RewardRows
) -> tuple[RewardRows, dict[str, Tensor], Evidence]:
    """The N known clips that can still be decoded, their quality [N, size] with the final tokenizer, and what
    the policies go by.
    """
    from evatok.distributed.schedule import Shard

    shards = [
        Shard(f"{start:08d}-{stop:08d}.parquet", stop - start, (start, known.row[start:stop].numpy()))
        for start, stop in ranges(len(known))
    ]
    fan_out_over(context, shards, score_clips, "table", judge, "clips", judge.sources.space.size)
    scored = RewardTable.open(context.location / "table").load([m.name for m in judge.metrics])
    return known.among(scored.row), scored.quality, to_evidence(context.location.read_table("table"))


def compared(config: EvaluateConfig, sources: Sources) -> list[Setting]:
    """The policies that the config names, or all, along their knobs; always with ``uniform``."""
    policies: list[BasePolicy] = list(config.policies or default_policies(sources))
    named = bool(config.policies)
    found = []
    if all(policy.kind != "uniform" for policy in policies):
        uniform = UniformPolicy(count=sources.space.choices[0])
        found += swept("uniform", uniform, sources, named=False)
    for name, policy in with_names(policies):
        found += swept(name, policy, sources, named)
    return found


def swept(name: str, policy: BasePolicy, sources: Sources, named: bool) -> list[Setting]:
    """A policy along its knob, quoted at its own value of it if it is ``named`` or weighs as the run does."""
    policy = policy.settled(sources)
    own = named or policy.weighs
    values = dict.fromkeys([*policy.sweep(sources), policy])
    return [Setting(name, value, headline=own and value == policy) for value in values]


def with_names(policies: Sequence[BasePolicy]) -> list[tuple[str, BasePolicy]]:
    """Every policy once: the first of a kind bears its name, later ones add what differs from the first."""
    firsts: dict[str, BasePolicy] = {}
    found = []
    for policy in dict.fromkeys(policies):
        first = firsts.setdefault(policy.kind, policy)
        changed = [f"{key}={value}" for key, value in policy if value != getattr(first, key)]
        found.append(("-".join([policy.kind, *changed]), policy))
    return found


def quoted(points: Sequence[Point], budget: float) -> list[Point]:
    """The points, with a headline for each policy: where it has none yet, the nearest in tokens to a budget.

    Of points as near as each other the first; near as a ratio.
    """
    nearest = {
        name: min(
            (point for point in points if point.policy == name),
            key=lambda point: (not point.headline, abs(math.log(point.tokens.mean() / budget))),
        )
        for name in dict.fromkeys(point.policy for point in points)
    }
    return [replace(point, headline=point is nearest[point.policy]) for point in points]


def measure(
    setting: Setting,
    evidence: Evidence,
    sources: Sources,
    final: dict[str, Tensor],
    known: RewardRows,
    rewards: Tensor,
) -> Point:
    """What the setting assigns to the clips, and what comes of it by the tables of all assignments."""
    policy = setting.policy
    assignment = policy.assign(evidence, sources)
    index = sources.space.index(assignment).unsqueeze(1)
    knob = getattr(policy, policy.knob)
    return Point(
        policy=setting.name,
        label=f"{policy.knob} {knob:g}",
        knob=float(knob),
        headline=setting.headline,
        deployable=not policy.oracle,
        assignment=assignment.numpy(),
        quality={name: looked_up(known.quality[name], index) for name in final},
        final={name: looked_up(table, index) for name, table in final.items()},
        reward=looked_up(rewards, index),
    )


def looked_up(table: Tensor, index: Tensor) -> NDArray[np.float64]:
    """table: [N, size], index: int64 [N, 1] -> [N]."""
    values: NDArray[np.float64] = table.double().gather(1, index).squeeze(1).numpy()
    return values


def all_rewards(known: RewardRows, sources: Sources, weights: RewardWeights) -> Tensor:
    """The proxy reward of every assignment of every clip: float64 [N, size]."""
    assert sources.metric is not None
    assert sources.statistics is not None
    metric = sources.metric.name
    quality = known.quality[metric].double()
    return reward(quality, sources.space.totals(), metric, weights, sources.statistics)


def per_clip(known: RewardRows, points: Sequence[Point]) -> pa.Table:
    """The long table: for every point its clips in their order."""
    tables = []
    for point in points:
        columns: dict[str, Any] = {
            "clip_id": known.clip_id,
            "policy": [point.policy] * len(known),
            "label": [point.label] * len(known),
            "knob": np.full(len(known), point.knob),
            "headline": [point.headline] * len(known),
            "assignment": pa.array(point.assignment.tolist(), pa.list_(pa.int32())),
            "tokens": point.assignment.sum(1),
            **point.quality,
            **{f"final_{name}": values for name, values in point.final.items()},
            "reward": point.reward,
        }
        tables.append(pa.table(columns))
    return pa.concat_tables(tables)


def film(
    context: StageContext, judge: Judge, known: RewardRows, points: Sequence[Point], rewards: Tensor
) -> None:
    """Write clips under several policies, from the one whose best assignment is shortest to the longest."""
    from evatok.distributed.schedule import Shard

    config: EvaluateConfig = context.config
    shown = [
        point
        for name in config.sample_policies
        for point in points
        if point.headline and point.policy.split("-")[0] == name
    ]
    wanted = min(config.samples, len(known)) if shown else 0
    order = judge.sources.space.totals()[rewards.argmax(1)].argsort(stable=True).numpy()
    chosen = order[np.unique(np.linspace(0, len(order) - 1, wanted).round().astype(int))]
    shards = [
        Shard(f"{i:04d}.parquet", 1, (known.row[clip].item(), [point.assignment[clip] for point in shown]))
        for i, clip in enumerate(chosen)
    ]
    if shards:
        fan_out_over(context, shards, film_clip, "films", judge, "samples")
    metric = judge.metrics[0].name
    rows = judge.clips.index.take(known.row[chosen].numpy()).to_pylist()
    clips = []
    for i, (clip, row) in enumerate(zip(chosen, rows)):
        films = context.location.read_table(f"films/{i:04d}.parquet")["mp4"].to_pylist()
        names = [f"samples/{i:02d}-{name}.mp4" for name in ("original", *(point.policy for point in shown))]
        for name, film in zip(names, films):
            context.location.write_bytes(name, film)
        columns = [
            {
                "policy": point.policy,
                "label": point.label,
                "assignment": point.assignment[clip].tolist(),
                "tokens": int(point.assignment[clip].sum()),
                "quality": float(point.final[metric][clip]),
                "video": name,
            }
            for point, name in zip(shown, names[1:])
        ]
        clips.append(
            {"clip_id": row["clip_id"], "motion": row["motion"], "original": names[0], "policies": columns}
        )
    size = judge.tokenizer.config.size
    context.location.write_json(
        "samples.json", {"metric": metric, "width": size, "height": size, "clips": clips}
    )
    context.location.delete("films")


def _inputs(config: EvaluateConfig) -> tuple[str, ...]:
    asked = not config.policies or any("router" in policy.needs for policy in config.policies)
    return ("index", "proxy", "curate", *["router"] * asked, "tokenizer")


def _check(config: EvaluateConfig, experiment: Any) -> Iterator[tuple[str, str]]:
    model = experiment.tokenizer.model
    space = AssignmentSpace.of(model)
    for place, policy in enumerate(config.policies):
        for problem in policy.problems(space):
            yield f"evaluate.policies.{place}", f"{policy.kind}: {problem}"
    for name in config.sample_policies:
        if name not in KINDS:
            yield "evaluate.sample_policies", f"there is no policy {name!r}, only {', '.join(KINDS)}"
    held_out = experiment.curate.clips.test
    if config.frechet and config.frechet_clips is None and held_out < FEWEST_CLIPS:
        yield "curate.clips.test", f"is {held_out}, but evaluate.frechet needs at least {FEWEST_CLIPS} clips"
    if config.frechet_clips is None:
        return
    if not config.frechet:
        yield "evaluate.frechet_clips", "are used by `frechet`, which is false: set it, or leave them out"
    yield from part_problems(
        "evaluate.frechet_clips.part", config.frechet_clips.part, experiment.index.source
    )


STAGE = Stage(
    name="evaluate",
    config=EvaluateConfig,
    run=run,
    inputs=_inputs,
    reads=("curate.reward",),
    outputs=("clips.parquet", "policies.json", "summary.json", "samples.json", "table/"),
    version=2,
    check=_check,
    weights=lambda config: ["i3d"] if config.frechet else [],
)

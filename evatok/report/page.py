"""The report of a run: one HTML file that opens offline, made from the run's artifacts alone.

Whatever is not there yet is left out, so a report can be drawn at any moment of a run.
"""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from evatok.artifacts import Location, Manifest, read_curves, read_manifest
from evatok.report import figures
from evatok.report.svg import number

CHAIN = ("index", "proxy", "curate", "router", "tokenizer", "evaluate")
STAGES = (*CHAIN[:5], "tokens", "generator", "generate", "evaluate")
REPORT = "report.html"

Figures = list[str]


class StageRow(NamedTuple):
    """A stage's state (done, unfinished, missing), seconds, and share of the longest stage's time."""

    name: str
    state: str
    seconds: float | None
    share: float
    metrics: Mapping[str, Any]


class Tile(NamedTuple):
    """A headline number and what it is compared with."""

    title: str
    value: str
    note: str


def write_report(run: Location) -> str:
    """Draw the report of the run at ``run`` into its folder; returns the report's URI."""
    run.write_bytes(REPORT, render(run).encode())
    return f"{run.uri}/{REPORT}"


def render(run: Location) -> str:
    """The whole page as one string of HTML without a reference to anything outside it."""
    folders = [name for name in run.list() if "." not in name]  # files have endings, stages do not
    manifests = {name: m for name in folders if (m := read_manifest(run / name)) is not None}
    stages = _stages(manifests)
    evaluated = run / "evaluate"
    policies = _json(evaluated, "policies.json")
    summary = _json(evaluated, "summary.json")
    return (
        environment()
        .get_template("run.html")
        .render(
            name=run.uri.rstrip("/").rpartition("/")[2],
            stages=stages,
            seconds=sum(stage.seconds or 0 for stage in stages),
            finished=max((m.finished for m in manifests.values() if m.finished), default=None),
            summary=summary,
            tiles=_tiles(summary),
            quality=_quality(policies),
            savings=_savings(summary),
            strips=_strips(evaluated, (policies or {}).get("choices", [])),
            clips=_clips(evaluated, policies),
            generated=_generated(run, (policies or {}).get("choices", [])),
            curves={name: panels for name in _ordered(folders) if (panels := _curves(run / name))},
            index=_index(run / "index"),
            reward=_json(run / "curate", "statistics.json"),
            router=_held_out(manifests.get("router")),
            experiment=_text(run, "experiment.yaml"),
            versions=next(iter(manifests.values())).versions if manifests else {},
            seeds=sorted({m.seed for m in manifests.values()}),
        )
    )


def environment() -> jinja2.Environment:
    """Templates of this package, with the filters that they use."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("evatok", "report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    found.filters.update(number=number, duration=duration, metric=figures.title_of, colour=figures.colour)
    return found


def duration(seconds: float | None) -> str:
    """Seconds as people say them: 42 s, 3 min 20 s, 5 h 02 min, 3 d 04 h."""
    if seconds is None:
        return "\u2013"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def _ordered(names: Sequence[str]) -> list[str]:
    """The chain's stages in the chain's order, then the others."""
    known = [name for name in STAGES if name in names]
    return known + [name for name in names if name not in STAGES]


def _stages(manifests: Mapping[str, Manifest]) -> list[StageRow]:
    """A row for every stage of the chain, done or not, and for every other stage of the run."""
    done = {
        name: (manifest.finished - manifest.started).total_seconds()
        for name, manifest in manifests.items()
        if manifest.state == "done" and manifest.finished
    }
    longest = max(done.values(), default=0) or 1
    rows = []
    for name in _ordered(list(dict.fromkeys([*CHAIN, *manifests]))):
        state = "done" if name in done else "unfinished" if name in manifests else "missing"
        metrics = manifests[name].metrics if name in manifests else {}
        rows.append(StageRow(name, state, done.get(name), done.get(name, 0) / longest, metrics))
    return rows


def _tiles(summary: Mapping[str, Any] | None) -> list[Tile]:
    """The headline numbers, each with what it is compared with."""
    if not summary:
        return []
    head, metric = summary["headline"], summary["metric"]
    measure, best = figures.title_of(metric), head["best_uniform"]
    tiles = []
    if router := summary["policies"].get("router"):
        against = (
            f"with {number(router['mean_tokens'])} tokens; best uniform ({best['label']},"
            f" {number(best['tokens'])} tokens): {number(best['reward_percentile'])} %"
        )
        tiles.append(
            Tile("router\u2019s reward percentile", f"{number(router['reward_percentile'])} %", against)
        )
        for reference in ("uniform", "static"):
            if saving := router.get(f"token_saving_at_setting_vs_{reference}"):
                spread = f"{number(saving['low'])} to {number(saving['high'])} %"
                note = f"router, at equal {measure} ({number(router[metric])}); {spread}"
                tiles.append(Tile(f"tokens saved against {reference}", f"{number(saving['value'])} %", note))
    few, many = head["quality_by_tokens"][0], head["quality_by_tokens"][-1]
    slope = (many[metric] - few[metric]) / np.log2(many["tokens"] / few["tokens"])
    ends = ", ".join(f"{number(end[metric])} at {number(end['tokens'])}" for end in (few, many))
    rises = "better at every step" if head["rises_with_tokens"] else "not better at every step"
    tiles.append(Tile(f"{measure} with each doubling of tokens", number(slope), f"{ends}; {rises}"))
    lead = number(head["oracle_reward"] - best["reward"])
    beats = "beats" if head["oracle_beats_uniforms"] else "does not beat"
    tiles.append(
        Tile("oracle\u2019s reward above the best uniform\u2019s", lead, f"{beats} every uniform policy")
    )
    return tiles


def _quality(policies: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The centrepiece: a view for each metric and tokenizer, wide and narrow."""
    if not policies:
        return None
    shown = {
        name: {**entry, "points": sorted(entry["points"], key=lambda point: point["mean_tokens"])}
        for name, entry in policies["policies"].items()
    }
    final = {
        name: {**entry, "points": [{**p, "intervals": {}, **p["final"]} for p in entry["points"]]}
        for name, entry in shown.items()
    }
    wanted = [
        (figures.title_of(metric), shown, metric) for metric in [*policies["metrics"], "reward_percentile"]
    ]
    wanted += [
        (f"{figures.title_of(metric)}, final tokenizer", final, metric) for metric in policies["metrics"]
    ]
    views = [
        {
            "title": title,
            "wide": figures.quality_against_tokens(entries, metric, width=1000, height=520, labels=True),
            "narrow": figures.quality_against_tokens(entries, metric, width=380, height=400, labels=False),
        }
        for title, entries, metric in wanted
    ]
    return {**policies, "policies": shown, "views": views}


def _savings(summary: Mapping[str, Any] | None) -> Figures:
    """Interval plots: reward percentile and the token savings of every policy."""
    if not summary:
        return []
    drawn = []
    for key, title in (
        ("token_saving_at_setting_vs_uniform", "tokens saved against uniform as quoted, %"),
        ("token_saving_at_setting_vs_static", "tokens saved against static as quoted, %"),
        ("token_saving_vs_uniform", "tokens saved against uniform over the curve, %"),
        ("token_saving_vs_static", "tokens saved against static over the curve, %"),
        ("reward_percentile_interval", "reward percentile, %"),
    ):
        rows = [
            (name, entry[key]["value"], entry[key]["low"], entry[key]["high"])
            for name, entry in summary["policies"].items()
            if entry.get(key)
        ]
        if rows:
            saving = key.startswith("token")
            tokens = None if saving else {n: entry["mean_tokens"] for n, entry in summary["policies"].items()}
            drawn.append(figures.intervals(rows, title, zero=saving, tokens=tokens))
    return drawn


def _strips(evaluated: Location, choices: Sequence[int]) -> dict[str, Any] | None:
    """Policies side by side on the same clips: data URIs of the videos and the assignment of each."""
    samples = _json(evaluated, "samples.json")
    if not samples or not samples["clips"]:
        return None
    clips = []
    for clip in samples["clips"]:
        columns = [
            {
                **c,
                "video": _video(evaluated, c["video"]),
                "bars": figures.assignment_bars(c["assignment"], choices, c["policy"]),
            }
            for c in clip["policies"]
        ]
        clips.append({**clip, "original": _video(evaluated, clip["original"]), "policies": columns})
    return {**samples, "clips": clips}


def _generated(run: Location, choices: Sequence[int]) -> dict[str, Any] | None:
    """Samples of the generator: generate/samples.json, else generator/samples.json.

    {"clips": [{"video": name in that folder, "title", "tokens", "assignment"}]}.
    """
    folder = next(
        (run / name for name in ("generate", "generator") if _json(run / name, "samples.json")), None
    )
    if folder is None:
        return None
    samples = _json(folder, "samples.json")
    clips = [
        {
            **clip,
            "video": _video(folder, clip["video"]),
            "bars": figures.assignment_bars(clip["assignment"], choices or clip["assignment"], "router"),
        }
        for clip in samples["clips"]
    ]
    return {**samples, "clips": clips}


def _clips(evaluated: Location, policies: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the per-clip table shows: tokens, regret, and the router against the oracle by block."""
    if policies is None or not evaluated.exists("clips.parquet"):
        return None
    columns = ["clip_id", "policy", "headline", "assignment", "tokens", "reward"]
    table = evaluated.read_table("clips.parquet", columns)
    table = table.filter(pc.field("headline"))
    by_policy = {name: table.filter(pc.equal(table["policy"], name)) for name in policies["policies"]}
    by_policy = {name: rows for name, rows in by_policy.items() if rows.num_rows}
    choices, blocks = policies["choices"], policies["blocks"]
    edges = np.linspace(min(choices) * blocks, max(choices) * blocks, 25).tolist()
    adaptive = {n: t for n, t in by_policy.items() if len(set(t["tokens"].to_pylist())) > 1}
    assigned = {n: _assignments(t) for n, t in by_policy.items()}
    most = max((a.mean(0).max() for a in assigned.values()), default=1.0)
    found: dict[str, Any] = {
        "tokens": [
            figures.histogram(n, t["tokens"].to_pylist(), edges, "tokens") for n, t in adaptive.items()
        ],
        "blocks": [figures.tokens_by_block(n, a.mean(0).tolist(), most) for n, a in assigned.items()],
    }
    if "oracle" not in by_policy:
        return found
    best = by_policy["oracle"]["reward"].to_numpy()
    regrets = {n: best - t["reward"].to_numpy() for n, t in by_policy.items() if n != "oracle"}
    worst = max((float(np.quantile(r, 0.98)) for r in regrets.values()), default=1.0) or 1.0
    found["regret"] = [
        figures.histogram(n, np.clip(r, 0, worst).tolist(), np.linspace(0, worst, 25).tolist(), "regret")
        for n, r in regrets.items()
    ]
    if "router" in assigned:
        pairs = zip(assigned["oracle"].T, assigned["router"].T)
        found["confusion"] = [
            figures.confusion(block, _counts(truth, guess, choices), choices)
            for block, (truth, guess) in enumerate(pairs)
        ]
    return found


def _assignments(rows: pa.Table) -> np.ndarray:
    return np.asarray(rows["assignment"].to_pylist(), dtype=np.int64)


def _counts(truth: np.ndarray, guess: np.ndarray, choices: Sequence[int]) -> list[list[int]]:
    return [[int(((truth == a) & (guess == b)).sum()) for b in choices] for a in choices]


def _curves(stage: Location) -> Figures:
    """One panel per metric that moves, both splits in it, qualities first; then where a step's time went."""
    series: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in read_curves(stage):
        for key, value in row.items():
            if key not in ("step", "samples", "time", "split") and isinstance(value, int | float):
                series[key][row["split"]].append((row["step"], value))
    times = {key.removeprefix("time_"): series.pop(key) for key in list(series) if key.startswith("time_")}
    moving = [key for key, splits in series.items() if len({v for c in splits.values() for _, v in c}) > 1]
    first = sorted(
        moving, key=lambda key: (key not in figures.METRICS, key != "loss", "eval" not in series[key], key)
    )
    panels = [figures.curve_panel(figures.title_of(key), series[key]) for key in first]
    if times:
        means = {part: float(np.mean([v for _, v in splits["train"]])) for part, splits in times.items()}
        panels.append(figures.shares("time of a step", means))
    return panels


def _held_out(router: Manifest | None) -> dict[str, Any]:
    """The router's last measures on held-out clips."""
    metrics = router.metrics if router else {}
    return {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}


def _index(index: Location) -> dict[str, Any] | None:
    """Counts of clips and videos by split, and of what was rejected by reason."""
    if not index.exists("clips.parquet"):
        return None
    table = index.read_table("clips.parquet", ["uri", "split", "frames", "width", "height", "fps"])
    counts = table.group_by("split").aggregate([("uri", "count"), ("uri", "count_distinct")]).to_pylist()
    rejected: list[dict[str, Any]] = []
    if index.exists("rejected.parquet"):
        reasons = (
            index.read_table("rejected.parquet", ["code"]).group_by("code").aggregate([("code", "count")])
        )
        rejected = sorted(reasons.to_pylist(), key=lambda row: -row["code_count"])
    return {
        "clips": table.num_rows,
        "videos": pc.count_distinct(table["uri"]).as_py(),
        "splits": sorted(counts, key=lambda row: -row["uri_count"]),
        "rejected": rejected,
        "rejected_total": sum(row["code_count"] for row in rejected),
    }


def _json(folder: Location, name: str) -> Any:
    text = _text(folder, name)
    return json.loads(text) if text else None


def _text(folder: Location, name: str) -> str:
    return folder.read_bytes(name).decode() if folder.exists(name) else ""


def _video(folder: Location, name: str) -> str:
    data = base64.b64encode(folder.read_bytes(name)).decode()
    return f"data:video/mp4;base64,{data}"

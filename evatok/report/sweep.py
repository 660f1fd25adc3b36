"""The report of a sweep: trade-off, parallel coordinates and every trial, from the sweep's folder alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from evatok.artifacts import Location
from evatok.report import figures
from evatok.report.page import REPORT, environment
from evatok.report.svg import Plot, Point, Scale, number

Trial = Mapping[str, Any]


def write_sweep_report(sweep: Location) -> str:
    """Draw the report of the sweep at ``sweep`` into its folder; returns the report's URI.

    Reads ``sweep.json`` and, for what has not come to its end, ``trials/*/trial.json``.
    """
    summary = sweep.read_json("sweep.json") if sweep.exists("sweep.json") else {}
    trials = [
        {"name": name, "settings": record["values"], "metrics": record["metrics"], "state": record["state"]}
        for name in sweep.list("trials")
        if (sweep / "trials" / name).exists("trial.json")
        for record in [(sweep / "trials" / name).read_json("trial.json")]
    ]
    config = sweep.read_bytes("sweep.yaml").decode() if sweep.exists("sweep.yaml") else ""
    page = render_sweep(sweep.uri.rstrip("/").rpartition("/")[2], summary, trials, config)
    sweep.write_bytes(REPORT, page.encode())
    return f"{sweep.uri}/{REPORT}"


def render_sweep(name: str, summary: Mapping[str, Any], trials: Sequence[Trial], config: str) -> str:
    """The page; ``summary``: {"objectives": {metric: "min" or "max"}, "best": [names], "exported": name}."""
    objectives: dict[str, str] = summary.get("objectives", {})
    front = summary.get("best", [])
    parameters = list(dict.fromkeys(key for trial in trials for key in trial["settings"]))
    done = [t for t in trials if t["state"] == "done" and all(m in t["metrics"] for m in objectives)]
    first = next(iter(objectives), None)
    if first:
        done.sort(key=lambda t: t["metrics"][first], reverse=objectives[first] == "max")
    context: dict[str, Any] = {
        "name": name,
        "objectives": objectives,
        "parameters": parameters,
        "trials": [*done, *(t for t in trials if t not in done)],
        "done": done,
        "others": Counter(t["state"] for t in trials if t not in done),
        "front": front,
        "best": next((t for t in done if t["name"] == summary.get("exported")), None),
        "config": config,
    }
    if first and done:
        axes = [*parameters, *objectives]
        context["parallel"] = {
            "wide": parallel_coordinates(done, axes, objectives, front, width=1100, height=360),
            "narrow": parallel_coordinates(done, axes, objectives, front, width=380, height=340),
        }
        context["scatter"] = [setting_panel(done, key, first, front) for key in parameters]
    if len(objectives) > 1 and done:
        context["trade_off"] = {
            "wide": trade_off(done, objectives, front, width=1000, height=440),
            "narrow": trade_off(done, objectives, front, width=380, height=340),
        }
    return environment().get_template("sweep.html").render(context)


def trade_off(
    trials: Sequence[Trial],
    objectives: Mapping[str, str],
    front: Sequence[str],
    *,
    width: float,
    height: float,
) -> str:
    """Trials by the first objective (upwards) and the second (to the left), the front joined by a band."""
    up, across = list(objectives)[:2]
    plot = Plot(width, height, (14, 16, 44, 58))
    x = _towards(trials, across, objectives[across] == "min", plot.left, plot.right)
    y = _towards(trials, up, objectives[up] == "max", plot.bottom, plot.top)
    plot.y_axis(y, count=5)
    plot.x_axis(x, count=6, title=figures.title_of(across), grid=True)
    best = sorted((x(t["metrics"][across]), y(t["metrics"][up])) for t in trials if t["name"] in front)
    plot.line(best, "front")
    for trial in trials:
        at = (x(trial["metrics"][across]), y(trial["metrics"][up]))
        chosen = trial["name"] in front
        style = f"--c:var({'--p0' if chosen else '--faint'})"
        plot.mark("circle", at, 5.5 if chosen else 4, tip=_tip(trial), style=style)
    plot.text(plot.left + 6, plot.top + 12, f"\u2191 better {figures.title_of(up)}", "tick")
    return plot.svg(f"{figures.title_of(up)} against {figures.title_of(across)}, one mark per trial")


def parallel_coordinates(
    trials: Sequence[Trial],
    axes: Sequence[str],
    objectives: Mapping[str, str],
    front: Sequence[str],
    *,
    width: float,
    height: float,
) -> str:
    """A vertical axis per setting and objective, better upwards; a line per trial, given from the best on."""
    plot = Plot(width, height, (44, 46, 14, 46))
    step = (plot.right - plot.left) / max(len(axes) - 1, 1)
    lines: list[list[Point]] = [[] for _ in trials]
    labels: list[tuple[float, float, str, str]] = []
    for i, axis in enumerate(axes):
        x = plot.left + i * step
        values = [{**t["settings"], **t["metrics"]}.get(axis) for t in trials]
        heights, ticks = _axis(values, plot, flipped=objectives.get(axis) == "min")
        plot.rule((x, plot.top), (x, plot.bottom), "axis")
        label = axis.rpartition(".")[2] if axis not in objectives else figures.title_of(axis)
        anchor = "start" if i == 0 else "end" if i == len(axes) - 1 else "middle"
        edge = {"start": 0.0, "end": plot.width, "middle": x}[anchor]
        plot.text(edge, 14 + 14 * (i % 2), label, "label", anchor=anchor)
        for y, text in ticks:
            last = i == len(axes) - 1
            labels.append((x + (6 if last else -6), y + 4, text, "start" if last else "end"))
        for line, at in zip(lines, heights):
            if at is not None:
                line.append((x, at))
    for rank, (trial, line) in reversed(list(enumerate(zip(trials, lines)))):
        chosen = trial["name"] in front
        shade = 0.75 - 0.6 * rank / max(len(trials) - 1, 1)
        style = f"--c:var({'--p0' if chosen else '--ink'});opacity:{1 if chosen else shade:.2f}"
        plot.line(line, "line", style + ("" if chosen else ";stroke-width:1.25"))
        for spot in line:
            plot.mark("circle", spot, 3, tip=_tip(trial), style=style)
    for x, y, text, anchor in labels:
        plot.text(x, y, text, "tick over", anchor=anchor)
    return plot.svg(f"settings and results of {len(trials)} trials, one line each")


def setting_panel(trials: Sequence[Trial], key: str, metric: str, front: Sequence[str]) -> str:
    """One setting against the first objective."""
    plot = Plot(320, 190, (26, 14, 26, 52))
    y = Scale.over((t["metrics"][metric] for t in trials), plot.bottom, plot.top)
    values = [t["settings"].get(key) for t in trials]
    plot.text(4, 14, key, "panel-title")
    plot.y_axis(y, count=4)
    across = Plot(plot.bottom - plot.top, plot.right - plot.left, (0, 0, 0, 0))  # the axis, lying down
    places, ticks = _axis(values, across, flipped=True)
    for place, text in ticks:
        plot.text(plot.left + place, plot.bottom + 15, text, "tick", anchor="middle")
    plot.rule((plot.left, plot.bottom), (plot.right, plot.bottom), "axis")
    for trial, at in zip(trials, places):
        if at is not None:
            style = f"--c:var({'--p0' if trial['name'] in front else '--faint'})"
            plot.mark(
                "circle", (plot.left + at, y(trial["metrics"][metric])), 4, tip=_tip(trial), style=style
            )
    return plot.svg(f"{figures.title_of(metric)} by {key}")


def _towards(trials: Sequence[Trial], metric: str, rising: bool, start: float, end: float) -> Scale:
    ends = (start, end) if rising else (end, start)
    return Scale.over((t["metrics"][metric] for t in trials), *ends)


def _axis(
    values: Sequence[Any], plot: Plot, *, flipped: bool
) -> tuple[list[float | None], list[tuple[float, str]]]:
    """Places of values from the plot's bottom to its top, and ticks: numbers on a scale, words in slots."""
    start, end = (plot.top, plot.bottom) if flipped else (plot.bottom, plot.top)
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) == len(values):
        wide = min(numbers) > 0 and max(numbers) / min(numbers) >= 20
        scale = Scale.over(numbers, start, end, log=10 if wide else 0)
        return [scale(v) for v in numbers], [(scale(t), text) for t, text in scale.labelled_ticks(4)]
    slots = sorted({str(v) for v in values if v is not None})
    places = {s: start + (end - start) * (i + 0.5) / len(slots) for i, s in enumerate(slots)}
    return [places.get(str(v)) for v in values], [(place, slot) for slot, place in places.items()]


def _tip(trial: Trial) -> str:
    shown = {**trial["settings"], **trial["metrics"]}
    lines = [
        f"{key} {number(value, 4) if isinstance(value, float) else value}" for key, value in shown.items()
    ]
    return "\n".join([f"trial {trial['name']}", *lines[:10]])

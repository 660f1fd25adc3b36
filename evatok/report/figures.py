"""The report's figures, each a function from plain numbers to an inline SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evatok.report.svg import MARKERS, Plot, Point, Scale, number

METRICS: dict[str, tuple[str, bool]] = {  # name: (how people write it, higher is better)
    "lpips": ("LPIPS (AlexNet)", False),
    "lpips-vgg": ("LPIPS (VGG)", False),
    "lpips-squeeze": ("LPIPS (SqueezeNet)", False),
    "dssim": ("DSSIM", False),
    "mse": ("MSE", False),
    "psnr": ("PSNR, dB", True),
    "ssim": ("SSIM", True),
    "reward": ("reward", True),
    "reward_percentile": ("reward percentile", True),
}

# Hue and mark of each policy: the same on the whole page. Hues are CSS variables --p0 ... --p9 (page.css).
_LOOKS: dict[str, tuple[str, str, str]] = {  # name: (colour, marker, dash)
    "oracle": ("--ink", "diamond", "5 4"),
    "best_uniform": ("--muted", "diamond", "2 3"),
    "uniform": ("--muted", "square", ""),
    "random": ("--faint", "cross", "2 3"),
    "static": ("--p1", "square", ""),
    "router": ("--p0", "circle", ""),
    "budgeted": ("--p2", "circle", ""),
    "threshold": ("--p3", "up", ""),
    "recurrent": ("--p4", "down", ""),
    "ilp": ("--p5", "diamond", ""),
    "information": ("--p6", "up", ""),
    "difference": ("--p7", "down", ""),
}


def look(policy: str) -> tuple[str, str, str]:
    """(CSS colour variable, marker, dash pattern) of a policy; unknown names get one by their letters."""
    kind, _, variant = policy.partition("-")
    if kind in _LOOKS:
        hue, shape, dash = _LOOKS[kind]
        return hue, shape, "6 2" if variant else dash
    mixed = sum((i + 1) * ord(c) for i, c in enumerate(policy))
    return f"--p{2 + mixed % 8}", MARKERS[mixed % len(MARKERS)], "6 2"


def colour(policy: str) -> str:
    return f"--c:var({look(policy)[0]})"


def title_of(metric: str) -> str:
    return METRICS.get(metric, (metric.replace("_", " "), False))[0]


def better_up(metric: str) -> bool:
    return METRICS.get(metric, (metric, False))[1]


def pareto_front(curves: Sequence[Sequence[Point]], higher_is_better: bool) -> list[Point]:
    """The best quality that any curve reaches with at most so many tokens: (tokens, quality) by tokens.

    curves: (tokens, quality) by tokens; between two points a curve is taken as straight over log tokens.
    """
    sign = 1 if higher_is_better else -1
    budgets = {tokens for curve in curves for tokens, _ in curve}
    if len(budgets) > 1:
        budgets |= set(np.geomspace(min(budgets), max(budgets), 160).tolist())
    front: list[Point] = []
    best = -math.inf
    for tokens in sorted(budgets):
        for curve in curves:
            at, quality = np.log([p[0] for p in curve]), [sign * p[1] for p in curve]
            if curve[0][0] <= tokens <= curve[-1][0]:
                best = max(best, float(np.interp(math.log(tokens), at, quality)))
        front.append((tokens, sign * best))
    return front


def quality_against_tokens(
    policies: Mapping[str, Mapping[str, Any]], metric: str, *, width: float, height: float, labels: bool
) -> str:
    """Every policy's curve on one pair of axes: tokens (log2) against quality, better always upwards.

    ``policies``: name -> {"points": [{"mean_tokens", metric, "label"}], "deployable": bool}, by tokens. The
    Pareto front is over the deployable policies. ``labels``: names at the curves' ends.
    """
    up = better_up(metric)
    drawn = {
        name: [p for p in entry["points"] if p.get(metric) is not None]
        for name, entry in policies.items()
        if any(p.get(metric) is not None for p in entry["points"])
    }
    plot = Plot(width, height, (14, 116 if labels else 14, 44, 52))
    every = [p for points in drawn.values() for p in points]
    x = Scale.over((p["mean_tokens"] for p in every), plot.left, plot.right, log=2, pad=0.04)
    ends = (plot.bottom, plot.top) if up else (plot.top, plot.bottom)
    y = Scale.over((p[metric] for p in every), *ends)
    plot.y_axis(y, count=5)
    plot.x_axis(x, count=6, title="mean tokens per clip", grid=True)
    front = pareto_front(
        [[(p["mean_tokens"], p[metric]) for p in ps] for n, ps in drawn.items() if policies[n]["deployable"]],
        up,
    )
    plot.line([(x(a), y(b)) for a, b in front], "front")
    ordered = sorted(drawn, key=lambda name: name in ("router", "oracle"))
    for name in ordered:
        shape, dash = look(name)[1:]
        layer = Plot(width, height, plot.margins)
        at = [(x(p["mean_tokens"]), y(p[metric])) for p in drawn[name]]
        layer.line(at, "line", f"stroke-dasharray:{dash}" if dash else "")
        for p, spot in zip(drawn[name], at):
            layer.mark(shape, spot, 4.5 if name == "router" else 3.6, "mark", _point_tip(name, p, metric))
        css = f"series{' lead' if name == 'router' else ''}"
        style = f'<g class="{css}" data-policy="{name}" style="{colour(name)}">{"".join(layer.parts)}</g>'
        plot.parts.append(style)
    if labels:
        _end_labels(plot, {n: (x(drawn[n][-1]["mean_tokens"]), y(drawn[n][-1][metric])) for n in ordered})
    plot.text(plot.left + 6, plot.top + 12, "\u2191 better", "tick")
    return plot.svg(f"{title_of(metric)} against mean tokens per clip, one curve per policy")


def _point_tip(name: str, point: Mapping[str, Any], metric: str) -> str:
    lines = [f"{name} {point.get('label', '')}".strip(), f"{number(point['mean_tokens'], 4)} tokens"]
    interval = (point.get("intervals") or {}).get(metric)
    spread = f" [{number(interval[0])}, {number(interval[1])}]" if interval else ""
    lines.append(f"{title_of(metric)} {number(point[metric])}{spread}")
    if metric != "reward_percentile" and point.get("reward_percentile") is not None:
        lines.append(f"reward percentile {number(point['reward_percentile'])}")
    return "\n".join(lines)


def _end_labels(plot: Plot, ends: Mapping[str, Point]) -> None:
    """Names right of the axes, at their curve's height as far as they do not overlap."""
    gap = 14.0
    placed: list[tuple[str, float]] = []
    for name, (_, y) in sorted(ends.items(), key=lambda item: item[1][1]):
        placed.append((name, max(y, placed[-1][1] + gap) if placed else y))
    overflow = placed[-1][1] - plot.bottom if placed else 0.0
    limit = plot.bottom
    for i in range(len(placed) - 1, -1, -1):
        if overflow <= 0:
            break
        name, y = placed[i]
        placed[i] = (name, min(y, limit))
        limit = placed[i][1] - gap
    for name, y in placed:
        x_end, y_end = ends[name]
        plot.parts.append(f'<g class="series" data-policy="{name}" style="{colour(name)}">')
        plot.line([(x_end + 6, y_end), (plot.right + 4, y), (plot.right + 10, y)], "leader")
        plot.text(plot.right + 14, y + 4, name, "label")
        plot.parts.append("</g>")


def curve_panel(title: str, series: Mapping[str, Sequence[Point]]) -> str:
    """A small multiple: one metric over training steps; ``series`` by split. Log axis if it spans decades."""
    plot = Plot(320, 178, (26, 12, 24, 48))
    values = [v for points in series.values() for _, v in points if math.isfinite(v)]
    log = bool(values) and min(values) > 0 and max(values) / min(values) > 12
    x = Scale.over((s for points in series.values() for s, _ in points), plot.left, plot.right, pad=0)
    y = Scale.over(values, plot.bottom, plot.top, log=10 if log else 0)
    plot.text(4, 14, title + (" (log)" if log else ""), "panel-title")
    plot.y_axis(y, count=4)
    plot.x_axis(x, count=4)
    for split, points in series.items():
        finite = [(s, v) for s, v in points if math.isfinite(v)]
        if not finite:
            continue
        plot.line([(x(s), y(v)) for s, v in thin(finite)], f"line {split}")
        if len(finite) <= 24:
            for s, v in finite:
                plot.mark(
                    "circle", (x(s), y(v)), 2.6, f"mark {split}", f"step {number(s)}\n{split} {number(v)}"
                )
        else:
            s, v = finite[-1]
            plot.mark(
                "circle", (x(s), y(v)), 3, f"mark {split}", f"last, step {number(s)}\n{split} {number(v)}"
            )
    return plot.svg(f"{title} over training steps")


def thin(points: Sequence[Point], most: int = 240) -> list[Point]:
    """At most about ``most`` points: means of equal runs of neighbours, the last point kept as it is."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    runs = [points[i : i + size] for i in range(0, len(points) - 1, size)]
    return [(sum(s for s, _ in r) / len(r), sum(v for _, v in r) / len(r)) for r in runs] + [points[-1]]


def histogram(policy: str, values: Sequence[float], edges: Sequence[float], unit: str) -> str:
    """How often ``values`` fall into the bins between ``edges`` (the last one closed); with their mean."""
    plot = Plot(300, 130, (26, 10, 24, 10))
    counts = [0] * (len(edges) - 1)
    for value in values:
        position = next((i for i, edge in enumerate(edges[1:]) if value < edge), len(counts) - 1)
        counts[position] += 1
    x = Scale(edges[0], edges[-1], plot.left, plot.right)
    top = max(*counts, 1)
    mean = sum(values) / max(len(values), 1)
    plot.text(4, 14, policy, "panel-title")
    plot.text(plot.right, 14, f"mean {number(mean)}", "tick", anchor="end")
    for count, low, high in zip(counts, edges, edges[1:]):
        tall = (plot.bottom - plot.top) * count / top
        tip = f"{number(low)} to {number(high)} {unit}\n{count} of {len(values)} clips"
        plot.bar(
            x(low) + 0.75, plot.bottom - tall, x(high) - x(low) - 1.5, tall, tip=tip, style=colour(policy)
        )
    plot.x_axis(x, count=5)
    plot.rule((x(mean), plot.top - 4), (x(mean), plot.bottom), "mean")
    return plot.svg(f"{policy}: distribution of {unit} over {len(values)} clips")


def shares(title: str, parts: Mapping[str, float]) -> str:
    """Parts of a whole as bars, largest first; ``parts``: shares in [0, 1], what is missing is "other"."""
    rest = 1 - sum(parts.values())
    rows = sorted(
        ({**parts, "other": rest} if rest > 0.005 else dict(parts)).items(), key=lambda row: -row[1]
    )
    plot = Plot(320, 178, (34, 44, 8, 84))
    step = (plot.bottom - plot.top) / len(rows)
    plot.text(4, 14, title, "panel-title")
    for i, (name, share) in enumerate(rows):
        y = plot.top + i * step
        plot.text(plot.left - 8, y + step / 2 + 4, name, "tick", anchor="end")
        plot.bar(plot.left, y + 3, (plot.right - plot.left) * share, step - 6, "bar train")
        plot.text(plot.right + 40, y + step / 2 + 4, f"{100 * share:.0f} %", "value", anchor="end")
    return plot.svg(f"{title}: " + ", ".join(f"{name} {100 * share:.0f} %" for name, share in rows))


def confusion(block: int, counts: Sequence[Sequence[int]], choices: Sequence[int]) -> str:
    """Router (columns) against oracle (rows) token counts of one block, shade by share of the row."""
    cells = len(choices)
    size = 40.0
    plot = Plot(64 + cells * size, 66 + cells * size, (34, 6, 32, 58))
    plot.text(4, 14, f"block {block + 1}", "panel-title")
    for row, label in enumerate(choices):
        total = sum(counts[row])
        plot.text(plot.left - 8, plot.top + row * size + size / 2 + 4, number(label), "tick", anchor="end")
        plot.text(plot.left + row * size + size / 2, plot.bottom + 15, number(label), "tick", anchor="middle")
        for column, count in enumerate(counts[row]):
            share = count / total if total else 0.0
            at = (plot.left + column * size, plot.top + row * size)
            tip = f"oracle {label}, router {choices[column]}\n{count} of {total} clips"
            plot.bar(at[0] + 1, at[1] + 1, size - 2, size - 2, "cell", tip, f"--share:{share:.3f}")
            if count:
                css = "cell-count strong" if share > 0.55 else "cell-count"
                plot.text(at[0] + size / 2, at[1] + size / 2 + 4, number(count), css, anchor="middle")
    return plot.svg(f"router against oracle, block {block + 1}")


def intervals(
    rows: Sequence[tuple[str, float, float, float]],
    title: str,
    *,
    zero: bool = True,
    tokens: Mapping[str, float] | None = None,
) -> str:
    """One line per (policy, value, low, high) in per cent, by value: a dot and its interval.

    ``tokens``: of each policy, named beside its value.
    """
    ordered = sorted(rows, key=lambda row: -row[1])
    plot = Plot(380, 46 + 26 * len(ordered), (8, 120 if tokens else 50, 36, 94))
    bounds = [v for row in ordered for v in row[1:]] + ([0.0] if zero else [])
    x = Scale.over(bounds, plot.left, plot.right)
    plot.x_axis(x, count=5, title=title, grid=True)
    if zero:
        plot.rule((x(0), plot.top), (x(0), plot.bottom), "mean")
    for i, (name, value, low, high) in enumerate(ordered):
        y = plot.top + 26 * i + 13
        plot.text(plot.left - 10, y + 4, name, "label" if name != "router" else "label lead", anchor="end")
        plot.parts.append(f'<g class="series" data-policy="{name}" style="{colour(name)}">')
        plot.rule((x(low), y), (x(high), y), "whisker")
        tip = f"{name}\n{number(value)} % [{number(low)}, {number(high)}]"
        plot.mark(look(name)[1], (x(value), y), 5, "mark", tip)
        plot.parts.append("</g>")
        at = f", {number(tokens[name])} tokens" if tokens else ""
        plot.text(plot.width - 2, y + 4, f"{number(value)} %{at}", "value", anchor="end")
    return plot.svg(f"{title}, by policy")


def tokens_by_block(policy: str, means: Sequence[float], most: float) -> str:
    """Mean tokens of each temporal block under one policy; ``most`` is the axis' end for all policies."""
    plot = Plot(200, 128, (26, 8, 22, 8))
    step = (plot.right - plot.left) / len(means)
    plot.text(4, 14, policy, "panel-title")
    for i, mean in enumerate(means):
        tall = (plot.bottom - plot.top - 12) * mean / most
        left = plot.left + i * step
        plot.bar(
            left + 3,
            plot.bottom - tall,
            step - 6,
            tall,
            tip=f"block {i + 1}\n{number(mean)} tokens",
            style=colour(policy),
        )
        plot.text(left + step / 2, plot.bottom - tall - 4, number(mean), "tick", anchor="middle")
        plot.text(left + step / 2, plot.bottom + 14, str(i + 1), "tick", anchor="middle")
    plot.rule((plot.left, plot.bottom), (plot.right, plot.bottom), "axis")
    return plot.svg(f"{policy}: mean tokens by block")


def assignment_bars(assignment: Sequence[int], choices: Sequence[int], policy: str) -> str:
    """The assignment over time, a bar per block as high as its choice's rank; page.js moves the playhead."""
    plot = Plot(160, 52, (3, 0, 15, 0))
    ranks = sorted(choices)
    step = plot.width / len(assignment)
    for i, count in enumerate(assignment):
        rank = (sum(c <= count for c in ranks) or 1) / len(ranks)
        tall = (plot.bottom - plot.top) * rank
        plot.bar(i * step + 1, plot.top, step - 2, plot.bottom - plot.top, "track")
        plot.bar(
            i * step + 1,
            plot.bottom - tall,
            step - 2,
            tall,
            "bar",
            f"block {i + 1}: {count} tokens",
            colour(policy),
        )
        plot.text(i * step + step / 2, plot.height - 3, number(count), "tick", anchor="middle")
    plot.rule((0, 0), (0, plot.bottom), "playhead")
    return plot.svg(f"tokens by block: {', '.join(map(str, assignment))}", "assignment")

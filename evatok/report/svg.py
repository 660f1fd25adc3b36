"""A small plotting surface: scales, axes and marks as inline SVG that takes its colours from the page's CSS.

Coordinates are CSS pixels at scale 1; every figure has a ``viewBox`` and fills the width it is given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

Point = tuple[float, float]

MARKERS = ("circle", "square", "diamond", "up", "down", "cross")


def number(value: float | None, digits: int = 3) -> str:
    """``value`` for people: about ``digits`` significant digits, thousands grouped, a dash for nothing."""
    if value is None or not math.isfinite(value):
        return "\u2013"
    size = math.floor(math.log10(abs(value))) if value else 0
    if size >= digits - 1 or float(value).is_integer():
        text = f"{value:,.0f}".replace(",", "\u2009")
    elif size < -4:
        text = f"{value:.{digits - 1}e}"
    else:
        text = f"{value:.{digits - 1 - size}f}"
    return text.replace("-", "\u2212")


@dataclass(frozen=True)
class Scale:
    """Maps data from [low, high] to pixels [start, end]; start > end flips it.

    ``log``: 0 is linear; 2 is logarithmic with ticks at powers of two, 10 with ticks at 1, 2, 5, 10, ...
    """

    low: float
    high: float
    start: float
    end: float
    log: int = 0

    @classmethod
    def over(
        cls, values: Iterable[float], start: float, end: float, *, log: int = 0, pad: float = 0.06
    ) -> Scale:
        """The scale that holds all finite ``values`` and a margin of ``pad`` of their range on both sides."""
        kept = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
        low, high = (min(kept), max(kept)) if kept else (1.0, 2.0)
        if low == high:
            low, high = (
                (low / 2, high * 2) if log else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)
            )
        if log:
            factor = (high / low) ** pad
            return cls(low / factor, high * factor, start, end, log)
        return cls(low - pad * (high - low), high + pad * (high - low), start, end)

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(max(value, 1e-300) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """About ``count`` round values inside the scale."""
        if self.log:
            found = self._log_ticks(count)
            if len(found) > 1:
                return found
        rough = (self.high - self.low) / max(count, 1)
        unit = 10 ** math.floor(math.log10(rough))
        step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]

    def labelled_ticks(self, count: int = 5) -> list[tuple[float, str]]:
        """The ticks with their texts; on a linear scale all have the decimals that the finest one needs."""
        ticks = self.ticks(count)
        if self.log or any(t and not 1e-3 <= abs(t) < 1e6 for t in ticks):
            return [(t, number(t) if abs(t) >= 1000 else f"{t:.3g}".replace("-", "\u2212")) for t in ticks]
        decimals = max((len(f"{t:.6f}".rstrip("0").partition(".")[2]) for t in ticks), default=0)
        return [(t, f"{t:,.{decimals}f}".replace(",", "\u2009").replace("-", "\u2212")) for t in ticks]

    def _log_ticks(self, count: int) -> list[float]:
        first, last = math.floor(math.log(self.low, self.log)), math.ceil(math.log(self.high, self.log))
        steps = (1, 2, 5) if self.log == 10 and last - first <= 3 else (1,)
        every = [m * float(self.log) ** i for i in range(first, last + 1) for m in steps]
        inside = [t for t in every if self.low * 0.9999 <= t <= self.high * 1.0001]
        return inside[:: max(1, math.ceil(len(inside) / (count + 1)))]


def path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)


def marker(shape: str, x: float, y: float, size: float, attributes: str) -> str:
    """One mark of about ``size`` pixels in radius, centred on (x, y)."""
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}" {attributes}/>'
    s = size * 0.9
    corners: dict[str, list[Point]] = {
        "square": [(-s, -s), (s, -s), (s, s), (-s, s)],
        "diamond": [(0, -1.3 * s), (1.3 * s, 0), (0, 1.3 * s), (-1.3 * s, 0)],
        "up": [(0, -1.3 * s), (1.2 * s, s), (-1.2 * s, s)],
        "down": [(0, 1.3 * s), (1.2 * s, -s), (-1.2 * s, -s)],
        "cross": [
            (-s, -s / 3),
            (-s / 3, -s / 3),
            (-s / 3, -s),
            (s / 3, -s),
            (s / 3, -s / 3),
            (s, -s / 3),
            (s, s / 3),
            (s / 3, s / 3),
            (s / 3, s),
            (-s / 3, s),
            (-s / 3, s / 3),
            (-s, s / 3),
        ],
    }
    return f'<path d="{path([(x + dx, y + dy) for dx, dy in corners[shape]])}Z" {attributes}/>'


@dataclass
class Plot:
    """A plotting area with margins (top, right, bottom, left); marks are appended in drawing order."""

    width: float
    height: float
    margins: tuple[float, float, float, float]
    parts: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        return self.margins[3]

    @property
    def right(self) -> float:
        return self.width - self.margins[1]

    @property
    def top(self) -> float:
        return self.margins[0]

    @property
    def bottom(self) -> float:
        return self.height - self.margins[2]

    def x_axis(self, scale: Scale, *, count: int = 5, title: str = "", grid: bool = False) -> None:
        for tick, label in scale.labelled_ticks(count):
            x = scale(tick)
            if grid:
                self.rule((x, self.top), (x, self.bottom), "grid")
            self.text(x, self.bottom + 15, label, "tick", anchor="middle")
        self.rule((self.left, self.bottom), (self.right, self.bottom), "axis")
        if title:
            self.text((self.left + self.right) / 2, self.bottom + 32, title, "axis-title", anchor="middle")

    def y_axis(self, scale: Scale, *, count: int = 4) -> None:
        for tick, label in scale.labelled_ticks(count):
            y = scale(tick)
            self.rule((self.left, y), (self.right, y), "grid")
            self.text(self.left - 7, y + 4, label, "tick", anchor="end")

    def text(
        self, x: float, y: float, content: str, css: str, *, anchor: str = "start", style: str = ""
    ) -> None:
        styled = f' style="{style}"' if style else ""
        place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
        self.parts.append(f'<text {place} class="{css}"{styled}>{escape(content)}</text>')

    def rule(self, start: Point, end: Point, css: str, style: str = "") -> None:
        styled = f' style="{style}"' if style else ""
        ends = f'x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"'
        self.parts.append(f'<line {ends} class="{css}"{styled}/>')

    def line(self, points: Sequence[Point], css: str = "line", style: str = "") -> None:
        if len(points) > 1:
            self.parts.append(f'<path d="{path(points)}" class="{css}" style="{style}"/>')

    def bar(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        css: str = "bar",
        tip: str = "",
        style: str = "",
    ) -> None:
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}"'
            f' class="{css}" style="{style}"{_tip(tip)}/>'
        )

    def mark(
        self, shape: str, at: Point, size: float, css: str = "mark", tip: str = "", style: str = ""
    ) -> None:
        self.parts.append(marker(shape, *at, size, f'class="{css}" style="{style}"{_tip(tip)}'))

    def svg(self, label: str, css: str = "") -> str:
        """The finished figure; ``label`` says in words what it shows, for those who cannot see it."""
        return (
            f'<svg viewBox="0 0 {self.width:g} {self.height:g}" class="plot {css}" role="img"'
            f' aria-label="{escape(label)}">{"".join(self.parts)}</svg>'
        )


def _tip(tip: str) -> str:
    return f' data-tip="{escape(tip)}"' if tip else ""

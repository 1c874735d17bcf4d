"""Charts as inline SVG: no script, no font, no network, readable in light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

_WIDTH, _HEIGHT = 760, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 14, 42
_COLOURS = tuple(f"var(--{name})" for name in ("model", "second", "other", *"cdefghi"))
_ROW = 24
_MAX_POINTS = 400
_LEGEND, _IN_A_ROW = 20, 4
# float32 ends here: what lies beyond is no figure of a run, and would overflow the scale.
_LARGEST = 3.4e38


@dataclass(frozen=True)
class Line:
    """A line of a chart: points (x, y) with rising x, and the x of the one to mark, if any.

    ``intervals`` are (low, high) by x, for points that have one.
    """

    name: str
    points: Sequence[tuple[float, float]]
    mark: float | None = None
    intervals: Mapping[float, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Bar:
    """A bar with its interval, if there is one."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    strong: bool = False


def line_chart(
    lines: Sequence[Line], *, title: str, x_label: str, y_label: str, log_x: bool = False
) -> str:
    """Lines over one pair of axes; "" where no line has a finite point.

    Args:
        log_x: equal ratios of x are equally wide; every x is above 0.
    """
    lines = [_finite(line) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    ys += [end for line in lines for pair in line.intervals.values() for end in pair]
    x_axis = (_LogAxis if log_x else _Axis)(min(xs), max(xs))
    y_axis = _Axis(*_padded(min(ys), max(ys)))
    # The legend has rows of its own above the plot, where no line can run through it.
    top = _TOP + (_LEGEND * -(-len(lines) // _IN_A_ROW) if len(lines) > 1 else 0)
    inner_x, inner_y = _WIDTH - _LEFT - _RIGHT, _HEIGHT - top - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return _LEFT + x_axis.at(x) * inner_x, top + (1 - y_axis.at(y)) * inner_y

    parts = []
    for tick in y_axis.ticks():
        y = place(x_axis.low, tick)[1]
        parts.append(_rule(_LEFT, y, _WIDTH - _RIGHT, y))
        parts.append(_text(_LEFT - 8, y + 4, _number(tick), "end"))
    for tick in x_axis.ticks():
        parts.append(_text(place(tick, y_axis.low)[0], _HEIGHT - _BOTTOM + 18, _number(tick)))
    for number, line in enumerate(lines):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line.points))
        if len(line.points) > 1:
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
            )
        for x, y in line.points:
            if x == line.mark or len(line.points) == 1:
                cx, cy = place(x, y)
                parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="4.5" fill="{colour}"/>')
        for x, (low, high) in line.intervals.items():
            (at, lower), (_, upper) = place(x, low), place(x, high)
            parts.append(
                f'<path d="M {at - 4:.1f} {lower:.1f} h 8 M {at:.1f} {lower:.1f} V {upper:.1f} '
                f'M {at - 4:.1f} {upper:.1f} h 8" stroke="{colour}" fill="none"/>'
            )
        if len(lines) > 1:
            row, column = divmod(number, _IN_A_ROW)
            left, y = _LEFT + 165 * column, _TOP + 4 + _LEGEND * row
            parts.append(_text(left, y, line.name, "start", colour))
    parts.append(_text(_LEFT + inner_x / 2, _HEIGHT - 6, x_label))
    parts.append(
        f'<text x="14" y="{top + inner_y / 2:.0f}" text-anchor="middle" fill="currentColor" '
        f'transform="rotate(-90 14 {top + inner_y / 2:.0f})">{escape(y_label)}</text>'
    )
    return _svg(_WIDTH, _HEIGHT, title, parts)


def bar_chart(bars: Sequence[Bar], *, title: str, x_label: str) -> str:
    """Horizontal bars from 0 with whiskers; "" for no bars, "n/a" for what is not finite."""
    if not bars:
        return ""
    left, height = 170, _TOP + _ROW * len(bars) + 40
    ends = [end for b in bars for end in (b.value, b.high) if end is not None and _drawable(end)]
    top = max([*ends, 1e-9])
    axis = _Axis(0.0, top * 1.02)
    inner = _WIDTH - left - 70
    parts = []
    for tick in axis.ticks():
        x = left + axis.at(tick) * inner
        parts.append(_rule(x, _TOP, x, _TOP + _ROW * len(bars)))
        parts.append(_text(x, _TOP + _ROW * len(bars) + 16, _number(tick)))
    for number, bar in enumerate(bars):
        y = _TOP + _ROW * number
        colour = "var(--model)" if bar.strong else "var(--other)"
        parts.append(_text(left - 8, y + 16, bar.name, "end"))
        if not _drawable(bar.value):
            parts.append(_text(left + 6, y + 16, "n/a", "start"))
            continue
        length = axis.at(max(bar.value, 0.0)) * inner
        parts.append(
            f'<rect x="{left}" y="{y + 4}" width="{length:.1f}" height="{_ROW - 8}" '
            f'fill="{colour}"/>'
        )
        end = length
        if bar.low is not None and bar.high is not None and _drawable(bar.low, bar.high):
            low, end = axis.at(max(bar.low, 0.0)) * inner, axis.at(max(bar.high, 0.0)) * inner
            middle = y + _ROW / 2
            parts.append(
                f'<path d="M {left + low:.1f} {middle} H {left + end:.1f} M {left + low:.1f} '
                f'{middle - 4} v 8 M {left + end:.1f} {middle - 4} v 8" stroke="currentColor"/>'
            )
        parts.append(_text(left + max(end, length) + 6, y + 16, f"{bar.value:.4f}", "start"))
    parts.append(_text(left + inner / 2, height - 6, x_label))
    return _svg(_WIDTH, height, title, parts)


def difference_chart(bars: Sequence[Bar], *, title: str, x_label: str) -> str:
    """Points with whiskers about 0, for values of either sign; "" where nothing is finite.

    The strong ones are those that are drawn in the colour of the model.
    """
    bars = [bar for bar in bars if _drawable(bar.value)]
    if not bars:
        return ""
    left = 230
    ends = [0.0]
    for bar in bars:
        ends += [x for x in (bar.value, bar.low, bar.high) if x is not None and _drawable(x)]
    axis = _Axis(*_padded(min(ends), max(ends)))
    inner, bottom = _WIDTH - left - 70, _TOP + _ROW * len(bars)

    def place(x: float) -> float:
        return left + axis.at(x) * inner

    parts = []
    for tick in axis.ticks():
        parts.append(_rule(place(tick), _TOP, place(tick), bottom))
        parts.append(_text(place(tick), bottom + 16, _number(tick)))
    zero = place(0.0)
    parts.append(f'<path d="M {zero:.1f} {_TOP} V {bottom}" stroke="currentColor"/>')
    for number, bar in enumerate(bars):
        y = _TOP + _ROW * number + _ROW / 2
        colour = "var(--model)" if bar.strong else "var(--other)"
        end = bar.value
        if bar.low is not None and bar.high is not None and _drawable(bar.low, bar.high):
            end = bar.high
            parts.append(
                f'<path d="M {place(bar.low):.1f} {y} H {place(bar.high):.1f}" stroke="{colour}" '
                'stroke-width="2"/>'
            )
        parts.append(_text(left - 8, y + 4, bar.name, "end"))
        parts.append(f'<circle cx="{place(bar.value):.1f}" cy="{y}" r="4.5" fill="{colour}"/>')
        parts.append(_text(place(max(end, bar.value)) + 8, y + 4, f"{bar.value:+.4f}", "start"))
    parts.append(_text(left + inner / 2, bottom + 34, x_label))
    return _svg(_WIDTH, bottom + 40, title, parts)


class _Axis:
    """A linear scale with round ticks."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high if high > low else low + max(1.0, abs(low) * 0.1)

    def at(self, value: float) -> float:
        """Place in [0, 1]."""
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        rough = (self.high - self.low) / 5
        base = 10.0 ** math.floor(math.log10(rough))
        step = next((base * m for m in (1, 2, 5) if base * m >= rough), base * 10)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


class _LogAxis(_Axis):
    """A logarithmic scale with ticks at 1, 2 and 5 of every power of ten."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__(low, high)
        if high <= low:
            self.low, self.high = low / 2, low * 2

    def at(self, value: float) -> float:
        return math.log(value / self.low) / math.log(self.high / self.low)

    def ticks(self) -> list[float]:
        first, last = (math.floor(math.log10(end)) for end in (self.low, self.high))
        found = [
            float(f"{m * 10.0**power:.12g}") for power in range(first, last + 1) for m in (1, 2, 5)
        ]
        # The ends of the data lie on ticks but for rounding.
        inside = (self.low * (1 - 1e-9), self.high * (1 + 1e-9))
        return [tick for tick in found if inside[0] <= tick <= inside[1]]


def _finite(line: Line) -> Line:
    """Without points that are not finite, and no denser than can be seen."""
    points = [p for p in line.points if _drawable(*p)]
    stride, last = max(1, math.ceil(len(points) / _MAX_POINTS)), len(points) - 1
    kept = [p for n, p in enumerate(points) if n % stride == 0 or n == last or p[0] == line.mark]
    xs = {x for x, _ in kept}
    spread = {x: ends for x, ends in line.intervals.items() if x in xs and _drawable(*ends)}
    return Line(line.name, kept, line.mark, spread)


def _drawable(*values: float) -> bool:
    return all(math.isfinite(value) and abs(value) <= _LARGEST for value in values)


def _padded(low: float, high: float) -> tuple[float, float]:
    room = 0.06 * (high - low) or max(abs(high) * 0.1, 1e-6)
    return low - room, high + room


def _number(value: float) -> str:
    if value == 0 or 0.001 <= abs(value) < 10_000:
        return f"{value:.10g}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.1e}"


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="var(--line)"/>'


def _text(x: float, y: float, text: str, anchor: str = "middle", fill: str = "currentColor") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}">{escape(text)}</text>'
    )


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    name = escape(title, quote=True)
    return (
        f'<svg role="img" aria-label="{name}" viewBox="0 0 {width} {height}" '
        f'xmlns="http://www.w3.org/2000/svg"><title>{name}</title>{"".join(parts)}</svg>'
    )

"""Drawing primitives: escaped SVG elements, scales, ticks and axes.

Figures are written as SVG by hand and not by matplotlib, for what the page needs of them: colours that follow the
reader's light or dark theme (CSS variables), real text that can be selected and searched, marks that tell their
value when pointed at, the same bytes with every version of every library, and a few kilobytes each.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

Attribute = str | float | None


def tag(name: str, /, *children: str, **attributes: Attribute) -> Markup:
    """Return one element; text children and attribute values are escaped, `Markup` children are kept.

    An attribute's underscores become hyphens (`text_anchor`), a trailing one is dropped (`class_`), `None` leaves
    it out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_attribute(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = Markup("").join(children)
    # S704 is answered: every part is escaped above or was Markup before.
    return Markup(f"<{name}{written}>{inside}</{name}>")  # noqa: S704


def _attribute(value: str | float) -> str:
    return value if isinstance(value, str) else number(value)


def number(value: float) -> str:
    """Return a coordinate with at most two decimals, so that last-bit noise never reaches the page."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


class Scale(NamedTuple):
    """A linear or logarithmic map from data to pixels; `start` is the pixel of `low`."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / ((high - low) or 1.0) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """Return about `count` round values on the scale."""
        if not self.logarithmic:
            return nice_ticks(self.low, self.high, count)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        values = [factor * 10.0**power for power in powers for factor in (1.0, 2.0, 5.0)]
        return [value for value in values if self.low <= value <= self.high]


def figure(width: float, height: float, label: str, *children: str) -> Markup:
    """Return the outer `<svg>`; `label` is what a screen reader says in its place."""
    return tag(
        "svg",
        tag("title", label),
        *children,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {number(width)} {number(height)}",
        width=width,
        height=height,
        role="img",
        aria_label=label,
    )


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """Return a straight line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def text(x: float, y: float, content: str, class_: str = "t", anchor: str = "start") -> Markup:
    """Return a line of text whose baseline is at y."""
    return tag("text", content, x=x, y=y, class_=class_, text_anchor=anchor)


def polyline(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    """Return an open line through points."""
    return tag("polyline", points=" ".join(f"{number(x)},{number(y)}" for x, y in points), class_=class_)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round values (1, 2 or 5 times a power of ten) inside [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_label(value: float, step: float) -> str:
    """Return a tick's value with the decimals its step needs; thousands get commas, extremes an exponent."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-4:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 2
    return f"{value:,.{decimals}f}".replace("-", "−")


def horizontal_axis(scale: Scale, y: float, count: int = 5, *, grid_to: float | None = None) -> Markup:
    """Return tick labels below `y`, and light grid lines up to `grid_to`."""
    ticks = scale.ticks(count)
    parts = []
    for value in ticks:
        x = scale(value)
        if grid_to is not None:
            parts.append(line(x, y, x, grid_to, "grid"))
        parts.append(text(x, y + 14, tick_label(value, _step(scale, value, ticks)), "tick", "middle"))
    return Markup("").join(parts)


def vertical_axis(scale: Scale, x: float, grid_to: float, count: int = 4) -> Markup:
    """Return tick labels left of `x` and light grid lines to `grid_to`."""
    ticks = scale.ticks(count)
    parts = []
    for value in ticks:
        y = scale(value)
        parts.append(line(x, y, grid_to, y, "grid"))
        parts.append(text(x - 6, y + 3.5, tick_label(value, _step(scale, value, ticks)), "tick", "end"))
    return Markup("").join(parts)


def _step(scale: Scale, value: float, ticks: Sequence[float]) -> float:
    """The distance that decides a tick's decimals; on a logarithmic scale each tick has its own."""
    if scale.logarithmic or len(ticks) < 2:
        return abs(value)
    return ticks[1] - ticks[0]

"""Figures of one quantity: training curves, score histograms, the reliability diagram, scores by given grade."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from tasks.stages.report.html.svg import (
    Scale,
    figure,
    horizontal_axis,
    line,
    polyline,
    tag,
    text,
    vertical_axis,
)

SMOOTHED_FROM = 60


class Series(NamedTuple):
    """One curve: its name, its colour class (`c-…` in style.css) and its points."""

    name: str
    color: str
    points: Sequence[tuple[float, float]]


def line_chart(title: str, series: Sequence[Series], *, along: str = "step") -> Markup:
    """Return a small panel with one curve or a few of the same unit.

    Long noisy curves are drawn thin, with their moving average bold; a curve that starts far above where it ends
    gets a logarithmic axis, which its title says.
    """
    width, height = 300.0, 170.0
    left, right, top, bottom = 52.0, width - 12.0, 34.0, height - 22.0
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    logarithmic = min(ys) > 0 and max(ys) > 6 * float(np.median(ys))
    low, high = (min(ys) * 0.94, max(ys) * 1.06) if logarithmic else _padded(min(ys), max(ys))
    x_scale, y_scale = Scale(min(xs), max(xs), left, right), Scale(low, high, bottom, top, logarithmic)
    parts = [
        text(2, 13, title + (", log axis" if logarithmic else ""), "head"),
        vertical_axis(y_scale, left, right),
        horizontal_axis(x_scale, bottom, 4),
    ]
    x = left
    for one in series:
        scaled = [(x_scale(a), y_scale(b)) for a, b in _thinned(one.points)]
        smooth = [(x_scale(a), y_scale(b)) for a, b in _thinned(_averaged(one.points))]
        if len(one.points) > SMOOTHED_FROM:
            parts += [polyline(scaled, f"curve raw {one.color}"), polyline(smooth, f"curve {one.color}")]
        else:
            parts.append(polyline(scaled, f"curve {one.color}"))
        if len(scaled) <= 24:
            parts += [tag("circle", cx=a, cy=b, r=1.8, class_=f"fill {one.color}") for a, b in scaled]
        if len(series) > 1:
            parts += [line(x, 23, x + 12, 23, f"curve {one.color}"), text(x + 16, 26.5, one.name, "tick")]
            x += 28 + 6.2 * len(one.name)
    if along != "step":
        parts.append(text(right, top - 4, f"along: {along}", "tick", "end"))
    return figure(width, height, f"{title} by {along}", *parts)


def _averaged(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The centred moving average over a twentieth of the curve; at the ends over what there is."""
    reach = max(1, len(points) // 40)
    values = [y for _, y in points]
    means = [float(np.mean(values[max(0, at - reach) : at + reach + 1])) for at in range(len(values))]
    return [(x, mean) for (x, _), mean in zip(points, means, strict=True)]


def _thinned(points: Sequence[tuple[float, float]], most: int = 400) -> Sequence[tuple[float, float]]:
    """At most `most` points, evenly taken, the last one kept: more than a pixel each cannot be seen."""
    if len(points) <= most:
        return points
    return [points[round(index * (len(points) - 1) / (most - 1))] for index in range(most)]


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = (high - low) * 0.06 or abs(low) * 0.1 or 1.0
    # A curve that never goes below nought does not get an axis that does.
    return (max(0.0, low - margin) if low >= 0 else low - margin), high + margin


def histogram(
    title: str, groups: Mapping[str, tuple[str, Sequence[float]]], width: float = 460, height: float = 210
) -> Markup:
    """Return overlaid histograms of shares over common bins; `groups` maps a name to (colour class, values)."""
    left, right, top, bottom = 46.0, width - 14.0, 38.0, height - 24.0
    everything = np.concatenate([np.asarray(values, dtype=np.float64) for _, values in groups.values()])
    low, high = float(everything.min()), float(everything.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, 31)
    shares = {name: np.histogram(values, edges)[0] / max(1, len(values)) for name, (_, values) in groups.items()}
    x_scale = Scale(low, high, left, right)
    y_scale = Scale(0.0, max(float(share.max()) for share in shares.values()) * 1.05, bottom, top)
    parts = [text(2, 13, title, "head"), vertical_axis(y_scale, left, right), horizontal_axis(x_scale, bottom, 6)]
    x = left
    for name, (color, values) in groups.items():
        outline = [(x_scale(low), bottom)]
        for start, end, share in zip(edges[:-1], edges[1:], shares[name], strict=True):
            outline += [(x_scale(float(start)), y_scale(float(share))), (x_scale(float(end)), y_scale(float(share)))]
        outline.append((x_scale(high), bottom))
        parts.append(polyline(outline, f"area {color}"))
        mean = x_scale(float(np.mean(values)))
        parts.append(line(mean, bottom, mean, top, f"mean {color}"))
        label = f"{name}, mean {np.mean(values):.2f}"
        parts += [
            tag("rect", x=x, y=19, width=10, height=10, class_=f"swatch {color}"),
            text(x + 14, 28, label, "tick"),
        ]
        x += 34 + 6.0 * len(label)
    return figure(width, height, f"{title}: shares of {', '.join(groups)} over the score", *parts)


def calibration_plot(bins: Sequence[Mapping[str, Any]], ece: float | None) -> Markup:
    """Return the reliability diagram: accuracy against confidence with intervals, and the pairs a bin holds."""
    width, height = 460.0, 310.0
    left, right, top, bottom, floor = 46.0, width - 14.0, 34.0, 218.0, 274.0
    lowest = min([0.5, *(entry["accuracy_low"] or entry["accuracy"] for entry in bins)])
    x_scale, y_scale = Scale(0.5, 1.0, left, right), Scale(lowest - lowest % 0.1, 1.0, bottom, top)
    most = max(entry["count"] for entry in bins)
    parts = [
        text(2, 13, "Calibration" + ("" if ece is None else f" (ECE {ece:.3f})"), "head"),
        vertical_axis(y_scale, left, right),
        line(x_scale(0.5), y_scale(0.5), x_scale(1.0), y_scale(1.0), "reference"),
        horizontal_axis(x_scale, floor, 5),
        text(left, floor - 42, "pairs", "tick"),
    ]
    for entry in bins:
        x, y = x_scale(entry["confidence"]), y_scale(entry["accuracy"])
        low, high = entry["accuracy_low"], entry["accuracy_high"]
        bar = low is not None
        tip = (
            f"confidence {entry['confidence']:.3f}, accuracy {entry['accuracy']:.3f} "
            + (f"[{low:.3f}, {high:.3f}]" if bar else "(too few prompts for an interval)")
            + f", {entry['count']} pairs"
        )
        start, end = x_scale(entry["low"]) + 1, x_scale(entry["high"]) - 1
        tall = 34.0 * entry["count"] / most
        parts += [
            line(x, y_scale(low), x, y_scale(high), "interval c-main") if bar else Markup(""),
            tag("circle", tag("title", tip), cx=x, cy=y, r=3.5, class_="fill c-main"),
            tag(
                "rect", tag("title", tip), x=start, y=floor - tall, width=end - start, height=tall, class_="bar c-main"
            ),
        ]
    parts.append(text((left + right) / 2, height - 4, "confidence of the reward model", "tick", "middle"))
    return figure(width, height, "Reliability diagram of the reward model", *parts)


def grade_plot(given: Sequence[float], scores: Sequence[float]) -> Markup:
    """Return the model's scores over ten equal steps of the given grade: median, middle half, 5 to 95 per cent."""
    width, height = 460.0, 310.0
    left, right, top, bottom = 46.0, width - 14.0, 34.0, 274.0
    grades, values = np.asarray(given, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    low, high = float(grades.min()), float(grades.max())
    place = np.clip(((grades - low) / ((high - low) or 1.0) * 10).astype(np.int64), 0, 9)
    columns = [(float(grades[place == step].mean()), values[place == step]) for step in np.unique(place)]
    spread = [np.quantile(column, [0.05, 0.25, 0.5, 0.75, 0.95]) for _, column in columns]
    x_scale = Scale(low, high, left + 8, right - 8)
    y_scale = Scale(*_padded(float(min(row[0] for row in spread)), float(max(row[4] for row in spread))), bottom, top)
    parts = [
        text(2, 13, "Scores by given grade", "head"),
        vertical_axis(y_scale, left, right),
        horizontal_axis(x_scale, bottom, 5),
    ]
    for (grade, column), row in zip(columns, spread, strict=True):
        x = x_scale(grade)
        y5, y25, y50, y75, y95 = (y_scale(float(value)) for value in row)
        tip = f"grade {grade:.2f}: median score {row[2]:.2f}, {len(column)} responses"
        parts += [
            line(x, y5, x, y95, "interval c-main"),
            line(x, y25, x, y75, "box c-main"),
            tag("circle", tag("title", tip), cx=x, cy=y50, r=3.5, class_="fill c-main"),
        ]
    parts.append(text((left + right) / 2, height - 4, "given grade", "tick", "middle"))
    return figure(width, height, "The reward model's scores over given grades", *parts)

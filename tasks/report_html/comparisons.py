"""Figures that set things side by side: the forest plot of win rates, gold criteria by model, shares of a whole."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from tasks.report_html.svg import Scale, figure, horizontal_axis, line, tag, text

ROW = 26.0


class WinRate(NamedTuple):
    """One comparison with the SFT model."""

    name: str
    color: str
    win_rate: float
    low: float
    high: float
    counts: str
    p_value: str


def forest_plot(groups: Mapping[str, Sequence[WinRate]]) -> Markup:
    """Return win rates with intervals, in groups (a judge at a temperature), around the line of no difference."""
    width, left, right = 1000.0, 230.0, 640.0
    height = 48 + sum(24 + ROW * len(rows) for rows in groups.values())
    bottom = height - 24
    scale = Scale(0.0, 1.0, left, right)
    parts = [
        text(right + 20, 13, "win rate and interval", "tick"),
        text(right + 190, 13, "win / tie / loss", "tick"),
        text(width - 4, 13, "p", "tick", "end"),
        horizontal_axis(scale, bottom, 5, grid_to=20),
        line(scale(0.5), bottom, scale(0.5), 20, "reference"),
    ]
    y = 20.0
    for title, rows in groups.items():
        y += 18
        parts.append(text(2, y, title, "head"))
        y += 6
        for row in rows:
            parts.append(_forest_row(row, y + ROW / 2, scale, right, width))
            y += ROW
    return figure(width, height, "Win rates against the SFT model with intervals", *parts)


def _forest_row(row: WinRate, y: float, scale: Scale, right: float, width: float) -> Markup:
    figures = f"{row.win_rate:.3f} [{row.low:.3f}, {row.high:.3f}]"
    tip = tag("title", f"{row.name}: {figures}, {row.counts}, p {row.p_value}")
    x = scale(row.win_rate)
    return Markup("").join(
        [
            text(14, y + 4, row.name, "t"),
            line(scale(row.low), y, scale(row.high), y, f"interval {row.color}"),
            line(scale(row.low), y - 4, scale(row.low), y + 4, f"interval {row.color}"),
            line(scale(row.high), y - 4, scale(row.high), y + 4, f"interval {row.color}"),
            tag("rect", tip, x=x - 4.5, y=y - 4.5, width=9, height=9, class_=f"fill {row.color}"),
            text(right + 20, y + 4, figures, "t num"),
            text(right + 190, y + 4, row.counts, "t num"),
            text(width - 4, y + 4, row.p_value, "t num", "end"),
        ]
    )


def dot_plot(title: str, criteria: Mapping[str, Mapping[str, float]], colors: Mapping[str, str]) -> Markup:
    """Return one row a criterion with a dot a model on a scale from 0 to 1; the spread is drawn as a thin bar."""
    width, left, right = 460.0, 128.0, 444.0
    height = 52 + ROW * len(criteria) + 22
    bottom = height - 22
    scale = Scale(0.0, 1.0, left, right)
    parts = [text(2, 13, title, "head"), horizontal_axis(scale, bottom, 5, grid_to=40)]
    x = left
    for name, color in colors.items():
        parts += [tag("circle", cx=x + 4, cy=26, r=4, class_=f"fill {color}"), text(x + 12, 30, name, "tick")]
        x += 30 + 7 * len(name)
    for index, (criterion, values) in enumerate(criteria.items()):
        y = 44 + ROW * (index + 0.5)
        parts.append(text(2, y + 4, criterion, "t"))
        parts.append(line(scale(min(values.values())), y, scale(max(values.values())), y, "spread"))
        for name, value in values.items():
            tip = tag("title", f"{name}, {criterion}: {value:.3f}")
            parts.append(tag("circle", tip, cx=scale(value), cy=y, r=5, class_=f"fill {colors[name]}"))
    return figure(width, height, f"{title}: {', '.join(criteria)} by model", *parts)


def share_bar(share: float) -> Markup:
    """Return a bar for a table cell, as long as a share of the whole."""
    width, height = 220.0, 14.0
    bar = tag("rect", x=0, y=1, width=max(1.0, share * width), height=height - 2, rx=2, class_="bar c-main")
    return figure(width, height, f"{share:.1%} left", bar)

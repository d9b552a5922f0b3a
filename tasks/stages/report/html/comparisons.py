"""Figures that set things side by side: the forest plot of win rates, gold criteria by model, shares of a whole."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from tasks.stages.report.html.svg import Scale, figure, horizontal_axis, line, tag, text
from tasks.stages.report.html.words import interval_text

ROW = 26.0
FOREST_WIDTH, EDGE = 420.0, 12.0


class WinRate(NamedTuple):
    """One comparison with the SFT model."""

    name: str
    color: str
    win_rate: float
    low: float | None
    high: float | None
    counts: str
    p_value: str


def forest_plot(groups: Mapping[str, Sequence[WinRate]], caption: str = "Win rates against the SFT model") -> Markup:
    """Return win rates with intervals, in groups (a judge at a temperature), around the line of no difference.

    A table whose rows fall apart into blocks on a narrow page; each row draws its own interval on the same scale.
    """
    titles = ("Policy", caption, "Win rate and interval", "Wins / ties / losses", "p")
    head = tag("thead", tag("tr", *(tag("th", title, scope="col") for title in titles)))
    bodies = []
    for title, rows in groups.items():
        heading = tag("tr", tag("th", title, scope="rowgroup", colspan=len(titles), class_="group"))
        bodies.append(tag("tbody", heading, *(_forest_row(row) for row in rows)))
    scale = tag("td", _forest_axis(), class_="plot")
    foot = tag("tfoot", tag("tr", tag("td"), scale, tag("td"), tag("td"), tag("td"), class_="axis"), aria_hidden="true")
    return tag("table", tag("caption", caption), head, *bodies, foot, class_="forest")


def _forest_row(row: WinRate) -> Markup:
    figures = interval_text({"rate": row.win_rate, "rate_low": row.low, "rate_high": row.high}, "rate")
    scale, y = Scale(0.0, 1.0, EDGE, FOREST_WIDTH - EDGE), ROW / 2
    x = scale(row.win_rate)
    plot = figure(
        FOREST_WIDTH,
        ROW,
        f"{row.name}: {figures}",
        *(line(scale(value), 0, scale(value), ROW, "grid") for value in scale.ticks(5)),
        line(scale(0.5), 0, scale(0.5), ROW, "reference"),
        *_interval_bar(row, y, scale),
        tag("rect", x=x - 4.5, y=y - 4.5, width=9, height=9, class_=f"fill {row.color}"),
    )
    return tag(
        "tr",
        tag("th", row.name, scope="row"),
        tag("td", plot, class_="plot"),
        tag("td", figures, class_="num"),
        tag("td", row.counts, class_="num", data_label="wins / ties / losses"),
        tag("td", row.p_value, class_="num", data_label="p"),
    )


def _forest_axis() -> Markup:
    scale = Scale(0.0, 1.0, EDGE, FOREST_WIDTH - EDGE)
    return figure(FOREST_WIDTH, 18, "scale from 0 to 1", horizontal_axis(scale, 0, 5))


def _interval_bar(row: WinRate, y: float, scale: Scale) -> list[Markup]:
    if row.low is None or row.high is None:
        return []
    low, high, style = scale(row.low), scale(row.high), f"interval {row.color}"
    return [line(low, y, high, y, style), line(low, y - 4, low, y + 4, style), line(high, y - 4, high, y + 4, style)]


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

"""Turns curves into charts: which curves share a chart, what is drawn and what is in view."""

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jetformer.report.read import Curve, Run

MAX_POINTS = 2000  # drawn of each curve

UNITS = {
    "bits_per_dim": "bits per dim",
    "bits_per_token": "bits per token",
    "components": "components",
    "flow_expansion_used": "share of the scale cap",
    "examples_per_sec": "examples / s",
    "steps_per_sec": "steps / s",
    "uptime": "seconds",
}

# The first charts of a page, by quantity.
FIRST = ("bits_per_dim", "noisy_bits_per_dim", "text_bits_per_token", "effective_components", "flow_expansion_used")
OVERVIEW = "overview"  # their heading

COLOURS = tuple(f"var(--c{i})" for i in range(10))  # of style.css
GREY = "var(--muted)"


class Line(NamedTuple):
    """A curve in a chart."""

    name: str
    curve: Curve
    colour: str


Charts = dict[tuple[str, str], list[Line]]  # by heading and title


def run_charts(run: Run, tags: Iterable[str]) -> Charts:
    """Returns the charts of one run: curves of the same quantity, in training and evaluations, share a chart.

    Args:
      run: the run.
      tags: the metrics to draw.
    """
    groups = sorted({_group(tag) for tag in run.curves}, key=_group_order)
    colours = dict(zip(groups, colours_of(groups), strict=True)) | {"run": GREY}
    quantities: dict[str, list[str]] = {}
    for tag in sorted(tags, key=lambda tag: (_group_order(_group(tag)), _natural(tag))):
        quantities.setdefault(_quantity(tag).partition("/")[0], []).append(tag)
    charts = {}
    for quantity, members in quantities.items():
        if any(map(_part, members)):  # such as classes or layers: a chart for each evaluation, a line for each part
            for group, grouped in itertools.groupby(members, _group):
                parts = list(grouped)
                title = quantity if len(parts) > 1 else _quantity(parts[0])  # a single line has no legend
                lines = zip(parts, colours_of(parts), strict=True)
                charts[group, title] = [Line(_part(tag) or "all", run.curves[tag], colour) for tag, colour in lines]
        else:
            lines = [Line(_group(tag), run.curves[tag], colours[_group(tag)]) for tag in members]
            heading = OVERVIEW if quantity in FIRST else ", ".join(line.name for line in lines)
            charts[heading, quantity] = lines
    # Within training, the charts with the most lines first.
    order = lambda names: (
        FIRST.index(names[1]) if names[0] == OVERVIEW else len(FIRST),
        _group_order(names[0])[0],
        -len(charts[names]),
        names[0],
        _natural(names[1]),
    )
    return {names: charts[names] for names in sorted(charts, key=order)}


def comparison_charts(runs: Sequence[Run], tags: Iterable[str]) -> Charts:
    """Returns the charts of several runs: one for each metric, with a line for each run.

    Args:
      runs: the runs.
      tags: the metrics to draw.
    """
    rank = lambda tag: FIRST.index(_quantity(tag)) if _quantity(tag) in FIRST else len(FIRST)
    return {
        (OVERVIEW if _quantity(tag) in FIRST else _group(tag), tag): [
            Line(run.name, run.curves[tag], colour)
            for run, colour in zip(runs, colours_of(runs), strict=True)
            if tag in run.curves
        ]
        for tag in sorted(tags, key=lambda tag: (rank(tag), _group_order(_group(tag)), _natural(tag)))
    }


def colours_of(items: Sequence[Any]) -> list[str]:
    """Returns a colour for each item; they repeat after ten."""
    return list(itertools.islice(itertools.cycle(COLOURS), len(items)))


def importance(tag: str) -> tuple[bool, bool, list[Any]]:
    """Sort key of metrics: likelihoods, then other metrics of the whole, then those of parts."""
    return bool(_part(tag)), "bits_per" not in tag, _natural(tag)


def _group(tag: str) -> str:
    """Returns what precedes the first slash; "run" if there is none."""
    return tag.partition("/")[0] if "/" in tag else "run"


def _quantity(tag: str) -> str:
    """Returns what follows the first slash."""
    return tag.partition("/")[2] or tag


def _part(tag: str) -> str:
    """Returns what follows the second slash: the part that a metric is of, such as a class or a layer."""
    return _quantity(tag).partition("/")[2]


def _group_order(group: str) -> tuple[int, str]:
    """Sort key of groups: training, then evaluations, then the whole run."""
    return {"train": 0, "run": 2}.get(group.partition(", ")[0], 1), group


def _natural(tag: str) -> list[Any]:
    """Sort key that puts 5_shot before 10_shot."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", tag)]


def figures(charts: Charts) -> dict[str, list[dict[str, Any]]]:
    """Returns the charts' figures (see `figure`) with their titles, by heading."""
    last_step = max(max(line.curve) for lines in charts.values() for line in lines)
    by_heading: dict[str, list[dict[str, Any]]] = {}
    for (heading, title), lines in charts.items():
        unit = next((unit for name, unit in UNITS.items() if name in title), "")
        by_heading.setdefault(heading, []).append({"title": title, "unit": unit} | figure(lines, last_step))
    return by_heading


def figure(lines: Sequence[Line], last_step: int) -> dict[str, Any]:
    """Returns a chart, as page.js draws it.

    Args:
      lines: the curves.
      last_step: the end of the x axis.

    Returns:
      `lines`: of each `name`, `colour`, steps `x` and values `y`, those that are not finite by name; `end`, the end of
      the x axis; `view`, the initial range of the y axis, None for all of it; `positive`, whether a logarithmic axis
      can show all values; `notes`, to print below the chart; `alt`, the chart in words.
    """
    view, notes = _view(lines)
    drawn = []
    for line in lines:
        steps, values = list(line.curve), list(line.curve.values())
        kept = downsample(values)
        y = [float(f"{values[i]:.6g}") if math.isfinite(values[i]) else number(values[i]) for i in kept]
        drawn.append({"name": line.name, "colour": line.colour, "x": [steps[i] for i in kept], "y": y})
        if len(kept) < len(values):
            notes.append(f"{line.name}: {len(kept):,} of {len(values):,} points are drawn, including all extremes.")
        if lost := [(step, number(value)) for step, value in line.curve.items() if not math.isfinite(value)]:
            kinds = ", ".join(sorted({kind for _, kind in lost}))
            notes.append(
                f"{line.name}: {len(lost):,} of {len(values):,} values not finite ({kinds}), "
                f"first at step {lost[0][0]:,}; marked ×."
            )
    positive = all(value > 0 for line in lines for value in line.curve.values() if math.isfinite(value))
    alt = "; ".join(map(_in_words, lines))
    return {"lines": drawn, "end": last_step, "view": view, "positive": positive, "notes": notes, "alt": alt}


def downsample(values: Sequence[float], limit: int = MAX_POINTS) -> list[int]:
    """Chooses the values of a curve to draw, such that it looks as if all were drawn.

    Keeps the first and the last value, and of equal parts between them the lowest, the highest and the first that is
    not finite.

    Args:
      values: the curve's values.
      limit: the maximum number of values to keep.

    Returns:
      The indices of the kept values, in order.
    """
    if len(values) <= limit:
        return list(range(len(values)))
    array = np.asarray(values, np.float64)
    kept = {0, len(array) - 1}
    for part in np.array_split(np.arange(1, len(array) - 1), (limit - 2) // 3):
        is_finite = np.isfinite(array[part])
        finite = part[is_finite]
        if len(finite):
            kept |= {int(finite[array[finite].argmin()]), int(finite[array[finite].argmax()])}
        kept.update(part[~is_finite][:1].tolist())
    return sorted(kept)


def number(value: float | int | None) -> str:
    """Formats a value: five digits, NaN and infinities by name, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if math.isnan(value):
        return "NaN"
    if abs(value) >= 1e4 and math.isfinite(value):
        return f"{value:,.0f}"
    return "0" if value == 0 else f"{value:#.5g}"


def _in_words(line: Line) -> str:
    first, *_, last = [*line.curve.items()] * 2
    ends = [f"{number(value)} at step {step:,}" for step, value in dict([first, last]).items()]
    return f"{line.name} {' to '.join(ends)}"


def _view(lines: Sequence[Line]) -> tuple[list[float] | None, list[str]]:
    """Returns the initial range of the y axis, None for all of it, and notes about values out of view.

    The first steps of a run may be so far off that the rest of the curve looks flat. If 4% of the values take up more
    than two thirds of the height, they are out of view, except for the last value of a curve.
    """
    points = [(value, step, line.name) for line in lines for step, value in line.curve.items() if math.isfinite(value)]
    if len(points) < 20:
        return None, []
    lowest, highest = min(points), max(points)
    low, high = np.quantile([value for value, _, _ in points], [0.02, 0.98])
    if highest[0] - lowest[0] <= 3 * (high - low) or low == high:
        return None, []
    ends = [value for value in (list(line.curve.values())[-1] for line in lines) if math.isfinite(value)]
    margin = (high - low) / 2
    bottom = lowest[0] if lowest[0] >= low - margin else min(low, *ends)
    top = highest[0] if highest[0] <= high + margin else max(high, *ends)
    notes = [
        f"{word}: {number(value)} ({name}, step {step:,}), out of view; double-click or Enter shows all."
        for word, (value, step, name) in (("Highest", highest), ("Lowest", lowest))
        if not bottom <= value <= top
    ]
    pad = (top - bottom) * 0.06
    return ([float(bottom - pad), float(top + pad)], notes) if notes else (None, [])

"""One page about a run, or about several beside each other: a single HTML file that loads nothing from anywhere.

    python -m jetformer.report --workdir=/tmp/digits
    python -m jetformer.report --compare=/tmp/digits,/tmp/digits_long --out=/tmp/digits.html

The page has the run's last and best figures, all curves, samples over time, evaluations by step, the operative
configuration and the parameters. It is made of what is in the workdir, also while the run is going on. Workdirs may be
URLs.
"""

import base64
import bisect
import dataclasses
import html
import itertools
import json
import math
import os
import re
import statistics
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np
from absl import app, flags, logging
from google.protobuf.message import DecodeError
from plotly.offline import get_plotlyjs
from tensorboard.compat.proto import event_pb2, types_pb2
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.util.tensor_util import make_ndarray
from upath import UPath

from jetformer import program
from jetformer.evaluators.better import better

MAX_POINTS = 2000  # of a curve on the page
MAX_PICTURES = 40  # of a kind on the page

# In the workdir. The modules that write these bring TensorFlow, which a page needs nothing of.
_CONFIG_FILE, _OPERATIVE_CONFIG_FILE, _FACTS_FILE = "config.gin", "operative_config.gin", "run.json"
_EVENTS_PREFIX, _EVALUATION_PREFIX, _RESULTS_FILE = "events.out.tfevents.", "eval_", "results.jsonl"
_START_TEXT = "config"  # which training writes at the step from which it goes on, each time that it is started

_UNITS = {
    "bits_per_dim": "bits per dim",
    "bits_per_token": "bits per token",
    "examples_per_sec": "examples / s",
    "steps_per_sec": "steps / s",
    "uptime": "seconds",
}

_COLOURS = (
    *("#3a6ea5", "#d9722b", "#3f8f5f", "#b8405e", "#7b5ea7"),
    *("#8a6d3b", "#2a9d9d", "#6b7280", "#c2a000", "#111827"),
)

_GREY = "#5b6470"

Curve = dict[int, float]  # values by step
Charts = dict[tuple[str, str], list["Line"]]  # what is drawn in each chart, by heading and title


@dataclasses.dataclass(frozen=True)
class Run:
    """What a workdir holds.

    Attributes:
      name: what the page calls it.
      place: the workdir.
      configs: the text of its gin files, by file name.
      facts: what run.json says; empty if there is none.
      curves: all scalars by tag, each by step.
      results: what each evaluator wrote, one record a step.
      pictures: by what they show, each by step.
      notes: what could not be read.
    """

    name: str
    place: UPath
    configs: dict[str, str]
    facts: dict[str, Any]
    curves: dict[str, Curve]
    results: dict[str, list[dict[str, float]]]
    pictures: dict[str, dict[int, UPath]]
    notes: list[str]

    def steps(self) -> int:
        """The last step that something is known of."""
        return max(max(curve) for curve in self.curves.values())

    def evaluation_tags(self) -> list[str]:
        """The metrics of evaluation, of older runs as well, whose evaluations are in the event files only."""
        tags = {tag for records in self.results.values() for record in records for tag in record}
        found = [tag for tag in self.curves if tag in tags or re.match("(val|eval|test)(_ema)?/", tag)]
        return sorted(found, key=_importance)


class Line(NamedTuple):
    """A curve in a chart."""

    name: str
    curve: Curve
    colour: str


def read_run(workdir: UPath) -> Run:
    """Reads a workdir, of a run that has ended or not.

    Args:
      workdir: the run's.

    Returns:
      What is in it. Where a metric is both in the event files and in an evaluator's results, the results count.

    Raises:
      ValueError: if there is no run, it has no metrics, or a file of it is damaged.
    """
    place = UPath(os.path.abspath(workdir)) if isinstance(workdir, os.PathLike) else workdir
    if not (place / _CONFIG_FILE).exists():
        raise ValueError(f"{workdir} holds no run: it has no {_CONFIG_FILE}")
    notes: list[str] = []
    files = {file.name: file for file in place.iterdir()}
    configs = {
        name: files[name].read_text(encoding="utf-8", errors="replace")
        for name in (_OPERATIVE_CONFIG_FILE, _CONFIG_FILE)
        if name in files
    }
    facts = read_facts(files[_FACTS_FILE]) if _FACTS_FILE in files else {}
    curves = event_scalars((files[name] for name in sorted(files) if name.startswith(_EVENTS_PREFIX)), notes)
    results, pictures = {}, {}
    for name in sorted(files):
        if not name.startswith(_EVALUATION_PREFIX) or not files[name].is_dir():
            continue
        evaluator = name.removeprefix(_EVALUATION_PREFIX)
        if (files[name] / _RESULTS_FILE).exists():
            results[evaluator] = read_results(files[name] / _RESULTS_FILE)
        for record in results.get(evaluator, []):
            for tag, value in record.items():
                if tag not in ("step", "seconds"):
                    curves.setdefault(tag, {})[record["step"]] = value
        for directory in sorted(files[name].iterdir(), key=lambda path: path.name):
            if directory.is_dir() and (found := _pictures(directory)):
                pictures[f"{evaluator}/{directory.name}"] = found
    if not curves:
        raise ValueError(f"{workdir} has no metrics yet: look again after the first train.log_steps steps")
    curves = {tag: dict(sorted(curves[tag].items())) for tag in sorted(curves)}
    return Run(place.name or str(place), place, configs, facts, curves, results, pictures, notes)


def event_scalars(files: Iterable[UPath], notes: list[str]) -> dict[str, Curve]:
    """All scalars of TensorBoard's event files, by tag and step. A step written twice counts as last written, and what
    comes after the step from which a run has gone on later does not count: of a course that was left, it is.

    TensorBoard's own reader would import TensorFlow, which takes longer than all the rest, and reads no URLs.

    Args:
      files: of a run; several where it was resumed.
      notes: gets a line for each file that is damaged; what is before the damage is read.
    """
    written: dict[str, dict[int, tuple[float, float]]] = {}  # value with the time of its writing
    starts: list[tuple[float, int]] = []  # step with the time
    for file in files:
        for event in _events(file, notes):
            for value in event.summary.value:
                if value.tag == _START_TEXT:
                    starts.append((event.wall_time, event.step))
                scalar = _scalar(value)
                if scalar is not None:
                    points = written.setdefault(value.tag, {})
                    if event.step not in points or points[event.step][0] <= event.wall_time:
                        points[event.step] = event.wall_time, scalar
    starts.sort()
    times = [time for time, _ in starts]
    # From which step the run has gone on at the least, after each time that it was started.
    least = list(itertools.accumulate((step for _, step in reversed(starts)), min))[::-1]

    def counts(step: int, time: float) -> bool:
        later = bisect.bisect_right(times, time)
        return later == len(least) or step <= least[later]

    curves = {
        tag: {step: value for step, (time, value) in points.items() if counts(step, time)}
        for tag, points in written.items()
    }
    return {tag: curve for tag, curve in curves.items() if curve}


def _events(file: UPath, notes: list[str]) -> Iterator[event_pb2.Event]:
    """The events of a file, whose last one may be cut off, as a job may be writing it.

    Each is its length in 8 bytes, their checksum in 4, the event, and its checksum in 4, which is left unread: in
    Python it would take longer than all the rest.
    """
    data, position = file.read_bytes(), 0
    while position + 12 <= len(data):
        length, checksum = struct.unpack_from("<QI", data, position)
        start, end = position + 12, position + 12 + length
        try:
            if masked_crc32c(data[position : position + 8]) != checksum:
                raise DecodeError
            if end + 4 > len(data):
                return
            yield event_pb2.Event.FromString(data[start:end])
        except DecodeError:
            notes.append(f"{file.name} is damaged at byte {position:,}: what follows is left out")
            return
        position = end + 4


def _scalar(value) -> float | None:
    """What a summary holds, if it is a scalar; CLU writes it as a tensor."""
    if value.HasField("simple_value"):
        return value.simple_value
    if not value.HasField("tensor") or value.tensor.tensor_shape.dim or value.tensor.dtype == types_pb2.DT_STRING:
        return None
    if value.metadata.plugin_data.plugin_name not in ("", "scalars"):  # hyper-parameters have a tensor, but no value
        return None
    return float(make_ndarray(value.tensor))


def read_results(file: UPath) -> list[dict[str, float]]:
    """What an evaluator wrote: a record for each step, by step. A last line that is cut off is left out.

    Args:
      file: its results.jsonl.

    Raises:
      ValueError: if a line is damaged.
    """
    text = file.read_bytes().decode(errors="replace")
    lines = text.split("\n")
    records = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):  # it has no end yet
                break
            record = None
        if not isinstance(record, dict) or not all(value is None or _is_number(value) for value in record.values()):
            raise ValueError(f"{file}:{number} is damaged: give a JSON object of numbers, or delete the line")
        record = {tag: math.nan if value is None else value for tag, value in record.items()}
        if not isinstance(record.get("step"), int):
            raise ValueError(f"{file}:{number} is damaged: it has no step; delete the line")
        records[record["step"]] = record
    return [records[step] for step in sorted(records)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_facts(file: UPath) -> dict[str, Any]:
    """What a run writes down of itself: hardware, versions, sizes.

    Raises:
      ValueError: if the file is damaged.
    """
    try:
        facts = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}; without the file the page leaves out what it says") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{file} is damaged: it is no JSON object; without the file the page leaves out what it says")
    return facts


def _pictures(directory: UPath) -> dict[int, UPath]:
    """The pictures of a directory by step."""
    files = [path for path in directory.iterdir() if re.fullmatch(r"\d{9,}\.png", path.name)]
    return {int(path.stem): path for path in sorted(files, key=lambda path: int(path.stem))}


def thinned(values: Sequence[float], limit: int = MAX_POINTS) -> list[int]:
    """Which values of a curve to draw, so that it looks as if all were drawn.

    The first and the last stay; what is between is cut into equal parts, and of each stay the lowest, the highest and
    the first that is not finite: no extreme gets lost, and no part of a curve that is NaN or infinite.

    Args:
      values: of the curve.
      limit: how many may stay.

    Returns:
      Their indices, in order; all of them if there are no more than `limit`.
    """
    if len(values) <= limit:
        return list(range(len(values)))
    array = np.asarray(values, np.float64)
    kept = {0, len(array) - 1}
    for part in np.array_split(np.arange(1, len(array) - 1), (limit - 2) // 3):
        finite = part[np.isfinite(array[part])]
        if len(finite):
            kept |= {int(finite[array[finite].argmin()]), int(finite[array[finite].argmax()])}
        if len(finite) < len(part):
            kept.add(int(part[~np.isfinite(array[part])][0]))
    return sorted(kept)


def bindings(text: str) -> dict[str, str]:
    """The bindings and macros of a gin file that gin has written, by name."""
    values: dict[str, str] = {}
    name = None
    for line in text.splitlines():
        if match := re.fullmatch(r"([\w./]+) = (.*)", line):
            name, values[name] = match[1], match[2]
        elif line[:1].isspace() and name is not None:
            values[name] += line
        else:
            name = None
    # gin breaks long values over lines by their length.
    return {name: " ".join(value.replace("\\ ", " ").split()) for name, value in values.items()}


def differing_bindings(runs: Sequence[Run]) -> dict[str, list[str | None]]:
    """What differs in the configurations of runs: by name, the value in each; None where it has none."""
    names = _OPERATIVE_CONFIG_FILE, _CONFIG_FILE
    file = next(name for name in names if all(name in run.configs for run in runs))
    parsed = [bindings(run.configs[file]) for run in runs]
    rows = {name: [values.get(name) for values in parsed] for name in sorted(set().union(*parsed))}
    # Where a run does not use a thing at all, one line says so: that which binds it.
    used = [{name.rpartition(".")[0] for name in values} for values in parsed]
    return {
        name: row
        for name, row in rows.items()
        if len(set(row)) > 1 and all(name.rpartition(".")[0] in names for names in used)
    }


def best(values: Iterable[float], tag: str) -> float | None:
    """The best value of a metric; None if there is none, or nobody knows which one that is."""
    finite, direction = [value for value in values if math.isfinite(value)], better(tag)
    if not finite or direction is None:
        return None
    return min(finite) if direction == "lower" else max(finite)


def duration(uptime: Curve) -> float:
    """How long the run has trained, in seconds: its time is counted anew whenever it is resumed."""
    values = [value for value in uptime.values() if math.isfinite(value)]
    ends = [a for a, b in itertools.pairwise(values) if b < a]
    return sum(ends) + sum(values[-1:])


def known_facts(run: Run) -> dict[str, str]:
    """What is known of a run, in words."""
    facts, known = run.facts, {}
    steps, total = run.steps(), facts.get("total_steps")
    known["Steps"] = f"{steps:,} of {total:,}" if total else f"{steps:,}"
    if facts.get("stopped_at") == steps:
        known["Steps"] += ", stopped early"
    if size := facts.get("batch_size"):
        known["Batch size"] = f"{size:,}"
        if examples := facts.get("train_examples"):
            known["Epochs"] = f"{steps * size / examples:,.1f} of {examples:,} examples"
    if parameters := facts.get("parameters"):
        known["Parameters"] = f"{sum(parameter['size'] for parameter in parameters):,}"
    if device := facts.get("device"):
        counts = [(facts.get("device_count") or 1, "devices"), (facts.get("process_count") or 1, "processes")]
        known["Hardware"] = ", ".join([device, *(f"{count:,} {name}" for count, name in counts if count > 1)])
    if versions := facts.get("versions"):
        known["Versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    rates = [rate for rate in run.curves.get("examples_per_sec", {}).values() if math.isfinite(rate)]
    if rates:
        known["Throughput"] = f"{statistics.median(rates):,.4g} examples / s (median)"
    if "uptime" in run.curves:
        known["Duration"] = _time(duration(run.curves["uptime"]))
    return known


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def number(value: float | int | None) -> str:
    """A figure in a table: five digits, NaN and infinities as such, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if math.isnan(value):
        return "NaN"
    if abs(value) >= 1e4 and math.isfinite(value):
        return f"{value:,.0f}"
    return "0" if value == 0 else f"{value:#.5g}"


def figure(unit: str | None, lines: Sequence[Line], last_step: int) -> dict[str, Any]:
    """A chart of curves, as Plotly takes it; and notes about it.

    Args:
      unit: of the y axis.
      lines: what is drawn. Where a curve is not finite it is broken off, and a mark on the x axis says so.
      last_step: where the x axis ends.

    Returns:
      Plotly's `data` and `layout`; `view`, the range of the y axis at first, None for all of it; `positive`, whether a
      logarithmic axis can show all; `notes`.
    """
    view, notes = _view(lines)
    data = []
    for line in lines:
        steps, values = list(line.curve), list(line.curve.values())
        kept = thinned(values)
        data.append(_trace(line, [steps[i] for i in kept], [values[i] for i in kept]))
        if len(kept) < len(values):
            notes.append(f"{line.name}: {len(kept):,} of {len(values):,} points are drawn, all extremes among them.")
        if marks := [i for i in kept if not math.isfinite(values[i])]:
            data.append(_marks(line, [steps[i] for i in marks], [values[i] for i in marks]))
            kinds = [number(value) for value in values if not math.isfinite(value)]
            notes.append(
                f"{line.name}: {len(kinds):,} of {len(values):,} values not finite ({', '.join(sorted(set(kinds)))}), "
                f"first at step {steps[marks[0]]:,}; marked ×."
            )
    axis = {"gridcolor": "#e8e8e8", "linecolor": "#bbb", "zeroline": False, "automargin": True}
    layout = {
        "height": 290,
        "margin": {"l": 56, "r": 12, "t": 12, "b": 40},
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#333"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "modebar": {"bgcolor": "rgba(255,255,255,0.8)", "color": "#999", "activecolor": "#333"},
        "hovermode": "x unified",
        "showlegend": len(lines) > 1,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "xaxis": axis | {"title": {"text": "step"}, "showline": True, "range": [-0.02 * last_step, 1.02 * last_step]},
        "yaxis": axis | {"title": {"text": unit or ""}} | ({} if view is None else {"range": view}),
        "yaxis2": {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True},
    }
    positive = all(value > 0 for line in lines for value in line.curve.values() if math.isfinite(value))
    return {"data": data, "layout": layout, "view": view, "positive": positive, "notes": notes}


def _trace(line: Line, steps: Sequence[int], values: Sequence[float]) -> dict[str, Any]:
    """The line through what is finite."""
    y = [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]
    # A value between two that are not finite is a line of no length: it gets a dot, as all do where there are few.
    alone = [a is None and b is None for a, b in zip([None, *y], [*y[1:], None], strict=False)]
    few = len(y) <= 30
    size = 8 if len(y) == 1 else 4
    return {
        "type": "scatter",
        "mode": "lines+markers" if few or any(alone) else "lines",
        "name": html.escape(line.name),  # Plotly takes what it shows for HTML
        "x": steps,
        "y": y,
        "line": {"color": line.colour, "width": 1.3},
        "marker": {"color": line.colour, "size": size if few else [size * x for x in alone]},
        "hovertemplate": "%{y:.6~g}",
    }


def _marks(line: Line, steps: Sequence[int], values: Sequence[float]) -> dict[str, Any]:
    """What says where a curve is not finite, on an axis of its own, whose range does not change."""
    return {
        "type": "scatter",
        "mode": "markers",
        "name": html.escape(line.name),
        "x": steps,
        "y": [0.03] * len(steps),
        "yaxis": "y2",
        "text": [number(value) for value in values],
        "hovertemplate": "%{text}",
        "marker": {"symbol": "x-thin", "size": 7, "line": {"width": 2, "color": line.colour}},
        "showlegend": False,
    }


def _view(lines: Sequence[Line]) -> tuple[list[float] | None, list[str]]:
    """What of the y axis to show at first, and what is outside of it; None where all is to be seen.

    The first steps of a run may be so far off that the rest of the curve would be flat. Where a few values take more
    than two thirds of the height they are left out of the first view; never the last one of a curve.
    """
    points = [(value, step, line) for line in lines for step, value in line.curve.items() if math.isfinite(value)]
    if len(points) < 20:
        return None, []
    lowest, highest = min(points, key=lambda point: point[0]), max(points, key=lambda point: point[0])
    low, high = np.quantile([value for value, _, _ in points], [0.02, 0.98])
    if highest[0] - lowest[0] <= 3 * (high - low) or low == high:
        return None, []
    ends = [value for value in (list(line.curve.values())[-1] for line in lines) if math.isfinite(value)]
    margin = (high - low) / 2
    bottom = lowest[0] if lowest[0] >= low - margin else min(low, *ends)
    top = highest[0] if highest[0] <= high + margin else max(high, *ends)
    notes = []
    for word, (value, step, line), hidden in (
        ("Highest", highest, highest[0] > top),
        ("Lowest", lowest, lowest[0] < bottom),
    ):
        if hidden:
            notes.append(f"{word}: {number(value)} ({line.name}, step {step:,}), out of view; double-click shows all.")
    if not notes:
        return None, []
    pad = (top - bottom) * 0.06
    return [float(bottom - pad), float(top + pad)], notes


def unit(tag: str) -> str | None:
    """What a metric is measured in, if its name says so."""
    return next((words for name, words in _UNITS.items() if name in tag), None)


def sections(charts: Charts) -> dict[str, list[dict[str, Any]]]:
    """Figures by the heading that they come under."""
    last_step = max(max(line.curve) for lines in charts.values() for line in lines)
    figures: dict[str, list[dict[str, Any]]] = {}
    for (heading, title), lines in charts.items():
        figures.setdefault(heading, []).append({"title": title} | figure(unit(title), lines, last_step))
    return figures


def run_charts(run: Run, metrics: Sequence[str]) -> Charts:
    """Charts of one run: curves of one quantity, in training and in evaluations, are in one chart.

    Args:
      run: its curves.
      metrics: which to draw.
    """
    groups = sorted({_group(tag) for tag in run.curves}, key=_group_order)
    colours = dict(zip(groups, itertools.cycle(_COLOURS), strict=False)) | {"run": _GREY}
    quantities: dict[str, list[str]] = {}
    for tag in sorted(metrics, key=lambda tag: (_group_order(_group(tag)), _natural(tag))):
        quantities.setdefault(_quantity(tag).partition("/")[0], []).append(tag)
    charts = {}
    for quantity, tags in quantities.items():
        parts = [tag for tag in tags if _part(tag)]
        if parts:  # as of each class or layer: a chart for each evaluation, a line for each part
            for group in dict.fromkeys(map(_group, tags)):
                of_group = [tag for tag in tags if _group(tag) == group]
                title = quantity if len(of_group) > 1 else _quantity(of_group[0])  # one line has no legend
                lines = zip(of_group, itertools.cycle(_COLOURS), strict=False)
                charts[group, title] = [Line(_part(tag) or "all", run.curves[tag], colour) for tag, colour in lines]
            continue
        heading = ", ".join(_group(tag) for tag in tags)
        charts[heading, quantity] = [Line(_group(tag), run.curves[tag], colours[_group(tag)]) for tag in tags]
    # Of what is in training and in evaluations first.
    order = lambda heading, title: (_group_order(heading)[0], -len(charts[heading, title]), heading, _natural(title))
    return {names: charts[names] for names in sorted(charts, key=lambda names: order(*names))}


def compared_charts(runs: Sequence[Run], metrics: Sequence[str]) -> Charts:
    """Charts of several runs: one of each metric, with a curve of each run.

    Args:
      runs: their curves.
      metrics: which to draw.
    """
    charts = {}
    for tag in sorted(metrics, key=lambda tag: (_group_order(_group(tag)), _natural(tag))):
        lines = zip(runs, itertools.cycle(_COLOURS), strict=False)
        charts[_group(tag), tag] = [Line(r.name, r.curves[tag], colour) for r, colour in lines if tag in r.curves]
    return charts


def _group(tag: str) -> str:
    """What is before the slash; what has none is of the whole run."""
    return tag.partition("/")[0] if "/" in tag else "run"


def _quantity(tag: str) -> str:
    """What is after the slash."""
    return tag.partition("/")[2] or tag


def _part(tag: str) -> str:
    """What is after the second slash: of which part of a whole a metric is, as one class or layer."""
    return _quantity(tag).partition("/")[2]


def _natural(tag: str) -> list[Any]:
    """Sorts 5_shot before 10_shot."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", tag)]


def _importance(tag: str) -> tuple[bool, bool, list[Any]]:
    """Sorts likelihoods first, then other wholes, then parts."""
    return bool(_part(tag)), "bits_per" not in tag, _natural(tag)


def _group_order(group: str) -> tuple[int, str]:
    """Training first, then evaluations, then what is of the whole run."""
    return {"train": 0, "run": 2}.get(group.partition(", ")[0], 1), group


def chosen(runs: Sequence[Run], metrics: Sequence[str] | None) -> list[str]:
    """The metrics to draw curves of.

    Args:
      runs: what there is.
      metrics: which to choose; None: all.

    Raises:
      ValueError: for a metric that no run has.
    """
    there = sorted(set().union(*(run.curves for run in runs)))
    for metric in metrics or []:
        if metric not in there:
            raise ValueError(f"--metrics: there is no {metric!r}; there are {', '.join(there)}")
    return list(dict.fromkeys(metrics or there))


def embedded(path: UPath) -> dict[str, Any] | None:
    """A PNG as an URL of data, with the size to show it in; None if it is not whole, as a job may be writing it."""
    data = path.read_bytes()
    if not data.startswith(b"\x89PNG\r\n\x1a\n") or b"IEND" not in data[-8:]:
        return None
    width, height = struct.unpack(">II", data[16:24])
    factor = max(1, 320 // max(width, height))
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    return {"url": url, "width": width * factor, "height": height * factor}


def shown_steps(steps: Sequence[int], limit: int = MAX_PICTURES) -> list[int]:
    """At most `limit` of the steps, evenly spaced, the first and the last among them; newest first."""
    if len(steps) > limit:
        steps = [steps[round(i * (len(steps) - 1) / (limit - 1))] for i in range(limit)]
    return list(reversed(steps))


def _strips(run: Run) -> list[dict[str, Any]]:
    """Pictures over time, a strip for each thing that they show."""
    strips = []
    for name, files in run.pictures.items():
        steps = shown_steps(list(files))
        pictures = {step: embedded(files[step]) for step in steps}
        note = f"{len(steps):,} of {len(files):,} steps are shown, evenly spaced." if len(steps) < len(files) else ""
        cells = [(f"step {step:,}", picture) for step, picture in pictures.items()]
        strips.append({"title": name, "cells": cells, "note": note})
    return strips


def _compared_strips(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The newest picture of each run, a strip for each thing that they show."""
    strips = []
    for name in sorted(set().union(*(run.pictures for run in runs))):
        cells = []
        for run in runs:
            if name in run.pictures:
                step, file = list(run.pictures[name].items())[-1]
                cells.append((f"{run.name}, step {step:,}", embedded(file)))
        strips.append({"title": name, "cells": cells, "note": ""})
    return strips


def _summary(run: Run) -> list[tuple[str, float, int, float | None, int | None]]:
    """Each metric of evaluation: its last value and its best one, with their steps."""
    rows = []
    for tag in run.evaluation_tags():
        curve = run.curves[tag]
        last, top = max(curve), best(curve.values(), tag)
        best_step = next((step for step, value in curve.items() if value == top), None)
        rows.append((tag, curve[last], last, top, best_step))
    return rows


def _finals(runs: Sequence[Run]) -> list[tuple[str, list[tuple[float | None, int | None, bool]]]]:
    """Each metric, those of evaluation first: in each run the last value, its step, and whether it is the best."""
    evaluation = {tag for run in runs for tag in run.evaluation_tags()}
    tags = set().union(*(run.curves for run in runs))
    rows = []
    for tag in sorted(tags, key=lambda tag: (tag not in evaluation, _importance(tag))):
        last = [max(run.curves[tag]) if tag in run.curves else None for run in runs]
        values = [None if step is None else run.curves[tag][step] for run, step in zip(runs, last, strict=True)]
        known = [value for value in values if value is not None]
        top = best(known, tag) if len(set(known)) > 1 else None
        rows.append((tag, [(v, step, v is not None and v == top) for v, step in zip(values, last, strict=True)]))
    return rows


def _evaluations(run: Run) -> list[dict[str, Any]]:
    """A table of each evaluator by step, newest first, and one of what is in the event files only."""
    tables = []
    for name, records in run.results.items():
        tags = dict.fromkeys(key for record in records for key in record if key not in ("step", "seconds"))
        columns = ["step", *tags, "seconds"]
        rows = [[record.get(column) for column in columns] for record in reversed(records)]
        tables.append({"title": name, "columns": columns, "rows": rows})
    written = {key for table in tables for key in table["columns"]}
    tags = [tag for tag in run.evaluation_tags() if tag not in written]
    if tags:
        steps = sorted(set().union(*(run.curves[tag] for tag in tags)), reverse=True)
        rows = [[step, *(run.curves[tag].get(step) for tag in tags)] for step in steps]
        tables.append({"title": "in the event files", "columns": ["step", *tags], "rows": rows})
    return tables


def page(run: Run, metrics: Sequence[str] | None = None) -> str:
    """The page of a run.

    Args:
      run: what is in its workdir.
      metrics: which curves to draw; None: all.

    Raises:
      ValueError: for a metric that the run does not have.
    """
    return _render(
        title=run.name,
        subtitle=str(run.place),
        notes=run.notes,
        facts=known_facts(run),
        summary=_summary(run),
        sections=sections(run_charts(run, chosen([run], metrics))),
        strips=_strips(run),
        evaluations=_evaluations(run),
        configs=run.configs,
        parameters=run.facts.get("parameters", []),
    )


def comparison(runs: Sequence[Run], metrics: Sequence[str] | None = None) -> str:
    """The page of several runs beside each other.

    Args:
      runs: what is in their workdirs.
      metrics: which curves to draw; None: all that any run has.

    Raises:
      ValueError: for a metric that no run has, or a run that is there twice.
    """
    places = [str(run.place) for run in runs]
    for place in places:
        if places.count(place) > 1:
            raise ValueError(f"--compare: {place} is there twice")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        runs = [dataclasses.replace(run, name=str(run.place)) for run in runs]
        names = [run.name for run in runs]
    known = [known_facts(run) for run in runs]
    keys = dict.fromkeys(key for facts in known for key in facts)
    return _render(
        title=" · ".join(names),
        subtitle=f"{len(runs)} runs",
        notes=[f"{run.name}: {note}" for run in runs for note in run.notes],
        runs=names,
        colours=list(itertools.islice(itertools.cycle(_COLOURS), len(runs))),
        compared_facts={key: [facts.get(key) for facts in known] for key in keys},
        finals=_finals(runs),
        differing=differing_bindings(runs),
        sections=sections(compared_charts(runs, chosen(runs, metrics))),
        strips=_compared_strips(runs),
    )


def _render(**content: Any) -> str:
    figures = [figure for part in content["sections"].values() for figure in part]
    data = [{key: f[key] for key in ("data", "layout", "view", "positive")} for f in figures]
    # The end of a script is looked for in its text, whatever that is.
    as_script = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = number
    template = environment.from_string(_TEMPLATE)
    return template.render(**content, figures=as_script, plotly=get_plotlyjs(), style=_STYLE)


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 2rem; max-width: 78rem; color: #222;
  background: #fff }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-top: .8rem; border-top: 1px solid #ddd }
h3 { font-size: .95rem; margin: 1.2rem 0 .4rem; color: #444 }
.muted, .note { color: #666; font-size: .85rem; margin: .2rem 0 }
.warning { border-left: 3px solid #b8405e; padding-left: .6rem; margin: .6rem 0 }
.top { display: flex; flex-wrap: wrap; gap: 1.2rem 3rem; align-items: start; margin-top: 1.2rem }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .15rem 1.2rem; margin: 0; flex: 1 1 22rem }
dt { color: #666 }
dd { margin: 0; overflow-wrap: anywhere }
.scroll { overflow: auto; max-height: 26rem; max-width: 100% }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .8rem .2rem 0; text-align: right; border-bottom: 1px solid #eee; vertical-align: top }
thead th { position: sticky; top: 0; background: #fff; border-bottom: 1px solid #bbb; font-weight: 600; color: #444 }
#runs td, #differing td { max-width: 24rem; overflow-wrap: anywhere }
th.text, td.text { text-align: left; overflow-wrap: anywhere }
.best { font-weight: 700 }
.step { color: #888 }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(25rem, 100%), 1fr)); gap: 1rem 1.5rem }
figure { margin: 0; min-width: 0 }
.plot { min-height: 290px }
/* Beside the name of the x axis, where it covers neither curves nor the legend. */
.plot .modebar-container { top: auto !important; bottom: 24px }
.chart figcaption { font-weight: 600; font-size: .9rem; overflow-wrap: anywhere }
.strip { display: flex; gap: .8rem; overflow-x: auto; align-items: end; padding-bottom: .5rem }
.strip figure { flex: none; max-width: 100% }
.strip img { display: block; max-width: 100%; height: auto; image-rendering: pixelated }
.strip figcaption { font-size: .8rem; color: #666 }
details { margin: .6rem 0 }
summary { cursor: pointer }
pre, code { font: .82rem/1.45 ui-monospace, monospace }
pre { overflow-x: auto; background: #f7f7f7; padding: .8rem; margin: .4rem 0 }
.swatch { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px; margin-right: .4rem }
"""

# What the page must not do, load from anywhere, the browser is told too.
_TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>{{ title }}</title>
<style>{{ style | safe }}</style>
</head>
<body>
{% macro heads() %}
{% for name in runs %}
<th><span class="swatch" style="background: {{ colours[loop.index0] }}"></span>{{ name }}</th>
{% endfor %}
{% endmacro %}
<h1>{{ title }}</h1>
<p class="muted">{{ subtitle }}</p>
{% for note in notes %}
<p class="warning">{{ note }}</p>
{% endfor %}

{% if facts %}
<div class="top">
<dl>
{% for name, value in facts.items() %}
<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}
</dl>
{% if summary %}
<div class="scroll">
<table id="summary">
<thead><tr><th class="text">evaluation</th><th>last</th><th>at step</th><th>best</th><th>at step</th></tr></thead>
{% for tag, last, last_step, best, best_step in summary %}
<tr><td class="text">{{ tag }}</td><td>{{ last | number }}</td><td class="step">{{ last_step | number }}</td>
<td>{{ best | number }}</td><td class="step">{{ best_step | number }}</td></tr>
{% endfor %}
</table>
</div>
{% else %}
<p class="muted">Not evaluated yet.</p>
{% endif %}
</div>
{% endif %}

{% if runs %}
<h2>Runs</h2>
<div class="scroll">
<table id="runs">
<thead><tr><th class="text"></th>{{ heads() }}</tr></thead>
{% for name, values in compared_facts.items() %}
<tr><td class="text">{{ name }}</td>{% for value in values %}<td>{{ value or "–" }}</td>{% endfor %}</tr>
{% endfor %}
</table>
</div>
<h2>What differs in their configurations</h2>
{% if differing %}
<div class="scroll">
<table id="differing">
<thead><tr><th class="text">binding</th>{{ heads() }}</tr></thead>
{% for name, values in differing.items() %}
<tr><td class="text"><code>{{ name }}</code></td>
{% for value in values %}
<td>{% if value is none %}–{% else %}<code>{{ value }}</code>{% endif %}</td>
{% endfor %}
</tr>
{% endfor %}
</table>
</div>
{% else %}
<p class="muted">Nothing.</p>
{% endif %}
<h2>Last values</h2>
<div class="scroll">
<table id="finals">
<thead><tr><th class="text">metric</th>{{ heads() }}</tr></thead>
{% for tag, cells in finals %}
<tr><td class="text">{{ tag }}</td>
{% for value, step, is_best in cells %}
<td>{% if value is none %}–{% else %}<span{% if is_best %} class="best"{% endif %}>{{ value | number }}</span>
<span class="step">at {{ step | number }}</span>{% endif %}</td>
{% endfor %}
</tr>
{% endfor %}
</table>
</div>
{% endif %}

<h2>Curves</h2>
<label class="muted"><input type="checkbox" id="log"> logarithmic, where all values are positive</label>
<noscript><p class="warning">Curves are drawn by JavaScript, which is switched off.</p></noscript>
{% set index = namespace(value=0) %}
{% for heading, figures in sections.items() %}
<h3>{{ heading }}</h3>
<div class="charts">
{% for figure in figures %}
<figure class="chart">
<figcaption>{{ figure.title }}</figcaption>
<div class="plot" id="plot-{{ index.value }}"></div>
{% for note in figure.notes %}
<p class="note">{{ note }}</p>
{% endfor %}
</figure>
{% set index.value = index.value + 1 %}
{% endfor %}
</div>
{% endfor %}

{% if strips %}
<h2>Samples{% if not runs %} over time{% endif %}</h2>
{% for strip in strips %}
<h3>{{ strip.title }}</h3>
<p class="note">{% if not runs %}Newest first. {% endif %}{{ strip.note }}</p>
<div class="strip">
{% for caption, picture in strip.cells %}
<figure>
{% if picture %}
<img src="{{ picture.url }}" width="{{ picture.width }}" height="{{ picture.height }}"
  alt="{{ strip.title }}, {{ caption }}">
<figcaption>{{ caption }}</figcaption>
{% else %}
<figcaption>{{ caption }}: not a whole PNG</figcaption>
{% endif %}
</figure>
{% endfor %}
</div>
{% endfor %}
{% endif %}

{% if evaluations %}
<h2>Evaluations</h2>
{% for table in evaluations %}
<h3>{{ table.title }}</h3>
<div class="scroll">
<table class="evaluation">
<thead><tr>{% for column in table.columns %}<th>{{ column }}</th>{% endfor %}</tr></thead>
{% for row in table.rows %}
<tr>{% for value in row %}<td>{{ value | number }}</td>{% endfor %}</tr>
{% endfor %}
</table>
</div>
{% endfor %}
{% endif %}

{% if configs %}
<h2>Configuration</h2>
{% for name, text in configs.items() %}
<details><summary>{{ name }}</summary><pre>{{ text }}</pre></details>
{% endfor %}
{% endif %}
{% if parameters %}
<h2>Parameters</h2>
<details><summary>{{ facts.Parameters }} in {{ parameters | length | number }} arrays</summary>
<table id="parameters">
<thead><tr><th class="text">name</th><th>shape</th><th>dtype</th><th>size</th></tr></thead>
{% for parameter in parameters %}
<tr><td class="text"><code>{{ parameter.name }}</code></td><td>{{ parameter.shape | join(" × ") }}</td>
<td>{{ parameter.dtype }}</td><td>{{ parameter["size"] | number }}</td></tr>
{% endfor %}
</table>
</details>
{% endif %}

<script>{{ plotly | safe }}</script>
<script type="application/json" id="figures">{{ figures | safe }}</script>
<script>
const figures = JSON.parse(document.getElementById("figures").textContent);
const plots = figures.map((figure, i) => {
  const plot = document.getElementById(`plot-${i}`);
  Plotly.newPlot(plot, figure.data, figure.layout, {
    responsive: true, displaylogo: false, displayModeBar: "hover", showSendToCloud: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"],
  });
  return plot;
});
document.getElementById("log").addEventListener("change", event => {
  plots.forEach((plot, i) => {
    if (!figures[i].positive) return;
    if (event.target.checked) Plotly.relayout(plot, {"yaxis.type": "log", "yaxis.autorange": true});
    else if (figures[i].view) Plotly.relayout(plot, {"yaxis.type": "linear", "yaxis.range": figures[i].view.slice()});
    else Plotly.relayout(plot, {"yaxis.type": "linear", "yaxis.autorange": true});
  });
});
</script>
</body>
</html>
"""


def write_report(workdirs: Sequence[str], out: str | None = None, metrics: Sequence[str] | None = None) -> UPath:
    """Writes the page of a run, or of several.

    Args:
      workdirs: the runs'.
      out: where to write it; None: into the only workdir.
      metrics: which curves to draw; None: all.

    Returns:
      Where it is.

    Raises:
      ValueError: see `read_run`, `page` and `comparison`.
    """
    runs = [read_run(UPath(workdir)) for workdir in workdirs]
    for run in runs:
        for note in run.notes:
            logging.warning("%s: %s", run.place, note)
    text = page(runs[0], metrics) if len(runs) == 1 else comparison(runs, metrics)
    path = runs[0].place / "report.html" if out is None else UPath(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _define_flags() -> None:
    # Not when this is imported: other programs have flags of these names.
    flags.DEFINE_string("workdir", None, "A run's.")
    flags.DEFINE_list("compare", None, "The workdirs of several runs.")
    flags.DEFINE_string("out", None, "The page to write; default: report.html in the --workdir.")
    flags.DEFINE_list("metrics", None, "Curves of these only, as train/loss,val/bits_per_dim; default: of all metrics.")


def main(argv: list[str]) -> None:
    f = flags.FLAGS
    program.no_arguments(argv)
    if not f["verbosity"].present:
        logging.set_verbosity(logging.INFO)
    with program.one_line_errors():
        if (f.workdir is None) == (f.compare is None):
            raise ValueError("give one of --workdir and --compare")
        if f.compare is not None and len(f.compare) < 2:
            raise ValueError("--compare: give two workdirs or more, as DIR1,DIR2")
        if f.compare is not None and f.out is None:
            raise ValueError("--compare needs an --out, the page to write")
        logging.info("Open %s", write_report(f.compare or [f.workdir], f.out, f.metrics))


if __name__ == "__main__":
    _define_flags()
    app.run(main)

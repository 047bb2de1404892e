"""Renders the page of a run, or of several side by side."""

import base64
import dataclasses
import itertools
import json
import math
import pathlib
import statistics
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import jinja2
from absl import logging
from upath import UPath

from jetformer.evaluators.better import better
from jetformer.report import charts
from jetformer.report.read import CONFIG_FILE, OPERATIVE_CONFIG_FILE, Curve, Run, gin_bindings, read_run

MAX_IMAGES = 40  # of a kind
_NAMED = 12  # classes


def write(workdirs: Sequence[str], out: str | None = None, metrics: Sequence[str] | None = None) -> UPath:
    """Writes the page of a run, or of several.

    Args:
      workdirs: the runs' workdirs.
      out: the file to write; None for report.html in the only workdir.
      metrics: the tags of the curves to draw; None for all.

    Returns:
      The page's path.

    Raises:
      ValueError: if no run has metrics yet; see `read_run`, `run_page` and `comparison_page`.
    """
    runs = [read_run(UPath(workdir)) for workdir in workdirs]
    for run in runs:
        for warning in run.warnings:
            logging.warning("%s: %s", run.place, warning)
        if not run.curves:
            if len(runs) == 1:
                raise ValueError(f"{run.place} has no metrics yet: try again after the first train.log_steps steps")
            logging.warning("%s has no metrics yet: it is left out", run.place)
    runs = [run for run in runs if run.curves]
    if not runs:
        raise ValueError(f"{', '.join(workdirs)}: none of these runs has metrics yet")
    if len(workdirs) == 1:
        text = run_page(runs[0], metrics)
    else:
        text = comparison_page(runs, metrics)
        logging.info("Last values\n%s", last_values_table(runs))
    path = runs[0].place / "report.html" if out is None else UPath(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def run_page(run: Run, metrics: Sequence[str] | None = None) -> str:
    """Returns the page of a run.

    Args:
      run: the run.
      metrics: the tags of the curves to draw; None for all.

    Raises:
      ValueError: for a tag that the run does not have.
    """
    return _render(
        title=run.name,
        subtitle=str(run.place),
        warnings=run.warnings,
        facts=known_facts(run),
        summary=_summary(run),
        sections=charts.figures(charts.run_charts(run, _selected([run], metrics))),
        strips=_image_strips(run),
        evaluations=_evaluation_tables(run),
        configs=run.configs,
        parameters=run.facts.get("parameters", []),
    )


def comparison_page(runs: Sequence[Run], metrics: Sequence[str] | None = None) -> str:
    """Returns the page of several runs side by side.

    Args:
      runs: the runs.
      metrics: the tags of the curves to draw; None for all that any run has.

    Raises:
      ValueError: for a tag that no run has, or a run that is given twice.
    """
    places = [str(run.place) for run in runs]
    for place in places:
        if places.count(place) > 1:
            raise ValueError(f"--compare: {place} is given twice")
    if len({run.name for run in runs}) < len(runs):
        runs = [dataclasses.replace(run, name=str(run.place)) for run in runs]
    names = [run.name for run in runs]
    known = [known_facts(run) for run in runs]
    return _render(
        title=" · ".join(names),
        subtitle=f"{len(runs)} runs",
        warnings=[f"{run.name}: {warning}" for run in runs for warning in run.warnings],
        runs=names,
        colours=charts.colours_of(runs),
        compared_facts={key: [facts.get(key) for facts in known] for facts in known for key in facts},
        last_values=_last_values(runs),
        differing=_differing_bindings(runs),
        sections=charts.figures(charts.comparison_charts(runs, _selected(runs, metrics))),
        strips=_comparison_strips(runs),
    )


def _render(**content: Any) -> str:
    figures = [figure for section in content["sections"].values() for figure in section]
    data = [{key: figure[key] for key in ("lines", "end", "view", "positive")} for figure in figures]
    # "</script>" would end the script, even in a string.
    data_json = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    loader = jinja2.FileSystemLoader(pathlib.Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = charts.number
    return environment.get_template("page.html.j2").render(**content, figures=data_json)


def last_values_table(runs: Sequence[Run]) -> str:
    """Returns a table of text: a line for each run, with the last values of its metrics that have a better direction.

    They are those of evaluations if any run has them.
    """
    evaluated = set().union(*(run.evaluation_tags() for run in runs))
    tags = evaluated or set().union(*(run.curves for run in runs))
    tags = sorted((tag for tag in tags if better(tag)), key=charts.importance)
    last = lambda run, tag: charts.number(run.curves[tag][max(run.curves[tag])]) if tag in run.curves else "–"
    rows = [
        ["run", "step", *tags],
        *([run.name, f"{run.last_step():,}", *(last(run, tag) for tag in tags)] for run in runs),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def _selected(runs: Sequence[Run], metrics: Sequence[str] | None) -> list[str]:
    """Returns the tags of the curves to draw; without a selection all that any run has."""
    tags = sorted(set().union(*(run.curves for run in runs)))
    for metric in metrics or []:
        if metric not in tags:
            raise ValueError(f"--metrics: there is no {metric!r}; there are {', '.join(tags)}")
    return list(dict.fromkeys(metrics or tags))


def known_facts(run: Run) -> dict[str, str]:
    """Returns what is known of a run, as texts by heading."""
    facts, known = run.facts, {}
    step, total = run.last_step(), facts.get("total_steps")
    known["Steps"] = f"{step:,} of {total:,}" if total else f"{step:,}"
    if facts.get("stopped_at") == step:
        known["Steps"] += ", stopped early"
    if size := facts.get("batch_size"):
        known["Batch size"] = f"{size:,}"
        if examples := facts.get("train_examples"):
            known["Epochs"] = f"{step * size / examples:,.1f} of {examples:,} examples"
    if parameters := facts.get("parameters"):
        known["Parameters"] = f"{sum(parameter['size'] for parameter in parameters):,}"
    if names := run.class_names:
        known["Classes"] = f"{len(names):,}: {', '.join(names[:_NAMED])}{', …' if len(names) > _NAMED else ''}"
    if device := facts.get("device"):
        counts = [(facts.get("device_count") or 1, "devices"), (facts.get("process_count") or 1, "processes")]
        known["Hardware"] = ", ".join([device, *(f"{count:,} {name}" for count, name in counts if count > 1)])
    if versions := facts.get("versions"):
        known["Versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    rates = [rate for rate in run.curves.get("examples_per_sec", {}).values() if math.isfinite(rate)]
    if rates:
        known["Throughput"] = f"{statistics.median(rates):,.4g} examples / s (median)"
    if "uptime" in run.curves:
        seconds = duration(run.curves["uptime"])
        minutes = round(seconds / 60)
        short = f"{seconds:.0f} s" if minutes < 2 else f"{minutes} min"
        known["Duration"] = short if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
    return known


def duration(uptime: Curve) -> float:
    """Returns the training time in seconds; uptime restarts at 0 whenever a run is resumed."""
    values = [value for value in uptime.values() if math.isfinite(value)]
    return sum(a for a, b in itertools.pairwise(values) if b < a) + sum(values[-1:])


def best(values: Iterable[float], tag: str) -> float | None:
    """Returns the best finite value of a metric; None if there is none or its direction is unknown."""
    finite, direction = [value for value in values if math.isfinite(value)], better(tag)
    if not finite or direction is None:
        return None
    return min(finite) if direction == "lower" else max(finite)


def _summary(run: Run) -> list[tuple[str, float, int, float | None, int | None]]:
    """Returns for each metric of evaluations: tag, last value, its step, best value, its step."""
    rows = []
    for tag in sorted(run.evaluation_tags(), key=charts.importance):
        curve = run.curves[tag]
        last, top = max(curve), best(curve.values(), tag)
        rows.append((tag, curve[last], last, top, next((step for step, value in curve.items() if value == top), None)))
    return rows


def _evaluation_tables(run: Run) -> list[dict[str, Any]]:
    """Returns a table for each evaluator, newest step first, and one of what is in event files only."""
    tables = []
    for name, records in run.results.items():
        tags = dict.fromkeys(tag for record in records for tag in record if tag not in ("step", "seconds"))
        columns = ["step", *tags, "seconds"]
        rows = [[record.get(column) for column in columns] for record in reversed(records)]
        tables.append({"title": name, "columns": columns, "rows": rows})
    tags = run.evaluation_tags().difference(*(table["columns"] for table in tables))
    if tags:
        columns = sorted(tags, key=charts.importance)
        steps = sorted(set().union(*(run.curves[tag] for tag in tags)), reverse=True)
        rows = [[step, *(run.curves[tag].get(step) for tag in columns)] for step in steps]
        tables.append({"title": "in the event files", "columns": ["step", *columns], "rows": rows})
    return tables


def _last_values(runs: Sequence[Run]) -> list[tuple[str, list[tuple[float, int, bool] | None]]]:
    """Returns for each metric: tag and, by run, last value, step, whether it is best. Evaluations come first."""
    evaluation_tags = set().union(*(run.evaluation_tags() for run in runs))
    tags = set().union(*(run.curves for run in runs))
    rows = []
    for tag in sorted(tags, key=lambda tag: (tag not in evaluation_tags, charts.importance(tag))):
        last = [max(run.curves[tag].items()) if tag in run.curves else None for run in runs]
        values = [point[1] for point in last if point is not None]
        top = best(values, tag) if len(set(values)) > 1 else None
        rows.append((tag, [point and (point[1], point[0], point[1] == top) for point in last]))
    return rows


def _differing_bindings(runs: Sequence[Run]) -> dict[str, list[str | None]]:
    """Returns the gin bindings that differ: each run's value, None where it has none."""
    file = OPERATIVE_CONFIG_FILE if all(OPERATIVE_CONFIG_FILE in run.configs for run in runs) else CONFIG_FILE
    parsed = [gin_bindings(run.configs[file]) for run in runs]
    rows = {name: [values.get(name) for values in parsed] for name in sorted(set().union(*parsed))}
    # The bindings of a class that some run does not use are left out: the binding that chooses the class differs.
    used = [{name.rpartition(".")[0] for name in values} for values in parsed]
    return {
        name: row
        for name, row in rows.items()
        if len(set(row)) > 1 and all(name.rpartition(".")[0] in names for names in used)
    }


def _image_strips(run: Run) -> list[dict[str, Any]]:
    """Returns a strip for each kind of image: at most `MAX_IMAGES` steps, evenly spaced."""
    strips = []
    for title, files in run.images.items():
        steps, note = list(files), ""
        if len(steps) > MAX_IMAGES:
            steps = [steps[round(i * (len(steps) - 1) / (MAX_IMAGES - 1))] for i in range(MAX_IMAGES)]
            note = f"{len(steps):,} of {len(files):,} steps are shown, evenly spaced."
        cells = [(f"step {step:,}", _embedded(files[step])) for step in steps]
        strips.append({"title": title, "cells": cells, "note": note})
    return strips


def _comparison_strips(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Returns a strip for each kind of image: the newest one of each run."""
    strips = []
    for title in sorted(set().union(*(run.images for run in runs))):
        newest = [(run.name, max(run.images[title].items())) for run in runs if title in run.images]
        cells = [(f"{name}, step {step:,}", _embedded(file)) for name, (step, file) in newest]
        strips.append({"title": title, "cells": cells, "note": ""})
    return strips


def _embedded(file: UPath) -> dict[str, Any] | None:
    """Returns a PNG as a data URL, with its size on the page; None if it is incomplete: a job may be writing it."""
    data = file.read_bytes()
    if not data.startswith(b"\x89PNG\r\n\x1a\n") or b"IEND" not in data[-8:]:
        return None
    width, height = struct.unpack(">II", data[16:24])
    factor = max(1, 320 // max(width, height))
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    return {"url": url, "width": width * factor, "height": height * factor}

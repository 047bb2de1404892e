"""Reads what a run leaves in its workdir: configuration, metrics, evaluation results, images."""

import bisect
import dataclasses
import json
import math
import os
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import fsspec
from google.protobuf.message import DecodeError
from tensorboard.compat.proto import event_pb2, types_pb2
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.util.tensor_util import make_ndarray
from upath import UPath

from jetformer import class_names

# Files of a workdir. The modules that write them import TensorFlow, which takes longer than writing a page.
CONFIG_FILE, OPERATIVE_CONFIG_FILE, FACTS_FILE = "config.gin", "operative_config.gin", "run.json"
EVENTS_PREFIX, EVALUATION_PREFIX, RESULTS_FILE = "events.out.tfevents.", "eval_", "results.jsonl"
START_TAG = "config"  # of the text that training writes at the step where it starts or resumes

Curve = dict[int, float]  # values by step


@dataclasses.dataclass(frozen=True)
class Run:
    """The contents of a workdir.

    Attributes:
      name: the run's name on the page.
      place: the workdir.
      configs: the text of its gin files, by file name.
      facts: the contents of run.json; empty if there is none.
      curves: all scalars, by tag.
      results: each evaluator's results, one record a step.
      images: image files by step, by evaluator and kind.
      warnings: damaged files.
      class_names: by label; None: unknown.
    """

    name: str
    place: UPath
    configs: dict[str, str]
    facts: dict[str, Any]
    curves: dict[str, Curve]
    results: dict[str, list[dict[str, float]]]
    images: dict[str, dict[int, UPath]]
    warnings: list[str]
    class_names: Sequence[str] | None = None

    def last_step(self) -> int:
        """Returns the last step of any curve."""
        return max(max(curve) for curve in self.curves.values())

    def evaluation_tags(self) -> set[str]:
        """Returns the tags of evaluations, including those of older runs, which are in event files only."""
        recorded = {tag for records in self.results.values() for record in records for tag in record}
        return {tag for tag in self.curves if tag in recorded or re.match("(val|eval|test)(_ema)?/", tag)}


def read_run(workdir: UPath) -> Run:
    """Reads a workdir; the run may still be training.

    Returns:
      Its contents. Evaluators' results take precedence over event files.

    Raises:
      ValueError: if it holds no run, or a file is damaged.
    """
    place = UPath(os.path.abspath(workdir)) if isinstance(workdir, os.PathLike) else workdir
    if not (place / CONFIG_FILE).exists():
        raise ValueError(f"{workdir} holds no run: it has no {CONFIG_FILE}")
    files = {file.name: file for file in sorted(place.iterdir(), key=lambda file: file.name)}
    configs = {
        name: files[name].read_text(encoding="utf-8", errors="replace")
        for name in (OPERATIVE_CONFIG_FILE, CONFIG_FILE)
        if name in files
    }
    facts = read_facts(files[FACTS_FILE]) if FACTS_FILE in files else {}
    warnings: list[str] = []
    curves = event_scalars((file for name, file in files.items() if name.startswith(EVENTS_PREFIX)), warnings)
    results, images = {}, {}
    for name, directory in files.items():
        if not name.startswith(EVALUATION_PREFIX) or not directory.is_dir():
            continue
        evaluator = name.removeprefix(EVALUATION_PREFIX)
        if (directory / RESULTS_FILE).exists():
            results[evaluator] = read_results(directory / RESULTS_FILE)
        for record in results.get(evaluator, []):
            for tag in record.keys() - {"step", "seconds"}:
                curves.setdefault(tag, {})[record["step"]] = record[tag]
        for kind in sorted(directory.iterdir(), key=lambda path: path.name):
            if kind.is_dir() and (found := _images(kind)):
                images[f"{evaluator}/{kind.name}"] = found
    curves = {tag: dict(sorted(curves[tag].items())) for tag in sorted(curves)}
    names = class_names.saved(place)
    return Run(place.name or str(place), place, configs, facts, curves, results, images, warnings, names)


def find_runs(pattern: str) -> list[str]:
    """Returns the workdirs that a pattern matches, as DIR/*, in the order of their names.

    Raises:
      ValueError: if there is none.
    """
    fs, path = fsspec.url_to_fs(pattern)
    files = fs.glob(f"{path.rstrip('/')}/{CONFIG_FILE}")
    if not files:
        raise ValueError(f"{pattern} matches no run: expected directories with a {CONFIG_FILE}")
    return [fs.unstrip_protocol(file).removeprefix("file://").rpartition("/")[0] for file in sorted(files)]


def event_scalars(files: Iterable[UPath], warnings: list[str]) -> dict[str, Curve]:
    """Reads the scalars of TensorBoard event files.

    TensorBoard's `EventFileLoader` imports TensorFlow if it is installed, and reads no URLs.

    Args:
      files: a run's event files, one for each time it was started.
      warnings: receives a line for each damaged file, which is read up to the damage.

    Returns:
      Curves by tag. Of values of the same step the last written counts. Values of steps after the one from which the
      run later resumed do not count.
    """
    written: dict[str, dict[int, tuple[float, float]]] = {}  # time and value, by tag and step
    starts: list[tuple[float, int]] = []  # time and step
    for file in files:
        for event in _events(file, warnings):
            for value in event.summary.value:
                if value.tag == START_TAG:
                    starts.append((event.wall_time, event.step))
                scalar = _scalar(value)
                if scalar is not None:
                    points = written.setdefault(value.tag, {})
                    if event.step not in points or points[event.step][0] <= event.wall_time:
                        points[event.step] = event.wall_time, scalar
    starts.sort()
    times = [time for time, _ in starts]
    limits = [math.inf]  # the last step that counts of what was written before the first start, the second, …
    for _, step in reversed(starts):
        limits.append(min(limits[-1], step))
    limits.reverse()
    curves = {
        tag: {step: value for step, (time, value) in points.items() if step <= limits[bisect.bisect_right(times, time)]}
        for tag, points in written.items()
    }
    return {tag: curve for tag, curve in curves.items() if curve}


def _events(file: UPath, warnings: list[str]) -> Iterator[event_pb2.Event]:
    """Yields the events of a file. The last one may be incomplete: a job may be writing it.

    An event is stored as its length (8 bytes), the length's checksum (4), the event, and the event's checksum (4),
    which is not verified: in Python that takes longer than the rest.
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
            warnings.append(f"{file.name} is damaged at byte {position:,}: the rest of it is left out")
            return
        position = end + 4


def _scalar(value) -> float | None:
    """Returns the value of a summary that is a scalar; CLU writes scalars as tensors."""
    if value.HasField("simple_value"):
        return value.simple_value
    if not value.HasField("tensor") or value.tensor.tensor_shape.dim or value.tensor.dtype == types_pb2.DT_STRING:
        return None
    if value.metadata.plugin_data.plugin_name not in ("", "scalars"):  # hyperparameters have an empty tensor
        return None
    return float(make_ndarray(value.tensor))


def read_results(file: UPath) -> list[dict[str, float]]:
    """Reads an evaluator's results.jsonl.

    Returns:
      A record for each step, in order, without an incomplete last line.

    Raises:
      ValueError: if a line is damaged.
    """
    lines = file.read_bytes().decode(errors="replace").split("\n")
    records = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                break
            record = None
        if not isinstance(record, dict) or not all(
            value is None or type(value) in (int, float) for value in record.values()
        ):
            raise ValueError(f"{file}:{number} is damaged: expected a JSON object of numbers; delete the line")
        if not isinstance(record.get("step"), int):
            raise ValueError(f"{file}:{number} is damaged: it has no step; delete the line")
        records[record["step"]] = {tag: math.nan if value is None else value for tag, value in record.items()}
    return [records[step] for step in sorted(records)]


def read_facts(file: UPath) -> dict[str, Any]:
    """Reads run.json: hardware, versions, sizes.

    Raises:
      ValueError: if it is damaged.
    """
    try:
        facts = json.loads(file.read_bytes())
        if not isinstance(facts, dict):
            raise ValueError("it is no JSON object")
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}; delete it to get a page without its contents") from error
    return facts


def _images(directory: UPath) -> dict[int, UPath]:
    """Returns the image files of a directory, by step."""
    files = {int(file.stem): file for file in directory.iterdir() if re.fullmatch(r"\d{9,}\.png", file.name)}
    return dict(sorted(files.items()))


def gin_bindings(text: str) -> dict[str, str]:
    """Parses a gin file written by gin.

    Returns:
      The values of its bindings and macros by name, each in one line.
    """
    values: dict[str, str] = {}
    name = None
    for line in text.splitlines():
        if match := re.fullmatch(r"([\w./]+) = (.*)", line):
            name, values[name] = match[1], match[2]
        elif line[:1].isspace() and name is not None:
            values[name] += line
        else:
            name = None
    # gin breaks lines by length.
    return {name: " ".join(value.replace("\\ ", " ").split()) for name, value in values.items()}

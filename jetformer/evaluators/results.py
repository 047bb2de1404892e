"""The files that evaluators leave in a workdir.

    <workdir>/eval_<name>/results.jsonl             a line for each step: {"step": …, "seconds": …, "<name>/…": …}
    <workdir>/eval_<name>/steps/000000200.json      the record of one step: its metrics, and the evaluator's settings
    <workdir>/eval_<name>/<picture>/000000200.png   pictures

A step counts as evaluated once its record is there, which is written whole or not at all. results.jsonl is built from
the records, so that several jobs can write at once without losing each other's results. A metric that is not finite is
null in both.
"""

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from absl import logging
from upath import UPath

from jetformer.evaluators.base import Evaluator, Results
from jetformer.runtime import Runtime
from jetformer.sampling.grid import save_png
from jetformer.storage import write_whole

if TYPE_CHECKING:
    from jetformer.metrics import Metrics  # brings TensorFlow, which sampling does without

RESULTS_FILE = "results.jsonl"


def directory_of(workdir: UPath, name: str) -> UPath:
    """Returns the directory of an evaluator's results."""
    return workdir / f"eval_{name}"


def evaluated_steps(workdir: UPath, name: str) -> set[int]:
    """Returns the steps that have been evaluated."""
    return set(_records(workdir, name))


def other_settings(workdir: UPath, name: str, evaluator: Evaluator, only: int | None = None) -> list[int]:
    """Returns the steps that were evaluated under this name with other settings than the evaluator's; `only` checks one
    step."""
    records = {step: _read(path) for step, path in _records(workdir, name).items() if only in (None, step)}
    return sorted(step for step, record in records.items() if record and record["settings"] != _settings(evaluator))


def write(
    results: Results,
    name: str,
    step: int,
    seconds: float,
    evaluator: Evaluator,
    workdir: UPath,
    written: "Metrics",
    runtime: Runtime,
) -> None:
    """Writes the results of an evaluation, in process 0.

    Args:
      results: of the evaluator.
      name: its name in `train.evaluators`.
      step: the training step.
      seconds: how long it took.
      evaluator: its settings are recorded.
      workdir: of the run.
      written: gets metrics and pictures too.
      runtime: tells which process this is.
    """
    scalars = results.tagged(name)
    directory = directory_of(workdir, name)
    written.writer.write_scalars(step, scalars)
    if runtime.process_index == 0:
        for picture, pixels in results.pictures.items():
            (directory / picture).mkdir(parents=True, exist_ok=True)
            save_png(pixels, directory / picture / f"{step:09d}.png")
            written.writer.write_images(step, {f"{name}/{picture}": pixels[None]})
    written.publish()  # before the record, which marks the step as complete
    if runtime.process_index == 0:
        (directory / "steps").mkdir(parents=True, exist_ok=True)
        values = {tag: value if math.isfinite(value) else None for tag, value in scalars.items()}  # JSON has no NaN
        record = {"step": step, "seconds": round(seconds, 3), "settings": _settings(evaluator), "figures": values}
        write_whole(directory / "steps" / f"{step:09d}.json", json.dumps(record))
        build(workdir, name, changed=step)


def build(workdir: UPath, name: str, changed: int | None = None) -> None:
    """Builds results.jsonl from the records of all steps, if there are any.

    It lists the records again after writing, and writes again if another job has added one meanwhile: the last of
    several jobs to write includes all steps. (If two jobs evaluate the same step again, as with --step, the line may be
    the earlier one until a job starts or ends.) After a kill between a record and this, the next call completes the
    file.

    Args:
      workdir: of the run.
      name: of the evaluator.
      changed: the only step whose line may have changed, so that other records need not be read; None: reads all.
    """
    written, lines = None, {}
    file = directory_of(workdir, name) / RESULTS_FILE
    if changed is not None and file.exists():
        found = (re.match(r'{"step": (\d+), .*}$', line) for line in file.read_text().splitlines())
        lines = {int(match[1]): match[0] for match in found if match and int(match[1]) != changed}
    while (records := _records(workdir, name)) or file.exists():
        for step in set(records) - set(lines):
            if record := _read(records[step]):
                lines[step] = json.dumps({key: record[key] for key in ("step", "seconds")} | record["figures"])
        lines = {step: lines[step] for step in sorted(lines) if step in records}
        text = "".join(f"{line}\n" for line in lines.values())
        if text == written:
            return
        write_whole(file, text)
        written = text


def forget(workdir: UPath, after: int) -> None:
    """Deletes all evaluators' results of later steps than the one that training resumes from: they will be repeated,
    perhaps with other settings."""
    for directory in sorted(workdir.glob("eval_*"), key=str):
        name = directory.name.removeprefix("eval_")
        if count := delete(workdir, name, lambda step: step > after):
            logging.warning("%s: deleted the results of %d step(s) that will be repeated", name, count)


def delete(workdir: UPath, name: str, which: Callable[[int], bool]) -> int:
    """Deletes an evaluator's records and pictures of some steps; returns the number of records."""
    records = [path for step, path in _records(workdir, name).items() if which(step)]
    for path in records:
        path.unlink(missing_ok=True)
    for path in directory_of(workdir, name).glob("*/*"):
        if not re.fullmatch(r"\d+(\.png)?", path.name) or not which(int(path.stem)):
            continue
        with contextlib.suppress(FileNotFoundError):  # another process deletes them, too
            path.fs.rm(path.path, recursive=True)  # a picture, or a directory of images, as of `Fid.keep_images`
    if records:
        build(workdir, name)
    return len(records)


def _settings(evaluator: Evaluator) -> str:
    """Returns all that metrics of an evaluator depend on."""
    return repr(dataclasses.replace(evaluator, every_steps=None))


def _read(path: UPath) -> dict[str, Any] | None:
    """Returns a record; None if it was just deleted, or, with a warning, if it is damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        logging.warning("%s is damaged (%s): delete it to evaluate its step again", path, error)
        return None


def _records(workdir: UPath, name: str) -> dict[int, UPath]:
    """Returns the records by step."""
    steps = directory_of(workdir, name) / "steps"
    files = steps.iterdir() if steps.exists() else ()
    return {int(file.stem): file for file in files if re.fullmatch(r"\d+\.json", file.name)}

"""What evaluators have in common: what they are given, what they give, and where that is written down.

An evaluator is a frozen dataclass in a file of this directory, which gin then knows by its name:

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class LatentStd(Evaluator):
        split: str | None = None  # in gin: LatentStd.split = "test", and train.evaluators = {"latents": @LatentStd()}

        def __call__(self, context: Context) -> Results:
            def score(model, batch, keys):
                tokens = model.encode_image(to_unit_range(batch["image"].float())).tokens
                return {"std": tokens.flatten(1).std(1)}

            rows = context.per_example(score, context.batches(split=self.split), seed=0)
            return Results(scalars={"std": float(rows["std"].mean())})  # latents/std

`Context.per_example` shares examples out over processes and devices. What is found goes to

    <workdir>/eval_<name>/results.jsonl             a line for each step: {"step": …, "seconds": …, "<name>/…": …}
    <workdir>/eval_<name>/steps/000000200.json      the same of one step, and the evaluator's settings
    <workdir>/eval_<name>/<picture>/000000200.png   pictures

A step counts as evaluated once its own file is there, which is written whole or not at all. results.jsonl is made of
these files, so that several jobs may write at once and none loses what another one did. A figure that is not finite is
null in them.
"""

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging
from upath import UPath

from jetformer.data.dataset import Data
from jetformer.loops.base import Function, Loop, Rows
from jetformer.ranges import PositiveInt
from jetformer.runtime import Runtime, derive_seed
from jetformer.sampling.grid import save_png
from jetformer.storage import write_whole

if TYPE_CHECKING:
    from jetformer.experiment import Experiment
    from jetformer.metrics import Metrics
    from jetformer.state import State

RESULTS_FILE = "results.jsonl"

_prepared: set[Data] = set()  # in this process


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Attributes:
    every_steps: run it in training every so many steps, and at the end; None: in evaluation jobs only.
    """

    every_steps: PositiveInt | None = None

    def check(self, context: "Context") -> None:
        """Looks whether it can evaluate like this, within seconds; called before anything is trained or evaluated.

        Raises:
          ValueError: if not.
        """

    def __call__(self, context: "Context") -> "Results":
        """Evaluates; every process calls it."""
        raise NotImplementedError


@dataclasses.dataclass
class Results:
    """What an evaluator finds.

    Attributes:
      scalars: figures by name.
      ema_scalars: the same with the moving average of the parameters, where both are evaluated.
      pictures: uint8 `[H, W, C]` by name.
    """

    scalars: dict[str, float] = dataclasses.field(default_factory=dict)
    ema_scalars: dict[str, float] = dataclasses.field(default_factory=dict)
    pictures: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def tagged(self, name: str) -> dict[str, float]:
        """All figures by tag: those of the evaluator `name` are `name/…` and `name_ema/…`."""
        tags = {f"{name}/{key}": value for key, value in self.scalars.items()}
        return tags | {f"{name}_ema/{key}": value for key, value in self.ema_scalars.items()}


@dataclasses.dataclass(frozen=True)
class Context:
    """What an evaluator is given.

    Attributes:
      run: the experiment.
      state: its parameters at a step; the model is placed on the devices.
      step: the step.
      runtime: the devices and processes.
      loop: the loop for them.
      directory: where the evaluator may keep more than its results: `<workdir>/eval_<name>`.
      each_batch: called after every batch of examples.
    """

    run: "Experiment"
    state: "State"
    step: int
    runtime: Runtime
    loop: Loop
    directory: UPath
    each_batch: Callable[[], None] = lambda: None

    def per_example(
        self,
        function: Function,
        batches: Iterator[dict[str, np.ndarray]],
        *,
        seed: int,
        averaged: bool = True,
        staged: bool = False,
        to_rows: Callable[[Rows], Rows] = lambda rows: rows,
    ) -> Rows:
        """What a function gives for every example of `batches`, over all processes; see `Loop.per_example`.

        Args:
          function, batches, staged, to_rows: see there.
          seed: which draws; those of a seed also depend on the run's.
          averaged: with the moving average of the parameters, if there is one.
        """
        score = lambda: self.loop.per_example(
            self.state.runner,
            function,
            batches,
            seed=derive_seed(self.run.seed, seed),
            staged=staged,
            to_rows=to_rows,
            each_batch=self.each_batch,
        )
        if not averaged:
            return score()
        with self.state.averaged():
            return score()

    def batches(
        self, data: Data | None = None, split: str | None = None, pp: str | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """Every example of a split once, this process's part of them; the first is looked at.

        Args:
          data: the dataset; None: the run's.
          split: TFDS split; None: the dataset's `eval_split`.
          pp: preprocessing string; None: the dataset's of evaluation.

        Raises:
          ValueError: if there is no such dataset or split, it has no examples, or they cannot be preprocessed.
        """
        from jetformer.data.pipeline import peek

        data = self.run.data if data is None else data
        prepare(data, self.runtime)
        batches = data.eval_batches(
            batch_size=self.run.batch_size_of_evaluation(),
            process_index=self.runtime.process_index,
            process_count=self.runtime.process_count,
            split=split,
            pp=pp,
        )
        _, batches = peek(batches, f"split {split or data.eval_split!r} of {data.name!r}")
        return batches

    def first_examples(
        self, count: int, names: tuple[str, ...], data: Data | None = None, split: str | None = None
    ) -> Rows:
        """The first examples of a split, or all where it has fewer, on every process: arrays `[N, ...]` by name."""
        data = self.run.data if data is None else data
        prepare(data, self.runtime)
        parts, found = [], 0
        with contextlib.closing(data.eval_batches(batch_size=min(count, 64), split=split)) as batches:
            for batch in batches:
                parts.append({name: batch[name][batch["_mask"]] for name in names})
                found += int(batch["_mask"].sum())
                if found >= count:
                    break
        return {name: np.concatenate([part[name] for part in parts])[:count] for name in names}

    def batches_of(
        self, rows: Rows, batch_size: int | None = None, numbers: np.ndarray | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """Examples that every process has, as batches of which each process gets its part.

        Args:
          rows: arrays `[N, ...]` by name.
          batch_size: over all processes; None: that of evaluation. It is made to divide by the devices.
          numbers: of the examples, int `[N]`, which their draws depend on; None: 0, 1, …
        """
        count = len(next(iter(rows.values())))
        devices, processes = self.runtime.device_count, self.runtime.process_count
        size = min(batch_size or self.run.batch_size_of_evaluation(), count)
        local_size = -(-size // devices) * devices // processes
        for start in range(0, count, local_size * processes):
            first = start + self.runtime.process_index * local_size
            index = np.arange(first, first + local_size, dtype=np.int32)
            batch = {name: array[index.clip(max=count - 1)] for name, array in rows.items()}
            mask = index < count
            if numbers is not None:
                index = numbers[index.clip(max=count - 1)].astype(np.int32)
            yield batch | {"_mask": mask, "_index": index}


def prepare(data: Data, runtime: Runtime) -> None:
    """Prepares a dataset where that has not been done: where processes share the place, one of them does it.

    Raises:
      ValueError: on all processes, if it cannot be had.
    """
    if data not in _prepared:
        runtime.first_does(data.prepare)
        data.prepare()
        _prepared.add(data)


def directory_of(workdir: UPath, name: str) -> UPath:
    """Where the results of an evaluator are."""
    return workdir / f"eval_{name}"


def evaluated_steps(workdir: UPath, name: str) -> set[int]:
    """The steps whose evaluation is complete."""
    return set(_records(directory_of(workdir, name)))


def other_settings(workdir: UPath, name: str, evaluator: Evaluator, only: int | None = None) -> list[int]:
    """The steps (or `only` one) that have been evaluated under this name with other settings than the evaluator's."""
    found = _records(directory_of(workdir, name))
    records = {step: _read(path) for step, path in found.items() if only in (None, step)}
    return sorted(step for step, record in records.items() if record and record["settings"] != settings(evaluator))


def forget(workdir: UPath, after: int) -> None:
    """Deletes what all evaluators have recorded and drawn of steps after a step, from which training goes on: these
    steps are taken anew, perhaps with other settings."""
    for directory in sorted(workdir.glob("eval_*"), key=str):
        name = directory.name.removeprefix("eval_")
        if count := delete(workdir, name, lambda step: step > after):
            logging.warning("%s: deleted figures of %d step(s) that come again", name, count)


def delete(workdir: UPath, name: str, which: Callable[[int], bool]) -> int:
    """Deletes what an evaluator has recorded and drawn of some steps; returns of how many there were figures."""
    directory = directory_of(workdir, name)
    records = [path for step, path in _records(directory).items() if which(step)]
    for path in records:
        path.unlink(missing_ok=True)
    for path in directory.glob("*/*"):
        if not re.fullmatch(r"\d+(\.png)?", path.name) or not which(int(path.stem)):
            continue
        with contextlib.suppress(FileNotFoundError):  # somebody else deletes them, too
            path.fs.rm(path.path, recursive=True)  # a picture, or a directory of them, as `Fid.keep_images` makes
    if records:
        write_results(workdir, name)
    return len(records)


def settings(evaluator: Evaluator) -> str:
    """What figures of an evaluator depend on."""
    return repr(dataclasses.replace(evaluator, every_steps=None))


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
    """Writes down what an evaluator has found, in process 0.

    Args:
      results: what it has found.
      name: what it is called in `train.evaluators`.
      step: the step.
      seconds: how long it took.
      evaluator: which has found it.
      workdir: the run's.
      written: where figures and pictures go beside these files.
      runtime: which process this is.
    """
    scalars = results.tagged(name)
    directory = directory_of(workdir, name)
    written.writer.write_scalars(step, scalars)
    if runtime.process_index == 0:
        for picture, pixels in results.pictures.items():
            (directory / picture).mkdir(parents=True, exist_ok=True)
            save_png(pixels, directory / picture / f"{step:09d}.png")
            written.writer.write_images(step, {f"{name}/{picture}": pixels[None]})
    written.publish()  # the record says that all of it is there
    if runtime.process_index == 0:
        (directory / "steps").mkdir(parents=True, exist_ok=True)
        figures = {tag: value if math.isfinite(value) else None for tag, value in scalars.items()}  # JSON has no NaN
        record = {"step": step, "seconds": round(seconds, 3), "settings": settings(evaluator), "figures": figures}
        write_whole(directory / "steps" / f"{step:09d}.json", json.dumps(record))
        write_results(workdir, name, changed=step)


def write_results(workdir: UPath, name: str, changed: int | None = None) -> None:
    """Makes results.jsonl of the records of all steps; nothing where there are none.

    What another job has recorded meanwhile is seen after writing, and then it is written again: the last of several
    jobs to write has seen all. (Of a step that one of them has evaluated again meanwhile, as with --step, the line may
    be the earlier one until a job begins or ends.) What a kill between a record and this has left out the next call
    has.

    Args:
      workdir: the run's.
      name: of the evaluator.
      changed: the only step whose line may have changed, where the file is made for one: the others are taken over.
        None: all records are read.
    """
    directory, written = directory_of(workdir, name), None
    lines: dict[int, str] = {}
    file = directory / RESULTS_FILE
    if changed is not None and file.exists():
        found = (re.match(r'{"step": (\d+), .*}$', line) for line in file.read_text().splitlines())
        lines = {int(match[1]): match[0] for match in found if match and int(match[1]) != changed}
    while (records := _records(directory)) or file.exists():
        for step in set(records) - set(lines):
            if record := _read(records[step]):
                lines[step] = json.dumps({key: record[key] for key in ("step", "seconds")} | record["figures"])
        lines = {step: lines[step] for step in sorted(lines) if step in records}
        text = "".join(f"{line}\n" for line in lines.values())
        if text == written:
            return
        write_whole(file, text)
        written = text


def _read(path: UPath) -> dict[str, Any] | None:
    """A record; None if it has just been deleted, or is damaged, which is said."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        logging.warning("%s is damaged (%s): delete it, and its step is evaluated again", path, error)
        return None


def _records(directory: UPath) -> dict[int, UPath]:
    """The files of the steps that have been evaluated, by step."""
    if not (directory / "steps").exists():
        return {}
    files = (directory / "steps").iterdir()
    return {int(file.stem): file for file in files if re.fullmatch(r"\d+\.json", file.name)}

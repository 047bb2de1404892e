"""Evaluates the checkpoints of a run, while it trains or afterwards; `jetformer.evaluate` is the program."""

import functools
import json
import time
from collections.abc import Sequence

from absl import logging
from upath import UPath

from jetformer import checkpoint, config
from jetformer.evaluators import results
from jetformer.evaluators.running import Evaluations
from jetformer.experiment import Experiment
from jetformer.metrics import Metrics
from jetformer.run_files import RUN_FILE
from jetformer.runtime import Runtime
from jetformer.state import State, configured, evaluator_context, load_state, restore, saved_config


class Job:
    """Evaluates checkpoints of a run.

    Several jobs can evaluate a run at once. If two start with the same step, both evaluate it; no result is lost.

    Args:
      workdir: of the run.
      gin_files, gin_bindings: on top of the run's configuration.
      runtime: the devices and processes.
      names: of evaluators; None: all.
      trust_imports: modules that the run's configuration may import.
      verify: compare the checksums of checkpoints.

    Attributes:
      evaluations: runs the evaluators, and holds the failures.

    Raises:
      ValueError: if there is no run, or it has no such evaluator.
    """

    def __init__(
        self,
        workdir: UPath,
        gin_files: Sequence[str],
        gin_bindings: Sequence[str],
        runtime: Runtime,
        names: Sequence[str] | None = None,
        trust_imports: Sequence[str] = (),
        verify: bool = True,
    ):
        self._workdir, self._runtime, self._chosen, self._verify = workdir, runtime, names, verify
        self._overrides = gin_files, gin_bindings, trust_imports
        self._saved: tuple[str, str] | None = None  # what `_read_saved` returned
        self._loaded: tuple[tuple[str, str], State] | None = None  # the same at loading, and the state on the devices
        self._written: dict[str, Metrics] = {}  # by evaluator
        self._waiting: tuple[int, float] | None = None  # for a checkpoint after which step, and since when
        self.evaluations: Evaluations | None = None
        self.reload()

    def close(self) -> None:
        """Ends the writing."""
        self._complete_files()
        for written in self._written.values():
            written.close()

    def reload(self) -> bool:
        """Reads the run's configuration if it has changed: training may resume with other settings, or for longer.

        Returns:
          Whether it has changed.

        Raises:
          ValueError: if there is none, or it cannot be used.
        """
        saved = self._read_saved()
        if saved == self._saved:
            return False
        experiment = configured(saved[0], *self._overrides)
        self._check(experiment)
        # From run.json: a length in epochs takes the dataset to know, which this machine may lack.
        facts = json.loads(saved[1])
        self._last_step = facts.get("stopped_at") or facts.get("total_steps") or experiment.steps()
        self._saved, self._experiment = saved, experiment
        self._names = tuple(self._chosen or experiment.evaluators)
        self.evaluations = Evaluations(
            self._runtime,
            self._workdir,
            experiment.evaluators,
            experiment.keep_best,
            experiment.best_mode(),
            () if self.evaluations is None else self.evaluations.failures,
        )
        if experiment.keep_best is not None and not any(map(self.evaluations.decides, self._names)):
            logging.info("No evaluator of this job returns train.keep_best = %r", experiment.keep_best)
        self._complete_files()
        return True

    def follow(
        self, poll_seconds: float, every: int = 1, newest: bool = False, timeout_seconds: float | None = None
    ) -> None:
        """Evaluates checkpoints as they appear, up to that of the run's last step.

        Args:
          poll_seconds: period of looking for checkpoints.
          every: evaluate only checkpoints at multiples of `every` times the run's `checkpoint_steps`, and the last; 1:
            all.
          newest: of several that wait, evaluate the newest only.
          timeout_seconds: how long to wait for a checkpoint; None: forever.

        Raises:
          ValueError: if none appeared for that long, or the run resumes with a configuration that cannot be used.
        """
        self._warn_of_other_settings()
        waiting: list[int] = []
        while True:
            if self.reload():
                self._warn_of_other_settings()
                self._waiting = None
            steps = self._runtime.broadcast(checkpoint.steps(self._workdir))
            self.evaluations.retry_except(steps)  # a damaged checkpoint that was deleted may be saved again
            period = None if every == 1 else every * self._experiment.checkpoint_steps
            before, waiting = waiting, due(steps, self._last_step, period, newest)
            missing = self._runtime.broadcast(self._missing(*waiting, *before))
            for step in sorted(set(before) - set(steps)):
                if missing[step]:
                    logging.warning("The checkpoint of step %d was deleted before it was evaluated", step)
            todo = next((step for step in waiting if missing[step]), None)
            if todo is not None:
                if not self.evaluate(todo, again=False):
                    waiting.remove(todo)  # that it was deleted is logged
                self._waiting = None
            elif steps and steps[-1] >= self._last_step:
                return
            else:
                self._wait(max(steps, default=0), poll_seconds, timeout_seconds)

    def once(self, step: int | str | None = None) -> None:
        """Evaluates one checkpoint, even if it has been evaluated.

        Args:
          step: of the checkpoint, or "best", see `train.keep_best`; None: the newest.

        Raises:
          ValueError: if there is no such checkpoint, or it cannot be read.
        """
        while not self.evaluate(self._runtime.on_first(lambda: checkpoint.find(self._workdir, step))):
            pass  # it was deleted meanwhile: another one is the newest

    def evaluate(self, step: int, again: bool = True) -> bool:
        """Runs evaluators on the checkpoint of a step, one after the other.

        Args:
          step: of the checkpoint.
          again: also those that have evaluated it.

        Returns:
          False if the checkpoint was deleted while it was read.

        Raises:
          ValueError: with `again`, if the checkpoint cannot be read.
        """
        try:
            state = self._load(step)
        except (ValueError, OSError) as error:
            if not self._runtime.broadcast(step in checkpoint.steps(self._workdir)):
                logging.warning("The checkpoint of step %d was deleted while it was read (%s)", step, error)
                return False
            if again:
                raise
            self.evaluations.fail(f"the checkpoint of step {step}", error, [(name, step) for name in self._names])
            return True
        for name in self._names:
            if again or self._runtime.broadcast(name in self._missing(step)[step]):
                self._run(name, step, state, again)
        return True

    def _run(self, name: str, step: int, state: State, again: bool) -> None:
        """Runs one evaluator; arguments as in `evaluate`."""
        evaluator = self._experiment.evaluators[name]
        replaced = again and results.other_settings(self._workdir, name, evaluator, only=step)
        since = time.perf_counter()
        context = evaluator_context(self._experiment, state, step, name, self._workdir)
        counts = lambda: not self._is_repeated(step)
        if not self.evaluations.evaluate(name, context, functools.partial(self._writer, name), counts):
            return
        logging.info("Step %d: %s took %.1f s", step, name, time.perf_counter() - since)  # CLU logs the metrics
        if replaced:
            logging.warning(
                "%s: replaced the results of step %d, which had other settings: give the evaluator another name to "
                "keep both",
                *(name, step),
            )
        is_best = self.evaluations.decides(name) and checkpoint.ranked(self._workdir)[:1] == [step]
        if is_best and step not in checkpoint.steps(self._workdir):
            logging.warning(
                "Step %d is the best so far, but its checkpoint was deleted meanwhile: raise train.keep_last", step
            )

    def _load(self, step: int) -> State:
        """Returns the state at a step. It is built again only if the configuration has changed."""

        def load() -> tuple[float, State]:
            age = checkpoint.age(self._workdir, step)
            if self._loaded is None or self._loaded[0] != self._saved:
                self._loaded = None  # frees its memory first
                _, state, _ = load_state(self._experiment, self._workdir, self._runtime, step, self._verify)
                self._loaded = self._saved, state
            else:
                restore(self._workdir, self._loaded[1], step, self._verify)
            return age, self._loaded[1]

        since = time.perf_counter()
        # Each process reads its part. Training may delete a checkpoint that one of them has read and another has not.
        age, state = self._runtime.together(load)
        logging.info("Step %d: complete for %.1f s when found, read in %.1f s", step, age, time.perf_counter() - since)
        return state

    def _check(self, experiment: Experiment) -> None:
        if not experiment.evaluators:
            raise ValueError(
                f"{self._workdir} has no evaluators: bind some, as --gin_bindings='train.evaluators = "
                '{"val": @Likelihood()}\''
            )
        for name in self._chosen or ():
            if name not in experiment.evaluators:
                known = ", ".join(experiment.evaluators)
                raise ValueError(f"there is no evaluator {name!r}; train.evaluators has {known}")
        experiment.check_eval_batch_size(self._runtime)

    def _read_saved(self) -> tuple[str, str]:
        """Returns the texts of the run's configuration and of run.json, as process 0 reads them.

        Raises:
          ValueError: if there is no run.
        """

        def read() -> tuple[str, str]:
            facts = self._workdir / RUN_FILE
            return saved_config(self._workdir), facts.read_text() if facts.exists() else "{}"

        return self._runtime.on_first(read)

    def _missing(self, *steps: int) -> dict[int, list[str]]:
        """Returns the evaluators that still have to run, by step."""
        done = {name: results.evaluated_steps(self._workdir, name) for name in self._names}
        given_up = self.evaluations.given_up
        return {
            step: [name for name in self._names if step not in done[name] and not given_up(name, step)]
            for step in steps
        }

    def _is_repeated(self, step: int) -> bool:
        """Returns whether the run has gone back to before a step since its checkpoint was read, and repeats it."""
        before, now = (json.loads(saved[1]).get("start_steps", []) for saved in (self._loaded[0], self._read_saved()))
        repeated = now[: len(before)] != before or min(now[len(before) :], default=step) < step
        if repeated:
            logging.warning("The run repeats step %d: its results do not count", step)
        return repeated

    def _wait(self, newest_step: int, poll_seconds: float, timeout_seconds: float | None) -> None:
        if self._waiting is None or self._waiting[0] != newest_step:
            self._waiting = newest_step, time.monotonic()
            logging.info("Waiting for a checkpoint after step %d of %d", newest_step, self._last_step)
        # Process 0's time, so that all stop together.
        waited = self._runtime.broadcast(time.monotonic() - self._waiting[1])
        if timeout_seconds is not None and waited > timeout_seconds:
            raise ValueError(
                f"no checkpoint after step {newest_step} of {self._last_step} for {waited:.0f} s: start the run again, "
                "or wait longer with --timeout_seconds"
            )
        time.sleep(poll_seconds)

    def _warn_of_other_settings(self) -> None:
        for name in self._names:
            if steps := results.other_settings(self._workdir, name, self._experiment.evaluators[name]):
                logging.warning(
                    "%s: %d step(s) were evaluated with other settings and are left as they are: delete %s to evaluate "
                    "them again, or give the evaluator another name",
                    *(name, len(steps), results.directory_of(self._workdir, name)),
                )

    def _complete_files(self) -> None:
        """Writes what a killed job, or another job, may have left out of results.jsonl and best.json."""
        if self._runtime.process_index == 0:
            for name in self._names:
                results.build(self._workdir, name)
                if self.evaluations.decides(name):
                    self.evaluations.write_best()

    def _writer(self, name: str) -> Metrics:
        """Returns the writer of an evaluator."""
        if name not in self._written:
            directory = results.directory_of(self._workdir, name)
            directory.mkdir(parents=True, exist_ok=True)
            project = self._experiment.wandb_project
            process = self._runtime.process_index
            self._written[name] = Metrics(directory, process, project, training_workdir=self._workdir)
        return self._written[name]


def due(steps: Sequence[int], last_step: int, period: int | None, newest: bool) -> list[int]:
    """Returns the checkpoints to evaluate, the oldest first.

    Args:
      steps: of the complete checkpoints, in ascending order.
      last_step: of the run.
      period: only multiples of it, and the last step; None: all.
      newest: of these, only the newest.
    """
    chosen = [step for step in steps if period is None or step % period == 0 or step >= last_step]
    return chosen[-1:] if newest else chosen


def wait_for_run(workdir: UPath, wait_seconds: float, poll_seconds: float) -> None:
    """Waits until a run that was started at the same time has written its configuration."""
    until = time.monotonic() + wait_seconds
    if not (workdir / config.CONFIG_FILE).exists():
        logging.info("Waiting up to %.0f s for a run in %s", wait_seconds, workdir)
    while not (workdir / config.CONFIG_FILE).exists() and time.monotonic() < until:
        time.sleep(poll_seconds)

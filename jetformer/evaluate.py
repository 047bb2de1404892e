"""Evaluate a run's checkpoints as they come, as a job of its own.

    python -m jetformer.evaluate --workdir=/tmp/digits

Reads the configuration that the run has saved, with --gin_file and --gin_bindings on top, waits for its checkpoints,
and runs the evaluators of `train.evaluators` on each that is complete, the oldest first, until that of the last step is
done. What they find is in `<workdir>/eval_<name>/` (see `evaluators/base.py`), and which checkpoint is the best by
`train.keep_best` in `<workdir>/best.json` (see `evaluators/best.py`). Training is not held up by it, and may delete a
checkpoint at any time, but for the best of those that were evaluated; started again, it does what has not been done. So
does another such job beside it, and nothing gets lost; both may begin with the same step, so give them different
--evaluators. What fails is said in one line, and the rest goes on; the exit code is 1 then. (A configuration that
cannot be used ends the job. In several processes so does an evaluator that fails in one of them while the others go
on.)
"""

import contextlib
import functools
import json
import time
from collections.abc import Sequence
from typing import Any

from absl import app, flags, logging
from upath import UPath

from jetformer import program, runtime

flags.adopt_module_key_flags(program)
flags.DEFINE_string("workdir", None, "The run's.", required=True)
flags.DEFINE_list("evaluators", None, "Which of train.evaluators to run; default: all.")
flags.DEFINE(
    program.StepParser(), "step", None, "Evaluate the checkpoint of this step, or best, even if it has been, and end."
)
flags.DEFINE_bool("once", False, "Evaluate the newest checkpoint there is, even if that has been done, and end.")
flags.DEFINE_integer(
    "every",
    1,
    "Evaluate every n-th checkpoint, that is those at multiples of n times train.checkpoint_steps, and the last; 1: "
    "all, also those saved out of turn, as on SIGTERM.",
    lower_bound=1,
)
flags.DEFINE_bool("newest", False, "Of several checkpoints that wait, evaluate the newest only.")
flags.DEFINE_float("wait_seconds", 60.0, "How long to wait for a run that has not begun.", lower_bound=0.0)
flags.DEFINE_float("poll_seconds", 1.0, "How often to look for a new checkpoint.", lower_bound=0.0)
flags.DEFINE_float(
    "timeout_seconds",
    None,
    "End with an error if no checkpoint comes for so long, as of a run that has failed; default: wait.",
    lower_bound=0.0,
)
FLAGS = flags.FLAGS


class Job:
    """Evaluates checkpoints of a run.

    Args:
      workdir: the run's.
      gin_files, gin_bindings: on top of the run's configuration.
      machine: where to evaluate.
      names: which evaluators; None: all.
      trust_imports: modules that the run's configuration may import.
      verify: compare the checksums of checkpoints.

    Attributes:
      evaluations: what runs the evaluators, and knows which have failed.

    Raises:
      ValueError: if there is no run, or it has no such evaluator.
    """

    def __init__(
        self,
        workdir: UPath,
        gin_files: Sequence[str],
        gin_bindings: Sequence[str],
        machine: runtime.Runtime,
        names: Sequence[str] | None = None,
        trust_imports: Sequence[str] = (),
        verify: bool = True,
    ):
        from jetformer.evaluators.running import Evaluations

        self.evaluations = Evaluations(machine)
        self._workdir, self._overrides, self._machine = workdir, (gin_files, gin_bindings), machine
        self._chosen, self._trust_imports, self._verify = names, trust_imports, verify
        self._saved: tuple[str, str] | None = None  # what the run has written of itself, and what it says
        self._run, self._last_step = None, 0
        self._loaded = None  # what the run has written of itself, and the run and its state on the devices
        self._written: dict[str, Any] = {}  # the writers, by evaluator
        self._read_config()

    def close(self) -> None:
        """Ends the writing."""
        self._write_results()
        for written in self._written.values():
            written.close()

    def _write_results(self) -> None:
        """What a job that was killed, or one beside this one, may have left out."""
        from jetformer.evaluators import base, best

        metric = self._run.keep_best
        if self._machine.process_index == 0:
            for name in self._names:
                base.write_results(self._workdir, name)
            if metric is not None and best.evaluator_of(metric) in self._names:
                best.record(self._workdir, metric, self._run.best_mode())

    def _read_saved(self) -> tuple[str, str]:
        """What the run has saved of itself: its configuration, and the facts in run.json. All processes have what the
        first one reads.

        Raises:
          ValueError: if there is no run.
        """
        from jetformer.run_files import RUN_FILE
        from jetformer.state import saved_config

        saved = None

        def read() -> None:
            nonlocal saved
            facts = self._workdir / RUN_FILE
            saved = saved_config(self._workdir), facts.read_text() if facts.exists() else "{}"

        self._machine.first_does(read)
        return self._machine.of_first(saved)

    def _read_config(self) -> bool:
        """Reads the run's configuration, if it is another one than before: training may begin again with other
        settings, or for longer.

        Returns:
          Whether it is another one.

        Raises:
          ValueError: if there is none, or it cannot be used.
        """
        from jetformer.evaluators import best
        from jetformer.state import configured

        saved = self._read_saved()
        if saved == self._saved:
            return False
        run = configured(saved[0], *self._overrides, self._trust_imports)
        if not run.evaluators:
            raise ValueError(
                f"{self._workdir} has no evaluators: bind some, as --gin_bindings='train.evaluators = "
                '{"val": @Likelihood()}\''
            )
        for name in self._chosen or ():
            if name not in run.evaluators:
                raise ValueError(f"there is no evaluator {name!r}; train.evaluators has {', '.join(run.evaluators)}")
        run.check_eval_batch_size(self._machine)
        # From run.json: a length in epochs takes the dataset to know, which this machine may lack.
        facts = json.loads(saved[1])
        self._last_step = facts.get("stopped_at") or facts.get("total_steps") or run.steps()
        self._saved, self._run, self._names = saved, run, tuple(self._chosen or run.evaluators)
        if run.keep_best is not None and best.evaluator_of(run.keep_best) not in self._names:
            logging.info("No evaluator of this job gives train.keep_best = %r", run.keep_best)
        self.evaluations.begin_anew()
        self._write_results()
        return True

    def _warn_of_other_settings(self) -> None:
        from jetformer.evaluators import base

        for name in self._names:
            if steps := base.other_settings(self._workdir, name, self._run.evaluators[name]):
                logging.warning(
                    "%s: %d step(s) were evaluated with other settings and stay as they are: delete %s to evaluate "
                    "them again, or give the evaluator another name",
                    *(name, len(steps), base.directory_of(self._workdir, name)),
                )

    def follow(
        self, poll_seconds: float, every: int = 1, newest: bool = False, timeout_seconds: float | None = None
    ) -> None:
        """Evaluates checkpoints as they come, until that of the run's last step.

        Args:
          poll_seconds: how long to wait between two looks.
          every: evaluate the checkpoints at multiples of so many times the run's `checkpoint_steps`, and the last; 1:
            every one.
          newest: of several that wait, evaluate the newest only.
          timeout_seconds: how long to wait for a checkpoint; None: for as long as it takes.

        Raises:
          ValueError: if none came for so long, or the run begins again with a configuration that cannot be used.
        """
        from jetformer import checkpoint, metrics  # noqa: F401 (takes seconds, for which no checkpoint shall wait)

        self._warn_of_other_settings()
        waiting: list[int] = []
        waiting_for, since = None, 0.0
        while True:
            if self._read_config():
                self._warn_of_other_settings()
                waiting_for = None  # somebody works on it
            period = None if every == 1 else every * self._run.checkpoint_steps
            steps = self._machine.of_first(checkpoint.steps(self._workdir))
            self.evaluations.try_again_but(steps)  # one that was damaged, and is deleted, may come again
            before, waiting = waiting, due(steps, self._last_step, period, newest)
            missing = self._machine.of_first(self._missing(*waiting, *before))
            for step in sorted(set(before) - set(steps)):
                if missing[step]:
                    logging.warning("The checkpoint of step %d was deleted before it was evaluated", step)
            todo = [step for step in waiting if missing[step]]
            if todo:
                if not self.evaluate(todo[0], missing[todo[0]], again=False):
                    waiting.remove(todo[0])  # which has been said
                waiting_for = None
            elif steps and steps[-1] >= self._last_step:
                return
            else:
                newest_step = max(steps, default=0)
                if waiting_for != newest_step:
                    waiting_for, since = newest_step, time.monotonic()
                    logging.info("Waiting for a checkpoint after step %d of %d", newest_step, self._last_step)
                # All processes leave together.
                waited = self._machine.of_first(time.monotonic() - since)
                if timeout_seconds is not None and waited > timeout_seconds:
                    raise ValueError(
                        f"no checkpoint after step {newest_step} of {self._last_step} has come for {waited:.0f} s: "
                        "start the run again, or wait for longer with --timeout_seconds"
                    )
                time.sleep(poll_seconds)

    def _missing(self, *steps: int) -> dict[int, list[str]]:
        """The evaluators that are still to be run on checkpoints, by step."""
        from jetformer.evaluators.base import evaluated_steps

        done = {name: evaluated_steps(self._workdir, name) for name in self._names}
        given_up = self.evaluations.given_up
        return {
            step: [name for name in self._names if step not in done[name] and not given_up(name, step)]
            for step in steps
        }

    def evaluate(self, step: int, names: Sequence[str] | None = None, again: bool = True) -> bool:
        """Runs evaluators on the checkpoint of a step, one after the other.

        Args:
          step: the step.
          names: which evaluators; None: all of the job's.
          again: also those that have been run on it.

        Returns:
          False if the checkpoint was deleted while it was read.

        Raises:
          ValueError: with `again`, if the checkpoint cannot be read.
        """
        from jetformer import checkpoint
        from jetformer.evaluators import base
        from jetformer.state import evaluator_context

        since = time.perf_counter()
        try:
            # Each process reads for itself. Training may delete a checkpoint that one of them has still read.
            age, (run, state) = self._machine.together(lambda: (checkpoint.age(self._workdir, step), self._load(step)))
        except (ValueError, OSError) as error:
            if not self._machine.of_first(step in checkpoint.steps(self._workdir)):
                logging.warning("The checkpoint of step %d was deleted while it was read (%s)", step, error)
                return False
            if again:
                raise
            self.evaluations.fail(f"the checkpoint of step {step}", error, [(name, step) for name in self._names])
            return True
        read_seconds = time.perf_counter() - since
        logging.info("Step %d: complete for %.1f s when found, read in %.1f s", step, age, read_seconds)
        for name in names or self._names:
            if not again and not self._machine.of_first(name in self._missing(step)[step]):
                continue  # another job has done it meanwhile
            others = again and base.other_settings(self._workdir, name, run.evaluators[name], only=step)
            since = time.perf_counter()
            done = self.evaluations.evaluate(
                name,
                evaluator_context(run, state, step, name, self._workdir),
                functools.partial(self._written_to, name),
                counts=lambda: not self._taken_anew(step),
            )
            if not done:
                continue
            logging.info("Step %d: %s took %.1f s", step, name, time.perf_counter() - since)  # CLU logs the figures
            if others:
                logging.warning(
                    "%s: the figures of step %d, which were of other settings, have been replaced: give the evaluator "
                    "another name to keep both",
                    *(name, step),
                )
        if checkpoint.ranked(self._workdir)[:1] == [step] and step not in checkpoint.steps(self._workdir):
            logging.warning(
                "Step %d is the best so far, but its checkpoint was deleted meanwhile: raise train.keep_last", step
            )
        return True

    def _written_to(self, name: str):
        """The writer of an evaluator."""
        from jetformer import metrics
        from jetformer.evaluators import base

        if name not in self._written:
            directory = base.directory_of(self._workdir, name)
            directory.mkdir(parents=True, exist_ok=True)
            self._written[name] = metrics.Metrics(
                directory, self._machine.process_index, self._run.wandb_project, training_workdir=self._workdir
            )
        return self._written[name]

    def _taken_anew(self, step: int) -> bool:
        """Whether the run has gone back behind a step since its checkpoint was read."""
        starts, now = (json.loads(saved[1]).get("start_steps", []) for saved in (self._loaded[0], self._read_saved()))
        anew = now[: len(starts)] != starts or min(now[len(starts) :], default=step) < step
        if anew:
            logging.warning("Step %d is taken anew by the run: its figures do not count", step)
        return anew

    def _load(self, step: int):
        """The run and its state at a step, built anew only where its configuration has changed."""
        from jetformer.state import load_state, restore

        if self._loaded is None or self._loaded[0] != self._saved:
            self._loaded = None  # its memory goes first
            run, state, _ = load_state(self._run, self._workdir, self._machine, step, self._verify)
            self._loaded = self._saved, run, state
        else:
            restore(self._workdir, self._loaded[2], step, self._verify)
        return self._loaded[1:]


def due(steps: Sequence[int], last_step: int, period: int | None, newest: bool) -> list[int]:
    """Which checkpoints to evaluate, the oldest first.

    Args:
      steps: of those that are complete, in order.
      last_step: of the run.
      period: those whose step it divides, and that of the last step; None: all.
      newest: the newest of these only.
    """
    chosen = [step for step in steps if period is None or step % period == 0 or step >= last_step]
    return chosen[-1:] if newest else chosen


def wait_for_run(workdir: UPath, wait_seconds: float, poll_seconds: float) -> None:
    """Waits until a run that was started at the same time as this has written its configuration."""
    from jetformer import config

    until = time.monotonic() + wait_seconds
    if not (workdir / config.CONFIG_FILE).exists():
        logging.info("Waiting up to %.0f s for a run in %s", wait_seconds, workdir)
    while not (workdir / config.CONFIG_FILE).exists() and time.monotonic() < until:
        time.sleep(poll_seconds)


def main(argv: list[str]) -> None:
    program.no_arguments(argv)
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.INFO)
    with program.one_line_errors():
        machine = runtime.initialize(FLAGS.device)
        if machine.process_index > 0 and not FLAGS["verbosity"].present:  # of several processes one says how it goes
            logging.set_verbosity(logging.ERROR)
        from jetformer import checkpoint

        if FLAGS.once and FLAGS.step is not None:
            raise ValueError("give --once or --step, not both")
        following = [name for name in ("every", "newest", "timeout_seconds") if FLAGS[name].present]
        if following and (FLAGS.once or FLAGS.step is not None):
            raise ValueError(f"--{following[0]} is of a job that follows a run: leave it out with --once and --step")
        if FLAGS.evaluators == []:
            raise ValueError("--evaluators names none: give names of train.evaluators, or leave it out for all")
        workdir, once = UPath(FLAGS.workdir), FLAGS.once or FLAGS.step is not None
        if not once:
            wait_for_run(workdir, FLAGS.wait_seconds, FLAGS.poll_seconds)
        job = Job(
            *(workdir, FLAGS.gin_file, FLAGS.gin_bindings, machine, FLAGS.evaluators),
            *(FLAGS.trust_imports, FLAGS.verify),
        )
        with contextlib.closing(job):
            if not once:
                job.follow(FLAGS.poll_seconds, FLAGS.every, FLAGS.newest, FLAGS.timeout_seconds)
            while once:
                steps = machine.of_first(checkpoint.steps(workdir))
                step = max(steps, default=None) if FLAGS.step is None else FLAGS.step
                if step == "best":
                    step = machine.of_first(checkpoint.best(workdir))
                if step not in steps:
                    there = f", but of {', '.join(map(str, steps))} (see train.keep_last)" if steps else ""
                    which = "" if FLAGS.step is None else f" of step {step}{there}"
                    raise ValueError(f"{workdir} has no complete checkpoint{which}")
                once = not job.evaluate(step)
        if job.evaluations.failures:
            machine.of_all(None)  # have written all: where one process ends with an error, torchrun stops the others
            raise ValueError(job.evaluations.summary())


if __name__ == "__main__":
    app.run(main)

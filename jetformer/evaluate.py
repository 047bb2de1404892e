"""Evaluate a run's checkpoints as they come, as a job of its own.

    python -m jetformer.evaluate --workdir=/tmp/digits

Reads the configuration that the run has saved, with --gin_file and --gin_bindings on top, waits for its checkpoints,
and runs the evaluators of `train.evaluators` on each that is complete, the oldest first, until that of the last step is
done. What they find is in `<workdir>/eval_<name>/` (see `evaluators/base.py`). Training is not held up by it, and may
delete a checkpoint at any time; started again, or beside another such job, it does what has not been done. What fails
is said in one line, and the rest goes on; the exit code is 1 then.
"""

import contextlib
import time
from collections.abc import Sequence
from typing import Any

from absl import app, flags, logging
from upath import UPath

from jetformer import program, runtime

flags.adopt_module_key_flags(program)
flags.DEFINE_string("workdir", None, "The run's.", required=True)
flags.DEFINE_list("evaluators", None, "Which of train.evaluators to run; default: all.")
flags.DEFINE_integer("step", None, "Evaluate the checkpoint of this step, even if that has been done, and end.")
flags.DEFINE_bool("once", False, "Evaluate the newest checkpoint there is, even if that has been done, and end.")
flags.DEFINE_integer("every", 1, "Evaluate every so-manieth checkpoint, and the last.", lower_bound=1)
flags.DEFINE_bool("newest", False, "Of several checkpoints that wait, evaluate the newest only.")
flags.DEFINE_float("poll_seconds", 1.0, "How often to look for a new checkpoint.", lower_bound=0.0)
FLAGS = flags.FLAGS


class Job:
    """Evaluates checkpoints of a run.

    Args:
      workdir: the run's.
      gin_files, gin_bindings: on top of the run's configuration.
      machine: where to evaluate.
      names: which evaluators; None: all.

    Attributes:
      failures: one line for each evaluation that failed.

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
    ):
        self.failures: list[str] = []
        self._workdir, self._overrides, self._machine = workdir, (gin_files, gin_bindings), machine
        self._chosen = names
        self._config: str | None = None  # what the run has saved, and what it says
        self._run = None
        self._read_config()
        self._loaded = None  # the configuration, and the run and its state on the devices
        self._checked: set[str] = set()
        self._given_up: set[tuple[str, int | None]] = set()
        self._written: dict[str, Any] = {}  # the writers, by evaluator

    def close(self) -> None:
        """Ends the writing."""
        for written in self._written.values():
            written.close()

    def _read_config(self) -> None:
        from jetformer import train

        saved = train.saved_config(self._workdir)
        if saved == self._config:
            return
        self._run = train.configured(self._workdir, *self._overrides)
        self._config = saved  # training may begin again with another one
        evaluators = self._run.evaluators
        if not evaluators:
            raise ValueError(
                f"{self._workdir} has no evaluators: bind some, as --gin_bindings='train.evaluators = "
                '{"val": @Likelihood()}\''
            )
        for name in self._chosen or ():
            if name not in evaluators:
                raise ValueError(f"there is no evaluator {name!r}; train.evaluators has {', '.join(evaluators)}")
        self._names = tuple(self._chosen or evaluators)

    def follow(self, poll_seconds: float, every: int = 1, newest: bool = False) -> None:
        """Evaluates checkpoints as they come, until that of the run's last step.

        Args:
          poll_seconds: how long to wait between two looks.
          every: evaluate every so-manieth checkpoint, and the last.
          newest: of several that wait, evaluate the newest only.
        """
        while True:
            steps, last_step, period = self._machine.of_first(self._look())
            waiting = [step for step in steps if step >= last_step or step // period % every == 0]
            if newest:
                waiting = waiting[-1:]
            todo = [step for step in waiting if self._machine.of_first(self._missing(step))]
            if todo:
                self.evaluate(todo[0], self._machine.of_first(self._missing(todo[0])))
            elif steps and steps[-1] >= last_step:
                return
            else:
                time.sleep(poll_seconds)

    def _look(self) -> tuple[list[int], int, int]:
        """The steps of complete checkpoints, the run's last step, and after how many steps it saves one."""
        from jetformer import checkpoint

        self._read_config()
        return checkpoint.steps(self._workdir), self._run.steps(), self._run.checkpoint_steps

    def _missing(self, step: int) -> list[str]:
        """The evaluators that are still to be run on a checkpoint."""
        from jetformer.evaluators.base import evaluated_steps

        return [
            name
            for name in self._names
            if not {(name, step), (name, None)} & self._given_up and step not in evaluated_steps(self._workdir, name)
        ]

    def evaluate(self, step: int, names: Sequence[str] | None = None) -> None:
        """Runs evaluators (None: all of the job's) on the checkpoint of a step, one after the other."""
        from jetformer import checkpoint, metrics, train

        since, wrong = time.perf_counter(), None
        try:
            run, state = self._load(step)
        except (ValueError, OSError) as error:
            wrong = error
        # Each process reads for itself. Training may delete a checkpoint that one of them has still read.
        if found := next((error for error in self._machine.of_all(wrong) if error is not None), None):
            if self._machine.of_first(step in checkpoint.steps(self._workdir)):
                raise found
            logging.warning("The checkpoint of step %d was deleted while it was read: on to the next (%s)", step, found)
            return
        logging.info("Step %d: read in %.1f s", step, time.perf_counter() - since)
        for name in names or self._names:
            try:
                self._check(name, run, state, step)
                if name not in self._written:
                    directory = train.directory_of(self._workdir, name)
                    directory.mkdir(parents=True, exist_ok=True)
                    self._written[name] = metrics.Metrics(
                        directory, self._machine.process_index, run.wandb_project, training_workdir=self._workdir
                    )
                written = self._written[name]
                scalars = train.evaluate(run, state, step, name, self._workdir, self._machine, written.writer)
                written.publish()
            except (ValueError, OSError, ImportError) as error:
                if name in self._checked and self._machine.process_count > 1:
                    raise  # the other processes may be anywhere
                # What a check finds wrong is wrong at the next step, too, and may take minutes to find.
                self._given_up.add((name, step if name in self._checked else None))
                self.failures.append(f"{name} at step {step}: {' '.join(str(error).split())}")
                logging.error("%s", self.failures[-1])
                continue
            logging.info("Step %d: %s", step, ", ".join(f"{tag} {value:.4f}" for tag, value in scalars.items()))

    def _check(self, name: str, run, state, step: int) -> None:
        """Has an evaluator look whether it can evaluate, once; what any process finds wrong is raised on all."""
        from jetformer import train

        if name in self._checked:
            return
        wrong = None
        try:
            run.evaluators[name].check(train.context(run, state, step, name, self._workdir, self._machine))
        except (ValueError, OSError, ImportError) as error:
            wrong = error
        for error in self._machine.of_all(wrong):
            if error is not None:
                raise error
        self._checked.add(name)

    def _load(self, step: int):
        """The run and its state at a step, built anew only where its configuration has changed."""
        from jetformer import train

        self._read_config()
        if self._loaded is None or self._loaded[0] != self._config:
            self._loaded = None  # its memory goes first
            run, state, _ = train.load(self._workdir, *self._overrides, self._machine, step)
            run.check_eval_batch_size(self._machine)
            self._checked.clear()
            self._loaded = self._config, run, state
        else:
            train.restore(self._workdir, self._loaded[2], self._machine, step)
        return self._loaded[1:]


def main(argv: list[str]) -> None:
    program.no_arguments(argv)
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.INFO)
    with program.one_line_errors():
        machine = runtime.initialize(FLAGS.device)
        if machine.process_index > 0 and not FLAGS["verbosity"].present:  # of several processes one says how it goes
            logging.set_verbosity(logging.WARNING)
        from jetformer import checkpoint

        if FLAGS.once and FLAGS.step is not None:
            raise ValueError("give --once or --step, not both")
        workdir = UPath(FLAGS.workdir)
        with contextlib.closing(Job(workdir, FLAGS.gin_file, FLAGS.gin_bindings, machine, FLAGS.evaluators)) as job:
            if FLAGS.once or FLAGS.step is not None:
                step = FLAGS.step if FLAGS.step is not None else machine.of_first(checkpoint.latest(workdir))
                if step is None or step not in checkpoint.steps(workdir):
                    which = "" if FLAGS.step is None else f" of step {step}"
                    raise ValueError(f"{workdir} has no complete checkpoint{which}")
                job.evaluate(step)
            else:
                job.follow(FLAGS.poll_seconds, FLAGS.every, FLAGS.newest)
        if job.failures:
            raise ValueError(f"{len(job.failures)} evaluation(s) failed: {'; '.join(job.failures)}")


if __name__ == "__main__":
    app.run(main)

"""Runs evaluators, in training and in evaluation jobs. If one fails, the others still run."""

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from absl import logging
from upath import UPath

from jetformer.errors import one_line
from jetformer.evaluators import best, results
from jetformer.evaluators.base import Evaluator
from jetformer.evaluators.context import Context
from jetformer.runtime import Runtime, are_apart

if TYPE_CHECKING:
    from jetformer.metrics import Metrics  # brings TensorFlow, which sampling does without

# Number of failures that `summary` names; each is logged when it happens.
_NAMED = 5


class Evaluations:
    """Runs evaluators. A failure is logged in one line and remembered, on all processes alike, and others still run.

    Args:
      runtime: the devices and processes.
      workdir: of the run.
      evaluators: by name.
      keep_best, best_mode: metric that best.json ranks steps by, see `train.keep_best`, and which of its values are
        better, "lower" or "higher"; None for none.
      failures: of an earlier configuration of the run; new ones are added.

    Attributes:
      failures: a line for each evaluation that failed, "<name> at step <step>: <reason>".
    """

    def __init__(
        self,
        runtime: Runtime,
        workdir: UPath,
        evaluators: Mapping[str, Evaluator],
        keep_best: str | None,
        best_mode: str | None,
        failures: tuple[str, ...] = (),
    ):
        self.failures = list(failures)
        self._runtime, self._workdir, self._evaluators = runtime, workdir, evaluators
        self._keep_best, self._best_mode = keep_best, best_mode
        self._checked: set[str] = set()
        self._given_up: set[tuple[str, int | None]] = set()  # evaluators by step; None: at every step

    def given_up(self, name: str, step: int) -> bool:
        """Returns whether an evaluator is not tried again at a step: it failed there, or its check failed for a reason
        that holds at any step."""
        return not self._given_up.isdisjoint({(name, step), (name, None)})

    def retry_except(self, steps: list[int]) -> None:
        """Forgets failures at all steps but these."""
        self._given_up = {(name, step) for name, step in self._given_up if step is None or step in steps}

    def check(self, name: str, context: Context) -> None:
        """Calls an evaluator's check, once.

        Raises:
          Exception: on all processes, what it raises on any.
        """
        if name not in self._checked:
            self._runtime.together(lambda: self._evaluators[name].check(context))
            self._checked.add(name)

    def try_check(self, name: str, context: Context) -> bool:
        """Calls `check`, but logs an error instead of raising it; returns whether there was none."""
        try:
            self.check(name, context)
        except Exception as error:  # as in `evaluate`
            if are_apart(error):
                raise
            # A check that fails would fail at the next step, too, perhaps after minutes. A disk may recover.
            permanent = isinstance(error, ValueError | ImportError)
            self.fail(f"{name} at step {context.step}", error, [(name, None if permanent else context.step)])
            return False
        return True

    def evaluate(
        self,
        name: str,
        context: Context,
        written: Callable[[], "Metrics"],
        counts: Callable[[], bool] = lambda: True,
    ) -> bool:
        """Runs an evaluator, after its check, and writes its results.

        Args:
          name: of the evaluator.
          context: what it is given.
          written: returns the writer of its metrics and pictures.
          counts: returns whether the results count; called before they are written and again afterwards.

        Returns:
          Whether it succeeded.

        Raises:
          ValueError: if it does not return the metric `keep_best`.
          OutOfStep: if it failed on some processes only, and the others wait for these.
        """
        if not self.try_check(name, context):
            return False
        evaluator, step = self._evaluators[name], context.step
        since = time.perf_counter()
        try:
            found = self._runtime.together(lambda: evaluator(context))
            seconds = time.perf_counter() - since
            if counts():
                arguments = found, name, step, seconds, evaluator, self._workdir
                self._runtime.together(lambda: results.write(*arguments, written(), self._runtime))
                if not counts():  # a run that resumed meanwhile may have looked for stale results before they came
                    self._runtime.on_first(lambda: results.delete(self._workdir, name, lambda other: other == step))
        except Exception as error:  # whatever it is: the others can still run, and the exit code tells
            if are_apart(error):
                raise
            self.fail(f"{name} at step {step}", error, [(name, step)])
            return False
        if self.decides(name):
            if self._keep_best not in (tags := found.tagged(name)):
                raise ValueError(
                    f"train.keep_best = {self._keep_best!r} is not a metric of {name}, which has {', '.join(tags)}"
                )
            self._runtime.on_first(self.write_best)
        return True

    def decides(self, name: str) -> bool:
        """Returns whether an evaluator is the one that `keep_best` is a metric of."""
        return self._keep_best is not None and best.evaluator_of(self._keep_best) == name

    def write_best(self) -> None:
        """Writes best.json."""
        best.write(self._workdir, self._keep_best, self._best_mode)

    def fail(self, what: str, error: Exception, given_up: list[tuple[str, int | None]]) -> None:
        """Logs and remembers a failure.

        Args:
          what: has failed, as "val at step 200".
          error: why.
          given_up: evaluators that are not tried again, with the step; None: at any step.
        """
        self._given_up |= set(given_up)
        left_out = " (left out from here on)" if any(step is None for _, step in given_up) else ""
        self.failures.append(f"{what}: {one_line(error)}{left_out}")
        if self._runtime.process_index == 0:
            logging.error("%s", self.failures[-1])
        # The message explains a user's mistake or a failing disk. Other errors need a traceback.
        expected = isinstance(error, ValueError | OSError | ImportError)
        logging.log(logging.DEBUG if expected else logging.ERROR, "", exc_info=error)

    def summary(self) -> str:
        """Returns a line that names the failures, without the reasons, which were logged."""
        names = [failure.partition(":")[0] for failure in self.failures]
        rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return f"{len(names)} evaluation(s) failed, see the errors above: {', '.join(names[:_NAMED])}{rest}"

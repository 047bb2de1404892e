"""How evaluators are run, in training as in a job of their own: one that fails leaves the others."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from absl import logging

from jetformer.evaluators import base, best
from jetformer.runtime import Runtime, are_apart, one_line

if TYPE_CHECKING:
    from jetformer.metrics import Metrics

# How many failures the last line of a program names; all of them are said when they happen.
_NAMED = 5


class Evaluations:
    """Runs evaluators. What goes wrong in one is said in one line and remembered, and the next can go on: in several
    processes in all of them alike.

    Args:
      runtime: which of the processes this one is.

    Attributes:
      failures: one line for each evaluation that failed, "<what> at step <step>: <why>".
    """

    def __init__(self, runtime: Runtime):
        self.failures: list[str] = []
        self._runtime = runtime
        self._checked: set[str] = set()
        self._given_up: set[tuple[str, int | None]] = set()  # evaluators at steps; at None for good

    def given_up(self, name: str, step: int) -> bool:
        """Whether an evaluator need not be tried at a step: it has failed there, or its check has failed in a way that
        will be the same at any other."""
        return not self._given_up.isdisjoint({(name, step), (name, None)})

    def begin_anew(self) -> None:
        """Forgets which have been checked and which given up: there is another configuration."""
        self._checked.clear()
        self._given_up.clear()

    def try_again_but(self, steps: list[int]) -> None:
        """Forgets what has failed at steps that are not among these."""
        self._given_up = {(name, step) for name, step in self._given_up if step is None or step in steps}

    def check(self, name: str, context: base.Context) -> None:
        """Has an evaluator look whether it can evaluate, if it has not done so.

        Raises:
          Exception: what it finds wrong in any process, on all.
        """
        if name not in self._checked:
            self._runtime.together(lambda: context.run.evaluators[name].check(context))
            self._checked.add(name)

    def try_check(self, name: str, context: base.Context) -> bool:
        """The same, and says what is wrong instead of raising it; returns whether nothing is."""
        try:
            self.check(name, context)
        except Exception as error:  # as in `evaluate`
            if are_apart(error):
                raise
            # What a check finds wrong is wrong at the next step, too, and may take minutes to find. A disk may recover.
            for_good = isinstance(error, ValueError | ImportError)
            self.fail(f"{name} at step {context.step}", error, [(name, None if for_good else context.step)])
            return False
        return True

    def evaluate(
        self,
        name: str,
        context: base.Context,
        written: Callable[[], "Metrics"],
        counts: Callable[[], bool] = lambda: True,
    ) -> bool:
        """Runs an evaluator, after its check, and writes down what it finds.

        Args:
          name: what it is called in `train.evaluators`.
          context: what it is given.
          written: gives where figures and pictures go beside its own files.
          counts: asked before anything is written and again when all is: whether it counts.

        Returns:
          False if that failed.

        Raises:
          ValueError: if it does not give the metric `train.keep_best`.
          OutOfStep: of several processes only some have failed, and the others wait for them in their midst.
        """
        if not self.try_check(name, context):
            return False
        evaluator, workdir, step = context.run.evaluators[name], context.directory.parent, context.step
        since = time.perf_counter()
        try:
            results = self._runtime.together(lambda: evaluator(context))
            seconds = time.perf_counter() - since
            if counts():
                self._runtime.together(
                    lambda: base.write(results, name, step, seconds, evaluator, workdir, written(), self._runtime)
                )
                if not counts():  # a run that has begun again meanwhile may have looked for it before it was there
                    self._runtime.first_does(lambda: base.delete(workdir, name, lambda other: other == step))
        except Exception as error:  # whatever it is, the others can go on, and the exit code tells
            if are_apart(error):
                raise
            self.fail(f"{name} at step {step}", error, [(name, step)])
            return False
        metric = context.run.keep_best
        if metric is not None and best.evaluator_of(metric) == name:
            if metric not in (tags := results.tagged(name)):
                raise ValueError(f"train.keep_best = {metric!r} is none of the figures of {name}: {', '.join(tags)}")
            self._runtime.first_does(lambda: best.record(workdir, metric, context.run.best_mode()))
        return True

    def fail(self, what: str, error: Exception, given_up: list[tuple[str, int | None]]) -> None:
        """Says and remembers what has failed, and which evaluators are not to be tried again at which step (None: at
        any)."""
        self._given_up |= set(given_up)
        left_out = " (left out from here on)" if any(step is None for _, step in given_up) else ""
        self.failures.append(f"{what}: {one_line(error)}{left_out}")
        if self._runtime.process_index == 0:
            logging.error("%s", self.failures[-1])
        # A user's mistake or a disk's is told by its message, anything else by where it came from.
        expected = isinstance(error, ValueError | OSError | ImportError)
        logging.log(logging.DEBUG if expected else logging.ERROR, "", exc_info=error)

    def summary(self) -> str:
        """What has failed, in a line without the reasons, which have been said."""
        said = [failure.partition(":")[0] for failure in self.failures]
        rest = f" and {len(said) - _NAMED} more" if len(said) > _NAMED else ""
        return f"{len(said)} evaluation(s) failed, as said before: {', '.join(said[:_NAMED])}{rest}"

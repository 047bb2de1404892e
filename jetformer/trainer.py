"""Trains one run: the procedure from top to bottom, and the meter that collects its metrics."""

import contextlib
import functools
import os
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager

import gin
import numpy as np
from absl import logging
from clu.metric_writers import MetricWriter
from torch import Tensor, nn
from upath import UPath

from jetformer import checkpoint, config, metrics, optim, run_files
from jetformer.data.pipeline import peek
from jetformer.evaluators import best
from jetformer.evaluators.context import prepare
from jetformer.evaluators.results import evaluated_steps, forget
from jetformer.evaluators.running import Evaluations
from jetformer.experiment import Experiment
from jetformer.loops.base import Loop, Step, Training, means
from jetformer.preemption import Preempted, Preemption
from jetformer.runtime import Runtime
from jetformer.state import State, build, compilation_cache, evaluator_context, initialize, make_loop, restore


class NonFiniteLoss(FloatingPointError):
    """The loss or the norm of its gradient is infinite or not a number. The message is one line."""


def train(
    experiment: Experiment, workdir: UPath, runtime: Runtime, allow_changes: bool = False, verify: bool = True
) -> None:
    """Trains, from the newest complete checkpoint in `workdir` if there is one.

    Everything that a user can get wrong is checked before the first step and before anything is written. From then on,
    and in a run that resumes, a failing evaluator is logged in one line, and training continues to its end.

    A run that is complete, or was stopped by its patience, changes no file except for evaluations that it lacks.

    Args:
      experiment: what to train.
      workdir: where the run is saved, and resumed from.
      runtime: the devices and processes.
      allow_changes: resume also with another seed or batch size than before.
      verify: compare the checksums of the checkpoint that the run resumes from.

    Raises:
      ValueError: for a configuration, a dataset or a workdir that cannot be used; at the end, if evaluations failed.
      NonFiniteLoss: if the loss stops being finite; the last checkpoint is from before.
      Preempted: on SIGTERM, SIGINT or SIGHUP, after saving.
    """
    # The configuration, and what the workdir holds.
    experiment.check_mesh(runtime)
    experiment.check_keep_best()
    experiment.check_model()
    prepare(experiment.data, runtime)
    total_steps = experiment.steps()
    schedule = experiment.build_schedule()
    in_training = {name: e for name, e in experiment.evaluators.items() if e.every_steps is not None}
    latest = runtime.broadcast(checkpoint.latest(workdir))
    # Complete: at the last step, or stopped early and still out of patience.
    ended = latest is not None and run_files.saved_facts(workdir).get("stopped_at") == latest
    complete = latest == total_steps or runtime.broadcast(ended and _is_out_of_patience(experiment, workdir, latest))
    if latest is not None:
        run_files.check_changes(experiment, workdir, latest, allow_changes or complete)
    if complete and runtime.broadcast(all(latest in evaluated_steps(workdir, name) for name in in_training)):
        runtime.on_first(lambda: checkpoint.Checkpoint(workdir, latest).info)  # raises if it is damaged
        logging.info("The run in %s is already complete at step %d: nothing to do", workdir, latest)
        return

    # The state, initialized or restored.
    loop = make_loop(experiment, runtime, compilation_cache(experiment, workdir))
    if latest is None:
        state = build(experiment, loop, functools.partial(initialize, experiment, runtime))
    else:
        state = build(experiment, loop)
    start_step = restore(workdir, state, verify=verify)
    runtime.agree_on("the step to resume from", start_step)
    if start_step > total_steps:
        raise ValueError(
            f"the run in {workdir} is already at step {start_step}, and this one ends at {total_steps}: train for "
            "longer, or use another --workdir"
        )

    # The data, from the step on, and the evaluators.
    batches = experiment.data.train_batches(
        batch_size=experiment.batch_size,
        seed=experiment.seed,
        start_step=start_step,
        process_index=runtime.process_index,
        process_count=runtime.process_count,
    )
    first_batch, batches = peek(batches, "the training split")
    experiment.check_batch(first_batch)
    evaluations = Evaluations(runtime, workdir, in_training, experiment.keep_best, experiment.best_mode())
    check = evaluations.check if start_step == 0 else evaluations.try_check
    class_names = experiment.data.class_names()
    for name in in_training:
        check(name, evaluator_context(experiment, state, start_step, name, workdir, names=class_names))

    # The workdir. From here on files are written.
    lock = contextlib.ExitStack()

    def begin() -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        if isinstance(workdir, os.PathLike):
            lock.enter_context(run_files.locked(workdir))
            if checkpoint.latest(workdir) != latest:
                raise ValueError(f"another process has trained in {workdir} in the meantime: start again")
        if complete:
            return
        run_files.write(experiment, state.model, runtime, workdir, start_step)
        # After run.json, whose start_steps tell evaluation jobs which results to discard.
        forget(workdir, start_step)
        if experiment.keep_best is None:
            best.rewrite(workdir)  # written by an evaluation job
        else:
            evaluations.write_best()

    runtime.on_first(begin)
    checkpointer = checkpoint.Checkpointer(
        workdir, keep_last=experiment.keep_last, keep_every=experiment.keep_every, **loop.checkpointing()
    )
    written = metrics.Metrics(
        workdir,
        runtime.process_index,
        experiment.wandb_project,
        start_step=start_step,
        total_steps=total_steps,
    )
    written.writer.write_texts(start_step, {"config": textwrap.indent(gin.operative_config_str(), "    ")})
    metrics.log_parameters(state.model)
    num_examples = experiment.data.num_train_examples()
    logging.info(
        "Training on %s for %d steps (%.1f epochs of %d examples), from step %d",
        *(runtime.describe(), total_steps, total_steps * experiment.batch_size / num_examples, num_examples),
        start_step,
    )
    if experiment.ema_decay and not experiment.ema_warmup and (share := experiment.ema_decay**total_steps) > 0.05:
        logging.warning(
            "At the last step, %d, the moving average will hold %.0f%% of the initial parameters: lower "
            "train.ema_decay = %s, or set train.ema_warmup",
            *(total_steps, 100 * share, experiment.ema_decay),
        )

    # The steps.
    preemption = Preemption()
    progress = metrics.create_progress(written.writer, total_steps)
    meter = Meter(experiment.batch_size, state.model, loop, written.writer)
    training = loop.train_steps(
        training_of(experiment, state, total_steps, schedule),
        _checked(experiment, state.model, batches),
        start_step,
    )
    done = saved = start_step
    last_step = total_steps
    decides = None if experiment.keep_best is None else best.evaluator_of(experiment.keep_best)

    def save() -> None:
        nonlocal saved
        meter.check()  # what is not finite is not saved
        with meter.paused(), progress.timed("checkpoint", wait_jax_async_dispatch=False):
            runtime.on_first(lambda: run_files.check_present(workdir))
            written.publish()  # before the checkpoint: a run that is killed after it does not repeat these steps
            checkpointer.save(done, state.tensors(), info={"architecture": config.architecture()})
        saved = done

    def evaluate_due(number: int, missing: bool = False) -> None:
        """Runs the evaluators whose period ends at a step; if `missing`, those that have no results of it."""
        for name, evaluator in in_training.items():
            due = number == last_step or number % evaluator.every_steps == 0
            if not due or evaluations.given_up(name, number):
                continue
            if missing and runtime.broadcast(number in evaluated_steps(workdir, name)):
                continue
            meter.check()
            given = evaluator_context(experiment, state, number, name, workdir, preemption.check, class_names)
            with meter.paused(), progress.timed(f"eval_{name}", wait_jax_async_dispatch=False):
                evaluated = evaluations.evaluate(name, given, lambda: written)
                if not evaluated:
                    preemption.catch_up()
            if evaluated and name == decides and saved < number and runtime.broadcast(is_best(number)):
                save()

    def is_best(number: int) -> bool:
        """Returns whether a step is the best of those that have a checkpoint, or are getting one."""
        return checkpoint.best_of(workdir, {*checkpoint.steps(workdir), saved, number}) == number

    def stop_early() -> bool:
        """Ends the run after this step if its patience is over; returns whether it is."""
        nonlocal last_step
        if experiment.patience is None or done == total_steps or done % in_training[decides].every_steps:
            return False
        if not runtime.broadcast(_is_out_of_patience(experiment, workdir, done)):
            return False
        last_step = done
        if saved < done:
            save()
        evaluate_due(done, missing=True)  # those that run at the end
        runtime.on_first(lambda: run_files.add_fact(workdir, "stopped_at", done))
        logging.info(
            "Stopped early after step %d of %d: %d evaluation(s) without a better %s (train.patience)",
            *(done, total_steps, experiment.patience, experiment.keep_best),
        )
        return True

    with preemption, closing(training):
        try:
            if start_step > 0:
                evaluate_due(start_step, missing=True)
            # A run that was killed as it stopped early takes no further step.
            for step in () if stop_early() else training:
                done = step.number
                meter.update(step)
                if done == total_steps or done % experiment.log_steps == 0:
                    meter.log(step)
                preemption.check()
                if done == total_steps or done % experiment.checkpoint_steps == 0:
                    save()
                evaluate_due(done)
                progress(done)
                if stop_early():
                    break
        except Preempted as stopped:
            if saved < done:
                save()
            logging.info("Stopped on %s after step %d, which is saved", stopped.signal.name, done)
            raise
        finally:
            try:
                checkpointer.wait()
            finally:
                meter.close()
                written.close()
                lock.close()
    if evaluations.failures:
        # All processes finish writing first: when one ends with an error, its launcher stops the others.
        runtime.all_gather(None)
        raise ValueError(f"the run is complete, but {evaluations.summary()}")
    _log_results(experiment, workdir, last_step)


def _log_results(experiment: Experiment, workdir: UPath, step: int) -> None:
    """Logs where a finished run has its results, how they compare with the expected values, and what comes next."""
    for metric, expected in experiment.expected.items():
        if (value := best.values(workdir, metric).get(step)) is not None:
            logging.info("%s is %.4g; the experiment expects %.4g", metric, value, expected)
    if images := sorted(map(str, workdir.glob(f"eval_*/*/{step:09d}.png"))):
        logging.info("Images: %s", ", ".join(images))
    logging.info("The run as a page: python -m jetformer.report --workdir=%s", workdir)


def _is_out_of_patience(experiment: Experiment, workdir: UPath, step: int) -> bool:
    """Returns whether the evaluations during training up to a step end the run there."""
    if experiment.patience is None:
        return False
    every = experiment.evaluators[best.evaluator_of(experiment.keep_best)].every_steps
    # Not those of evaluation jobs, which come at any time.
    values = best.values(workdir, experiment.keep_best)
    own = {n: value for n, value in values.items() if n <= step and n % every == 0}
    return step % every == 0 and best.evaluations_since_best(own, experiment.best_mode()) >= experiment.patience


def training_of(experiment: Experiment, state: State, total_steps: int, schedule: Callable[[int], float]) -> Training:
    """Returns what a loop needs to know of an experiment; arguments as in `Training`."""
    return Training(
        runner=state.runner,
        objective=experiment.objective,
        optimizer=state.optimizer,
        ema=state.ema,
        total_steps=total_steps,
        schedule=schedule,
        noise_curriculum=functools.partial(
            optim.noise_curriculum,
            total_steps=total_steps,
            noise_scale=experiment.noise_scale,
            noise_min=experiment.noise_min,
        ),
        ema_decay=experiment.ema_decay_at,
        seed=experiment.seed,
        grad_clip_norm=experiment.grad_clip_norm,
        grad_accum_steps=experiment.grad_accum_steps,
    )


def _checked(experiment: Experiment, model: nn.Module, batches: Iterator[dict[str, np.ndarray]]):
    """Yields batches whose labels and text tokens are in the vocabulary."""
    for batch in batches:
        experiment.check_text(batch, model)
        yield batch


class Meter:
    """Collects the metrics of the steps between two logs, writes their means, and checks that the loss is finite.

    A background thread copies metrics to the host; training does not wait for it.

    Args:
      batch_size: examples a step, over all processes.
      model: its parameters' norm is a metric.
      loop: the loop that runs it.
      writer: where metrics go.
    """

    def __init__(self, batch_size: int, model: nn.Module, loop: Loop, writer: MetricWriter):
        self._batch_size, self._model, self._loop, self._writer = batch_size, model, loop, writer
        self._thread = ThreadPoolExecutor(1)
        self._pending: list[Future] = []
        self._since = time.perf_counter()
        self._steps: list[Step] = []

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time in this context from the throughput."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def update(self, step: Step) -> None:
        """Adds a step, without waiting for the device."""
        self._steps.append(step)

    def check(self) -> None:
        """Waits for the metrics of all steps so far.

        Raises:
          NonFiniteLoss: if a term of the loss, or the norm of its gradient, was not finite at some step.
        """
        if self._steps:
            self._pending.append(self._thread.submit(self._to_host, list(self._steps)))
        self._raise_pending()

    def log(self, last: Step) -> None:
        """Writes the metrics since the last call, once the device has computed them.

        Raises:
          NonFiniteLoss: as `check`, for the steps of earlier calls.
        """
        # These are on the host by now. Raising here, not in the thread, makes all processes stop at the same step.
        self._raise_pending()
        norm = self._loop.global_norm(self._model.parameters())
        self._pending.append(self._thread.submit(self._write, list(self._steps), last, norm, self._since))
        self._steps, self._since = [], time.perf_counter()

    def close(self) -> None:
        """Waits until everything is written."""
        self._thread.shutdown()

    def _raise_pending(self) -> None:
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()

    def _to_host(self, measured: list[Step]) -> np.ndarray:
        """Returns `[N, 2, n]`, see `Step.values`."""
        values = self._loop.to_host([step.values for step in measured])
        finite = np.isfinite(values[:, 0])
        if not finite.all():
            first = int((~finite).any(axis=1).argmax())
            terms = ", ".join(
                dict.fromkeys(name for name, ok in zip(measured[first].names, finite[first], strict=True) if not ok)
            )
            # A gradient may overflow where the loss is finite; the next parameters are then NaN.
            raise NonFiniteLoss(
                f"not finite at step {measured[first].number}: {terms}. The last checkpoint is from before; lower the "
                "learning rate, or inspect the batch of that step"
            )
        return values

    def _write(self, measured: list[Step], last: Step, norm: Tensor, since: float) -> None:
        averages = means(last.names, self._to_host(measured))
        grad_norm = averages.pop("grad_norm")
        param_norm = self._loop.to_host([norm]).item()
        elapsed = time.perf_counter() - since
        scalars = {f"train/{name}": value for name, value in averages.items()}
        scalars |= {
            "grad_norm": grad_norm,
            "param_norm": param_norm,
            "learning_rate": last.learning_rate,
            "noise_scale": last.noise_scale,
            "examples_per_sec": len(measured) * self._batch_size / elapsed,
        }
        for name in last.seconds:
            scalars[f"{name}_fraction"] = sum(step.seconds[name] for step in measured) / elapsed
        self._writer.write_scalars(last.number, scalars | self._loop.counters())

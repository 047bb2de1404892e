"""Writes metrics: to the log, to TensorBoard files and, where asked for, to Weights & Biases."""

import collections
import datetime
import html
import os
import pathlib
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from absl import logging
from clu import metric_writers, parameter_overview, periodic_actions
from tensorboard.compat.proto import event_pb2
from tensorboard.summary.writer import event_file_writer
from torch import nn
from upath import UPath

from jetformer.sampling.grid import to_pil

WANDB_ID_FILE = "wandb_id"  # in the workdir: the ID of its W&B run
# Of an evaluation, at normal verbosity.
_LOGGED = ("/bits_per_dim", "/noisy_bits_per_dim", "/text_bits_per_token", "/effective_components")
WANDB_INIT_SECONDS = 60.0  # limit for starting a W&B run
WANDB_FINISH_SECONDS = 30.0  # limit for uploading what is left at the end


class Metrics:
    """Writes to the log and, in process 0, to TensorBoard files in the workdir, in the background.

    TensorFlow writes the files and supports fewer file systems than fsspec. If the workdir is a URL, the files are
    written to a local directory and `publish` copies them.

    Args:
      workdir: the run's workdir, or the directory of an evaluation job.
      process_index: the rank of this process.
      wandb_project: the W&B project for process 0 to mirror everything to; None for none.
      training_workdir: the workdir that an evaluation job evaluates; None for the run itself.
      start_step: the step at which the run starts or resumes: TensorBoard drops what was written after it. None for an
        evaluation job.
      total_steps: the last step, for the time left in the log; None for an evaluation job.

    Attributes:
      writer: takes scalars, images and texts, as CLU's `MetricWriter`.
    """

    def __init__(
        self,
        workdir: UPath,
        process_index: int,
        wandb_project: str | None = None,
        training_workdir: UPath | None = None,
        start_step: int | None = None,
        total_steps: int | None = None,
    ):
        self._workdir = workdir
        self._spool = None if isinstance(workdir, os.PathLike) else tempfile.TemporaryDirectory()
        directory = os.fspath(workdir) if self._spool is None else self._spool.name
        writers = [LogWriter(start_step or 0, total_steps)]
        if logging.level_debug():
            writers.append(metric_writers.LoggingWriter())
        if process_index == 0:
            if start_step is not None:
                start = event_file_writer.EventFileWriter(directory)
                log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
                start.add_event(event_pb2.Event(wall_time=time.time(), step=start_step + 1, session_log=log))
                start.close()
            writers.append(metric_writers.SummaryWriter(directory))
        self.writer = metric_writers.AsyncMultiWriter(writers)
        if wandb_project is not None and process_index == 0:
            mirror = WandbWriter(wandb_project, workdir, training_workdir)
            self.writer = metric_writers.MultiWriter([self.writer, mirror])

    def publish(self) -> None:
        """Flushes everything written so far to the workdir."""
        self.writer.flush()
        if self._spool is not None:
            for file in pathlib.Path(self._spool.name).iterdir():
                (self._workdir / file.name).write_bytes(file.read_bytes())

    def close(self) -> None:
        """Publishes, and closes the writers."""
        self.publish()
        self.writer.close()
        if self._spool is not None:
            self._spool.cleanup()


class LogWriter:
    """Logs one line for each write of training metrics, and for each evaluation.

    Args:
      start_step: the step at which the run starts.
      total_steps: the last step; None to log no time left.
    """

    def __init__(self, start_step: int, total_steps: int | None):
        self._total_steps = total_steps
        self._origin, self._is_first = (start_step, time.monotonic()), True

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Logs loss, bits, examples/s and the time left; or bits and components of an evaluation, or all its metrics if
        it has none of these."""
        if "train/loss" not in scalars:
            whole = [tag for tag in scalars if tag.count("/") == 1]  # not of a single class or layer
            tags = [tag for tag in whole if tag.endswith(_LOGGED)] or whole
            if tags:
                values = ", ".join(f"{tag} {float(scalars[tag]):.5g}" for tag in tags)
                logging.info("step %s: %s", f"{step:,}", values)
            return
        formats = {
            "train/loss": "loss {:.5g}",
            "train/bits_per_dim": "{:.4f} bits per dim",
            "train/noisy_bits_per_dim": "{:.4f} noisy bits per dim",
            "train/text_bits_per_token": "{:.4f} bits per token",
            "examples_per_sec": "{:,.4g} examples/s",
        }
        values = [form.format(float(scalars[tag])) for tag, form in formats.items() if tag in scalars]
        now = f"{step:,}"
        if self._total_steps is not None:
            now += f" of {self._total_steps:,}"
            values.append(f"{self._time_left(step)} left")
        logging.info("step %s: %s", now, ", ".join(values))

    def _time_left(self, step: int) -> datetime.timedelta:
        now, (origin_step, origin_time) = time.monotonic(), self._origin
        if self._is_first:  # later estimates leave out the first steps, which may include compilation
            self._origin, self._is_first = (step, now), False
        seconds_per_step = (now - origin_time) / max(1, step - origin_step)
        return datetime.timedelta(seconds=round(seconds_per_step * (self._total_steps - step)))

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Logs nothing."""

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Logs nothing."""

    def flush(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class WandbWriter:
    """Writes to a W&B run, in a thread.

    An error of W&B never stops or delays the caller: the first one is logged in one line and ends the mirroring. W&B
    never asks for a login. WANDB_MODE and W&B's other environment variables apply.

    W&B drops values of a step before the last written one, and evaluations may come late. So the step is a metric of
    its own, the x axis of all others.

    `wandb.init(sync_tensorboard=True)` does not serve here: it follows one W&B run of a process, while evaluation jobs
    have one for each evaluator; and it searches the workdir recursively, which mixes in the event files of evaluations.

    Runs are named after the last two parts of their workdir; an evaluation job belongs to the group of the run it
    evaluates. A resumed run continues the W&B run whose ID is in its workdir.

    Args:
      project: the W&B project.
      workdir: the run's workdir, or the directory of an evaluation job. W&B's files are in its `wandb/`, or in a
        temporary directory if it is a URL.
      training_workdir: the workdir that an evaluation job evaluates; None for the run itself.
    """

    def __init__(self, project: str, workdir: UPath, training_workdir: UPath | None = None):
        self._project, self._workdir, self._training_workdir = project, workdir, training_workdir
        self._pool, self._failed = ThreadPoolExecutor(1), False
        # Otherwise W&B reports its own errors to W&B, and logs more lines where that fails.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._try(self._import)  # not in the thread, while this one may import the same modules
        self._put(self._start)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes scalars, by tag."""
        self._log(step, scalars, lambda value: np.asarray(value).item())

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Writes images, by tag: uint8 `[N, H, W, C]` of 1 or 3 channels."""
        self._log(step, images, lambda batch: [self._wandb.Image(to_pil(image)) for image in batch])

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes preformatted texts, by tag."""
        self._log(step, texts, lambda text: self._wandb.Html(f"<pre>{html.escape(text)}</pre>", data_is_not_path=True))

    def flush(self) -> None:
        """Does nothing: W&B uploads in the background."""

    def close(self) -> None:
        """Ends the W&B run, as failed if an exception is being handled, and waits for the upload, within limits."""
        exit_code = int(sys.exc_info()[0] is not None)
        self._put(lambda: self._finish(exit_code))
        self._pool.shutdown()

    def _log(self, step: int, values: Mapping[str, Any], convert: Callable[[Any], Any]) -> None:
        self._put(lambda: self._run.log({"step": step} | {tag: convert(value) for tag, value in values.items()}))

    def _put(self, action: Callable[[], None]) -> None:
        self._pool.submit(self._try, action)

    def _try(self, action: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            action()
        except Exception as error:
            self._failed = True
            logging.warning("Continuing without W&B: %s", " ".join(str(error).split()) or repr(error))

    def _import(self) -> None:
        try:
            import wandb  # optional
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{error}: pip install -e '.[wandb]'") from error
        self._wandb = wandb

    def _start(self) -> None:
        # Silent before anything else: W&B asks for a key only if it may write to the terminal.
        self._wandb.setup(settings=self._wandb.Settings(silent=True))
        file = self._workdir / WANDB_ID_FILE
        run_id = file.read_text().strip() if file.exists() else ""
        if not run_id:
            run_id = secrets.token_hex(8)
            file.write_text(run_id)
        local = isinstance(self._workdir, os.PathLike)
        self._directory = os.fspath(self._workdir) if local else tempfile.mkdtemp(prefix="wandb-")
        run = self._run = self._wandb.init(
            project=self._project,
            id=run_id,
            resume="allow",
            name=_wandb_name(self._workdir),
            group=_wandb_name(self._training_workdir or self._workdir),
            job_type="train" if self._training_workdir is None else "eval",
            dir=self._directory,
            reinit="create_new",  # independent of other W&B runs in this process
            settings=self._wandb.Settings(
                console="off",
                save_code=False,
                disable_code=True,
                init_timeout=WANDB_INIT_SECONDS,
                finish_timeout=WANDB_FINISH_SECONDS,
                finish_timeout_raises=True,
            ),
        )
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        offline = f"{os.path.dirname(run.dir)}, which `wandb sync` uploads"
        where = "nowhere: W&B is disabled" if run.disabled else offline if run.offline else run.url
        logging.info("Metrics are mirrored to %s", where)

    def _finish(self, exit_code: int) -> None:
        self._run.finish(exit_code)
        if not isinstance(self._workdir, os.PathLike) and not self._run.offline:
            shutil.rmtree(self._directory, ignore_errors=True)


class Progress(periodic_actions.ReportProgress):
    """Writes steps/s and uptime every 10 seconds; logs them and the time of each part at --verbosity=1 only."""

    def _apply(self, step: int, t: float) -> None:
        if logging.level_debug():
            super()._apply(step, t)
            return
        rate = (step - self._previous_step) / (t - self._previous_time)
        self._writer.write_scalars(step, {"steps_per_sec": rate, "uptime": time.monotonic() - self._t0})


def create_progress(writer: metric_writers.MetricWriter, total_steps: int) -> Progress:
    """Returns an action that writes steps/s and uptime every 10 seconds: call it with the step after every step."""
    return Progress(num_train_steps=total_steps, writer=writer, every_secs=10.0)


def log_parameters(model: nn.Module) -> None:
    """Logs the number of parameters, in all and by top-level module; at --verbosity=1 a table of all of them."""
    parameters = dict(model.named_parameters())
    sizes: collections.Counter[str] = collections.Counter()
    for name, parameter in parameters.items():
        sizes[name.partition(".")[0]] += parameter.numel()
    parts = ", ".join(f"{name} {size:,}" for name, size in sizes.most_common())
    logging.info("%s parameters: %s", f"{sizes.total():,}", parts)
    if logging.level_debug():
        overview = parameter_overview.get_parameter_overview(parameters, include_stats=False)
        logging.debug("Parameters:\n%s", overview)


def _wandb_name(workdir: UPath) -> str:
    """Returns the last two parts of a path."""
    path = os.path.abspath(workdir) if isinstance(workdir, os.PathLike) else workdir.path
    return "/".join([part for part in path.split("/") if part][-2:])

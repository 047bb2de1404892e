"""CLU metric writers: scalars, images and texts to TensorBoard and the log, and to Weights & Biases if asked for."""

import html
import os
import pathlib
import queue
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import logging
from clu import metric_writers, parameter_overview, periodic_actions
from PIL import Image
from tensorboard.compat.proto import event_pb2
from tensorboard.summary.writer import event_file_writer
from torch import nn
from upath import UPath

WANDB_ID_FILE = "wandb_id"  # in the workdir: which W&B run a resumed run continues

# How long W&B tries to start, and at the end of a run to upload the rest. The end waits for both, and a little longer.
_WANDB_INIT_SECONDS = 60.0
_WANDB_FINISH_SECONDS = 30.0


class Metrics:
    """A CLU writer to the log and, in process 0, to TensorBoard files in the workdir; it writes in the background.

    TensorFlow, which writes the files, knows fewer places than fsspec. Where the workdir is a URL they are written to a
    local directory, and `publish` copies them over.

    Args:
      workdir: of the run; or the directory of an evaluation job.
      process_index: which process this is.
      wandb_project: the W&B project that process 0 mirrors everything to; None for none.
      training_workdir: of the run that an evaluation job follows; None for the run itself.
      start_step: the step that the run starts or resumes from: TensorBoard leaves out what was written of later ones.
        None for an evaluation job.
    """

    def __init__(
        self,
        workdir: UPath,
        process_index: int,
        wandb_project: str | None = None,
        training_workdir: UPath | None = None,
        start_step: int | None = None,
    ):
        self._workdir = workdir
        self._spool = None if isinstance(workdir, os.PathLike) else tempfile.TemporaryDirectory()
        directory = os.fspath(workdir) if self._spool is None else self._spool.name
        if start_step is not None and process_index == 0:
            resumed = event_file_writer.EventFileWriter(directory)
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            resumed.add_event(event_pb2.Event(wall_time=time.time(), step=start_step + 1, session_log=start))
            resumed.close()
        self.writer = metric_writers.create_default_writer(
            directory,
            just_logging=process_index > 0,
            asynchronous=True,
        )
        if wandb_project is not None and process_index == 0:
            mirror = WandbWriter(wandb_project, workdir, training_workdir)
            self.writer = metric_writers.MultiWriter([self.writer, mirror])

    def publish(self) -> None:
        """Brings what was written so far to the workdir."""
        self.writer.flush()
        if self._spool is not None:
            for file in pathlib.Path(self._spool.name).iterdir():
                (self._workdir / file.name).write_bytes(file.read_bytes())

    def close(self) -> None:
        """Publishes, and ends the writing."""
        self.publish()
        self.writer.close()
        if self._spool is not None:
            self._spool.cleanup()


class WandbWriter(metric_writers.MetricWriter):
    """Writes to a run of Weights & Biases.

    Nothing that goes wrong there stops or holds up the caller: W&B is started and written to in a thread of its own,
    and after its first error, which is logged in one line, no more. It never asks for a login. WANDB_MODE and W&B's
    other environment variables count.

    W&B drops what is written at a step before the last, as an evaluation may be. So steps are a metric, "step", that
    the others are drawn over, and W&B counts the writes.

    A run is named after the last two parts of its workdir, and so is the group of its evaluation jobs, which are W&B
    runs of their own. A resumed run continues the W&B run whose id is in its workdir.

    Args:
      project: the W&B project.
      workdir: of the run, or the directory of an evaluation job. W&B's files go to its `wandb/`, or where it is a URL
        to a temporary directory.
      training_workdir: of the run that an evaluation job follows; None for the run itself.
    """

    def __init__(self, project: str, workdir: UPath, training_workdir: UPath | None = None):
        self._project, self._workdir, self._training_workdir = project, workdir, training_workdir
        self._writes: queue.SimpleQueue[Callable[[Any], None] | None] = queue.SimpleQueue()
        self._exit_code = 0
        self._warned = False
        # A daemon: the interpreter does not wait for it when it ends.
        self._thread = threading.Thread(target=self._work, name="WandbWriter", daemon=True)
        # W&B reports its own errors to W&B unless told otherwise, and logs more lines where that fails.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            # Here and not in the thread: a module that two threads import at once may be half there to one of them.
            import wandb
        except ModuleNotFoundError as error:
            self._warn(f"{error}: pip install -e '.[wandb]'")
        except Exception as error:  # of another protobuf, say
            self._warn(error)
        else:
            self._wandb = wandb
            self._thread.start()

    def write_summaries(self, step: int, values: Mapping[str, Any], metadata: Mapping[str, Any] | None = None) -> None:
        """Writes nothing: only TensorBoard's plugins can read them."""
        logging.log_first_n(logging.WARNING, "WandbWriter does not support writing raw summaries.", 1)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """See `MetricWriter`."""
        self._log(step, scalars, lambda value: np.asarray(value).item())

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """See `MetricWriter`: `[N, H, W, C]` or `[H, W, C]`, uint8, or float in [0, 1]. W&B takes 108 at a time."""
        self._log(step, images, lambda value: [self._wandb.Image(image) for image in _to_pil(np.asarray(value))])

    def write_videos(self, step: int, videos: Mapping[str, Any]) -> None:
        """Writes nothing: W&B needs further packages for them."""
        logging.log_first_n(logging.WARNING, "WandbWriter does not support writing videos.", 1)

    def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int) -> None:
        """Writes nothing: W&B needs further packages for them."""
        logging.log_first_n(logging.WARNING, "WandbWriter does not support writing audios.", 1)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """See `MetricWriter`; preformatted."""
        to_html = lambda text: self._wandb.Html(f"<pre>{html.escape(text)}</pre>", data_is_not_path=True)
        self._log(step, texts, to_html)

    def write_histograms(
        self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """See `MetricWriter`; of 64 buckets by default, and of 512 at most."""
        for name, array in arrays.items():
            buckets = min((num_buckets or {}).get(name) or 64, 512)
            self._log(step, {name: array}, lambda value, n=buckets: self._wandb.Histogram(value, num_bins=n))

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """See `MetricWriter`. W&B cannot filter by a name with a point: `Jet.depth` is written as `Jet/depth`."""
        config = {name.replace(".", "/"): value for name, value in hparams.items()}
        self._put(lambda run: run.config.update(config, allow_val_change=True))

    def flush(self) -> None:
        """Does nothing, for nobody shall wait for W&B: it uploads by itself."""

    def close(self) -> None:
        """Ends the W&B run, as failed while an exception is on its way, and waits for it, but not for long."""
        self._exit_code = int(sys.exc_info()[0] is not None)
        self._writes.put(None)
        if self._thread.is_alive():
            timeout = _WANDB_INIT_SECONDS + _WANDB_FINISH_SECONDS + 5
            self._thread.join(timeout)
            if self._thread.is_alive():
                self._warn(f"it has not ended within {timeout:g} s")

    def _log(self, step: int, values: Mapping[str, Any], convert: Callable[[Any], Any]) -> None:
        self._put(lambda run: run.log({"step": step} | {name: convert(value) for name, value in values.items()}))

    def _put(self, write: Callable[[Any], None]) -> None:
        if self._thread.is_alive():
            self._writes.put(write)

    def _warn(self, reason: object) -> None:
        if not self._warned:
            self._warned = True
            logging.warning("Going on without W&B: %s", " ".join(str(reason).split()) or repr(reason))

    def _work(self) -> None:
        """What the thread does, from the start of the W&B run to its end."""
        try:
            local = isinstance(self._workdir, os.PathLike)
            directory = os.fspath(self._workdir) if local else tempfile.mkdtemp(prefix="wandb-")
            run = self._start(directory)
            while (write := self._writes.get()) is not None:
                write(run)
            run.finish(self._exit_code)
            if not local and not run.offline:
                shutil.rmtree(directory, ignore_errors=True)
        except Exception as error:
            self._warn(error)

    def _start(self, directory: str) -> Any:
        # Silent before anything else: W&B asks for a key at a terminal only if it may write there. What matters comes
        # as an error or is logged here.
        self._wandb.setup(settings=self._wandb.Settings(silent=True))
        file = self._workdir / WANDB_ID_FILE
        run_id = file.read_text().strip() if file.exists() else ""
        if not run_id:
            run_id = secrets.token_hex(8)
            file.write_text(run_id)
        run = self._wandb.init(
            project=self._project,
            id=run_id,
            resume="allow",
            name=_wandb_name(self._workdir),
            group=_wandb_name(self._training_workdir or self._workdir),
            job_type="train" if self._training_workdir is None else "eval",
            dir=directory,
            reinit="create_new",  # whatever else runs in this process
            settings=self._wandb.Settings(
                console="off",  # the output of the program is the program's
                save_code=False,
                disable_code=True,
                init_timeout=_WANDB_INIT_SECONDS,
                finish_timeout=_WANDB_FINISH_SECONDS,
                finish_timeout_raises=True,
            ),
        )
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        offline = f"{os.path.dirname(run.dir)}, which `wandb sync` uploads"
        where = "nowhere: W&B is disabled" if run.disabled else offline if run.offline else run.url
        logging.info("Metrics are mirrored to %s", where)
        return run


def create_progress(writer: metric_writers.MetricWriter, total_steps: int):
    """Reports steps/s and the time left, every 10 seconds: call it with the step after every step."""
    return periodic_actions.ReportProgress(num_train_steps=total_steps, writer=writer, every_secs=10.0)


def log_parameters(model: nn.Module) -> None:
    """Logs a table of all parameters: name, shape, dtype, size, and the total."""
    parameters = dict(model.named_parameters())
    overview = parameter_overview.get_parameter_overview(parameters, include_stats=False)
    logging.info("Parameters:\n%s", overview)


def _wandb_name(workdir: UPath) -> str:
    """The last two parts of its path."""
    path = os.path.abspath(workdir) if isinstance(workdir, os.PathLike) else workdir.path
    return "/".join([part for part in path.split("/") if part][-2:])


def _to_pil(images: np.ndarray) -> list[Image.Image]:
    """`[N, H, W, C]` or `[H, W, C]` with one channel or three, uint8, or float in [0, 1]."""
    if images.dtype != np.uint8:
        images = np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)
    images = images.reshape(-1, *images.shape[-3:])
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in images]

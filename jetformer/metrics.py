"""CLU metric writers: scalars, images and texts to TensorBoard and the log."""

import os
import pathlib
import tempfile

from absl import logging
from clu import metric_writers, parameter_overview, periodic_actions
from torch import nn
from upath import UPath


class Metrics:
    """A CLU writer to the log and, in process 0, to TensorBoard files in the workdir; it writes in the background.

    TensorFlow, which writes the files, knows fewer places than fsspec. Where the workdir is a URL they are written to a
    local directory, and `publish` copies them over.

    Args:
      workdir: of the run.
      process_index: which process this is.
    """

    def __init__(self, workdir: UPath, process_index: int):
        self._workdir = workdir
        self._spool = None if isinstance(workdir, os.PathLike) else tempfile.TemporaryDirectory()
        self.writer = metric_writers.create_default_writer(
            os.fspath(workdir) if self._spool is None else self._spool.name,
            just_logging=process_index > 0,
            asynchronous=True,
        )

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


def create_progress(writer: metric_writers.MetricWriter, total_steps: int):
    """Reports steps/s and the time left, every 10 seconds: call it with the step after every step."""
    return periodic_actions.ReportProgress(num_train_steps=total_steps, writer=writer, every_secs=10.0)


def log_parameters(model: nn.Module) -> None:
    """Logs a table of all parameters: name, shape, dtype, size, and the total."""
    parameters = dict(model.named_parameters())
    overview = parameter_overview.get_parameter_overview(parameters, include_stats=False)
    logging.info("Parameters:\n%s", overview)

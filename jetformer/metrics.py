"""CLU metric writers: scalars, images and texts to TensorBoard and the log."""

import os

from absl import logging
from clu import metric_writers, parameter_overview, periodic_actions
from etils import epath
from torch import nn


def create_writer(workdir: epath.Path, process_index: int) -> metric_writers.MetricWriter:
    """A writer to the log and, in process 0, to TensorBoard files in the workdir; it writes in the background."""
    return metric_writers.create_default_writer(os.fspath(workdir), just_logging=process_index > 0, asynchronous=True)


def create_progress(writer: metric_writers.MetricWriter, total_steps: int):
    """Reports steps/s and the time left, every 10 seconds: call it with the step after every step."""
    return periodic_actions.ReportProgress(num_train_steps=total_steps, writer=writer, every_secs=10.0)


def log_parameters(model: nn.Module) -> None:
    """Logs a table of all parameters: name, shape, dtype, size, and the total."""
    parameters = dict(model.named_parameters())
    overview = parameter_overview.get_parameter_overview(parameters, include_stats=False)
    logging.info("Parameters:\n%s", overview)

"""What a run keeps in its workdir beside checkpoints and results: what it runs on, its configurations, and a lock."""

import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import gin
import torch
from absl import logging
from torch import nn
from upath import UPath

import jetformer
from jetformer import class_names, config
from jetformer.experiment import Experiment
from jetformer.runtime import Runtime
from jetformer.storage import write_whole

if TYPE_CHECKING:
    from jetformer.data.texts import Texts

LOCK_FILE = "lock"  # locked while a run trains there, if the workdir is a local directory
RUN_FILE = "run.json"  # what the run's last start ran on, and its parameters
CONFIGS_DIRECTORY = "configs"  # the configuration of each start, by the step it started from
TOKENIZER_FILE = "tokenizer.model"  # of an experiment that reads texts


def saved_facts(workdir: UPath) -> dict[str, Any]:
    """Returns what the last start of a run has saved, see `write`; empty before the first start.

    Raises:
      ValueError: if the file is damaged.
    """
    file = workdir / RUN_FILE
    if not file.exists():
        return {}
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): delete it") from error


def add_fact(workdir: UPath, name: str, value: Any) -> None:
    """Adds an entry to what the last start has saved."""
    write_whole(workdir / RUN_FILE, json.dumps(saved_facts(workdir) | {name: value}, indent=1))


def check_present(workdir: UPath) -> None:
    """Checks that a workdir is still what `write` made it.

    Raises:
      FileNotFoundError: if it was deleted, or unmounted: a checkpoint alone is no run.
    """
    if not (workdir / RUN_FILE).exists():
        raise FileNotFoundError(
            f"{workdir} has disappeared during the run (it has no {RUN_FILE}), nothing more is saved: restore it, or "
            "start again"
        )


@contextmanager
def locked(workdir: UPath) -> Iterator[None]:
    """Locks a workdir while the context lasts. The operating system unlocks it when the process ends, however it ends.

    Raises:
      ValueError: if another process has locked it.
    """
    with (workdir / LOCK_FILE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = saved_facts(workdir).get("owner", {})
            raise ValueError(
                f"another process trains in {workdir}: {owner.get('pid')} on {owner.get('host')}, since "
                f"{owner.get('since')}: wait for it, end it, or use another --workdir"
            ) from error
        except OSError as error:  # some network file systems have no locks
            logging.warning("%s cannot be locked (%s): make sure that no other process trains there", workdir, error)
        yield


def check_changes(experiment: Experiment, workdir: UPath, step: int, allowed: bool) -> None:
    """Logs every binding that differs from the last start of a run, whose newest checkpoint is of `step`.

    Raises:
      ValueError: if seed or batch size differ, unless `allowed`: other batches would follow.
    """
    saved = saved_facts(workdir)
    for name in ("seed", "batch_size"):
        before, now = saved.get(name), getattr(experiment, name)
        if not allowed and before not in (None, now):
            raise ValueError(
                f"train.{name} = {now}, but the run in {workdir} reached step {step} with {before}: bind {before}, use "
                "another --workdir, or resume with --allow_changes"
            )
    now = config.bindings()
    if "bindings" not in saved and experiment.ema_decay and experiment.ema_warmup:
        logging.warning(
            "The run is older than train.ema_warmup: bind it to False for the moving average that it had so far"
        )
    before = saved.get("bindings", now)
    for name in sorted(before.keys() | now.keys()):
        theirs, ours = before.get(name, "not bound"), now.get(name, "not bound")
        if theirs != ours:
            logging.warning("Changed since the last start: %s = %s, was %s", name, ours, theirs)


def texts(experiment: Experiment, workdir: UPath) -> "Texts":
    """Returns how a run tokenizes texts, with the tokenizer in its workdir if there is one."""
    file = workdir / TOKENIZER_FILE
    return experiment.data.texts(str(file) if file.exists() else None)


def write(experiment: Experiment, model: nn.Module, runtime: Runtime, workdir: UPath, start_step: int) -> None:
    """Saves what a start of a run runs on, its configuration, the names of classes, and its tokenizer."""
    start_steps = [*saved_facts(workdir).get("start_steps", []), start_step]
    facts = _facts(experiment, model, runtime, start_steps)
    write_whole(workdir / RUN_FILE, json.dumps(facts, indent=1))
    directory = workdir / CONFIGS_DIRECTORY
    directory.mkdir(exist_ok=True)
    for file in directory.glob("*.gin"):
        if int(file.stem) > start_step:  # of steps that will be repeated
            file.unlink()
    write_whole(directory / f"{start_step:09d}.gin", gin.config_str())
    if (names := experiment.data.class_names()) is not None:
        class_names.save(workdir, names)
    # After run.json, which an evaluation job reads when this changes: a run that was made longer has not ended.
    config.save(workdir)
    if experiment.data.has_texts():  # then sampling needs nothing but the workdir
        (workdir / TOKENIZER_FILE).write_bytes(experiment.data.texts().tokenizer.serialized())


def _facts(experiment: Experiment, model: nn.Module, runtime: Runtime, start_steps: Sequence[int]) -> dict[str, Any]:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "jetformer": jetformer.__version__}
    if runtime.device.type == "xla":
        versions["torch_xla"] = importlib.metadata.version("torch_xla")
    elif runtime.device.type == "tpu":
        versions["torch_tpu"] = importlib.metadata.version("torch_tpu")
    return {
        "device": runtime.describe(),
        "device_count": runtime.device_count,
        "process_count": runtime.process_count,
        "versions": versions,
        "total_steps": experiment.steps(),
        "batch_size": experiment.batch_size,
        "seed": experiment.seed,
        "owner": {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        },
        "bindings": config.bindings(),
        "train_examples": experiment.data.num_train_examples(),
        "parameters": [
            {"name": name, "shape": list(p.shape), "dtype": str(p.dtype).removeprefix("torch."), "size": p.numel()}
            for name, p in model.named_parameters()
        ],
        "start_steps": start_steps,
    }

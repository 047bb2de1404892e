"""Small runs of the training program, for tests."""

import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from upath import UPath

from jetformer import checkpoint, config
from jetformer.evaluators.base import Context
from jetformer.experiment import Experiment
from jetformer.runtime import Runtime
from jetformer.state import build, evaluator_context, make_loop
from jetformer.trainer import train

# digits.gin, made small enough to train in seconds.
SMALL = {
    "train.total_steps": 12,
    "train.batch_size": 16,
    "train.log_steps": 1,
    "train.checkpoint_steps": 4,
    "train.noise_scale": 8.0,
    "Data.shuffle_buffer_size": 100,
    "Data.eval_split": '"validation[:40]"',
    "Jet.depth": 2,
    "Jet.emb_dim": 16,
    "Decoder.width": 16,
    "Decoder.depth": 1,
    "Decoder.mlp_dim": 32,
    "Decoder.head_dim": 8,
    "JetFormer.num_mixtures": 4,
    "train.evaluators": '{"val": @Likelihood(), "samples": @Samples()}',
    "Likelihood.every_steps": 6,
    "Samples.every_steps": 12,
    "Samples.num_images": 2,
}


def bindings(data_dir, **overrides) -> list[str]:
    """gin bindings of a small run; an override `train__seed=1` is the binding `train.seed = 1`."""
    values = SMALL | {"Data.data_dir": f'"{data_dir}"'}
    values |= {name.replace("__", "."): value for name, value in overrides.items()}
    return [f"{name} = {value}" for name, value in values.items()]


def run(workdir, data_dir, **overrides) -> None:
    """Trains in this process."""
    config.parse(["experiments/digits.gin"], bindings(data_dir, **overrides))
    experiment = config.call(Experiment)
    train(experiment, UPath(workdir), Runtime(torch.device("cpu")))


def untrained(workdir, data_dir, gin_file="experiments/digits.gin", **overrides) -> Context:
    """What an evaluator is given for a small run with random parameters, and others as their moving average."""
    config.parse([gin_file], bindings(data_dir, **overrides))
    experiment = config.call(Experiment)
    state = build(experiment, make_loop(experiment, Runtime(torch.device("cpu"))))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in [*state.model.parameters(), *(state.ema or {}).values()]:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return evaluator_context(experiment, state, 7, "test", UPath(workdir))


def command(workdir, gin_bindings, gin_file="experiments/digits.gin", *more) -> list[str]:
    """The command line of a run."""
    flags = [f"--gin_file={gin_file}", f"--workdir={workdir}", "--device=cpu", *more]
    flags += [f"--gin_bindings={binding}" for binding in gin_bindings]
    return [sys.executable, "-m", "jetformer.main", *flags]


def torchrun(args, processes) -> list[str]:
    """A command line of `python …`, in several processes of this host."""
    flags = ["--standalone", f"--nproc-per-node={processes}", "--no-python"]
    return [sys.executable, "-m", "torch.distributed.run", *flags, *preloaded(args)]


def start(args, fresh=False, **environment) -> subprocess.Popen:
    """Starts a program, with its output in pipes; of `python …` only the imports, unless `fresh`, are not its own."""
    if args[0] == sys.executable and args[2] != "torch.distributed.run" and not fresh:
        args = preloaded(args)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(args, **pipes, env={**os.environ, **environment})


def preloaded(args) -> list[str]:
    """A command line that does the same as `python …` without the seconds that imports take."""
    return [sys.executable, "-IS", str(pathlib.Path(__file__).with_name("preloaded.py")), servers(), *args[1:]]


@functools.cache
def servers() -> str:
    """The directory of the servers of `preloaded.py`, which all workers of pytest-xdist share."""
    if run := os.environ.get("PYTEST_XDIST_TESTRUNUID"):
        parent, owner = os.path.join(tempfile.gettempdir(), f"preloaded-{run}"), os.getppid()
    else:
        parent, owner = tempfile.mkdtemp(), os.getpid()
    directory = os.path.join(parent, str(owner))
    os.makedirs(directory, exist_ok=True)
    return directory


def scalars(workdir) -> dict[str, dict[int, float]]:
    """All scalars that a run's writers wrote: by tag and step. A step written twice counts as last written."""
    accumulator = EventAccumulator(str(workdir), size_guidance={"tensors": 0})
    accumulator.Reload()
    values = {}
    for tag in accumulator.Tags()["tensors"]:
        events = accumulator.Tensors(tag)
        arrays = {e.step: make_ndarray(e.tensor_proto) for e in events}
        if all(array.dtype == np.float32 and array.ndim == 0 for array in arrays.values()):
            values[tag] = {step: array.item() for step, array in arrays.items()}
    return values


def results(workdir, name) -> list[dict[str, float]]:
    """What an evaluator has found, by step."""
    return [json.loads(line) for line in (workdir / f"eval_{name}" / "results.jsonl").read_text().splitlines()]


def checkpoint_tensors(workdir, step):
    """All tensors of a run's checkpoint by name."""
    config.parse([str(workdir / config.CONFIG_FILE)], [])
    experiment = config.call(Experiment)
    state = build(experiment, make_loop(experiment, Runtime(torch.device("cpu"))))
    tensors = state.tensors()
    checkpoint.Checkpoint(workdir, step).restore(tensors)
    return {f"{part}/{name}": value for part in ("model", "ema") for name, value in tensors.get(part, {}).items()} | {
        f"optimizer/{name}/{key}": value
        for name, values in tensors["optimizer"].items()
        for key, value in values.items()
    }

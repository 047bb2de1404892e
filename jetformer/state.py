"""What training changes: built from an experiment, placed on devices, saved, restored, and loaded for sampling."""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from typing import Any

import torch
from absl import logging
from torch import Tensor, nn
from upath import UPath

from jetformer import checkpoint, class_names, config, objectives, optim, prng
from jetformer.evaluators.context import Context
from jetformer.evaluators.results import directory_of
from jetformer.experiment import Experiment
from jetformer.loops.base import Loop, Runner
from jetformer.models import invertible, remat
from jetformer.models.initializers import init_weights
from jetformer.models.jetformer import JetFormer
from jetformer.models.mixture import CLUSTERED_TOKENS, MixtureHead
from jetformer.models.student import Student
from jetformer.runtime import Runtime, derive_seed

# Seeds the initial weights, together with the run's seed.
_INIT = 1

# Number of examples of the first batch that initialize what depends on data.
_INIT_EXAMPLES = 256


@dataclasses.dataclass
class State:
    """What training changes.

    Attributes:
      loop: the loop that runs the model.
      runner: the model, as the loop has placed it.
      optimizer: None for a model that is not trained.
      ema: moving average of the parameters by name; None for none.
    """

    loop: Loop
    runner: Runner
    optimizer: torch.optim.Optimizer | None
    ema: dict[str, Tensor] | None

    @property
    def model(self) -> nn.Module:
        return self.runner.model

    def tensors(self) -> dict[str, Any]:
        """Returns nested dictionaries of all tensors, to save and to restore in place."""
        state = {"model": self.model.state_dict()}
        if self.optimizer is not None:
            state["optimizer"] = optim.state_tensors(self.optimizer, self.model)
        if self.ema is not None:
            state["ema"] = self.ema
        return state

    def bytes(self) -> dict[str, int]:
        """Returns the bytes that this process keeps from step to step, by use, and those of the gradients."""
        tensors = {
            "parameters": self.model.parameters(),
            "gradients": (p for p in self.model.parameters() if p.requires_grad),
            "optimizer": (x for values in self.optimizer.state.values() for x in values.values()),
            "average": () if self.ema is None else self.ema.values(),
        }
        return {use: sum(self.loop.local(x).nbytes for x in values) for use, values in tensors.items()}

    def averaged(self) -> AbstractContextManager:
        """Returns a context with the moving average in the place of the parameters, if there is one."""
        return self.loop.averaged(self.model, self.ema)


def make_loop(experiment: Experiment, runtime: Runtime, cache_dir: str | None = None) -> Loop:
    """Returns the loop for the devices of a runtime.

    Args:
      experiment: its mesh and precision are the loop's.
      runtime: the devices and processes.
      cache_dir: local directory where XLA keeps compiled graphs; None for none.
    """
    if runtime.device.type == "xla":
        from jetformer.loops.xla_loop import XlaLoop as Kind  # torch_xla need not be installed
    else:
        from jetformer.loops.torch_loop import TorchLoop as Kind
    return Kind(runtime, experiment.mesh, experiment.matmul_precision, experiment.autocast, cache_dir)


def build_model(experiment: Experiment) -> nn.Module:
    """Returns the model on the CPU, with initial weights that depend on the seed alone."""
    model = experiment.check_model().to_empty(device="cpu")
    with torch.no_grad():
        init_weights(model, torch.Generator().manual_seed(derive_seed(experiment.seed, _INIT)))
    return model


def build(experiment: Experiment, loop: Loop, initialize: Callable[[nn.Module], None] = lambda model: None) -> State:
    """Returns the state at step 0.

    Args:
      experiment: what to build.
      loop: places it on its devices.
      initialize: called with the model while it is on the CPU.
    """
    model = build_model(experiment)
    initialize(model)
    state = _place(experiment, loop, model, experiment.compile)
    state.optimizer = experiment.optimizer(model)
    loop.place_state(x for values in state.optimizer.state.values() for x in values.values())
    return state


def build_to_load(experiment: Experiment, loop: Loop, fill: Callable[[nn.Module], None] = lambda model: None) -> State:
    """Returns a state without optimizer, whose weights a checkpoint or `fill` is to set: they are not initialized, so
    what initializes them (a file of a PCA) need not be on this machine; nor a compiler, for `train.compile` is of
    training.

    Args:
      experiment, loop: as in `build`.
      fill: called with the model while it is on the CPU.
    """
    model = experiment.check_model().to_empty(device="cpu")
    fill(model)
    return _place(experiment, loop, model, None)


def _place(experiment: Experiment, loop: Loop, model: nn.Module, compile: str | None) -> State:
    """Moves a model from the CPU to the devices; returns the state without optimizer."""
    remat.set_policy(model, experiment.activation_checkpointing, experiment.activation_checkpointing_every)
    state = State(loop, loop.place(model, compile), optimizer=None, ema=None)
    if experiment.ema_decay:
        state.ema = {name: p.detach().clone() for name, p in model.named_parameters()}
        loop.place_state(state.ema.values())
    return state


def initialize(experiment: Experiment, runtime: Runtime, model: nn.Module) -> None:
    """Sets those initial weights of a new model that are not random: all of them from `init_from`, or those of ActNorms
    and of an image head with kmeans_init from the first batch.

    Process 0 computes them and broadcasts them.

    Raises:
      ValueError: if there are no such weights, or they are another model's.
    """
    if experiment.init_from is not None:
        load_weights(experiment.init_from, model)
    elif invertible.parameters_from_data(model):
        values = runtime.on_first(lambda: _initialize_from_data(experiment, model))
        for parameter, value in zip(invertible.parameters_from_data(model), values, strict=True):
            parameter.data.copy_(value)
    heads = {name: module for name, module in model.named_modules() if isinstance(module, MixtureHead)}
    for name, head in heads.items() if runtime.process_index == 0 else ():
        if head.num_mixtures == 1 or not head.components_equal():
            continue
        remedy = "set JetFormer.kmeans_init, or JetFormer.mean_init_std above 0"
        if name != "image_head":
            remedy = "set FactoredPrior.mean_init_std above 0"
        if experiment.init_from is not None:
            remedy = f"they are so in {experiment.init_from}, whose weights no other initialization changes"
        logging.warning(
            "All %d components of %s are equal, and stay so in training, as one Gaussian: %s",
            *(head.num_mixtures, name, remedy),
        )


def _initialize_from_data(experiment: Experiment, model: nn.Module) -> list[Tensor]:
    """Initializes the parameters of `invertible.parameters_from_data`, and returns their values."""
    from jetformer.data.pipeline import peek  # brings TensorFlow, which sampling does without

    of_jetformer = isinstance(model, JetFormer)
    count = math.ceil(CLUSTERED_TOKENS / model.num_image_tokens) if of_jetformer else _INIT_EXAMPLES
    with closing(experiment.data.train_batches(batch_size=experiment.batch_size, seed=experiment.seed)) as batches:
        first_batch, _ = peek(batches, "the training split")
    experiment.check_batch(first_batch)
    batch = {name: torch.tensor(array[:count]) for name, array in first_batch.items()}
    examples = torch.arange(objectives.batch_size(batch), dtype=torch.int32)
    keys = prng.example_keys(derive_seed(experiment.seed, 0), examples)
    draws = experiment.objective.draw(model, batch, keys, train=True)
    with invertible.initializing(model):
        if of_jetformer:
            encoded = experiment.objective.encode(model, batch, draws, noise_scale=experiment.noise_scale)
            if isinstance(model.image_head, MixtureHead) and model.image_head.kmeans_init:
                model.image_head.start_at_clusters(encoded.tokens.flatten(0, 1))
        else:
            experiment.objective(model, batch, draws, noise_scale=experiment.noise_scale)
    return [parameter.data for parameter in invertible.parameters_from_data(model)]


def load_weights(path: str, model: nn.Module) -> None:
    """Loads the weights of another run into a model on the CPU: those of its moving average if it has one.

    Students of a flow (see `TarFlow.student`) stay as they are if that run has none.

    Args:
      path: the run's workdir, for its newest checkpoint, or one of its checkpoints.
      model: the model.

    Raises:
      ValueError: if there is no checkpoint, or it is of another architecture.
    """
    workdir, step = checkpoint.split_path(path)
    if step is None and (step := checkpoint.latest(workdir)) is None:
        raise ValueError(f"train.init_from = {path!r}: there is no complete checkpoint")
    saved = checkpoint.Checkpoint(workdir, step)
    _check_architecture(f"train.init_from = {path!r}", saved.info, "start from another run")
    students = {f"{path}." for path, module in model.named_modules() if isinstance(module, Student)}
    tensors = model.state_dict()
    saved.load_weights(tensors, optional=[name for name in tensors if any(map(name.startswith, students))])
    logging.info("Weights of step %d of %s", step, workdir)


def _check_architecture(what: str, info: Mapping[str, Any], remedy: str) -> None:
    """Compares the architecture in a checkpoint's `info` with the configured one."""
    ours = config.architecture()
    for name, value in info.get("architecture", {}).items():
        if ours.get(name) != value:
            raise ValueError(
                f"{what} holds a run with another architecture: its {name} is {value}, the configured one "
                f"{ours.get(name)}; {remedy}, or use that run's configuration"
            )


def restore(workdir: UPath, state: State, step: int | None = None, verify: bool = True) -> int:
    """Restores a complete checkpoint of a workdir into a state.

    The checkpoint may come from other devices, and from more or fewer of them.

    Args:
      workdir: the run's.
      state: changed in place.
      step: of the checkpoint; None: the newest.
      verify: compare the checksums of the files first; each process compares those of its share of them.

    Returns:
      The checkpoint's step, 0 if there is none.

    Raises:
      ValueError: if the checkpoint is damaged or of another architecture.
    """
    if step is None and (step := checkpoint.latest(workdir)) is None:
        return 0
    saved = checkpoint.Checkpoint(workdir, step)
    _check_architecture(str(workdir), saved.info, "use another --workdir")
    if verify:
        runtime = state.loop.runtime
        saved.verify_checksums(runtime.process_index, runtime.process_count)
    tensors = state.tensors()
    to_train = state.optimizer is not None
    if to_train and state.ema is not None and "ema" not in saved.parts():
        logging.warning("The moving average begins at step %d: the checkpoint has none", step)
        del tensors["ema"]
        parameters = {"model": tensors["model"] | state.ema}
        saved.restore(parameters, state.loop.load_planner())
    saved.restore(tensors, state.loop.load_planner())
    return step


def evaluator_context(
    experiment: Experiment,
    state: State,
    step: int,
    name: str,
    workdir: UPath,
    each_batch: Callable[[], None] = lambda: None,
    names: Sequence[str] | None = None,
) -> Context:
    """Returns what the evaluator `name` is given at a step; `names` of classes None: those in the workdir, if any."""
    return Context(
        runner=state.runner,
        ema=state.ema,
        data=experiment.data,
        objective=experiment.objective,
        seed=experiment.seed,
        batch_size=experiment.batch_size_of_evaluation(),
        step=step,
        loop=state.loop,
        directory=directory_of(workdir, name),
        check_batch=experiment.check_batch,
        each_batch=each_batch,
        class_names=class_names.saved(workdir) if names is None else names,
        noise_min=experiment.noise_min,
    )


def saved_config(workdir: UPath) -> str:
    """Returns the configuration that a run has saved.

    Raises:
      ValueError: if there is none.
    """
    file = workdir / config.CONFIG_FILE
    if not file.exists():
        raise ValueError(f"{workdir} holds no run: it has no {config.CONFIG_FILE}")
    return file.read_text()


def configured(
    saved: str, gin_files: Sequence[str], gin_bindings: Sequence[str], trust_imports: Sequence[str] = ()
) -> Experiment:
    """Returns the experiment of a saved configuration, with files and bindings on top.

    Args:
      saved: the configuration. It may be somebody else's, so it may import only the modules of `trust_imports`.
      gin_files, gin_bindings: the user's own; they may import any module.
      trust_imports: names of modules.

    Raises:
      ValueError: if `saved`, or what comes on top, cannot be used.
    """
    config.parse(gin_files, gin_bindings, saved, trust_imports)
    return config.call(Experiment)


def load(
    workdir: UPath,
    gin_files: Sequence[str],
    gin_bindings: Sequence[str],
    runtime: Runtime,
    step: int | str | None = None,
    trust_imports: Sequence[str] = (),
    verify: bool = True,
) -> tuple[Experiment, State, int]:
    """Loads a run to sample from or to evaluate; see `configured` and `load_state`.

    Returns:
      The experiment as it was saved in the workdir, with files and bindings on top; its state; and its step.

    Raises:
      ValueError: if there is no run or checkpoint, or it does not fit.
    """
    experiment = configured(saved_config(workdir), gin_files, gin_bindings, trust_imports)
    return load_state(experiment, workdir, runtime, step, verify)


def load_state(
    experiment: Experiment, workdir: UPath, runtime: Runtime, step: int | str | None = None, verify: bool = True
) -> tuple[Experiment, State, int]:
    """Loads a checkpoint without its optimizer, sharded over all devices that can, whatever the run's mesh is.

    Args:
      experiment: as `configured` returns it.
      workdir: the run's.
      runtime: the devices and processes.
      step: of a complete checkpoint, or "best", see `train.keep_best`; None: the newest.
      verify: see `restore`.

    Raises:
      ValueError: if there is no such checkpoint, or it does not fit.
    """
    axis = "data" if runtime.device.type == "tpu" else "fsdp"  # see `Experiment.check_mesh`
    experiment = dataclasses.replace(experiment, mesh={axis: -1})
    step = checkpoint.find(workdir, step)
    loop = make_loop(experiment, runtime, compilation_cache(experiment, workdir))
    state = build_to_load(experiment, loop)
    return experiment, state, restore(workdir, state, step, verify)


def compilation_cache(experiment: Experiment, workdir: UPath) -> str:
    """Returns the local directory where XLA keeps compiled graphs."""
    if experiment.compilation_cache is not None:
        return experiment.compilation_cache
    if isinstance(workdir, os.PathLike):
        return os.fspath(workdir / "compilation_cache")
    return os.path.expanduser("~/.cache/jetformer/compilation_cache")

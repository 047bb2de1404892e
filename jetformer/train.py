"""What one run is: a `Run` describes it, gin fills it in, and `train` carries it out."""

import contextlib
import dataclasses
import datetime
import fcntl
import functools
import importlib.metadata
import inspect
import json
import math
import os
import platform
import re
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import gin
import numpy as np
import torch
from absl import logging
from torch import Tensor, nn
from upath import UPath

import jetformer
from jetformer import checkpoint, config, objectives, optim, prng
from jetformer.data.dataset import Data
from jetformer.evaluators import best
from jetformer.evaluators.base import Context, Evaluator, directory_of, evaluated_steps, forget, prepare
from jetformer.evaluators.better import better
from jetformer.evaluators.running import Evaluations
from jetformer.loops import steps
from jetformer.models import invertible, remat
from jetformer.models.initializers import init_weights
from jetformer.models.jetformer import JetFormer
from jetformer.models.labelled import LabelledFlow
from jetformer.models.mixture import CLUSTERED_TOKENS, MixtureHead
from jetformer.preemption import Preempted, Preemption
from jetformer.ranges import BelowOne, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from jetformer.runtime import Runtime, derive_seed, resolve_mesh
from jetformer.sampling.guidance import Guidance
from jetformer.storage import write_whole

if TYPE_CHECKING:
    from clu.metric_writers import MetricWriter

LOCK_FILE = "lock"  # in a workdir that is a local directory, locked while a run trains there
RUN_FILE = "run.json"  # in the workdir: what it runs on, and its parameters
CONFIGS_DIRECTORY = "configs"  # in the workdir: the configuration of each start, by the step that it began from
TOKENIZER_FILE = "tokenizer.model"  # in the workdir, where the experiment reads texts

# What draws of different purposes are seeded with, beside the run's seed.
_INIT = 1

# So many examples of the first batch suffice to initialize what depends on data.
_INIT_EXAMPLES = 256


class NonFiniteLoss(FloatingPointError):
    """The loss or its gradient is not a number, or infinite. The message is one line."""


@gin.configurable("train")
@dataclasses.dataclass(frozen=True)
class Run:
    """An experiment: what is trained on what, for how long, and what is written down.

    The length is given in one of three units. Constructors come uncalled (`@JetFormer`, not `@JetFormer()`): the run
    calls them where they belong, the model on the meta device first.

    Attributes:
      model: constructor of the model.
      objective: the objective.
      data: the dataset.
      optimizer: called with the model.
      schedule: called with total_steps, batch_size, data_size; gives the learning-rate factor by step.
      batch_size: examples a step, over all processes.
      total_steps, total_examples, total_epochs: how long to train.
      init_from: a run's workdir, or one of its checkpoints (…/checkpoints/000012000): begin with its weights, the
        moving average's where it has one. It is looked at before step 0 only, not where a run is resumed.
      seed: of everything random.
      grad_clip_norm: largest global norm of the gradients; None for no clipping.
      grad_accum_steps: into how many parts a batch is cut.
      ema_decay: of the moving average of the parameters, from 0 to below 1; 0 for none.
      ema_warmup: begin with a smaller decay, see `optim.warmed_up_decay`, so that short runs do not average over their
        initial parameters.
      noise_scale, noise_min: standard deviation of the RGB noise at the beginning and at the end, in 8-bit pixel
        values.
      log_steps: write training metrics every so many steps: means over the steps since, or since the run was resumed.
      evaluators: by name; those with a period of their own run in training too, see `evaluators.base.Evaluator`.
      eval_batch_size: examples a step of evaluation; None: batch_size.
      checkpoint_steps: save every so many steps, and at the end.
      keep_last: how many of the newest checkpoints to keep.
      keep_every: also keep those of steps that this divides; None: no others.
      keep_best: a metric of an evaluator, as "val/bits_per_dim", or "val_ema/bits_per_dim" with the moving average:
        also keep the checkpoint where it is best, see `evaluators.best`. A step whose evaluation in training finds a
        new best value is saved. None: no other checkpoint is kept.
      keep_best_mode: which of its values are better, "lower" or "higher"; None: what its name says.
      patience: end the run after so many evaluations in training without a new best value of keep_best; None: never.
      wandb_project: a project of Weights & Biases that figures and pictures are written to as well; None for none.
      autocast: "bfloat16" to multiply in it, with parameters, gradients and likelihoods in float32; None: in float32.
      matmul_precision: of products of float32: "highest", float32; "high", TensorFloat32 on GPUs and three bfloat16
        products on TPUs; "medium", bfloat16.
      activation_checkpointing: what is computed anew in the backward pass and not kept: "none", "blocks" of the
        decoder, "couplings" of the flow, or "everything", both.
      compile: what torch.compile compiles: "blocks" of the decoder and couplings of the flow, each by itself; "step",
        the whole forward pass; None: nothing. The image head's likelihood is compiled with either. (XLA compiles the
        whole step whatever this says.)
      mesh: over which devices: sizes of the axes "data" and "fsdp". A batch is cut up over both, large parameters over
        "fsdp"; -1 takes the rest of the devices. None: all in "data". With torchrun "data" is DDP, "fsdp" is FSDP2.
      compilation_cache: local directory where XLA keeps compiled graphs for the next start; None: in the workdir, or
        where that is at a URL, in ~/.cache/jetformer.
    """

    model: Callable[[], nn.Module]
    objective: Any
    data: Data
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    schedule: Callable[..., Callable[[int], float]]
    batch_size: PositiveInt
    total_steps: PositiveInt | None = None
    total_examples: PositiveInt | None = None
    total_epochs: PositiveFloat | None = None
    init_from: str | None = None
    seed: NonNegativeInt = 0
    grad_clip_norm: PositiveFloat | None = 1.0
    grad_accum_steps: PositiveInt = 1
    ema_decay: BelowOne = 0.0
    ema_warmup: bool = True
    noise_scale: NonNegativeFloat = 0.0
    noise_min: NonNegativeFloat = 0.0
    log_steps: PositiveInt = 50
    evaluators: Mapping[str, Evaluator] = dataclasses.field(default_factory=dict)
    eval_batch_size: PositiveInt | None = None
    checkpoint_steps: PositiveInt = 1000
    keep_last: PositiveInt = 1
    keep_every: PositiveInt | None = None
    keep_best: str | None = None
    keep_best_mode: str | None = None
    patience: PositiveInt | None = None
    wandb_project: str | None = None
    autocast: str | None = None
    matmul_precision: str = "highest"
    activation_checkpointing: str = "none"
    compile: str | None = None
    mesh: dict[str, int] | None = None
    compilation_cache: str | None = None

    def __post_init__(self):
        values = {name: getattr(self, name) for name in ("objective", "data")}
        values |= {f"evaluators[{name!r}]": value for name, value in self.evaluators.items()}
        for name, value in values.items():
            if inspect.isclass(value):
                raise ValueError(f"train.{name} is a class: write @{value.__name__}(), with parentheses")
        for name, evaluator in self.evaluators.items():
            if not isinstance(evaluator, Evaluator):
                raise ValueError(f"train.evaluators[{name!r}] = {evaluator!r}: give an evaluator, as @Likelihood()")
            if not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or name.endswith("_ema"):
                raise ValueError(
                    f"train.evaluators: {name!r} cannot be a name: use letters, digits and _.-, and no _ema at "
                    "its end, as figures with the moving average have"
                )
        if self.batch_size % self.grad_accum_steps:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide by grad_accum_steps {self.grad_accum_steps}"
            )
        if self.compilation_cache is not None and "://" in self.compilation_cache:
            raise ValueError(
                f"train.compilation_cache = {self.compilation_cache!r}: XLA writes to local directories only"
            )
        for name, choices in (
            ("autocast", (None, "bfloat16")),
            ("matmul_precision", ("highest", "high", "medium")),
            ("activation_checkpointing", remat.POLICIES),
            ("compile", (None, "blocks", "step")),
            ("keep_best_mode", (None, "lower", "higher")),
        ):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"train.{name} = {value!r}: give one of {', '.join(map(repr, choices))}")
        for name in ("keep_best_mode", "patience"):
            if self.keep_best is None and (value := getattr(self, name)) is not None:
                raise ValueError(
                    f'train.{name} = {value!r} has no metric: bind train.keep_best to one, as "val/bits_per_dim"'
                )
        if self.keep_best is not None and self.best_mode() is None:
            raise ValueError(
                f"train.keep_best = {self.keep_best!r}: its name does not say which values are better; bind "
                'train.keep_best_mode to "lower" or "higher"'
            )

    def steps(self) -> int:
        """How many steps the run has.

        Raises:
          ValueError: if no length is given, or several.
        """
        amounts = {
            "steps": self.total_steps,
            "examples": self.total_examples,
            "epochs": self.total_epochs,
        }
        data_size = None if self.total_epochs is None else self.data.num_train_examples()
        return optim.to_steps("train.total", amounts, batch_size=self.batch_size, data_size=data_size)

    def best_mode(self) -> str | None:
        """Which values of `keep_best` are better, "lower" or "higher"; None if that is not known."""
        return self.keep_best_mode or better(self.keep_best)

    def check_keep_best(self) -> None:
        """Looks whether an evaluator can give the metric `keep_best`, in training where there is a `patience`.

        Raises:
          ValueError: if none can.
        """
        if self.keep_best is None:
            return
        name = best.evaluator_of(self.keep_best)
        if name not in self.evaluators:
            raise ValueError(
                f"train.keep_best = {self.keep_best!r}: there is no evaluator {name!r}; train.evaluators has "
                f"{', '.join(self.evaluators) or 'none'}"
            )
        if self.patience is not None and self.evaluators[name].every_steps is None:
            raise ValueError(
                f"train.patience = {self.patience} counts evaluations in training, and {name!r} has none: bind its "
                "every_steps"
            )

    def is_out_of_patience(self, workdir: UPath, step: int) -> bool:
        """Returns whether the evaluations in training up to a step say that the run ends there."""
        if self.patience is None:
            return False
        every = self.evaluators[best.evaluator_of(self.keep_best)].every_steps
        # Not those of evaluation jobs: when these come is chance.
        own = {n: value for n, value in best.values(workdir, self.keep_best).items() if n <= step and n % every == 0}
        return step % every == 0 and best.evaluations_since_best(own, self.best_mode()) >= self.patience

    def check_mesh(self, runtime: Runtime) -> None:
        """Looks whether batches can be cut up over the devices.

        Raises:
          ValueError: if the mesh does not fit the devices, or the batches do not divide by them.
        """
        resolve_mesh(self.mesh, runtime.device_count)
        name = "batch_size" if self.grad_accum_steps == 1 else "batch_size / train.grad_accum_steps"
        _check_divides(name, self.batch_size // self.grad_accum_steps, runtime)
        self.check_eval_batch_size(runtime)

    def check_eval_batch_size(self, runtime: Runtime) -> None:
        """As `check_mesh`, for evaluation alone."""
        _check_divides("eval_batch_size", self.batch_size_of_evaluation(), runtime)

    def build_model(self, to_train: bool = True) -> nn.Module:
        """The model on the CPU, with initial weights (to train) that depend on the seed alone, not on the device."""
        with torch.device("meta"):
            model = config.call(self.model)
        model.to_empty(device="cpu")
        if to_train:  # else all of it comes from a checkpoint, and what it was made of may not be on this machine
            with torch.no_grad():
                init_weights(model, torch.Generator().manual_seed(derive_seed(self.seed, _INIT)))
        return model

    def check_model(self) -> nn.Module:
        """The model on the meta device, where it takes no memory and no time.

        Raises:
          ValueError: if it cannot be built.
        """
        with torch.device("meta"):
            return config.call(self.model)

    def check_guidance(self, guidance: Guidance) -> None:
        """Looks whether the model learns what guidance compares with.

        Raises:
          ValueError: if not.
        """
        if guidance.on and not self.objective.drop_labels_prob:
            raise ValueError(
                f"guidance {guidance.mode} compares with the model without text, which this one does not learn: its "
                "JetFormerObjective.drop_labels_prob is 0. Sample without guidance, or train with 0.1"
            )

    def check_order(self, text_first: bool) -> None:
        """Looks whether the model learns to make the modality that comes second: images after texts, or texts after
        images.

        Raises:
          ValueError: if not.
        """
        prob = self.objective.text_prefix_prob
        if prob == (0 if text_first else 1):
            first, second = ("texts", "images") if text_first else ("images", "texts")
            raise ValueError(
                f"the model does not learn {second} that come after {first}: its JetFormerObjective.text_prefix_prob "
                f"is {prob}"
            )

    def check_batch(self, batch: dict[str, np.ndarray]) -> None:
        """Scores a batch on the meta device, where only shapes count and nothing is computed.

        Raises:
          ValueError: if the data do not fit the model.
        """
        model = self.check_model()
        self.check_text(batch, model)
        with torch.device("meta"), torch.no_grad():
            tensors = {name: torch.tensor(array, device="meta") for name, array in batch.items()}
            keys = torch.empty(objectives.batch_size(batch), 2, dtype=torch.int32)
            draws = self.objective.draw(model, tensors, keys, train=True)
            self.objective(model, tensors, draws, noise_scale=self.noise_scale)

    @staticmethod
    def check_text(batch: dict[str, np.ndarray], model: nn.Module) -> None:
        """Looks for text tokens that the vocabulary does not have; on the host, where it costs nothing.

        Raises:
          ValueError: if there is one. (The embedding of another one would be taken, or the device would stop.)
        """
        if isinstance(model, LabelledFlow):
            labels = objectives.labels_of(batch)
            for label in (labels.min(), labels.max()):
                if not 0 <= label < model.num_labels:
                    raise ValueError(
                        f"there is a label {label} in the data, but LabelledFlow.num_labels is {model.num_labels}"
                    )
        if not hasattr(model, "first_special") or "text" not in batch:  # a flow alone reads no text
            return
        text, name = batch["text"], type(model).__name__
        if isinstance(model, JetFormer) and len({model.bos_id, model.boi_id, model.nolabel_id}) < 3:
            raise ValueError(
                f"JetFormer.bos_id = {model.bos_id}, boi_id = {model.boi_id} and nolabel_id = {model.nolabel_id}: give "
                "different tokens"
            )
        first_special = model.first_special(text.shape[1])
        for token in (text.min(), text.max()):
            if not 0 <= token < first_special:
                raise ValueError(
                    f"the data have a text token or label {token}, but {name}'s special tokens begin at "
                    f"{first_special}: {name}.bos_id and the others have to be the number of classes, or of the "
                    f"tokenizer's tokens, or more, and {name}.vocab_size more than all of them"
                )

    def build_schedule(self) -> Callable[[int], float]:
        """The learning-rate factor by step."""
        return self.schedule(self.steps(), self.batch_size, self.data.num_train_examples())

    def ema_decay_at(self, step: int) -> float:
        """The moving average's decay at a step, counted from 0."""
        return optim.warmed_up_decay(step, self.ema_decay) if self.ema_warmup else self.ema_decay

    def batch_size_of_evaluation(self) -> int:
        """Examples a step of evaluation."""
        return self.eval_batch_size or self.batch_size

    def initialize(self, model: nn.Module, runtime: Runtime) -> None:
        """Gives a new model on the CPU the weights that it begins training with, where these are not all random: those
        of `init_from`, or what ActNorms and an image head with kmeans_init are by the first batch.

        Of the batch process 0 takes as many examples as suffice and tells the others what it finds.

        Raises:
          ValueError: if there are no such weights, or they are another model's.
        """
        if self.init_from is not None:
            load_weights(self.init_from, model)
        elif invertible.needs_data(model):
            runtime.first_does(lambda: self._initialize_by_data(model))
            values = [p.data for p in invertible.parameters_from_data(model)]
            found = runtime.of_first(values if runtime.process_index == 0 else None)
            for value, theirs in zip(values, found, strict=True):
                value.copy_(theirs)
        heads = [module for module in model.modules() if isinstance(module, MixtureHead)]
        if runtime.process_index == 0 and any(head.num_mixtures > 1 and head.components_equal() for head in heads):
            remedy = "set JetFormer.kmeans_init, or JetFormer.mean_init_std above 0"
            if self.init_from is not None:
                remedy = f"they are so in {self.init_from}, whose weights JetFormer.kmeans_init does not change"
            logging.warning(
                "All %d components of the image head are equal, and training does not tell them apart, as one "
                "Gaussian: %s",
                heads[0].num_mixtures,
                remedy,
            )

    def _initialize_by_data(self, model: nn.Module) -> None:
        from jetformer.data.pipeline import peek  # it brings TensorFlow

        of_jetformer = isinstance(model, JetFormer)
        count = math.ceil(CLUSTERED_TOKENS / model.num_image_tokens) if of_jetformer else _INIT_EXAMPLES
        with closing(self.data.train_batches(batch_size=self.batch_size, seed=self.seed)) as batches:
            first_batch, _ = peek(batches, "the training split")
        self.check_batch(first_batch)
        batch = {name: torch.tensor(array[:count]) for name, array in first_batch.items()}
        examples = torch.arange(objectives.batch_size(batch), dtype=torch.int32)
        draws = self.objective.draw(model, batch, prng.example_keys(derive_seed(self.seed, 0), examples), train=True)
        with invertible.initializing(model):
            if not of_jetformer:
                self.objective(model, batch, draws, noise_scale=self.noise_scale)
                return
            encoded = self.objective.encode(model, batch, draws, noise_scale=self.noise_scale)
            if isinstance(model.image_head, MixtureHead) and model.image_head.kmeans_init:
                model.image_head.start_at_clusters(encoded.tokens.flatten(0, 1))

    def build_state(
        self, runtime: Runtime, to_train: bool = True, initialize: Callable[[nn.Module], None] = lambda model: None
    ) -> "State":
        """Model, optimizer (to train) and moving average at step 0; `initialize` is called with the model while it is
        on the CPU. What is not to be trained has no weights yet."""
        loop = loop_of(runtime)
        model = self.build_model(to_train)
        initialize(model)
        remat.set_policy(model, self.activation_checkpointing)
        runner = loop.place(model, runtime, mesh=self.mesh, compile=self.compile, autocast_dtype=self.autocast)
        optimizer = None
        if to_train:
            optimizer = self.optimizer(model)
            loop.place_state(x for state in optimizer.state.values() for x in state.values())
        ema = None
        if self.ema_decay:
            ema = {name: p.detach().clone() for name, p in model.named_parameters()}
            loop.place_state(ema.values())
        return State(runner, optimizer, ema, loop.exchange)


@dataclasses.dataclass
class State:
    """What training changes: the model in its runner, its optimizer (None: it is not to be trained), and the moving
    average of its parameters (None: there is none), with how the loop exchanges these two."""

    runner: steps.Runner
    optimizer: torch.optim.Optimizer | None
    ema: dict[str, Tensor] | None
    exchange: Callable[[nn.Module, dict[str, Tensor]], None]

    @property
    def model(self) -> nn.Module:
        return self.runner.model

    def tensors(self) -> dict[str, Any]:
        """All of it as nested dictionaries of tensors, to save and to restore in place."""
        state = {"model": self.model.state_dict()}
        if self.optimizer is not None:
            state["optimizer"] = optim.state_tensors(self.optimizer, self.model)
        if self.ema is not None:
            state["ema"] = self.ema
        return state

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Puts the moving average in the place of the parameters while the context lasts, if there is one."""
        if self.ema is None:
            yield
            return
        self.exchange(self.model, self.ema)
        try:
            yield
        finally:
            self.exchange(self.model, self.ema)


def loop_of(runtime: Runtime) -> ModuleType:
    """The loop for the devices: `loops.xla_loop` or `loops.torch_loop`, which have the same functions."""
    if runtime.device.type == "xla":
        from jetformer.loops import xla_loop as loop
    else:
        from jetformer.loops import torch_loop as loop
    return loop


def load_weights(path: str, model: nn.Module) -> None:
    """Loads the weights of another run into a model on the CPU: those of the moving average, where it has one.

    Args:
      path: the run's workdir, whose newest checkpoint counts, or one of its checkpoints.
      model: the model.

    Raises:
      ValueError: if there is no checkpoint, or it is of another architecture.
    """
    workdir, step = UPath(path.rstrip("/")), None
    if workdir.name.isdigit() and workdir.parent.name == "checkpoints":
        workdir, step = workdir.parent.parent, int(workdir.name)
    if step is None and (step := checkpoint.latest(workdir)) is None:
        raise ValueError(f"train.init_from = {path!r}: there is no complete checkpoint")
    info = checkpoint.verify(workdir, step)["info"]
    _check_architecture(f"train.init_from = {path!r}", info, "begin with another")
    checkpoint.load_weights(workdir, step, model.state_dict())
    logging.info("Weights of step %d of %s", step, workdir)


def _check_architecture(what: str, info: Mapping[str, Any], remedy: str) -> None:
    """Compares the architecture that a checkpoint's `info` says it is of with this run's."""
    ours = config.architecture()
    for name, value in info.get("architecture", {}).items():
        if ours.get(name) != value:
            raise ValueError(
                f"{what} holds a run with another architecture: its {name} is {value}, this one's {ours.get(name)}; "
                f"{remedy}, or use that run's configuration"
            )


def restore(workdir: UPath, state: State, runtime: Runtime, step: int | None = None, verify: bool = True) -> int:
    """Restores a complete checkpoint of the workdir into `state`: that of `step`, or the newest; returns its step, 0 if
    there is none.

    The checkpoint may come from other devices, and from more or fewer of them. Its files' checksums are compared first
    (`verify`), each process those of its share of the files.

    Raises:
      ValueError: if the checkpoint is damaged or of another architecture.
    """
    if step is None and (step := checkpoint.latest(workdir)) is None:
        return 0
    _check_architecture(str(workdir), checkpoint.verify(workdir, step)["info"], "use another --workdir")
    if verify:
        checkpoint.verify_checksums(workdir, step, runtime.process_index, runtime.process_count)
    tensors = state.tensors()
    to_train = state.optimizer is not None
    starts_average = to_train and state.ema is not None and "ema" not in checkpoint.parts(workdir, step)
    if starts_average:
        logging.warning("The moving average begins at step %d: the checkpoint has none", step)
        del tensors["ema"]
        parameters = {"model": tensors["model"] | state.ema}
        checkpoint.restore(workdir, step, parameters, loop_of(runtime).load_planner())
    checkpoint.restore(workdir, step, tensors, loop_of(runtime).load_planner())
    return step


def train(run: Run, workdir: UPath, runtime: Runtime, allow_changes: bool = False, verify: bool = True) -> None:
    """Trains, from the newest complete checkpoint in `workdir` if there is one.

    Everything a user can get wrong is looked at before the first step and before anything is written. Once there is
    something to lose, in a run that is resumed or goes on, an evaluator that fails is said in one line and training
    goes on to its end.

    Where a run is resumed, every binding that differs from the last start's is logged. A run that is complete, or was
    stopped by its patience, changes no file, but for evaluations that it lacks.

    Args:
      run: the experiment.
      workdir: where the run is written to and resumed from.
      runtime: the devices and processes.
      allow_changes: resume also with another seed or batch size than the run's so far.
      verify: compare the checksums of the checkpoint that the run resumes from.

    Raises:
      ValueError: for a configuration, a dataset or a workdir that cannot be used; at the end, if evaluations failed.
      NonFiniteLoss: if the loss stops being finite; the last checkpoint is from before.
      Preempted: on SIGTERM, SIGINT or SIGHUP, after saving.
    """
    from jetformer import metrics  # this and the data bring TensorFlow
    from jetformer.data.pipeline import peek

    loop = loop_of(runtime)
    run.check_mesh(runtime)
    run.check_keep_best()
    run.check_model()
    prepare(run.data, runtime)
    total_steps = run.steps()
    schedule = run.build_schedule()
    curriculum = functools.partial(
        optim.noise_curriculum,
        total_steps=total_steps,
        noise_scale=run.noise_scale,
        noise_min=run.noise_min,
    )
    loop.set_up(run.mesh, _compilation_cache(run, workdir), run.matmul_precision)
    in_training = {name: e for name, e in run.evaluators.items() if e.every_steps is not None}
    latest = runtime.of_first(checkpoint.latest(workdir))
    ended = latest is not None and _saved_facts(workdir).get("stopped_at") == latest
    complete = latest == total_steps or runtime.of_first(ended and run.is_out_of_patience(workdir, latest))
    if latest is not None:
        _check_changes(run, workdir, latest, allow_changes or complete)
    if complete and runtime.of_first(all(latest in evaluated_steps(workdir, name) for name in in_training)):
        runtime.first_does(lambda: checkpoint.verify(workdir, latest))
        logging.info("The run in %s is already complete at step %d: nothing to do", workdir, latest)
        return
    initialize = (lambda model: None) if latest is not None else functools.partial(run.initialize, runtime=runtime)
    state = run.build_state(runtime, initialize=initialize)
    start_step = restore(workdir, state, runtime, verify=verify)
    runtime.agree_on("the step to go on from", start_step)
    if start_step > total_steps:
        raise ValueError(
            f"{workdir} holds a run that is at step {start_step} already, and this one ends at {total_steps}: "
            "train for longer, or use another --workdir"
        )
    processes = {
        "process_index": runtime.process_index,
        "process_count": runtime.process_count,
    }
    batches = run.data.train_batches(batch_size=run.batch_size, seed=run.seed, start_step=start_step, **processes)
    first_batch, batches = peek(batches, "the training split")
    run.check_batch(first_batch)
    evaluations = Evaluations(runtime)
    check = evaluations.check if start_step == 0 else evaluations.try_check
    for name in in_training:
        check(name, context(run, state, start_step, name, workdir, runtime))
    checkpointer = checkpoint.Checkpointer(
        workdir, keep_last=run.keep_last, keep_every=run.keep_every, **loop.checkpointing()
    )

    lock = contextlib.ExitStack()

    def begin() -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        if isinstance(workdir, os.PathLike):
            lock.enter_context(_locked(workdir))
            if checkpoint.latest(workdir) != latest:
                raise ValueError(f"another process has trained in {workdir} in the meantime: start again")
        if complete:  # what it was trained with stays written down
            return
        start_steps = [*_saved_facts(workdir).get("start_steps", []), start_step]
        facts = _facts(run, state.model, runtime) | {"start_steps": start_steps}
        write_whole(workdir / RUN_FILE, json.dumps(facts, indent=1))
        _keep_config(workdir, start_step)
        config.save(workdir)  # after it, for a job that follows: a run that is to last longer has not ended
        if run.data.has_texts():  # a workdir is all that sampling needs, wherever it is copied to
            (workdir / TOKENIZER_FILE).write_bytes(run.data.texts().tokenizer.serialized())
        # After run.json, by which a job that evaluates such a step now finds out, and records nothing.
        forget(workdir, start_step)
        if run.keep_best is None:
            best.record_again(workdir)  # an evaluation job's
        else:
            best.record(workdir, run.keep_best, run.best_mode())

    runtime.first_does(begin)
    written = metrics.Metrics(
        workdir, runtime.process_index, run.wandb_project, start_step=start_step, total_steps=total_steps
    )
    writer = written.writer
    writer.write_texts(start_step, {"config": _markdown(gin.operative_config_str())})
    metrics.log_parameters(state.model)
    logging.info(
        "Training on %s for %d steps (%.1f epochs of %d examples), from step %d.",
        runtime.describe(),
        total_steps,
        total_steps * run.batch_size / run.data.num_train_examples(),
        run.data.num_train_examples(),
        start_step,
    )

    if run.ema_decay and not run.ema_warmup and (share := run.ema_decay**total_steps) > 0.05:
        logging.warning(
            "At the end, step %d, the moving average will hold %.0f%% of the initial parameters: lower train.ema_decay "
            "= %s, or set train.ema_warmup",
            total_steps,
            100 * share,
            run.ema_decay,
        )

    progress = metrics.create_progress(writer, total_steps)
    meter = _Meter(run, state.model, loop, writer)
    training = loop.train_steps(
        runner=state.runner,
        objective=run.objective,
        optimizer=state.optimizer,
        ema=state.ema,
        batches=_checked(run, state.model, batches),
        start_step=start_step,
        total_steps=total_steps,
        schedule=schedule,
        noise_curriculum=curriculum,
        runtime=runtime,
        seed=run.seed,
        grad_clip_norm=run.grad_clip_norm,
        grad_accum_steps=run.grad_accum_steps,
        ema_decay=run.ema_decay_at,
        autocast_dtype=run.autocast,
    )
    done = saved = start_step
    last_step = total_steps
    decides = None if run.keep_best is None else best.evaluator_of(run.keep_best)

    def save() -> None:
        nonlocal saved
        meter.check()  # what is not finite is not saved
        with meter.paused(), progress.timed("checkpoint", wait_jax_async_dispatch=False):
            written.publish()  # before the checkpoint: what it holds is not written again after a kill
            checkpointer.save(done, state.tensors(), info={"architecture": config.architecture()})
        saved = done

    def evaluate_due(number: int, missing: bool = False) -> None:
        for name, evaluator in in_training.items():
            due = number == last_step or number % evaluator.every_steps == 0
            if not due or evaluations.given_up(name, number):
                continue
            if missing and runtime.of_first(number in evaluated_steps(workdir, name)):
                continue
            meter.check()
            given = context(run, state, number, name, workdir, runtime, preemption.check)
            with meter.paused(), progress.timed(f"eval_{name}", wait_jax_async_dispatch=False):
                if not evaluations.evaluate(name, given, lambda: written):
                    preemption.catch_up()
            if name == decides and saved < number and runtime.of_first(is_best(number)):
                save()

    def is_best(number: int) -> bool:
        """Of the steps that have a checkpoint, the one that is being written included, and this one."""
        among = {*checkpoint.steps(workdir), saved, number}
        return next((step for step in checkpoint.ranked(workdir) if step in among), None) == number

    def stop_early() -> bool:
        """Ends the run after this step, if its patience is over; returns whether that is so."""
        nonlocal last_step
        if run.patience is None or done == total_steps or done % in_training[decides].every_steps:
            return False
        if not runtime.of_first(run.is_out_of_patience(workdir, done)):
            return False
        last_step = done
        if saved < done:
            save()
        evaluate_due(done, missing=True)  # those that come at the end
        facts = lambda: json.dumps(_saved_facts(workdir) | {"stopped_at": done}, indent=1)
        runtime.first_does(lambda: write_whole(workdir / RUN_FILE, facts()))
        logging.info(
            "Stopped early after step %d of %d, as train.patience says: %d evaluation(s) without a better %s",
            *(done, total_steps, run.patience, run.keep_best),
        )
        return True

    with Preemption() as preemption, closing(training):
        try:
            if start_step > 0:  # what was saved, and not evaluated any more
                evaluate_due(start_step, missing=True)
            # A run that was killed as it stopped takes no step more.
            for step in () if stop_early() else training:
                done = step.number
                meter.update(step)
                if done == total_steps or done % run.log_steps == 0:
                    meter.log(step)
                preemption.check()
                if done == total_steps or done % run.checkpoint_steps == 0:
                    save()
                evaluate_due(done)
                progress(done)
                if stop_early():
                    break
        except Preempted as stopped:
            if saved < done:
                save()
            logging.info("Stopped on %s after step %d, which is saved.", stopped.signal.name, done)
            raise
        finally:  # a run that stops halfway keeps what it has written
            try:
                checkpointer.wait()
            finally:
                meter.close()
                written.close()
                lock.close()
    if evaluations.failures:
        runtime.of_all(None)  # have written all: where one process ends with an error, its launcher stops the others
        raise ValueError(f"the run is complete, but {evaluations.summary()}")


def _saved_facts(workdir: UPath) -> dict[str, Any]:
    """What the last start of the run in a workdir has written down, see `_facts`; nothing, if it has not been started.

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


@contextmanager
def _locked(workdir: UPath) -> Iterator[None]:
    """Locks a workdir while the context lasts; whatever ends the process, the operating system unlocks it then.

    Raises:
      ValueError: if another process has locked it.
    """
    with (workdir / LOCK_FILE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = _saved_facts(workdir).get("owner", {})
            raise ValueError(
                f"another process trains in {workdir}: {owner.get('pid')} on {owner.get('host')}, since "
                f"{owner.get('since')}: wait for it, end it, or use another --workdir"
            ) from error
        except OSError as error:  # not every network's file system can
            logging.warning("%s is not locked (%s): see to it that nothing else trains there", workdir, error)
        yield


def _check_changes(run: Run, workdir: UPath, step: int, allowed: bool) -> None:
    """Logs what is bound otherwise than at the last start of a run, which is at `step`.

    Raises:
      ValueError: if another seed or batch size is not `allowed`: from `step` on other batches would follow.
    """
    saved = _saved_facts(workdir)
    for name in ("seed", "batch_size"):
        before, now = saved.get(name), getattr(run, name)
        if not allowed and before not in (None, now):
            raise ValueError(
                f"train.{name} = {now}, but the run in {workdir} has come to step {step} with {before}: bind {before}, "
                "use another --workdir, or resume with --allow_changes"
            )
    now = config.bindings()
    if "bindings" not in saved and run.ema_decay and run.ema_warmup:
        logging.warning(
            "The run is of a version without train.ema_warmup: bind it to False for a moving average as before"
        )
    before = saved.get("bindings", now)
    for name in sorted(before.keys() | now.keys()):
        theirs, ours = before.get(name, "not bound"), now.get(name, "not bound")
        if theirs != ours:
            logging.warning("Other than at the last start: %s = %s, was %s", name, ours, theirs)


def _keep_config(workdir: UPath, start_step: int) -> None:
    """Keeps the configuration of the steps from `start_step` on beside those of the steps before."""
    directory = workdir / CONFIGS_DIRECTORY
    directory.mkdir(exist_ok=True)
    for file in directory.glob("*.gin"):
        if int(file.stem) > start_step:  # of steps that come again
            file.unlink()
    write_whole(directory / f"{start_step:09d}.gin", gin.config_str())


def _facts(run: Run, model: nn.Module, runtime: Runtime) -> dict[str, Any]:
    """What a reader of the run may want to know that its configuration does not say."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "jetformer": jetformer.__version__}
    if runtime.device.type == "xla":
        versions["torch_xla"] = importlib.metadata.version("torch_xla")
    return {
        "device": runtime.describe(),
        "device_count": runtime.device_count,
        "process_count": runtime.process_count,
        "versions": versions,
        "total_steps": run.steps(),
        "batch_size": run.batch_size,
        "seed": run.seed,
        "owner": {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        },
        "bindings": config.bindings(),
        "train_examples": run.data.num_train_examples(),
        "parameters": [
            {"name": name, "shape": list(p.shape), "dtype": str(p.dtype).removeprefix("torch."), "size": p.numel()}
            for name, p in model.named_parameters()
        ],
    }


def _compilation_cache(run: Run, workdir: UPath) -> str:
    """A local directory, for XLA writes to no other place."""
    if run.compilation_cache is not None:
        return run.compilation_cache
    if isinstance(workdir, os.PathLike):
        return os.fspath(workdir / "compilation_cache")
    return os.path.expanduser("~/.cache/jetformer/compilation_cache")


def context(
    run: Run,
    state: State,
    step: int,
    name: str,
    workdir: UPath,
    runtime: Runtime,
    each_batch: Callable[[], None] = lambda: None,
) -> Context:
    """What the evaluator `name` is given at a step."""
    return Context(
        run=run,
        state=state,
        step=step,
        runtime=runtime,
        loop=loop_of(runtime),
        directory=directory_of(workdir, name),
        each_batch=each_batch,
    )


def saved_config(workdir: UPath) -> str:
    """The configuration that a run has saved.

    Raises:
      ValueError: if there is none.
    """
    file = workdir / config.CONFIG_FILE
    if not file.exists():
        raise ValueError(f"{workdir} holds no run: it has no {config.CONFIG_FILE}")
    return file.read_text()


def configured(
    saved: str, gin_files: Sequence[str], gin_bindings: Sequence[str], trust_imports: Sequence[str] = ()
) -> Run:
    """The experiment of a configuration that a run has saved, with files and bindings on top.

    The saved one may be from somebody else: it may import no modules but those of `trust_imports`. What comes on top is
    the user's own, and may.

    Raises:
      ValueError: if it, or what comes on top, cannot be used.
    """
    config.check_runs_nothing(saved, trust_imports)
    with tempfile.NamedTemporaryFile("w", suffix=".gin") as copy:  # gin reads local files
        copy.write(saved)
        copy.flush()
        config.parse([copy.name, *gin_files], gin_bindings)
    return config.call(Run)


def load(
    workdir: UPath,
    gin_files: Sequence[str],
    gin_bindings: Sequence[str],
    runtime: Runtime,
    step: int | str | None = None,
    trust_imports: Sequence[str] = (),
    verify: bool = True,
) -> tuple[Run, State, int]:
    """The experiment that a workdir holds, as it was saved there, with files and bindings on top; its state at a
    complete checkpoint (that of `step`, the "best" one, or the newest); and the step of that. See `configured` and
    `restore`.

    Raises:
      ValueError: if there is none, or it does not fit.
    """
    run = configured(saved_config(workdir), gin_files, gin_bindings, trust_imports)
    return load_state(run, workdir, runtime, step, verify)


def load_state(
    run: Run, workdir: UPath, runtime: Runtime, step: int | str | None = None, verify: bool = True
) -> tuple[Run, State, int]:
    """As `load`, of an experiment that has been read: laid out over the devices of this job, whatever the run's mesh
    is, and without an optimizer.

    Raises:
      ValueError: if there is no such checkpoint, or it does not fit.
    """
    run = dataclasses.replace(run, mesh={"fsdp": -1})
    steps = checkpoint.steps(workdir)
    if not steps:
        raise ValueError(f"{workdir} has no complete checkpoint")
    if step == "best":
        step = checkpoint.best(workdir)
    if step is not None and step not in steps:
        raise ValueError(f"{workdir} has no complete checkpoint of step {step}, but of {', '.join(map(str, steps))}")
    loop_of(runtime).set_up(run.mesh, _compilation_cache(run, workdir), run.matmul_precision)
    state = run.build_state(runtime, to_train=False)
    return run, state, restore(workdir, state, runtime, step, verify)


def _checked(run: Run, model: nn.Module, batches: Iterator[dict[str, np.ndarray]]):
    """Batches whose text was looked at."""
    for batch in batches:
        run.check_text(batch, model)
        yield batch


class _Meter:
    """Collects what the steps between two logs leave behind, writes it, and watches that the loss is finite.

    What was measured is brought to the host in a thread of its own: training goes on meanwhile.
    """

    def __init__(self, run: Run, model: nn.Module, loop: ModuleType, writer: "MetricWriter"):
        self._run, self._model, self._loop, self._writer = run, model, loop, writer
        self._thread = ThreadPoolExecutor(1)
        self._pending: list[Future] = []
        self._since = time.perf_counter()
        self._steps: list[steps.Step] = []

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out of the throughput what is done while the context lasts."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def update(self, step: steps.Step) -> None:
        """Takes in a step, without waiting for the device."""
        self._steps.append(step)

    def check(self) -> None:
        """Waits for what was measured so far.

        Raises:
          NonFiniteLoss: if a term of the loss, or the norm of its gradient, was not finite at some step.
        """
        if self._steps:
            self._pending.append(self._thread.submit(self._to_host, list(self._steps)))
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()

    def log(self, last: steps.Step) -> None:
        """Writes training metrics since the last call, once the device has them.

        Raises:
          NonFiniteLoss: see `check`; for what earlier calls have brought to the host.
        """
        # What was measured for the last log is there by now, and processes that wait for it stop at the same step.
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()
        norm = self._loop.global_norm(self._model.parameters())
        self._pending.append(self._thread.submit(self._write, list(self._steps), last, norm, self._since))
        self._steps, self._since = [], time.perf_counter()

    def close(self) -> None:
        """Waits for what is being written."""
        self._thread.shutdown()

    def _to_host(self, measured: list[steps.Step]) -> np.ndarray:
        """`[N, 2, n]`: see `steps.Step.values`."""
        values = self._loop.to_host([step.values for step in measured])
        finite = np.isfinite(values[:, 0])
        if not finite.all():
            first = int((~finite).any(axis=1).argmax())
            terms = ", ".join(
                dict.fromkeys(name for name, ok in zip(measured[first].names, finite[first], strict=True) if not ok)
            )
            # A gradient may be infinite where the loss is not; the parameters are no numbers then.
            raise NonFiniteLoss(
                f"not finite at step {measured[first].number}: {terms}. The last checkpoint is from before; lower the "
                "learning rate, or look at the batch of that step"
            )
        return values

    def _write(self, measured: list[steps.Step], last: steps.Step, norm: Tensor, since: float) -> None:
        means = steps.means(last.names, self._to_host(measured))
        grad_norm = means.pop("grad_norm")
        param_norm = self._loop.to_host([norm]).item()
        elapsed = time.perf_counter() - since
        scalars = {f"train/{name}": value for name, value in means.items()}
        scalars |= {
            "grad_norm": grad_norm,
            "param_norm": param_norm,
            "learning_rate": last.learning_rate,
            "noise_scale": last.noise_scale,
            "examples_per_sec": len(measured) * self._run.batch_size / elapsed,
        }
        for name in last.seconds:
            scalars[f"{name}_fraction"] = sum(step.seconds[name] for step in measured) / elapsed
        self._writer.write_scalars(last.number, scalars | self._loop.counters())


def _check_divides(name: str, size: int, runtime: Runtime) -> None:
    if size % runtime.device_count:
        raise ValueError(
            f"train.{name} = {size} does not divide by the {runtime.device_count} devices of the mesh: take a multiple"
        )


def _markdown(text: str) -> str:
    """Preformatted, for TensorBoard."""
    return "\n".join(f"    {line}" for line in text.splitlines())


if __name__ == "__main__":
    sys.exit("jetformer.train is a library; the program that trains is jetformer.main")

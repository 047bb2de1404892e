"""What one run is: an `Experiment` describes it, and gin fills it in (as `train.…`)."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import gin
import numpy as np
import torch
from torch import nn

from jetformer import config, objectives, optim
from jetformer.data.dataset import Data
from jetformer.evaluators import best
from jetformer.evaluators.base import Evaluator
from jetformer.evaluators.better import better
from jetformer.models import remat
from jetformer.models.jetformer import JetFormer
from jetformer.models.labelled import LabelledFlow
from jetformer.ranges import BelowOne, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from jetformer.runtime import Runtime, resolve_mesh


@gin.configurable("train")
@dataclasses.dataclass(frozen=True)
class Experiment:
    """Describes a run: the model, the data, the length, and what is saved and evaluated.

    The length is given in one of three units. Constructors come uncalled (`@JetFormer`, not `@JetFormer()`): they are
    called where they belong, the model first on the meta device.

    Attributes:
      model: constructor of the model.
      objective: the training objective, see `jetformer.objectives`.
      data: the dataset.
      optimizer: called with the model.
      schedule: called with total_steps, batch_size, data_size; returns the learning-rate factor by step.
      batch_size: examples a step, over all processes.
      total_steps, total_examples, total_epochs: length of the run.
      init_from: a run's workdir, or one of its checkpoints (…/checkpoints/000012000), to start from its weights: those
        of its moving average if it has one. Students of a flow start anew if that run has none. Read before step 0
        only, not when a run resumes.
      seed: of everything random.
      grad_clip_norm: largest global norm of the gradients; None for no clipping.
      grad_accum_steps: number of parts that a batch is split into.
      ema_decay: of the moving average of the parameters, from 0 to below 1; 0 for none.
      ema_warmup: start with a smaller decay, see `optim.warmed_up_decay`, so that short runs do not average over their
        initial parameters.
      noise_scale, noise_min: standard deviation of the RGB noise at the start and at the end, in 8-bit pixel values.
      log_steps: period of the training metrics, which are means over the steps since, or since the run resumed.
      evaluators: by name. Those with a period of their own also run during training, see
        `evaluators.base.Evaluator`.
      eval_batch_size: examples a step of evaluation; None: batch_size.
      checkpoint_steps: period of the checkpoints; the last step has one, too.
      keep_last: number of the newest checkpoints to keep.
      keep_every: also keep the checkpoints of its multiples; None: no others.
      keep_best: metric of an evaluator, as "val/bits_per_dim", or "val_ema/bits_per_dim" with the moving average: also
        keep the checkpoint where it is best, see `evaluators.best`. An evaluation during training that finds a new best
        value saves its step. None: no other checkpoint is kept.
      keep_best_mode: which values of keep_best are better, "lower" or "higher"; None: as its name implies.
      patience: stop the run after this many evaluations during training without a new best value of keep_best; None:
        never.
      expected: metrics of evaluators and their values to expect at the end of the run, logged beside the results.
      wandb_project: project of Weights & Biases that gets metrics and images, too; None for none.
      autocast: "bfloat16" to multiply in it, with parameters, gradients and likelihoods in float32; None: in float32.
      matmul_precision: of products of float32: "highest", float32; "high", TensorFloat32 on GPUs and three bfloat16
        products on TPUs; "medium", bfloat16.
      activation_checkpointing: what the backward pass recomputes: "none", "blocks" of the decoder, "couplings" of the
        flow, or "everything", both.
      activation_checkpointing_every: recompute only every so many of these blocks: less time, more memory.
      compile: what torch.compile compiles: "blocks", every module with `is_block = True` by itself; "step", the whole
        forward pass but the image head's likelihood; None: nothing. (XLA always compiles the whole step.)
      mesh: sizes of the axes "data" and "fsdp" of the device mesh. Batches are sharded over both, large parameters over
        "fsdp"; -1 takes the remaining devices. None: all in "data". With torchrun "data" is DDP, "fsdp" is FSDP2.
      compilation_cache: local directory where XLA keeps compiled graphs for the next start; None: in the workdir, or in
        ~/.cache/jetformer if that is at a URL.
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
    expected: Mapping[str, NonNegativeFloat] = dataclasses.field(default_factory=dict)
    wandb_project: str | None = None
    autocast: str | None = None
    matmul_precision: str = "highest"
    activation_checkpointing: str = "none"
    activation_checkpointing_every: PositiveInt = 1
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
                raise ValueError(f"train.evaluators[{name!r}] = {evaluator!r}: expected an evaluator, as @Likelihood()")
            if not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or name.endswith("_ema"):
                raise ValueError(
                    f"train.evaluators: {name!r} is not a valid name: use letters, digits and _.-, and do not "
                    "end it in _ema, which names metrics of the moving average"
                )
        if self.batch_size % self.grad_accum_steps:
            raise ValueError(
                f"train.batch_size = {self.batch_size} is not a multiple of grad_accum_steps = {self.grad_accum_steps}"
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
                raise ValueError(f"train.{name} = {value!r}: expected one of {', '.join(map(repr, choices))}")
        if self.activation_checkpointing == "none" and self.activation_checkpointing_every > 1:
            raise ValueError(
                f"train.activation_checkpointing_every = {self.activation_checkpointing_every} needs "
                "train.activation_checkpointing: bind it, as to 'everything'"
            )
        for name in ("keep_best_mode", "patience"):
            if self.keep_best is None and (value := getattr(self, name)) is not None:
                raise ValueError(
                    f'train.{name} = {value!r} needs a metric: bind train.keep_best, as to "val/bits_per_dim"'
                )
        if self.keep_best is not None and self.best_mode() is None:
            raise ValueError(
                f"train.keep_best = {self.keep_best!r}: its name does not imply which values are better: bind "
                'train.keep_best_mode to "lower" or "higher"'
            )

    def steps(self) -> int:
        """Returns the number of steps of the run.

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
        """Returns which values of `keep_best` are better, "lower" or "higher"; None if unknown, or without it."""
        return self.keep_best_mode or (self.keep_best and better(self.keep_best))

    def check_keep_best(self) -> None:
        """Checks that an evaluator can return the metric `keep_best`, during training if there is a `patience`.

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
                f"train.patience = {self.patience} counts evaluations during training, and {name!r} has none: bind "
                "its every_steps"
            )

    def check_mesh(self, runtime: Runtime) -> None:
        """Checks that batches can be sharded over the devices.

        Raises:
          ValueError: if the mesh does not fit the devices, or the batches do not divide by them.
        """
        sizes = resolve_mesh(self.mesh, runtime.device_count)
        if sizes["fsdp"] > 1 and runtime.device.type == "tpu":
            raise ValueError(
                f"train.mesh = {self.mesh}: --device=tpu shards no parameters: leave out 'fsdp', or use --device=xla"
            )
        name = "batch_size" if self.grad_accum_steps == 1 else "batch_size / train.grad_accum_steps"
        _check_divides(name, self.batch_size // self.grad_accum_steps, runtime)
        self.check_eval_batch_size(runtime)

    def check_eval_batch_size(self, runtime: Runtime) -> None:
        """As `check_mesh`, for evaluation alone."""
        _check_divides("eval_batch_size", self.batch_size_of_evaluation(), runtime)

    def check_model(self) -> nn.Module:
        """Returns the model on the meta device, where it takes no memory and no time.

        Raises:
          ValueError: if it cannot be built.
        """
        with torch.device("meta"):
            return config.call(self.model)

    def check_batch(self, batch: dict[str, np.ndarray]) -> None:
        """Checks a batch by scoring it on the meta device, which computes shapes only.

        Raises:
          ValueError: if the data do not fit the model.
        """
        model = self.check_model()
        if isinstance(model, JetFormer) and len({model.bos_id, model.boi_id, model.nolabel_id}) < 3:
            raise ValueError(
                f"JetFormer.bos_id = {model.bos_id}, boi_id = {model.boi_id} and nolabel_id = {model.nolabel_id} must "
                "differ"
            )
        self.check_text(batch, model)
        with torch.device("meta"), torch.no_grad():
            tensors = {name: torch.tensor(array, device="meta") for name, array in batch.items()}
            keys = torch.empty(objectives.batch_size(batch), 2, dtype=torch.int32)
            draws = self.objective.draw(model, tensors, keys, train=True)
            self.objective(model, tensors, draws, noise_scale=max(self.noise_scale, self.noise_min))

    @staticmethod
    def check_text(batch: dict[str, np.ndarray], model: nn.Module) -> None:
        """Checks on the host that labels and text tokens are in the vocabulary; see `objectives.check_tokens`."""
        name = type(model).__name__
        if isinstance(model, LabelledFlow):
            remedy = f": set {name}.num_labels above all labels of the data"
            objectives.check_tokens(objectives.labels_of(batch)[:, None], model, remedy)
        elif hasattr(model, "first_special") and "text" in batch:  # a flow alone reads no text
            remedy = (
                f", below its special tokens: set {name}.bos_id and the others to at least the number of classes, or "
                f"of the tokenizer's tokens, and {name}.vocab_size above all of them"
            )
            objectives.check_tokens(batch["text"], model, remedy)

    def build_schedule(self) -> Callable[[int], float]:
        """Returns the learning-rate factor by step."""
        return self.schedule(self.steps(), self.batch_size, self.data.num_train_examples())

    def ema_decay_at(self, step: int) -> float:
        """Returns the decay of the moving average at a step, counted from 0."""
        return optim.warmed_up_decay(step, self.ema_decay) if self.ema_warmup else self.ema_decay

    def batch_size_of_evaluation(self) -> int:
        """Returns the number of examples a step of evaluation, over all processes."""
        return self.eval_batch_size or self.batch_size


def _check_divides(name: str, size: int, runtime: Runtime) -> None:
    if size % runtime.device_count:
        raise ValueError(f"train.{name} = {size} is not a multiple of the {runtime.device_count} devices of the mesh")

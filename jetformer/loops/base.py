"""The interface of a training loop, and the computation of one training step.

`TorchLoop` drives the devices of `runtime.DEVICE_TYPES`, `XlaLoop` those of torch_xla. Each shows what is its own:
placing a model on devices, feeding batches, synchronizing gradients, cutting off graphs. What a step computes stands
here, once.

Dimensions: B batch of a process (with XLA: of all devices), N examples or steps, n entries of packed metrics.
"""

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jetformer import objectives, optim, prng
from jetformer.models.mixture import count_components
from jetformer.runtime import Runtime, derive_seed

# A function that `Loop.per_example` calls with the model, a batch and its examples' keys int32 [B, 2]. It returns
# tensors [B, ...] by name.
Function = Callable[[nn.Module, dict[str, Tensor], Tensor], dict[str, Tensor]]
# Arrays [N, ...] by name, over N examples.
Rows = dict[str, np.ndarray]


class Runner(nn.Module):
    """Calls a function with a model: the module that DDP, FSDP2 and torch.compile wrap.

    An objective calls several methods of a model. To a wrapper they have to be one forward pass.

    Attributes:
      model: the model.
      compiled: what torch.compile compiles in training, see `train.compile`.
    """

    def __init__(self, model: nn.Module, compiled: str | None = None):
        super().__init__()
        self.model, self.compiled = model, compiled

    def forward(self, function: Callable, *args, **kwargs):
        return function(self.model, *args, **kwargs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """Inputs of `Loop.train_steps`.

    Attributes:
      runner: the model, as `Loop.place` returns it.
      objective: see `jetformer.objectives`.
      optimizer: its groups have a `base_lr`, see `optim.make_optimizer`.
      ema: moving average of the parameters by name, updated in place; None for none.
      total_steps: the step to end at.
      schedule: learning-rate factor by step.
      noise_curriculum: standard deviation of the RGB noise by step, in 8-bit pixel values.
      ema_decay: decay of `ema` by step.
      seed: of all draws. Those of a step depend on (seed, step, example) alone, so a resumed run is the same run.
      grad_clip_norm: largest global norm of the gradients; None for no clipping.
      grad_accum_steps: number of parts of a batch, whose gradients add up to the batch's.
    """

    runner: Runner
    objective: Any
    optimizer: torch.optim.Optimizer
    ema: dict[str, Tensor] | None
    total_steps: int
    schedule: Callable[[int], float]
    noise_curriculum: Callable[[int], float]
    ema_decay: Callable[[int], float]
    seed: int
    grad_clip_norm: float | None
    grad_accum_steps: int


@dataclasses.dataclass
class Step:
    """Result of a training step.

    Attributes:
      number: number of steps done, this one included.
      names: of the metrics: "loss", "grad_norm" (before clipping) and the objective's terms. The name of a vector
        stands once for each of its entries.
      values: on the device, float32 `[2, n]`: sums over the batch, and the number of examples in each sum; for loss and
        norm the value and 1.
      learning_rate: at this step.
      noise_scale: of the curriculum at this step.
      seconds: time of this process by what it was spent on: "data_wait", with XLA also "trace".
    """

    number: int
    names: tuple[str, ...]
    values: Tensor
    learning_rate: float
    noise_scale: float
    seconds: dict[str, float]


class Loop(abc.ABC):
    """Runs a model on the devices of a `Runtime`.

    Args:
      runtime: the devices and processes.
      mesh: sizes of the axes "data" and "fsdp", see `runtime.resolve_mesh`.
      matmul_precision: of products of float32, see `train.matmul_precision`.
      autocast_dtype: "bfloat16" to multiply in it; None for the parameters' own dtype.
      cache_dir: local directory of compiled graphs, for a loop that keeps them; None for none.

    Attributes:
      shares: number of processes over which the loss and the gradients of a batch are split; 1 with XLA.
    """

    shares = 1

    def __init__(
        self,
        runtime: Runtime,
        mesh: dict[str, int] | None = None,
        matmul_precision: str = "highest",
        autocast_dtype: str | None = None,
        cache_dir: str | None = None,
    ):
        self.runtime, self.mesh, self.autocast_dtype = runtime, mesh, autocast_dtype
        self.set_up(matmul_precision, cache_dir)

    @abc.abstractmethod
    def set_up(self, matmul_precision: str, cache_dir: str | None) -> None:
        """Makes global settings; arguments as those of the class."""

    @abc.abstractmethod
    def place(self, model: nn.Module, compile: str | None = None) -> Runner:
        """Moves a model from the CPU to the devices.

        Args:
          model: modules with `is_block = True` are what is compiled and sharded one by one.
          compile: None, "blocks" or "step", see `train.compile`.

        Raises:
          ValueError: if it is to be compiled and what torch.compile needs is missing.
        """

    def place_state(self, tensors: Iterable[Tensor]) -> None:  # noqa: B027 (tensors made from parameters are placed)
        """Shards tensors that belong to parameters (moments, moving average) as parameters of their shape."""

    @abc.abstractmethod
    def swap(self, model: nn.Module, ema: dict[str, Tensor]) -> None:
        """Swaps the values of the parameters and of `ema`."""

    @contextlib.contextmanager
    def averaged(self, model: nn.Module, ema: dict[str, Tensor] | None) -> Iterator[None]:
        """Uses the moving average in the place of the parameters while the context lasts, if there is one."""
        if ema is None:
            yield
            return
        self.swap(model, ema)
        try:
            yield
        finally:
            self.swap(model, ema)

    def gathered(self, runner: Runner) -> contextlib.AbstractContextManager:
        """Returns a context in which every process holds all parameters, for decoding."""
        del runner
        return contextlib.nullcontext()

    @abc.abstractmethod
    def train_steps(
        self,
        training: Training,
        batches: Iterator[Rows],
        start_step: int = 0,
        on_phase: Callable[[str], None] = lambda name: None,
    ) -> Iterator[Step]:
        """Trains from `start_step` to `training.total_steps` and yields after every update. It never waits for the
        device.

        Args:
          training: see `Training`.
          batches: this process's part of each batch, from `start_step` on.
          start_step: number of steps done before.
          on_phase: called with the part of a step that was just done: "data", "forward", "backward" (both for each part
            of a batch), "optimizer". (With XLA they are traced, not computed, when it is called.)
        """

    @torch.no_grad()
    def per_example(
        self,
        runner: Runner,
        function: Function,
        batches: Iterator[Rows],
        *,
        seed: int,
        staged: bool = False,
        to_rows: Callable[[Rows], Rows] = lambda rows: rows,
        each_batch: Callable[[], None] = lambda: None,
    ) -> Rows:
        """Calls a function for every example of `batches`. Each example counts once, however many processes share them.

        Args:
          runner: the model, as `place` returns it.
          function: see `Function`.
          batches: as many on every process, with a bool `_mask` `[B]` that is False where an example only pads its
            batch, and the examples' numbers `_index` `[B]`.
          seed: of the examples' keys, which depend on it and the numbers: the same draws at each call.
          staged: `function` decodes: it runs the model many times, and compiles its parts itself.
          to_rows: maps the arrays of each batch's examples to what is kept of them.
          each_batch: called after every batch.

        Returns:
          Arrays `[N, ...]` by name over the N examples of all processes, ordered by their numbers, on every process.
        """
        runner.eval()
        parts = []
        with contextlib.closing(self.score(runner, function, batches, seed, staged)) as scored:
            for index, rows in scored:
                parts.append({"_index": index, **to_rows(rows)})
                each_batch()
        return gather(parts, self.runtime)

    @abc.abstractmethod
    def score(
        self, runner: Runner, function: Function, batches: Iterator[Rows], seed: int, staged: bool
    ) -> Iterator[tuple[np.ndarray, Rows]]:
        """Calls a function for batches; arguments as in `per_example`. Yields, for each batch, the numbers of this
        process's examples without padding, and their arrays."""

    def compile(self, function: Callable) -> Callable:
        """Returns a function that does the same as `function`, which is called often with tensors of the same shapes
        (a step of decoding), with less work for the host."""
        return function

    @abc.abstractmethod
    def to_host(self, values: list[Tensor]) -> np.ndarray:
        """Returns tensors of one shape `[...]` as one array `[N, ...]`; waits for the device."""

    @abc.abstractmethod
    def global_norm(self, tensors: Iterable[Tensor]) -> Tensor:
        """Returns the Euclidean norm of all tensors together, on every process."""

    def checkpointing(self) -> dict[str, Callable]:
        """Returns the arguments of `Checkpointer` that are this loop's."""
        return {}

    def load_planner(self) -> Any:
        """Returns the planner that DCP loads a checkpoint with; None for its own."""
        return None

    def counters(self) -> dict[str, float]:
        """Returns what the loop counts in this process, as metrics."""
        return {}

    def local(self, tensor: Tensor) -> Tensor:
        """Returns this process's shard of a tensor; they share memory."""
        return tensor

    def whole(self, tensor: Tensor) -> Tensor:
        """Returns a tensor that is the same on every process, unsharded."""
        return tensor

    def sum_over_processes(self, tensor: Tensor) -> Tensor:
        """Returns the sum of the `shares` of a tensor; may work in place."""
        return tensor

    def gradient_sync(self, runner: nn.Module, wanted: bool) -> contextlib.AbstractContextManager:
        """Returns a context in which a backward pass synchronizes gradients between processes if `wanted`; the last
        part of a batch does."""
        del runner, wanted
        return contextlib.nullcontext()

    def autocast(self) -> contextlib.AbstractContextManager:
        """Returns the context of a forward pass."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.runtime.device.type, getattr(torch, self.autocast_dtype))

    def inputs(self, training: Training, batches: Iterator[Rows], start_step: int) -> Iterator[dict[str, Tensor]]:
        """Yields each step's inputs on the CPU: the batch, `_keys` of its examples, and the step's `_noise_scale`. All
        are tensors: a number that changes from step to step would be a constant of a compiled graph."""
        for step in range(start_step, training.total_steps):
            batch = next(batches)
            # Copies: the arrays are views of memory that TensorFlow takes back.
            yield {name: torch.tensor(array) for name, array in batch.items()} | {
                "_keys": self.example_keys(derive_seed(training.seed, step), objectives.batch_size(batch)),
                "_noise_scale": torch.tensor(training.noise_curriculum(step), dtype=torch.float32),
            }

    def example_keys(self, seed: int, local_size: int) -> Tensor:
        """Returns keys int32 `[B, 2]` of this process's examples, by their places in the whole batch."""
        first = self.runtime.process_index * local_size
        return prng.example_keys(seed, torch.arange(first, first + local_size, dtype=torch.int32))

    def step(
        self,
        training: Training,
        runner: nn.Module,
        score: Callable,
        batch: dict[str, Tensor],
        *,
        learning_rate_factor: float | Tensor,
        ema_weight: float | Tensor,
        on_phase: Callable[[str], None],
    ) -> tuple[tuple[str, ...], Tensor]:
        """Computes one training step: draws, forward and backward passes, clipping, optimizer, moving average.

        Args:
          training: see `Training`.
          runner: `training.runner`, as the loop wraps it.
          score: `training.objective`, as the loop compiles it.
          batch: this step's inputs, on the device, see `inputs`.
          learning_rate_factor: of the schedule.
          ema_weight: of the new parameters in the moving average, 1 - decay.
          on_phase: see `train_steps`.

        Returns:
          Names and values of the metrics, see `Step`.
        """
        model, objective, optimizer = training.runner.model, training.objective, training.optimizer
        keys, noise_scale = batch.pop("_keys"), batch.pop("_noise_scale")
        draws = objective.draw(model, batch, keys, train=True)
        normalizers = objective.normalizers(batch, draws, train=True)
        counts = self.sum_over_processes(torch.stack(list(normalizers.values())))
        normalizers = dict(zip(normalizers, counts, strict=True))

        optimizer.zero_grad(set_to_none=True)
        loss, sums, count = 0.0, None, training.grad_accum_steps
        parts = zip(objectives.split(batch, count), objectives.split(draws, count), strict=True)
        for i, (part, part_draws) in enumerate(parts):
            with self.gradient_sync(runner, wanted=i + 1 == count):
                with self.autocast():
                    part_loss, terms = runner(score, part, part_draws, noise_scale=noise_scale, normalizers=normalizers)
                on_phase("forward")
                # DDP and FSDP2 average gradients; these are to be added.
                (part_loss * self.shares).backward()
                on_phase("backward")
            loss = loss + part_loss.detach()
            part_sums = objectives.sum_terms(terms)
            sums = part_sums if sums is None else objectives.add_sums(sums, part_sums)

        optim.set_learning_rate(optimizer, learning_rate_factor)
        max_norm = float("inf") if training.grad_clip_norm is None else training.grad_clip_norm
        grad_norm = self.whole(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm))
        optimizer.step()
        if training.ema is not None:
            optim.update_ema(training.ema, model, ema_weight)
        on_phase("optimizer")
        # Values and counts are summed over processes. Loss and terms are partial sums; the norm is equal on all, so
        # each contributes its share. The counts of both add up to 1.
        share = torch.full_like(loss, 1 / self.shares)
        names, values = pack({"loss": (loss, share), "grad_norm": (grad_norm * share, share), **sums})
        return names, self.sum_over_processes(values)


def pack(sums: objectives.Sums) -> tuple[tuple[str, ...], Tensor]:
    """Returns names and values as in `Step`: one tensor, so that one transfer brings all to the host."""
    names = tuple(name for name, (total, _) in sums.items() for _ in range(total.numel()))
    columns = [torch.stack([x.detach().float().expand_as(pair[0]).reshape(-1) for x in pair]) for pair in sums.values()]
    return names, torch.cat(columns, dim=1)


def means(names: tuple[str, ...], values: np.ndarray) -> dict[str, float]:
    """Returns the mean of each metric over packed values `[N, 2, n]`; 0 for one that counts no example.

    A mixture's responsibilities and their entropy are replaced by the metrics of `count_components`, if any counted.
    """
    totals, counts = values.astype(np.float64).sum(0)
    averages = totals / counts.clip(min=1)
    is_responsibility = np.array([name == "responsibilities" for name in names])
    found = {name: value for name, value in zip(names, averages.tolist(), strict=True) if name != "responsibilities"}
    if is_responsibility.any():
        entropy = found.pop("responsibility_entropy")
        if counts[is_responsibility].any():
            found |= count_components(averages[is_responsibility], entropy)
    return found


def gather(parts: list[Rows], runtime: Runtime) -> Rows:
    """Returns the rows of all batches of all processes as one, in the order of their numbers `_index` (which are left
    out), on every process."""
    names = parts[0].keys()
    rows = {name: np.concatenate([part[name] for part in parts]) for name in names}
    everyone = runtime.all_gather(rows)
    rows = {name: np.concatenate([theirs[name] for theirs in everyone]) for name in names}
    order = rows.pop("_index").argsort(kind="stable")
    return {name: values[order] for name, values in rows.items()}

"""The training loop in plain PyTorch, on one CPU or GPU. Every step of it is here to be read."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from jetformer import objectives, optim, prng
from jetformer.loops import steps
from jetformer.runtime import Runtime, derive_seed


def set_up(mesh: dict[str, int] | None, cache_dir: str | None) -> None:
    """Nothing has to be set up before a model is placed."""
    del mesh, cache_dir


def place(model: nn.Module, runtime: Runtime) -> nn.Module:
    """The model on its device."""
    return model.to(runtime.device)


def place_state(tensors: Iterable[Tensor]) -> None:
    """What belongs to parameters is where these are already."""
    del tensors


def compile(function: Callable) -> Callable:
    """As it is: nothing is compiled."""
    return function


def to_host(values: list[Tensor]) -> np.ndarray:
    """Tensors of one shape `[...]` as one array `[N, ...]`; waits for the device."""
    return torch.stack(values).cpu().numpy()


def checkpointing() -> dict[str, Callable]:
    """Nothing but what `Checkpointer` does by itself."""
    return {}


def load_planner() -> None:
    """As DCP does it."""
    return None


def counters() -> dict[str, float]:
    """Nothing is counted."""
    return {}


def to_device(batch: dict[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Arrays to tensors on the device, as they are: an image of 8 bits a value travels as such."""
    # A copy: the arrays are views of memory that TensorFlow takes back.
    tensors = {name: torch.tensor(array) for name, array in batch.items()}
    if device.type == "cuda":  # from pinned memory a copy does not hold up the host
        tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


def autocast(device: torch.device, dtype: str | None) -> contextlib.AbstractContextManager:
    """What the forward pass runs under: "bfloat16" for products in it, None for the parameters' own precision."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, getattr(torch, dtype))


def train_steps(
    *,
    model: nn.Module,
    objective,
    optimizer: torch.optim.Optimizer,
    ema: dict[str, Tensor] | None,
    batches: Iterator[dict[str, np.ndarray]],
    start_step: int,
    total_steps: int,
    schedule: Callable[[int], float],
    noise_curriculum: Callable[[int], float],
    runtime: Runtime,
    seed: int,
    grad_clip_norm: float | None,
    grad_accum_steps: int,
    ema_decay: float,
    autocast_dtype: str | None,
) -> Iterator[steps.Step]:
    """Trains from `start_step` to `total_steps`, yielding after every update.

    The draws of a step depend on (seed, step, example) alone, so a resumed run is the same run. Nothing here waits for
    the device.

    Args:
      model: the model, on the device.
      objective: see `jetformer.objectives`.
      optimizer: its groups have a `base_lr`, see `optim.make_optimizer`.
      ema: parameters by name, moved along in place; None for none.
      batches: local batches from `start_step` on.
      schedule: learning-rate factor by step.
      noise_curriculum: RGB noise by step.
      grad_clip_norm: largest global norm of the gradients; None for no clipping.
      grad_accum_steps: into how many parts a batch is cut; their gradients add up to the batch's.
      ema_decay: of `ema`.
      autocast_dtype: see `autocast`.
    """
    device = runtime.device
    for step in range(start_step, total_steps):
        waiting_since = time.perf_counter()
        batch = next(batches)
        data_wait = time.perf_counter() - waiting_since
        batch = to_device(batch, device)

        model.train()
        local_size = len(batch["image"])
        first = runtime.process_index * local_size
        examples = torch.arange(first, first + local_size, dtype=torch.int32, device=device)
        draws = objective.draw(model, batch, prng.example_keys(derive_seed(seed, step), examples), train=True)
        normalizers = objective.normalizers(batch, draws, train=True)
        noise_scale = noise_curriculum(step)

        optimizer.zero_grad(set_to_none=True)
        loss, sums = 0.0, None
        parts = zip(objectives.split(batch, grad_accum_steps), objectives.split(draws, grad_accum_steps), strict=True)
        for part, part_draws in parts:
            with autocast(device, autocast_dtype):
                part_loss, terms = objective(model, part, part_draws, noise_scale=noise_scale, normalizers=normalizers)
            part_loss.backward()
            loss = loss + part_loss.detach()
            part_sums = objectives.sum_terms(terms)
            sums = part_sums if sums is None else objectives.add_sums(sums, part_sums)

        optim.set_learning_rate(optimizer, schedule(step))
        max_norm = float("inf") if grad_clip_norm is None else grad_clip_norm
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        if ema is not None:
            optim.update_ema(ema, model, ema_decay)
        one = torch.ones_like(loss)
        names, values = steps.pack({"loss": (loss, one), "grad_norm": (grad_norm, one), **sums})
        learning_rate = optimizer.param_groups[0]["lr"]
        yield steps.Step(step + 1, names, values, learning_rate, noise_scale, {"data_wait": data_wait})


@torch.no_grad()
def evaluate(
    *,
    model: nn.Module,
    objective,
    batches: Iterator[dict[str, np.ndarray]],
    runtime: Runtime,
    seed: int,
    autocast_dtype: str | None,
    each_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Scores every example of `batches` once, with the same draws each time it is called.

    Args:
      batches: with a bool `_mask` `[B]` that is false where an example only fills up its batch, and the examples'
        numbers `_index` `[B]`.
      each_batch: called after every batch.

    Returns:
      The means of the objective's terms over the examples.
    """
    model.eval()
    values = []
    for batch in batches:
        batch = to_device(batch, runtime.device)
        mask, index = batch.pop("_mask"), batch.pop("_index")
        draws = objective.draw(model, batch, prng.example_keys(seed, index), train=False)
        with autocast(runtime.device, autocast_dtype):
            _, terms = objective(model, batch, draws, train=False)
        names, packed = steps.pack(objectives.sum_terms(terms, mask))
        values.append(packed)
        each_batch()
    return steps.means(names, to_host(values))

"""The training loop in plain PyTorch, on one CPU or GPU. Every step of it is here to be read."""

import dataclasses
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from jetformer import objectives, optim
from jetformer.runtime import derive_seed


@dataclasses.dataclass
class Step:
    """What a step leaves behind.

    Attributes:
      number: how many steps are done, this one included.
      sums: the objective's terms summed over the batch, on the device.
      loss: on the device.
      grad_norm: global norm of the gradients before clipping, on the device.
      learning_rate: at this step.
      noise_scale: of the curriculum at this step.
      data_wait: seconds for which the step waited for its batch.
    """

    number: int
    sums: objectives.Sums
    loss: Tensor
    grad_norm: Tensor
    learning_rate: float
    noise_scale: float
    data_wait: float


def to_device(batch: dict[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Arrays to tensors on the device, as they are: an image of 8 bits a value travels as such."""
    # A copy: the arrays are views of memory that TensorFlow takes back.
    tensors = {name: torch.tensor(array) for name, array in batch.items()}
    if device.type == "cuda":  # from pinned memory a copy does not hold up the host
        tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


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
    device: torch.device,
    seed: int,
    process_index: int,
    grad_clip_norm: float | None,
    grad_accum_steps: int,
    ema_decay: float,
) -> Iterator[Step]:
    """Trains from `start_step` to `total_steps`, yielding after every update.

    The draws of a step depend on (seed, step, process) alone, so a resumed run is the same run. Nothing here waits for
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
    """
    generator = torch.Generator(device)
    for step in range(start_step, total_steps):
        waiting_since = time.perf_counter()
        batch = next(batches)
        data_wait = time.perf_counter() - waiting_since
        batch = to_device(batch, device)

        model.train()
        step_seed = derive_seed(seed, step, process_index)
        generator.manual_seed(step_seed)
        torch.manual_seed(step_seed)  # for dropout, which takes no generator
        draws = objective.draw(model, batch, generator, train=True)
        normalizers = objective.normalizers(batch, draws, train=True)
        noise_scale = noise_curriculum(step)

        optimizer.zero_grad(set_to_none=True)
        loss, sums = 0.0, None
        for part, part_draws in zip(_split(batch, grad_accum_steps), _split(draws, grad_accum_steps), strict=True):
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
        learning_rate = optimizer.param_groups[0]["lr"]
        yield Step(step + 1, sums, loss, grad_norm, learning_rate, noise_scale, data_wait)


def _split(tensors: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    """Cuts every tensor along its first dimension into `parts`."""
    if not tensors:
        return [{}] * parts
    chunks = [tensor.chunk(parts) for tensor in tensors.values()]
    return [dict(zip(tensors, chunk, strict=True)) for chunk in zip(*chunks, strict=True)]


@torch.no_grad()
def evaluate(
    *,
    model: nn.Module,
    objective,
    batches: Iterator[dict[str, np.ndarray]],
    device: torch.device,
    seed: int,
) -> objectives.Sums:
    """Scores every example of `batches` once, with the same draws each time it is called.

    Args:
      batches: with a bool `_mask` `[B]` that is false where an example only fills up its batch.

    Returns:
      The objective's terms summed over the examples, in float64.
    """
    model.eval()
    generator = torch.Generator(device)
    total = None
    for i, batch in enumerate(batches):
        batch = to_device(batch, device)
        mask = batch.pop("_mask")
        generator.manual_seed(derive_seed(seed, i))
        draws = objective.draw(model, batch, generator, train=False)
        _, terms = objective(model, batch, draws, train=False)
        sums = objectives.sum_terms({name: (value.double(), counts) for name, (value, counts) in terms.items()}, mask)
        total = sums if total is None else objectives.add_sums(total, sums)
    return total

"""What the two loops have in common: how they run a model, and what a step leaves behind."""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from jetformer import objectives
from jetformer.models.mixture import count_components
from jetformer.runtime import Runtime

# What `per_example` calls: of the model, a batch and its examples' keys int32 [B, 2]; tensors [B, ...] by name.
Function = Callable[[nn.Module, dict[str, Tensor], Tensor], dict[str, Tensor]]
# Arrays [N, ...] by name, over N examples.
Rows = dict[str, np.ndarray]


class Runner(nn.Module):
    """A model as one call: a function of it and more arguments.

    An objective calls several of a model's methods. What has to know where its use begins and ends (DDP, FSDP2,
    torch.compile) wraps this.

    Attributes:
      model: the model.
      compiles: whether torch.compile is to compile an objective as a whole.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.compiles = False

    def forward(self, function: Callable, *args, **kwargs):
        return function(self.model, *args, **kwargs)


@dataclasses.dataclass
class Step:
    """What a step leaves behind.

    Attributes:
      number: how many steps are done, this one included.
      names: what was measured: "loss", "grad_norm" (of the gradients before clipping) and the objective's terms. The
        name of a vector stands once for each of its entries.
      values: on the device, float32 `[2, n]`: sums over the batch, and over how many examples they go; for loss and
        norm the figure and 1.
      learning_rate: at this step.
      noise_scale: of the curriculum at this step.
      seconds: what this process spent on parts of the step: "data_wait", under XLA "trace" also.
    """

    number: int
    names: tuple[str, ...]
    values: Tensor
    learning_rate: float
    noise_scale: float
    seconds: dict[str, float]


def pack(sums: objectives.Sums) -> tuple[tuple[str, ...], Tensor]:
    """Names and values as in `Step`: one tensor, so that one transfer brings all to the host."""
    names = tuple(name for name, (total, _) in sums.items() for _ in range(total.numel()))
    columns = [torch.stack([x.detach().float().expand_as(pair[0]).reshape(-1) for x in pair]) for pair in sums.values()]
    return names, torch.cat(columns, dim=1)


def means(names: tuple[str, ...], values: np.ndarray) -> dict[str, float]:
    """The mean of each name over packed values `[N, 2, n]`; one that counted for no example is 0. In the place of a
    mixture's responsibilities and their entropy stands what `count_components` makes of them, if any counted."""
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
    """Rows of all batches of all processes as one, by their numbers `_index` (which are left out), on every process."""
    names = parts[0].keys()
    rows = {name: np.concatenate([part[name] for part in parts]) for name in names}
    everyone = runtime.of_all(rows)
    rows = {name: np.concatenate([theirs[name] for theirs in everyone]) for name in names}
    order = rows.pop("_index").argsort(kind="stable")
    return {name: values[order] for name, values in rows.items()}

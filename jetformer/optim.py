"""Optimizers, schedules, the noise curriculum, and the exponential moving average (EMA).

As in big_vision (`optax.py`, `utils.py`), a schedule is a factor of learning rate and weight decay, and the learning
rate is no factor of the weight decay.
"""

import bisect
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from absl import logging
from torch import Tensor, nn

from jetformer.ranges import BelowOne, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Probability


def to_steps(
    name: str,
    amounts: dict[str, float | None],
    *,
    total_steps: int | None = None,
    batch_size: int | None = None,
    data_size: int | None = None,
    default: int | None = None,
) -> int:
    """Converts a duration in one of four units to steps.

    Args:
      name: name of the duration, for messages.
      amounts: {"steps": ..., "examples": ..., "epochs": ..., "percent": ...}, of which at most one is not None.
        "percent" is a fraction of total_steps, in [0, 1].
      total_steps: total number of steps, for "percent".
      batch_size: examples a step, for "examples" and "epochs".
      data_size: examples an epoch, for "epochs".
      default: returned if all are None.

    Raises:
      ValueError: if all are None and there is no default, several are set, or the amount is out of range.
    """
    given = {unit: amount for unit, amount in amounts.items() if amount is not None}
    if len(given) > 1:
        raise ValueError(f"{name} is set in {' and in '.join(given)}: use one unit")
    if not given:
        if default is None:
            raise ValueError(f"{name} is missing: set {name}_{f' or {name}_'.join(amounts)}")
        return default
    ((unit, amount),) = given.items()
    if amount < 0:
        raise ValueError(f"{name}_{unit} = {amount} is negative: use 0 or more")
    if unit == "steps":
        return round(amount)
    if unit == "percent":
        if amount > 1:
            raise ValueError(f"{name}_percent = {amount} is a fraction of all steps: use at most 1")
        steps = amount * total_steps
    elif unit == "examples":
        steps = amount / batch_size
    else:
        steps = amount * data_size / batch_size
    # A small amount is at least one step, 0 is none.
    return max(round(steps), 1) if amount else 0


def make_schedule(
    total_steps: PositiveInt,
    batch_size: PositiveInt,
    data_size: PositiveInt,
    decay_type: str = "cosine",
    warmup_steps: NonNegativeInt | None = None,
    warmup_examples: NonNegativeInt | None = None,
    warmup_epochs: NonNegativeFloat | None = None,
    warmup_percent: Probability | None = None,
    cooldown_steps: NonNegativeInt | None = None,
    cooldown_examples: NonNegativeInt | None = None,
    cooldown_epochs: NonNegativeFloat | None = None,
    cooldown_percent: Probability | None = None,
    timescale: PositiveFloat = 10_000,
    timescale_examples: PositiveFloat | None = None,
    shift: NonNegativeFloat = 0,
    power: PositiveFloat = 1,
    linear_end: NonNegativeFloat = 0,
    steps: Sequence[NonNegativeInt] = (),
    mults: Sequence[NonNegativeFloat] = (),
) -> Callable[[int], float]:
    """Returns a learning-rate schedule, a function of the step that returns a factor.

    Args:
      total_steps: length of training.
      batch_size: examples a step.
      data_size: examples an epoch.
      decay_type: "cosine", "rsqrt", "linear", "stair" or "constant".
      warmup_*: length of the linear warm-up from 0, in steps, examples, epochs or as a fraction of total_steps.
      cooldown_*: length of the linear cool-down to 0, likewise.
      timescale, shift: for "rsqrt", whose factor is 1 / sqrt(1 + (step - warmup + shift) / timescale) after the
        warm-up.
      timescale_examples: the timescale in examples, overrides `timescale`.
      power, linear_end: for "linear", whose factor ends at `linear_end`.
      steps, mults: for "stair", whose factor is `mults[i]` from `steps[i]` on, and 1 before.

    Raises:
      ValueError: if durations do not fit, or the decay type is unknown.
    """
    units = {"total_steps": total_steps, "batch_size": batch_size, "data_size": data_size, "default": 0}
    amounts = lambda *values: dict(zip(("steps", "examples", "epochs", "percent"), values, strict=True))
    warmup = to_steps("warmup", amounts(warmup_steps, warmup_examples, warmup_epochs, warmup_percent), **units)
    cooldown = to_steps(
        "cooldown", amounts(cooldown_steps, cooldown_examples, cooldown_epochs, cooldown_percent), **units
    )
    if decay_type not in ("cosine", "rsqrt", "linear", "stair", "constant"):
        raise ValueError(f"unknown decay_type {decay_type!r}: use cosine, rsqrt, linear, stair or constant")
    if len(steps) != len(mults):
        raise ValueError(f"a stair of {len(steps)} steps has {len(mults)} mults: use as many mults as steps")
    if timescale_examples is not None:
        timescale = timescale_examples / batch_size
    if total_steps > 1 and warmup >= total_steps:
        raise ValueError(f"a warm-up of {warmup} steps does not fit into {total_steps} steps: shorten it")

    def schedule(step: int) -> float:
        progress = min(max((step - warmup) / max(total_steps - warmup, 1), 0.0), 1.0)
        factor = 1.0
        if decay_type == "linear":
            factor = linear_end + (1 - linear_end) * (1 - progress) ** power
        elif decay_type == "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * progress))
        elif decay_type == "rsqrt":
            factor = 1 / math.sqrt(1 + (max(step - warmup, 0) + shift) / timescale)
        elif decay_type == "stair":
            factor = (1.0, *mults)[bisect.bisect_right(steps, step)]
        if warmup:
            factor *= min(1.0, step / warmup)
        if cooldown:
            factor *= min(1.0, (total_steps - step) / cooldown)
        return factor

    return schedule


def noise_curriculum(step: int, total_steps: int, noise_scale: float, noise_min: float = 0.0) -> float:
    """Returns the standard deviation of the RGB noise at a step, in 8-bit pixel values.

    It is a half cosine from `noise_scale` to `noise_min` (JetFormer, section 3.3).
    """
    return noise_min + (noise_scale - noise_min) * 0.5 * (1 + math.cos(math.pi * step / total_steps))


def decayed_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters with weight decay: matrices of linear layers (attention, MLPs, projections, heads) and of
    convolutions; not embeddings, norms, biases, or matrices that map the values of a flow."""
    return [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def block_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters that `Muon` updates: matrices of linear layers within transformer blocks.

    A transformer block is a module with the class attribute `is_transformer_block = True`.
    """
    blocks = [m for m in model.modules() if getattr(m, "is_transformer_block", False)]
    return [m.weight for block in blocks for m in block.modules() if isinstance(m, nn.Linear)]


def orthogonalize(matrices: Tensor) -> Tensor:
    """Returns matrices with the same singular vectors and singular values near 1 (0.7 to 1.2).

    Runs five steps of a quintic Newton-Schulz iteration with the coefficients of Jordan et al.,
    https://kellerjordan.github.io/posts/muon/; on CUDA in bfloat16.

    Args:
      matrices: `[N, rows, columns]`.
    """
    x = matrices.bfloat16() if matrices.device.type == "cuda" else matrices
    wide = matrices.shape[1] <= matrices.shape[2]
    x = x if wide else x.mT
    x = x / x.square().sum((1, 2), keepdim=True).sqrt().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x if wide else x.mT).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Updates matrices by their orthogonalized momentum.

    An update is `-lr · (0.2 · sqrt(max(rows, columns)) · orthogonalize(gradient + momentum · buffer) + weight_decay ·
    parameter)` with `buffer ← momentum · buffer + gradient`. The factor makes updates as large as Adam's
    (arXiv 2502.16982), so that both take the same learning rate. `torch.optim.Muon` with `match_rms_adamw` does the
    same, but in bfloat16 on CPUs too, one matrix at a time, and without a learning rate that is a tensor.

    Args:
      params: matrices `[rows, columns]`, or groups of them.
      lr: learning rate.
      momentum: decay of the buffer.
      weight_decay: weight decay, which is multiplied by the learning rate.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"momentum_buffer": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, momentum, weight_decay = group["lr"], group["momentum"], group["weight_decay"]
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for shape, parameters in by_shape.items():
                momenta = []
                for p in parameters:
                    buffer = self.state[p]["momentum_buffer"].mul_(momentum).add_(p.grad)
                    momenta.append(p.grad + momentum * buffer)
                updates = 0.2 * math.sqrt(max(shape)) * orthogonalize(torch.stack(momenta))
                for i, p in enumerate(parameters):  # torch 2.9 cannot iterate over a DTensor
                    p.mul_(1 - lr * weight_decay).sub_(lr * updates[i])


class MuonAndAdamW(torch.optim.Optimizer):
    """Runs `Muon` for some parameters and AdamW for the others, as one optimizer.

    Args:
      muon, adamw: the two optimizers; their groups and states are shared, not copied.
    """

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW):
        super().__init__(adamw.param_groups + muon.param_groups, {})
        self.optimizers = (muon, adamw)
        self.state.update(muon.state | adamw.state)

    @torch.no_grad()
    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def make_optimizer(
    model: nn.Module,
    lr: PositiveFloat = 1e-3,
    wd: NonNegativeFloat = 0.0,
    b1: BelowOne = 0.9,
    b2: BelowOne = 0.95,
    eps: PositiveFloat = 1e-8,
    muon: bool = False,
    frozen: Sequence[str] = (),
    lr_factors: Mapping[str, PositiveFloat] | None = None,
) -> torch.optim.Optimizer:
    """Makes Adam with weight decay decoupled from the gradient and from the learning rate.

    An update is `-schedule · (lr · adam + wd · parameter)`. Each step sets a group's `lr` to `schedule · lr`, by which
    `torch.optim.AdamW` multiplies its weight decay; so the group's weight decay is `wd / lr`.

    Patterns are regular expressions that match a parameter's whole name, such as `flow.*`; run.json in the workdir
    lists the names. Frozen parameters get no gradient, no weight decay and no optimizer state.

    Args:
      model: the model, wrapped in FSDP2 or not, but not yet in DDP. `requires_grad` of frozen parameters is set to
        False; parameters that require no gradient already are frozen as well.
      lr: learning rate at a factor of 1.
      wd: weight decay a step at a factor of 1.
      b1, b2, eps: Adam's decays of both moments, and epsilon.
      muon: update the matrices of transformer blocks by `Muon`, with the same learning rate and weight decay.
      frozen: patterns of the parameters that are not trained.
      lr_factors: factors of the learning rate, but not of the weight decay, by pattern. The first pattern that matches
        counts; without a match the factor is 1.

    Raises:
      ValueError: if the model has no transformer blocks for Muon, a pattern is not a regular expression or matches no
        parameter, or no parameter is left to train.
    """
    named, lr_factors = dict(model.named_parameters()), lr_factors or {}
    _check_patterns("frozen", frozen, named)
    _check_patterns("lr_factors", lr_factors, named)
    for name, p in named.items():
        if any(re.fullmatch(pattern, name) for pattern in frozen):
            p.requires_grad_(False)
    trained = {name: p for name, p in named.items() if p.requires_grad}
    if not trained:
        raise ValueError(f"make_optimizer.frozen = {frozen!r} leaves no parameter to train: freeze fewer")
    if frozen:
        logging.info("%d of %d parameter tensors are frozen", len(named) - len(trained), len(named))
    of_muon = {id(p) for p in block_matrices(model)} if muon else set()
    if muon and not of_muon:
        raise ValueError("make_optimizer.muon = True, but the model has no transformer blocks: set it to False")
    of_decay = {id(p) for p in decayed_parameters(model)} - of_muon

    def groups(ids: set[int], weight_decay: float) -> list[dict[str, Any]]:
        """Returns a group for each factor, the first for a factor of 1, whose learning rate a step reports."""
        by_factor: dict[float, list[nn.Parameter]] = {1.0: []}
        for name, p in trained.items():
            if id(p) in ids:
                factor = next((f for pattern, f in lr_factors.items() if re.fullmatch(pattern, name)), 1.0)
                by_factor.setdefault(factor, []).append(p)
        return [
            {"params": parameters, "weight_decay": weight_decay / (factor * lr), "base_lr": factor * lr}
            for factor, parameters in by_factor.items()
        ]

    rest = {id(p) for p in trained.values()} - of_decay - of_muon
    of_adamw = groups(of_decay, wd) + groups(rest, 0.0)
    # XLA traces the whole update, so values that change with the step have to be tensors.
    on_xla = next(model.parameters()).device.type == "xla"
    how = {"capturable": True, "foreach": False} if on_xla else {"fused": True}
    adamw = torch.optim.AdamW(of_adamw, lr=lr, betas=(b1, b2), eps=eps, **how)
    for group in of_adamw:
        for p in group["params"]:
            # AdamW creates its state at its first step, too late to restore a checkpoint into it.
            adamw.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
    if not muon:
        return adamw
    return MuonAndAdamW(Muon(groups(of_muon, wd), lr=lr), adamw)


def _check_patterns(argument: str, patterns: Iterable[str], names: Collection[str]) -> None:
    for pattern in patterns:
        try:
            matches = re.compile(pattern).fullmatch
        except re.error as error:
            raise ValueError(f"make_optimizer.{argument}: {pattern!r} is not a regular expression: {error}") from error
        if not any(map(matches, names)):
            some = {name.partition(".")[0]: name for name in names}.values()  # one for each part of the model
            raise ValueError(
                f"make_optimizer.{argument}: {pattern!r} matches no parameter's whole name; some are {', '.join(some)}"
            )


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Returns the optimizer's state by parameter names, to save and to restore in place.

    Its settings are not included; they are the configuration's.
    """
    return {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float | Tensor) -> None:
    """Sets every group's learning rate to `factor`, a tensor on XLA, times its base."""
    if isinstance(factor, Tensor):
        factor = factor.clamp(min=1e-20)  # AdamW divides by a learning rate that is a tensor
    for group in optimizer.param_groups:
        group["lr"] = factor * group["base_lr"]


def warmed_up_decay(step: int, decay: float) -> float:
    """Returns the EMA's decay at a step, counted from 0: at most `(1 + step) / (10 + step)`.

    So the EMA spans at most about the last tenth of training so far, and forgets the initial parameters in a few steps.
    The formula is that of `tf.train.ExponentialMovingAverage`.
    """
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], model: nn.Module, weight: float | Tensor) -> None:
    """Updates the EMA in place: ema ← (1 - weight) · ema + weight · parameter.

    Args:
      ema: averages by parameter name.
      model: the model.
      weight: 1 - decay; on XLA a tensor `[]`.
    """
    parameters = dict(model.named_parameters())
    if isinstance(weight, Tensor):
        for name, average in ema.items():
            average.lerp_(parameters[name], weight.to(average.dtype))
    else:
        torch._foreach_lerp_(list(ema.values()), [parameters[name] for name in ema], weight)

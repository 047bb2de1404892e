"""Removes the noise that a model was trained with from its samples."""

from collections.abc import Callable

import torch
from torch import Tensor


def denoise(log_density: Callable[[Tensor], Tensor], x: Tensor, noise_std: float) -> Tensor:
    """Returns the mean of what x may have been before noise: x + noise_std² · ∇ log p(x) (Tweedie's formula; as
    TarFlow, arXiv 2412.06329).

    Args:
      log_density: the model's of noisy samples, `[B, ...]` to `[B]` in nats, or to their sum.
      x: samples `[B, ...]`.
      noise_std: standard deviation of the Gaussian noise that was added in training.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (score,) = torch.autograd.grad(log_density(x).sum(), x)
    return x.detach() + noise_std**2 * score

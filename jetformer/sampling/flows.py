"""Sampling from a flow beyond its inverse: guidance and denoising.

Dimensions: B batch, H × W × C image, N tokens, D token dimension, M context tokens, X their dimension.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from jetformer import objectives
from jetformer.models.tarflow import CachedBlock, TarFlow


@torch.no_grad()
def guided_inverse(
    flow: TarFlow, z: Tensor, context: Tensor, unconditional: Tensor, weights: Tensor, temperature: float = 1.0
) -> Tensor:
    """Maps latents to images with guidance: each block extrapolates shift and log-scale of a token from those without
    label over those given the label (TarFlow, arXiv 2412.06329).

    Args:
      flow: in evaluation mode.
      z: latents `[B, H, W, C]`.
      context, unconditional: `[B, M, X]`, what to sample, and no label.
      weights: `[N]`, for each token in a block's order, see `Guidance.weights`; 0 is `flow.inverse`.
      temperature: divides the attention logits of the unconditional predictions.

    Returns:
      Images `[B, H, W, C]`.
    """
    z, _ = flow.patchify(z)
    for block in reversed(flow.blocks):
        given, without = CachedBlock(block, z, context), CachedBlock(block, z, unconditional, temperature)
        z, _ = block.invert(z, _guided(given, without, weights))
    return flow.patchify.inverse(z)[0]


def _guided(given: CachedBlock, without: CachedBlock, weights: Tensor) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Returns the predictions for `TarFlowBlock.invert`."""
    rest = iter(weights[1:])  # the first token stays as it is

    def predict(token: Tensor) -> tuple[Tensor, ...]:
        weight = next(rest)
        return tuple(c + weight * (c - u) for c, u in zip(given.step(token), without.step(token), strict=True))

    return predict


def denoise(flow: nn.Module, x: Tensor, context: Tensor | None, noise_std: float) -> Tensor:
    """Removes the noise that a flow was trained with, by Tweedie's formula: x + noise_std² · ∇ log p(x) (as TarFlow).

    Args:
      flow: any flow.
      x: samples `[B, H, W, C]`.
      context: `[B, M, X]` or None.
      noise_std: standard deviation of the Gaussian noise that was added to the images in training.

    Returns:
      Images `[B, H, W, C]`.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        z, logdet = flow(x, context)
        (score,) = torch.autograd.grad((logdet - objectives.standard_normal_nll(z)).sum(), x)
    return x.detach() + noise_std**2 * score

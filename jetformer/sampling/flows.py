"""Sampling from a flow alone: its inverse, with guidance and denoising.

Dimensions: B batch, H × W × C image, N tokens, D token dimension, M context tokens, X their dimension.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from jetformer import objectives
from jetformer.models.labelled import LabelledFlow
from jetformer.models.tarflow import CachedBlock, TarFlow
from jetformer.sampling.denoising import denoise
from jetformer.sampling.guidance import Guidance


def check_guidance(flow: nn.Module, guidance: Guidance) -> None:
    """Checks that a flow can be guided.

    Raises:
      ValueError: if not.
    """
    if not guidance.on:
        return
    if guidance.mode != "interp":
        raise ValueError(f"guidance {guidance.mode} is of mixtures, and a flow has none: choose interp")
    if not isinstance(flow, LabelledFlow) or not isinstance(flow.flow, TarFlow):
        raise ValueError(
            f"guidance of a flow alone needs a LabelledFlow of a TarFlow, not a {type(flow).__name__}: sample without"
        )
    if any(block.student is not None for block in flow.flow.blocks):
        raise ValueError("guidance does not apply to a TarFlow with students, which have learned to sample without")


@torch.no_grad()
def decode(
    flow: nn.Module,
    z: Tensor,
    labels: Tensor | None = None,
    *,
    guidance: Guidance = Guidance(),  # noqa: B008 (frozen)
    noise_std: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Maps latents to images.

    Args:
      flow: any; in evaluation mode.
      z: `[B, H, W, C]`.
      labels: int `[B]`, for a `LabelledFlow`; None for no label.
      guidance: see `check_guidance`.
      noise_std: the noise to remove, see `denoise`; 0 removes none.

    Returns:
      Images `[B, H, W, C]`, which may exceed [-1, 1], and their log-densities `[B]` in nats, without guidance and
      before denoising.
    """
    context = None if labels is None else flow.context(labels)
    if guidance.on:
        without = flow.context(labels, torch.ones_like(labels, dtype=torch.bool))
        weights = guidance.weights(flow.flow.patchify.num_tokens).to(z)
        x = guided_inverse(flow.flow, z, context, without, weights)
        nats = log_density(flow, x, context)
    else:
        x, logdet = flow.inverse(z, context)
        nats = -objectives.standard_normal_nll(z) - logdet
    if noise_std:
        x = denoise(lambda x: log_density(flow, x, context), x, noise_std)
    return x, nats


def log_density(flow: nn.Module, x: Tensor, context: Tensor | None = None) -> Tensor:
    """Returns the log-density `[B]` in nats of images `[B, H, W, C]` given `context` `[B, M, X]`."""
    z, logdet = flow(x, context)
    return logdet - objectives.standard_normal_nll(z)


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

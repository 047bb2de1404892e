"""The mixtures that the logits of an image head describe, whole and by torch.distributions."""

from typing import NamedTuple

import torch
from torch import Tensor

from jetformer.models.mixture import square_plus


class Mixture(NamedTuple):
    """K diagonal Gaussians for each token: logits `[..., K]`, locs `[..., K, D]`, scales `[..., K, D]`."""

    logits: Tensor
    locs: Tensor
    scales: Tensor

    def log_prob(self, x):
        """Returns the log-density `[...]` in nats at `x` `[..., D]`."""
        weights = torch.distributions.Categorical(logits=self.logits)
        components = torch.distributions.Independent(torch.distributions.Normal(self.locs, self.scales), 1)
        return torch.distributions.MixtureSameFamily(weights, components).log_prob(x)


def mixture_from_logits(logits, num_mixtures, scale_tol, temperature_scales=1.0, temperature_probs=1.0):
    """Returns the mixture of `logits` `[..., P]`, whose scales and log-weights the temperatures multiply."""
    k = num_mixtures
    d = (logits.shape[-1] - k) // (2 * k)
    weights, locs, raw_scales = logits.split((k, k * d, k * d), dim=-1)
    scales = square_plus(raw_scales).clamp(min=scale_tol) * temperature_scales
    return Mixture(weights * temperature_probs, locs.unflatten(-1, (k, d)), scales.unflatten(-1, (k, d)))


def mixture_of(head, logits):
    """Returns the mixture that logits of a `MixtureHead` describe."""
    return mixture_from_logits(logits, head.num_mixtures, head.scale_tol)

"""The image head: a density over soft tokens, as a mixture of Gaussians or one multivariate Gaussian.

Dimensions: B batch, L image tokens, K mixtures, D token dimension, E width of the hidden states, P = K + 2·K·D logits a
token: K log-weights, then K·D means, then K·D raw scales, so that each group is contiguous (the reference interleaves
means and scales by mixture; `convert` maps between the two).

Training never holds all logits, see `mixture_nll.py`.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy import special
from torch import Tensor, nn
from torch.nn import functional as F

from jetformer.models.autocast import without_autocast
from jetformer.models.mixture_nll import LOG_2PI, TokenScores, mixture_nll, split_logits

CLUSTERED_TOKENS = 20_000  # that k-means clusters, in seconds
_MIN_SCALE_INIT = 1e-3  # of a component that starts at a cluster


def square_plus(x: Tensor) -> Tensor:
    """Returns (x + sqrt(x² + 4)) / 2, a positive function like softplus: the standard deviations' activation."""
    return (x + (x.square() + 4).sqrt()) / 2


def square_plus_inverse(y):
    """Returns the x, tensor or float, whose `square_plus` is `y`."""
    return y - 1 / y


class MultivariateGaussian(NamedTuple):
    """A Gaussian with full covariance for each token.

    loc: `[..., D]`, mean.
    scale: `[..., D, D]`, lower-triangular, with covariance scale · scaleᵀ.
    """

    loc: Tensor
    scale: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        """Returns the log-density `[...]` in nats at `x` `[..., D]`."""
        z = torch.linalg.solve_triangular(self.scale, (x - self.loc).unsqueeze(-1), upper=False)
        logdet = self.scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * (z.squeeze(-1).square() + LOG_2PI).sum(-1) - logdet


def count_components(responsibilities: np.ndarray, entropy: float) -> dict[str, float]:
    """Counts the components that a mixture uses.

    Args:
      responsibilities: `[K]`, posterior probabilities of the components, summed or averaged over tokens.
      entropy: entropy in nats of a token's responsibilities, averaged over the same tokens.

    Returns:
      `effective_components`, in 1..K: exponential of the entropy of the average responsibilities; K if all components
      are used equally often.
      `distinct_components`, in 1..K: exponential of the mutual information between token and component; K if all
      components are used equally often and do not overlap, 1 if they are equal.
    """
    average_entropy = special.entr(responsibilities / responsibilities.sum()).sum()
    return {
        "effective_components": math.exp(average_entropy),
        "distinct_components": math.exp(max(average_entropy - entropy, 0.0)),
    }


class _Head(nn.Module):
    """A linear layer from hidden states to P logits, which multiplies in a dtype of its own."""

    def __init__(self, width: int, num_logits: int, scale_tol: float, dtype: str):
        super().__init__()
        if scale_tol <= 0:
            raise ValueError(f"scale_tol = {scale_tol}: the smallest scale must be positive")
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"unknown head dtype {dtype!r}: use float32 or bfloat16")
        self.scale_tol, self.dtype = scale_tol, getattr(torch, dtype)
        self.linear = nn.Linear(width, num_logits)

    def _cast(self, x: Tensor, like: Tensor) -> Tensor:
        return x.to(self.dtype if self.dtype is torch.bfloat16 else like.dtype)

    def _project(self, hidden: Tensor, rows: slice) -> Tensor:
        """`[..., E]` to some of the logits, in float32 (or float64)."""
        weight, bias = self.linear.weight, self.linear.bias
        with without_autocast(hidden.device):
            y = F.linear(*(self._cast(x, weight) for x in (hidden, weight[rows], bias[rows])))
        return y.to(weight.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., E]` to `[..., P]`, in float32 (or float64)."""
        return self._project(hidden, slice(None))


class MixtureHead(_Head):
    """Maps hidden states to a mixture of K diagonal Gaussians over tokens of D dimensions.

    Args:
      width: E.
      dim: D.
      num_mixtures: K.
      scale_tol: smallest standard deviation.
      dtype: dtype of the projection, "float32" or "bfloat16"; the likelihood is in float32 either way.
      block: tokens whose logits training holds at a time, on each device; None: see `mixture_nll.default_block`.
      mean_init_std: standard deviation of the normal noise that the biases of the means start with, in units of the
        tokens. At 0, as in the reference, all components start equal and get equal gradients. Up to rounding they stay
        equal, and the mixture is one Gaussian.
      scale_init: standard deviation that all components start with, in the same units, above `scale_tol`. The
        reference's is 1. Narrower components overlap less, so they specialize sooner.
      kmeans_init: start the components at clusters of the first batch's tokens, see `start_at_clusters`; `scale_init`
        is then in units of the clusters' standard deviations.

    Raises:
      ValueError: if `scale_tol`, `dtype`, `mean_init_std` or `scale_init` is out of range, or `mean_init_std` is set
        with `kmeans_init`.
    """

    def __init__(
        self,
        width: int,
        dim: int,
        num_mixtures: int,
        scale_tol: float = 1e-6,
        dtype: str = "float32",
        block: int | None = None,
        mean_init_std: float = 0.0,
        scale_init: float = 1.0,
        kmeans_init: bool = False,
    ):
        super().__init__(width, num_mixtures * (1 + 2 * dim), scale_tol, dtype)
        if kmeans_init and mean_init_std:
            raise ValueError(f"mean_init_std = {mean_init_std}: leave it at 0 with kmeans_init, which sets the means")
        if not (math.isfinite(mean_init_std) and mean_init_std >= 0):
            raise ValueError(f"mean_init_std = {mean_init_std}: use a finite number of at least 0")
        if not (math.isfinite(scale_init) and scale_init > scale_tol):  # at scale_tol it would have no gradient
            raise ValueError(f"scale_init = {scale_init}: use a finite number above scale_tol, {scale_tol}")
        self.num_mixtures, self.block = num_mixtures, block
        self.mean_init_std, self.scale_init, self.kmeans_init = mean_init_std, scale_init, kmeans_init
        self.num_shards, self.backend = None, "eager"  # set by the loop, see `mixture_nll`

    def init_weights(self, generator: torch.Generator) -> None:
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        _, means, raw_scales = split_logits(self.linear.bias, self.num_mixtures)
        if self.mean_init_std:
            nn.init.normal_(means, std=self.mean_init_std, generator=generator)
        nn.init.constant_(raw_scales, square_plus_inverse(self.scale_init))

    def parameters_from_data(self) -> list[nn.Parameter]:
        """Returns the parameters that `start_at_clusters` has to set."""
        return [self.linear.bias] if self.kmeans_init else []

    @torch.no_grad()
    def start_at_clusters(self, tokens: Tensor) -> None:
        """Sets the biases to the clusters that k-means finds.

        Weights are the clusters' shares of the tokens, means their centres, scales `scale_init` times their standard
        deviations, but at least 5% of the standard deviations of all tokens, and at least about 0.001.

        Args:
          tokens: `[N, D]`.

        Raises:
          ValueError: if there are fewer tokens than components.
        """
        from sklearn.cluster import KMeans  # slow to import (1 to 6 s), and few runs need it

        k = self.num_mixtures
        if len(tokens) < k:
            raise ValueError(f"kmeans_init: {len(tokens)} tokens of the first batch are too few for {k} components")
        tokens = tokens.double()[:: max(len(tokens) // CLUSTERED_TOKENS, 1)]
        cluster = torch.from_numpy(KMeans(k, n_init=1, random_state=0).fit_predict(tokens.numpy())).long()
        counts = torch.bincount(cluster, minlength=k).clamp(min=1).double()
        average = lambda x: x.new_zeros(k, x.shape[1]).index_add_(0, cluster, x) / counts[:, None]
        centres = average(tokens)
        stds = average((tokens - centres[cluster]) ** 2).sqrt()
        scales = self.scale_init * torch.maximum(stds, 0.05 * tokens.std(0, correction=0))
        scales = scales.clamp(min=_MIN_SCALE_INIT + self.scale_tol)  # for dimensions that hardly vary
        values = (counts / counts.mean()).log(), centres, square_plus_inverse(scales)
        for rows, value in zip(split_logits(self.linear.bias, self.num_mixtures), values, strict=True):
            rows.copy_(value)

    def components_equal(self) -> bool:
        """Returns whether all components have equal parameters, so that training cannot tell them apart."""
        parts = (part for p in self.linear.parameters() for part in split_logits(p, self.num_mixtures))
        return all(bool((part == part[:1]).all()) for part in parts)

    def forward(self, hidden: Tensor, target: Tensor, token_weight: Tensor) -> TokenScores:
        """Scores tokens.

        Args:
          hidden: `[B, L, E]`.
          target: `[B, L, D]`.
          token_weight: `[B, L]`, factor of each token in the sum.

        Returns:
          The scores.
        """
        with without_autocast(hidden.device):
            return mixture_nll(
                self._cast(hidden, target),
                self._cast(self.linear.weight, target),
                self._cast(self.linear.bias, target),
                target,
                token_weight,
                num_mixtures=self.num_mixtures,
                scale_tol=self.scale_tol,
                block=self.block,
                num_shards=self.num_shards,
                backend=self.backend,
            )

    # Sampling projects to the log-weights, and then to one component per token, not to all P logits.

    def component_logits(self, hidden: Tensor) -> Tensor:
        """`[B, E]` to the components' unnormalized log-weights `[B, K]`."""
        return self._project(hidden, slice(self.num_mixtures))

    def component(self, hidden: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and raw scale (see `scale`), `[B, D]` each, of one component for each token.

        Args:
          hidden: `[B, E]`.
          chosen: int64 `[B]`, the components.
        """
        k = self.num_mixtures
        weight, bias = (p[k:].unflatten(0, (2, k, -1)).index_select(1, chosen) for p in self.linear.parameters())
        with without_autocast(hidden.device):
            h, weight, bias = (self._cast(x, self.linear.weight) for x in (hidden, weight, bias))
            y = (weight @ h.unsqueeze(-1)).squeeze(-1) + bias
        return tuple(y.to(self.linear.weight.dtype))

    def mixture(
        self, hidden: Tensor, temperature_scales: float = 1.0, temperature_probs: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns all components of each token: normalized log-weights `[B, K]`, means and standard deviations
        `[B, K, D]`; arguments as in `sample`."""
        weights, means, raw_scales = split_logits(self.logits(hidden).t(), self.num_mixtures)
        log_weights = (weights.t() * temperature_probs).log_softmax(-1)
        return log_weights, means.movedim(-1, 0), self.scale(raw_scales).movedim(-1, 0) * temperature_scales

    def scale(self, raw: Tensor) -> Tensor:
        """Raw scales to standard deviations."""
        return square_plus(raw).clamp(min=self.scale_tol)

    def sample(
        self,
        hidden: Tensor,
        gumbel: Tensor,
        normal: Tensor,
        temperature_scales: float = 1.0,
        temperature_probs: float = 1.0,
    ) -> Tensor:
        """Samples tokens: first a component by its weight, then from its Gaussian.

        Args:
          hidden: `[B, E]`.
          gumbel: `[B, K]`, standard Gumbel noise.
          normal: `[B, D]`, standard normal noise.
          temperature_scales: multiplies the standard deviations.
          temperature_probs: multiplies the log-weights; above 1 it sharpens, as in the reference.

        Returns:
          `[B, D]`.
        """
        chosen = (self.component_logits(hidden) * temperature_probs + gumbel).argmax(-1)
        loc, raw = self.component(hidden, chosen)
        return loc + self.scale(raw) * temperature_scales * normal


class MultivariateHead(_Head):
    """Maps hidden states to one Gaussian with a full lower-triangular scale, of D² + D logits a token.

    Args:
      width: E.
      dim: D.
      scale_tol: smallest diagonal entry of the scale.
      dtype: as in `MixtureHead`.
    """

    def __init__(self, width: int, dim: int, scale_tol: float = 1e-6, dtype: str = "float32"):
        super().__init__(width, dim * dim + dim, scale_tol, dtype)
        self.dim, self.num_mixtures = dim, 1

    def init_weights(self, generator: torch.Generator) -> None:
        del generator
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor, target: Tensor, token_weight: Tensor) -> TokenScores:
        """Scores tokens, as `MixtureHead.forward`."""
        nll = -self.distribution(self.logits(hidden)).log_prob(target)
        return TokenScores((nll * token_weight).sum(), nll.detach())

    def distribution(self, logits: Tensor, temperature_scales: float = 1.0) -> MultivariateGaussian:
        """Returns the Gaussian that `logits` `[..., D² + D]` describe; `temperature_scales` multiplies its scale."""
        scales, locs = logits.split((self.dim**2, self.dim), dim=-1)
        scales = square_plus(scales.unflatten(-1, (self.dim, self.dim)))
        smallest = self.scale_tol * torch.eye(self.dim, dtype=scales.dtype, device=scales.device)
        scales = torch.maximum(scales, smallest).tril() * temperature_scales
        return MultivariateGaussian(locs, scales)

    def sample(
        self,
        hidden: Tensor,
        gumbel: Tensor,
        normal: Tensor,
        temperature_scales: float = 1.0,
        temperature_probs: float = 1.0,
    ) -> Tensor:
        """Samples tokens, as `MixtureHead.sample`; there is only one component to choose."""
        del gumbel, temperature_probs
        gaussian = self.distribution(self.logits(hidden), temperature_scales)
        with without_autocast(hidden.device):
            return gaussian.loc + (gaussian.scale @ normal.to(gaussian.scale.dtype).unsqueeze(-1)).squeeze(-1)

"""The image head: a density over soft tokens, as a mixture of Gaussians or one multivariate Gaussian.

Dimensions: K mixtures, D token dimension, E width of the hidden states, P = K + 2·K·D numbers a token that describe a
mixture. They lie as K weights, then K·D means, then K·D raw scales, so that each group is contiguous (the reference
interleaves means and scales by mixture; `convert.py` maps between the two).

P is large: 1024 mixtures of 128 dimensions are 263,168 numbers a token. `mixture_nll` therefore computes projection,
likelihood and gradients together, a block of tokens at a time, and no path of training holds more.
"""

import contextlib
import functools
import math
import sys
from typing import NamedTuple

import numpy as np
import torch
from scipy import special
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from jetformer.models import initializers

CLUSTERED_TOKENS = 20_000  # suffice for k-means, which takes seconds of them
_LEAST_SCALE = 1e-3  # that k-means starts with
_LOG_2PI = math.log(2 * math.pi)
# Some 5 arrays of so many floats lie in a CPU's caches. (1024 mixtures of 48 dimensions, 512 tokens, 2 cores: 0.07 s,
# to 0.27 s with everything at once.)
_CPU_CHUNK = 2**18


class TokenScores(NamedTuple):
    """What an image head says of tokens.

    total: the weighted sum of negative log-likelihoods in nats, the only one with a gradient.
    nll: `[B, L]`, negative log-likelihoods in nats.
    responsibilities: `[B, K]`, the components' posterior probabilities, averaged over an example's tokens; None for a
      multivariate head.
    responsibility_entropy: `[B]`, the entropy in nats of a token's responsibilities, averaged likewise.
    """

    total: Tensor
    nll: Tensor
    responsibilities: Tensor | None = None
    responsibility_entropy: Tensor | None = None


def square_plus(x: Tensor) -> Tensor:
    """(x + sqrt(x² + 4)) / 2, a positive function like softplus."""
    return (x + (x.square() + 4).sqrt()) / 2


class Mixture(NamedTuple):
    """A mixture of K diagonal Gaussians for each token.

    logits: `[..., K]`, unnormalized log-weights.
    locs: `[..., K, D]`, means.
    scales: `[..., K, D]`, standard deviations.
    """

    logits: Tensor
    locs: Tensor
    scales: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density `[...]` in nats at `x` `[..., D]`."""
        z = (x.unsqueeze(-2) - self.locs) / self.scales
        components = -0.5 * (z.square() + _LOG_2PI).sum(-1) - self.scales.log().sum(-1)
        return torch.logsumexp(self.logits.log_softmax(-1) + components, dim=-1)


class MultivariateGaussian(NamedTuple):
    """A Gaussian with full covariance for each token.

    loc: `[..., D]`, mean.
    scale: `[..., D, D]`, lower-triangular, with covariance scale · scaleᵀ.
    """

    loc: Tensor
    scale: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density `[...]` in nats at `x` `[..., D]`."""
        z = torch.linalg.solve_triangular(self.scale, (x - self.loc).unsqueeze(-1), upper=False)
        logdet = self.scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * (z.squeeze(-1).square() + _LOG_2PI).sum(-1) - logdet


def mixture_from_logits(
    logits: Tensor,
    num_mixtures: int,
    scale_tol: float,
    temperature_scales: float = 1.0,
    temperature_probs: float = 1.0,
) -> Mixture:
    """Reads a mixture off the head's numbers.

    Args:
      logits: `[..., P]`.
      num_mixtures: K.
      scale_tol: smallest standard deviation.
      temperature_scales: multiplies the standard deviations.
      temperature_probs: multiplies the log-weights (so above 1 sharpens, as in the reference).
    """
    k = num_mixtures
    d = (logits.shape[-1] - k) // (2 * k)
    weights, locs, raw_scales = logits.split((k, k * d, k * d), dim=-1)
    scales = square_plus(raw_scales).clamp(min=scale_tol) * temperature_scales
    return Mixture(weights * temperature_probs, locs.unflatten(-1, (k, d)), scales.unflatten(-1, (k, d)))


def _score_block(logits: Tensor, x: Tensor, w: Tensor, k: int, raw_min: float, differentiate: bool, chunk: int):
    """Scores n tokens, and turns their logits into the gradients of their weighted negative log-likelihoods.

    Args:
      logits: `[P, n]`; changed in place. Tokens come last: products are faster so, and sums over D and K run along
        them.
      x: `[n, D]`, the tokens.
      w: `[n]`, their weights.
      k: number of mixtures.
      raw_min: smallest raw scale.
      differentiate: whether gradients are wanted.
      chunk: about how many means to work on at a time.

    Returns:
      The log-likelihoods `[n]`; the responsibilities `[K, n]` and their entropies in nats `[n]`; the gradients for `x`
      `[n, D]` or None.
    """
    n, d = x.shape
    weights, means, raw_scales = logits.split((k, k * d, k * d))
    means, raw_scales = means.unflatten(0, (k, d)), raw_scales.unflatten(0, (k, d))
    x = x.t().contiguous()
    # In the comments, s is the scale and z = (x - mean) / s. With q = sqrt(r² + 4): s = (r + q) / 2 and
    # ds / dr = s / q. Halves and quarters wait for the sums over D.
    components = []
    size = max(1, chunk // (d * n))
    for first in range(0, k, size):
        m, r = means[first : first + size], raw_scales[first : first + size]
        r.clamp_(min=raw_min)
        q = r.square().add_(4).sqrt_()
        # 2 / s = q - r = (q - |r|) + 2 max(-r, 0), where q - |r| = 4 / (q + |r|): nothing cancels.
        precision = r.abs().add_(q).reciprocal_().mul_(4).sub_(r.clamp(max=0), alpha=2)
        m.sub_(x).mul_(precision)  # -2 z
        t = precision.log().addcmul_(m, m, value=-0.125)
        components.append(t.sum(1))
        if differentiate:
            # d nll / d raw scale = posterior · (1 - z²) / q, and 0 where r was clamped
            t = torch.mul(m, m, out=t).mul_(-0.25).add_(1).div_(q)
            r.copy_(torch.ops.aten.threshold_backward(t, r, raw_min))
            m.mul_(precision)  # d nll / d mean = -posterior · z / s
    log_weights = weights.log_softmax(0)
    joint = torch.cat(components).add_(log_weights).sub_(d * (math.log(2) + 0.5 * _LOG_2PI))
    log_prob = torch.logsumexp(joint, dim=0)
    # exp is 0 at -1e4, and so is its share of the entropy, which at -inf would be 0 · inf.
    log_posterior = (joint - log_prob).clamp_(min=-1e4)
    responsibilities = log_posterior.exp()
    entropy = log_posterior.mul_(responsibilities).sum(0).neg_()
    if not differentiate:
        return log_prob, responsibilities, entropy, None
    posterior = responsibilities * w
    weights.copy_(log_weights.exp_().mul_(w).sub_(posterior))
    raw_scales.mul_(posterior.unsqueeze(1))
    means.mul_(posterior.mul_(0.25).unsqueeze(1))
    return log_prob, responsibilities, entropy, means.sum(0).neg_().t()


@functools.cache
def _compiled_score_block():
    return torch.compile(_score_block, dynamic=False)


class _MixtureNLL(torch.autograd.Function):
    """Weighted sum of the tokens' negative log-likelihoods, with all gradients computed in the forward pass.

    The backward pass would need the logits again; as the sum's gradient for each token is known beforehand (its
    weight), a block's logits are turned into their gradients in place and multiplied into the gradients of hidden
    states, weight and bias before the next block begins.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, token_weight, num_mixtures, scale_tol, block, num_shards, compiled):
        needs = ctx.needs_input_grad[:4]
        score_block = _compiled_score_block() if compiled else _score_block
        # What a CPU's cache holds; elsewhere all at once.
        chunk = _CPU_CHUNK if target.device.type == "cpu" and not compiled else sys.maxsize
        nll = target.new_empty(target.shape[:2])
        responsibilities = target.new_zeros(len(target), num_mixtures)
        responsibility_entropy = target.new_zeros(len(target))
        grad_hidden = torch.empty_like(hidden) if needs[0] else None
        # Sums over many blocks are kept in the likelihood's precision, whatever the products are computed in.
        grad_weight = torch.zeros_like(weight, dtype=target.dtype) if needs[1] else None
        grad_bias = torch.zeros_like(bias, dtype=target.dtype) if needs[2] else None
        grad_target = torch.empty_like(target) if needs[3] else None
        # A scale of at least scale_tol is a raw scale of at least this.
        raw_min = scale_tol - 1 / scale_tol
        buffer = None  # one for all blocks: to allocate this much takes time, and two would take twice the memory
        for rows in _blocks(*target.shape[:2], block, num_shards):
            h, x, w = (y[rows].flatten(0, 1) for y in (hidden, target, token_weight))
            examples = nll[rows].shape[:1]
            if buffer is None or buffer.shape[1] != len(h):
                buffer = weight.new_empty(len(weight), len(h))
            logits = torch.addmm(bias[:, None], weight, h.t(), out=buffer).to(target.dtype)
            log_prob, posterior, entropy, grad_x = score_block(logits, x, w, num_mixtures, raw_min, any(needs), chunk)
            nll[rows] = -log_prob.view(*examples, -1)
            responsibilities[rows[0]] += posterior.view(num_mixtures, *examples, -1).sum(-1).t()
            responsibility_entropy[rows[0]] += entropy.view(*examples, -1).sum(-1)
            if not any(needs):
                continue
            if needs[3]:
                grad_target[rows] = grad_x.unflatten(0, (*examples, -1))
            if needs[2]:
                grad_bias.add_(logits.sum(1))
            logits = logits.to(weight.dtype)
            if needs[0]:
                grad_hidden[rows] = (logits.t() @ weight).unflatten(0, (*examples, -1))
            if needs[1] and grad_weight.dtype == weight.dtype:
                grad_weight.addmm_(logits, h)
            elif needs[1]:
                grad_weight.add_(logits @ h)
        ctx.dtypes = (hidden.dtype, weight.dtype, bias.dtype, target.dtype)
        ctx.grads = (grad_hidden, grad_weight, grad_bias, grad_target)
        averages = (responsibilities / target.shape[1], responsibility_entropy / target.shape[1])
        ctx.mark_non_differentiable(nll, *averages)
        return (nll * token_weight).sum(), nll, *averages

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sum, *_):
        pairs = zip(ctx.grads, ctx.dtypes, strict=True)
        grads = (g if g is None else g.mul_(grad_sum).to(dtype) for g, dtype in pairs)
        return *grads, None, None, None, None, None, None


def _blocks(batch_size: int, length: int, block: int, num_shards: int | None) -> list[tuple[slice, slice]]:
    """Cuts `[B, L]` tokens into blocks of about `block`; see `mixture_nll`."""
    if num_shards is None:  # whole examples lie side by side: cutting these apart copies nothing
        examples, tokens = max(1, block // length), min(block, length)
    else:
        examples, tokens = batch_size, max(1, min(length, block * num_shards // batch_size))
    return [
        (slice(b, b + examples), slice(t, t + tokens))
        for b in range(0, batch_size, examples)
        for t in range(0, length, tokens)
    ]


def mixture_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    token_weight: Tensor,
    *,
    num_mixtures: int,
    scale_tol: float,
    block: int,
    num_shards: int | None = None,
    compiled: bool = False,
) -> TokenScores:
    """Projects hidden states to mixtures and scores tokens under them, `block` tokens at a time.

    Equal to `mixture_from_logits(F.linear(hidden, weight, bias), ...).log_prob(target)`, for one pass over the tokens
    in training instead of two, and memory for `block` tokens' logits.

    Args:
      hidden: `[B, L, E]`.
      weight: `[P, E]`.
      bias: `[P]`.
      target: `[B, L, D]`.
      token_weight: `[B, L]`, the factor of each token in the sum; no gradient flows to it.
      num_mixtures: K.
      scale_tol: smallest standard deviation.
      block: how many tokens at a time.
      num_shards: over how many devices the examples are spread; then a block has tokens of all examples, `block` of
        them on each device, and no token has to move. None: they are on one device.
      compiled: whether torch.compile compiles what is between the products.

    Returns:
      The scores. A gradient flows through `total` alone.
    """
    tensors = (hidden, weight, bias, target)
    if not torch.is_grad_enabled():
        tensors = (x.detach() for x in tensors)  # else the forward pass would compute gradients
    return TokenScores(
        *_MixtureNLL.apply(*tensors, token_weight.detach(), num_mixtures, scale_tol, block, num_shards, compiled)
    )


def count_components(responsibilities: np.ndarray, entropy: float) -> dict[str, float]:
    """Counts the components that a mixture uses.

    Args:
      responsibilities: `[K]`, the components' posterior probabilities, averaged over tokens.
      entropy: the entropy in nats of a token's responsibilities, averaged over the same tokens.

    Returns:
      `effective_components`, in 1..K: the exponential of the entropy of the average responsibilities. K components that
      are used equally often give K.
      `distinct_components`, in 1..K: the exponential of the mutual information between token and component. K
      components that are used equally often and do not overlap give K; components that are equal give 1.
    """
    average_entropy = special.entr(responsibilities / responsibilities.sum()).sum()
    return {
        "effective_components": math.exp(average_entropy),
        "distinct_components": math.exp(max(average_entropy - entropy, 0.0)),
    }


class MixtureHead(nn.Module):
    """Hidden states to a mixture of K diagonal Gaussians over tokens of D dimensions.

    Args:
      width: E.
      dim: D.
      num_mixtures: K.
      scale_tol: smallest standard deviation.
      dtype: "float32", or "bfloat16" to multiply in it; the likelihood is computed in float32 either way.
      block: how many tokens' logits training holds at a time, on each device.
      mean_init_std: standard deviation of the normal noise that the biases of the means start from, in the units of
        the tokens. At 0, as in the reference, all components start equal and get equal gradients: but for rounding they
        stay equal, and the mixture is one Gaussian.
      scale_init: standard deviation that all components start with, in the same units, above `scale_tol`. The
        reference's is 1. Narrower components overlap less, so that they specialize sooner.
      kmeans_init: start the components where the tokens of the first batch are, see `start_at_clusters`; `scale_init`
        is in units of the clusters' standard deviations then.

    Raises:
      ValueError: if `scale_tol`, `dtype`, `mean_init_std` or `scale_init` is out of its range, or `mean_init_std` is
        set with `kmeans_init`.
    """

    def __init__(
        self,
        width: int,
        dim: int,
        num_mixtures: int,
        scale_tol: float = 1e-6,
        dtype: str = "float32",
        block: int = 256,
        mean_init_std: float = 0.0,
        scale_init: float = 1.0,
        kmeans_init: bool = False,
    ):
        super().__init__()
        if kmeans_init and mean_init_std:
            raise ValueError(f"mean_init_std = {mean_init_std}: leave it at 0 with kmeans_init, which sets the means")
        if not (math.isfinite(mean_init_std) and mean_init_std >= 0):
            raise ValueError(f"mean_init_std = {mean_init_std}: give a finite number of 0 or more")
        if not (math.isfinite(scale_init) and scale_init > scale_tol):  # at scale_tol it would have no gradient
            raise ValueError(f"scale_init = {scale_init}: give a finite number above scale_tol, {scale_tol}")
        self.num_mixtures, self.block = num_mixtures, block
        self.mean_init_std, self.scale_init, self.kmeans_init = mean_init_std, scale_init, kmeans_init
        self.num_shards, self.compiled = None, False  # see `mixture_nll`; a loop sets them
        self.scale_tol = _check_scale_tol(scale_tol)
        self.dtype = _head_dtype(dtype)
        self.linear = nn.Linear(width, num_mixtures * (1 + 2 * dim))

    def init_weights(self, generator: torch.Generator) -> None:
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        _, means, raw_scales = self._parts(self.linear.bias)
        if self.mean_init_std:
            initializers.normal_(means, self.mean_init_std, generator)
        nn.init.constant_(raw_scales, self.scale_init - 1 / self.scale_init)  # what square_plus makes it of

    def parameters_from_data(self) -> list[nn.Parameter]:
        """What `start_at_clusters` sets, if it is to."""
        return [self.linear.bias] if self.kmeans_init else []

    @torch.no_grad()
    def start_at_clusters(self, tokens: Tensor) -> None:
        """Sets the biases to the clusters that k-means finds: weights to how many tokens they have, means to their
        centres, scales to `scale_init` times their standard deviations (at least 5% of those of all tokens, and about
        0.001).

        Args:
          tokens: `[N, D]`.

        Raises:
          ValueError: if there are fewer tokens than components.
        """
        from sklearn.cluster import KMeans  # slow, and needed when a run begins only

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
        scales = scales.clamp(min=_LEAST_SCALE + self.scale_tol)  # of dimensions that hardly vary
        values = (counts / counts.mean()).log(), centres, scales - 1 / scales  # scales: what square_plus makes them of
        for rows, value in zip(self._parts(self.linear.bias), values, strict=True):
            rows.copy_(value)

    def _parts(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows `[P, ...]` as those of log-weights `[K, ...]`, means and raw scales `[K, D, ...]`."""
        k = self.num_mixtures
        weights, means, raw_scales = rows.split((k, (len(rows) - k) // 2, (len(rows) - k) // 2))
        return weights, means.unflatten(0, (k, -1)), raw_scales.unflatten(0, (k, -1))

    def components_equal(self) -> bool:
        """Returns whether all components have equal parameters, so that training has no reason to tell them apart."""
        parts = (part for p in self.linear.parameters() for part in self._parts(p))
        return all(bool((part == part[:1]).all()) for part in parts)

    def forward(self, hidden: Tensor, target: Tensor, token_weight: Tensor) -> TokenScores:
        """Scores tokens.

        Args:
          hidden: `[B, L, E]`.
          target: `[B, L, D]`.
          token_weight: `[B, L]`, the factor of each token in the sum.

        Returns:
          The scores.
        """
        with _without_autocast(hidden.device):
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
                compiled=self.compiled,
            )

    def _cast(self, x: Tensor, like: Tensor) -> Tensor:
        return x.to(self.dtype if self.dtype is torch.bfloat16 else like.dtype)

    def _project(self, hidden: Tensor, rows: slice) -> Tensor:
        """`[..., E]` to some of the numbers that describe a mixture, in float32 (or float64)."""
        weight, bias = self.linear.weight, self.linear.bias
        with _without_autocast(hidden.device):
            y = F.linear(*(self._cast(x, weight) for x in (hidden, weight[rows], bias[rows])))
        return y.to(weight.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., E]` to `[..., P]`, in float32 (or float64)."""
        return self._project(hidden, slice(None))

    def distribution(self, logits: Tensor, **temperatures: float) -> Mixture:
        """The mixture that `logits` `[..., P]` describe; see `mixture_from_logits`."""
        return mixture_from_logits(logits, self.num_mixtures, self.scale_tol, **temperatures)

    # Sampling reads the parameters of one component for each token: of 1024, some 500 bytes for every megabyte.

    def component_logits(self, hidden: Tensor) -> Tensor:
        """`[B, E]` to the components' unnormalized log-weights `[B, K]`."""
        return self._project(hidden, slice(self.num_mixtures))

    def component(self, hidden: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and raw scale (see `scale`), `[B, D]` each, of component `chosen` int64 `[B]` at `hidden` `[B, E]`."""
        k = self.num_mixtures
        weight, bias = (p[k:].unflatten(0, (2, k, -1)).index_select(1, chosen) for p in self.linear.parameters())
        with _without_autocast(hidden.device):
            h, weight, bias = (self._cast(x, self.linear.weight) for x in (hidden, weight, bias))
            y = (weight @ h.unsqueeze(-1)).squeeze(-1) + bias
        return tuple(y.to(self.linear.weight.dtype))

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
        """Samples tokens: a component by its weight, then its Gaussian.

        Args:
          hidden: `[B, E]`.
          gumbel: `[B, K]`, standard Gumbel noise.
          normal: `[B, D]`, standard normal noise.
          temperature_scales, temperature_probs: see `mixture_from_logits`.

        Returns:
          `[B, D]`.
        """
        chosen = (self.component_logits(hidden) * temperature_probs + gumbel).argmax(-1)
        loc, raw = self.component(hidden, chosen)
        return loc + self.scale(raw) * temperature_scales * normal


class MultivariateHead(nn.Module):
    """Hidden states to one Gaussian with a full lower-triangular scale, `[..., E]` to D² + D numbers a token.

    Args:
      width: E.
      dim: D.
      scale_tol: smallest diagonal entry of the scale.
      dtype: as in `MixtureHead`.
    """

    def __init__(self, width: int, dim: int, scale_tol: float = 1e-6, dtype: str = "float32"):
        super().__init__()
        self.dim, self.num_mixtures, self.scale_tol = dim, 1, _check_scale_tol(scale_tol)
        self.dtype = _head_dtype(dtype)
        self.linear = nn.Linear(width, dim * dim + dim)

    def init_weights(self, generator: torch.Generator) -> None:
        del generator
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    _cast = MixtureHead._cast
    _project = MixtureHead._project
    logits = MixtureHead.logits

    def forward(self, hidden: Tensor, target: Tensor, token_weight: Tensor) -> TokenScores:
        """As `MixtureHead.forward`."""
        nll = -self.distribution(self.logits(hidden)).log_prob(target)
        return TokenScores((nll * token_weight).sum(), nll.detach())

    def sample(
        self,
        hidden: Tensor,
        gumbel: Tensor,
        normal: Tensor,
        temperature_scales: float = 1.0,
        temperature_probs: float = 1.0,
    ) -> Tensor:
        """As `MixtureHead.sample`; there is one component, and nothing to choose."""
        del gumbel, temperature_probs
        gaussian = self.distribution(self.logits(hidden), temperature_scales)
        with _without_autocast(hidden.device):
            return gaussian.loc + (gaussian.scale @ normal.to(gaussian.scale.dtype).unsqueeze(-1)).squeeze(-1)

    def distribution(self, logits: Tensor, temperature_scales: float = 1.0) -> "MultivariateGaussian":
        """The Gaussian that `logits` `[..., D² + D]` describe; `temperature_scales` multiplies its scale."""
        scales, locs = logits.split((self.dim**2, self.dim), dim=-1)
        scales = square_plus(scales.unflatten(-1, (self.dim, self.dim)))
        smallest = self.scale_tol * torch.eye(self.dim, dtype=scales.dtype, device=scales.device)
        scales = torch.maximum(scales, smallest).tril() * temperature_scales
        return MultivariateGaussian(locs, scales)


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """The head chooses its own dtypes. (There is no autocast on the meta device, not even to turn off.)"""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def _check_scale_tol(scale_tol: float) -> float:
    if scale_tol <= 0:
        raise ValueError(f"scale_tol = {scale_tol}: the smallest scale has to be positive")
    return scale_tol


def _head_dtype(name: str) -> torch.dtype:
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"head dtype {name!r} is neither float32 nor bfloat16")
    return getattr(torch, name)

"""Classifier-free guidance of soft tokens: sampling from p_c^(1+w) / p_u^w, of the conditional density p_c and the
unconditional density p_u.

`density` is the reference's method (GIVT, arXiv 2312.02116, section 3; big_vision
`models/proj/givt/parallel_decode.py`): the weights of p_c choose a component, and each dimension is sampled from the
quotient of that component's Gaussians in p_c and p_u. `clipped` is the same, with the scales' ratio clipped so that
every quotient is a Gaussian (STARFlow, arXiv 2506.06276). `resample` draws candidates from p_c and chooses one by
(p_c / p_u)^w (FARMER, arXiv 2510.23588). `interp` extrapolates the parameters of the mixture.

Dimensions: B batch, L image tokens, K mixtures, D token dimension, E width, M candidates.
"""

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from jetformer import prng
from jetformer.models.mixture import MixtureHead, MultivariateHead
from jetformer.ranges import NonNegativeFloat, PositiveInt

# The reference's rejection sampling: number of proposals, distance from the mean within which it searches the target's
# maximum, and scale of the proposals relative to the wider Gaussian.
_MAX_PROPOSALS, _REACH, _WIDER = 1000, 10.0, 2.0
# Folded into a token's key.
_COMPONENT, _GAUSSIAN, _MORE = range(3)

MODES = ("none", "density", "clipped", "resample", "interp")
SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Configures classifier-free guidance.

    Attributes:
      mode: "density", "clipped", "resample", "interp" or "none".
      weight: w; 0 samples from the conditional density.
      schedule: the weight over an image's tokens: "constant"; "linear", from 0 at the first to w at the last; "cosine",
        likewise along half a cosine, flat at both ends.
      num_candidates: M, of each token with "resample". The more, the closer to p_c^(1+w) / p_u^w; one is no guidance.
    """

    mode: str = "none"
    weight: NonNegativeFloat = 0.0
    schedule: str = "constant"
    num_candidates: PositiveInt = 16

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"guidance {self.mode!r}: expected one of {', '.join(MODES)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"guidance schedule {self.schedule!r}: expected one of {', '.join(SCHEDULES)}")
        if not self.weight >= 0:
            raise ValueError(f"guidance weight {self.weight}: expected 0 or more")
        if self.mode == "none" and self.weight:
            raise ValueError(f"guidance weight {self.weight} without guidance: choose {', '.join(MODES[1:])}")
        if self.num_candidates < 1:
            raise ValueError(f"{self.num_candidates} candidates of guidance: expected 1 or more")

    @property
    def on(self) -> bool:
        return self.mode != "none"

    def check(self, head: MixtureHead | MultivariateHead) -> None:
        """Checks that tokens of this head can be guided.

        Raises:
          ValueError: if not.
        """
        if self.on and not isinstance(head, MixtureHead):
            raise ValueError(
                f"guidance {self.mode} needs a mixture of diagonal Gaussians, but the model's head is one multivariate "
                "Gaussian: sample without guidance"
            )

    def weights(self, num_tokens: int) -> Tensor:
        """Returns the weight at each of L tokens, `[L]`."""
        t = torch.linspace(0, 1, num_tokens) if num_tokens > 1 else torch.ones(1)
        shape = {"constant": torch.ones_like(t), "linear": t, "cosine": (1 - (math.pi * t).cos()) / 2}
        return self.weight * shape[self.schedule]


def guidance_of(
    mode: str | None, weight: float, schedule: str, candidates: int | None = None, *, default: str = "density"
) -> Guidance:
    """Returns classifier-free guidance, which samples from p(x | y)^(1+w) / p(x)^w.

    Args:
      mode: "density", "clipped", "resample", "interp" or "none"; None: the default if there is a weight.
      weight: w.
      schedule: "constant", "linear" or "cosine", see `Guidance`.
      candidates: of each token with "resample"; None: 16.
      default: mode, "interp" for a flow alone.

    Raises:
      ValueError: for other values, and for candidates without "resample".
    """
    mode = mode or (default if weight else "none")
    if candidates is None:
        return Guidance(mode, weight, schedule)
    if mode != "resample":
        raise ValueError(f"{candidates} candidates of guidance {mode}: they apply to the guidance resample only")
    return Guidance(mode, weight, schedule, candidates)


class Noise(NamedTuple):
    """All random draws of an image's tokens.

    gumbel: `[B, L, K]`, standard Gumbel noise, to choose components.
    normal: `[B, L, D]`, standard normal noise.
    keys: int32 `[B, L, 2]`, for further draws, of rejection sampling and of candidates.
    """

    gumbel: Tensor
    normal: Tensor
    keys: Tensor

    def at(self, number: Tensor) -> "Noise":
        """Returns the draws of one token; `number` is int64 `[1]`."""
        return Noise(*(x.index_select(1, number).squeeze(1) for x in self))


class Draft(NamedTuple):
    """One token of each image, before rejection sampling, see `resolve`.

    sample: `[B, D]`.
    pending: bool `[B, D]`, dimensions that rejection sampling must replace; None for none.
    quotient: the arguments of `_reject` for them.
    """

    sample: Tensor
    pending: Tensor | None = None
    quotient: tuple[Tensor, ...] = ()


def draw(head: MixtureHead | MultivariateHead, keys: Tensor, num_tokens: int, dim: int) -> Noise:
    """Draws the noise of `num_tokens` tokens of `dim` dimensions from the samples' keys, int32 `[B, 2]`."""
    numbers = torch.arange(num_tokens, dtype=torch.int32, device=keys.device)
    keys = prng.fold_in(keys[:, None], numbers)
    components = gumbel(prng.fold_in(keys, _COMPONENT), head.num_mixtures)
    normal = prng.normal(prng.fold_in(keys, _GAUSSIAN), (dim,))
    return Noise(components, normal, prng.fold_in(keys, _MORE))


def gumbel(keys: Tensor, size: int) -> Tensor:
    """Returns standard Gumbel noise, float32 `[..., size]`: the argmax of log-weights plus this noise is a draw by the
    weights."""
    uniform = prng.uniform(keys, (size,))
    return -(-uniform.clamp(min=torch.finfo(uniform.dtype).tiny).log()).log()


def draft_token(
    head: MixtureHead | MultivariateHead,
    hidden: Tensor,
    noise: Noise,
    mode: str,
    weight: Tensor,
    temperature_scales: float = 1.0,
    temperature_probs: float = 1.0,
    num_candidates: int = Guidance.num_candidates,
) -> Draft:
    """Samples one token of each image, except for rejection sampling, which waits for the device and is left to
    `resolve`: a CUDA graph can capture this.

    Args:
      head: the image head.
      hidden: `[B, E]`; with guidance `[2 B, E]`, first with the condition, then without.
      noise: draws of this token.
      mode: see `Guidance`.
      weight: w at this token, 0-dimensional.
      temperature_scales: multiplies the standard deviations of both densities.
      temperature_probs: multiplies the log-weights.
      num_candidates: see `Guidance`.
    """
    if mode == "none":
        return Draft(head.sample(hidden, noise.gumbel, noise.normal, temperature_scales, temperature_probs))
    if mode == "resample":
        mixtures = head.mixture(hidden, temperature_scales, temperature_probs)
        return Draft(resample(*mixtures, weight, noise.keys, num_candidates))
    logits = head.component_logits(hidden if mode == "interp" else hidden[: len(hidden) // 2])

    def extrapolate(x: Tensor) -> Tensor:
        c, u = x.chunk(2)
        return c + weight * (c - u)

    if mode == "interp":
        logits = extrapolate(logits)
    chosen = (logits * temperature_probs + noise.gumbel).argmax(-1)
    locs, raw_scales = head.component(hidden, chosen.repeat(2))
    if mode == "interp":
        return Draft(extrapolate(locs) + head.scale(extrapolate(raw_scales)) * temperature_scales * noise.normal)
    (loc_c, loc_u), (scale_c, scale_u) = locs.chunk(2), (head.scale(raw_scales) * temperature_scales).chunk(2)
    quotient = (loc_c, scale_c, loc_u, scale_u, weight, noise.normal, noise.keys)
    return draft_quotient(*quotient, clip=mode == "clipped")


def draft_quotient(
    loc_c: Tensor,
    scale_c: Tensor,
    loc_u: Tensor,
    scale_u: Tensor,
    weight: Tensor,
    normal: Tensor,
    keys: Tensor,
    clip: bool = False,
) -> Draft:
    """Samples each dimension from the density proportional to N(loc_c, scale_c)^(1+w) / N(loc_u, scale_u)^w.

    The log-density is a parabola. Where it opens downwards, which is where scale_u² > scale_c² · w / (1 + w), the
    density is Gaussian. Elsewhere it cannot be normalized, and the reference's rejection sampling defines the sample,
    see `_reject`.

    Args:
      loc_c, scale_c: `[B, D]`, mean and standard deviation of the conditional density.
      loc_u, scale_u: likewise of the unconditional density.
      weight: w, 0-dimensional.
      normal: `[B, D]`, standard normal noise.
      keys: int32 `[B, 2]`, for rejection sampling.
      clip: replace scale_u by scale_c where it is smaller: every quotient is a Gaussian, not wider than scale_c.
    """
    if clip:
        scale_u = torch.maximum(scale_u, scale_c)
    ratio = (scale_c / scale_u).square()
    precision = 1 + weight - weight * ratio  # times scale_c²
    is_gaussian = precision > 0
    precision = precision.where(is_gaussian, 1.0)
    loc = loc_c + weight * ratio * (loc_c - loc_u) / precision
    sample = loc + scale_c * precision.rsqrt() * normal
    if clip:
        return Draft(sample)
    keys = prng.fold_in(keys[:, None], torch.arange(loc.shape[1], dtype=torch.int32, device=loc.device))
    quotient = (loc_c, scale_c, loc_u, scale_u, normal, weight.expand_as(loc), keys)
    if loc.device.type == "xla":  # a transfer to the host costs more than rejection sampling for all dimensions
        return Draft(sample.where(is_gaussian, _reject(*quotient)))
    return Draft(sample, ~is_gaussian, quotient)


def resolve(draft: Draft) -> Tensor:
    """Returns the token `[B, D]`, with the pending dimensions rejection sampled."""
    if draft.pending is None or not draft.pending.any():
        return draft.sample
    sample = draft.sample.clone()
    sample[draft.pending] = _reject(*(x[draft.pending] for x in draft.quotient))
    return sample


def _reject(
    loc_c: Tensor, scale_c: Tensor, loc_u: Tensor, scale_u: Tensor, normal: Tensor, weight: Tensor, keys: Tensor
) -> Tensor:
    """Samples where the target's logarithm is convex, by the reference's rejection sampling.

    Proposals come from a Gaussian at loc_c with twice the larger scale. The envelope is the target's maximum within ±10
    of loc_c divided by the proposals' largest density; the maximum of a convex function is at one of the ends. The
    sample is the first accepted of 1000 proposals, or a draw from the conditional density if none is accepted.

    Args:
      loc_c, scale_c, loc_u, scale_u, normal: `[...]`; see `draft_quotient`.
      weight: w, `[...]`.
      keys: int32 `[..., 2]`.
    """
    quotient = (loc_c, scale_c, loc_u, scale_u, normal, weight)
    loc_c, scale_c, loc_u, scale_u, normal, weight = (x.unsqueeze(-1) for x in quotient)
    log_normal = lambda x, loc, scale: -0.5 * ((x - loc) / scale).square() - scale.log()
    log_target = lambda x: (1 + weight) * log_normal(x, loc_c, scale_c) - weight * log_normal(x, loc_u, scale_u)
    width = _WIDER * torch.maximum(scale_c, scale_u)
    noise = prng.normal(prng.fold_in(keys, 0), (_MAX_PROPOSALS,)).to(loc_c.dtype)
    proposals = loc_c + width * noise
    largest = torch.maximum(log_target(loc_c - _REACH), log_target(loc_c + _REACH))
    log_acceptance = log_target(proposals) - largest + 0.5 * noise.square()
    accepted = prng.uniform(prng.fold_in(keys, 1), (_MAX_PROPOSALS,)).log() < log_acceptance
    first = proposals.gather(-1, accepted.int().argmax(-1, keepdim=True))
    return first.where(accepted.any(-1, keepdim=True), loc_c + scale_c * normal).squeeze(-1)


def resample(
    log_weights: Tensor, locs: Tensor, scales: Tensor, weight: Tensor, keys: Tensor, num_candidates: int
) -> Tensor:
    """Samples from p_c^(1+w) / p_u^w of two mixtures by self-normalized importance resampling: draws candidates from
    p_c, and chooses one of them by the weights (p_c / p_u)^w.

    Args:
      log_weights: `[2 B, K]`, of the components, first those of p_c, then of p_u.
      locs, scales: `[2 B, K, D]`, means and standard deviations.
      weight: w, 0-dimensional.
      keys: int32 `[B, 2]`.
      num_candidates: M.

    Returns:
      `[B, D]`.
    """
    numbered = prng.fold_in(keys[:, None], torch.arange(num_candidates, dtype=torch.int32, device=keys.device))
    batch_size, dim = len(keys), locs.shape[2]
    noise = gumbel(prng.fold_in(numbered, _COMPONENT), log_weights.shape[1])
    chosen = (log_weights[:batch_size, None] + noise).argmax(-1, keepdim=True).expand(-1, -1, dim)
    normal = prng.normal(prng.fold_in(numbered, _GAUSSIAN), (dim,))
    candidates = locs[:batch_size].gather(1, chosen) + scales[:batch_size].gather(1, chosen) * normal
    differences = []
    for x in candidates.unbind(1):  # one at a time, for it takes as much memory as the mixtures
        z = (x.repeat(2, 1)[:, None] - locs) / scales
        c, u = (log_weights - (0.5 * z.square() + scales.log()).sum(-1)).logsumexp(-1).chunk(2)
        differences.append(c - u)
    log_ratios = weight * torch.stack(differences, dim=1)
    best = (log_ratios + gumbel(prng.fold_in(keys, num_candidates), num_candidates)).argmax(-1)
    return candidates.take_along_dim(best[:, None, None], dim=1).squeeze(1)

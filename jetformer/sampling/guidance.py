"""Classifier-free guidance of soft tokens: what to sample from instead of the conditional density p_c, given the
unconditional one p_u.

`density` is the reference's p_c^(1+w) / p_u^w (GIVT, arXiv 2312.02116, section 3; big_vision
`models/proj/givt/parallel_decode.py`): a component is chosen by the weights of p_c, the same one of p_u is taken, and
each dimension then has a Gaussian divided by another. `interp` moves the mixture's parameters away from those of p_u.

Dimensions: B batch, L image tokens, K mixtures, D token dimension, E width.
"""

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from jetformer import prng
from jetformer.models.mixture import MixtureHead, MultivariateHead
from jetformer.ranges import NonNegativeFloat

# Of the reference's rejection sampling: how many proposals it makes, how far from the mean it looks for the target's
# maximum, and by what its proposals are wider than the wider Gaussian.
_MAX_PROPOSALS, _REACH, _WIDER = 1000, 10.0, 2.0
# What a token's key is folded with.
_COMPONENT, _GAUSSIAN, _REJECTION = range(3)

MODES = ("none", "density", "interp")
SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How to guide.

    Attributes:
      mode: "density", "interp" or "none".
      weight: w; 0 samples from the conditional density.
      schedule: what the weight does over the image's tokens: "constant"; "linear" from 0 at the first to w at the last;
        "cosine", the same on half a cosine, which begins and ends flat.
    """

    mode: str = "none"
    weight: NonNegativeFloat = 0.0
    schedule: str = "constant"

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"guidance {self.mode!r}: give one of {', '.join(MODES)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"guidance schedule {self.schedule!r}: give one of {', '.join(SCHEDULES)}")
        if not self.weight >= 0:
            raise ValueError(f"guidance weight {self.weight}: give 0 or more")
        if self.mode == "none" and self.weight:
            raise ValueError(f"a guidance weight of {self.weight} without guidance: give density or interp")

    @property
    def on(self) -> bool:
        return self.mode != "none"

    def check(self, head: MixtureHead | MultivariateHead) -> None:
        """Looks whether tokens of this head can be guided.

        Raises:
          ValueError: if not.
        """
        if self.on and not isinstance(head, MixtureHead):
            raise ValueError(
                f"guidance {self.mode} needs a mixture of diagonal Gaussians, the model has one multivariate Gaussian: "
                "sample without guidance"
            )

    def weights(self, num_tokens: int) -> Tensor:
        """The weight at each of L tokens, `[L]`."""
        t = torch.linspace(0, 1, num_tokens) if num_tokens > 1 else torch.ones(1)
        shape = {"constant": torch.ones_like(t), "linear": t, "cosine": (1 - (math.pi * t).cos()) / 2}
        return self.weight * shape[self.schedule]


class Noise(NamedTuple):
    """All that is random about an image's tokens.

    gumbel: `[B, L, K]`, standard Gumbel noise, which chooses components.
    normal: `[B, L, D]`, standard normal noise.
    keys: int32 `[B, L, 2]`, for rejection sampling.
    """

    gumbel: Tensor
    normal: Tensor
    keys: Tensor

    def at(self, number: Tensor) -> "Noise":
        """Of one token: `number` int64 `[1]`."""
        return Noise(*(x.index_select(1, number).squeeze(1) for x in self))


class Draft(NamedTuple):
    """One token of every image, of which rejection sampling may still have to replace some dimensions: see `settle`.

    sample: `[B, D]`.
    rejected: bool `[B, D]`, which dimensions are still to be sampled; None: none.
    quotient: what these are sampled from and with, the arguments of `_reject`.
    """

    sample: Tensor
    rejected: Tensor | None = None
    quotient: tuple[Tensor, ...] = ()


def draw(head: MixtureHead | MultivariateHead, keys: Tensor, num_tokens: int, dim: int) -> Noise:
    """The noise of `num_tokens` tokens of `dim` dimensions from the samples' keys, int32 `[B, 2]`."""
    numbers = torch.arange(num_tokens, dtype=torch.int32, device=keys.device)
    keys = prng.fold_in(keys[:, None], numbers)
    components = gumbel(prng.fold_in(keys, _COMPONENT), head.num_mixtures)
    normal = prng.normal(prng.fold_in(keys, _GAUSSIAN), (dim,))
    return Noise(components, normal, prng.fold_in(keys, _REJECTION))


def gumbel(keys: Tensor, size: int) -> Tensor:
    """Standard Gumbel noise, float32 `[..., size]`: the largest of log-weights with it added is a draw by the weights,
    without a loop over the batch, and on every device."""
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
) -> Draft:
    """Samples one token of every image, up to what a look from the host decides, which is left to `settle`. So this can
    be captured as a graph.

    Args:
      head: the image head.
      hidden: `[B, E]`; with guidance `[2 B, E]`, those given the condition, then those without.
      noise: of this token.
      mode: of guidance.
      weight: w at this token, 0-dimensional.
      temperature_scales: multiplies standard deviations, of both densities.
      temperature_probs: multiplies the log-weights.
    """
    if mode == "none":
        return Draft(head.sample(hidden, noise.gumbel, noise.normal, temperature_scales, temperature_probs))
    logits = head.component_logits(hidden if mode == "interp" else hidden[: len(hidden) // 2])

    def away(x: Tensor) -> Tensor:  # from what is unconditional, to what is conditional and w times as far again
        c, u = x.chunk(2)
        return c + weight * (c - u)

    if mode == "interp":
        logits = away(logits)
    chosen = (logits * temperature_probs + noise.gumbel).argmax(-1)
    locs, raw_scales = head.component(hidden, chosen.repeat(2))
    if mode == "interp":
        return Draft(away(locs) + head.scale(away(raw_scales)) * temperature_scales * noise.normal)
    (loc_c, loc_u), (scale_c, scale_u) = locs.chunk(2), (head.scale(raw_scales) * temperature_scales).chunk(2)
    return draft_quotient(loc_c, scale_c, loc_u, scale_u, weight, noise.normal, noise.keys)


def draft_quotient(
    loc_c: Tensor, scale_c: Tensor, loc_u: Tensor, scale_u: Tensor, weight: Tensor, normal: Tensor, keys: Tensor
) -> Draft:
    """Samples from what is proportional to N(loc_c, scale_c)^(1+w) / N(loc_u, scale_u)^w, each dimension by itself.

    Its logarithm is a parabola. Where it opens downwards, which is where scale_u² > scale_c² · w / (1 + w), this is a
    Gaussian, and sampled from as one. Elsewhere it cannot be normalized, and the reference's rejection sampling says
    what to take: see `_reject`.

    Args:
      loc_c, scale_c: `[B, D]`, mean and standard deviation of the conditional density.
      loc_u, scale_u: the same of the unconditional one.
      weight: w, 0-dimensional.
      normal: `[B, D]`, standard normal noise.
      keys: int32 `[B, 2]`, for rejection sampling.
    """
    ratio = (scale_c / scale_u).square()
    precision = 1 + weight - weight * ratio  # times scale_c²
    is_gaussian = precision > 0
    precision = precision.where(is_gaussian, 1.0)
    loc = loc_c + weight * ratio * (loc_c - loc_u) / precision
    sample = loc + scale_c * precision.rsqrt() * normal
    keys = prng.fold_in(keys[:, None], torch.arange(loc.shape[1], dtype=torch.int32, device=loc.device))
    quotient = (loc_c, scale_c, loc_u, scale_u, normal, weight.expand_as(loc), keys)
    if loc.device.type == "xla":  # where a look from the host costs more than to try it for all
        return Draft(sample.where(is_gaussian, _reject(*quotient)))
    return Draft(sample, ~is_gaussian, quotient)


def settle(draft: Draft) -> Tensor:
    """The token `[B, D]`: rejection sampling, for what needs it."""
    if draft.rejected is None or not draft.rejected.any():
        return draft.sample
    sample = draft.sample.clone()
    sample[draft.rejected] = _reject(*(x[draft.rejected] for x in draft.quotient))
    return sample


def _reject(
    loc_c: Tensor, scale_c: Tensor, loc_u: Tensor, scale_u: Tensor, normal: Tensor, weight: Tensor, keys: Tensor
) -> Tensor:
    """The reference's rejection sampling where the target's logarithm is convex.

    Proposals come from a Gaussian around loc_c of twice the larger scale. The envelope is the target's maximum within
    ±10 of loc_c, divided by the proposals' largest density; of a convex function the maximum is at one of the ends. The
    first of 1000 proposals that is accepted is the sample; where none is, one of the conditional density.

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

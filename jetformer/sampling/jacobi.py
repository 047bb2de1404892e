"""Inverts the blocks of a TarFlow in parallel, by Jacobi iteration instead of token by token.

A block's inverse is x_i = z_i · exp(log_scale_i) + shift_i, where both are predicted from x_0 … x_(i - 1). Jacobi
iteration predicts all tokens at once from those of the iteration before. After i iterations the first i tokens are
exact, and often all tokens are exact enough much sooner. With segments (Gauss-Seidel-Jacobi, arXiv 2505.12849) it
solves one segment of tokens after the other, with the keys and values of the segments before in the cache.

Dimensions: B batch, N tokens, D token dimension, M context tokens, X their dimension.
"""

import dataclasses
from typing import NamedTuple

import torch
from absl import logging
from torch import Tensor

from jetformer.models.tarflow import CachedBlock, TarFlowBlock
from jetformer.ranges import NonNegativeFloat, PositiveInt


class Solution(NamedTuple):
    """The inverse of a block.

    tokens: `[B, N, D]`.
    logdet: `[B]`, log-determinants of the inverse in nats.
    iterations: of each segment.
    error: the largest change of a token that the last iteration made in a segment that reached the limit of iterations
      before the tolerance; 0 if none did.
    """

    tokens: Tensor
    logdet: Tensor
    iterations: list[int]
    error: float


@dataclasses.dataclass(frozen=True)
class Jacobi:
    """Inverts a block of a TarFlow by Jacobi iteration, see `TarFlow.inverse_method`.

    Iteration stops for an example once it would change none of its tokens by more than the tolerance, so that a result
    does not depend on the rest of its batch. All iterations are one graph to a compiler, and each ends with a transfer
    to the host.

    Attributes:
      tolerance: in units of the block's tokens; in those of images of the last block, [-1, 1]. The blocks that follow
        may enlarge the error. At 0 iteration goes on until nothing changes.
      segment: number of tokens to solve at a time; None: all. Shorter segments need fewer iterations each.
      max_iterations: of a segment; None: its number of tokens, after which it is exact. If it is reached before the
        tolerance, a warning has the error.
    """

    tolerance: NonNegativeFloat = 1e-5
    segment: PositiveInt | None = None
    max_iterations: PositiveInt | None = None

    def __post_init__(self):
        if not self.tolerance >= 0:
            raise ValueError(f"Jacobi.tolerance = {self.tolerance}: give 0 or more")
        for name in ("segment", "max_iterations"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"Jacobi.{name} = {value}: give 1 or more, or None")

    def __call__(self, block: TarFlowBlock, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Inverts `TarFlowBlock.forward`; arguments and results as of `TarFlowBlock.inverse`."""
        tokens, logdet, iterations, error = self.solve(block, z, context)
        if error > self.tolerance:
            logging.warning(
                "Jacobi: %d iterations are too few for the tolerance %g; the last one changed tokens by up to %g",
                *(max(iterations), self.tolerance, error),
            )
        return tokens, logdet

    @torch.no_grad()
    def solve(self, block: TarFlowBlock, z: Tensor, context: Tensor | None = None) -> Solution:
        """Inverts `TarFlowBlock.forward`.

        Args:
          block: the block.
          z: `[B, N, D]`.
          context: `[B, M, X]` or None.
        """
        z = block.in_order(z)
        unknown = z.shape[1] - 1  # the first token stays as it is
        size = min(self.segment or unknown, unknown)
        limit = min(self.max_iterations or size, size)
        if size == unknown:  # no segment before: plain causal attention, which has a faster kernel
            condition = block.condition(context)[:, :unknown]
            predict = lambda tokens, slots: block.predict(tokens, condition)
        else:
            predict = CachedBlock(block, z, context).predict
        x, log_scales = z.clone(), torch.zeros_like(z)
        iterations: list[int] = []
        error = 0.0
        largest = torch.finfo(z.dtype).max ** 0.4  # a LayerNorm squares it
        for first in range(0, unknown, max(size, 1)):
            # Predictions are made at `slots`, for the tokens after them. All segments have one size, so the last may
            # begin among solved tokens. A tensor from the host is an input of the graph, not a constant.
            first = min(first, unknown - size)
            slots = torch.arange(first, first + size).to(z.device)
            latents = z.index_select(1, slots + 1)
            iterations.append(0)
            while iterations[-1] < limit:
                iterations[-1] += 1
                shift, log_scale = predict(x.index_select(1, slots), slots)
                before, after = x.index_select(1, slots + 1), latents * log_scale.exp() + shift
                change = (after - before).abs().amax((1, 2)).nan_to_num(nan=largest)
                is_solved = change <= self.tolerance
                # Predictions from tokens that are far off may overflow, and attention would spread that: 0 · inf = NaN.
                after = after.where(after.abs() < largest, latents)
                x.index_copy_(1, slots + 1, before.where(is_solved[:, None, None], after))
                log_scales.index_copy_(1, slots + 1, log_scale)
                if is_solved.all():
                    break
            else:
                if limit < size:
                    error = max(error, float(change.max()))
        return Solution(block.in_order(x), log_scales.sum(dim=(1, 2)), iterations, error)

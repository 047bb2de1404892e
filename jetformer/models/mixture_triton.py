"""Triton kernels of a mixture's likelihood, for GPUs: what `mixture_nll.py` does in PyTorch, with less memory traffic.

The first kernel reads the logits of means and raw scales; the second reads them again and overwrites them with their
gradients. In bfloat16 that is 6 bytes a logit. Both compute in the dtype of the tokens.

Dimensions are those of `mixture_nll.py`. A program works on a tile of `BLOCK_N` tokens, and of several components or
dimensions; sums run in a fixed order, so results do not vary from run to run.
"""

import triton
import triton.language as tl
from torch import Tensor

# Tiles of 1024 logits for 128 threads: 8 each, which a thread loads at once in bfloat16.
TILE = {"BLOCK_N": 128, "BLOCK_ROWS": 8}
# Components whose gradients of the tokens a program adds up.
COMPONENTS = 64


@triton.jit
def standardize(m, r, x, RAW_MIN: tl.constexpr):
    """Returns the clamped raw scale r, 1 / q, the precision 2 / s, and -2 z; see `_score_block` for these."""
    r = tl.maximum(r, RAW_MIN, propagate_nan=tl.PropagateNan.ALL)
    square = r * r + 4
    inverse = tl.rsqrt(square)
    precision = 4 / (tl.abs(r) + square * inverse) - 2 * tl.minimum(r, 0)
    return r, inverse, precision, (m - x) * precision


@triton.jit
def components_kernel(
    means,  # [K, D, n]
    raw_scales,  # [K, D, n]
    tokens,  # [D, n]
    components,  # [K, n], written: log-densities without their constant
    n,
    K: tl.constexpr,
    D: tl.constexpr,
    RAW_MIN: tl.constexpr,
    GROUP: tl.constexpr,  # dimensions that share a logarithm; their loads overlap
    BLOCK_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Computes log-densities of `BLOCK_ROWS` components."""
    t = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None]
    k = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    valid = (k < K) & (t < n)
    start = k.to(tl.int64) * D * n + t  # a block may have more than 2³¹ logits
    same = tl.broadcast_to(t, valid.shape)
    total = tl.zeros((BLOCK_ROWS, BLOCK_N), tokens.dtype.element_ty)
    for first in range(0, D, GROUP):
        product = tl.full(valid.shape, 1, total.dtype)
        for i in tl.static_range(GROUP):
            row = (first + i) * n
            x = tl.load(tokens + same + row, valid, 0)
            m = tl.load(means + start + row, valid, 0).to(x.dtype)
            r = tl.load(raw_scales + start + row, valid, 0).to(x.dtype)
            _, _, precision, z = standardize(m, r, x, RAW_MIN)
            product *= precision
            total -= 0.125 * z * z
        total += tl.log(product)
    tl.store(components + k * n + t, total, valid)


@triton.jit
def gradients_kernel(
    means,  # [K, D, n], overwritten by gradients
    raw_scales,  # [K, D, n], likewise
    tokens,  # [D, n]
    posterior,  # [K, n], times the tokens' weights
    token_grads,  # [K / COMPONENTS, D, n], written: gradients of the tokens, a part of the components each
    mean_grads,  # [n / BLOCK_N, K, D], written: gradients of the means, added up over the tokens of a tile
    scale_grads,  # [n / BLOCK_N, K, D], likewise
    n,
    K: tl.constexpr,
    D: tl.constexpr,
    RAW_MIN: tl.constexpr,
    COMPONENTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Computes gradients for `BLOCK_ROWS` dimensions of `COMPONENTS` components."""
    tile, part = tl.program_id(0), tl.program_id(2)
    t = tile * BLOCK_N + tl.arange(0, BLOCK_N)[None]
    d = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    inside = (d < D) & (t < n)
    x = tl.load(tokens + d * n + t, inside, 0)
    same = tl.broadcast_to(t, inside.shape)
    total = tl.zeros((BLOCK_ROWS, BLOCK_N), x.dtype)
    for i in range(COMPONENTS):
        k = part * COMPONENTS + i
        row = k * D + d
        valid = inside & (row < K * D)  # that is, k < K
        logits = row.to(tl.int64) * n + t
        m = tl.load(means + logits, valid, 0).to(x.dtype)
        r = tl.load(raw_scales + logits, valid, 0).to(x.dtype)
        r, inverse_q, precision, z = standardize(m, r, x, RAW_MIN)
        p = tl.load(posterior + same + k * n, valid, 0)
        m = 0.25 * p * z * precision
        r = tl.where(r > RAW_MIN, p * (1 - 0.25 * z * z) * inverse_q, 0)  # 0 where it was clamped
        tl.store(means + logits, m, valid)
        tl.store(raw_scales + logits, r, valid)
        total -= m
        sums = tile * K * D + row
        summed = (d < D) & (row < K * D)
        tl.store(mean_grads + sums, tl.sum(m, 1, keep_dims=True), summed)
        tl.store(scale_grads + sums, tl.sum(r, 1, keep_dims=True), summed)
    tl.store(token_grads + (part * D + d) * n + t, total, inside)


def component_log_densities(means: Tensor, raw_scales: Tensor, tokens: Tensor, raw_min: float) -> Tensor:
    """Returns the log-densities `[K, n]` of components in nats, without their constant.

    Args:
      means: `[K, D, n]`, contiguous.
      raw_scales: `[K, D, n]`, contiguous.
      tokens: `[D, n]`, contiguous.
      raw_min: smallest raw scale.
    """
    k, d, n = means.shape
    components = tokens.new_empty(k, n)
    grid = triton.cdiv(n, TILE["BLOCK_N"]), triton.cdiv(k, TILE["BLOCK_ROWS"])
    # The product of four precisions of at most 2e9 is a float32.
    group = 4 if d % 4 == 0 and raw_min > -1e9 else 1
    components_kernel[grid](means, raw_scales, tokens, components, n, k, d, raw_min, group, **TILE)
    return components


def differentiate(
    means: Tensor, raw_scales: Tensor, tokens: Tensor, posterior: Tensor, raw_min: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Overwrites means and raw scales with the gradients of the weighted negative log-likelihoods.

    Args:
      means, raw_scales, tokens, raw_min: as in `component_log_densities`.
      posterior: `[K, n]`, responsibilities times weights of the tokens.

    Returns:
      Gradients of the tokens `[D, n]`, and those of means and raw scales added up over the tokens, `[K, D]` each.
    """
    k, d, n = means.shape
    tiles, parts = triton.cdiv(n, TILE["BLOCK_N"]), triton.cdiv(k, COMPONENTS)
    token_grads = tokens.new_empty(parts, d, n)
    sums = tokens.new_empty(2, tiles, k, d)
    grid = tiles, triton.cdiv(d, TILE["BLOCK_ROWS"]), parts
    gradients_kernel[grid](
        means, raw_scales, tokens, posterior, token_grads, *sums, n, k, d, raw_min, COMPONENTS, **TILE
    )
    return token_grads.sum(0), *sums.sum(1)

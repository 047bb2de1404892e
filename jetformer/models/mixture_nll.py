"""The fused likelihood of a mixture: projection, log-likelihood and gradients in one pass, a block of tokens at a time.

A mixture has many parameters: 1024 mixtures of 128 dimensions take P = 263,168 numbers a token. So
training never holds the logits of more than a block of tokens.

Dimensions: B batch, L image tokens, n tokens of a block, K mixtures, D token dimension, E width of the hidden states,
P = K + 2·K·D logits a token, in the order of `mixture.py`.
"""

import functools
import importlib.util
import math
import sys
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if importlib.util.find_spec("triton"):  # PyTorch for GPUs brings it
    from jetformer.models import mixture_triton

# What computes the likelihood between the products: PyTorch's operations, one after the other or compiled by
# torch.compile, or Triton kernels.
Backend = Literal["eager", "compiled", "triton"]

LOG_2PI = math.log(2 * math.pi)
# The most logits that a block may have on a CPU or a TPU: 128 MiB in float32.
_BLOCK_LOGITS = 2**25
# About 5 arrays of so many floats fit a CPU's caches. (1024 mixtures of 48 dimensions, 512 tokens, 2 cores: 0.07 s, or
# 0.27 s with everything at once.)
_CPU_CHUNK = 2**18


class TokenScores(NamedTuple):
    """The scores of an image head for tokens.

    total: weighted sum of negative log-likelihoods in nats; the only score with a gradient.
    nll: `[B, L]`, negative log-likelihoods in nats.
    responsibilities: `[B, K]`, posterior probabilities of the components, averaged over an example's tokens; None for a
      multivariate head.
    responsibility_entropy: `[B]`, entropy in nats of a token's responsibilities, averaged likewise.
    """

    total: Tensor
    nll: Tensor
    responsibilities: Tensor | None = None
    responsibility_entropy: Tensor | None = None


def split_logits(rows: Tensor, num_mixtures: int) -> tuple[Tensor, Tensor, Tensor]:
    """Splits rows `[P, ...]` into views: of weights `[K, ...]`, means and raw scales `[K, D, ...]`."""
    k = num_mixtures
    weights, means, raw_scales = rows.split((k, (len(rows) - k) // 2, (len(rows) - k) // 2))
    return weights, means.unflatten(0, (k, -1)), raw_scales.unflatten(0, (k, -1))


# Log-likelihoods [n]; responsibilities [K, n] and their entropies in nats [n]; gradients of the tokens [n, D] and of
# the biases [P], or None.
_BlockScores = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def _score_block(
    weights: Tensor,
    means: Tensor,
    raw_scales: Tensor,
    x: Tensor,
    w: Tensor,
    raw_min: float,
    differentiate: bool,
    chunk: int,
) -> _BlockScores:
    """Scores n tokens and overwrites their logits with the gradients of their weighted negative log-likelihoods.

    Logits have tokens last, which makes products faster and lets sums over D and K run along tokens. They are three
    tensors, not one: torch.compile copies a whole tensor to change a part of it.

    Args:
      weights: `[K, n]`, logits of the weights; this and the next two change in place if `differentiate`.
      means: `[K, D, n]`.
      raw_scales: `[K, D, n]`.
      x: `[n, D]`, the tokens, in the dtype to compute in.
      w: `[n]`, their weights.
      raw_min: smallest raw scale.
      differentiate: whether to compute gradients.
      chunk: approximate number of means to process at a time.
    """
    n, d = x.shape
    logits = weights, means, raw_scales
    weights, means, raw_scales = (part.to(x.dtype) for part in logits)
    x = x.t().contiguous()
    # In the comments, s is the scale and z = (x - mean) / s. With q = sqrt(r² + 4): s = (r + q) / 2 and
    # ds / dr = s / q. Factors of 1/2 and 1/4 are applied after the sums over D.
    components = []
    size = max(1, chunk // (d * n))
    for first in range(0, len(weights), size):
        m, r = means[first : first + size], raw_scales[first : first + size]
        r.clamp_(min=raw_min)
        q = r.square().add_(4).sqrt_()
        # 2 / s = q - r = (q - |r|) + 2 max(-r, 0), where q - |r| = 4 / (q + |r|), without cancellation.
        precision = r.abs().add_(q).reciprocal_().mul_(4).sub_(r.clamp(max=0), alpha=2)
        m.sub_(x).mul_(precision)  # -2 z
        t = precision.log().addcmul_(m, m, value=-0.125)
        components.append(t.sum(1))
        if differentiate:
            # d nll / d raw scale = posterior · (1 - z²) / q, or 0 where r was clamped
            t = torch.mul(m, m, out=t).mul_(-0.25).add_(1).div_(q)
            r.copy_(torch.ops.aten.threshold_backward(t, r, raw_min))
            m.mul_(precision)  # d nll / d mean = -posterior · z / s
    log_prob, responsibilities, entropy, log_weights = _mix(weights, torch.cat(components), d)
    if not differentiate:
        return log_prob, responsibilities, entropy, None, None
    posterior = responsibilities * w
    weights.copy_(log_weights.exp_().mul_(w).sub_(posterior))
    raw_scales.mul_(posterior.unsqueeze(1))
    means.mul_(posterior.mul_(0.25).unsqueeze(1))
    grads = weights, means, raw_scales
    for part, grad in zip(logits, grads, strict=True):
        part.copy_(grad)
    grad_bias = torch.cat([grad.flatten(0, -2).sum(1) for grad in grads])
    return log_prob, responsibilities, entropy, means.sum(0).neg_().t(), grad_bias


def _score_block_triton(
    weights: Tensor, means: Tensor, raw_scales: Tensor, x: Tensor, w: Tensor, raw_min: float, differentiate: bool, _
) -> _BlockScores:
    """Equals `_score_block` by Triton kernels."""
    d = x.shape[1]
    x = x.t().contiguous()
    components = mixture_triton.component_log_densities(means, raw_scales, x, raw_min)
    log_prob, responsibilities, entropy, log_weights = _mix(weights.to(x.dtype), components, d)
    if not differentiate:
        return log_prob, responsibilities, entropy, None, None
    posterior = responsibilities * w
    weight_grads = log_weights.exp_().mul_(w).sub_(posterior)
    weights.copy_(weight_grads)
    grad_x, *grad_bias = mixture_triton.differentiate(means, raw_scales, x, posterior, raw_min)
    grad_bias = torch.cat([weight_grads.sum(1), *(grad.flatten() for grad in grad_bias)])
    return log_prob, responsibilities, entropy, grad_x.t(), grad_bias


def _mix(weights: Tensor, components: Tensor, d: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mixes components.

    Args:
      weights: `[K, n]`, logits of the weights.
      components: `[K, n]`, log-densities of the components in nats, without their constant; changed in place.
      d: D.

    Returns:
      Log-likelihoods `[n]`, responsibilities `[K, n]`, their entropies in nats `[n]`, and log-weights `[K, n]`.
    """
    log_weights = weights.log_softmax(0)
    joint = components.add_(log_weights).sub_(d * (math.log(2) + 0.5 * LOG_2PI))
    log_prob = torch.logsumexp(joint, dim=0)
    # At -1e4 the posterior is 0, and so is its share of the entropy; at -inf that would be 0 · inf = NaN.
    log_posterior = (joint - log_prob).clamp_(min=-1e4)
    responsibilities = log_posterior.exp()
    entropy = log_posterior.mul_(responsibilities).sum(0).neg_()
    return log_prob, responsibilities, entropy, log_weights


@functools.cache
def _compiled_score_block():
    return torch.compile(_score_block, dynamic=False)


class _MixtureNLL(torch.autograd.Function):
    """Weighted sum of the tokens' negative log-likelihoods, with all gradients computed in the forward pass.

    A backward pass would need the logits again. The gradient of the sum for a token's likelihood is known in advance:
    the token's weight. So the forward pass overwrites a block's logits with their gradients, and accumulates from them
    the gradients of hidden states, weight and bias before it starts the next block.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, token_weight, num_mixtures, scale_tol, block, num_shards, backend):
        needs = ctx.needs_input_grad[:4]
        score_block = _score_block
        if backend != "eager":
            score_block = _score_block_triton if backend == "triton" else _compiled_score_block()
        # On a CPU what fits its caches, elsewhere all at once.
        chunk = _CPU_CHUNK if target.device.type == "cpu" and backend == "eager" else sys.maxsize
        nll = target.new_empty(target.shape[:2])
        responsibilities = target.new_zeros(len(target), num_mixtures)
        responsibility_entropy = target.new_zeros(len(target))
        grad_hidden = torch.empty_like(hidden) if needs[0] else None
        # Sums over many blocks have the likelihood's precision, whatever that of the products.
        grad_weight = torch.zeros_like(weight, dtype=target.dtype) if needs[1] else None
        grad_bias = torch.zeros_like(bias, dtype=target.dtype) if needs[2] else None
        grad_target = torch.empty_like(target) if needs[3] else None
        # The raw scale at which the scale is scale_tol.
        raw_min = scale_tol - 1 / scale_tol
        logits = None  # shared by all blocks, which saves memory and the time to allocate it
        for rows in token_blocks(*target.shape[:2], block, num_shards):
            h, x, w = (y[rows].flatten(0, 1) for y in (hidden, target, token_weight))
            examples = nll[rows].shape[:1]
            if logits is None or logits.shape[1] != len(h):
                logits = weight.new_empty(len(weight), len(h))
            torch.addmm(bias[:, None], weight, h.t(), out=logits)
            scores = score_block(*split_logits(logits, num_mixtures), x, w, raw_min, any(needs), chunk)
            log_prob, posterior, entropy, grad_x, block_grad_bias = scores
            nll[rows] = -log_prob.view(*examples, -1)
            responsibilities[rows[0]] += posterior.view(num_mixtures, *examples, -1).sum(-1).t()
            responsibility_entropy[rows[0]] += entropy.view(*examples, -1).sum(-1)
            if not any(needs):
                continue
            if needs[3]:
                grad_target[rows] = grad_x.unflatten(0, (*examples, -1))
            if needs[2]:
                grad_bias.add_(block_grad_bias)
            if needs[0]:
                grad_hidden[rows] = (logits.t() @ weight).unflatten(0, (*examples, -1))
            if needs[1]:
                _add_product(grad_weight, logits, h)
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


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a product to a total in place, whose dtype may be wider than that of the factors."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:  # only there PyTorch has it: the sum is kept as wide as the total, and no product is stored
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # the product is rounded to the factors' dtype once for each block
        total.add_(a @ b)


def default_block(num_logits: int, device: torch.device) -> int:
    """Returns the number of tokens whose logits to hold at a time, a power of two.

    Each block reads the weight and adds to the weight's gradient, which takes longer the faster the products are. So a
    GPU gets up to 4096 tokens, as many as fill a sixteenth of its memory with logits in float32; any other device up to
    256, whose logits fill 128 MiB. For 263,168 logits that is 4096 tokens with 80 GB, 2048 with 40 GB, and 64 on a CPU.

    Args:
      num_logits: P.
      device: of the tokens.
    """
    on_gpu = device.type == "cuda"
    return block_for(num_logits, torch.cuda.get_device_properties(device).total_memory if on_gpu else None)


def block_for(num_logits: int, gpu_memory: int | None) -> int:
    """As `default_block`, for a GPU with a memory of `gpu_memory` bytes, or (None) for another device."""
    most, logits = (256, _BLOCK_LOGITS) if gpu_memory is None else (4096, gpu_memory // (16 * 4))
    return min(most, 2 ** int(math.log2(max(logits // num_logits, 1))))


def token_blocks(batch_size: int, length: int, block: int, num_shards: int | None) -> list[tuple[slice, slice]]:
    """Splits `[B, L]` tokens into blocks of about `block` tokens; see `mixture_nll`."""
    if num_shards is None:  # blocks of whole examples are views
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
    block: int | None = None,
    num_shards: int | None = None,
    backend: Backend = "eager",
) -> TokenScores:
    """Projects hidden states to mixtures and scores tokens under them, `block` tokens at a time.

    Equals the log-density under the mixture of `F.linear(hidden, weight, bias)`, but training takes one pass over the
    tokens instead of two, and memory for the logits of `block` tokens.

    Args:
      hidden: `[B, L, E]`.
      weight: `[P, E]`.
      bias: `[P]`.
      target: `[B, L, D]`.
      token_weight: `[B, L]`, factor of each token in the sum; it gets no gradient.
      num_mixtures: K.
      scale_tol: smallest standard deviation.
      block: tokens at a time; None: see `default_block`.
      num_shards: number of devices that the examples are sharded over. A block then has tokens of all examples, `block`
        on each device, so that no token moves between devices. None: one device holds all examples.
      backend: what computes the likelihood between the products, see `Backend`.

    Returns:
      The scores. Only `total` has a gradient.
    """
    if block is None:
        block = default_block(len(weight), target.device)
    tensors = (hidden, weight, bias, target)
    if not torch.is_grad_enabled():
        tensors = (x.detach() for x in tensors)  # otherwise the forward pass would compute gradients
    return TokenScores(
        *_MixtureNLL.apply(*tensors, token_weight.detach(), num_mixtures, scale_tol, block, num_shards, backend)
    )

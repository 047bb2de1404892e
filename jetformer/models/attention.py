"""Scaled dot-product attention, by the faster of two implementations.

Dimensions: B batch, N query heads, K key/value heads, T queries, S keys, H head dimension.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# Up to this many keys two matrix products and a softmax are used. On a CPU they take a third less time than PyTorch's
# fused kernel, which is faster from 256 keys on (forward and backward, float32, 64 tokens: 4.1 ms and 6.0 ms on 2
# cores). XLA fuses them, and its kernel would first repeat shared keys.
MAX_SHORT_KEYS = {"cpu": 128, "xla": float("inf")}


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Returns softmax(q kᵀ / sqrt(H)) v; N query heads may share K key/value heads.

    Args:
      q: `[B, N, T, H]`.
      k, v: `[B, K, S, H]`, where K divides N; query head n uses key head n // (N / K).
      mask: bool `[B, T, S]`, true where a query attends to a key; None for all. Each row needs a true entry.
      is_causal: query t attends to keys up to t; requires T = S and no mask.

    Returns:
      `[B, N, T, H]`.
    """
    if k.shape[2] > MAX_SHORT_KEYS.get(q.device.type, 0):
        if mask is not None:
            mask = mask[:, None]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=q.shape[1] != k.shape[1]
        )
    batch, num_heads, length, head_dim = q.shape
    num_kv_heads, num_keys = k.shape[1:3]
    # Query heads that share a key head are handled as more queries of one head.
    shared = (batch, num_kv_heads, num_heads // num_kv_heads * length)
    scores = (q * head_dim**-0.5).reshape(*shared, head_dim) @ k.transpose(2, 3)
    if is_causal:
        mask = torch.ones(1, length, num_keys, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        per_head = scores.view(batch, num_kv_heads, -1, length, num_keys)
        scores = per_head.masked_fill(~mask[:, None, None], float("-inf")).view(*shared, num_keys)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    return (weights @ v).view(batch, num_heads, length, head_dim)

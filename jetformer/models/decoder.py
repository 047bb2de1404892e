"""The decoder-only transformer: Gemma blocks (big_vision `models/ppp/gemma.py`).

Notable: RMSNorm scaled by 1 + weight; rotary position embeddings that rotate halves; multi-query, grouped-query or
multi-head attention; a gated GELU; no biases. The sampler (`sampling/decode.py`) owns the KV cache: the decoder writes
and reads the tensors that it is given.

Dimensions: B batch, T query length, S key length, E width, N heads, K key/value heads, H head dimension.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jetformer import prng
from jetformer.models import initializers, remat
from jetformer.models.activations import gelu
from jetformer.models.attention import attend
from jetformer.ranges import BelowOne, PositiveInt

RMS_NORM_EPS = 1e-6


class KVCache(NamedTuple):
    """Keys and values of one layer, and the slots of this call's tokens.

    k, v: `[B, K, S, H]`, written in place.
    slots: int64 `[T]`, positions in S of the call's tokens. (A tensor, so that all decoding steps share one compiled
      graph.)
    """

    k: Tensor
    v: Tensor
    slots: Tensor


class RMSNorm(nn.Module):
    """x / rms(x) · (1 + weight) over the last dimension."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def init_weights(self, generator: torch.Generator) -> None:
        del generator
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, 1 + self.weight, RMS_NORM_EPS)


def rope_angles(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines `[B, 1, T, H / 2]` of rotary embeddings at `positions` `[B, T]`."""
    exponents = torch.arange(head_dim // 2, device=positions.device) * (2 / head_dim)
    radians = positions[:, None, :, None] / 10_000**exponents
    return radians.cos(), radians.sin()


def apply_rope(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates the first half of `x` `[B, N, T, H]` against its second half."""
    cos, sin = (a.to(x.dtype) for a in angles)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


class Attention(nn.Module):
    """Causal or masked self-attention, `[B, T, E]` to `[B, T, E]`."""

    def __init__(self, width: int, num_heads: int, num_kv_heads: int, head_dim: int):
        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads {num_kv_heads} does not divide num_heads {num_heads}")
        if head_dim % 2:
            raise ValueError(f"head_dim {head_dim} is odd: rotary embeddings need an even one")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.qkv = nn.Linear(width, (num_heads + 2 * num_kv_heads) * head_dim, bias=False)
        self.out = nn.Linear(num_heads * head_dim, width, bias=False)

    def init_weights(self, generator: torch.Generator) -> None:
        initializers.lecun_normal_(self.qkv.weight, generator)
        initializers.lecun_normal_(self.out.weight, generator)

    def forward(self, x: Tensor, mask: Tensor | None, angles: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        q, k = apply_rope(q, angles), apply_rope(k, angles)
        if cache is not None:
            k = cache.k.index_copy_(2, cache.slots, k.to(cache.k.dtype))
            v = cache.v.index_copy_(2, cache.slots, v.to(cache.v.dtype))
        y = attend(q, k.to(q.dtype), v.to(q.dtype), mask, is_causal=mask is None)
        return self.out(y.transpose(1, 2).flatten(2))


class GatedMlp(nn.Module):
    """linear(gelu(gate(x)) · up(x)), or if activated is "up" linear(gate(x) · gelu(up(x))); `[B, T, E]` to the same."""

    def __init__(self, width: int, mlp_dim: int, gelu_form: str, activated: str):
        super().__init__()
        if activated not in ("gate", "up"):
            raise ValueError(f"unknown branch {activated!r} of the gated MLP: use gate or up")
        self.activated, self.gelu = activated, gelu(gelu_form)
        self.gate_up = nn.Linear(width, 2 * mlp_dim, bias=False)
        self.linear = nn.Linear(mlp_dim, width, bias=False)

    def init_weights(self, generator: torch.Generator) -> None:
        initializers.lecun_normal_(self.gate_up.weight, generator)
        initializers.lecun_normal_(self.linear.weight, generator)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        if self.activated == "up":
            gate, up = up, gate
        return self.linear(self.gelu(gate) * up)


class DecoderBlock(nn.Module):
    """A pre-norm transformer block, `[B, T, E]` to `[B, T, E]`."""

    is_block = True
    is_transformer_block = True  # see `optim.block_matrices`

    def __init__(
        self,
        width: int,
        mlp_dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dropout: float,
        gelu: str,
        activated: str,
    ):
        super().__init__()
        self.dropout = dropout
        self.pre_attention_norm = RMSNorm(width)
        self.attn = Attention(width, num_heads, num_kv_heads, head_dim)
        self.pre_mlp_norm = RMSNorm(width)
        self.mlp = GatedMlp(width, mlp_dim, gelu, activated)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        angles: tuple[Tensor, Tensor],
        cache: KVCache | None = None,
        dropout_keys: Sequence[Tensor | None] = (None, None),
    ) -> Tensor:
        y = self.attn(self.pre_attention_norm(x), mask, angles, cache)
        x = x + prng.dropout(y, self.dropout, dropout_keys[0])
        y = self.mlp(self.pre_mlp_norm(x))
        return x + prng.dropout(y, self.dropout, dropout_keys[1])


class Decoder(nn.Module):
    """A stack of blocks without embedding, final norm or head.

    Args:
      width: E.
      depth: number of blocks.
      mlp_dim: width of the gated MLP.
      num_heads: query heads.
      num_kv_heads: key/value heads: 1 for multi-query attention, `num_heads` for multi-head, in between grouped-query.
      head_dim: H, even.
      dropout: probability of dropping an entry of the outputs of attention and MLP, if `forward` is given keys.
      gelu: form of GELU, see `activations.gelu`.
      activated: the branch of the gated MLP that goes through GELU, "gate" or "up".

    Raises:
      ValueError: if sizes do not divide, or the form of GELU or the branch is unknown.
    """

    def __init__(
        self,
        width: PositiveInt,
        depth: PositiveInt,
        mlp_dim: PositiveInt,
        num_heads: PositiveInt,
        num_kv_heads: PositiveInt,
        head_dim: PositiveInt,
        dropout: BelowOne = 0.0,
        gelu: str = "tanh",
        activated: str = "gate",
    ):
        super().__init__()
        self.width, self.num_kv_heads, self.head_dim, self.dropout = width, num_kv_heads, head_dim, dropout
        self.blocks = nn.ModuleList(
            DecoderBlock(width, mlp_dim, num_heads, num_kv_heads, head_dim, dropout, gelu, activated)
            for _ in range(depth)
        )

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None,
        positions: Tensor,
        caches: list[KVCache] | None = None,
        dropout_keys: Tensor | None = None,
    ) -> Tensor:
        """Runs the blocks.

        Args:
          x: embedded tokens `[B, T, E]`.
          mask: bool `[B, T, S]`, true where a token attends to another; None for plain causal attention. Each row needs
            a true entry.
          positions: `[B, T]`, positions for the rotary embeddings.
          caches: one for each block; S is then their length.
          dropout_keys: int32 `[B, 2]`, the examples' keys for dropout (see `prng`); None for no dropout.

        Returns:
          `[B, T, E]`.
        """
        angles = rope_angles(positions, self.head_dim)
        keys = [None] * (2 * len(self.blocks))
        if dropout_keys is not None:  # of all draws at once: launching them one by one takes a GPU's host long
            numbers = torch.arange(len(keys), dtype=torch.int32, device=x.device)
            keys = prng.fold_in(dropout_keys[:, None], numbers).unbind(1)
        for i, block in enumerate(self.blocks):
            cache = caches[i] if caches else None
            x = remat.run_block(block, x, mask, angles, cache, keys[2 * i : 2 * i + 2])
        return x

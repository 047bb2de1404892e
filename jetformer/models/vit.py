"""The ViT encoder of Jet's couplings (big_vision `models/vit.py`).

Pre-norm blocks, by default with tanh GELU and LayerNorm of epsilon 1e-6, as in flax.

Dimensions: B batch, N tokens, M context tokens, E width.
"""

import torch
from torch import Tensor, nn

from jetformer.models import initializers
from jetformer.models.activations import gelu
from jetformer.models.attention import attend

LAYER_NORM_EPS = 1e-6  # flax's; PyTorch's is 1e-5


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """`[B, N, E]` to `[B, heads, N, E / heads]`."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases, `[B, N, E]` to `[B, N, E]`."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide the ViT's width {width}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def init_weights(self, generator: torch.Generator) -> None:
        for third in self.qkv.weight.chunk(3):  # the reference has three matrices
            nn.init.xavier_uniform_(third, generator=generator)
        nn.init.xavier_uniform_(self.out.weight, generator=generator)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (_heads(y, self.num_heads) for y in self.qkv(x).chunk(3, dim=-1))
        y = attend(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Multi-head attention from `[B, N, E]` to a context `[B, M, context_dim]`; its output starts at zero."""

    def __init__(self, width: int, num_heads: int, context_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(context_dim, 2 * width)
        self.out = nn.Linear(width, width)

    def init_weights(self, generator: torch.Generator) -> None:
        initializers.lecun_normal_(self.query.weight, generator)
        initializers.lecun_normal_(self.key_value.weight, generator)
        nn.init.zeros_(self.out.weight)
        for linear in (self.query, self.key_value, self.out):
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = _heads(self.query(x), self.num_heads)
        k, v = (_heads(y, self.num_heads) for y in self.key_value(context).chunk(2, dim=-1))
        y = attend(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear, GELU, linear, with a hidden width of 4 · E: `[B, N, E]` to `[B, N, E]`."""

    def __init__(self, width: int, gelu_form: str):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.gelu = gelu(gelu_form)
        self.fc2 = nn.Linear(4 * width, width)

    def init_weights(self, generator: torch.Generator) -> None:
        for linear in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(linear.weight, generator=generator)
            nn.init.normal_(linear.bias, std=1e-6, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.gelu(self.fc1(x)))


class EncoderBlock(nn.Module):
    """A pre-norm transformer block, `[B, N, E]` to `[B, N, E]`."""

    is_transformer_block = True  # see `optim.block_matrices`

    def __init__(self, width: int, num_heads: int, gelu_form: str, norm_eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = SelfAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, gelu_form)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """A stack of blocks and a final LayerNorm, `[B, N, E]` to `[B, N, E]`.

    Args:
      depth: number of blocks.
      width: E.
      num_heads: attention heads.
      gelu: form of GELU, see `activations.gelu`.
      norm_eps: epsilon of the LayerNorms.

    Raises:
      ValueError: if the heads do not divide the width, or the form of GELU is unknown.
    """

    def __init__(self, depth: int, width: int, num_heads: int, gelu: str = "tanh", norm_eps: float = LAYER_NORM_EPS):
        super().__init__()
        self.blocks = nn.ModuleList(EncoderBlock(width, num_heads, gelu, norm_eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=norm_eps)

    def init_weights(self, generator: torch.Generator) -> None:
        del generator
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

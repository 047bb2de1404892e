"""A network that imitates the inverse of a TarFlow's block in one pass (one-step distillation of FARMER, arXiv
2510.23588).

Dimensions: B batch, N tokens, D token dimension, E width, M context tokens, X their dimension.
"""

import torch
from torch import Tensor, nn

from jetformer.models import initializers
from jetformer.models.vit import Encoder
from jetformer.ranges import PositiveInt


class Student(nn.Module):
    """x = z · exp(log_scale) + shift, where a transformer without causal mask predicts both from all of z.

    A new one is the identity. See `TarFlow.student` and `objectives.DistillObjective`.

    Args:
      num_tokens: N.
      dim: D.
      context_dim: X; None for no context.
      depth: number of transformer layers.
      emb_dim: E.
      num_heads: attention heads.
    """

    is_block = True
    recompute_policy = "couplings"  # see `remat`

    def __init__(
        self,
        num_tokens: PositiveInt,
        dim: PositiveInt,
        context_dim: PositiveInt | None,
        depth: PositiveInt = 2,
        emb_dim: PositiveInt = 768,
        num_heads: PositiveInt = 12,
    ):
        super().__init__()
        self.init_proj = nn.Linear(dim, emb_dim)
        self.posemb = nn.Parameter(torch.empty(num_tokens, emb_dim))
        self.context_proj = nn.Linear(context_dim, emb_dim, bias=False) if context_dim else None
        self.encoder = Encoder(depth, emb_dim, num_heads)
        self.final_proj = nn.Linear(emb_dim, 2 * dim)

    def init_weights(self, generator: torch.Generator) -> None:
        initializers.lecun_normal_(self.init_proj.weight, generator)
        nn.init.zeros_(self.init_proj.bias)
        nn.init.normal_(self.posemb, std=0.02, generator=generator)
        if self.context_proj is not None:
            nn.init.normal_(self.context_proj.weight, std=0.02, generator=generator)
        nn.init.zeros_(self.final_proj.weight)
        nn.init.zeros_(self.final_proj.bias)

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Maps the block's output `[B, N, D]` to an estimate of its input; context `[B, M, X]` or None."""
        y = self.init_proj(z) + self.posemb
        if context is not None:
            y = y + self.context_proj(context).mean(1, keepdim=True)
        log_scale, shift = self.final_proj(self.encoder(y)).to(z.dtype).chunk(2, dim=-1)
        return z * log_scale.exp() + shift

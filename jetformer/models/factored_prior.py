"""A prior for factored-out dimensions, in the place of the standard Gaussian (FARMER, arXiv 2510.23588).

Dimensions: B batch, L image tokens, D dimensions of a token that the decoder models, F dimensions factored out, K
mixtures, E width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jetformer.models import initializers
from jetformer.models.mixture import MixtureHead
from jetformer.models.mixture_nll import TokenScores
from jetformer.ranges import NonNegativeFloat, PositiveInt


class FactoredPrior(nn.Module):
    """Models the factored-out dimensions given the tokens of the image, as a mixture of diagonal Gaussians.

    All positions share one mixture, predicted from an average over the image's tokens: what is factored out is told
    apart by image, not by place.

    Args:
      out_dim: D.
      factored_dim: F.
      num_mixtures: K.
      width: E, of the hidden layers.
      per_token: predict a mixture for each position instead, from its own token and the average.
      mean_init_std: standard deviation of the means that the components start with; at 0 they would stay equal.
    """

    def __init__(
        self,
        out_dim: PositiveInt,
        factored_dim: PositiveInt,
        num_mixtures: PositiveInt = 8,
        width: PositiveInt = 128,
        per_token: bool = False,
        mean_init_std: NonNegativeFloat = 0.5,
    ):
        super().__init__()
        self.per_token, self.num_mixtures = per_token, num_mixtures
        self.token_proj, self.hidden_proj = nn.Linear(out_dim, width), nn.Linear(width, width)
        self.head = MixtureHead(width, factored_dim, num_mixtures, mean_init_std=mean_init_std)
        initializers.init_on_cpu(self)

    def init_weights(self, generator: torch.Generator) -> None:
        for layer in (self.token_proj, self.hidden_proj):
            initializers.lecun_normal_(layer.weight, generator)
            nn.init.zeros_(layer.bias)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Returns what `head` predicts the mixtures from: `[B, 1, E]`, or with per_token `[B, L, E]`."""
        x = F.gelu(self.token_proj(tokens))
        average = x.mean(1, keepdim=True)
        return F.gelu(self.hidden_proj(x + average if self.per_token else average))

    def forward(self, tokens: Tensor, factored: Tensor, weight: Tensor) -> TokenScores:
        """Scores factored-out dimensions, see `MixtureHead.forward`.

        Args:
          tokens: `[B, L, D]`.
          factored: `[B, L, F]`.
          weight: `[B, L]`, factor of each position in the sum.
        """
        return self.head(self.hidden(tokens).expand(-1, tokens.shape[1], -1), factored, weight)

    def sample(self, tokens: Tensor, gumbel: Tensor, normal: Tensor) -> Tensor:
        """Samples factored-out dimensions `[B, L, F]`.

        Args:
          tokens: `[B, L, D]`.
          gumbel: `[B, L, K]`, standard Gumbel noise, which chooses components.
          normal: `[B, L, F]`, standard normal noise.
        """
        hidden = self.hidden(tokens)
        log_weights, locs, scales = (x.unflatten(0, hidden.shape[:2]) for x in self.head.mixture(hidden.flatten(0, 1)))
        chosen = (log_weights + gumbel).argmax(-1)[:, :, None, None]  # [B, L, 1, 1]
        loc, scale = (
            x.expand(-1, tokens.shape[1], -1, -1).take_along_dim(chosen, dim=2).squeeze(2) for x in (locs, scales)
        )
        return loc + scale * normal

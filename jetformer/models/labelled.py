"""A flow conditioned on class labels.

Dimensions: B batch, H × W × C image, M context tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from jetformer.models import initializers
from jetformer.ranges import PositiveInt


class LabelledFlow(nn.Module):
    """A flow given a class label, as a context of one token.

    One more label stands for none. It replaces labels that training drops (`JetObjective.drop_labels_prob`), and a
    missing context.

    Args:
      flow: `Jet` or `TarFlow`, called with `context_dim`.
      num_labels: number of labels, which are 0..num_labels - 1.
      context_dim: dimension of the labels' embeddings, of which no label has one too. None: contexts are one-hot
        vectors, and their average for no label. A `TarFlow` then adds the embedding of the label in each block, or the
        average of all embeddings, as its paper does.
    """

    def __init__(self, flow: Callable[..., nn.Module], num_labels: PositiveInt, context_dim: PositiveInt | None = 64):
        super().__init__()
        self.num_labels = num_labels
        self.flow = flow(context_dim=context_dim or num_labels)
        self.image_shape = self.flow.image_shape
        self.max_logdet = getattr(self.flow, "max_logdet", None)  # see `Jet`
        self.label_emb = initializers.embedding(num_labels + 1, context_dim) if context_dim else None
        initializers.init_on_cpu(self)

    def init_weights(self, generator: torch.Generator) -> None:
        if self.label_emb is not None:
            nn.init.normal_(self.label_emb.weight, std=1.0, generator=generator)

    def context(self, labels: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Labels int `[B]` to contexts `[B, 1, context_dim]`; those `dropped`, bool `[B]`, to that of no label."""
        if dropped is not None:
            labels = labels.where(~dropped, self.num_labels)
        if self.label_emb is not None:
            return self.label_emb(labels)[:, None]
        labels = labels[:, None, None]
        one_hot = labels == torch.arange(self.num_labels, device=labels.device)
        one_hot = one_hot.to(next(self.flow.parameters()).dtype)
        return one_hot.masked_fill(labels == self.num_labels, 1 / self.num_labels)

    def _no_label(self, x: Tensor) -> Tensor:
        return self.context(torch.full((len(x),), self.num_labels, device=x.device))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Maps images `[B, H, W, C]` to latents and log-determinants `[B]` in nats; see `context`, None is no label."""
        return self.flow(x, self._no_label(x) if context is None else context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Maps latents to images; arguments and results as in `forward`."""
        return self.flow.inverse(z, self._no_label(z) if context is None else context)

"""A flow conditioned on class labels.

Dimensions: B batch, H × W × C image, M context tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from jetformer.models import initializers
from jetformer.ranges import PositiveInt


class LabelledFlow(nn.Module):
    """A flow whose couplings attend to the embedding of a class label: a context of one token.

    One more embedding stands for no label. It replaces labels that training drops (`JetObjective.drop_labels_prob`),
    and a missing context.

    Args:
      flow: `Jet`, called with `context_dim`.
      num_labels: number of labels, which are 0..num_labels - 1.
      context_dim: dimension of their embeddings.
    """

    def __init__(self, flow: Callable[..., nn.Module], num_labels: PositiveInt, context_dim: PositiveInt = 64):
        super().__init__()
        self.num_labels = num_labels
        self.flow = flow(context_dim=context_dim)
        self.image_shape = self.flow.image_shape
        self.max_logdet = getattr(self.flow, "max_logdet", None)  # see `Jet`
        self.label_emb = initializers.embedding(num_labels + 1, context_dim)
        initializers.init_on_cpu(self)

    def init_weights(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.label_emb.weight, std=1.0, generator=generator)

    def context(self, labels: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Labels int `[B]` to contexts `[B, 1, context_dim]`; those `dropped`, bool `[B]`, to that of no label."""
        if dropped is not None:
            labels = labels.where(~dropped, self.num_labels)
        return self.label_emb(labels)[:, None]

    def _no_label(self, x: Tensor) -> Tensor:
        return self.label_emb.weight[self.num_labels].expand(len(x), 1, -1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Maps images `[B, H, W, C]` to latents and log-determinants `[B]` in nats; see `context`, None is no label."""
        return self.flow(x, self._no_label(x) if context is None else context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Maps latents to images; arguments and results as in `forward`."""
        return self.flow.inverse(z, self._no_label(z) if context is None else context)

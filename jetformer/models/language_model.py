"""The decoder as a language model over the text tokens of a JetFormer.

Dimensions: B batch, T text tokens, E width, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from jetformer.models import initializers
from jetformer.models.decoder import Decoder, RMSNorm
from jetformer.ranges import NonNegativeInt, PositiveInt


class LanguageModel(nn.Module):
    """A causal decoder over `[bos, text]`; position i predicts token i + 1.

    With the parameters of a `JetFormer` with untie_output_vocab, a text is as probable as it is there when it comes
    first.

    Args:
      decoder: `Decoder`, called without arguments.
      vocab_size: V, number of text tokens, including `bos_id`.
      bos_id: token that begins a text.

    Raises:
      ValueError: if `bos_id` is not in the vocabulary.
    """

    def __init__(self, decoder: Callable[[], Decoder], vocab_size: PositiveInt, bos_id: NonNegativeInt):
        super().__init__()
        if not 0 <= bos_id < vocab_size:
            raise ValueError(f"bos_id {bos_id} is outside the vocabulary of {vocab_size} tokens")
        self.vocab_size, self.bos_id = vocab_size, bos_id
        self.decoder = decoder()
        self.text_emb = initializers.embedding(vocab_size, self.decoder.width)
        self.text_head = nn.Linear(self.decoder.width, vocab_size)
        self.final_norm = RMSNorm(self.decoder.width)
        self.text_norm = nn.Identity()
        initializers.init_on_cpu(self)

    def init_weights(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.text_emb.weight, std=1.0, generator=generator)
        initializers.lecun_normal_(self.text_head.weight, generator)
        nn.init.zeros_(self.text_head.bias)

    def first_special(self, text_length: int) -> int:
        """Returns the lowest special token, as `JetFormer.first_special`."""
        del text_length
        return self.bos_id

    def embed(self, text: Tensor, text_mask: Tensor | None = None, *, shift: bool = True):
        """Embeds `[bos, text]`, S tokens.

        Args:
          text: `[B, T]`, token ids; T may be 0.
          text_mask: bool `[B, T]`, true for valid tokens; None if all are.
          shift: drop the last token, whose prediction has no target.

        Returns:
          Embeddings, attention mask and positions as `JetFormer.embed`.
        """
        bos = text.new_full((len(text), 1), self.bos_id)
        ids = torch.cat((bos, text), dim=1)
        index = torch.arange(ids.shape[1], device=text.device)
        mask, positions = None, index.expand(ids.shape)
        if text_mask is not None:
            valid = torch.cat((torch.ones_like(bos, dtype=torch.bool), text_mask), dim=1)
            mask, positions = (index[:, None] >= index) & valid[:, None], valid.long().cumsum(1) - 1
        x = self.text_emb(ids)
        if shift:
            x, positions = x[:, :-1], positions[:, :-1]
            mask = None if mask is None else mask[:, :-1, :-1]
        return x, mask, positions

    def run_decoder(self, x: Tensor, **kwargs) -> Tensor:
        """Runs decoder and final norm; arguments as in `Decoder.forward`."""
        return self.final_norm(self.decoder(x, **kwargs))

    def text_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states `[..., E]` to logits `[..., V]`."""
        return self.text_head(hidden)

    def forward(self, text: Tensor, text_mask: Tensor | None = None, dropout_keys: Tensor | None = None) -> Tensor:
        """Returns the normalized hidden states `[B, T, E]` that predict the text, for `text_logits`.

        Arguments are as in `embed` and `Decoder.forward`.
        """
        x, mask, positions = self.embed(text, text_mask)
        return self.run_decoder(x, mask=mask, positions=positions, dropout_keys=dropout_keys)

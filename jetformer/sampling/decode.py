"""Decoding with a key/value cache. The cache lives here, not in the model.

Dimensions: B batch, T text tokens, L image tokens, D token dimension, F factored-out dimensions, E width.
"""

import torch
from torch import Tensor

from jetformer.models.decoder import KVCache
from jetformer.models.jetformer import JetFormer


def right_align(x: Tensor, valid: Tensor) -> Tensor:
    """Moves each row's valid tokens to the right end, in order: `x` `[B, S, ...]`, `valid` bool `[B, S]`."""
    order = valid.long().argsort(dim=1, stable=True)
    return x.gather(1, order.view(*order.shape, *[1] * (x.ndim - 2)).expand_as(x))


class ImageDecoder:
    """Decodes the image tokens that follow a text prefix, one at a time.

    Prompts of different lengths are right-aligned, so that all write their next token to the same place of the cache;
    what pads them on the left is masked out. (big_vision: `prefill_cache`, `extend_cache`.)

    Args:
      model: the model, in evaluation mode.
      text: `[B, T]`, token ids.
      text_mask: bool `[B, T]`, which are valid; None: all.
      num_tokens: how many image tokens will be decoded.
      drop_prefix: bool `[B]`, whether to put `nolabel_id` in the place of the text.
    """

    def __init__(
        self,
        model: JetFormer,
        text: Tensor,
        text_mask: Tensor | None,
        num_tokens: int,
        drop_prefix: Tensor | None = None,
    ):
        self.model = model
        if text_mask is None:
            text_mask = torch.ones_like(text, dtype=torch.bool)
        no_image = model.image_emb.weight.new_zeros(len(text), 0, model.out_dim)
        self._prefix, mask, positions = model.embed(
            text,
            no_image,
            text_first=True,
            text_mask=text_mask,
            drop_prefix=drop_prefix,
            shift=False,
        )
        # A valid token is one that itself is attended to.
        valid = mask.diagonal(dim1=1, dim2=2)
        self._prefix = right_align(self._prefix, valid)
        rows = right_align(mask, valid)
        mask = right_align(rows.transpose(1, 2), valid).transpose(1, 2)
        positions = right_align(positions, valid)
        valid = right_align(valid, valid)
        length = valid.shape[1]
        # Rows of padding see themselves: attention over nothing is not defined, and nothing sees them.
        self._mask = mask | torch.eye(length, dtype=torch.bool, device=mask.device)
        self._positions = positions
        self._next_position = valid.sum(1)
        self._valid = torch.cat((valid, valid.new_ones(len(text), num_tokens - 1)), dim=1)
        decoder = model.decoder
        shape = (
            len(text),
            decoder.num_kv_heads,
            length + num_tokens - 1,
            decoder.head_dim,
        )
        self._end = 0
        self._layers = [tuple(self._prefix.new_zeros(shape) for _ in range(2)) for _ in decoder.blocks]

    def _run(self, x: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        caches = [KVCache(k, v, self._end) for k, v in self._layers]
        x = self.model.run_decoder(x, mask=mask, positions=positions, caches=caches)
        self._end += x.shape[1]
        return self.model.image_norm(x[:, -1])

    def prefill(self) -> Tensor:
        """Runs the prefix; the hidden state `[B, E]` that predicts the first image token."""
        return self._run(self._prefix, self._mask, self._positions)

    def step(self, token: Tensor) -> Tensor:
        """Appends an image token `[B, D]`; the hidden state `[B, E]` that predicts the next."""
        x = self.model.image_emb(token)[:, None]
        positions, self._next_position = self._next_position, self._next_position + 1
        mask = self._valid[:, None, : self._end + 1]
        return self._run(x, mask, positions[:, None])


@torch.no_grad()
def sample_images(
    model: JetFormer,
    text: Tensor,
    generator: torch.Generator | None,
    *,
    text_mask: Tensor | None = None,
    temperature_scales: float = 1.0,
    temperature_probs: float = 1.0,
) -> Tensor:
    """Samples images given texts (or class labels), token by token.

    Args:
      model: the model, in evaluation mode.
      text: `[B, T]`, token ids.
      generator: of the model's device.
      text_mask: bool `[B, T]`, which are valid; None: all.
      temperature_scales: multiplies the standard deviations of the tokens' mixtures.
      temperature_probs: multiplies the log-weights of the tokens' mixtures.

    Returns:
      uint8 `[B, H, W, C]`.
    """
    decoder = ImageDecoder(model, text, text_mask, model.num_image_tokens)
    hidden = decoder.prefill()
    tokens = []
    for i in range(model.num_image_tokens):
        if i:
            hidden = decoder.step(tokens[-1])
        distribution = model.image_head.distribution(
            model.image_head.logits(hidden),
            temperature_scales=temperature_scales,
            temperature_probs=temperature_probs,
        )
        tokens.append(distribution.sample(generator))
    tokens = torch.stack(tokens, dim=1)
    shape = (*tokens.shape[:2], model.factored_dim)
    factored = torch.randn(shape, generator=generator, device=tokens.device)
    return to_uint8(model.decode_image(tokens, factored))


def to_uint8(image: Tensor) -> Tensor:
    """Values in [-1, 1] to 8 bits: the pixel whose dequantization interval a value lies in."""
    return ((image + 1) * 127.5).floor().clamp(0, 255).to(torch.uint8)

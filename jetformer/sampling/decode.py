"""Decoding with a key/value cache. The cache lives here, not in the model.

Shapes never change from one decoded token to the next, and where a token goes is a tensor: to a compiler all steps are
one and the same graph. Dimensions: B batch, T text tokens, L image tokens, D token dimension, F factored-out
dimensions, E width, S tokens in all.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from jetformer import prng
from jetformer.models.decoder import KVCache
from jetformer.models.jetformer import JetFormer

# What a sample's key is folded with, beside the numbers of its image tokens.
_FACTORED = -1


def right_align(x: Tensor, valid: Tensor) -> Tensor:
    """Moves each row's valid tokens to the right end, in order: `x` `[B, S, ...]`, `valid` bool `[B, S]`."""
    order = valid.int().argsort(dim=1, stable=True)
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
        mask = mask | torch.eye(length, dtype=torch.bool, device=mask.device)
        to_come = num_tokens - 1  # the last token is not fed back
        self._mask = torch.cat((mask, mask.new_zeros(len(text), length, to_come)), dim=2)
        self._positions = positions
        self._next_position = valid.sum(1)
        self._valid = torch.cat((valid, valid.new_ones(len(text), to_come)), dim=1)
        decoder = model.decoder
        shape = (len(text), decoder.num_kv_heads, length + to_come, decoder.head_dim)
        self._slots = torch.arange(length + to_come, device=text.device)
        self._next_slot = self._slots[length : length + 1]
        self._layers = [tuple(self._prefix.new_zeros(shape) for _ in range(2)) for _ in decoder.blocks]

    def _run(self, x: Tensor, mask: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        caches = [KVCache(k, v, slots) for k, v in self._layers]
        x = self.model.run_decoder(x, mask=mask, positions=positions, caches=caches)
        return self.model.image_norm(x[:, -1])

    def prefill(self) -> Tensor:
        """Runs the prefix; the hidden state `[B, E]` that predicts the first image token."""
        return self._run(self._prefix, self._mask, self._positions, self._slots[: self._prefix.shape[1]])

    def step(self, token: Tensor) -> Tensor:
        """Appends an image token `[B, D]`; the hidden state `[B, E]` that predicts the next."""
        x = self.model.image_emb(token)[:, None]
        positions, self._next_position = self._next_position, self._next_position + 1
        slot, self._next_slot = self._next_slot, self._next_slot + 1
        mask = (self._valid & (self._slots <= slot))[:, None]
        return self._run(x, mask, positions[:, None], slot)


@torch.no_grad()
def sample_images(
    model: JetFormer,
    text: Tensor,
    keys: Tensor,
    *,
    text_mask: Tensor | None = None,
    temperature_scales: float = 1.0,
    temperature_probs: float = 1.0,
    compile: Callable[[Callable], Callable] = lambda function: function,
) -> Tensor:
    """Samples images given texts (or class labels), token by token.

    A sample depends on its text and its key alone, not on the batch that it is in.

    Args:
      model: the model, in evaluation mode.
      text: `[B, T]`, token ids.
      keys: int32 `[B, 2]`, see `jetformer.prng`.
      text_mask: bool `[B, T]`, which are valid; None: all.
      temperature_scales: multiplies the standard deviations of the tokens' mixtures.
      temperature_probs: multiplies the log-weights of the tokens' mixtures.
      compile: what the three stages (prefix, one token, flow) are compiled with.

    Returns:
      uint8 `[B, H, W, C]`.
    """
    head, num_tokens = model.image_head, model.num_image_tokens
    number = torch.zeros(len(text), dtype=torch.int32, device=text.device)  # of the next image token

    def pick(hidden: Tensor) -> Tensor:
        distribution = head.distribution(
            head.logits(hidden), temperature_scales=temperature_scales, temperature_probs=temperature_probs
        )
        return distribution.sample(prng.fold_in(keys, number))

    def prefill() -> tuple[ImageDecoder, Tensor]:
        decoder = ImageDecoder(model, text, text_mask, num_tokens)
        return decoder, pick(decoder.prefill())

    def step(token: Tensor) -> Tensor:
        nonlocal number
        number = number + 1
        return pick(decoder.step(token))

    def finish(tokens: list[Tensor]) -> Tensor:
        tokens = torch.stack(tokens, dim=1)
        factored = prng.normal(prng.fold_in(keys, _FACTORED), (num_tokens, model.factored_dim))
        return to_uint8(model.decode_image(tokens, factored))

    decoder, token = compile(prefill)()
    step = compile(step)
    tokens = [token]
    while len(tokens) < num_tokens:
        tokens.append(step(tokens[-1]))
    return compile(finish)(tokens)


def to_uint8(image: Tensor) -> Tensor:
    """Values in [-1, 1] to 8 bits: the pixel whose dequantization interval a value lies in."""
    return ((image + 1) * 127.5).floor().clamp(0, 255).to(torch.uint8)

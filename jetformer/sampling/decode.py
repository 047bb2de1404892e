"""Decodes images and texts token by token with a KV cache, which is kept here and not in the model.

All steps are one graph to a compiler: shapes are the same at each step, the position is a tensor, and a step updates
its state in place.

Dimensions: B batch, T text tokens, L image tokens, D token dimension, F factored-out dimensions, E width, S tokens of a
sequence, V vocabulary.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from jetformer import objectives, prng
from jetformer.models.decoder import KVCache
from jetformer.models.jetformer import JetFormer
from jetformer.models.language_model import LanguageModel
from jetformer.sampling import guidance as guidance_lib
from jetformer.sampling.denoising import denoise
from jetformer.sampling.guidance import Draft, Guidance

Compile = Callable[[Callable], Callable]

# Folded into a sample's key, like the numbers of its tokens.
FACTORED, DEQUANT = -1, -2
# Number of text tokens after which decoding checks again whether all texts have ended.
_CHECK_EVERY = 8


def right_align(x: Tensor, valid: Tensor) -> Tensor:
    """Moves each row's valid tokens to the right end, in order: `x` `[B, S, ...]`, `valid` bool `[B, S]`."""
    order = valid.int().argsort(dim=1, stable=True)
    return x.gather(1, order.view(*order.shape, *[1] * (x.ndim - 2)).expand_as(x))


class CachedDecoder:
    """Runs the model on a prefix, then on one token at a time.

    Prompts of different lengths are right-aligned and their padding is masked, so all write their next token to the
    same slot of the cache. (big_vision: `prefill_cache`, `extend_cache`.)

    Args:
      model: in evaluation mode.
      prefix: the return value of its `embed` with shift=False.
      modality: "image" or "text", of the tokens to decode.
      num_steps: number of calls of `step` to come.
      start: number of the image token in the first call of `step`.
    """

    def __init__(
        self,
        model: JetFormer | LanguageModel,
        prefix: tuple[Tensor, Tensor | None, Tensor],
        *,
        modality: str,
        num_steps: int,
        start: int = 0,
    ):
        self.model = model
        x, mask, positions = prefix
        batch_size, length = positions.shape
        if modality == "image":
            self._embed = lambda tokens, slots: model.embed_image_tokens(tokens, slots - (length - start))
            self._norm = model.image_norm
        else:
            self._embed, self._norm = lambda ids, slots: model.text_emb(ids), model.text_norm
        self._slots = torch.arange(length + num_steps, device=x.device)
        if mask is None:
            mask = (self._slots[:length, None] >= self._slots[:length]).expand(batch_size, -1, -1)
        # A token is valid if it attends to itself.
        valid = mask.diagonal(dim1=1, dim2=2)
        self._prefix = right_align(x, valid)
        rows = right_align(mask, valid)
        mask = right_align(rows.transpose(1, 2), valid).transpose(1, 2)
        self._positions = right_align(positions, valid)
        valid = right_align(valid, valid)
        # Padding attends to itself, because attention over no tokens is undefined. No valid token attends to padding.
        mask = mask | torch.eye(length, dtype=torch.bool, device=mask.device)
        self._mask = torch.cat((mask, mask.new_zeros(batch_size, length, num_steps)), dim=2)
        self._next_position = valid.sum(1)
        self._valid = torch.cat((valid, valid.new_ones(batch_size, num_steps)), dim=1)
        decoder = model.decoder
        shape = (batch_size, decoder.num_kv_heads, length + num_steps, decoder.head_dim)
        self._next_slot = self._slots[length : length + 1].clone()
        # Keys and values come in autocast's dtype.
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        self._layers = [tuple(x.new_zeros(shape, dtype=dtype) for _ in range(2)) for _ in decoder.blocks]

    def _run(self, x: Tensor, mask: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        caches = [KVCache(k, v, slots) for k, v in self._layers]
        return self._norm(self.model.run_decoder(x, mask=mask, positions=positions, caches=caches))

    def prefill(self) -> Tensor:
        """Runs the prefix and returns the hidden state `[B, E]` that predicts the first token."""
        return self._run(self._prefix, self._mask, self._positions, self._slots[: self._prefix.shape[1]])[:, -1]

    def step(self, token: Tensor) -> Tensor:
        """Appends an image token `[B, D]` or the id `[B]` of a text token, and returns the hidden state `[B, E]` that
        predicts the next one."""
        mask = (self._valid & (self._slots <= self._next_slot))[:, None]
        # The prefix's dtype: autocast would pass single tokens in bfloat16 through all layers.
        x = self._embed(token[:, None], self._next_slot).to(self._prefix.dtype)
        hidden = self._run(x, mask, self._next_position[:, None], self._next_slot)[:, -1]
        self._next_position.add_(1)
        self._next_slot.add_(1)
        return hidden

    def look_ahead(self, tokens: Tensor) -> Tensor:
        """Runs tokens `[B, N, D]` or ids `[B, N]` without keeping them: the next call starts at the same position.

        Returns:
          The hidden states `[B, N, E]` that predict the token after each of them.
        """
        ahead = torch.arange(tokens.shape[1], device=tokens.device)
        slots = self._next_slot + ahead
        mask = self._valid[:, None] & (self._slots <= slots[:, None])
        x = self._embed(tokens, slots).to(self._prefix.dtype)
        return self._run(x, mask, self._next_position[:, None] + ahead, slots)


class Latents(NamedTuple):
    """Latents of images.

    tokens: `[B, L, D]`.
    factored: `[B, L, F]`, the factored-out dimensions.
    """

    tokens: Tensor
    factored: Tensor


@torch.no_grad()
def sample_latents(
    model: JetFormer,
    text: Tensor,
    keys: Tensor,
    *,
    text_mask: Tensor | None = None,
    given: Latents | None = None,
    kept: Tensor | None = None,
    guidance: Guidance = Guidance(),  # noqa: B008 (frozen)
    temperature_scales: float = 1.0,
    temperature_probs: float = 1.0,
    compile: Compile = lambda function: function,
    on_token: Callable[[], None] = lambda: None,
) -> Latents:
    """Samples the latents of images token by token; arguments and errors as in `sample_images`."""
    if not (temperature_scales > 0 and temperature_probs > 0):
        raise ValueError(f"temperatures {temperature_scales} and {temperature_probs}: expected positive numbers")
    guidance.check(model.image_head)
    batch_size, total = len(text), model.num_image_tokens
    device, dtype = text.device, model.image_emb.weight.dtype
    # The given latents of the first tokens, which run at once.
    first = given
    if given is None or kept is not None:
        sizes = (model.out_dim, model.factored_dim)
        first = Latents(*(torch.empty(batch_size, 0, n, device=device, dtype=dtype) for n in sizes))
    start = first.tokens.shape[1]
    weights = guidance.weights(total).to(device)
    drop = None
    # With guidance one batch holds both halves: first with the text, then without.
    twice = lambda x: torch.cat((x, x)) if guidance.on else x
    if guidance.on:
        drop = torch.arange(2 * batch_size, device=device) >= batch_size
    numbers = torch.arange(total, device=device)
    number = numbers[start : start + 1].clone()

    def pick(hidden: Tensor) -> Draft:
        return guidance_lib.draft_token(
            model.image_head,
            hidden,
            noise.at(number),
            guidance.mode,
            weights.index_select(0, number).squeeze(0),
            temperature_scales,
            temperature_probs,
            guidance.num_candidates,
        )

    def draw() -> tuple[guidance_lib.Noise, Tensor, Tensor | None]:
        own = prng.fold_in(keys, FACTORED)
        normal, gumbel = prng.normal(own, (total, model.factored_dim)).to(dtype), None
        if model.factored_prior is not None:
            gumbel = guidance_lib.gumbel(prng.fold_in(own, total), total * model.factored_prior.num_mixtures)
            gumbel = gumbel.unflatten(-1, (total, -1))
        return guidance_lib.draw(model.image_head, keys, total, model.out_dim), normal, gumbel

    def prefill() -> tuple[CachedDecoder, Draft]:
        prefix = model.embed(
            twice(text),
            twice(first.tokens),
            text_first=True,
            text_mask=None if text_mask is None else twice(text_mask),
            drop_prefix=drop,
            shift=False,
        )
        # The last token is not an input.
        decoder = CachedDecoder(model, prefix, modality="image", num_steps=total - start - 1, start=start)
        return decoder, pick(decoder.prefill())

    def step(token: Tensor) -> Draft:
        if kept is not None:
            own = given.tokens.index_select(1, number).squeeze(1)
            token = own.where(kept.index_select(1, number), token)
        number.add_(1)
        return pick(decoder.step(twice(token)))

    noise, factored, gumbel = compile(draw)()
    decoder, draft = compile(prefill)()
    tokens = [guidance_lib.resolve(draft)]
    on_token()
    step = compile(step)
    while start + len(tokens) < total:
        tokens.append(guidance_lib.resolve(step(tokens[-1])))
        on_token()

    def finish() -> Latents:
        whole = torch.cat((first.tokens, torch.stack(tokens, dim=1).to(dtype)), dim=1)
        if kept is not None:
            whole = given.tokens.where(kept[..., None], whole)
        drawn = factored
        if gumbel is not None:
            drawn = model.factored_prior.sample(whole, gumbel, factored).to(dtype)
        drawn = torch.cat((first.factored, drawn[:, start:]), dim=1)
        return Latents(whole, drawn if kept is None else given.factored.where(kept[..., None], drawn))

    return compile(finish)()


@torch.no_grad()
def decode_latents(
    model: JetFormer, text: Tensor, latents: Latents, text_mask: Tensor | None = None, noise_std: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Decodes latents to images and scores them.

    Args:
      model, text, text_mask: as in `sample_images`.
      latents: of the images.
      noise_std: the noise to remove from the images after they are scored, see `denoise`; 0 removes none.

    Returns:
      Images uint8 `[B, H, W, C]`, and log-likelihoods `[B]` in nats given the texts, without guidance and at
      temperature 1, of the pixel values in [0, 256) before they are rounded to 8 bits. Divided by -H · W · C · ln 2
      they are the objective's bits per dim.
    """
    image, logdet = model.decode_image(*latents)
    nats = _log_likelihood(model, text, latents, -logdet, text_mask)
    if noise_std:
        image = denoise(functools.partial(_total_log_density, model, text, text_mask), image, noise_std)
    return to_uint8(image), nats


def _total_log_density(model: JetFormer, text: Tensor, text_mask: Tensor | None, x: Tensor) -> Tensor:
    """Returns the sum of the log-densities in nats of images `[B, H, W, C]` in [-1, 1], given the texts."""
    encoded = model.encode_image(x)
    _, hidden = model(text, encoded.tokens, text_first=True, text_mask=text_mask)
    # Of the head's scores only the total has a gradient.
    total = model.image_head(hidden, encoded.tokens, torch.ones_like(encoded.tokens[..., 0])).total
    ones = torch.ones_like(encoded.logdet)
    factored_total, _ = objectives.score_factored(model, encoded.tokens, encoded.factored, ones)
    return encoded.logdet.sum() - total - factored_total


def _log_likelihood(
    model: JetFormer, text: Tensor, latents: Latents, logdet: Tensor, text_mask: Tensor | None
) -> Tensor:
    """Returns `[B]` in nats, of pixel values in [0, 256); `logdet` is that of encoding the image."""
    _, hidden = model(text, latents.tokens, text_first=True, text_mask=text_mask)
    nll = model.image_head(hidden, latents.tokens, torch.ones_like(latents.tokens[..., 0])).nll
    _, factored_nll = objectives.score_factored(model, *latents, torch.ones_like(logdet))
    return logdet - nll.sum(1) - factored_nll - math.prod(model.image_shape) * math.log(127.5)


@torch.no_grad()
def encode_images(model: JetFormer, images: Tensor, keys: Tensor) -> Latents:
    """Encodes images uint8 `[B, H, W, C]` to latents, with dequantization noise from `keys` int32 `[B, 2]`."""
    latents, _ = _encode(model, images, keys)
    return latents


def _encode(model: JetFormer, images: Tensor, keys: Tensor) -> tuple[Latents, Tensor]:
    """Returns latents and log-determinants `[B]` in nats."""
    noise = prng.uniform(prng.fold_in(keys, DEQUANT), images.shape[1:])
    pixels = images.to(model.image_emb.weight.dtype) + noise
    encoded = model.encode_image(objectives.to_unit_range(pixels))
    return Latents(encoded.tokens, encoded.factored), encoded.logdet


@torch.no_grad()
def sample_images(
    model: JetFormer,
    text: Tensor,
    keys: Tensor,
    *,
    text_mask: Tensor | None = None,
    noise_std: float = 0.0,
    compile: Compile = lambda function: function,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Samples images given texts or class labels, token by token.

    A sample depends on its text and its key, not on the rest of its batch.

    Args:
      model: in evaluation mode.
      text: token ids `[B, T]`.
      keys: int32 `[B, 2]`, see `jetformer.prng`.
      text_mask: bool `[B, T]`, valid tokens; None: all.
      noise_std: see `decode_latents`.
      compile: compiles the stages (noise, prefix, one token, flow), see `Loop.compile`.
      kwargs: given: latents of the first tokens, which are kept; with `kept`, of all tokens. None for none.
        kept: bool `[B, L]`, the tokens of `given` to keep; each other one is sampled given all tokens before it.
        guidance: see `Guidance`.
        temperature_scales: multiplies the standard deviations of the mixtures.
        temperature_probs: multiplies the log-weights of the mixtures.
        on_token: called after each token of the batch.

    Returns:
      See `decode_latents`.

    Raises:
      ValueError: if guidance does not fit the model, or a temperature is not positive.
    """
    latents = sample_latents(model, text, keys, text_mask=text_mask, compile=compile, **kwargs)
    return compile(lambda: decode_latents(model, text, latents, text_mask, noise_std))()


@torch.no_grad()
def complete_images(
    model: JetFormer,
    text: Tensor,
    keys: Tensor,
    images: Tensor,
    rows: int,
    *,
    text_mask: Tensor | None = None,
    compile: Compile = lambda function: function,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Keeps the first rows of images and samples the rest.

    This is an approximation: the flow encodes whole images only, so the tokens of the given rows are those of an image
    whose other rows repeat the last given one.

    Args:
      images: uint8 `[B, H, W, C]`; only their first `rows` rows matter.
      rows: number of rows of pixels to keep, a multiple of `rows_per_token`.
      model, text, keys, text_mask, compile, kwargs: as in `sample_images`.

    Returns:
      Images uint8 `[B, H, W, C]` with the given rows unchanged, and their log-likelihoods `[B]`, see `decode_latents`.

    Raises:
      ValueError: as `sample_images`, and for a number of rows that does not fit.
    """
    size, height = rows_per_token(model), images.shape[1]
    if not 0 < rows < height or rows % size:
        raise ValueError(f"{rows} rows: expected a multiple of the patch size {size} between 0 and {height}")

    def encode() -> Latents:
        filled = torch.cat((images[:, :rows], images[:, rows - 1 : rows].expand(-1, height - rows, -1, -1)), dim=1)
        return Latents(*(x[:, : rows // size * model.patches.grid[1]] for x in encode_images(model, filled, keys)))

    given = compile(encode)()
    latents = sample_latents(model, text, keys, text_mask=text_mask, given=given, compile=compile, **kwargs)

    def finish() -> tuple[Tensor, Tensor]:
        sampled = to_uint8(model.decode_image(*latents)[0])
        whole = torch.cat((images[:, :rows], sampled[:, rows:]), dim=1)
        return whole, _log_likelihood(model, text, *_encode(model, whole, keys), text_mask)

    return compile(finish)()


@torch.no_grad()
def inpaint_images(
    model: JetFormer,
    text: Tensor,
    keys: Tensor,
    images: Tensor,
    mask: Tensor,
    *,
    text_mask: Tensor | None = None,
    compile: Compile = lambda function: function,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Samples the pixels under a mask and keeps the others.

    This is an approximation. A token is kept if all pixels of its patch are, and each other one is sampled given the
    tokens before it, not those after it or the kept pixels of its own patch. The flow encodes whole images only, so the
    tokens to keep are first those of `images` as they come, with whatever is under the mask. Then the sampled pixels
    are put there, the image is encoded once more and the same noise draws the others again. This projection lets the
    given pixels agree with what the tokens decode to.

    Args:
      images: uint8 `[B, H, W, C]`, with a first guess under the mask.
      mask: bool `[B, H, W]`, the pixels to sample.
      model, text, keys, text_mask, compile, kwargs: as in `sample_images`.

    Returns:
      Images uint8 `[B, H, W, C]` with the other pixels unchanged, and their log-likelihoods `[B]`, see
      `decode_latents`.

    Raises:
      ValueError: as `sample_images`, and for tokens that are not patches.
    """
    size, columns = rows_per_token(model), model.image_shape[1] // model.patches.grid[1]
    kept = ~rearrange(mask, "b (h p) (w q) -> b (h w) (p q)", p=size, q=columns).any(-1)

    def paste(latents: Latents) -> Tensor:
        return to_uint8(model.decode_image(*latents)[0]).where(mask[..., None], images)

    whole = images
    for _ in range(2):
        given = compile(functools.partial(encode_images, model, whole, keys))()
        latents = sample_latents(
            model, text, keys, text_mask=text_mask, given=given, kept=kept, compile=compile, **kwargs
        )
        whole = compile(functools.partial(paste, latents))()
    return whole, compile(lambda: _log_likelihood(model, text, *_encode(model, whole, keys), text_mask))()


def rows_per_token(model: JetFormer) -> int:
    """Returns the number of rows of pixels that a row of image tokens covers.

    Raises:
      ValueError: if the first tokens are not the first rows.
    """
    if getattr(model.patches, "depth_to_seq", 1) > 1:
        raise ValueError("images cannot be completed with depth_to_seq above 1: tokens are not in the order of rows")
    return model.image_shape[0] // model.patches.grid[0]


@torch.no_grad()
def sample_text(
    model: JetFormer | LanguageModel,
    keys: Tensor,
    *,
    image_tokens: Tensor | None = None,
    text: Tensor | None = None,
    text_mask: Tensor | None = None,
    max_length: int,
    lengths: Tensor | None = None,
    vocab_size: int,
    eos_id: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    compile: Compile = lambda function: function,
    on_token: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Samples texts token by token: captions of images by a `JetFormer`, or continuations by a `LanguageModel`.

    Args:
      model: in evaluation mode.
      keys: int32 `[B, 2]`, see `jetformer.prng`.
      image_tokens: `[B, L, D]`, for a JetFormer; see `encode_images`.
      text: token ids `[B, T]` to continue, for a LanguageModel; T may be 0.
      text_mask: bool `[B, T]`, valid tokens of `text`; None: all.
      max_length: maximum number of sampled tokens, the end token included.
      lengths: `[B]`, maximum of each text, up to max_length; None: max_length.
      vocab_size: V; the model's special tokens have higher ids, and are not sampled.
      eos_id: the token that ends a text.
      temperature: divides the logits.
      top_k: number of most probable tokens to choose from; 1 is greedy decoding. None: all.
      top_p: choose from the smallest set of most probable tokens with at least this probability, in (0, 1].
      compile: compiles the stages (prefix, one token), see `Loop.compile`.
      on_token: called after each token of the batch.

    Returns:
      Token ids `[B, max_length]`, which are `eos_id` from a text's end on; the texts' numbers of tokens `[B]`, the end
      token included; and their log-likelihoods `[B]` in nats, at temperature 1.

    Raises:
      ValueError: for a model of class labels, or an option out of range.
    """
    if isinstance(model, JetFormer) and model.num_vocab_repeats != 1:
        raise ValueError("texts cannot be sampled with num_vocab_repeats above 1: they are class labels")
    if not (temperature > 0 and (top_k is None or top_k >= 1) and 0 < top_p <= 1):
        raise ValueError(
            f"temperature {temperature}, top_k {top_k}, top_p {top_p}: expected a positive temperature, top_k of at "
            "least 1, top_p in (0, 1]"
        )
    batch_size, device = len(keys), keys.device
    number = torch.zeros(1, dtype=torch.int32, device=device)
    # A buffer of fixed size, so that XLA compiles one graph whenever texts end.
    tokens = torch.full((batch_size, max_length), eos_id, device=device)
    own_lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
    ended = torch.zeros(batch_size, dtype=torch.bool, device=device)
    log_likelihood = torch.zeros(batch_size, device=device)
    lengths = torch.full_like(own_lengths, max_length) if lengths is None else lengths

    def pick(hidden: Tensor) -> Tensor:
        log_probs = model.text_logits(hidden).float()[:, :vocab_size].log_softmax(-1)
        gumbel = guidance_lib.gumbel(prng.fold_in(keys, number), vocab_size)
        token = (keep_top(log_probs / temperature, top_k, top_p) + gumbel).argmax(-1)
        token = token.masked_fill(ended, eos_id)
        own = log_probs.gather(1, token[:, None].clamp(max=vocab_size - 1)).squeeze(1)
        log_likelihood.add_(own.masked_fill(ended, 0.0))
        own_lengths.add_(~ended)
        tokens.index_copy_(1, number.long(), token[:, None])
        ended.logical_or_((token == eos_id) | (own_lengths >= lengths))
        return token

    def prefill() -> tuple[CachedDecoder, Tensor]:
        if isinstance(model, JetFormer):
            no_text = torch.empty(batch_size, 0, dtype=torch.int64, device=device)
            prefix = model.embed(no_text, image_tokens, text_first=False, shift=False)
        else:
            prefix = model.embed(text, text_mask, shift=False)
        decoder = CachedDecoder(model, prefix, modality="text", num_steps=max_length - 1)
        return decoder, pick(decoder.prefill())

    def step(token: Tensor) -> Tensor:
        number.add_(1)
        return pick(decoder.step(token))

    def all_ended() -> bool:
        # `cpu` first: XLA counts `item` on a device tensor as a fallback.
        return compile(lambda: ended.all())().cpu().item()

    decoder, token = compile(prefill)()
    on_token()
    step = compile(step)
    for done in range(1, max_length):
        if done % _CHECK_EVERY == 0 and all_ended():
            break
        token = step(token)
        on_token()
    return compile(lambda: (tokens, own_lengths, log_likelihood))()


@torch.no_grad()
def score_texts(
    model: JetFormer,
    image_tokens: Tensor,
    texts: Tensor,
    counts: Tensor,
    *,
    compile: Compile = lambda function: function,
) -> Tensor:
    """Scores each of C texts given each of B images. The images run once, then each text.

    Args:
      model: in evaluation mode.
      image_tokens: `[B, L, D]`, see `encode_images`.
      texts: token ids `[C, T]`.
      counts: bool `[C, T]`, tokens to score.
      compile: compiles the stages (images, one text), see `Loop.compile`.

    Returns:
      Log-likelihoods `[B, C]` in nats.

    Raises:
      ValueError: for texts of several tokens and a model with num_vocab_repeats above 1.
    """
    length = texts.shape[1]
    if model.num_vocab_repeats != 1 and length > 1:
        raise ValueError(
            f"texts of {length} tokens: expected class labels, of one token, with num_vocab_repeats above 1"
        )
    batch_size, device = len(image_tokens), image_tokens.device

    def prefill() -> tuple[CachedDecoder, Tensor]:
        no_text = torch.empty(batch_size, 0, dtype=torch.int64, device=device)
        prefix = model.embed(no_text, image_tokens, text_first=False, shift=False)
        decoder = CachedDecoder(model, prefix, modality="text", num_steps=length - 1)
        return decoder, decoder.prefill()

    def score(text: Tensor, counted: Tensor) -> Tensor:
        ids = text.expand(batch_size, -1)
        hidden = torch.cat((first[:, None], decoder.look_ahead(ids[:, :-1])), dim=1)
        log_probs = model.text_logits(hidden).float().log_softmax(-1)
        return (log_probs.gather(2, ids[..., None].long()).squeeze(2) * counted).sum(1)

    decoder, first = compile(prefill)()
    if length == 1:  # one distribution scores all texts
        log_probs = lambda: model.text_logits(first[:, None]).float().log_softmax(-1)[:, 0, texts[:, 0].long()]
        return compile(lambda: log_probs() * counts[:, 0])()
    score = compile(score)
    scores = [score(text, counted) for text, counted in zip(texts, counts, strict=True)]
    return compile(lambda: torch.stack(scores, dim=1))()


def keep_top(logits: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """Sets logits `[..., V]` to -inf except for the `top_k` largest, and except for the smallest set of largest ones
    with at least probability `top_p`."""
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        before = probs.cumsum(-1) - probs  # probability of all more probable tokens
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(dropped, -math.inf)
    return logits


def to_uint8(image: Tensor) -> Tensor:
    """Maps values in [-1, 1] to the pixels uint8 whose dequantization intervals contain them; values outside are
    clipped."""
    return ((image + 1) * 127.5).floor().clamp(0, 255).to(torch.uint8)

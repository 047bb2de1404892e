"""Decoding with a key/value cache, of images and of text. The cache lives here, not in the model.

Shapes never change from one decoded token to the next, where a token goes is a tensor, and what a step keeps it changes
in place: to a compiler all steps are one and the same graph. Dimensions: B batch, T text tokens, L image tokens, D
token dimension, F factored-out dimensions, E width, S tokens in all, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from jetformer import objectives, prng
from jetformer.models.decoder import KVCache
from jetformer.models.jetformer import JetFormer
from jetformer.models.language_model import LanguageModel
from jetformer.sampling import guidance as guidance_lib
from jetformer.sampling.guidance import Draft, Guidance

Compile = Callable[[Callable], Callable]

# What a sample's key is folded with, beside the numbers of its tokens.
_FACTORED, _DEQUANT = -1, -2
# Every so many text tokens decoding looks whether all texts have ended.
_LOOK_EVERY = 8


def right_align(x: Tensor, valid: Tensor) -> Tensor:
    """Moves each row's valid tokens to the right end, in order: `x` `[B, S, ...]`, `valid` bool `[B, S]`."""
    order = valid.int().argsort(dim=1, stable=True)
    return x.gather(1, order.view(*order.shape, *[1] * (x.ndim - 2)).expand_as(x))


class CachedDecoder:
    """Runs the model on what comes first, then on one token at a time.

    Prompts of different lengths are right-aligned, so that all write their next token to the same place of the cache;
    what pads them on the left is masked out. (big_vision: `prefill_cache`, `extend_cache`.)

    Args:
      model: the model, in evaluation mode.
      prefix: what its `embed` returns, with shift=False.
      modality: what is decoded, "image" or "text".
      num_steps: how often `step` will be called.
      start: which token of the image the first call of `step` is given.
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
        # A valid token is one that itself is attended to.
        valid = mask.diagonal(dim1=1, dim2=2)
        self._prefix = right_align(x, valid)
        rows = right_align(mask, valid)
        mask = right_align(rows.transpose(1, 2), valid).transpose(1, 2)
        self._positions = right_align(positions, valid)
        valid = right_align(valid, valid)
        # Rows of padding see themselves: attention over nothing is not defined, and nothing sees them.
        mask = mask | torch.eye(length, dtype=torch.bool, device=mask.device)
        self._mask = torch.cat((mask, mask.new_zeros(batch_size, length, num_steps)), dim=2)
        self._next_position = valid.sum(1)
        self._valid = torch.cat((valid, valid.new_ones(batch_size, num_steps)), dim=1)
        decoder = model.decoder
        shape = (batch_size, decoder.num_kv_heads, length + num_steps, decoder.head_dim)
        self._next_slot = self._slots[length : length + 1].clone()
        self._layers = [tuple(self._prefix.new_zeros(shape) for _ in range(2)) for _ in decoder.blocks]

    def _run(self, x: Tensor, mask: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        caches = [KVCache(k, v, slots) for k, v in self._layers]
        return self._norm(self.model.run_decoder(x, mask=mask, positions=positions, caches=caches))

    def prefill(self) -> Tensor:
        """Runs the prefix; the hidden state `[B, E]` that predicts the first token."""
        return self._run(self._prefix, self._mask, self._positions, self._slots[: self._prefix.shape[1]])[:, -1]

    def step(self, token: Tensor) -> Tensor:
        """Appends an image token `[B, D]`, or the id `[B]` of a text token; the hidden state `[B, E]` that predicts the
        next."""
        mask = (self._valid & (self._slots <= self._next_slot))[:, None]
        # As the prefix's: autocast would carry one token in bfloat16 through all layers.
        x = self._embed(token[:, None], self._next_slot).to(self._prefix.dtype)
        hidden = self._run(x, mask, self._next_position[:, None], self._next_slot)[:, -1]
        self._next_position.add_(1)
        self._next_slot.add_(1)
        return hidden

    def look_ahead(self, tokens: Tensor) -> Tensor:
        """Runs tokens `[B, N, D]` or ids `[B, N]` that are not kept: the next call goes on where this one began.

        Returns:
          The hidden states `[B, N, E]` that predict what comes after each of them.
        """
        ahead = torch.arange(tokens.shape[1], device=tokens.device)
        slots = self._next_slot + ahead
        mask = self._valid[:, None] & (self._slots <= slots[:, None])
        x = self._embed(tokens, slots).to(self._prefix.dtype)
        return self._run(x, mask, self._next_position[:, None] + ahead, slots)


class Latents(NamedTuple):
    """An image as the model knows it.

    tokens: `[B, L, D]`.
    factored: `[B, L, F]`, the dimensions that were factored out.
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
    guidance: Guidance = Guidance(),  # noqa: B008 (frozen)
    temperature_scales: float = 1.0,
    temperature_probs: float = 1.0,
    compile: Compile = lambda function: function,
    on_token: Callable[[], None] = lambda: None,
) -> Latents:
    """Samples images as latents, token by token; arguments and errors as in `sample_images`."""
    if not (temperature_scales > 0 and temperature_probs > 0):
        raise ValueError(f"temperatures {temperature_scales} and {temperature_probs}: give positive ones")
    guidance.check(model.image_head)
    batch_size, total = len(text), model.num_image_tokens
    device, dtype = text.device, model.image_emb.weight.dtype
    if given is None:
        sizes = (model.out_dim, model.factored_dim)
        given = Latents(*(torch.empty(batch_size, 0, n, device=device, dtype=dtype) for n in sizes))
    start = given.tokens.shape[1]
    weights = guidance.weights(total).to(device)
    drop = None
    # Both halves of guidance are one batch: those given the text, then those without it.
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
        )

    def draw() -> tuple[guidance_lib.Noise, Tensor]:
        factored = prng.normal(prng.fold_in(keys, _FACTORED), (total, model.factored_dim)).to(dtype)
        return guidance_lib.draw(model.image_head, keys, total, model.out_dim), factored

    def prefill() -> tuple[CachedDecoder, Draft]:
        prefix = model.embed(
            twice(text),
            twice(given.tokens),
            text_first=True,
            text_mask=None if text_mask is None else twice(text_mask),
            drop_prefix=drop,
            shift=False,
        )
        # The last token is not fed back.
        decoder = CachedDecoder(model, prefix, modality="image", num_steps=total - start - 1, start=start)
        return decoder, pick(decoder.prefill())

    def step(token: Tensor) -> Draft:
        number.add_(1)
        return pick(decoder.step(twice(token)))

    noise, factored = compile(draw)()
    decoder, draft = compile(prefill)()
    tokens = [guidance_lib.settle(draft)]
    on_token()
    step = compile(step)
    while start + len(tokens) < total:
        tokens.append(guidance_lib.settle(step(tokens[-1])))
        on_token()

    def finish() -> Latents:
        sampled = Latents(torch.stack(tokens, dim=1).to(dtype), factored[:, start:])
        return Latents(*(torch.cat(pair, dim=1) for pair in zip(given, sampled, strict=True)))

    return compile(finish)()


@torch.no_grad()
def decode_latents(
    model: JetFormer, text: Tensor, latents: Latents, text_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Latents to images, and how likely they are.

    Returns:
      uint8 `[B, H, W, C]`, and log-likelihoods `[B]` in nats under the model given the texts: without guidance and at
      temperature 1, however the latents were sampled; of pixel values in [0, 256), before they are cut to 8 bits.
      Divided by -H · W · C · ln 2 they are the objective's bits per dim.
    """
    image, logdet = model.decode_image(*latents)
    return to_uint8(image), _log_likelihood(model, text, latents, -logdet, text_mask)


def _log_likelihood(
    model: JetFormer, text: Tensor, latents: Latents, logdet: Tensor, text_mask: Tensor | None
) -> Tensor:
    """`[B]` in nats, of pixel values in [0, 256); `logdet` is of the image's encoding."""
    _, hidden = model(text, latents.tokens, text_first=True, text_mask=text_mask)
    nll = model.image_head(hidden, latents.tokens, torch.ones_like(latents.tokens[..., 0])).nll
    nll = nll.sum(1) + objectives.standard_normal_nll(latents.factored)
    return logdet - nll - math.prod(model.image_shape) * math.log(127.5)


@torch.no_grad()
def encode_images(model: JetFormer, images: Tensor, keys: Tensor) -> Latents:
    """Images uint8 `[B, H, W, C]` to latents; their dequantization noise comes from `keys` int32 `[B, 2]`."""
    latents, _ = _encode(model, images, keys)
    return latents


def _encode(model: JetFormer, images: Tensor, keys: Tensor) -> tuple[Latents, Tensor]:
    """Latents and log-determinants `[B]` in nats."""
    noise = prng.uniform(prng.fold_in(keys, _DEQUANT), images.shape[1:])
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
    compile: Compile = lambda function: function,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Samples images given texts (or class labels), token by token.

    A sample depends on its text and its key alone, not on the batch that it is in.

    Args:
      model: the model, in evaluation mode.
      text: `[B, T]`, token ids.
      keys: int32 `[B, 2]`, see `jetformer.prng`.
      text_mask: bool `[B, T]`, which are valid; None: all.
      given: the first tokens of the images, which are then not sampled; None: none.
      guidance: see `Guidance`.
      temperature_scales: multiplies the standard deviations of the tokens' mixtures.
      temperature_probs: multiplies the log-weights of the tokens' mixtures.
      compile: what the stages (noise, prefix, one token, flow) are compiled with.
      on_token: called after each token of the batch.

    Returns:
      See `decode_latents`.

    Raises:
      ValueError: if the model cannot be guided like this, or a temperature is not positive.
    """
    latents = sample_latents(model, text, keys, text_mask=text_mask, compile=compile, **kwargs)
    return compile(lambda: decode_latents(model, text, latents, text_mask))()


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
    """Keeps the first rows of images, and samples the rest.

    The flow looks at a whole image, so what is missing has to be something before the given rows have tokens: it is
    filled with the last given row. Their tokens are those of that image, which makes this an approximation.

    Args:
      images: uint8 `[B, H, W, C]`, of which what comes after `rows` rows is not looked at.
      rows: how many rows of pixels are given; a multiple of the patch size, see `rows_per_token`.
      model, text, keys, text_mask, compile, kwargs: as in `sample_images`.

    Returns:
      uint8 `[B, H, W, C]`, the given rows as they are, and log-likelihoods `[B]` of these images, see `decode_latents`.

    Raises:
      ValueError: as `sample_images`; for other rows.
    """
    size, height = rows_per_token(model), images.shape[1]
    if not 0 < rows < height or rows % size:
        raise ValueError(f"{rows} rows: give a multiple of the patch size, {size}, between 0 and {height}")

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


def rows_per_token(model: JetFormer) -> int:
    """How many rows of pixels a row of image tokens is.

    Raises:
      ValueError: if tokens are not rows of pixels.
    """
    if getattr(model.patches, "depth_to_seq", 1) > 1:
        raise ValueError("depth_to_seq cuts patches into several tokens, and the first tokens are no rows of pixels")
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
) -> tuple[Tensor, Tensor]:
    """Samples texts token by token, given images by a `JetFormer`, or given how they begin by a `LanguageModel`.

    Args:
      model: the model, in evaluation mode.
      keys: int32 `[B, 2]`, see `jetformer.prng`.
      image_tokens: `[B, L, D]`, of a JetFormer; see `encode_images`.
      text: `[B, T]`, how the texts begin, of a LanguageModel; T may be 0.
      text_mask: bool `[B, T]`, which of `text` are valid; None: all.
      max_length: how many tokens a text has at most, its end included.
      lengths: `[B]`, how many each has at most, up to max_length; None: max_length.
      vocab_size: V; the model's special tokens come after these, and are never part of a text.
      eos_id: the token that ends a text.
      temperature: divides the logits.
      top_k: choose among the k most probable tokens; 1 is the most probable text token by token. None: among all.
      top_p: choose among the most probable tokens that together have at least this probability.
      compile: what the stages (prefix, one token) are compiled with.
      on_token: called after each token of the batch.

    Returns:
      Token ids `[B, max_length]`, all `eos_id` from a text's end on; how many of them are the text's own, its end
      included, `[B]`; and log-likelihoods `[B]` in nats of these, at temperature 1.

    Raises:
      ValueError: for a model of class labels, or options out of range.
    """
    if isinstance(model, JetFormer) and model.num_vocab_repeats != 1:
        raise ValueError("the model repeats its vocabulary: its texts are class labels, which are not sampled")
    if not (temperature > 0 and (top_k is None or top_k >= 1) and 0 < top_p <= 1):
        raise ValueError(
            f"temperature {temperature}, top_k {top_k}, top_p {top_p}: give a positive temperature, a top_k of 1 or "
            "more, a top_p in (0, 1]"
        )
    batch_size, device = len(keys), keys.device
    number = torch.zeros(1, dtype=torch.int32, device=device)
    # One buffer of a fixed size, whenever texts end: to XLA their end is one graph, too.
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
        # Brought over first: a look from the host at a tensor of XLA's counts as a fall-back.
        return compile(lambda: ended.all())().cpu().item()

    decoder, token = compile(prefill)()
    on_token()
    step = compile(step)
    for done in range(1, max_length):
        if done % _LOOK_EVERY == 0 and all_ended():
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
    """How likely each of C texts is, given each of B images. The images are run once, then each text.

    Args:
      model: the model, in evaluation mode.
      image_tokens: `[B, L, D]`, see `encode_images`.
      texts: token ids `[C, T]`.
      counts: bool `[C, T]`, which of them count.
      compile: what the stages (images, one text) are compiled with.

    Returns:
      Log-likelihoods `[B, C]` in nats of the tokens that count.

    Raises:
      ValueError: for texts of several tokens of a model that repeats its vocabulary.
    """
    length = texts.shape[1]
    if model.num_vocab_repeats != 1 and length > 1:
        raise ValueError("the model repeats its vocabulary: its texts are class labels of one token")
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
    if length == 1:  # one distribution scores all
        log_probs = lambda: model.text_logits(first[:, None]).float().log_softmax(-1)[:, 0, texts[:, 0].long()]
        return compile(lambda: log_probs() * counts[:, 0])()
    score = compile(score)
    scores = [score(text, counted) for text, counted in zip(texts, counts, strict=True)]
    return compile(lambda: torch.stack(scores, dim=1))()


def keep_top(logits: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """Sets logits `[..., V]` to -inf, of all but the k largest, and of all but the largest that together have at least
    probability top_p; the largest stays."""
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        before = probs.cumsum(-1) - probs  # of what is more probable
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(dropped, -math.inf)
    return logits


def to_uint8(image: Tensor) -> Tensor:
    """Values in [-1, 1] to 8 bits: the pixel whose dequantization interval a value lies in, the nearest for those
    beyond."""
    return ((image + 1) * 127.5).floor().clamp(0, 255).to(torch.uint8)

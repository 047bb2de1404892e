"""JetFormer: one decoder over text tokens and the soft tokens of a normalizing flow (arXiv 2411.19722).

A sequence is `[bos, text, boi, image]` or `[boi, image, bos, text]`; without begin-of-image token `[bos, text, image]`
or `[bos, image, text]`. The first modality is the prefix. The last token is dropped; position i predicts token i + 1.
Numerics are those of big_vision `models/proj/jetformer/jetformer.py`.

Dimensions: B batch, H × W × C image, T text tokens, L image tokens, D dimensions of an image token that the decoder
models, F dimensions factored out as Gaussian noise, S tokens of a sequence, E width, V vocabulary, R vocabulary
repeats, K mixtures.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jetformer.models import initializers
from jetformer.models.decoder import Decoder, RMSNorm
from jetformer.models.mixture import MixtureHead, MultivariateHead
from jetformer.models.patches import ImageShape
from jetformer.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

# The examples that have the text first: a bool tensor [B], or one bool for all, which builds one order only.
TextFirst = Tensor | bool


class Encoded(NamedTuple):
    """An image as soft tokens.

    tokens: `[B, L, D]`.
    factored: `[B, L, F]`, the factored-out dimensions.
    logdet: `[B]`, log-determinants of the map from image to latents, in nats.
    flow_logdet: `[B]`, the flow's part of them.
    """

    tokens: Tensor
    factored: Tensor
    logdet: Tensor
    flow_logdet: Tensor


class JetFormer(nn.Module):
    """The model: patches, flow, embeddings, decoder, heads.

    Args:
      image_shape: (H, W, C) of the images.
      patches: `Patchify` or `PatchPCA`, called with `image_shape`.
      decoder: `Decoder`, called without arguments.
      vocab_size: V, number of text tokens, including those below.
      bos_id: token that begins a text.
      boi_id: token that begins an image; None omits it.
      nolabel_id: token that replaces a dropped prefix.
      flow: a flow such as `Jet`, called with (rows, columns, patch dimension): its image is the grid
        of patches. None for none.
      before_flow, after_flow: flows that the patches go through first and last, such as `LearnedProjection` and
        `PCAProjection`, called likewise; None for none.
      out_dim: D. The other dimensions of the patches are factored out as standard Gaussian noise. None models all.
      factored_prior: `FactoredPrior`, called with D and F, to model them in the place of a standard Gaussian.
      num_mixtures: K, components of the image head.
      multivariate: use one Gaussian with full covariance instead; requires K = 1.
      scale_tol: smallest scale of the image head.
      head_dtype: dtype of the image head's projection, "float32" or "bfloat16".
      head_block: tokens whose logits the image head holds at a time in training, on each device; None chooses by the
        device, see `mixture_nll.default_block`.
      mean_init_std: standard deviation of the normal noise that the biases of the mixture's means start with, in units
        of the image tokens. At 0, as in the reference, the components stay equal up to rounding, as one Gaussian.
      scale_init: standard deviation that the mixture's components start with, in the same units.
      kmeans_init: start the components at clusters of the first batch's tokens, see `MixtureHead.start_at_clusters`;
        `scale_init` is then in units of the clusters' standard deviations.
      image_posemb: add learned position embeddings to image tokens: rotary positions shift with the length of a
        preceding text. The reference has none.
      num_vocab_repeats: R, number of times that the text is embedded, each time by another embedding (for class labels,
        which are texts of one token).
      causal_mask_on_prefix: if false, every token attends to the whole prefix.
      untie_output_vocab: give the text logits a matrix of their own instead of the text embedding.
      per_modality_final_norm: use one final norm for text and another for images.

    Raises:
      ValueError: if sizes do not fit.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        patches: Callable[[ImageShape], nn.Module],
        decoder: Callable[[], Decoder],
        vocab_size: PositiveInt,
        bos_id: NonNegativeInt,
        boi_id: NonNegativeInt | None,
        nolabel_id: NonNegativeInt,
        flow: Callable[[ImageShape], nn.Module] | None = None,
        before_flow: Callable[[ImageShape], nn.Module] | None = None,
        after_flow: Callable[[ImageShape], nn.Module] | None = None,
        out_dim: PositiveInt | None = None,
        factored_prior: Callable[[int, int], nn.Module] | None = None,
        num_mixtures: PositiveInt = 4,
        multivariate: bool = False,
        scale_tol: PositiveFloat = 1e-6,
        head_dtype: str = "float32",
        head_block: PositiveInt | None = None,
        mean_init_std: NonNegativeFloat = 0.0,
        scale_init: PositiveFloat = 1.0,
        kmeans_init: bool = False,
        image_posemb: bool = False,
        num_vocab_repeats: PositiveInt = 1,
        causal_mask_on_prefix: bool = True,
        untie_output_vocab: bool = False,
        per_modality_final_norm: bool = False,
    ):
        super().__init__()
        for name, token in (("bos_id", bos_id), ("boi_id", boi_id), ("nolabel_id", nolabel_id)):
            if token is not None and not 0 <= token < vocab_size:
                raise ValueError(f"{name} {token} is outside the vocabulary of {vocab_size} tokens")
        if untie_output_vocab and num_vocab_repeats != 1:
            raise ValueError("untie_output_vocab needs num_vocab_repeats = 1")
        for name, value, default in (
            ("mean_init_std", mean_init_std, 0.0),
            ("scale_init", scale_init, 1.0),
            ("kmeans_init", kmeans_init, False),
        ):
            if multivariate and value != default:
                raise ValueError(f"{name} = {value} does not apply to a multivariate head: leave it at {default}")
        if multivariate and num_mixtures != 1:
            raise ValueError(f"a multivariate head has one component: set num_mixtures to 1, not {num_mixtures}")
        self.image_shape = tuple(image_shape)
        self.vocab_size, self.num_vocab_repeats = vocab_size, num_vocab_repeats
        self.bos_id, self.boi_id, self.nolabel_id = bos_id, boi_id, nolabel_id
        self.causal_mask_on_prefix = causal_mask_on_prefix

        self.patches = patches(image_shape)
        self.num_image_tokens = self.patches.num_tokens
        self.out_dim = out_dim or self.patches.dim
        self.factored_dim = self.patches.dim - self.out_dim
        if self.factored_dim < 0:
            raise ValueError(f"out_dim {out_dim} exceeds the {self.patches.dim} dimensions of a patch")
        if factored_prior and not self.factored_dim:
            raise ValueError(
                f"factored_prior needs factored-out dimensions: set out_dim below {self.patches.dim}, those of a patch"
            )
        self.factored_prior = factored_prior(self.out_dim, self.factored_dim) if factored_prior else None
        token_shape = (*self.patches.grid, self.patches.dim)
        self.flow = flow(token_shape) if flow else None
        self.before_flow = before_flow(token_shape) if before_flow else None
        self.after_flow = after_flow(token_shape) if after_flow else None

        self.decoder = decoder()
        width = self.decoder.width
        self.text_emb = initializers.embedding(vocab_size * num_vocab_repeats, width)
        self.image_emb = nn.Linear(self.out_dim, width)
        self.image_posemb = nn.Parameter(torch.empty(self.num_image_tokens, width)) if image_posemb else None
        if multivariate:
            self.image_head = MultivariateHead(width, self.out_dim, scale_tol, head_dtype)
        else:
            self.image_head = MixtureHead(
                *(width, self.out_dim, num_mixtures, scale_tol, head_dtype, head_block),
                *(mean_init_std, scale_init, kmeans_init),
            )
        self.text_head = nn.Linear(width, vocab_size) if untie_output_vocab else None
        self.final_norm = None if per_modality_final_norm else RMSNorm(width)
        self.text_norm = RMSNorm(width) if per_modality_final_norm else nn.Identity()
        self.image_norm = RMSNorm(width) if per_modality_final_norm else nn.Identity()
        initializers.init_on_cpu(self)

    def init_weights(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.text_emb.weight, std=1.0, generator=generator)
        initializers.lecun_normal_(self.image_emb.weight, generator)
        nn.init.zeros_(self.image_emb.bias)
        if self.image_posemb is not None:
            nn.init.normal_(self.image_posemb, std=1 / math.sqrt(self.decoder.width), generator=generator)
        if self.text_head is not None:
            nn.init.normal_(self.text_head.weight, std=1.0, generator=generator)
            nn.init.zeros_(self.text_head.bias)

    # Images and soft tokens.

    def encode_image(self, image: Tensor) -> Encoded:
        """Encodes images as soft tokens.

        Args:
          image: `[B, H, W, C]`, values in [-1, 1].

        Raises:
          ValueError: if the images do not have the model's shape.
        """
        if image.shape[1:] != self.image_shape:
            raise ValueError(
                f"images have shape {tuple(image.shape[1:])}, the model is built for {self.image_shape}: resize them "
                "in the preprocessing, or change JetFormer.image_shape"
            )
        tokens, logdet = self.patches(image)
        flow_logdet = torch.zeros_like(logdet)
        for step in self._flows():
            latents, step_logdet = step(tokens.unflatten(1, self.patches.grid))
            tokens, logdet = latents.flatten(1, 2), logdet + step_logdet
            if step is self.flow:
                flow_logdet = step_logdet
        tokens, factored = tokens.split((self.out_dim, self.factored_dim), dim=-1)
        return Encoded(tokens, factored, logdet, flow_logdet)

    def decode_image(self, tokens: Tensor, factored: Tensor) -> tuple[Tensor, Tensor]:
        """Inverts `encode_image`.

        Args:
          tokens: `[B, L, D]`.
          factored: `[B, L, F]`.

        Returns:
          Images `[B, H, W, C]`, which may exceed [-1, 1], and log-determinants `[B]` in nats.
        """
        latents = torch.cat((tokens, factored), dim=-1)
        logdet = 0.0
        for step in reversed(self._flows()):
            latents, step_logdet = step.inverse(latents.unflatten(1, self.patches.grid))
            latents, logdet = latents.flatten(1, 2), logdet + step_logdet
        image, patches_logdet = self.patches.inverse(latents)
        return image, logdet + patches_logdet

    def _flows(self) -> list[nn.Module]:
        """Returns the flows that the patches go through, in order."""
        return [step for step in (self.before_flow, self.flow, self.after_flow) if step is not None]

    # Sequences.

    def _embed_ids(self, ids: Tensor) -> Tensor:
        """Embeds ids R times in sequence, `[B, T]` to `[B, R · T, E]`."""
        offsets = torch.arange(self.num_vocab_repeats, device=ids.device) * self.vocab_size
        return self.text_emb((ids[:, None] + offsets[:, None]).flatten(1))

    def embed_image_tokens(self, tokens: Tensor, indices: Tensor) -> Tensor:
        """Embeds image tokens.

        Args:
          tokens: `[B, N, D]`.
          indices: int64 `[N]`, their places in the image, 0 to L - 1.

        Returns:
          `[B, N, E]`.
        """
        x = self.image_emb(tokens)
        return x if self.image_posemb is None else x + self.image_posemb.index_select(0, indices)

    def first_special(self, text_length: int) -> int:
        """Returns the lowest special token; the tokens below it are classes, or a tokenizer's.

        Args:
          text_length: T. With T > 1 `boi_id` may be the tokenizer's end of text, and does not count.
        """
        special = [self.bos_id, self.nolabel_id]
        if text_length == 1 and self.boi_id is not None:
            special.append(self.boi_id)
        return min(special)

    def embed(
        self,
        text: Tensor,
        image_tokens: Tensor,
        *,
        text_first: TextFirst,
        text_mask: Tensor | None = None,
        drop_prefix: Tensor | None = None,
        shift: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Embeds both modalities as one sequence.

        Args:
          text: `[B, T]`, token ids.
          image_tokens: `[B, L, D]`; L may be 0.
          text_first: the examples that have the text first.
          text_mask: bool `[B, T]`, true for valid tokens; None if all are.
          drop_prefix: bool `[B]`, the examples whose text `nolabel_id` replaces, if the text comes first.
          shift: drop the last token, whose prediction has no target.

        Returns:
          Embeddings `[B, S, E]`; the attention mask, bool `[B, S, S]`, or None for plain causal attention; positions
          `[B, S]`, which count valid tokens only.
        """
        batch_size, valid = len(text), None
        indices = torch.arange(image_tokens.shape[1], device=image_tokens.device)
        x_text, x_image = self._embed_ids(text), self.embed_image_tokens(image_tokens, indices)
        if text_mask is not None:
            text_mask = text_mask.repeat(1, self.num_vocab_repeats)
        if drop_prefix is not None:
            dropped = (drop_prefix & text_first)[:, None]
            nolabel = self._embed_ids(text.new_full((1, text.shape[1]), self.nolabel_id))
            x_text = torch.where(dropped[..., None], nolabel, x_text)
            if text_mask is not None:  # a dropped text always has full length
                text_mask = text_mask | dropped

        bos, boi = (
            None if token is None else self.text_emb.weight[token].expand(batch_size, 1, -1)
            for token in (self.bos_id, self.boi_id)
        )
        x = self._arrange(text_first, x_text, x_image, bos, boi)
        if text_mask is not None:
            one, image = text_mask.new_ones(batch_size, 1), text_mask.new_ones(x_image.shape[:2])
            valid = self._arrange(text_first, text_mask, image, one, None if boi is None else one)
        if shift:  # contiguous: to torch.compile the first block is then as the others
            x, valid = x[:, :-1].contiguous(), None if valid is None else valid[:, :-1]

        length = x.shape[1]
        index = torch.arange(length, device=x.device)
        if valid is None:
            positions = index.expand(batch_size, length)
            if self.causal_mask_on_prefix:
                return x, None, positions
            valid = torch.ones_like(positions, dtype=torch.bool)
        else:
            positions = valid.long().cumsum(1) - 1
        mask = (index[:, None] >= index).expand(batch_size, -1, -1)
        if not self.causal_mask_on_prefix:
            # One special token precedes the prefix.
            in_prefix = (index <= part.shape[1] for part in (x_text, x_image))
            mask = mask | self._select(text_first, *(part.expand(batch_size, length) for part in in_prefix))[:, None]
        return x, mask & valid[:, None], positions

    @classmethod
    def _arrange(cls, text_first: TextFirst, text: Tensor, image: Tensor, bos: Tensor, boi: Tensor | None) -> Tensor:
        """Concatenates the parts `[B, n, ...]` of the sequences in the order of each example."""
        order = (bos, text, image) if boi is None else (bos, text, boi, image)
        other = (bos, image, text) if boi is None else (boi, image, bos, text)
        if isinstance(text_first, bool):
            return torch.cat(order if text_first else other, dim=1)
        return cls._select(text_first, torch.cat(order, dim=1), torch.cat(other, dim=1))

    @staticmethod
    def _select(text_first: TextFirst, if_text: Tensor, if_image: Tensor) -> Tensor:
        """Selects for each example the tensor `[B, ...]` of its first modality."""
        if isinstance(text_first, bool):
            return if_text if text_first else if_image
        return torch.where(text_first.view(-1, *[1] * (if_text.ndim - 1)), if_text, if_image)

    def run_decoder(self, x: Tensor, **kwargs) -> Tensor:
        """Runs the decoder, and the final norm if both modalities share it; arguments as in `Decoder.forward`."""
        x = self.decoder(x, **kwargs)
        return x if self.final_norm is None else self.final_norm(x)

    def forward(
        self,
        text: Tensor,
        image_tokens: Tensor,
        *,
        text_first: TextFirst,
        text_mask: Tensor | None = None,
        drop_prefix: Tensor | None = None,
        dropout_keys: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the normalized hidden states that predict text and image tokens.

        Arguments are as in `embed` and `Decoder.forward`.

        Returns:
          `[B, T, E]` for `text_logits` and `[B, L, E]` for `image_head`.
        """
        x, mask, positions = self.embed(
            text,
            image_tokens,
            text_first=text_first,
            text_mask=text_mask,
            drop_prefix=drop_prefix,
        )
        x = self.run_decoder(x, mask=mask, positions=positions, dropout_keys=dropout_keys)
        text_length, image_length = text.shape[1], image_tokens.shape[1]
        # Position i predicts token i + 1: the first modality starts at 0, and boi shifts what follows it by one. Of R
        # embeddings of a text the first T positions predict it.
        boi = 0 if self.boi_id is None else 1
        text_start, image_start = image_length + boi, self.num_vocab_repeats * text_length + boi
        text_hidden = x[:, :text_length], x[:, text_start : text_start + text_length]
        image_hidden = x[:, image_start:], x[:, :image_length]
        return (
            self.text_norm(self._select(text_first, *text_hidden)),
            self.image_norm(self._select(text_first, *image_hidden)),
        )

    def text_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states `[..., E]` to logits over the vocabulary `[..., R · V]`."""
        if self.text_head is not None:
            return self.text_head(hidden)
        return F.linear(hidden, self.text_emb.weight)

"""The training objectives of JetFormer, of Jet and of text alone, and bits per dim.

An objective is a pure function of a model, a batch and its random draws. `draw` makes the draws, those of an example
from the example's key (`jetformer.prng`), so that any step can be replayed and a batch can be cut up and shared anyhow;
a test feeds its own draws.

Image likelihoods are in bits per dim of 8-bit RGB: pixels x in 0..255 are dequantized to x + u with u uniform in [0,
1) and scaled to [-1, 1], and the volume changes of dequantization, scaling and flow are in the figure. Text is in bits
per token; the loss has it in nats, as in the reference (big_vision `trainers/proj/jetformer/train.py`).
Dimensions: B batch, H × W × C image, T text tokens, L image tokens, D token dimension.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jetformer import prng
from jetformer.models.jetformer import Encoded, JetFormer
from jetformer.models.labelled import LabelledFlow
from jetformer.models.language_model import LanguageModel
from jetformer.ranges import NonNegativeFloat, Probability

Batch = dict[str, Tensor]
Draws = dict[str, Tensor]
# What is measured, by name: values [B, ...], and which of them count, bool [B, ...]. Of each example's responsibilities
# [B, K] all K count, or none; they alone are vectors, and `mixture.count_components` makes figures of them.
Terms = dict[str, tuple[Tensor, Tensor]]
# The same summed: sum, a vector or 0-dimensional, and count, 0-dimensional. Sums of parts add up to the sum of the
# whole.
Sums = dict[str, tuple[Tensor, Tensor]]

_LN2 = math.log(2)
_LOG_2PI = math.log(2 * math.pi)

# What an example's key is folded with for each of its draws.
_TEXT_FIRST, _DEQUANT, _RGB_NOISE, _DROP_PREFIX, _INPUT_NOISE_STD, _INPUT_NOISE, _DROPOUT = range(7)


def check_has(batch: Batch, *keys: str) -> None:
    """Looks for what an objective reads.

    Raises:
      ValueError: if the batch lacks one of the keys.
    """
    for key in keys:
        if key not in batch:
            raise ValueError(
                f"the batch has no {key!r}: the preprocessing must make it (label_as_text makes a text of a label, "
                "caption one of a text)"
            )


def labels_of(batch: dict[str, Any], argument: str = "Data.pp") -> Any:
    """The class labels `[B]` of a batch of tensors or arrays: its `label`, or its texts of one token.

    Raises:
      ValueError: if it has neither; `argument` is the preprocessing that a user may change.
    """
    if "label" in batch:
        return batch["label"]
    if "text" in batch and batch["text"].shape[1] == 1:
        return batch["text"][:, 0]
    raise ValueError(
        "the examples have no label: give a preprocessing string that keeps it, as "
        f"{argument} = \"decode | keep('image', 'label')\", or makes a text of it with label_as_text"
    )


def batch_size(batch: Batch) -> int:
    """B."""
    return len(next(iter(batch.values())))


def standard_normal_nll(x: Tensor) -> Tensor:
    """Negative log-density `[B]` in nats of `x` `[B, ...]` under a standard normal."""
    return 0.5 * (x.square() + _LOG_2PI).flatten(1).sum(1)


def to_unit_range(pixels: Tensor) -> Tensor:
    """Pixel values in [0, 255] to [-1, 1]."""
    return pixels / 127.5 - 1


def sum_terms(terms: Terms, mask: Tensor | None = None) -> Sums:
    """Sums each term over what counts, of the examples where `mask` (bool `[B]`) is true."""
    sums = {}
    for name, (value, counts) in terms.items():
        if mask is not None:
            counts = counts & mask.view(-1, *[1] * (counts.ndim - 1))
        # Not value · counts: what does not count may not be finite.
        kept = value.where(counts.view(*counts.shape, *[1] * (value.ndim - counts.ndim)), 0.0)
        sums[name] = (kept.flatten(0, counts.ndim - 1).sum(0), counts.sum())
    return sums


def split(tensors: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    """Cuts a batch (or its draws) `[B, ...]` into `parts`, which take its examples in turn: part i has the examples i,
    i + parts, … So each part lies on as many devices as the batch does."""
    return [{name: x.unflatten(0, (-1, parts))[:, i] for name, x in tensors.items()} for i in range(parts)]


def add_sums(a: Sums, b: Sums) -> Sums:
    """The sums of two parts to the sums of the whole."""
    return {name: (a[name][0] + b[name][0], a[name][1] + b[name][1]) for name in a}


def means(sums: Sums) -> dict[str, Tensor]:
    """The mean of each term; a term of which nothing counted is left at 0."""
    return {name: total / count.clamp(min=1) for name, (total, count) in sums.items()}


def expansion_used(flow: nn.Module | None, logdet: Tensor, counts: Tensor) -> Terms:
    """The term flow_expansion_used: the log-determinants `[B]` as a share of `flow.max_logdet`; none, where the flow
    has no such bound. N couplings of scale factor 2 can expand a dimension by 2^(N/2) on average; a share near 1 asks
    for more couplings, one below 0 is of a flow that contracts."""
    bound = getattr(flow, "max_logdet", None)
    return {} if bound is None else {"flow_expansion_used": (logdet / bound, counts)}


@dataclasses.dataclass(frozen=True)
class JetFormerObjective:
    """Negative log-likelihood of images and texts, each after the other (JetFormer, section 3).

    Attributes:
      text_prefix_prob: probability that the text comes first in an example.
      loss_on_prefix: score the first modality too, not only the second.
      text_loss_weight: factor of the text's loss.
      drop_labels_prob: probability that a text prefix is replaced by `nolabel_id` in training, for guidance.
      input_noise_std: largest standard deviation of the noise on image tokens in training, drawn for each example and
        used where the image comes second. The noisy tokens are also the target, as in the reference.
      rgb_noise_on_image_prefix: put the noise of the curriculum also on images that come first.
      stop_grad_image_prefix: no gradient from an image that comes first to the flow.
      dequantize: add the dequantization noise.
    """

    text_prefix_prob: Probability = 0.5
    loss_on_prefix: bool = True
    text_loss_weight: NonNegativeFloat = 1.0
    drop_labels_prob: Probability = 0.0
    input_noise_std: NonNegativeFloat = 0.0
    rgb_noise_on_image_prefix: bool = True
    stop_grad_image_prefix: bool = False
    dequantize: bool = True

    def check_guidance(self, mode: str) -> None:
        """Checks that the model learns the unconditional distribution that guidance needs.

        Args:
          mode: of `Guidance`; "none" needs nothing.

        Raises:
          ValueError: if it does not.
        """
        if mode != "none" and not self.drop_labels_prob:
            raise ValueError(
                f"guidance {mode} needs a model that was also trained without text, and this one was not: its "
                "JetFormerObjective.drop_labels_prob is 0. Sample without guidance, or train with 0.1"
            )

    def check_order(self, text_first: bool) -> None:
        """Checks that the model learns the modality that comes second: images after texts, or texts after images.

        Raises:
          ValueError: if it does not.
        """
        if self.text_prefix_prob == (0 if text_first else 1):
            first, second = ("texts", "images") if text_first else ("images", "texts")
            raise ValueError(
                f"the model does not learn {second} after {first}: its JetFormerObjective.text_prefix_prob is "
                f"{self.text_prefix_prob}"
            )

    def draw(self, model: JetFormer, batch: Batch, keys: Tensor, train: bool) -> Draws:
        """The random draws of one step.

        Args:
          model: the model, for the shape of its tokens.
          batch: see `__call__`.
          keys: int32 `[B, 2]`, one for each example; see `jetformer.prng`.
          train: also draw what only training uses.

        Returns:
          text_first: bool `[B]`, left out where text_prefix_prob is 0 or 1;
          dequant: `[B, H, W, C]`, uniform in [0, 1);
          in training also rgb_noise `[B, H, W, C]` (normal), drop_prefix bool `[B]`, input_noise_std `[B, 1, 1]`
          (uniform in [0, 1)), input_noise `[B, L, D]` (normal), dropout_keys int32 `[B, 2]`.
        """
        shape = batch["image"].shape[1:]
        uniform = lambda purpose, shape=(): prng.uniform(prng.fold_in(keys, purpose), shape)
        normal = lambda purpose, shape: prng.normal(prng.fold_in(keys, purpose), shape)
        draws = {}
        if 0 < self.text_prefix_prob < 1:
            draws["text_first"] = uniform(_TEXT_FIRST) < self.text_prefix_prob
        if self.dequantize:
            draws["dequant"] = uniform(_DEQUANT, shape)
        if train:
            draws["rgb_noise"] = normal(_RGB_NOISE, shape)
            if self.drop_labels_prob:
                draws["drop_prefix"] = uniform(_DROP_PREFIX) < self.drop_labels_prob
            if self.input_noise_std:
                draws["input_noise_std"] = uniform(_INPUT_NOISE_STD, (1, 1))
                draws["input_noise"] = normal(_INPUT_NOISE, (model.num_image_tokens, model.out_dim))
            if model.decoder.dropout:
                draws["dropout_keys"] = prng.fold_in(keys, _DROPOUT)
        return draws

    def normalizers(self, batch: Batch, draws: Draws, train: bool) -> dict[str, Tensor]:
        """How many examples the loss averages over, by modality.

        A part of what a step sees (gradient accumulation, one of several processes) is scored with the sum of all
        parts' normalizers, so that the parts' losses add up.
        """
        _, _, text_counts, image_counts = self._roles(batch, draws, train)
        if self.loss_on_prefix:
            return {"text": text_counts.sum(), "image": image_counts.sum()}
        size = torch.full_like(text_counts.sum(), len(text_counts))
        return {"text": size, "image": size}

    def _roles(self, batch: Batch, draws: Draws, train: bool):
        """Bool `[B]`: is the text first; is it dropped; does the text count; does the image."""
        image = batch["image"]
        if (text_first := draws.get("text_first")) is None:
            text_first = torch.full((len(image),), self.text_prefix_prob > 0.5, device=image.device)
        dropped = torch.zeros_like(text_first)
        if train and "drop_prefix" in draws:  # only text is dropped, and only where it comes first
            dropped = draws["drop_prefix"] & text_first
        if self.loss_on_prefix:
            return text_first, dropped, ~dropped, torch.ones_like(text_first)
        return text_first, dropped, ~text_first, text_first

    def encode(
        self, model: JetFormer, batch: Batch, draws: Draws, *, noise_scale: Tensor | float = 0.0, train: bool = True
    ) -> Encoded:
        """Encodes a batch's images, in training with the curriculum's noise; arguments as in `__call__`."""
        text_first, _, _, _ = self._roles(batch, draws, train)
        # RGB noise as if it had been added to the 8-bit image, then dequantization.
        dtype = model.image_emb.weight.dtype
        pixels = batch["image"].to(dtype)
        if train:
            noise = noise_scale * draws["rgb_noise"].to(dtype)
            if not self.rgb_noise_on_image_prefix:
                noise = noise * text_first.view(-1, 1, 1, 1)
            pixels = torch.round(pixels + noise)
        if self.dequantize:
            pixels = pixels + draws["dequant"]
        return model.encode_image(to_unit_range(pixels))

    def __call__(
        self,
        model: JetFormer,
        batch: Batch,
        draws: Draws,
        *,
        noise_scale: Tensor | float = 0.0,
        train: bool = True,
        normalizers: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Terms]:
        """Scores a batch.

        Args:
          model: the model.
          batch: image uint8 `[B, H, W, C]`, text int `[B, T]`, text_loss bool `[B, T]` (which text tokens count), and
            text_mask bool `[B, T]` (which are valid; absent: all).
          draws: see `draw`.
          noise_scale: standard deviation, in units of 8-bit pixel values, of the curriculum's noise at this step.
          train: whether to use the draws of training.
          normalizers: see `normalizers`; None: this batch's.

        Returns:
          The loss, and what it consists of by example: bits_per_dim = bits_per_dim_tokens - bits_per_dim_logdet, of
          the tokens bits_per_dim_factored for the dimensions that are factored out, if any are, and
          text_bits_per_token; with both orders of modalities also by whether a modality was prefix or suffix. Of a
          mixture also responsibilities and responsibility_entropy, see `mixture.TokenScores`, and of a bounded flow
          flow_expansion_used, its log-determinant as a share of the largest that it can have.

        Raises:
          ValueError: if the batch lacks something, or its images have another shape than the model's.
        """
        check_has(batch, "image", "text", "text_loss")
        text = batch["text"]
        text_first, dropped, text_counts, image_counts = self._roles(batch, draws, train)
        normalizers = normalizers or self.normalizers(batch, draws, train)
        normalizers = {name: count.clamp(min=1) for name, count in normalizers.items()}

        encoded = self.encode(model, batch, draws, noise_scale=noise_scale, train=train)
        tokens, factored, logdet, flow_logdet = encoded
        factored_nll = standard_normal_nll(factored)

        if train and self.input_noise_std:
            std = self.input_noise_std * draws["input_noise_std"] * text_first.view(-1, 1, 1)
            tokens = tokens + std * draws["input_noise"]
        if self.stop_grad_image_prefix:
            tokens = torch.where(text_first.view(-1, 1, 1), tokens, tokens.detach())

        text_hidden, image_hidden = model(
            text,
            tokens,
            # A bool where one order is certain saves the model building the other.
            text_first=text_first if "text_first" in draws else self.text_prefix_prob > 0.5,
            text_mask=batch.get("text_mask"),
            drop_prefix=dropped if train and "drop_prefix" in draws else None,
            dropout_keys=draws.get("dropout_keys") if train else None,
        )

        text_logits = model.text_logits(text_hidden).float()
        nll_text = F.cross_entropy(text_logits.transpose(1, 2), text.long(), reduction="none")
        in_loss = batch["text_loss"]
        nll_text = (nll_text * in_loss).sum(1) / in_loss.sum(1).clamp(min=1)

        # Everything of the image is in bits per dim from here on. The head returns its part of the loss with its
        # gradient, and its likelihoods without.
        bits = 1 / (math.prod(model.image_shape) * _LN2)
        image_weight = image_counts / normalizers["image"]
        token_weight = (image_weight * bits)[:, None].expand(-1, tokens.shape[1])
        scores = model.image_head(image_hidden, tokens, token_weight)
        bits_tokens = (scores.nll.sum(1) + factored_nll) * bits
        bits_logdet = logdet * bits - math.log2(127.5)
        loss_image = scores.total + (image_weight * (factored_nll * bits - bits_logdet)).sum()
        text_weight = self.text_loss_weight * text_counts / normalizers["text"]
        loss = loss_image + (text_weight * nll_text).sum()

        image_bits, text_bits = bits_tokens - bits_logdet, nll_text / _LN2
        terms = {
            "bits_per_dim": (image_bits, image_counts),
            "bits_per_dim_tokens": (bits_tokens, image_counts),
            "bits_per_dim_logdet": (bits_logdet, image_counts),
        }
        if model.factored_dim:
            terms["bits_per_dim_factored"] = (factored_nll * bits, image_counts)
        terms |= expansion_used(model.flow, flow_logdet, image_counts)
        if scores.responsibilities is not None:
            terms["responsibilities"] = (scores.responsibilities, image_counts)
            terms["responsibility_entropy"] = (scores.responsibility_entropy, image_counts)
        if self.loss_on_prefix or self.text_prefix_prob < 1:
            terms["text_bits_per_token"] = (text_bits, text_counts)
        if "text_first" in draws:
            terms |= {
                "text_prefix_bits_per_token": (text_bits, text_first & ~dropped),
                "text_suffix_bits_per_token": (text_bits, ~text_first),
                "bits_per_dim_prefix": (image_bits, ~text_first),
                "bits_per_dim_suffix": (image_bits, text_first),
            }
        return loss, {name: (value.detach(), counts) for name, (value, counts) in terms.items()}


@dataclasses.dataclass(frozen=True)
class JetObjective:
    """Negative log-likelihood of images under a flow alone (Jet; big_vision `trainers/proj/jet/train.py`).

    Of a `LabelledFlow` each image is scored given its label.

    Attributes:
      dequantize: add the dequantization noise.
      drop_labels_prob: probability that a label is dropped in training, so that a `LabelledFlow` also learns images
        without one.
    """

    dequantize: bool = True
    drop_labels_prob: Probability = 0.0

    def draw(self, model: nn.Module, batch: Batch, keys: Tensor, train: bool) -> Draws:
        """The random draws of one step: dequant `[B, H, W, C]`, uniform in [0, 1), and in training drop_labels bool
        `[B]`. See `JetFormerObjective.draw`."""
        draws = {}
        if self.dequantize:
            draws["dequant"] = prng.uniform(prng.fold_in(keys, _DEQUANT), batch["image"].shape[1:])
        if self.drop_labels_prob and not isinstance(model, LabelledFlow):
            raise ValueError(
                f"JetObjective.drop_labels_prob is of a LabelledFlow, not of a {type(model).__name__}: leave it out"
            )
        if self.drop_labels_prob and train:
            draws["drop_labels"] = prng.uniform(prng.fold_in(keys, _DROP_PREFIX), ()) < self.drop_labels_prob
        return draws

    def normalizers(self, batch: Batch, draws: Draws, train: bool) -> dict[str, Tensor]:
        """How many examples the loss averages over. See `JetFormerObjective.normalizers`."""
        del draws, train
        image = batch["image"]
        return {"image": torch.full((), len(image), device=image.device)}

    def __call__(
        self,
        model: nn.Module,
        batch: Batch,
        draws: Draws,
        *,
        noise_scale: Tensor | float = 0.0,
        train: bool = True,
        normalizers: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Terms]:
        """Scores the images uint8 `[B, H, W, C]` of a batch, of a `LabelledFlow` given its labels (see `labels_of`);
        arguments as in `JetFormerObjective.__call__`.

        Returns:
          The loss, and what it consists of by example: bits_per_dim = bits_per_dim_latents - bits_per_dim_logdet; of a
          bounded flow also flow_expansion_used, see `expansion_used`.

        Raises:
          ValueError: if there is a noise curriculum, which Jet's objective does not have, or the batch lacks something.
        """
        if not isinstance(noise_scale, Tensor) and noise_scale:
            raise ValueError("Jet's objective has no noise curriculum: leave train.noise_scale at 0")
        check_has(batch, "image")
        normalizers = normalizers or self.normalizers(batch, draws, train)
        pixels = batch["image"].to(next(model.parameters()).dtype)
        if self.dequantize:
            pixels = pixels + draws["dequant"]
        context = None
        if isinstance(model, LabelledFlow):
            context = model.context(labels_of(batch).long(), draws.get("drop_labels") if train else None)
        terms = self.score(model, to_unit_range(pixels), context)
        loss = terms["bits_per_dim"][0].sum() / normalizers["image"]
        return loss, {name: (value.detach(), counts) for name, (value, counts) in terms.items()}

    @staticmethod
    def score(model: nn.Module, x: Tensor, context: Tensor | None = None) -> Terms:
        """The terms, with gradient, of `x` `[B, H, W, C]` in [-1, 1] given `context` `[B, M, context_dim]` or None."""
        z, logdet = model(x, context)
        bits = 1 / (math.prod(x.shape[1:]) * _LN2)
        bits_latents = standard_normal_nll(z) * bits
        bits_logdet = logdet * bits - math.log2(127.5)
        counts = torch.ones(len(x), dtype=torch.bool, device=x.device)
        return {
            "bits_per_dim": (bits_latents - bits_logdet, counts),
            "bits_per_dim_latents": (bits_latents, counts),
            "bits_per_dim_logdet": (bits_logdet, counts),
            **expansion_used(model, logdet, counts),
        }


@dataclasses.dataclass(frozen=True)
class TextObjective:
    """Negative log-likelihood of texts under a `LanguageModel`, over tokens: long texts count for more."""

    def draw(self, model: LanguageModel, batch: Batch, keys: Tensor, train: bool) -> Draws:
        """The random draws of one step: in training with dropout dropout_keys int32 `[B, 2]`. See
        `JetFormerObjective.draw`."""
        del batch
        return {"dropout_keys": prng.fold_in(keys, _DROPOUT)} if train and model.decoder.dropout else {}

    def normalizers(self, batch: Batch, draws: Draws, train: bool) -> dict[str, Tensor]:
        """How many tokens the loss averages over. See `JetFormerObjective.normalizers`."""
        del draws, train
        return {"text": batch["text_loss"].sum()}

    def __call__(
        self,
        model: LanguageModel,
        batch: Batch,
        draws: Draws,
        *,
        noise_scale: Tensor | float = 0.0,
        train: bool = True,
        normalizers: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Terms]:
        """Scores the texts of a batch: text int `[B, T]`, text_loss bool `[B, T]` and text_mask bool `[B, T]`, see
        `JetFormerObjective.__call__`.

        Returns:
          The loss in nats per token, and text_bits_per_token by token.

        Raises:
          ValueError: if there is a noise curriculum, or the batch has no texts.
        """
        if not isinstance(noise_scale, Tensor) and noise_scale:
            raise ValueError("texts have no noise curriculum: leave train.noise_scale at 0")
        check_has(batch, "text", "text_loss")
        normalizers = normalizers or self.normalizers(batch, draws, train)
        text, counts = batch["text"], batch["text_loss"]
        hidden = model(text, batch.get("text_mask"), draws.get("dropout_keys") if train else None)
        nll = F.cross_entropy(model.text_logits(hidden).float().transpose(1, 2), text.long(), reduction="none")
        loss = nll.where(counts, 0.0).sum() / normalizers["text"].clamp(min=1)
        return loss, {"text_bits_per_token": (nll.detach() / _LN2, counts)}

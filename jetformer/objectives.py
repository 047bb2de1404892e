"""The two training objectives, JetFormer's and Jet's, and bits per dim.

An objective is a pure function of a model, a batch and its random draws. `draw` makes the draws from a generator, so that
any step can be replayed; a test feeds its own. (The decoder's dropout is the exception: see `Decoder`.)

Image likelihoods are in bits per dim of 8-bit RGB: pixels x in 0..255 are dequantized to x + u with u uniform in [0, 1) and
scaled to [-1, 1], and the volume changes of dequantization, scaling and flow are in the figure. Text is in bits per token;
the loss has it in nats, as in the reference (big_vision `trainers/proj/jetformer/train.py`).
Dimensions: B batch, H × W × C image, T text tokens, L image tokens, D token dimension.
"""

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jetformer.models.jetformer import JetFormer

Batch = dict[str, Tensor]
Draws = dict[str, Tensor]
Metrics = dict[str, Tensor]

_LN2 = math.log(2)
_LOG_2PI = math.log(2 * math.pi)


def standard_normal_nll(x: Tensor) -> Tensor:
    """Negative log-density `[B]` in nats of `x` `[B, ...]` under a standard normal."""
    return 0.5 * (x.square() + _LOG_2PI).flatten(1).sum(1)


def to_unit_range(pixels: Tensor) -> Tensor:
    """Pixel values in [0, 255] to [-1, 1]."""
    return pixels / 127.5 - 1


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `x` where `mask` is true; 0 where it is nowhere."""
    weight = mask.to(x.dtype)
    if dim is None:
        return (x * weight).sum() / weight.sum().clamp(min=1)
    return (x * weight).sum(dim) / weight.sum(dim).clamp(min=1)


@dataclasses.dataclass(frozen=True)
class JetFormerObjective:
    """Negative log-likelihood of images and texts, each after the other (JetFormer, section 3).

    Attributes:
      text_prefix_prob: probability that the text comes first in an example.
      loss_on_prefix: score the first modality too, not only the second.
      text_loss_weight: factor of the text's loss.
      drop_labels_prob: probability that a text prefix is replaced by `nolabel_id` in training, for guidance.
      input_noise_std: largest standard deviation of the noise on image tokens in training, drawn for each example and used
        where the image comes second. The noisy tokens are also the target, as in the reference.
      rgb_noise_on_image_prefix: put the noise of the curriculum also on images that come first.
      stop_grad_image_prefix: no gradient from an image that comes first to the flow.
      dequantize: add the dequantization noise.
    """

    text_prefix_prob: float = 0.5
    loss_on_prefix: bool = True
    text_loss_weight: float = 1.0
    drop_labels_prob: float = 0.0
    input_noise_std: float = 0.0
    rgb_noise_on_image_prefix: bool = True
    stop_grad_image_prefix: bool = False
    dequantize: bool = True

    def draw(
        self, model: JetFormer, batch: Batch, generator: torch.Generator | None, train: bool
    ) -> Draws:
        """The random draws of one step.

        Args:
          model: the model, for the shape of its tokens.
          batch: see `__call__`.
          generator: of the batch's device; None for the device's default generator.
          train: also draw what only training uses.

        Returns:
          text_first: bool `[B]`, left out where text_prefix_prob is 0 or 1;
          dequant: `[B, H, W, C]`, uniform in [0, 1);
          in training also rgb_noise `[B, H, W, C]` (normal), drop_prefix bool `[B]`, input_noise_std `[B, 1, 1]` (uniform
          in [0, 1)), input_noise `[B, L, D]` (normal).
        """
        image = batch["image"]
        kwargs = {"generator": generator, "device": image.device}
        draws = {}
        if 0 < self.text_prefix_prob < 1:
            draws["text_first"] = torch.rand(len(image), **kwargs) < self.text_prefix_prob
        if self.dequantize:
            draws["dequant"] = torch.rand(image.shape, **kwargs)
        if train:
            draws["rgb_noise"] = torch.randn(image.shape, **kwargs)
            if self.drop_labels_prob:
                draws["drop_prefix"] = torch.rand(len(image), **kwargs) < self.drop_labels_prob
            if self.input_noise_std:
                shape = (len(image), model.num_image_tokens, model.out_dim)
                draws["input_noise_std"] = torch.rand(len(image), 1, 1, **kwargs)
                draws["input_noise"] = torch.randn(shape, **kwargs)
        return draws

    def __call__(
        self,
        model: JetFormer,
        batch: Batch,
        draws: Draws,
        *,
        noise_scale: Tensor | float = 0.0,
        train: bool = True,
    ) -> tuple[Tensor, Metrics, Metrics]:
        """Scores a batch.

        Args:
          model: the model.
          batch: image uint8 `[B, H, W, C]`, text int `[B, T]`, text_loss bool `[B, T]` (which text tokens count), and
            text_mask bool `[B, T]` (which are valid; absent: all).
          draws: see `draw`.
          noise_scale: standard deviation, in units of 8-bit pixel values, of the curriculum's noise at this step.
          train: whether to use the draws of training.

        Returns:
          The loss; metrics reduced over the batch; metrics per example `[B]`: nll_image (bits per dim), nll_image_tokens
          and logdet (its parts: nll_image = nll_image_tokens - logdet), nll_text (nats per token).
        """
        text, batch_size = batch["text"], len(batch["image"])
        if "text_first" in draws:
            text_first = draws["text_first"]
            is_text_first = text_first
        else:
            text_first = self.text_prefix_prob > 0.5
            is_text_first = torch.full((batch_size,), text_first, device=text.device)

        # RGB noise as if it had been added to the 8-bit image, then dequantization.
        dtype = model.image_emb.weight.dtype
        pixels = batch["image"].to(dtype)
        if train:
            noise = noise_scale * draws["rgb_noise"].to(dtype)
            if not self.rgb_noise_on_image_prefix:
                noise = noise * is_text_first.view(-1, 1, 1, 1)
            pixels = torch.round(pixels + noise)
        if self.dequantize:
            pixels = pixels + draws["dequant"]
        tokens, factored, logdet = model.encode_image(to_unit_range(pixels))
        factored_nll = standard_normal_nll(factored)

        drop_prefix = None
        if train:
            if self.input_noise_std:
                std = self.input_noise_std * draws["input_noise_std"] * is_text_first.view(-1, 1, 1)
                tokens = tokens + std * draws["input_noise"]
            if "drop_prefix" in draws:  # only text is dropped, and only where it comes first
                drop_prefix = draws["drop_prefix"] & is_text_first
        if self.stop_grad_image_prefix:
            tokens = torch.where(is_text_first.view(-1, 1, 1), tokens, tokens.detach())

        text_hidden, image_hidden = model(
            text,
            tokens,
            text_first=text_first,
            text_mask=batch.get("text_mask"),
            drop_prefix=drop_prefix,
        )

        # Which examples count for which modality, and how much one of them weighs in the loss.
        dropped = torch.zeros_like(is_text_first) if drop_prefix is None else drop_prefix
        if self.loss_on_prefix:
            text_counts = ~(is_text_first & dropped)
            image_counts = is_text_first | ~dropped
            text_weight, image_weight = (
                counts / counts.sum().clamp(min=1) for counts in (text_counts, image_counts)
            )
        else:
            text_counts, image_counts = ~is_text_first, is_text_first
            text_weight, image_weight = text_counts / batch_size, image_counts / batch_size

        text_logits = model.text_logits(text_hidden).float()
        nll_text = F.cross_entropy(text_logits.transpose(1, 2), text.long(), reduction="none")
        nll_text = masked_mean(nll_text, batch["text_loss"], dim=1)

        # The head returns its part of the loss with its gradient, and its likelihoods without. Everything of the image
        # is in bits per dim from here on.
        bits = 1 / (math.prod(model.image_shape) * _LN2)
        token_weight = (image_weight * bits)[:, None].expand(-1, tokens.shape[1])
        loss_image_tokens, nll_tokens = model.image_head(image_hidden, tokens, token_weight)
        nll_image_tokens = (nll_tokens.sum(1) + factored_nll) * bits
        logdet = logdet * bits - math.log2(127.5)
        loss_image = loss_image_tokens + (image_weight * (factored_nll * bits - logdet)).sum()
        loss = loss_image + self.text_loss_weight * (text_weight * nll_text).sum()

        per_example = {
            "nll_image": nll_image_tokens - logdet,
            "nll_image_tokens": nll_image_tokens,
            "logdet": logdet,
            "nll_text": nll_text,
        }
        per_example = {k: v.detach() for k, v in per_example.items()}
        return loss, self._reduce(loss, per_example, is_text_first, dropped, text_counts, image_counts), per_example

    def _reduce(
        self,
        loss: Tensor,
        per_example: Metrics,
        text_first: Tensor,
        dropped: Tensor,
        text_counts: Tensor,
        image_counts: Tensor,
    ) -> Metrics:
        image, text_bits = per_example["nll_image"], per_example["nll_text"] / _LN2
        metrics = {
            "loss": loss.detach(),
            "bits_per_dim": masked_mean(image, image_counts),
            "bits_per_dim_tokens": masked_mean(per_example["nll_image_tokens"], image_counts),
            "bits_per_dim_logdet": masked_mean(per_example["logdet"], image_counts),
        }
        if self.loss_on_prefix or self.text_prefix_prob < 1:
            metrics["text_bits_per_token"] = masked_mean(text_bits, text_counts)
        if 0 < self.text_prefix_prob < 1:
            metrics |= {
                "text_prefix_bits_per_token": masked_mean(text_bits, text_first & ~dropped),
                "text_suffix_bits_per_token": masked_mean(text_bits, ~text_first),
                "bits_per_dim_prefix": masked_mean(image, ~text_first & ~dropped),
                "bits_per_dim_suffix": masked_mean(image, text_first),
            }
        return metrics


@dataclasses.dataclass(frozen=True)
class JetObjective:
    """Negative log-likelihood of images under a flow alone (Jet; big_vision `trainers/proj/jet/train.py`).

    Attributes:
      dequantize: add the dequantization noise.
    """

    dequantize: bool = True

    def draw(
        self, model: nn.Module, batch: Batch, generator: torch.Generator | None, train: bool
    ) -> Draws:
        """The random draws of one step: dequant `[B, H, W, C]`, uniform in [0, 1). See `JetFormerObjective.draw`."""
        del model, train
        image = batch["image"]
        if not self.dequantize:
            return {}
        return {"dequant": torch.rand(image.shape, generator=generator, device=image.device)}

    def __call__(
        self,
        model: nn.Module,
        batch: Batch,
        draws: Draws,
        *,
        noise_scale: Tensor | float = 0.0,
        train: bool = True,
    ) -> tuple[Tensor, Metrics, Metrics]:
        """Scores the images uint8 `[B, H, W, C]` of a batch; arguments and results as in `JetFormerObjective.__call__`.

        Raises:
          ValueError: if there is a noise curriculum, which Jet's objective does not have.
        """
        del train
        if not isinstance(noise_scale, Tensor) and noise_scale:
            raise ValueError("Jet's objective has no noise curriculum: leave train.noise_scale at 0")
        pixels = batch["image"].to(next(model.parameters()).dtype)
        if self.dequantize:
            pixels = pixels + draws["dequant"]
        return self.score(model, to_unit_range(pixels))

    def score(self, model: nn.Module, x: Tensor, context: Tensor | None = None):
        """Scores `x` `[B, H, W, C]` in [-1, 1]; results as in `__call__`."""
        z, logdet = model(x, context)
        bits = 1 / (math.prod(x.shape[1:]) * _LN2)
        nll = standard_normal_nll(z) * bits + math.log2(127.5)
        logdet = logdet * bits
        per_example = {"nll_image": nll - logdet, "nll_latents": nll, "logdet": logdet}
        loss = per_example["nll_image"].mean()
        metrics = {
            "loss": loss,
            "bits_per_dim": loss,
            "bits_per_dim_latents": nll.mean(),
            "bits_per_dim_logdet": logdet.mean(),
        }
        detach = lambda tensors: {k: v.detach() for k, v in tensors.items()}
        return loss, detach(metrics), detach(per_example)

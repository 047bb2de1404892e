"""The training objectives of JetFormer, Jet and language models, in bits.

An objective is a pure function of a model, a batch and random draws. `draw` makes the draws, those of an example from
the example's key (see `prng`), so any step can be replayed, and a batch can be split and sharded in any way. A test may
pass draws of its own.

Image likelihoods are in bits per dim of 8-bit pixels: a pixel value x in 0..255 is dequantized to x + u with u uniform
in [0, 1) and scaled to [-1, 1]; the likelihood includes the volume changes of scaling and flow. Text is in bits per
token; its part of the loss is in nats, as in the reference (big_vision `trainers/proj/jetformer/train.py`).

Dimensions: B batch, H × W × C image, T text tokens, L image tokens, D token dimension, K mixtures.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jetformer import prng
from jetformer.models import remat
from jetformer.models.jetformer import Encoded, JetFormer
from jetformer.models.labelled import LabelledFlow
from jetformer.models.language_model import LanguageModel
from jetformer.models.tarflow import TarFlow
from jetformer.ranges import NonNegativeFloat, Probability

Batch = dict[str, Tensor]
Draws = dict[str, Tensor]
# Metrics by name: values [B, ...], and which of them count, bool [B, ...]. The only vectors are responsibilities [B, K]
# with counts [B]; `mixture.count_components` turns them into metrics.
Terms = dict[str, tuple[Tensor, Tensor]]
# Their sums [] or [K], and counts []. The sums of parts add up to the sums of the whole.
Sums = dict[str, tuple[Tensor, Tensor]]

_LN2 = math.log(2)
_LOG_2PI = math.log(2 * math.pi)

# The numbers that an example's key is folded with, one for each draw.
_TEXT_FIRST, _DEQUANT, _RGB_NOISE, _DROP_PREFIX, _INPUT_NOISE_STD, _INPUT_NOISE, _DROPOUT = range(7)


def check_has(batch: Batch, *keys: str) -> None:
    """Checks that a batch has the given keys.

    Raises:
      ValueError: if it lacks one.
    """
    for key in keys:
        if key not in batch:
            raise ValueError(
                f"the batch has no {key!r}: add it in the preprocessing (label_as_text makes a text from a label, "
                "caption from a text)"
            )


def labels_of(batch: dict[str, Any], argument: str = "Data.pp") -> Any:
    """Returns the class labels `[B]` of a batch of tensors or arrays: its `label`, or its texts of one token.

    Args:
      batch: the batch.
      argument: the gin name of the preprocessing, for the message.

    Raises:
      ValueError: if it has neither.
    """
    if "label" in batch:
        return batch["label"]
    if "text" in batch and batch["text"].shape[1] == 1:
        return batch["text"][:, 0]
    raise ValueError(
        "the examples have no label: use a preprocessing string that keeps it, such as "
        f"{argument} = \"decode | keep('image', 'label')\", or makes a text from it with label_as_text"
    )


def check_tokens(tokens: Any, model: nn.Module, remedy: str = "") -> None:
    """Checks that class labels `[B, 1]`, or text tokens `[B, T]`, are in the model's vocabulary and no special token.

    (A device would take the embedding of another token, or abort.)

    Args:
      tokens: a tensor or an array.
      model: `first_special` says that it reads texts, `num_labels` that it reads labels.
      remedy: ends the message.

    Raises:
      ValueError: if one is not, or the model reads neither.
    """
    if hasattr(model, "first_special"):
        count = model.first_special(tokens.shape[1])
    elif hasattr(model, "num_labels"):
        count = model.num_labels
    else:
        raise ValueError(f"{type(model).__name__} is not conditional on classes: sample without classes")
    for token in (int(tokens.min()), int(tokens.max())):
        if not 0 <= token < count:
            raise ValueError(f"there is no class or token {token}: the model has 0 to {count - 1}{remedy}")


def batch_size(batch: Batch) -> int:
    """Returns B."""
    return len(next(iter(batch.values())))


def standard_normal_nll(x: Tensor) -> Tensor:
    """Returns the negative log-density `[B]` in nats of `x` `[B, ...]` under a standard normal."""
    return 0.5 * (x.square() + _LOG_2PI).flatten(1).sum(1)


def score_factored(model: JetFormer, tokens: Tensor, factored: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scores the factored-out dimensions of images.

    Args:
      model: its `factored_prior` scores them given the tokens; if that is None, they are standard normal.
      tokens: `[B, L, D]`.
      factored: `[B, L, F]`.
      weight: `[B]`, factor of each image in the sum.

    Returns:
      The sum of the negative log-densities in nats, and without gradient those of the images, `[B]`.
    """
    if model.factored_prior is None:
        nll = standard_normal_nll(factored)
        return (weight * nll).sum(), nll.detach()
    scores = model.factored_prior(tokens, factored, weight[:, None].expand(factored.shape[:2]))
    return scores.total, scores.nll.sum(1)


def to_unit_range(pixels: Tensor) -> Tensor:
    """Scales pixel values in [0, 255] to [-1, 1]."""
    return pixels / 127.5 - 1


def sum_terms(terms: Terms) -> Sums:
    """Sums each term over the values that count."""
    sums = {}
    for name, (value, counts) in terms.items():
        # Not value · counts, for the other values may not be finite.
        kept = value.where(counts.view(*counts.shape, *[1] * (value.ndim - counts.ndim)), 0.0)
        sums[name] = (kept.flatten(0, counts.ndim - 1).sum(0), counts.sum())
    return sums


def split(tensors: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    """Splits a batch, or its draws, `[B, ...]` into `parts`: part i has the examples i, i + parts, …

    So each part is on as many devices as the batch.
    """
    return [{name: x.unflatten(0, (-1, parts))[:, i] for name, x in tensors.items()} for i in range(parts)]


def add_sums(a: Sums, b: Sums) -> Sums:
    """Returns the sums of the whole from those of two parts."""
    return {name: (a[name][0] + b[name][0], a[name][1] + b[name][1]) for name in a}


def expansion_used(flow: nn.Module | None, logdet: Tensor, counts: Tensor) -> Terms:
    """Returns the term flow_expansion_used, the log-determinants `[B]` as a share of `flow.max_logdet`; {} without it.

    N couplings of scale factor 2 expand a dimension by up to 2^(N/2) on average. A share near 1 calls for more
    couplings; a flow with a share below 0 contracts.
    """
    bound = getattr(flow, "max_logdet", None)
    return {} if bound is None else {"flow_expansion_used": (logdet / bound, counts)}


@dataclasses.dataclass(frozen=True)
class JetFormerObjective:
    """Negative log-likelihood of images and texts, one after the other (JetFormer, section 3).

    Attributes:
      text_prefix_prob: probability that the text comes first in an example.
      loss_on_prefix: score the first modality too, not only the second.
      text_loss_weight: factor of the text's loss.
      drop_labels_prob: probability that `nolabel_id` replaces a text prefix in training, for guidance.
      input_noise_std: largest standard deviation of the noise on image tokens in training. Each example draws its own;
        images that come first get no noise. The noisy tokens are also the targets, as in the reference.
      rgb_noise_on_image_prefix: add the noise of the curriculum to images that come first, too.
      stop_grad_image_prefix: stop the gradient from images that come first to the flow.
      dequantize: add dequantization noise.
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

    def denoising_std(self, noise_min: float) -> float:
        """Returns the standard deviation of the noise on the images that training ends with, in units of [-1, 1].

        Args:
          noise_min: of the run's noise curriculum.

        Raises:
          ValueError: if it ends without noise.
        """
        if not noise_min:
            raise ValueError("denoise applies to a model of noisy images, and this one's train.noise_min is 0")
        # Rounding adds a twelfth of a squared grey level, and so does dequantization.
        return math.sqrt(noise_min**2 + (2 if self.dequantize else 1) / 12) / 127.5

    def draw(self, model: JetFormer, batch: Batch, keys: Tensor, train: bool) -> Draws:
        """Makes the random draws of one step.

        Args:
          model: the model, for the shape of its tokens.
          batch: see `__call__`.
          keys: int32 `[B, 2]`, one for each example; see `prng`.
          train: also make the draws that only training uses.

        Returns:
          text_first: bool `[B]`, omitted if text_prefix_prob is 0 or 1;
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
        """Returns the number of examples that the loss averages over, by modality.

        Each part of a step's batch (a microbatch, a process's share) is scored with the sum of all parts' normalizers,
        so that the parts' losses add up.
        """
        _, _, text_counts, image_counts = self._roles(batch, draws, train)
        if self.loss_on_prefix:
            return {"text": text_counts.sum(), "image": image_counts.sum()}
        size = torch.full_like(text_counts.sum(), len(text_counts))
        return {"text": size, "image": size}

    def _roles(self, batch: Batch, draws: Draws, train: bool):
        """Returns, bool `[B]` each: text comes first; text is dropped; text counts; image counts."""
        image = batch["image"]
        if (text_first := draws.get("text_first")) is None:
            text_first = torch.full((len(image),), self.text_prefix_prob > 0.5, device=image.device)
        dropped = torch.zeros_like(text_first)
        if train and "drop_prefix" in draws:  # only texts that come first are dropped
            dropped = draws["drop_prefix"] & text_first
        if self.loss_on_prefix:
            return text_first, dropped, ~dropped, torch.ones_like(text_first)
        return text_first, dropped, ~text_first, text_first

    def encode(
        self, model: JetFormer, batch: Batch, draws: Draws, *, noise_scale: Tensor | float = 0.0, train: bool = True
    ) -> Encoded:
        """Encodes a batch's images, in training with the noise of the curriculum; arguments as in `__call__`."""
        text_first, _, _, _ = self._roles(batch, draws, train)
        # RGB noise rounded, as if added to the 8-bit image, then dequantization.
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
          batch: image uint8 `[B, H, W, C]`; text int `[B, T]`; text_loss bool `[B, T]`, the text tokens that count; and
            text_mask bool `[B, T]`, the valid text tokens, all if absent.
          draws: see `draw`.
          noise_scale: standard deviation of the curriculum's noise at this step, in 8-bit pixel values.
          train: whether to use the draws of training.
          normalizers: see `normalizers`; None for this batch's.

        Returns:
          The loss, and its terms by example: bits_per_dim = bits_per_dim_tokens - bits_per_dim_logdet;
          bits_per_dim_factored, the part of bits_per_dim_tokens for factored-out dimensions, if there are any;
          text_bits_per_token. With both orders of modalities, also the terms of prefixes and suffixes. With a mixture,
          also responsibilities and responsibility_entropy, see `mixture_nll.TokenScores`; with a bounded flow also
          flow_expansion_used, see `expansion_used`.

        Raises:
          ValueError: if the batch lacks a key, or its images do not have the model's shape.
        """
        check_has(batch, "image", "text", "text_loss")
        text = batch["text"]
        text_first, dropped, text_counts, image_counts = self._roles(batch, draws, train)
        normalizers = normalizers or self.normalizers(batch, draws, train)
        normalizers = {name: count.clamp(min=1) for name, count in normalizers.items()}

        encoded = self.encode(model, batch, draws, noise_scale=noise_scale, train=train)
        tokens, factored, logdet, flow_logdet = encoded

        if train and self.input_noise_std:
            std = self.input_noise_std * draws["input_noise_std"] * text_first.view(-1, 1, 1)
            tokens = tokens + std * draws["input_noise"]
        if self.stop_grad_image_prefix:
            tokens = torch.where(text_first.view(-1, 1, 1), tokens, tokens.detach())

        text_hidden, image_hidden = model(
            text,
            tokens,
            # If all examples have the same order, a bool saves the model building the other.
            text_first=text_first if "text_first" in draws else self.text_prefix_prob > 0.5,
            text_mask=batch.get("text_mask"),
            drop_prefix=dropped if train and "drop_prefix" in draws else None,
            dropout_keys=draws.get("dropout_keys") if train else None,
        )

        text_logits = model.text_logits(text_hidden).float()
        nll_text = F.cross_entropy(text_logits.transpose(1, 2), text.long(), reduction="none")
        in_loss = batch["text_loss"]
        nll_text = (nll_text * in_loss).sum(1) / in_loss.sum(1).clamp(min=1)

        # From here on the image is in bits per dim. Of the head's scores only the total has a gradient.
        bits = 1 / (math.prod(model.image_shape) * _LN2)
        image_weight = image_counts / normalizers["image"]
        token_weight = (image_weight * bits)[:, None].expand(-1, tokens.shape[1])
        scores = model.image_head(image_hidden, tokens, token_weight)
        factored_total, factored_nll = score_factored(model, tokens, factored, image_weight * bits)
        bits_tokens = (scores.nll.sum(1) + factored_nll) * bits
        bits_logdet = logdet * bits - math.log2(127.5)
        loss_image = scores.total + factored_total - (image_weight * bits_logdet).sum()
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

    A `LabelledFlow` scores each image given its label.

    Attributes:
      dequantize: add dequantization noise.
      noise_std: standard deviation of Gaussian noise on images in [-1, 1], in the place of dequantization noise (as
        TarFlow, arXiv 2412.06329). The flow then learns the density of noisy images, and bits per dim, which cannot be
        compared with those of 8-bit images, are called noisy_bits_per_dim.
      drop_labels_prob: probability that training drops a label, so that a `LabelledFlow` also learns images without
        one.
    """

    dequantize: bool = True
    noise_std: NonNegativeFloat = 0.0
    drop_labels_prob: Probability = 0.0

    def denoising_std(self, noise_min: float = 0.0) -> float:
        """Returns noise_std, see `JetFormerObjective.denoising_std`.

        Raises:
          ValueError: if it is 0.
        """
        del noise_min
        if not self.noise_std:
            raise ValueError(
                f"denoise applies to a flow of noisy images, and this one's {type(self).__name__}.noise_std is 0"
            )
        return self.noise_std

    def check_guidance(self, mode: str) -> None:
        """Checks that the flow learns what guidance needs, see `JetFormerObjective.check_guidance`."""
        if mode != "none" and not self.drop_labels_prob:
            raise ValueError(
                f"guidance {mode} needs a flow that was also trained without labels, and this one was not: its "
                f"{type(self).__name__}.drop_labels_prob is 0. Sample without guidance, or train with 0.1"
            )

    def draw(self, model: nn.Module, batch: Batch, keys: Tensor, train: bool) -> Draws:
        """Makes the random draws of one step, see `JetFormerObjective.draw`.

        Returns:
          dequant `[B, H, W, C]`, uniform in [0, 1), or noise `[B, H, W, C]` (normal); in training also drop_labels,
          bool `[B]`.

        Raises:
          ValueError: if drop_labels_prob is set, but the model takes no labels.
        """
        draws, shape = {}, batch["image"].shape[1:]
        if self.noise_std:
            draws["noise"] = prng.normal(prng.fold_in(keys, _RGB_NOISE), shape)
        elif self.dequantize:
            draws["dequant"] = prng.uniform(prng.fold_in(keys, _DEQUANT), shape)
        if self.drop_labels_prob and not isinstance(model, LabelledFlow):
            raise ValueError(
                f"{type(self).__name__}.drop_labels_prob needs a LabelledFlow, not a {type(model).__name__}: leave it "
                "at 0"
            )
        if self.drop_labels_prob and train:
            draws["drop_labels"] = prng.uniform(prng.fold_in(keys, _DROP_PREFIX), ()) < self.drop_labels_prob
        return draws

    def normalizers(self, batch: Batch, draws: Draws, train: bool) -> dict[str, Tensor]:
        """Returns the number of examples that the loss averages over, see `JetFormerObjective.normalizers`."""
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
        """Scores a batch; arguments as in `JetFormerObjective.__call__`.

        The batch has image, uint8 `[B, H, W, C]`, and for a `LabelledFlow` labels, see `labels_of`.

        Returns:
          The loss in bits per dim, and its terms by example: bits_per_dim = bits_per_dim_latents - bits_per_dim_logdet,
          all called noisy_… with noise_std; with a bounded flow also flow_expansion_used, see `expansion_used`.

        Raises:
          ValueError: if there is a noise curriculum, which Jet's objective does not have, or the batch lacks a key.
        """
        normalizers = normalizers or self.normalizers(batch, draws, train)
        terms = self.score(model, *self.inputs(model, batch, draws, noise_scale, train))
        loss = terms["bits_per_dim"][0].sum() / normalizers["image"]
        terms = {name: (value.detach(), counts) for name, (value, counts) in terms.items()}
        if self.noise_std:
            terms = {f"noisy_{name}" if name.startswith("bits") else name: term for name, term in terms.items()}
        return loss, terms

    def inputs(
        self, model: nn.Module, batch: Batch, draws: Draws, noise_scale: Tensor | float, train: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Returns images with noise, `[B, H, W, C]`, and their context `[B, M, context_dim]`, None for none; arguments
        and errors as in `__call__`."""
        if not isinstance(noise_scale, Tensor) and noise_scale:
            raise ValueError(
                f"{type(self).__name__} has no noise curriculum: leave train.noise_scale and train.noise_min at 0"
            )
        check_has(batch, "image")
        parameter = next(model.parameters(), None)  # a flow may have none
        pixels = batch["image"].to(torch.get_default_dtype() if parameter is None else parameter.dtype)
        if self.noise_std:
            x = to_unit_range(pixels + 0.5) + self.noise_std * draws["noise"]
        else:
            x = to_unit_range(pixels + draws["dequant"] if self.dequantize else pixels)
        context = None
        if isinstance(model, LabelledFlow):
            context = model.context(labels_of(batch).long(), draws.get("drop_labels") if train else None)
        return x, context

    @staticmethod
    def score(model: nn.Module, x: Tensor, context: Tensor | None = None) -> Terms:
        """Returns the terms, with gradient, of `x` `[B, H, W, C]` in [-1, 1], given `context` `[B, M, context_dim]`."""
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
class DistillObjective(JetObjective):
    """Squared error of the students of a TarFlow's blocks, along the path that the flow itself takes from image to
    latents (FARMER, arXiv 2510.23588). The last block's student gets the latents, each other one what the one of the
    block after it returned.

    Bind noise and dropped labels, which are those of `JetObjective`, as the flow was trained with them. The flow itself
    gets no gradient: freeze it by `make_optimizer.frozen`, for DDP needs one of every other parameter.
    """

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
        """Scores a batch; arguments as in `JetObjective.__call__`.

        Returns:
          The sum over blocks of the mean squared error of a token's dimension, and terms by example: student_loss, the
          same; student_error, the root of the mean squared error of pixels, in 8-bit pixel values.

        Raises:
          ValueError: if the model has no students, or as `JetObjective.__call__`.
        """
        flow = model.flow if isinstance(model, LabelledFlow) else model
        if not isinstance(flow, TarFlow) or any(block.student is None for block in flow.blocks):
            raise ValueError("DistillObjective needs a TarFlow with students: bind TarFlow.student = @Student")
        normalizers = normalizers or self.normalizers(batch, draws, train)
        x, context = self.inputs(model, batch, draws, noise_scale, train)
        context = None if context is None else context.detach()
        with torch.no_grad():
            path = [flow.patchify(x)[0]]
            for block in flow.blocks:
                path.append(block(path[-1], context)[0])
        y, errors = path.pop(), []
        for block in reversed(flow.blocks):
            y = remat.run_block(block.student, y, context)
            errors.append((y - path.pop()).square().mean((1, 2)))
        error = torch.stack(errors).sum(0)
        counts = torch.ones(len(x), dtype=torch.bool, device=x.device)
        terms = {"student_loss": error, "student_error": 127.5 * errors[-1].sqrt()}
        loss = error.sum() / normalizers["image"]
        return loss, {name: (value.detach(), counts) for name, value in terms.items()}


@dataclasses.dataclass(frozen=True)
class TextObjective:
    """Negative log-likelihood of texts under a `LanguageModel`, averaged over tokens: long texts weigh more."""

    def draw(self, model: LanguageModel, batch: Batch, keys: Tensor, train: bool) -> Draws:
        """Makes the random draws of one step: dropout_keys int32 `[B, 2]`, in training with dropout."""
        del batch
        return {"dropout_keys": prng.fold_in(keys, _DROPOUT)} if train and model.decoder.dropout else {}

    def normalizers(self, batch: Batch, draws: Draws, train: bool) -> dict[str, Tensor]:
        """Returns the number of tokens that the loss averages over, see `JetFormerObjective.normalizers`."""
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
        """Scores a batch; arguments as in `JetFormerObjective.__call__`, without images.

        Returns:
          The loss in nats per token, and text_bits_per_token by token.

        Raises:
          ValueError: if there is a noise curriculum, or the batch has no texts.
        """
        if not isinstance(noise_scale, Tensor) and noise_scale:
            raise ValueError("TextObjective has no noise curriculum: leave train.noise_scale and train.noise_min at 0")
        check_has(batch, "text", "text_loss")
        normalizers = normalizers or self.normalizers(batch, draws, train)
        text, counts = batch["text"], batch["text_loss"]
        hidden = model(text, batch.get("text_mask"), draws.get("dropout_keys") if train else None)
        nll = F.cross_entropy(model.text_logits(hidden).float().transpose(1, 2), text.long(), reduction="none")
        loss = nll.where(counts, 0.0).sum() / normalizers["text"].clamp(min=1)
        return loss, {"text_bits_per_token": (nll.detach() / _LN2, counts)}

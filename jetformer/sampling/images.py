"""Samplers of images: of classes and prompts by a `JetFormer`, and by a flow alone.

Dimensions: B batch, T text tokens.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from jetformer import class_names, objectives, prng
from jetformer.models.jetformer import JetFormer
from jetformer.sampling import decode, flows
from jetformer.sampling.guidance import Guidance
from jetformer.sampling.sampler import Request, Sampler


def class_requests(
    experiment, model: nn.Module, classes: Sequence[int | str], names: Sequence[str] | None
) -> list[Request]:
    """Returns a request for each class.

    Args:
      experiment: that trained the model.
      model: the model.
      classes: their names or labels, see `class_names.resolve`.
      names: of all classes by label; None: unknown.

    Raises:
      ValueError: for a class that the model does not have, or a model of texts.
    """
    if classes and experiment.data.has_texts():
        raise ValueError("the model is conditional on texts, not on classes: give prompts")
    labels = class_names.resolve(classes, names)
    requests = [Request(class_names.shown(label, names), np.array([label])) for label in labels]
    for request in requests:
        objectives.check_tokens(request.text[None], model)
    return requests


def inpainting_request(request: Request, image: np.ndarray, mask: np.ndarray) -> Request:
    """Returns a request to sample the pixels of an image under a mask.

    Args:
      request: what the image shows.
      image: uint8 `[H, W, C]`.
      mask: bool `[H, W]`, the pixels to sample. The others are kept.

    Raises:
      ValueError: for a mask of another shape, of no pixel, or of all of them.
    """
    if mask.shape != image.shape[:2]:
        raise ValueError(f"the mask has shape {list(mask.shape)}: expected {list(image.shape[:2])}, as the image")
    if not mask.any() or mask.all():
        raise ValueError(f"the mask has {mask.sum()} of {mask.size} pixels to sample: expected some, and some to keep")
    return dataclasses.replace(request, image=image, mask=mask)


def fill(images: Tensor, masks: Tensor) -> Tensor:
    """Returns images uint8 `[B, H, W, C]` with each pixel under masks bool `[B, H, W]` replaced by the nearest one that
    is not."""
    filled = images.cpu().numpy().copy()
    for image, mask in zip(filled, masks.cpu().numpy(), strict=True):
        nearest = ndimage.distance_transform_edt(mask, return_distances=False, return_indices=True)
        image[:] = image[tuple(nearest)]
    return torch.from_numpy(filled).to(images.device)


def dtype_of(model: nn.Module) -> torch.dtype:
    """Returns the dtype of a model's parameters; the default one for a flow without parameters."""
    return next((p.dtype for p in model.parameters()), torch.get_default_dtype())


class ImageSampler(Sampler):
    """Samples images by a `JetFormer`, given classes or prompts; completes images with `rows`, and inpaints those of
    requests that have a mask.

    Args:
      experiment: that trained the model.
      model: the model.
      guidance: see `Guidance`.
      temperature: multiplies the standard deviations of the tokens' mixtures.
      temperature_probs: multiplies the log-weights of the tokens' mixtures.
      rows: number of rows of pixels to keep of the images of requests; None: requests have no images, or a mask.
      denoise: remove the noise that the model was trained with from whole samples, after they are scored.
      compile: see `Loop.compile`.

    Raises:
      ValueError: if the model does not learn images after texts, guidance or denoising do not fit it, or images cannot
        be completed.
    """

    def __init__(
        self,
        experiment,
        model: JetFormer,
        *,
        guidance: Guidance = Guidance(),  # noqa: B008 (frozen)
        temperature: float = 1.0,
        temperature_probs: float = 1.0,
        rows: int | None = None,
        denoise: bool = False,
        compile: decode.Compile = lambda function: function,
    ):
        experiment.objective.check_order(text_first=True)
        guidance.check(model.image_head)
        experiment.objective.check_guidance(guidance.mode)
        self._rows = rows
        self._noise_std = experiment.objective.denoising_std(experiment.noise_min) if denoise else 0.0
        self._options = {
            "guidance": guidance,
            "temperature_scales": temperature,
            "temperature_probs": temperature_probs,
            "compile": compile,
        }
        self.settings = {"temperature": temperature, "temperature_probs": temperature_probs} | _settings(guidance)
        if guidance.mode == "resample":
            self.settings["guidance_candidates"] = guidance.num_candidates
        if denoise:
            self.settings["denoise"] = True
        self.num_tokens = model.num_image_tokens
        if rows is not None:
            self.settings["rows"] = rows
            self.num_tokens -= rows // decode.rows_per_token(model) * model.patches.grid[1]

    def __call__(
        self, model: JetFormer, batch: dict[str, Tensor], keys: Tensor, on_token: Callable[[], None]
    ) -> list[dict[str, Any]]:
        options = {"text_mask": batch.get("text_mask"), "on_token": on_token, **self._options}
        if self._rows is not None:
            sampled, nats = decode.complete_images(model, batch["text"], keys, batch["image"], self._rows, **options)
        elif "mask" in batch:
            guess = fill(batch["image"], batch["mask"])
            sampled, nats = decode.inpaint_images(model, batch["text"], keys, guess, batch["mask"], **options)
        else:
            sampled, nats = decode.sample_images(model, batch["text"], keys, noise_std=self._noise_std, **options)
        return _described(sampled, nats)


class FlowSampler(Sampler):
    """Samples images by a flow alone, of classes if it is conditional on them.

    Args:
      experiment: that trained the model.
      model: has `inverse(z, context=None) -> (x, logdet)` with z and x `[B, H, W, C]`, x in [-1, 1], and `image_shape`
        (H, W, C); for classes also `num_labels`, and `context(labels)` that returns the context of labels `[B]`.
      guidance: see `flows.check_guidance`; requests have classes then.
      temperature: multiplies the latents.
      denoise: remove the noise that the flow was trained with, after the samples are scored.
      compile: see `Loop.compile`.

    Raises:
      ValueError: if the model is not a flow, or guidance or denoising do not fit it.
    """

    num_tokens = 1

    def __init__(
        self,
        experiment,
        model: nn.Module,
        *,
        guidance: Guidance = Guidance(),  # noqa: B008 (frozen)
        temperature: float = 1.0,
        denoise: bool = False,
        compile: decode.Compile = lambda function: function,
    ):
        if missing := [name for name in ("inverse", "image_shape") if not hasattr(model, name)]:
            raise ValueError(
                f"{type(model).__name__} cannot be sampled: it is not a JetFormer or LanguageModel, and a flow needs "
                f"{' and '.join(missing)}"
            )
        flows.check_guidance(model, guidance)
        if guidance.on:
            experiment.objective.check_guidance(guidance.mode)
        self._options = {
            "guidance": guidance,
            "temperature": temperature,
            "noise_std": experiment.objective.denoising_std(experiment.noise_min) if denoise else 0.0,
        }
        self._bits = "noisy_bits_per_dim" if getattr(experiment.objective, "noise_std", 0) else "bits_per_dim"
        self._compile = compile
        self.settings = {"temperature": temperature} | (_settings(guidance) if guidance.on else {})
        if denoise:
            self.settings["denoise"] = True

    def __call__(
        self, model: nn.Module, batch: dict[str, Tensor], keys: Tensor, on_token: Callable[[], None]
    ) -> list[dict[str, Any]]:
        labels = batch["text"][:, 0] if "text" in batch else None
        sampled, nats = self._compile(lambda: sample_flow(model, keys, labels, **self._options))()
        on_token()
        return _described(sampled, nats, self._bits)


def sample_flow(
    flow: nn.Module, keys: Tensor, labels: Tensor | None = None, *, temperature: float = 1.0, **options: Any
) -> tuple[Tensor, Tensor]:
    """Samples images by a flow alone.

    Args:
      flow: see `FlowSampler`.
      keys: int32 `[B, 2]`, see `jetformer.prng`.
      labels: int `[B]`; None for none.
      temperature: multiplies the latents.
      options: of `flows.decode`.

    Returns:
      Images uint8 `[B, H, W, C]`, and log-likelihoods `[B]` in nats, see `decode.decode_latents`.
    """
    latents = (prng.normal(keys, flow.image_shape) * temperature).to(dtype_of(flow))
    x, nats = flows.decode(flow, latents, labels, **options)
    return decode.to_uint8(x), nats - math.prod(flow.image_shape) * math.log(127.5)


def _settings(guidance: Guidance) -> dict[str, Any]:
    return {
        "guidance": guidance.mode,
        "guidance_weight": guidance.weight,
        "guidance_schedule": guidance.schedule,
    }


def _described(images: Tensor, nats: Tensor, bits: str = "bits_per_dim") -> list[dict[str, Any]]:
    scale = -1 / (images[0].numel() * math.log(2))
    rows = zip(images.cpu().numpy(), nats.cpu().tolist(), strict=True)
    return [{"image": image, "log_likelihood": x, bits: x * scale} for image, x in rows]

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
from jetformer.sampling import decode
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
      compile: see `Loop.compile`.

    Raises:
      ValueError: if the model does not learn images after texts, guidance does not fit it, or images cannot be
        completed.
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
        compile: decode.Compile = lambda function: function,
    ):
        experiment.objective.check_order(text_first=True)
        guidance.check(model.image_head)
        experiment.objective.check_guidance(guidance.mode)
        self._rows = rows
        self._options = {
            "guidance": guidance,
            "temperature_scales": temperature,
            "temperature_probs": temperature_probs,
            "compile": compile,
        }
        self.settings = {
            "temperature": temperature,
            "temperature_probs": temperature_probs,
            "guidance": guidance.mode,
            "guidance_weight": guidance.weight,
            "guidance_schedule": guidance.schedule,
        }
        if guidance.mode == "resample":
            self.settings["guidance_candidates"] = guidance.num_candidates
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
            sampled, nats = decode.sample_images(model, batch["text"], keys, **options)
        return _described(sampled, nats)


class FlowSampler(Sampler):
    """Samples images by a flow alone, of classes if it is conditional on them.

    Args:
      model: has `inverse(z, context=None) -> (x, logdet)` with z and x `[B, H, W, C]`, x in [-1, 1], and `image_shape`
        (H, W, C); for classes also `num_labels`, and `context(labels)` that returns the context of labels `[B]`.
      temperature: multiplies the latents.
      compile: see `Loop.compile`.

    Raises:
      ValueError: if the model is not a flow.
    """

    num_tokens = 1

    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float = 1.0,
        compile: decode.Compile = lambda function: function,
    ):
        if missing := [name for name in ("inverse", "image_shape") if not hasattr(model, name)]:
            raise ValueError(
                f"{type(model).__name__} cannot be sampled: it is not a JetFormer or LanguageModel, and a flow needs "
                f"{' and '.join(missing)}"
            )
        self._temperature, self._compile = temperature, compile
        self.settings = {"temperature": temperature}

    def __call__(
        self, model: nn.Module, batch: dict[str, Tensor], keys: Tensor, on_token: Callable[[], None]
    ) -> list[dict[str, Any]]:
        def sample() -> tuple[Tensor, Tensor]:
            latents = (prng.normal(keys, model.image_shape) * self._temperature).to(dtype_of(model))
            context = model.context(batch["text"][:, 0]) if "text" in batch else None
            image, logdet = model.inverse(latents, context)
            nats = -objectives.standard_normal_nll(latents) - logdet
            return decode.to_uint8(image), nats - math.prod(model.image_shape) * math.log(127.5)

        with torch.no_grad():
            sampled, nats = self._compile(sample)()
        on_token()
        return _described(sampled, nats)


def _described(images: Tensor, nats: Tensor) -> list[dict[str, Any]]:
    scale = -1 / (images[0].numel() * math.log(2))
    rows = zip(images.cpu().numpy(), nats.cpu().tolist(), strict=True)
    return [{"image": image, "log_likelihood": x, "bits_per_dim": x * scale} for image, x in rows]

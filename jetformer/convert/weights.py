"""Weights as they were read, and the gin text of an experiment for weights that come without one."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Height and width, of datasets whose images all have the same.
_SIZES = {
    "cifar10": (32, 32),
    "downsampled_imagenet/32x32": (32, 32),
    "downsampled_imagenet/64x64": (64, 64),
    "imagenet_resized/64x64": (64, 64),
}


@dataclasses.dataclass
class Weights:
    """Weights as they were read.

    Attributes:
      tensors: by their names in the source.
      gin: the experiment as gin text, as far as the weights determine it; None: it must be given.
      ema: the moving average, by the same names; None for none.
      step: of training; None: unknown.
      tokenizer: content of the tokenizer's file; None for none.
      class_names: by label; None: unknown.
      needs: bindings that the weights do not determine, with a description of each.
      notes: warnings for the user, a line each.
    """

    tensors: Mapping[str, Any]
    gin: str | None = None
    ema: Mapping[str, Tensor] | None = None
    step: int | None = None
    tokenizer: bytes | None = None
    class_names: tuple[str, ...] | None = None
    needs: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


def gin_text(bindings: Mapping[str, Any]) -> str:
    """Returns bindings as gin text. A value that begins with @ is a reference, alone or in a dictionary."""
    lines = []
    for name, value in bindings.items():
        if isinstance(value, str) and value.startswith("@"):
            lines.append(f"{name} = {value}")
        elif isinstance(value, dict):
            lines.append(f"{name} = {{{', '.join(f'{k!r}: {v}' for k, v in value.items())}}}")
        else:
            lines.append(f"{name} = {value!r}")
    return "\n".join(lines) + "\n"


def training(step: int | None) -> dict[str, Any]:
    """Returns the bindings that every experiment needs, for one that ended at `step` (None: unknown)."""
    return {
        "train.data": "@Data()",
        "train.optimizer": "@make_optimizer",
        "train.schedule": "@make_schedule",
        "train.batch_size": 64,
        # The run's last step, so that an evaluation job ends after it.
        "train.total_steps": max(step or 0, 1),
        "make_optimizer.lr": 3e-4,
        "make_optimizer.wd": 1e-5,
        "make_optimizer.b2": 0.95,
        "make_schedule.decay_type": "cosine",
        "make_schedule.warmup_percent": 0.1,
    }


def patches(model: str, num_tokens: int, dim: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the bindings of patch size and image shape of a flow of square RGB images, and those that are needed
    because the images are others.

    Args:
      model: gin name of the flow.
      num_tokens: number of patches of an image.
      dim: number of values of a patch.
    """
    bindings: dict[str, Any] = {}
    needs = {}
    side, patch_size = math.isqrt(num_tokens), math.isqrt(dim // 3)
    if 3 * patch_size**2 == dim:
        bindings[f"{model}.ps"] = patch_size
    else:
        needs[f"{model}.ps"] = f"the size of patches with {dim} values"
    if side**2 == num_tokens and not needs:
        bindings[f"{model}.input_shape"] = (side * patch_size, side * patch_size, 3)
    else:
        needs[f"{model}.input_shape"] = f"the shape of images with {num_tokens} patches"
    return bindings, needs


def data(name: str | None, size: tuple[int, int], labels: bool) -> dict[str, Any]:
    """Returns the bindings of a dataset.

    Args:
      name: of a TFDS dataset; None: one with images of this size.
      size: height and width of the model's images.
      labels: whether the model is conditional on classes.
    """
    if name is None:
        small = "cifar10" if labels else "downsampled_imagenet/32x32"
        medium = "imagenet_resized/64x64" if labels else "downsampled_imagenet/64x64"
        name = {(32, 32): small, (64, 64): medium}.get(size, "imagenet2012")
    ops = ["decode"]
    if _SIZES.get(name) != size:
        smaller = min(size)
        ops += (
            [f"resize_small({smaller}, method='bicubic', antialias=True)", f"central_crop({smaller})"]
            if size[0] == size[1]
            else [f"resize({size}, method='bicubic', antialias=True)"]
        )
    end = ["label_as_text", "keep('image', 'text', 'text_mask', 'text_loss')"] if labels else ["keep('image')"]
    return {
        "Data.name": name,
        "Data.eval_split": "test" if name == "cifar10" else "validation",
        "Data.pp": " | ".join([*ops, "flip_lr", *end]),
        "Data.pp_eval": " | ".join([*ops, *end]),
    }

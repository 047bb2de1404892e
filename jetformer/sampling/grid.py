"""Grids of sampled images."""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from jetformer import prng
from jetformer.models.jetformer import JetFormer
from jetformer.sampling.decode import sample_images

_GREY = 96


@dataclasses.dataclass(frozen=True)
class ClassGrid:
    """Samples some images of every class, as a picture with a row for each class.

    Attributes:
      num_classes: how many classes, from 0 on; the text of class c is the token c.
      per_class: how many images of each.
      temperature_scales: multiplies the standard deviations of the tokens' mixtures.
      temperature_probs: multiplies the log-weights of the tokens' mixtures.
    """

    num_classes: int
    per_class: int = 8
    temperature_scales: float = 1.0
    temperature_probs: float = 1.0

    def check(self, model: torch.nn.Module) -> None:
        """Looks, before anything is trained, whether `model` can be sampled from like this.

        Raises:
          ValueError: if it is no JetFormer, or a class would be a special token.
        """
        if not isinstance(model, JetFormer):
            raise ValueError(
                f"ClassGrid samples from a JetFormer, not from a {type(model).__name__}: unset train.samples"
            )
        first_special = min(t for t in (model.bos_id, model.boi_id, model.nolabel_id) if t is not None)
        if not 1 <= self.num_classes <= first_special or self.per_class < 1:
            raise ValueError(
                f"ClassGrid of {self.num_classes} classes and {self.per_class} images of each: give at least one of "
                f"both, and at most as many classes as there are tokens before the special ones, {first_special}"
            )

    def __call__(
        self, model: JetFormer, *, seed: int, compile: Callable[[Callable], Callable] = lambda function: function
    ) -> np.ndarray:
        """Samples the picture.

        Args:
          model: the model, in evaluation mode.
          seed: the same seed, the same picture.
          compile: see `sample_images`.

        Returns:
          uint8 `[num_classes · (H + 1) + 1, per_class · (W + 1) + 1, C]`: a grey line of a pixel around every image.
        """
        labels = torch.arange(self.num_classes).repeat_interleave(self.per_class)
        keys = prng.example_keys(seed, torch.arange(len(labels), dtype=torch.int32))
        device = next(model.parameters()).device
        images = sample_images(
            model,
            labels[:, None].to(device),
            keys.to(device),
            compile=compile,
            temperature_scales=self.temperature_scales,
            temperature_probs=self.temperature_probs,
        )
        framed = np.pad(images.cpu().numpy(), ((0, 0), (1, 0), (1, 0), (0, 0)), constant_values=_GREY)
        picture = rearrange(framed, "(r c) h w k -> (r h) (c w) k", c=self.per_class)
        return np.pad(picture, ((0, 1), (0, 1), (0, 0)), constant_values=_GREY)


def save_png(picture: np.ndarray, path) -> None:
    """Writes a picture uint8 `[H, W, C]` (1 or 3 channels) as a PNG; small ones enlarged, pixels as squares."""
    factor = max(1, 512 // picture.shape[1])
    picture = picture.repeat(factor, 0).repeat(factor, 1)
    with path.open("wb") as file:
        Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(file, "PNG")

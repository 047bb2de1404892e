"""Grids of sampled images."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from jetformer import prng
from jetformer.models.jetformer import JetFormer
from jetformer.sampling.decode import sample_images
from jetformer.sampling.guidance import Guidance

if TYPE_CHECKING:
    from jetformer.data.dataset import Data

_GREY = 96


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Grid:
    """Attributes:
    num_images: how many images of each class, or prompt.
    guidance: see `Guidance`.
    temperature_scales: multiplies the standard deviations of the tokens' mixtures.
    temperature_probs: multiplies the log-weights of the tokens' mixtures.
    """

    num_images: int = 8
    guidance: Guidance = Guidance()  # noqa: RUF009 (frozen)
    temperature_scales: float = 1.0
    temperature_probs: float = 1.0

    def conditions(self, data: "Data") -> dict[str, Tensor]:
        """What the rows show: text `[R, T]`, and text_mask bool `[R, T]` where some of it is not valid."""
        raise NotImplementedError

    def check(self, model: torch.nn.Module, data: "Data") -> None:
        """Looks, before anything is trained, whether `model` can be sampled from like this.

        Raises:
          ValueError: if not.
        """
        name = type(self).__name__
        if not isinstance(model, JetFormer):
            raise ValueError(f"{name} samples from a JetFormer, not from a {type(model).__name__}: unset train.samples")
        if self.num_images < 1:
            raise ValueError(f"{name}.num_images = {self.num_images}: give 1 or more")
        self.guidance.check(model.image_head)
        check_tokens(self.conditions(data)["text"], model)

    def __call__(
        self,
        model: JetFormer,
        data: "Data",
        *,
        seed: int,
        compile: Callable[[Callable], Callable] = lambda function: function,
    ) -> np.ndarray:
        """Samples the picture.

        Args:
          model: the model, in evaluation mode.
          data: the experiment's, which says how texts are tokenized.
          seed: the same seed, the same picture.
          compile: see `sample_images`.

        Returns:
          uint8 `[R · (H + 1) + 1, num_images · (W + 1) + 1, C]`, a row for each of R classes or prompts: a grey line of
          a pixel around every image.
        """
        device = next(model.parameters()).device
        conditions = {name: x.repeat_interleave(self.num_images, 0) for name, x in self.conditions(data).items()}
        keys = prng.example_keys(seed, torch.arange(len(conditions["text"]), dtype=torch.int32))
        images, _ = sample_images(
            model,
            keys=keys.to(device),
            compile=compile,
            guidance=self.guidance,
            temperature_scales=self.temperature_scales,
            temperature_probs=self.temperature_probs,
            **{name: x.to(device) for name, x in conditions.items()},
        )
        return tile(images.cpu().numpy(), self.num_images)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassGrid(_Grid):
    """Samples some images of every class, as a picture with a row for each class.

    Attributes:
      num_classes: how many classes, from 0 on; the text of class c is the token c.
      num_images: how many images of each.
      guidance: see `Guidance`.
      temperature_scales: multiplies the standard deviations of the tokens' mixtures.
      temperature_probs: multiplies the log-weights of the tokens' mixtures.
    """

    num_classes: int

    def __post_init__(self):
        if self.num_classes < 1:
            raise ValueError(f"ClassGrid.num_classes = {self.num_classes}: give 1 or more")

    def conditions(self, data: "Data") -> dict[str, Tensor]:
        del data
        return {"text": torch.arange(self.num_classes)[:, None]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptGrid(_Grid):
    """Samples some images of every prompt, as a picture with a row for each prompt.

    Attributes:
      prompts: what the images are to show.
      num_images: how many images of each.
      guidance: see `Guidance`.
      temperature_scales: multiplies the standard deviations of the tokens' mixtures.
      temperature_probs: multiplies the log-weights of the tokens' mixtures.
    """

    prompts: tuple[str, ...]

    def __post_init__(self):
        if isinstance(self.prompts, str) or not self.prompts:
            raise ValueError(f"PromptGrid.prompts = {self.prompts!r}: give a tuple of prompts, as ('a cat', 'a dog')")

    def check(self, model: torch.nn.Module, data: "Data") -> None:
        super().check(model, data)
        texts = data.texts()
        for prompt in self.prompts:
            if cut := texts.cut(prompt):
                raise ValueError(f"PromptGrid.prompts: {prompt!r} is too long for the model, by {cut!r}: shorten it")

    def conditions(self, data: "Data") -> dict[str, Tensor]:
        return {name: torch.from_numpy(x) for name, x in data.texts().encode(self.prompts).items()}


def check_tokens(text: Tensor, model: JetFormer) -> None:
    """Looks whether `text` `[B, T]` are tokens of the data, and none of the model's special ones.

    Raises:
      ValueError: if not.
    """
    special = [model.bos_id, model.nolabel_id]
    # The end of a text may also be the begin-of-image token; a class may not.
    if text.shape[1] == 1 and model.boi_id is not None:
        special.append(model.boi_id)
    first_special = min(special)
    if not 0 <= text.min() <= text.max() < first_special:
        wrong = next(t for t in text.flatten().tolist() if not 0 <= t < first_special)
        raise ValueError(f"there is no class or token {wrong}: the model has those from 0 to {first_special - 1}")


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """Images uint8 `[N, H, W, C]` row by row, N a multiple of `columns`: one picture `[…, …, C]` with grey lines of a
    pixel around every image."""
    framed = np.pad(images, ((0, 0), (1, 0), (1, 0), (0, 0)), constant_values=_GREY)
    picture = rearrange(framed, "(r c) h w k -> (r h) (c w) k", c=columns)
    return np.pad(picture, ((0, 1), (0, 1), (0, 0)), constant_values=_GREY)


def save_png(picture: np.ndarray, path) -> None:
    """Writes a picture uint8 `[H, W, C]` (1 or 3 channels) as a PNG; small ones enlarged, pixels as squares."""
    factor = max(1, 512 // picture.shape[1])
    picture = picture.repeat(factor, 0).repeat(factor, 1)
    with path.open("wb") as file:
        to_pil(picture).save(file, "PNG")


def to_pil(picture: np.ndarray) -> Image.Image:
    """A picture uint8 `[H, W, C]` (1 or 3 channels) for PIL."""
    return Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture)

"""Pictures of many images."""

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from jetformer.models.jetformer import JetFormer

_GREY = 96
_ENLARGED = 512  # small pictures are enlarged to about this width
_LABEL_HEIGHT = 14


def check_tokens(text: Tensor, model: JetFormer) -> None:
    """Looks whether `text` `[B, T]` are tokens of the data, and none of the model's special ones.

    Raises:
      ValueError: if not.
    """
    first_special = model.first_special(text.shape[1])
    if not 0 <= text.min() <= text.max() < first_special:
        wrong = next(t for t in text.flatten().tolist() if not 0 <= t < first_special)
        raise ValueError(f"there is no class or token {wrong}: the model has those from 0 to {first_special - 1}")


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """Images uint8 `[N, H, W, C]` row by row, N a multiple of `columns`: one picture `[…, …, C]` with grey lines of a
    pixel around every image."""
    framed = np.pad(images, ((0, 0), (1, 0), (1, 0), (0, 0)), constant_values=_GREY)
    picture = rearrange(framed, "(r c) h w k -> (r h) (c w) k", c=columns)
    return np.pad(picture, ((0, 1), (0, 1), (0, 0)), constant_values=_GREY)


def enlarged(picture: np.ndarray) -> np.ndarray:
    """A small picture uint8 `[H, W, C]` some times larger, pixels as squares."""
    factor = max(1, _ENLARGED // picture.shape[1])
    return picture.repeat(factor, 0).repeat(factor, 1)


def labelled(images: np.ndarray, columns: int, labels: list[str]) -> np.ndarray:
    """Images uint8 `[R · columns, H, W, C]` as one picture of R rows, enlarged, each under its label."""
    rows = [enlarged(tile(row, columns)) for row in rearrange(images, "(r c) h w k -> r c h w k", c=columns)]
    parts = []
    for row, label in zip(rows, labels, strict=True):
        line = Image.new("L", (row.shape[1], _LABEL_HEIGHT), "white")
        # What PIL's own font can draw.
        text = label.encode("latin-1", "replace").decode("latin-1")
        ImageDraw.Draw(line).text((2, 1), text, fill="black", font=ImageFont.load_default())
        parts += [np.asarray(line)[..., None].repeat(row.shape[2], 2), row]
    return np.concatenate(parts)


def save_png(picture: np.ndarray, path) -> None:
    """Writes a picture uint8 `[H, W, C]` (1 or 3 channels) as a PNG."""
    with path.open("wb") as file:
        to_pil(picture).save(file, "PNG")


def to_pil(picture: np.ndarray) -> Image.Image:
    """A picture uint8 `[H, W, C]` (1 or 3 channels) for PIL."""
    return Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture)

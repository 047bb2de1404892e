"""Combines images into one picture.

Dimensions: N images, H × W × C image.
"""

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

_GREY = 96
_ENLARGED = 512  # approximate width of small pictures after enlargement
_LABEL_HEIGHT = 14


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """Arranges images uint8 `[N, H, W, C]` in rows of `columns`, which divides N, with grey lines around each: uint8
    `[…, …, C]`."""
    framed = np.pad(images, ((0, 0), (1, 0), (1, 0), (0, 0)), constant_values=_GREY)
    picture = rearrange(framed, "(r c) h w k -> (r h) (c w) k", c=columns)
    return np.pad(picture, ((0, 1), (0, 1), (0, 0)), constant_values=_GREY)


def enlarged(picture: np.ndarray) -> np.ndarray:
    """Enlarges a small picture uint8 `[H, W, C]` by an integer factor, with square pixels."""
    factor = max(1, _ENLARGED // picture.shape[1])
    return picture.repeat(factor, 0).repeat(factor, 1)


def labelled(images: np.ndarray, columns: int, labels: list[str]) -> np.ndarray:
    """Arranges images uint8 `[R · columns, H, W, C]` in R rows, enlarged, each under its label: uint8 `[…, …, C]`."""
    rows = [enlarged(tile(row, columns)) for row in rearrange(images, "(r c) h w k -> r c h w k", c=columns)]
    parts = []
    for row, label in zip(rows, labels, strict=True):
        line = Image.new("L", (row.shape[1], _LABEL_HEIGHT), "white")
        # PIL's own font draws Latin-1 only.
        text = label.encode("latin-1", "replace").decode("latin-1")
        ImageDraw.Draw(line).text((2, 1), text, fill="black", font=ImageFont.load_default())
        parts += [np.asarray(line)[..., None].repeat(row.shape[2], 2), row]
    return np.concatenate(parts)


def save_png(picture: np.ndarray, path) -> None:
    """Writes a picture uint8 `[H, W, C]` (1 or 3 channels) as a PNG."""
    with path.open("wb") as file:
        to_pil(picture).save(file, "PNG")


def to_pil(picture: np.ndarray) -> Image.Image:
    """Converts a picture uint8 `[H, W, C]` (1 or 3 channels) for PIL."""
    return Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture)

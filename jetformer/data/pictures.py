"""Decodes image files: the reference for training, evaluation and sampling.

No TensorFlow here, so that sampling does not need it. `preprocess.decode` decodes common files faster, to the same
pixels.
"""

import io
import struct

import fsspec
import numpy as np
from absl import logging
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

# Recognised by content, not by file name. PIL reads many more, some by starting other programs.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP")
# PIL's limit for reading without a warning: 256 MiB in RGB.
MAX_PIXELS = 89_478_485

# The inverse of each EXIF orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_picture(encoded: bytes, channels: int = 3, background: tuple[int, int, int] = (255, 255, 255)) -> np.ndarray:
    """Decodes an image file: its first frame, in its EXIF orientation, on a background.

    Args:
      encoded: the content of a JPEG, PNG, GIF, BMP or WebP file.
      channels: 3 is RGB; 1 is greyscale, 0.299 R + 0.587 G + 0.114 B.
      background: RGB from 0 to 255 behind transparent pixels.

    Returns:
      uint8 [H, W, channels]: the upper 8 of 16 bits; CMYK, palettes and greyscale as RGB; colour profiles are ignored.

    Raises:
      ValueError: the file has another format, is damaged, or has more than `MAX_PIXELS` pixels.
    """
    # PIL raises errors of a dozen kinds for damaged files.
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            if image.width * image.height <= MAX_PIXELS:
                return _pixels(image, channels, background)
            size = f"{image.width} × {image.height}"
    except UnidentifiedImageError:
        found = "is empty" if not encoded else f"begins with {encoded[:8]!r}"
        raise ValueError(f"the file {found}: use a JPEG, PNG, GIF, BMP or WebP file") from None
    except Image.DecompressionBombError:
        size = "too many"
    except Exception as error:
        raise ValueError(f"the file is damaged ({type(error).__name__}: {error}): replace it") from error
    raise ValueError(f"the image has {size} pixels, the limit is {MAX_PIXELS:,}: make it smaller")


def _pixels(image: Image.Image, channels: int, background: tuple[int, int, int]) -> np.ndarray:
    image.load()
    orientation = _orientation(image.info.get("exif", b""))
    if image.mode.startswith("I"):  # greyscale of 16 bits, which PIL would clip at 255
        grey = np.asarray(image)
        eight = Image.fromarray((grey >> 8).astype(np.uint8))
        if (transparent := image.info.get("transparency")) is not None:
            eight.putalpha(Image.fromarray(np.where(grey == transparent, 0, 255).astype(np.uint8)))
        image = eight
    if image.has_transparency_data:
        behind = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(behind, image.convert("RGBA"))
    image = image.convert("RGB")
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    pixels = np.asarray(image)
    return pixels if channels == 3 else np.asarray(image.convert("L"))[..., None]


def _orientation(exif: bytes) -> int | None:
    """Returns the EXIF orientation; None if there is none or it cannot be read."""
    tags = Image.Exif()
    try:
        tags.load(exif)
    except (SyntaxError, struct.error):
        return None
    return tags.get(ExifTags.Base.Orientation)


def read_pictures(
    pattern: str, shape: tuple[int, int, int], background: tuple[int, int, int]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Reads image files for a model. Images of another size are resized and cropped, with a warning.

    Args:
      pattern: a path, or a pattern of paths, that fsspec opens.
      shape: (H, W, C) of the model.
      background: RGB from 0 to 255 behind transparent pixels.

    Returns:
      Images uint8 [H, W, C] by path; and the paths of files that cannot be read, for which warnings give the reasons.

    Raises:
      ValueError: there is no such file.
    """
    height, width, channels = shape
    fs, _, paths = fsspec.get_fs_token_paths(pattern)
    paths = [path for path in sorted(paths) if fs.isfile(path)]
    if not paths:
        raise ValueError(f"{pattern}: there is no such file")
    images, unreadable = {}, []
    for path in paths:
        try:
            pixels = decode_picture(fs.cat_file(path), channels, background)
        except (OSError, ValueError) as error:
            logging.warning("%s cannot be read and is skipped: %s", path, error)
            unreadable.append(path)
            continue
        if pixels.shape[:2] != (height, width):
            image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
            logging.warning("%s is %d × %d, resized and cropped to %d × %d", path, *image.size, width, height)
            pixels = np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))
        images[path] = pixels.reshape(shape)
    return images, unreadable

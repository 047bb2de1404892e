"""Decoding image files: every format, by both decoders; damaged and too large files."""

import dataclasses
import functools
import io
import resource
import struct
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

import trees
from jetformer.data import preprocess
from jetformer.data.dataset import Data
from jetformer.data.pictures import MAX_PIXELS, decode_picture

SIZE = (21, 34)  # height, width
WHITE, BACKGROUND = (255, 255, 255), (10, 200, 90)


def rgba(seed: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Returns smooth colours uint8 [H, W, 4] of every opacity."""
    blocks = np.random.default_rng(seed).integers(0, 256, (3, 3, 4), np.uint8)
    channels = [Image.fromarray(blocks[..., i]).resize(size[::-1], Image.Resampling.BICUBIC) for i in range(4)]
    return np.stack([np.asarray(channel) for channel in channels], -1)


def encoded(mode: str = "RGB", kind: str = "PNG", seed: int = 0, size: tuple[int, int] = SIZE, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rgba(seed, size)).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def by_pil(file: bytes, mode: str) -> np.ndarray:
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.convert(mode))


def png_of_16_bits(pixels: np.ndarray, transparent: bytes = b"") -> bytes:
    """Returns a PNG of uint16 [H, W, C]; `transparent` is the content of a tRNS chunk."""
    file = tf.io.encode_png(pixels).numpy()
    return file[:33] + trees.png_chunk(b"tRNS", transparent) + file[33:] if transparent else file


def exif(orientation: int, order: str = "<") -> bytes:
    tags = Image.Exif()
    tags.endian = order
    tags[0x010F], tags[0x0112] = "a camera", orientation
    return tags.tobytes()


def animation() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.fromarray(rgba(seed)).convert("RGB").quantize(32) for seed in (0, 1)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


@functools.cache
def graph(**options):
    """Applies the op to bytes, as in a pipeline."""
    op = preprocess.decode(**options)
    return tf.function(
        lambda image: op({"image": image})["image"], input_signature=[tf.TensorSpec([], tf.string)], autograph=False
    )


def decoded(file: bytes, **options) -> np.ndarray:
    """Returns the pixels, which both decoders agree on."""
    pixels = decode_picture(file, **options)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(graph(**options)(file), pixels)
    return pixels


GREY_16 = rgba()[..., :1].astype(np.uint16) * 257
FILES = {
    "JPEG": encoded("RGB", "JPEG"),
    "progressive JPEG": encoded("RGB", "JPEG", progressive=True),
    "grey JPEG": encoded("L", "JPEG"),
    "CMYK JPEG": encoded("CMYK", "JPEG"),
    "PNG": encoded("RGB"),
    "grey PNG": encoded("L"),
    "PNG of 1 bit": encoded("1"),
    "PNG with a palette": encoded("P"),
    "PNG with alpha": encoded("RGBA"),
    "grey PNG with alpha": encoded("LA"),
    "PNG of 16 bits": png_of_16_bits(rgba()[..., :3].astype(np.uint16) * 257),
    "grey PNG of 16 bits": png_of_16_bits(GREY_16),
    "GIF": encoded("P", "GIF"),
    "grey GIF": encoded("L", "GIF"),
    "animated GIF": animation(),
    "BMP": encoded("RGB", "BMP"),
    "BMP with a palette": encoded("P", "BMP"),
    "grey BMP": encoded("L", "BMP"),
    "WebP": encoded("RGB", "WEBP"),
    "lossless WebP": encoded("RGB", "WEBP", lossless=True),
    "WebP with alpha": encoded("RGBA", "WEBP", lossless=True, exact=True),
}


@pytest.mark.parametrize("background", [WHITE, BACKGROUND])
@pytest.mark.parametrize("kind", FILES)
def test_every_format_is_decoded_as_by_pil(kind, background):
    """Up to one level. (PIL turns 16-bit greyscale white.)"""
    if kind == "grey PNG of 16 bits":
        wanted = (GREY_16 >> 8).repeat(3, -1).astype(int)
    else:
        with_alpha = by_pil(FILES[kind], "RGBA").astype(float)
        alpha = with_alpha[..., 3:] / 255
        wanted = alpha * with_alpha[..., :3] + (1 - alpha) * background
    colour = decoded(FILES[kind], background=background).astype(int)
    assert colour.shape == (*SIZE, 3)
    assert np.abs(colour - wanted).max() <= 1
    grey = decoded(FILES[kind], background=background, channels=1).astype(int)
    assert grey.shape == (*SIZE, 1)
    assert np.abs(grey[..., 0] - wanted @ (0.299, 0.587, 0.114)).max() <= 1.5


def test_pictures_need_no_tensorflow():
    code = "import sys, jetformer.data.pictures; assert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_16_bits_are_not_white():
    ramp = (4 * np.arange(64, dtype=np.uint16)).repeat(8).reshape(8, 64, 1) * 256
    assert np.array_equal(decoded(png_of_16_bits(ramp), channels=1)[0, :, 0], ramp[0, :, 0] >> 8)


def test_a_colour_that_is_transparent():
    """In PNGs without an alpha channel, and in GIFs."""
    pixels = np.zeros((*SIZE, 3), np.uint8)
    pixels[:5], pixels[5:] = (1, 2, 3), (9, 9, 9)
    images = {"RGB": (1, 2, 3), "L": 9}
    for mode, transparent in images.items():
        buffer = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(buffer, "PNG", transparency=transparent)
        found = decoded(buffer.getvalue(), background=BACKGROUND)
        there = slice(0, 5) if mode == "RGB" else slice(5, None)
        assert (found[there] == BACKGROUND).all()
        assert (found != BACKGROUND).any(-1).any()
    buffer = io.BytesIO()
    Image.fromarray(pixels).quantize(2).save(buffer, "GIF", transparency=0)
    found = decoded(buffer.getvalue(), background=BACKGROUND)
    colours = {tuple(colour) for colour in found.reshape(-1, 3).tolist()}
    assert colours in ({BACKGROUND, (1, 2, 3)}, {BACKGROUND, (9, 9, 9)})
    grey = png_of_16_bits(np.array([[[770], [1025]]], np.uint16), struct.pack(">H", 770))
    assert decoded(grey, background=BACKGROUND)[0].tolist() == [[*BACKGROUND], [4, 4, 4]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation(kind, order, orientation):
    file = encoded("RGB", kind, exif=exif(orientation, order))
    with Image.open(io.BytesIO(file)) as image:
        wanted = np.asarray(ImageOps.exif_transpose(image))
    assert wanted.shape[:2] == (SIZE[::-1] if orientation in (5, 6, 7, 8) else SIZE)
    np.testing.assert_array_equal(decoded(file), wanted)


def test_exif_that_cannot_be_read_is_ignored():
    for content in (b"Exif\0\0", b"Exif\0\0nonsense", exif(6)[:14], b""):
        np.testing.assert_array_equal(decoded(encoded("RGB", "JPEG", exif=content)), decoded(encoded("RGB", "JPEG")))


def test_jpegs_are_exact():
    """On average, the original pixels are restored; by the fast DCT they are darker."""
    errors = {True: [], False: []}
    for seed in range(8):
        noise = np.random.default_rng(seed).normal(0, 8, (96, 96, 3))
        known = (rgba(seed, (96, 96))[..., :3] * 0.8 + 25 + noise).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(known).save(buffer, "JPEG", quality=95, subsampling=0)
        for precise in errors:
            errors[precise].append(graph(precise=precise)(buffer.getvalue()).numpy().astype(int) - known)
        reference = tf.io.decode_image(buffer.getvalue(), channels=3)
        np.testing.assert_array_equal(graph(precise=False)(buffer.getvalue()), reference)
    assert abs(np.mean(errors[True])) < 0.05
    assert np.std(errors[True]) < np.std(errors[False])


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    kind=st.sampled_from(["JPEG", "PNG"]),
    mode=st.sampled_from(["L", "RGB"]),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    quality=st.integers(1, 100),
    subsampling=st.integers(0, 2),
    progressive=st.booleans(),
    orientation=st.sampled_from([None, 1, 6]),
    channels=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
def test_both_decoders_agree(kind, mode, size, quality, subsampling, progressive, orientation, channels, seed):
    options = {"quality": quality, "subsampling": subsampling, "progressive": progressive} if kind == "JPEG" else {}
    if orientation is not None:
        options["exif"] = exif(orientation)
    decoded(encoded(mode, kind, seed, size, **options), channels=channels)


# ---- Files that are damaged, or too large. -------------------------------------------------------


def check(file: bytes) -> None:
    """Bytes are a one-line error or a picture; the op returns the same picture, or fails."""
    pixels, said = None, None
    try:
        pixels = decode_picture(file)
    except ValueError as error:
        said = str(error)
    assert said is None or (said and "\n" not in said)
    try:
        found = graph()(file)
    except tf.errors.InvalidArgumentError:
        return
    np.testing.assert_array_equal(found, pixels)


PLACES = st.floats(0, 0.999)  # in a file


@settings(deadline=None, max_examples=400, derandomize=True)
@given(
    kind=st.sampled_from(sorted(FILES)),
    cut=st.none() | PLACES,
    flips=st.lists(st.tuples(PLACES, st.integers(0, 7)), max_size=4),
    inserted=st.tuples(PLACES, st.binary(max_size=20)),
)
def test_damaged_files_are_pictures_or_errors(kind, cut, flips, inserted):
    file = bytearray(FILES[kind])
    for place, bit in flips:
        file[int(place * len(file))] ^= 1 << bit
    place, content = inserted
    file[int(place * len(file)) : int(place * len(file))] = content
    check(bytes(file) if cut is None else bytes(file[: int(cut * len(file))]))


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.sampled_from([file[:n] for file in FILES.values() for n in (0, 12, 30)]), st.binary(max_size=200))
def test_random_bytes_are_errors(beginning, content):
    check(beginning + content)


def bomb(kind: str) -> bytes:
    """Returns a small file whose header says 20,000 × 20,000 pixels."""
    if kind == "PNG of 1 bit":
        return trees.png_of_zeros(20_000, 20_000)
    file = encoded("L" if kind == "GIF" else "RGB", kind, size=(513, 514))
    if kind == "PNG":
        header = struct.pack(">II", 20_000, 20_000) + file[24:29]
        return file[:8] + trees.png_chunk(b"IHDR", header) + file[33:]
    if kind == "JPEG":
        return file.replace(struct.pack(">HH", 513, 514), 2 * struct.pack(">H", 20_000), 1)
    if kind == "GIF":
        return file.replace(struct.pack("<HH", 514, 513), 2 * struct.pack("<H", 20_000))
    return file.replace(struct.pack("<ii", 514, 513), 2 * struct.pack("<i", 20_000), 1)


@pytest.mark.parametrize("kind", ["PNG of 1 bit", "PNG", "JPEG", "GIF", "BMP"])
def test_a_decompression_bomb(kind, tmp_path):
    """In a folder: an error of one line with file name and limit, in little memory."""
    root = trees.plant(tmp_path / "root", {"train/a": 6})
    path = root / "train/a/003.png"
    path.write_bytes(bomb(kind))
    data = Data(f"folder:{root}", pp="decode|keep('image')", eval_split="train", data_dir=str(tmp_path / "data"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=f"{MAX_PIXELS:,}") as error:
        list(data.eval_batches(batch_size=6))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert dataclasses.replace(data, skip_broken=True).num_examples() == 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB; the pixels are 1.2 GB


@pytest.mark.parametrize(
    ("content", "says"), [(b"", "is empty"), (b"no image", "b'no image'"), (FILES["WebP"][:200], "replace")]
)
def test_a_broken_file_is_named_in_one_line(content, says, tmp_path):
    root = trees.plant(tmp_path / "root", {"train/a": 3})
    (root / "train/a/001.webp").write_bytes(content)
    data = Data(f"folder:{root}", pp="decode|keep('image')", eval_split="train", data_dir=str(tmp_path / "data"))
    with pytest.raises(ValueError, match=r"train/a/001\.webp of .* cannot be preprocessed") as error:
        list(data.eval_batches(batch_size=4))
    assert "\n" not in str(error.value)
    assert "Traceback" not in str(error.value)
    assert says in str(error.value)

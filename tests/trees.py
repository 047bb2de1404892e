"""Folders of small images, for tests."""

import io
import os
import pathlib
import struct
import zlib

import numpy as np
from PIL import Image


def image(seed: int, size=(14, 12), mode="RGB", kind="PNG") -> bytes:
    """An encoded image of random blocks, height × width."""
    blocks = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), np.uint8)
    picture = Image.fromarray(blocks).resize(size[::-1], Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    picture.convert(mode).save(buffer, kind)
    return buffer.getvalue()


def png_of_zeros(height: int, width: int) -> bytes:
    """A PNG of 1 bit, all black."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(height * (1 + -(-width // 8))), 1)
    chunks = (b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*pair) for pair in chunks)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def plant(root: pathlib.Path, counts: dict[str, int], kind="PNG") -> pathlib.Path:
    """Writes so many images into each `split/class`, as if that had been a while ago."""
    for number, (directory, count) in enumerate(counts.items()):
        (root / directory).mkdir(parents=True)
        for i in range(count):
            (root / directory / f"{i:03d}.{kind.lower()}").write_bytes(image(1000 * number + i, kind=kind))
    age(root)
    return root


def age(root: pathlib.Path, seconds: float = 3600) -> None:
    """Makes all directories look as if they had last been changed before this."""
    for directory in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        time = directory.stat().st_mtime - seconds
        os.utime(directory, (time, time))

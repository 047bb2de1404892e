"""Captions of a folder's images: `image.txt` beside `image.jpg`, or `metadata.jsonl` in the directory of a split."""

import json
import posixpath
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from etils import epath

METADATA_FILE = "metadata.jsonl"  # of Hugging Face's `imagefolder`
TEXT_SUFFIX = ".txt"

_READERS = 16  # files read at a time: storage may be far away


def read_texts(paths: Sequence[str]) -> list[list[bytes]]:
    """Returns the captions of each text file: its lines.

    Raises:
      ValueError: a file is not UTF-8, or has an empty caption.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(_read_text, paths))


def _read_text(path: str) -> list[bytes]:
    lines = _read(path).rstrip("\r\n").split("\n")
    return [_checked(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def read_metadata(path: str, images: set[str]) -> dict[str, list[bytes]]:
    """Reads `metadata.jsonl`: a line `{"file_name": …, "text": …}` for each image, with one caption or a list.

    Args:
      path: of the file.
      images: that it may name, relative to its directory.

    Returns:
      The captions of each image that it names.

    Raises:
      ValueError: the file is not UTF-8, or a line has another form, an empty caption, or names no image or one that an
        earlier line names.
    """
    found: dict[str, list[bytes]] = {}
    for number, line in enumerate(_read(path).rstrip().split("\n"), start=1):
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f'{where} is not an object {{"file_name": …, "text": …}}')
        for key in ("file_name", "text"):
            if key not in row:
                raise ValueError(f"{where} has no {key!r}, only {', '.join(map(repr, row)) or 'an empty object'}")
        name, texts = row["file_name"], row["text"]
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(name, str) or posixpath.normpath(name) not in images:
            raise ValueError(f"{where} names {name!r}: there is no such image")
        name = posixpath.normpath(name)
        if name in found:
            raise ValueError(f"{where} names {name!r} again: write several captions as a list in one line")
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{where} has 'text' {texts!r}: expected a caption, or a list of captions")
        found[name] = [_checked(text, where) for text in texts]
    return found


def _read(path: str) -> str:
    try:
        return epath.Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): convert it") from error


def _checked(text: str, where: str) -> bytes:
    """Returns a caption in UTF-8; `where` names its place in messages."""
    text = text.strip()
    if not text:
        raise ValueError(f"{where} has an empty caption: describe the image, or remove it")
    try:
        return text.encode()
    except UnicodeEncodeError as error:  # JSON can write half of a character
        raise ValueError(f"{where} has a caption that is not UTF-8 ({error.reason})") from error

"""Files that others read while they are written, and where files are that an experiment names."""

import os
import pathlib
import uuid

from etils import epath
from upath import UPath

_PROJECT = pathlib.Path(__file__).parent.parent


def find(path: str) -> UPath | pathlib.Path:
    """A file that an experiment names by its path or a URL that fsspec opens (gs://…). It is looked for as gin files
    are, from here and from the project's root."""
    found = UPath(path)
    if isinstance(found, os.PathLike) and not found.is_absolute() and not found.exists():
        return _PROJECT / found
    return found


def write_whole(path: UPath | epath.Path, content: str | bytes) -> None:
    """Writes a file such that nobody ever sees a part of it, whoever else writes it at the same time; a kill leaves the
    old one or the new one."""
    content = content.encode() if isinstance(content, str) else content
    if "://" in str(path):  # an object store shows an object when it is whole
        path.write_bytes(content)
        return
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or a power cut may leave the new name, and nothing in the file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)

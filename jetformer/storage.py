"""Files that others read while they are written."""

import os
import uuid

from etils import epath
from upath import UPath


def write_whole(path: UPath | epath.Path, content: str | bytes) -> None:
    """Writes a file such that nobody ever sees a part of it, whoever else writes it at the same time; a kill leaves the
    old one or the new one."""
    content = content.encode() if isinstance(content, str) else content
    if "://" in str(path):  # an object store shows an object when it is whole
        path.write_bytes(content)
        return
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)

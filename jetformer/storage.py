"""Reads and writes whole files: local, or on an object store (gs://…)."""

import io
import os
import pathlib
import sysconfig
import uuid
import zipfile

import numpy as np
from etils import epath
from upath import UPath

# Where the project's experiments are: in a clone, or where a wheel installs them.
_PROJECTS = (pathlib.Path(__file__).parent.parent, pathlib.Path(sysconfig.get_path("data"), "share", "jetformer"))
PLACES = tuple(place for project in _PROJECTS for place in (project, project / "experiments"))


def find(path: str) -> UPath | pathlib.Path:
    """Returns where a file is that an experiment names by a path or a URL that fsspec opens (gs://…). As with gin
    files, a relative path is searched for in the working directory, then in `PLACES`."""
    found = UPath(path)
    if isinstance(found, os.PathLike) and not found.is_absolute() and not found.exists():
        return next((place / found for place in PLACES if (place / found).exists()), PLACES[0] / found)
    return found


def write_whole(path: UPath | epath.Path, content: str | bytes) -> None:
    """Writes a file atomically: readers and concurrent writers never see a part of it, and a kill leaves the old file
    or the new one."""
    content = content.encode() if isinstance(content, str) else content
    if "://" in str(path):  # an object store shows an object once it is complete
        path.write_bytes(content)
        return
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # otherwise a power failure may leave an empty file under the new name
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_beside_data(path: epath.Path, content: bytes) -> None:
    """Writes a file that belongs to a dataset, such as an index, atomically; creates its directory.

    Raises:
      ValueError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error}): set Data.data_dir to a directory you can write to") from error


def arrays_to_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """Returns named arrays as the content of an .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def read_arrays(path: epath.Path) -> dict[str, np.ndarray]:
    """Reads all arrays of an .npz file.

    Raises:
      ValueError: it is not an .npz file, or is damaged.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged: delete it, and it is created again ({error})") from error

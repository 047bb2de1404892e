"""What is kept beside the data: indices, and what was found when all examples were looked at."""

import io
import zipfile

import numpy as np
from etils import epath

from jetformer.storage import write_whole


def write_arrays(path: epath.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes named arrays as a file that is there whole or not at all; makes its directory.

    Raises:
      ValueError: if it cannot be written.
    """
    write(path, to_bytes(arrays))


def to_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """Named arrays as what `read_arrays` reads."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def read_arrays(path: epath.Path) -> dict[str, np.ndarray]:
    """Reads what `write_arrays` has written.

    Raises:
      ValueError: if it is something else.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged: delete it, and it is made again ({error})") from error


def write(path: epath.Path, data: bytes) -> None:
    """Writes a file that is there whole or not at all, whoever else writes it; makes its directory.

    Raises:
      ValueError: if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error}): set Data.data_dir to a place of your own") from error

"""Folders of images, `root/split/class/image`, with an index.

A folder is listed once, into an index file. Later starts only check the modification time of each directory, which
changes when a file in it is added, removed or renamed, and list again those that have changed. (It does not change when
a file's contents do, and need not: files are read when they are needed.) Object stores (gs://…) have no such times:
there the index is valid until it is deleted.

Examples of a split are ordered by a hash of their names: a slice such as `train[:10%]` has examples of all classes, and
stays nearly the same when files are added.
"""

import collections
import hashlib
import os
import re
import time
from collections.abc import Iterator

import numpy as np
from absl import logging
from etils import epath

from jetformer.storage import arrays_to_bytes, read_arrays, write_beside_data

# Of `pictures.FORMATS`.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")

_FORMAT = 2  # of an index, and of which files it lists
# Resolution of file systems' clocks, in ns: a directory changed more recently may change again under the same time.
_TICK = 2_000_000_000
_UNKNOWN = -1  # a time that no directory has


class Folder:
    """The index of a folder of images.

    Attributes:
      root: the folder.
      splits: number of images of each split, by name.
      classes: names of the classes of all splits, sorted; their positions are the labels.

    Args:
      root: the folder: a local path, in which `~` is expanded, or a URL that TensorFlow reads.
      index_dir: where the index is kept.

    Raises:
      ValueError: there is no such folder, it has no splits, classes or images, or the index cannot be written.
    """

    def __init__(self, root: str, index_dir: str):
        path = epath.Path(root).expanduser()
        self.root = os.fspath(path)
        local = not re.match(r"\w+://", self.root)
        if local:
            self.root = os.path.abspath(self.root)
        name = hashlib.sha256(self.root.encode()).hexdigest()[:16]
        self._index = epath.Path(index_dir).expanduser() / f"{os.path.basename(self.root.rstrip('/'))}-{name}.npz"
        known: dict[str, np.ndarray] = {}
        if self._index.exists():
            try:
                known = read_arrays(self._index)
            except ValueError as error:
                logging.warning("%s", error)
        if known and int(known["format"]) != _FORMAT:
            known = {}
        if known and not local:
            logging.info("Folder %s is read by its index %s: delete that to list it again", self.root, self._index)
            self._arrays = known
        else:
            times = _local_directories(self.root) if local else _remote_directories(self.root)
            if not known or times != _times(known):
                self._arrays = _listed(self.root, times, known, local)
                write_beside_data(self._index, arrays_to_bytes(self._arrays))
            else:
                self._arrays = known
        self.classes = tuple(self._arrays["classes"].tolist())
        self.splits = {name: len(self._arrays[f"files/{i}"]) for i, name in enumerate(self._arrays["splits"].tolist())}

    @property
    def fingerprint(self) -> str:
        """A string that changes when files or directories are added, removed or renamed."""
        digest = hashlib.sha256(self._arrays["names"].tobytes())
        for key in ("directories", "starts", "directory_of"):
            digest.update(self._arrays[key].tobytes())
        return digest.hexdigest()[:16]

    def state(self) -> str:
        """Returns a string that changes with the size or modification time of any file; "" if the folder is not
        local."""
        if "://" in self.root:
            return ""
        digest = hashlib.sha256()
        for directory in self.directories():
            with os.scandir(os.path.join(self.root, directory)) as entries:
                for entry in sorted(entries, key=lambda e: e.name):
                    stat = entry.stat()
                    digest.update(os.fsencode(f"{entry.name}/{stat.st_size}/{stat.st_mtime_ns}/"))
        return digest.hexdigest()[:16]

    def directories(self) -> list[str]:
        """Returns `split/class` of all directories."""
        return self._arrays["directories"].tolist()

    def labels_of_directories(self) -> np.ndarray:
        """Returns the labels int64 of `directories`."""
        numbers = {name: i for i, name in enumerate(self.classes)}
        return np.array([numbers[directory.split("/", 1)[1]] for directory in self.directories()], np.int64)

    def names(self) -> bytes:
        """Returns the names of all files, concatenated."""
        return self._arrays["names"].tobytes()

    def files(self, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the images of a split, in order: numbers of their directories int32 [n], and starts int64 [n] and
        lengths int64 [n] of their names in `names`."""
        chosen = self._arrays[f"files/{list(self.splits).index(split)}"]
        starts = self._arrays["starts"]
        return self._arrays["directory_of"][chosen], starts[chosen], starts[chosen + 1] - starts[chosen]

    def labels(self, split: str) -> np.ndarray:
        """Returns the labels int64 [n] of a split."""
        return self.labels_of_directories()[self.files(split)[0]]


def _local_directories(root: str) -> dict[str, int]:
    """Returns modification times in ns of the directories `split` and `split/class`."""
    if not os.path.isdir(root):
        raise ValueError(
            f"there is no folder {root}: set Data.name to folder:/path/to/root, with images in root/train/class/"
        )
    now = time.time_ns()

    def subdirectories(directory: str) -> Iterator[tuple[str, int]]:
        with os.scandir(directory) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                if not entry.name.startswith(".") and entry.is_dir():
                    changed = entry.stat().st_mtime_ns
                    yield entry.name, changed if changed < now - _TICK else _UNKNOWN

    times = {}
    for split, changed in subdirectories(root):
        times[split] = changed
        for name, changed in subdirectories(os.path.join(root, split)):
            times[f"{split}/{name}"] = changed
    return times


def _remote_directories(root: str) -> dict[str, int]:
    path = epath.Path(root)
    if not path.exists():
        raise ValueError(
            f"there is no folder {root}: set Data.name to folder:gs://…/root, with images in root/train/class/"
        )
    times = {}
    for split in sorted(p.name for p in path.iterdir() if p.is_dir()):
        times[split] = _UNKNOWN
        times |= {f"{split}/{p.name}": _UNKNOWN for p in sorted((path / split).iterdir()) if p.is_dir()}
    return times


def _times(arrays: dict[str, np.ndarray]) -> dict[str, int] | None:
    """Returns the times of an index's directories; None if some are unknown."""
    times = arrays["times"].tolist()
    return None if _UNKNOWN in times else dict(zip(arrays["looked_at"].tolist(), times, strict=True))


def _listed(root: str, times: dict[str, int], known: dict[str, np.ndarray], local: bool) -> dict[str, np.ndarray]:
    """Returns an index of a folder; directories that have not changed are taken from the `known` index."""
    start = time.perf_counter()
    directories = [name for name in times if "/" in name]
    if not times:
        raise ValueError(f"folder {root} has no splits: put images into {root}/train/<class>/ and {root}/val/<class>/")
    if not directories:
        raise ValueError(
            f"folder {root} has no classes: its images must be in {root}/<split>/<class>/, but {', '.join(times)} has "
            f"only files. If there are no classes, create one: {root}/{next(iter(times))}/all/"
        )
    classes = sorted({name.split("/", 1)[1] for name in directories})
    before = _names_of_directories(known) if known else {}
    known_times = dict(zip(known["looked_at"].tolist(), known["times"].tolist(), strict=True)) if known else {}
    others: collections.Counter[str] = collections.Counter()
    names: list[list[bytes]] = []
    for directory in directories:
        if times[directory] != _UNKNOWN and known_times.get(directory) == times[directory]:
            names.append(before[directory])
        else:
            names.append(_images(os.path.join(root, directory), others, local))
    if not any(names):
        raise ValueError(f"folder {root} has {len(classes)} classes, but no image ({', '.join(EXTENSIONS)}) in them")
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5))
        logging.warning("Folder %s: ignored files other than %s: %s", root, ", ".join(EXTENSIONS), kinds)
    empty = [directory for directory, found in zip(directories, names, strict=True) if not found]
    if empty:
        shown = ", ".join(empty[:5]) + (", …" if len(empty) > 5 else "")
        logging.warning("Folder %s: %d classes have no images: %s", root, len(empty), shown)

    splits = list(dict.fromkeys(name.split("/", 1)[0] for name in directories))
    counts = np.array([len(found) for found in names], np.int64)
    flat = [name for found in names for name in found]
    lengths = np.fromiter(map(len, flat), np.int64, len(flat))
    directory_of = np.repeat(np.arange(len(directories), dtype=np.int32), counts)
    # A hash of split/class/name: the order is the same on all machines.
    keys = np.empty(len(flat), np.uint64)
    for i, (number, name) in enumerate(zip(directory_of.tolist(), flat, strict=True)):
        path = os.fsencode(directories[number]) + b"/" + name
        keys[i] = int.from_bytes(hashlib.blake2b(path, digest_size=8).digest(), "little")
    split_of = np.array([splits.index(name.split("/", 1)[0]) for name in directories])[directory_of]
    order = np.argsort(keys, kind="stable")
    index = {
        "format": np.array(_FORMAT),
        "looked_at": np.array(list(times)),
        "times": np.array(list(times.values()), np.int64),
        "splits": np.array(splits),
        "classes": np.array(classes),
        "directories": np.array(directories),
        "directory_of": directory_of,
        "names": np.frombuffer(b"".join(flat), np.uint8),
        "starts": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    }
    for i in range(len(splits)):
        index[f"files/{i}"] = order[split_of[order] == i]
    seconds = time.perf_counter() - start
    logging.info("Folder %s: %d images of %d classes, listed in %.1f s", root, len(flat), len(classes), seconds)
    return index


def _names_of_directories(arrays: dict[str, np.ndarray]) -> dict[str, list[bytes]]:
    names, starts = arrays["names"].tobytes(), arrays["starts"].tolist()
    found: dict[str, list[bytes]] = {directory: [] for directory in arrays["directories"].tolist()}
    lists = list(found.values())
    for i, number in enumerate(arrays["directory_of"].tolist()):
        lists[number].append(names[starts[i] : starts[i + 1]])
    return found


def _images(directory: str, others: collections.Counter[str], local: bool) -> list[bytes]:
    """Returns the names of the images in a directory, sorted; counts other files in `others`, by kind."""
    if local:
        with os.scandir(directory) as entries:
            found = [(entry.name, entry.is_file()) for entry in entries if not entry.name.startswith(".")]
    else:
        found = [(path.name, True) for path in epath.Path(directory).iterdir()]
    images = []
    for name, is_file in found:
        extension = os.path.splitext(name)[1].lower()
        if is_file and extension in EXTENSIONS:
            images.append(os.fsencode(name))
        else:
            others[(extension or "without an extension") if is_file else "directories"] += 1
    return sorted(images)

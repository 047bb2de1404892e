"""Folders of images, `root/split/class/image`, with an index that is kept.

What a folder holds is listed once and written down. From then on a start looks only at the modification time of each
directory, which changes when a file in it is added, removed or renamed, and lists anew those that have changed. (It
does not change when a file's contents do, and need not: files are read when they are needed.) An object store (gs://…)
has no such times: there the index holds until it is deleted.

Examples of a split are in an order of their own, by a hash of their names: a slice as `train[:10%]` has examples of all
classes, and stays nearly the same where files are added.
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

from jetformer.data.files import read_arrays, write_arrays

# Of `pictures.FORMATS`.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")

_FORMAT = 2  # of an index, and of which files it lists
# A directory may change without a new time soon after its last change: clocks of file systems tick this seldom, in ns.
_TICK = 2_000_000_000
_UNKNOWN = -1  # a time that no directory has


class Folder:
    """What a folder of images holds.

    Attributes:
      root: the folder.
      splits: how many images each split has, by name.
      classes: names of the classes, sorted: the label of a class is its place here. A class of one split is one of all.

    Args:
      root: the folder, `~` is expanded; a local path, or a URL that TensorFlow reads.
      index_dir: where its index is kept.

    Raises:
      ValueError: there is no such folder, it has no splits, no classes or no images, or the index cannot be written.
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
            logging.info("Folder %s is as %s has it: delete that to have it listed again", self.root, self._index)
            self._arrays = known
        else:
            times = _local_directories(self.root) if local else _remote_directories(self.root)
            if not known or times != _times(known):
                self._arrays = _listed(self.root, times, known, local)
                write_arrays(self._index, self._arrays)
            else:
                self._arrays = known
        self.classes = tuple(self._arrays["classes"].tolist())
        self.splits = {name: len(self._arrays[f"files/{i}"]) for i, name in enumerate(self._arrays["splits"].tolist())}

    @property
    def fingerprint(self) -> str:
        """Changes when files or directories are added, removed or renamed."""
        digest = hashlib.sha256(self._arrays["names"].tobytes())
        for key in ("directories", "starts", "directory_of"):
            digest.update(self._arrays[key].tobytes())
        return digest.hexdigest()[:16]

    def state(self) -> str:
        """Returns what changes when the size or modification time of a file does; "" for a folder that is not local."""
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
        """`split/class` of all directories."""
        return self._arrays["directories"].tolist()

    def labels_of_directories(self) -> np.ndarray:
        """The labels int64 of `directories`."""
        numbers = {name: i for i, name in enumerate(self.classes)}
        return np.array([numbers[directory.split("/", 1)[1]] for directory in self.directories()], np.int64)

    def names(self) -> bytes:
        """The names of all files, one after the other."""
        return self._arrays["names"].tobytes()

    def files(self, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The images of a split, in its order: numbers of their directories int32 [n], and where in `names` their names
        are: starts int64 [n], lengths int64 [n]."""
        chosen = self._arrays[f"files/{list(self.splits).index(split)}"]
        starts = self._arrays["starts"]
        return self._arrays["directory_of"][chosen], starts[chosen], starts[chosen + 1] - starts[chosen]

    def labels(self, split: str) -> np.ndarray:
        """Labels int64 [n] of a split."""
        return self.labels_of_directories()[self.files(split)[0]]


def _local_directories(root: str) -> dict[str, int]:
    """Modification times in ns of `split/class` directories, and of splits themselves: as `split`."""
    if not os.path.isdir(root):
        raise ValueError(f"there is no folder {root}: give Data.name as folder:/path/to/root, with root/train/class/*")
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
        raise ValueError(f"there is no folder {root}: give Data.name as folder:gs://…/root, with root/train/class/*")
    times = {}
    for split in sorted(p.name for p in path.iterdir() if p.is_dir()):
        times[split] = _UNKNOWN
        times |= {f"{split}/{p.name}": _UNKNOWN for p in sorted((path / split).iterdir()) if p.is_dir()}
    return times


def _times(arrays: dict[str, np.ndarray]) -> dict[str, int] | None:
    """Of the directories of an index; None where some are not known."""
    times = arrays["times"].tolist()
    return None if _UNKNOWN in times else dict(zip(arrays["looked_at"].tolist(), times, strict=True))


def _listed(root: str, times: dict[str, int], known: dict[str, np.ndarray], local: bool) -> dict[str, np.ndarray]:
    """An index of a folder; directories that have not changed are taken from the index that is known."""
    start = time.perf_counter()
    directories = [name for name in times if "/" in name]
    if not times:
        raise ValueError(f"folder {root} has no splits: put images into {root}/train/<class>/ and {root}/val/<class>/")
    if not directories:
        raise ValueError(
            f"folder {root} has no classes: its images have to be in {root}/<split>/<class>/, and there is nothing in "
            f"{', '.join(times)} but files. Where there are no classes, make one: {root}/{next(iter(times))}/all/"
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
        raise ValueError(f"folder {root} has {len(classes)} classes, and no image ({', '.join(EXTENSIONS)}) in them")
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5))
        logging.warning("Folder %s: left out what is no %s: %s", root, ", ".join(EXTENSIONS), kinds)
    empty = [directory for directory, found in zip(directories, names, strict=True) if not found]
    if empty:
        shown = ", ".join(empty[:5]) + (", …" if len(empty) > 5 else "")
        logging.warning("Folder %s: %d classes have a label and no images: %s", root, len(empty), shown)

    splits = list(dict.fromkeys(name.split("/", 1)[0] for name in directories))
    counts = np.array([len(found) for found in names], np.int64)
    flat = [name for found in names for name in found]
    lengths = np.fromiter(map(len, flat), np.int64, len(flat))
    directory_of = np.repeat(np.arange(len(directories), dtype=np.int32), counts)
    # The same on all machines: a hash of split/class/name.
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
    """The names of the images in a directory, sorted; counts what else is there by kind."""
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
            others[(extension or "without a name's end") if is_file else "directories"] += 1
    return sorted(images)

"""Folders of images, `root/split/class/image`, with an index. Images may have captions, see `captions`.

A folder is listed once, into an index file. Later starts only check the modification time of each directory, which
changes when a file in it is added, removed or renamed, and list again those that have changed. (It does not change when
a file's contents do, and need not: images are read when they are needed.) The index holds captions, so they are read
again when the size or the time of any file of captions changes. Object stores (gs://…) have no such times: there the
index is valid until it is deleted.

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

from jetformer.data.captions import METADATA_FILE, TEXT_SUFFIX, read_metadata, read_texts
from jetformer.storage import arrays_to_bytes, read_arrays, write_beside_data

# Of `pictures.FORMATS`.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")

_FORMAT = 3  # of an index, and of which files it lists
# Resolution of file systems' clocks, in ns: a directory changed more recently may change again under the same time.
_TICK = 2_000_000_000
_UNKNOWN = -1  # a time that no directory has


class Folder:
    """The index of a folder of images.

    Attributes:
      root: the folder.
      splits: number of images of each split, by name.
      classes: names of the classes of all splits, sorted; their positions are the labels. Empty if images, which then
        must have captions, are in the directories of splits.
      captioned: whether images have captions.

    Args:
      root: the folder: a local path, in which `~` is expanded, or a URL that TensorFlow reads.
      index_dir: where the index is kept.

    Raises:
      ValueError: there is no such folder, it has no splits, classes or images, some images have captions and others
        none, captions cannot be read, or the index cannot be written.
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
            if not known or times != _times(known) or not _has_same_captions(self.root, known):
                self._arrays = _listed(self.root, times, known, local)
                write_beside_data(self._index, arrays_to_bytes(self._arrays))
            else:
                self._arrays = known
        self.captioned = "captions" in self._arrays
        self.classes = tuple(self._arrays["classes"].tolist())
        self.splits = {name: len(self._arrays[f"files/{i}"]) for i, name in enumerate(self._arrays["splits"].tolist())}

    @property
    def fingerprint(self) -> str:
        """A string that changes when files or directories are added, removed or renamed, or captions change."""
        digest = hashlib.sha256(self._arrays["names"].tobytes())
        captions = ("captions", "caption_lengths", "caption_starts") if self.captioned else ()
        for key in ("directories", "starts", "directory_of", *captions):
            digest.update(self._arrays[key].tobytes())
        return digest.hexdigest()[:16]

    def state(self) -> str:
        """Returns a string that changes with the size or modification time of any file; "" if the folder is not
        local."""
        if "://" in self.root:
            return ""
        return _state(self.root, self.directories())[0]

    def directories(self) -> list[str]:
        """Returns `split/class` of all directories; without classes, `split`."""
        return self._arrays["directories"].tolist()

    def labels_of_directories(self) -> np.ndarray:
        """Returns the labels int64 of `directories`. There must be classes."""
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

    def captions(self, split: str) -> tuple[list[bytes], np.ndarray]:
        """Returns the captions of a split, image by image, and where among them those of each image start and the last
        image's end, int64 [n + 1]. There must be captions."""
        blob, lengths = self._arrays["captions"].tobytes(), self._arrays["caption_lengths"]
        ends, firsts = np.cumsum(lengths).tolist(), self._arrays["caption_starts"]
        chosen = self._arrays[f"files/{list(self.splits).index(split)}"]
        numbers = [n for i in chosen.tolist() for n in range(firsts[i], firsts[i + 1])]
        texts = [blob[ends[n] - lengths[n] : ends[n]] for n in numbers]
        return texts, np.concatenate([[0], np.cumsum(firsts[chosen + 1] - firsts[chosen])]).astype(np.int64)

    def labels(self, split: str) -> np.ndarray:
        """Returns the labels int64 [n] of a split."""
        return self.labels_of_directories()[self.files(split)[0]]


def _state(root: str, directories: list[str], suffixes: tuple[str, ...] = ("",)) -> tuple[str, int]:
    """Returns a string that changes with the size or modification time of any file whose name ends in one of
    `suffixes`, and the newest of these times, in ns."""
    digest, newest = hashlib.sha256(), 0
    for directory in directories:
        with os.scandir(os.path.join(root, directory)) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                if entry.name.endswith(suffixes):
                    stat = entry.stat()
                    digest.update(os.fsencode(f"{entry.name}/{stat.st_size}/{stat.st_mtime_ns}/"))
                    newest = max(newest, stat.st_mtime_ns)
    return digest.hexdigest()[:16], newest


def _captions_state(root: str, directories: list[str]) -> str:
    """Returns a string that changes with any file of captions; "" if one may change again under the same time."""
    found = sorted({*directories, *(name.split("/", 1)[0] for name in directories)})
    state, newest = _state(root, found, (METADATA_FILE, TEXT_SUFFIX))
    return state if newest < time.time_ns() - _TICK else ""


def _has_same_captions(root: str, arrays: dict[str, np.ndarray]) -> bool:
    """Returns whether the captions are those of the index. (A folder that gets its first ones has changed
    directories.)"""
    if "captions" not in arrays:
        return True
    state = _captions_state(root, arrays["directories"].tolist())
    return state != "" and state == arrays["captions_state"].item()


def _local_directories(root: str) -> dict[str, int]:
    """Returns modification times in ns of the directories `split` and `split/class`, by name."""
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
    if not times:
        raise ValueError(f"folder {root} has no splits: put images into {root}/train/<class>/ and {root}/val/<class>/")
    splits = [name for name in times if "/" not in name]
    metadata = [split for split in splits if (epath.Path(root) / split / METADATA_FILE).exists()]
    directories = [name for name in times if "/" in name] or splits
    classes = sorted({name.split("/", 1)[1] for name in directories if "/" in name})
    before = _images_of_directories(known) if known else {}
    known_times = dict(zip(known["looked_at"].tolist(), known["times"].tolist(), strict=True)) if known else {}
    others: collections.Counter[str] = collections.Counter()
    # Of each directory: the names of its images, and whether each has a text file.
    names: list[list[tuple[bytes, bool]]] = []
    for directory in directories:
        if directory in before and times[directory] != _UNKNOWN and known_times.get(directory) == times[directory]:
            names.append(before[directory])
        else:
            names.append(_images(os.path.join(root, directory), others, local, "" if classes else METADATA_FILE))
    captioned = bool(metadata) or any(has_text for found in names for _, has_text in found)
    if not classes and not captioned:
        raise ValueError(
            f"folder {root} has no classes: its images must be in {root}/<split>/<class>/, or have captions, but "
            f"{', '.join(times)} has only files. If there are no classes, create one: {root}/{splits[0]}/all/"
        )
    if not any(names):
        where = f"{len(classes)} classes, but no image in them" if classes else "captions, but no image"
        raise ValueError(f"folder {root} has {where} ({', '.join(EXTENSIONS)})")
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5))
        logging.warning("Folder %s: ignored files other than %s: %s", root, ", ".join(EXTENSIONS), kinds)
    empty = [directory for directory, found in zip(directories, names, strict=True) if not found]
    if empty and classes:
        shown = ", ".join(empty[:5]) + (", …" if len(empty) > 5 else "")
        logging.warning("Folder %s: %d classes have no images: %s", root, len(empty), shown)

    splits = list(dict.fromkeys(name.split("/", 1)[0] for name in directories))
    counts = np.array([len(found) for found in names], np.int64)
    flat = [name for found in names for name, _ in found]
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
        "has_text": np.array([has_text for found in names for _, has_text in found], bool),
    }
    if captioned:
        state = _captions_state(root, directories) if local else ""  # from before they are read
        captions = _captions(root, dict(zip(directories, names, strict=True)), metadata)
        texts = [text for several in captions for text in several]
        index |= {
            "captions": np.frombuffer(b"".join(texts), np.uint8),
            "caption_lengths": np.array([len(text) for text in texts], np.int64),
            "caption_starts": np.cumsum([0, *map(len, captions)]).astype(np.int64),
            "captions_state": np.array(state),
        }
    for i in range(len(splits)):
        index[f"files/{i}"] = order[split_of[order] == i]
    seconds = time.perf_counter() - start
    what = f"{len(flat)} images of {len(classes)} classes" + (f", {len(texts)} captions" if captioned else "")
    logging.info("Folder %s: %s, listed in %.1f s", root, what, seconds)
    return index


def _images_of_directories(arrays: dict[str, np.ndarray]) -> dict[str, list[tuple[bytes, bool]]]:
    """Returns what `_images` returned for each directory of an index."""
    names, starts = arrays["names"].tobytes(), arrays["starts"].tolist()
    found: dict[str, list[tuple[bytes, bool]]] = {directory: [] for directory in arrays["directories"].tolist()}
    lists = list(found.values())
    pairs = zip(arrays["directory_of"].tolist(), arrays["has_text"].tolist(), strict=True)
    for i, (number, has_text) in enumerate(pairs):
        lists[number].append((names[starts[i] : starts[i + 1]], has_text))
    return found


def _captions(root: str, listed: dict[str, list[tuple[bytes, bool]]], metadata: list[str]) -> list[list[bytes]]:
    """Returns the captions of all images: of the splits in `metadata` by that file, of others by text files.

    Args:
      root: the folder.
      listed: the images of each directory, see `_images`.
      metadata: splits with a file of captions.

    Raises:
      ValueError: an image has no caption, or captions cannot be read.
    """
    by_split: dict[str, dict[str, list[bytes]]] = {}
    for split in metadata:
        images = {
            f"{directory}/{os.fsdecode(name)}".split("/", 1)[1]
            for directory, found in listed.items()
            for name, _ in found
            if directory.split("/", 1)[0] == split
        }
        by_split[split] = read_metadata(f"{root}/{split}/{METADATA_FILE}", images)
    captions: list[list[bytes] | None] = []
    text_files: list[str] = []
    for directory, found in listed.items():
        for name, has_text in found:
            split, image = f"{directory}/{os.fsdecode(name)}".split("/", 1)
            if split in by_split:
                captions.append(by_split[split].get(image))
            elif has_text:
                captions.append([])  # its number is reserved
                text_files.append(os.path.splitext(f"{root}/{split}/{image}")[0] + TEXT_SUFFIX)
            else:
                captions.append(None)
            if captions[-1] is None:
                where = METADATA_FILE if split in by_split else os.path.splitext(image)[0] + TEXT_SUFFIX
                raise ValueError(
                    f"{root}/{split}/{image} has no caption, but other images have: write one into {split}/{where}"
                )
    texts = iter(read_texts(text_files))
    return [several or next(texts) for several in captions]


def _images(directory: str, others: collections.Counter[str], local: bool, used: str) -> list[tuple[bytes, bool]]:
    """Returns the names of the images in a directory, sorted, and whether each has a text file; counts other files in
    `others`, by kind, except the one named `used`."""
    if local:
        with os.scandir(directory) as entries:
            found = [(entry.name, entry.is_file()) for entry in entries if not entry.name.startswith(".")]
    else:
        found = [(path.name, True) for path in epath.Path(directory).iterdir()]
    is_image = lambda name: os.path.splitext(name)[1].lower() in EXTENSIONS
    texts = {name for name, is_file in found if is_file and name.endswith(TEXT_SUFFIX)}
    images = sorted(os.fsencode(name) for name, is_file in found if is_file and is_image(name))
    text_of = lambda name: os.path.splitext(os.fsdecode(name))[0] + TEXT_SUFFIX
    known = {*map(os.fsdecode, images), *map(text_of, images), used}
    for name, is_file in found:
        if not is_file:
            others["directories"] += 1
        elif name not in known:
            others[os.path.splitext(name)[1].lower() or "without an extension"] += 1
    return [(name, text_of(name) in texts) for name in images]

"""Datasets as they are stored: a prepared TFDS dataset, or a folder of images.

A source has splits, each with a fixed order of examples. They are read as records: scalar strings that either hold an
example (of a TFRecord file, images still encoded) or say where to read it. `deserialize` turns a record into an
example.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator

import numpy as np
import requests
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging
from etils import epath
from tensorflow_datasets.core.download import downloader
from tensorflow_datasets.core.utils import tqdm_utils

import jetformer.data.builders  # noqa: F401 (registers the package's own datasets with TFDS)
from jetformer.data import huggingface, preprocess, webdataset
from jetformer.data.folder import Folder
from jetformer.errors import one_line
from jetformer.storage import arrays_to_bytes, read_arrays, write_beside_data

FOLDER = "folder:"
CACHE_DIR = "~/.cache/jetformer/datasets"

_GCS = "https://storage.googleapis.com"  # TFDS's mirror of prepared datasets
_SECONDS_TO_ANSWER = 10.0
_REASON_LENGTH = 300  # characters of another library's message in ours

# Files that a stream reads concurrently. The order of examples depends on it.
_CYCLE_LENGTH = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Shard:
    """Consecutive examples of a file, or some of them.

    Attributes:
      filename: of a TFRecord file; for a folder, its split.
      skip: number of examples before them in the file.
      take: number of examples to read.
      keep: bool [take], which of these to keep; None: all.
    """

    filename: str
    skip: int
    take: int
    keep: np.ndarray | None = None

    def __len__(self) -> int:
        return self.take if self.keep is None else int(np.count_nonzero(self.keep))

    def part(self, start: int, stop: int) -> "Shard":
        """Returns a shard of the examples from number `start` to before `stop`; there is at least one."""
        if self.keep is None:
            return Shard(self.filename, self.skip + start, stop - start)
        kept = np.flatnonzero(self.keep)[start:stop]
        first, end = int(kept[0]), int(kept[-1]) + 1
        return Shard(self.filename, self.skip + first, end - first, self.keep[first:end])

    def without(self, numbers: np.ndarray) -> "Shard":
        """Returns the shard without the examples of these numbers."""
        keep = np.ones(self.take, bool) if self.keep is None else self.keep.copy()
        keep[np.flatnonzero(keep)[numbers]] = False
        return Shard(self.filename, self.skip, self.take, keep)

    def with_only(self, chosen: np.ndarray) -> "Shard":
        """Returns the shard with only those examples that `chosen`, bool [take], marks."""
        keep = chosen if self.keep is None else self.keep & chosen
        return self if keep.all() else Shard(self.filename, self.skip, self.take, keep)

    def places(self) -> np.ndarray:
        """Returns the positions of the examples in `filename`: int64 [n]."""
        return self.skip + (np.arange(self.take) if self.keep is None else np.flatnonzero(self.keep))


def num_examples(shards: list[Shard]) -> int:
    """Returns the number of examples of all shards."""
    return sum(map(len, shards))


def cut(shards: list[Shard], start: int, stop: int) -> list[Shard]:
    """Returns shards of the examples from number `start` to before `stop`, which count over all shards."""
    found = []
    for shard in shards:
        first, last = max(start, 0), min(stop, len(shard))
        if first < last:
            found.append(shard.part(first, last))
        start, stop = start - len(shard), stop - len(shard)
    return found


def without(shards: list[Shard], numbers: np.ndarray) -> list[Shard]:
    """Returns the shards without the examples of these numbers int64 [n], which are sorted."""
    found, start = [], 0
    for shard in shards:
        first, last = np.searchsorted(numbers, (start, start + len(shard)))
        start += len(shard)
        found.append(shard.without(numbers[first:last] - (start - len(shard))) if first < last else shard)
    return [shard for shard in found if len(shard)]


def even_ends(total: int, count: int) -> list[int]:
    """Returns where each of `count` parts of `total` examples starts, and where the last ends; sizes differ by one."""
    size, rest = divmod(total, count)
    return [i * size + min(i, rest) for i in range(count + 1)]


class Source:
    """A dataset as it is stored.

    Attributes:
      name: as the user gives it.
      full_name: with its version, or another string that changes when the examples do.
      splits: TFDS's splits, which can be sliced.
      directory: where files about the dataset are kept.
      label_key: the feature that is the class; None if there is none, or several.
      class_names: names of the classes by label; None without `label_key`.
    """

    name: str
    full_name: str
    splits: tfds.core.splits.SplitDict
    directory: epath.Path
    label_key: str | None
    class_names: tuple[str, ...] | None

    def state(self) -> str:
        """Returns a string that changes when an example's bytes change but `full_name` does not."""
        return ""

    def shards(self, split: str) -> list[Shard]:
        """Returns the shards of a split.

        Raises:
          ValueError: there is no such split.
        """
        try:
            found = self.splits[split].file_instructions
        except ValueError as e:
            raise ValueError(
                f"dataset {self.full_name} has no split {split!r}; it has {', '.join(self.splits)}, and slices and "
                f"sums of these such as train[:90%] or train+test ({one_line(e)[:_REASON_LENGTH]})"
            ) from e
        return [Shard(str(s.filename), s.skip, s.take) for s in found if s.take > 0]

    def even_part(self, split: str, index: int, count: int) -> list[Shard]:
        """Returns the shards of one of `count` parts of a split, whose sizes differ by one example at most."""
        return self.shards(tfds.even_splits(split, count)[index])

    def read(self, shards: list[Shard]) -> tf.data.Dataset:
        """Returns records (scalar strings) in the order of the shards."""
        raise NotImplementedError

    def read_shuffled(self, shards: list[Shard], seed: tf.Tensor, buffer_size: int) -> tf.data.Dataset:
        """Returns the records in a random order, drawn by the integer [2] `seed`."""
        raise NotImplementedError

    def deserialize(self, record: tf.Tensor) -> dict[str, tf.Tensor]:
        """Returns the example of a record, images still encoded."""
        raise NotImplementedError

    def decode(self, record: tf.Tensor) -> dict[str, tf.Tensor]:
        """Returns the example of a record, images decoded."""
        raise NotImplementedError

    def labels(self, shard: Shard) -> np.ndarray:
        """Returns the labels int64 [take] of all examples in the range of a shard, whether kept or not. The first call
        may read the whole split."""
        raise NotImplementedError

    def places(self, shard: Shard, numbers: list[int]) -> list[str]:
        """Returns where in the dataset the examples of these numbers of a shard are, for messages."""
        raise NotImplementedError

    def describe(self, record: tf.Tensor) -> str:
        """Names the example of a record by its file name or its integer features, for messages."""
        example = self.deserialize(record)
        for key in ("filename", "file_name", "image/filename", "image/file_name"):
            if key in example:
                return os.fsdecode(example[key].numpy())
        numbers = (f"{key} {value.numpy()}" for key, value in example.items() if _is_integer(value))
        return f"an example ({', '.join(numbers)})"

    def keep_beside(self, name: str, data: bytes) -> epath.Path:
        """Writes a file about the dataset into `directory` or, if that is not writable, into a cache in the user's
        home. Returns where."""
        first, second = self._beside(name)
        try:
            write_beside_data(first, data)
            return first
        except ValueError as error:
            logging.info("%s", error)
        write_beside_data(second, data)
        return second

    def beside(self, name: str) -> epath.Path | None:
        """Returns the path that `keep_beside` has written; None if it does not exist."""
        return next((path for path in self._beside(name) if path.exists()), None)

    def _beside(self, name: str) -> tuple[epath.Path, epath.Path]:
        place = hashlib.sha256(os.fspath(self.directory).encode()).hexdigest()[:16]
        return self.directory / name, epath.Path(CACHE_DIR).expanduser() / place / name


class TfdsSource(Source):
    """A prepared TFDS dataset, stored as TFRecord.

    Raises:
      ValueError: it is not prepared, or not stored as TFRecord.
    """

    def __init__(self, name: str, data_dir: str | None):
        self.name = name
        self.builder = builder(name, data_dir)
        self.full_name = self.builder.info.full_name
        file_format = self.builder.info.file_format
        if not self.builder.is_prepared():
            raise ValueError(
                f"dataset {self.full_name} is not in {self.builder.data_dir}: set data_dir to where it is, or prepare "
                "it in one process first (Data.prepare)"
            )
        if file_format != tfds.core.FileFormat.TFRECORD:
            raise ValueError(
                f"dataset {name!r} is stored as {file_format.value}, but only tfrecord can be read: prepare it again "
                "with tfds build --file_format=tfrecord"
            )
        self.splits = self.builder.info.splits
        self.directory = epath.Path(self.builder.data_dir)
        self.features = self.builder.info.features
        labels = [key for key, feature in self.features.items() if isinstance(feature, tfds.features.ClassLabel)]
        self.label_key = "label" if "label" in labels else labels[0] if len(labels) == 1 else None
        self.class_names = None
        if self.label_key is not None:
            label = self.features[self.label_key]
            self.class_names = tuple(label.names) if label.num_classes else None
        self._known_labels: dict[str, np.ndarray] = {}
        self._encoded = {
            key: tfds.decode.SkipDecoding()
            for key, feature in self.features.items()
            if isinstance(feature, tfds.features.Image)
        }

    def read(self, shards):
        return self._read(shards, None)

    def read_shuffled(self, shards, seed, buffer_size):
        return self._read(shards, seed).shuffle(buffer_size, seed=seed[0], reshuffle_each_iteration=False)

    def _read(self, shards: list[Shard], shuffle_seed: tf.Tensor | None) -> tf.data.Dataset:
        """Returns records in order or, with a seed, interleaved from shuffled files."""
        if not shards:
            return tf.data.Dataset.from_tensor_slices(tf.constant([], tf.string))
        filenames = tf.constant([shard.filename for shard in shards])
        skips = tf.constant([shard.skip for shard in shards], tf.int64)
        takes = tf.constant([shard.take for shard in shards], tf.int64)
        order = tf.range(len(shards))
        if shuffle_seed is not None:
            order = tf.random.experimental.stateless_shuffle(order, shuffle_seed)
        chosen = any(shard.keep is not None for shard in shards)
        if chosen:
            keeps = [np.ones(shard.take, bool) if shard.keep is None else shard.keep for shard in shards]
            starts = tf.constant(np.cumsum([0, *map(len, keeps)])[:-1], tf.int64)
            keep = tf.constant(np.concatenate(keeps))

        def records(i: tf.Tensor) -> tf.data.Dataset:
            found = tf.data.TFRecordDataset(filenames[i]).skip(skips[i]).take(takes[i])
            if not chosen:
                return found
            start = starts[i]
            return found.enumerate().filter(lambda j, _: keep[start + j]).map(lambda _, record: record)

        return tf.data.Dataset.from_tensor_slices(order).interleave(
            records,
            cycle_length=1 if shuffle_seed is None else min(_CYCLE_LENGTH, len(shards)),
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        )

    def deserialize(self, record):
        return self.features.deserialize_example(record, decoders=self._encoded)

    def decode(self, record):
        example = self.deserialize(record)
        for key in self._encoded:
            example = preprocess.decode(1 if self.features[key].shape[-1] == 1 else 3, key=key)(example)
        return example

    def places(self, shard, numbers):
        return [f"example {i} of {os.path.basename(shard.filename)}" for i in shard.places()[numbers]]

    def labels(self, shard):
        split, start = self._starts[os.path.basename(shard.filename)]
        return self._labels(split)[start + shard.skip :][: shard.take]

    @functools.cached_property
    def _starts(self) -> dict[str, tuple[str, int]]:
        """For each file: its split, and the number of examples of the split before it."""
        found = {}
        for split, info in self.splits.items():
            starts = np.cumsum([0, *info.shard_lengths])
            found |= {
                os.path.basename(str(path)): (split, int(n)) for path, n in zip(info.filepaths, starts, strict=False)
            }
        return found

    def _labels(self, split: str) -> np.ndarray:
        if split not in self._known_labels:
            self._known_labels[split] = self._find_labels(split)
        return self._known_labels[split]

    def _find_labels(self, split: str) -> np.ndarray:
        key, name = self.label_key, f"labels-{split}.npz"
        if (path := self.beside(name)) is not None:
            found = read_arrays(path)
            if len(found["label"]) == self.splits[split].num_examples:
                return found["label"]
        logging.info("Reading the labels of %s, split %s, once", self.full_name, split)
        features = {key: tf.io.FixedLenFeature([], tf.int64)}
        ds = self.read(self.shards(split)).batch(1024)
        ds = ds.map(lambda records: tf.io.parse_example(records, features)[key], num_parallel_calls=tf.data.AUTOTUNE)
        labels = np.concatenate([np.zeros(0, np.int64), *ds.as_numpy_iterator()])
        self.keep_beside(name, arrays_to_bytes({"label": labels}))
        return labels


class FolderSource(Source):
    """A folder of images, see `folder.Folder`.

    An example has `image` and `filename`; with classes `label`; and with captions `captions`, strings [n]. Since files
    can be read in any order, an epoch is shuffled as a whole, without a buffer.
    """

    def __init__(self, name: str, data_dir: str | None):
        self.name = name
        self.directory = epath.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser() / "folder"
        self.folder = Folder(name.removeprefix(FOLDER), os.fspath(self.directory))
        self.full_name = f"{name}@{self.folder.fingerprint}"
        self.class_names = self.folder.classes or None
        self.label_key = "label" if self.folder.classes else None
        template = tfds.core.ShardedFileTemplate(data_dir=self.directory, template="{SPLIT}", split=None)
        self.splits = tfds.core.splits.SplitDict(
            [
                tfds.core.SplitInfo(
                    name=split, shard_lengths=[count], num_bytes=0, filename_template=template.replace(split=split)
                )
                for split, count in self.folder.splits.items()
                if count
            ]
        )
        directories = [os.path.join(os.fsencode(self.folder.root), os.fsencode(d)) for d in self.folder.directories()]
        self._directories = tf.constant(directories)
        self._labels = tf.constant(self.folder.labels_of_directories()) if self.folder.classes else None
        self._names = tf.constant(self.folder.names())
        arrays = lambda split: self.folder.files(split) + (self.folder.captions(split) if self.folder.captioned else ())
        self._files = {split: [tf.constant(array) for array in arrays(split)] for split in self.splits}

    def state(self):
        return self.folder.state()

    def shards(self, split):
        return [dataclasses.replace(s, filename=os.path.basename(s.filename)) for s in super().shards(split)]

    def _numbers(self, shards: list[Shard]) -> tf.Tensor:
        """Returns examples as numbers int64 [n]: position in the split · number of splits + number of the split."""
        order = list(self.splits)
        numbers = [shard.places() * len(order) + order.index(shard.filename) for shard in shards]
        return tf.constant(np.concatenate([np.zeros(0, np.int64), *numbers]))

    def read(self, shards):
        return tf.data.Dataset.from_tensor_slices(self._numbers(shards)).map(tf.strings.as_string)

    def read_shuffled(self, shards, seed, buffer_size):
        del buffer_size
        order = tf.random.experimental.stateless_shuffle(self._numbers(shards), seed)
        return tf.data.Dataset.from_tensor_slices(order).map(tf.strings.as_string)

    def _known(self, record: tf.Tensor) -> dict[str, tf.Tensor]:
        """Returns what the index knows of a record: all of its example except the image."""
        number = tf.strings.to_number(record, tf.int64)
        place, split = number // len(self._files), number % len(self._files)

        def in_split(directory_of, starts, lengths, captions=None, firsts=None):
            name = tf.strings.substr(self._names, starts[place], lengths[place], unit="BYTE")
            known = {"filename": tf.strings.join([self._directories[directory_of[place]], name], "/")}
            if self._labels is not None:
                known["label"] = self._labels[directory_of[place]]
            if captions is not None:
                known["captions"] = captions[firsts[place] : firsts[place + 1]]
            return known

        return tf.switch_case(
            tf.cast(split, tf.int32), [functools.partial(in_split, *arrays) for arrays in self._files.values()]
        )

    def deserialize(self, record):
        known = self._known(record)
        return {"image": tf.io.read_file(known["filename"]), **known}

    def describe(self, record):
        return os.fsdecode(self._known(record)["filename"].numpy())

    def decode(self, record):
        return preprocess.decode()(self.deserialize(record))

    def places(self, shard, numbers):
        records = self.read([shard.part(number, number + 1) for number in numbers])
        return [self.describe(record) for record in records]

    def labels(self, shard):
        return self.folder.labels(shard.filename)[shard.skip :][: shard.take]


_sources: dict[tuple[str, str | None], Source] = {}


def prepare(name: str, data_dir: str | None = None) -> None:
    """Downloads and prepares a dataset if that has not been done, and lists a folder if it has changed.

    If several processes share `data_dir`, one of them must call this before the others open the dataset.

    Raises:
      ValueError: there is no such dataset, or this machine cannot get it.
    """
    if name.startswith(FOLDER):
        _sources.pop((name, data_dir), None)
        open_source(name, data_dir)
        return
    found = builder(name, data_dir)
    if found.is_prepared():
        return
    try:
        with _at_once_offline(found):
            found.download_and_prepare()
    # Downloads, checksums, archives, packages, files to be put there by hand: each fails in its own way.
    except Exception as e:
        raise ValueError(
            f"dataset {name!r} is not in {found.data_dir} and cannot be prepared here: prepare it elsewhere and copy "
            f"it there, or set data_dir to where it is ({one_line(e)[:_REASON_LENGTH]})"
        ) from e


@contextlib.contextmanager
def _at_once_offline(found: tfds.core.DatasetBuilder) -> Iterator[None]:
    """Makes TFDS give up at once, without progress bars, if the dataset's server cannot be reached; it would try ten
    times, which takes minutes. It still runs: the files may have been downloaded before."""
    urls = list(found.url_infos or getattr(found, "urls_without_checksums", {}).values())
    if not urls or any(map(_answers, (urls[0], _GCS))):
        yield
        return
    retries, active = downloader.MAX_RETRIES, tqdm_utils._active
    downloader.MAX_RETRIES = 0
    tfds.display_progress_bar(False)
    try:
        yield
    finally:
        downloader.MAX_RETRIES = retries
        tfds.display_progress_bar(active)


def _answers(url: str) -> bool:
    """Returns whether a server answers, even with an error."""
    try:
        requests.head(url, timeout=_SECONDS_TO_ANSWER)
    except requests.ConnectionError:
        return False
    except requests.RequestException:  # as for ftp://, which only a download can tell
        return True
    return True


def open_source(name: str, data_dir: str | None = None) -> Source:
    """Opens a prepared dataset; a process opens it once, until it is prepared again.

    Args:
      name: a TFDS dataset, `huggingface:owner/name`, `folder:/path` or `webdataset:/path/{000..099}.tar`.
      data_dir: where TFDS keeps its data; None is its default.

    Raises:
      ValueError: as `prepare`; the dataset is not prepared, or not stored as TFRecord.
    """
    key = name, data_dir
    if key not in _sources:
        _sources[key] = (FolderSource if name.startswith(FOLDER) else TfdsSource)(name, data_dir)
    return _sources[key]


def builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """Returns the TFDS builder of a dataset.

    Raises:
      ValueError: there is no such dataset.
    """
    for module in (huggingface, webdataset):
        if name.startswith(module.PREFIX):
            return module.builder(name, data_dir)
    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as e:
        raise ValueError(
            f"there is no dataset {name!r}: use a name of TFDS, such as digits, mnist, imagenet_resized/64x64 or "
            "imagenet2012:5.1.0; huggingface:owner/name; folder:/path for images in train/class/*; or "
            "webdataset:/path/{000..099}.tar. For a dataset of your own, add a TFDS builder to "
            "jetformer.data.builders, or put the prepared dataset into data_dir"
        ) from e
    # A name that does not parse, a config or a version that does not exist.
    except (ValueError, AssertionError) as e:
        raise ValueError(f"dataset {name!r}: {one_line(e)[:_REASON_LENGTH]}") from e


def _is_integer(value: tf.Tensor) -> bool:
    return isinstance(value, tf.Tensor) and value.dtype.is_integer and value.shape.rank == 0

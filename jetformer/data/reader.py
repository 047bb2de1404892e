"""Reads the examples of a split that `Data` selects: as records, decoded, or preprocessed."""

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging

from jetformer.data import broken, preprocess, sources
from jetformer.data.selection import resolve_classes
from jetformer.data.sources import Shard

_NAMED = 10  # how many classes without examples a log line names


class Reader:
    """Reads the examples of a split of a prepared dataset, as `data` selects them.

    Elements are what is read, before preprocessing: (record, epoch's seed, index in the epoch) in training, records
    alone in evaluation.

    Args:
      data: a `dataset.Data`.
      split, pp, labels: see `Data.reader`.

    Attributes:
      data, split, pp: the same.
      source: the dataset.
      shards: where in the dataset the examples are.
      num_examples: number of examples that are read.
      smallest: the same, as in `MixtureReader`, which has several datasets.
      num_skipped: number of examples that are skipped because they cannot be preprocessed.

    Raises:
      ValueError: there is no such dataset, split, class or preprocessing op, or the dataset is not prepared.
    """

    def __init__(self, data, split: str, pp: str, labels: tuple[int, ...] | None = None):
        self.data, self.split, self.pp = data, split, pp
        self.source = sources.open_source(data.name, data.data_dir)
        self._preprocess = preprocess.parse(pp)
        # New labels int64 [C] by the dataset's labels, -1 for classes that are not read; None: unchanged.
        self._new_labels: np.ndarray | None = None
        shards, chosen = self.source.shards(split), None
        if data.classes is not None:
            chosen = resolve_classes(data.classes, self.source.class_names, data.name)
            self._new_labels = np.full(len(self.source.class_names), -1)
            self._new_labels[chosen] = np.arange(len(chosen))
            shards = self._of_classes(shards, chosen)
        if labels is not None:
            new, known = np.array(labels), self._new_labels
            self._new_labels = new if known is None else np.where(known < 0, -1, new[known])
        self.num_skipped = 0
        if data.skip_broken:
            shards, self.num_skipped = broken.skip(self, shards, chosen)
        if data.max_examples is not None:
            shards = sources.cut(shards, 0, data.max_examples)
        self.shards = shards
        self.num_examples = self.smallest = sources.num_examples(shards)

    def _of_classes(self, shards: list[Shard], chosen: list[int]) -> list[Shard]:
        """Keeps the examples of the chosen classes."""
        counts = np.zeros(len(self.source.class_names), np.int64)
        found = []
        for shard in shards:
            labels = self.source.labels(shard)
            shard = shard.with_only(np.isin(labels, chosen))
            if len(shard):
                found.append(shard)
            counts += np.bincount(labels[labels >= 0], minlength=len(counts))[: len(counts)]
        if missing := [self.source.class_names[i] for i in chosen if not counts[i]]:
            logging.warning(
                "Split %r of %s has no example of %d chosen classes: %s",
                *(self.split, self.data.name, len(missing), ", ".join(missing[:_NAMED])),
            )
        return found

    def stream(self, index: int, count: int, seed: tf.Tensor, start: int) -> tf.data.Dataset:
        """Returns one of `count` streams of training: endless elements of its part of the examples, from number `start`
        on. Each epoch has another order, by the integer [2] `seed`.

        Raises:
          ValueError: there are too few examples, or the shuffle buffer has no size.
        """
        buffer_size = self.data.shuffle_buffer_size
        if buffer_size < 1:
            raise ValueError(f"shuffle_buffer_size {buffer_size} is not positive: 1 does not shuffle")
        if self.num_examples < count:
            raise ValueError(
                f"split {self.split!r} of {self.data.name!r} has {self.num_examples} example(s), fewer than the "
                f"{count} process(es) that train on it: each needs one"
            )
        shards = self._part(index, count)

        @tf.autograph.experimental.do_not_convert  # it has no loops or conditions, and converting takes a second
        def epoch_elements(epoch: tf.Tensor) -> tf.data.Dataset:
            epoch_seed = tf.random.experimental.stateless_fold_in(seed, epoch)
            records = self.source.read_shuffled(shards, epoch_seed, buffer_size)
            # Zipped and not mapped: a function call for each would take longer than decoding a small image.
            seeds = tf.data.Dataset.from_tensors(epoch_seed).repeat()
            return tf.data.Dataset.zip(records, seeds, tf.data.Dataset.range(tf.int64.max))

        first_epoch, skip = divmod(start, sources.num_examples(shards))
        return tf.data.Dataset.range(first_epoch, tf.int64.max).flat_map(epoch_elements).skip(skip)

    def _part(self, index: int, count: int) -> list[Shard]:
        if not (self.data.classes or self.data.skip_broken or self.data.max_examples):
            return self.source.even_part(self.split, index, count)
        start, stop = sources.even_ends(self.num_examples, count)[index : index + 2]
        return sources.cut(self.shards, start, stop)

    def elements(self, start: int, stop: int) -> tf.data.Dataset:
        """Returns the elements of evaluation from number `start` to before `stop`."""
        return self.source.read(sources.cut(self.shards, start, stop))

    def example(
        self, record: tf.Tensor, epoch_seed: tf.Tensor | None = None, index: tf.Tensor | int = 0
    ) -> dict[str, tf.Tensor]:
        """Returns the preprocessed example of an element. Random ops depend on seed, epoch and index."""
        example = self._relabel(self.source.deserialize(record))
        if epoch_seed is not None:
            example["_seed"] = tf.random.experimental.stateless_fold_in(epoch_seed, index)
        example = self._preprocess(example)
        return {key: tf.constant(value) if isinstance(value, list) else value for key, value in example.items()}

    def describe(self, record: tf.Tensor, *_) -> str:
        """Names the example of an element, for messages."""
        return f"{self.source.describe(record)} of {self.data.name!r}"

    def _relabel(self, example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        if self._new_labels is None:
            return example
        label = tf.cast(example[self.source.label_key], tf.int64)
        new = tf.gather(tf.constant(self._new_labels, tf.int64), tf.maximum(label, 0))
        return example | {self.source.label_key: tf.where(label < 0, label, new)}

    def examples(self, count: int) -> list[dict]:
        """Returns the first `count` examples as the dataset has them, with the labels of `data`: decoded and not
        preprocessed, arrays and bytes by feature."""
        records = self.source.read(self.shards).take(count)
        return list(tfds.as_numpy(records.map(lambda record: self._relabel(self.source.decode(record)))))

    def labels(self) -> np.ndarray | None:
        """Returns the labels int64 [n] of all examples; None if the dataset has no label. The first call reads all
        records of a TFDS dataset."""
        if self.source.label_key is None:
            return None
        parts = [self.source.labels(shard)[slice(None) if shard.keep is None else shard.keep] for shard in self.shards]
        found = np.concatenate([np.zeros(0, np.int64), *parts])
        return found if self._new_labels is None else np.where(found < 0, found, self._new_labels[found])

    def captions(self, count: int) -> list[list[str]]:
        """Returns the captions of the first `count` examples; [] if the dataset has none."""
        records = self.source.read(self.shards).take(count)
        ds = preprocess.map_examples(records, lambda record: preprocess.flatten()(self.source.deserialize(record)), 1)
        key = next((k for k in ("captions", "captions/text") if k in ds.element_spec), None)
        if key is None:
            return []
        return [[text.decode() for text in several] for several in ds.map(lambda e: e[key]).as_numpy_iterator()]

    def image_sizes(self, count: int) -> list[tuple[int, int]]:
        """Returns (height, width) of the first `count` images as the dataset has them, without broken ones."""
        records = self.source.read(self.shards).take(count)
        if "image" not in preprocess.map_examples(records, self.source.deserialize, 1).element_spec:
            return []
        size = lambda record: tf.shape(self.source.decode(record)["image"])[-3:-1]
        ds = preprocess.map_examples(records, size, tf.data.AUTOTUNE).ignore_errors()
        return [tuple(size.tolist()) for size in ds.as_numpy_iterator()]

"""Reads several datasets as one.

In training, each stream has a part of every dataset, and a schedule of which dataset comes next: a list in which each
dataset occurs by its weight, shuffled by the seed each time it has been used up. So batches are a function of (seed,
step), as those of one dataset are. Evaluation reads one dataset after the other.
"""

import functools
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from jetformer.data import preprocess
from jetformer.data.reader import Reader

# Entries of the schedule: weights count to one part in so many.
_SCHEDULE_LENGTH = 1 << 16


class MixtureReader:
    """Reads the examples of several datasets, with the methods of `Reader`. Elements are (number of the dataset, its
    element).

    Args:
      readers: of the datasets.
      weights: how often training takes an example of each, relative to each other; None: by their numbers of examples.

    Attributes:
      readers: of the datasets.
      num_examples: of all datasets together.
      smallest: number of examples of the smallest dataset.

    Raises:
      ValueError: the datasets' examples have different keys, types or ranks.
    """

    def __init__(self, readers: list[Reader], weights: Sequence[float] | None = None):
        counts = [reader.num_examples for reader in readers]
        self.num_examples, self.smallest = sum(counts), min(counts)
        self.readers, self._weights = readers, weights or counts
        specs = []
        for reader in readers:
            example = functools.partial(reader.example, epoch_seed=tf.zeros([2], tf.int64))
            specs.append(preprocess.map_examples(tf.data.Dataset.from_tensors(""), example, 1).element_spec)
        kinds = [{key: f"{s.dtype.name}, {s.shape.rank} dimensions" for key, s in spec.items()} for spec in specs]
        for reader, kind in zip(readers, kinds, strict=True):
            if kind != kinds[0]:
                both = "; ".join(
                    f"{name} has " + ", ".join(f"{key} ({value})" for key, value in sorted(of_one.items()))
                    for name, of_one in ((readers[0].data.name, kinds[0]), (reader.data.name, kind))
                )
                raise ValueError(
                    f"the datasets of a mixture must have the same keys: {both}. End each Data.pp with the same keep(…)"
                )
        self._shapes = {
            key: [n if all(s[key].shape[i] == n for s in specs) else None for i, n in enumerate(spec.shape)]
            for key, spec in specs[0].items()
        }

    def stream(self, index: int, count: int, seed: tf.Tensor, start: int) -> tf.data.Dataset:
        """See `Reader.stream`."""
        fold_in = tf.random.experimental.stateless_fold_in
        choices, starts = _choices(_schedule(self._weights), fold_in(seed, len(self.readers)), start)
        own = [
            _numbered(number, reader.stream(index, count, fold_in(seed, number), int(starts[number])))
            for number, reader in enumerate(self.readers)
        ]
        return tf.data.Dataset.choose_from_datasets(own, choices)

    def elements(self, start: int, stop: int) -> tf.data.Dataset:
        """See `Reader.elements`."""
        found = []
        for number, reader in enumerate(self.readers):
            found.append(_numbered(number, reader.elements(start, stop)))
            start, stop = start - reader.num_examples, stop - reader.num_examples
        return functools.reduce(tf.data.Dataset.concatenate, found)

    def example(self, number: tf.Tensor, element: tuple | tf.Tensor) -> dict[str, tf.Tensor]:
        """See `Reader.example`."""
        element = element if isinstance(element, tuple) else (element,)
        branches = [functools.partial(reader.example, *element) for reader in self.readers]
        example = tf.switch_case(tf.cast(number, tf.int32), branches)
        return {key: tf.ensure_shape(value, self._shapes[key]) for key, value in example.items()}

    def describe(self, number: tf.Tensor, element: tuple | tf.Tensor) -> str:
        """See `Reader.describe`."""
        return self.readers[int(number)].describe(*(element if isinstance(element, tuple) else (element,)))

    def examples(self, count: int) -> list[dict]:
        """See `Reader.examples`."""
        found: list[dict] = []
        for reader in self.readers:
            found += reader.examples(count - len(found))
        return found


def _numbered(number: int, elements: tf.data.Dataset) -> tf.data.Dataset:
    return tf.data.Dataset.zip(tf.data.Dataset.from_tensors(number).repeat(), elements)


def _schedule(weights: Sequence[float]) -> np.ndarray:
    """Returns numbers of datasets int64 [_SCHEDULE_LENGTH], in order, each as often as its weight says, at least
    once."""
    shares = np.array(weights, np.float64) / sum(weights) * _SCHEDULE_LENGTH
    counts = np.maximum(np.floor(shares), 1).astype(np.int64)
    # The rest goes to those that lose most by rounding.
    for i in np.argsort(np.floor(shares) - shares, kind="stable")[: max(_SCHEDULE_LENGTH - counts.sum(), 0)]:
        counts[i] += 1
    counts[counts.argmax()] -= counts.sum() - _SCHEDULE_LENGTH
    return np.repeat(np.arange(len(counts)), counts)


def _choices(schedule: np.ndarray, seed: tf.Tensor, start: int) -> tuple[tf.data.Dataset, np.ndarray]:
    """Returns which dataset comes next, endlessly, from place `start` on; and how often each has come before."""
    numbers = tf.constant(schedule)

    def shuffled_schedule(repetition: tf.Tensor) -> tf.Tensor:
        own_seed = tf.random.experimental.stateless_fold_in(seed, repetition)
        return tf.random.experimental.stateless_shuffle(numbers, own_seed)

    repetitions, place = divmod(start, len(schedule))
    # (The derived seed depends on the type of what is folded in.)
    begun = shuffled_schedule(tf.constant(repetitions, tf.int64)).numpy()[:place]
    counts = repetitions * np.bincount(schedule) + np.bincount(begun, minlength=schedule.max() + 1)
    choices = lambda repetition: tf.data.Dataset.from_tensor_slices(shuffled_schedule(repetition))
    return tf.data.Dataset.range(repetitions, tf.int64.max).flat_map(choices).skip(place), counts

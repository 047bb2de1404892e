"""Batches of several datasets: the pipeline of `pipeline`, fed by all of them.

In training, each stream has a part of every dataset, and a schedule of which dataset comes next: a list in which each
dataset occurs by its weight, shuffled by the seed each time it has been used up. So batches are a function of (seed,
step), as those of one dataset are. Evaluation reads one dataset after the other.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tensorflow as tf

from jetformer.data import preprocess, sources
from jetformer.data.pipeline import Batch, batches_in_order, batches_of_streams, parts_of_streams, shuffled
from jetformer.data.reader import Reader, open_reader
from jetformer.data.selection import Selection

# Entries of the schedule: weights count to one part in so many.
_SCHEDULE_LENGTH = 1 << 16


def train_batches(
    selections: Sequence[Selection],
    weights: Sequence[float],
    *,
    batch_size: int,
    seed: int,
    shuffle_buffer_sizes: Sequence[int],
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Returns endless shuffled batches from step `start_step` on, see `pipeline.train_batches`.

    Args:
      selections: what to mix.
      weights: how often examples of each come, relative to each other.
      shuffle_buffer_sizes: of each.
      others: see `pipeline.train_batches`.

    Raises:
      ValueError: as `pipeline.train_batches`; the datasets' examples have different keys, types or ranks.
    """
    readers = [open_reader(selection, process_count) for selection in selections]
    parts = parts_of_streams(readers, batch_size, process_count)
    schedule = _schedule(weights)
    preprocessed = _preprocessing(readers, in_training=True)
    fold_in = tf.random.experimental.stateless_fold_in

    def stream(index: int, start: int) -> tf.data.Dataset:
        """Elements (number of the dataset, (epoch's seed, index in the epoch, record))."""
        stream_seed = tf.constant([seed, index], tf.int64)
        choices, counts = _choices(schedule, fold_in(stream_seed, len(readers)), start)
        numbered = []
        for number, (reader, shards, size) in enumerate(zip(readers, parts, shuffle_buffer_sizes, strict=True)):
            own = shuffled(reader, shards[index], fold_in(stream_seed, number), size, int(counts[number]))
            numbered.append(tf.data.Dataset.zip(tf.data.Dataset.from_tensors(number).repeat(), own))
        return tf.data.Dataset.choose_from_datasets(numbered, choices)

    def example(number: tf.Tensor, element: tuple[tf.Tensor, tf.Tensor, tf.Tensor]) -> dict[str, tf.Tensor]:
        epoch_seed, index, record = element
        return preprocessed(number, record, fold_in(epoch_seed, index))

    return batches_of_streams(
        stream,
        len(parts[0]),
        example,
        lambda number, element: readers[int(number)].describe(element[-1]),
        batch_size=batch_size,
        start_step=start_step,
        process_index=process_index,
        process_count=process_count,
    )


def eval_batches(
    selections: Sequence[Selection], *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Returns one pass over the datasets, one after the other, see `pipeline.eval_batches`."""
    readers = [open_reader(selection, process_count) for selection in selections]

    def elements(start: int, stop: int) -> tf.data.Dataset:
        """Elements (number of the dataset, record)."""
        found = []
        for number, reader in enumerate(readers):
            records = reader.source.read(sources.cut(reader.shards, start, stop))
            found.append(tf.data.Dataset.zip(tf.data.Dataset.from_tensors(number).repeat(), records))
            start, stop = start - reader.num_examples, stop - reader.num_examples
        return functools.reduce(tf.data.Dataset.concatenate, found)

    return batches_in_order(
        elements,
        sum(reader.num_examples for reader in readers),
        _preprocessing(readers, in_training=False),
        lambda number, record: readers[int(number)].describe(record),
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
    )


def _preprocessing(readers: list[Reader], in_training: bool) -> Callable[..., dict[str, tf.Tensor]]:
    """Returns a function of (number of the dataset, record, seed) that returns the preprocessed example.

    Raises:
      ValueError: the datasets' examples have different keys, types or ranks.
    """
    # With random ops there is a seed, and without a seed they are refused.
    seed = tf.zeros([2], tf.int64) if in_training else None
    specs = []
    for reader in readers:
        example = functools.partial(reader.preprocess, seed=seed)
        specs.append(preprocess.map_examples(tf.data.Dataset.from_tensors(""), example, 1).element_spec)
    kinds = [{key: f"{s.dtype.name}, {s.shape.rank} dimensions" for key, s in spec.items()} for spec in specs]
    for reader, kind in zip(readers, kinds, strict=True):
        if kind != kinds[0]:
            both = "; ".join(
                f"{name} has " + ", ".join(f"{key} ({value})" for key, value in sorted(of_one.items()))
                for name, of_one in ((readers[0].selection.name, kinds[0]), (reader.selection.name, kind))
            )
            raise ValueError(
                f"the datasets of a mixture must have the same keys: {both}. End each Data.pp with the same keep(…)"
            )
    shapes = {
        key: [n if all(s[key].shape[i] == n for s in specs) else None for i, n in enumerate(spec.shape)]
        for key, spec in specs[0].items()
    }

    def example(number: tf.Tensor, record: tf.Tensor, seed: tf.Tensor | None = None) -> dict[str, tf.Tensor]:
        branches = [functools.partial(reader.preprocess, record, seed) for reader in readers]
        made = tf.switch_case(tf.cast(number, tf.int32), branches)
        return {key: tf.ensure_shape(value, shapes[key]) for key, value in made.items()}

    return example


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

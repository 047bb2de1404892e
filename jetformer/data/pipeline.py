"""The input pipeline: a split and a preprocessing string in, batches of numpy arrays out.

The way of a record into a batch of training, for one dataset (a mixture offers the same methods, see `mixture`):

    Reader.stream    each stream:   files, shuffled -> records, interleaved -> shuffle buffer -> skip to the start step
    train_batches    each process:  its streams, interleaved -> Reader.example -> batch -> prefetch
    Reader.example   each record:   deserialize -> preprocess

Training batches are a function of (seed, step): which example comes when, and what random ops do to it. So a run that
resumes at step n is the run that never stopped. Nor do batches depend on the number of processes: a split is divided
into streams (`num_streams`), each of which fills the same places of every batch, and each process reads those of its
part of the batch.

Resuming decodes nothing: whole epochs are skipped by counting, the rest as encoded records. Shuffle buffers hold
encoded records, too, which keeps them small. A selection is resolved before anything is read, so it changes none of
this.

Arrays are read-only views of TensorFlow's memory.
"""

import atexit
import itertools
import math
import os
import weakref
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import tensorflow as tf

from jetformer.data import broken, preprocess, sources
from jetformer.data.mixture import MixtureReader
from jetformer.data.reader import Reader
from jetformer.errors import one_line

Batch = dict[str, np.ndarray]

# A host commonly has up to so many GPUs: up to as many processes, batches are the same.
_NUM_STREAMS = 8
# Prefix of the keys under which `train_batches` puts the shapes of examples into a batch.
_SHAPE = "_shape of "


def train_batches(
    reader: Reader | MixtureReader,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Returns endless shuffled batches from step `start_step` on.

    Each stream goes through its part of the split again and again, in another order each epoch; batches run across the
    ends of epochs.

    Args:
      reader: of the dataset or the mixture.
      batch_size: examples of a step over all processes.
      seed: of the order and of random ops.
      start_step: the first batch is the one that a run from step 0 has at this step.
      process_index: this process, of `process_count`.
      process_count: processes that share a batch.

    Returns:
      Iterator of the examples that the preprocessing returns, as arrays [batch_size / process_count, ...].

    Raises:
      ValueError: sizes do not fit, or an op misses a key. The iterator raises it for an example that cannot be
        preprocessed, or whose shape differs from that of others.
    """
    local_batch_size = _local_batch_size(batch_size, process_count)
    streams = num_streams(batch_size, process_count, reader.smallest)
    per_stream, local_streams = batch_size // streams, streams // process_count

    def elements(step: int) -> tf.data.Dataset:
        numbers = range(process_index * local_streams, (process_index + 1) * local_streams)
        own = [reader.stream(i, streams, tf.constant([seed, i], tf.int64), step * per_stream) for i in numbers]
        turns = tf.data.Dataset.from_tensor_slices(np.arange(local_batch_size, dtype=np.int64) // per_stream).repeat()
        return tf.data.Dataset.choose_from_datasets(own, turns)

    def example_with_shapes(*element) -> dict[str, tf.Tensor]:
        example = reader.example(*element)
        unknown = {key: value for key, value in example.items() if not value.shape.is_fully_defined()}
        return example | {_SHAPE + key: tf.shape(value) for key, value in unknown.items()}

    # Examples are written directly into their batch. (TensorFlow then compares their sizes, but not their shapes.) And
    # nothing is tuned at run time: for small images that takes longer than it gains.
    options = tf.data.Options()
    options.autotune.enabled = False
    options.experimental_optimization.map_and_batch_fusion = True
    ds = preprocess.map_examples(elements(start_step), example_with_shapes, 4 * os.cpu_count())
    ds = ds.batch(local_batch_size, drop_remainder=True).prefetch(2).with_options(options)
    failed_batch = lambda number: elements(start_step + number).take(local_batch_size)
    return _closed_at_exit(_arrays(ds, failed_batch, reader))


def num_streams(batch_size: int, process_count: int, num_examples: int) -> int:
    """Returns into how many streams training data is divided.

    That is the greatest common divisor of the batch size and 8, so that batches are the same for all numbers of
    processes that divide it; also of `num_examples`, that of the smallest dataset, if it is smaller. If that is not a
    multiple of the number of processes, each process has one stream."""
    streams = math.gcd(batch_size, _NUM_STREAMS)
    if num_examples < streams:
        streams = math.gcd(streams, num_examples)
    return streams if num_examples and streams % process_count == 0 else process_count


def eval_batches(
    reader: Reader | MixtureReader, *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Returns one pass in file order: each example once over all processes, and the same number of batches on each.

    Args: as `train_batches`, but the preprocessing has no random ops.

    Returns:
      Iterator of the examples that the preprocessing returns, as arrays [batch_size / process_count, ...], with
      `_mask` bool [batch_size / process_count], False for padding (zeros) at the end of the last batches; and `_index`
      int32 [batch_size / process_count], the number of each example in the split, whatever process reads it.

    Raises:
      ValueError: as `train_batches`.
    """
    local_batch_size = _local_batch_size(batch_size, process_count)
    # (`tfds.even_splits` would divide each part of a sum such as validation+test, and so number examples differently.)
    ends = sources.even_ends(reader.num_examples, process_count)
    first, stop = ends[process_index : process_index + 2]
    num_batches = math.ceil(ends[1] / local_batch_size)  # the first process has the most examples

    ds = preprocess.map_examples(reader.elements(first, stop), reader.example, tf.data.AUTOTUNE)
    # The shape of padding for a process without examples of its own.
    template = preprocess.map_examples(reader.elements(0, 1), reader.example, 1).batch(1)

    def failed_batch(number: int) -> tf.data.Dataset:
        start = first + number * local_batch_size
        return reader.elements(start, min(start + local_batch_size, stop))

    batches = _arrays(ds.batch(local_batch_size).prefetch(2), failed_batch, reader)
    return _closed_at_exit(_padded(batches, template, num_batches, local_batch_size, first))


def _local_batch_size(batch_size: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} is not a positive multiple of {process_count} process(es)")
    return batch_size // process_count


def _arrays(
    ds: tf.data.Dataset, failed_batch: Callable[[int], Iterable], reader: Reader | MixtureReader
) -> Iterator[Batch]:
    """Yields batches as arrays; an error names the example that causes it."""
    batches = ds.as_numpy_iterator()
    explanation = lambda number: broken.explain(failed_batch(number), reader.example, reader.describe)
    for number in itertools.count():
        try:
            batch = next(batches, None)
        except tf.errors.OpError as error:
            raise ValueError(explanation(number) or f"the data cannot be read: {one_line(error)}") from error
        if batch is None:
            return
        shapes = [batch.pop(key) for key in list(batch) if key.startswith(_SHAPE)]
        if any((shape != shape[0]).any() for shape in shapes):
            raise ValueError(explanation(number))
        yield batch


def _padded(
    batches: Iterator[Batch], template: tf.data.Dataset, num_batches: int, size: int, first: int
) -> Iterator[Batch]:
    for start in range(first, first + num_batches * size, size):
        batch = next(batches, None)
        if batch is None:
            batch = {k: v[:0] for k, v in next(template.as_numpy_iterator()).items()}
            num_real = 0
        else:
            num_real = len(next(iter(batch.values())))
        yield {k: _pad(v, size) for k, v in batch.items()} | {
            "_mask": np.arange(size) < num_real,
            "_index": np.arange(start, start + size, dtype=np.int32),
        }


def _pad(array: np.ndarray, size: int) -> np.ndarray:
    """[n, ...] -> [size, ...], with zeros (strings: empty ones) at the end."""
    zero = b"" if array.dtype == object else 0
    padding = np.full((size - len(array), *array.shape[1:]), zero, array.dtype)
    return np.concatenate([array, padding]) if len(padding) else array


_unfinished = weakref.WeakSet()


def _closed_at_exit(batches: Iterator[Batch]) -> Iterator[Batch]:
    _unfinished.add(batches)
    return batches


@atexit.register
def _close() -> None:
    """Stops the threads that prepare batches. One that runs Python (an op that tokenizes) while the interpreter exits
    can keep the process from exiting."""
    for batches in list(_unfinished):
        batches.close()


def peek(batches: Iterator[Batch], what: str) -> tuple[Batch, Iterator[Batch]]:
    """Returns the first batch, and an iterator of all batches that includes it.

    Args:
      batches: of training or evaluation.
      what: what they are batches of, for messages.

    Raises:
      ValueError: there is no batch, or it has strings, which models do not read.
    """
    try:
        first = next(batches, None)
    except tf.errors.OpError as error:
        raise ValueError(f"{what} cannot be preprocessed: {one_line(error)}") from error
    if first is None:
        raise ValueError(f"{what} has no examples: choose another split")
    for key, array in first.items():
        if array.dtype == object:
            raise ValueError(f"{what} has strings under {key!r}: end the preprocessing with keep(…) without that key")
    return first, itertools.chain([first], batches)

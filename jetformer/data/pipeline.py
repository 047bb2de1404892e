"""The input pipeline: a split and a preprocessing string in, batches of numpy arrays out.

`train_batches` is the way of a record from one dataset into a batch (for several datasets see `mixture`):

    each stream:   files, shuffled -> records, interleaved -> shuffle buffer -> skip to the start step
    each process:  its streams, interleaved -> deserialize -> preprocess -> batch

Training batches are a function of (seed, step): which example comes when, and what random ops do to it. So a run that
resumes at step n is the run that never stopped. Nor do batches depend on the number of processes: a split is divided
into streams (`num_streams`), each of which fills the same places of every batch, and each process reads those of its
part of the batch.

Resuming decodes nothing: whole epochs are skipped by counting, the rest as encoded records. Shuffle buffers hold
encoded records, too, which keeps them small. A selection is resolved before anything is read, so it changes none of
this.

Arrays are read-only views of TensorFlow's memory. TensorFlow never takes a GPU here.
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
from jetformer.data.reader import Reader, open_reader
from jetformer.data.selection import Selection
from jetformer.data.sources import Shard
from jetformer.errors import one_line

tf.config.set_visible_devices([], "GPU")

Batch = dict[str, np.ndarray]

# A host commonly has up to so many GPUs: up to as many processes, batches are the same.
_NUM_STREAMS = 8
# Prefix of the keys under which `batches_of_streams` puts the shapes of examples into a batch.
_SHAPE = "_shape of "


def train_batches(
    selection: Selection,
    *,
    batch_size: int,
    seed: int,
    shuffle_buffer_size: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Returns endless shuffled batches from step `start_step` on.

    Each stream goes through its part of the split again and again, in another order each epoch; batches run across the
    ends of epochs. The parts differ by one example at most.

    Args:
      selection: what to read. If there are several processes, the dataset must be prepared, see `sources.prepare`.
      batch_size: examples of a step over all processes.
      seed: of the order and of random ops.
      shuffle_buffer_size: encoded examples that each stream shuffles at a time. (A folder is shuffled as a whole.)
      start_step: the first batch is the one that a run from step 0 has at this step.
      process_index: this process, of `process_count`.
      process_count: processes that share a batch.

    Returns:
      Iterator of the examples that the preprocessing returns, as arrays [batch_size / process_count, ...].

    Raises:
      ValueError: no such dataset, split or op; not TFRecord; sizes that do not fit. The iterator raises it for an
        example that cannot be preprocessed, or whose shape differs from that of others.
    """
    reader = open_reader(selection, process_count)
    parts = parts_of_streams([reader], batch_size, process_count)[0]

    def stream(index: int, start: int) -> tf.data.Dataset:
        return shuffled(reader, parts[index], tf.constant([seed, index], tf.int64), shuffle_buffer_size, start)

    def example(epoch_seed: tf.Tensor, index: tf.Tensor, record: tf.Tensor) -> dict[str, tf.Tensor]:
        # So an op's seed depends on (seed, stream), epoch, index in the epoch, and its position (`preprocess.parse`).
        return reader.preprocess(record, tf.random.experimental.stateless_fold_in(epoch_seed, index))

    return batches_of_streams(
        stream,
        len(parts),
        example,
        lambda epoch_seed, index, record: reader.describe(record),
        batch_size=batch_size,
        start_step=start_step,
        process_index=process_index,
        process_count=process_count,
    )


def parts_of_streams(readers: list[Reader], batch_size: int, process_count: int) -> list[list[list[Shard]]]:
    """Divides each dataset among the streams of training: returns its shards for each stream.

    Raises:
      ValueError: the batch size does not fit, or a dataset has fewer examples than there are processes.
    """
    _check_batch_size(batch_size, process_count)
    streams = num_streams(batch_size, process_count, min(reader.num_examples for reader in readers))
    for reader in readers:
        if reader.num_examples < streams:
            raise ValueError(
                f"split {reader.selection.split!r} of {reader.selection.name!r} has {reader.num_examples} example(s), "
                f"fewer than the {process_count} process(es) that train on it: each needs one"
            )
    return [reader.even_parts(streams) for reader in readers]


def num_streams(batch_size: int, process_count: int, num_examples: int) -> int:
    """Returns into how many streams training data is divided.

    That is the greatest common divisor of the batch size and 8, so that batches are the same for all numbers of
    processes that divide it; also of `num_examples`, that of the smallest dataset, if it is smaller. If that is not a
    multiple of the number of processes, each process has one stream."""
    streams = math.gcd(batch_size, _NUM_STREAMS)
    if num_examples < streams:
        streams = math.gcd(streams, num_examples)
    return streams if num_examples and streams % process_count == 0 else process_count


def shuffled(
    reader: Reader, shards: list[Shard], stream_seed: tf.Tensor, buffer_size: int, start: int
) -> tf.data.Dataset:
    """Returns a stream of (epoch's seed, index in the epoch, record), endless, from its element `start` on."""
    if buffer_size < 1:
        raise ValueError(f"shuffle_buffer_size {buffer_size} is not positive: 1 does not shuffle")

    def epoch_records(epoch: tf.Tensor) -> tf.data.Dataset:
        epoch_seed = tf.random.experimental.stateless_fold_in(stream_seed, epoch)
        records = reader.source.read_shuffled(shards, epoch_seed, buffer_size)
        # Zipped and not mapped: a function call for each would take longer than decoding a small image.
        seeds = tf.data.Dataset.from_tensors(epoch_seed).repeat()
        return tf.data.Dataset.zip(seeds, tf.data.Dataset.range(tf.int64.max), records)

    first_epoch, skip = divmod(start, sources.num_examples(shards))
    return tf.data.Dataset.range(first_epoch, tf.int64.max).flat_map(epoch_records).skip(skip)


def batches_of_streams(
    stream: Callable[[int, int], tf.data.Dataset],
    stream_count: int,
    example: Callable[..., dict[str, tf.Tensor]],
    describe: Callable[..., str],
    *,
    batch_size: int,
    start_step: int,
    process_index: int,
    process_count: int,
) -> Iterator[Batch]:
    """Returns this process's part of training batches.

    Args:
      stream: returns a stream, by its number, from an element on, by its number.
      stream_count: streams of all processes; each fills as many places of a batch.
      example: returns the preprocessed example of an element.
      describe: names the example of an element, for messages.
      others: see `train_batches`.
    """
    local_batch_size, local_streams = batch_size // process_count, stream_count // process_count
    per_stream = batch_size // stream_count
    first_stream = process_index * local_streams

    def elements(step: int) -> tf.data.Dataset:
        streams = [stream(i, step * per_stream) for i in range(first_stream, first_stream + local_streams)]
        turns = tf.data.Dataset.from_tensor_slices(np.arange(local_batch_size, dtype=np.int64) // per_stream).repeat()
        return tf.data.Dataset.choose_from_datasets(streams, turns)

    def example_with_shapes(*element) -> dict[str, tf.Tensor]:
        made = example(*element)
        unknown = {key: value for key, value in made.items() if not value.shape.is_fully_defined()}
        return made | {_SHAPE + key: tf.shape(value) for key, value in unknown.items()}

    # Examples are written directly into their batch. (TensorFlow then compares their sizes, but not their shapes.) And
    # nothing is tuned at run time: for small images that takes longer than it gains.
    options = tf.data.Options()
    options.autotune.enabled = False
    options.experimental_optimization.map_and_batch_fusion = True
    ds = preprocess.map_examples(elements(start_step), example_with_shapes, 4 * os.cpu_count())
    ds = ds.batch(local_batch_size, drop_remainder=True).prefetch(2).with_options(options)
    failed_batch = lambda number: elements(start_step + number).take(local_batch_size)
    return _closed_at_exit(_arrays(ds, failed_batch, example, describe))


def eval_batches(
    selection: Selection, *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Returns one pass over a split in file order: each example once over all processes, and the same number of batches
    on each.

    Args: as `train_batches`, but the preprocessing has no random ops.

    Returns:
      Iterator of the examples that the preprocessing returns, as arrays [batch_size / process_count, ...], with
      `_mask` bool [batch_size / process_count], False for padding (zeros) at the end of the last batches; and `_index`
      int32 [batch_size / process_count], the number of each example in the split, whatever process reads it.

    Raises:
      ValueError: as `train_batches`.
    """
    reader = open_reader(selection, process_count)
    return batches_in_order(
        lambda start, stop: reader.source.read(sources.cut(reader.shards, start, stop)),
        reader.num_examples,
        reader.preprocess,
        reader.describe,
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
    )


def batches_in_order(
    elements: Callable[[int, int], tf.data.Dataset],
    num_examples: int,
    example: Callable[..., dict[str, tf.Tensor]],
    describe: Callable[..., str],
    *,
    batch_size: int,
    process_index: int,
    process_count: int,
) -> Iterator[Batch]:
    """Returns this process's part of evaluation batches.

    Args:
      elements: returns the elements from one number to before another.
      num_examples: how many elements there are.
      example: returns the preprocessed example of an element.
      describe: names the example of an element, for messages.
      others: see `eval_batches`.
    """
    _check_batch_size(batch_size, process_count)
    local_batch_size = batch_size // process_count
    # (`tfds.even_splits` would divide each part of a sum such as validation+test, and so number examples differently.)
    ends = sources.even_ends(num_examples, process_count)
    first, stop = ends[process_index : process_index + 2]
    num_batches = math.ceil(ends[1] / local_batch_size)  # the first process has the most examples

    ds = preprocess.map_examples(elements(first, stop), example, tf.data.AUTOTUNE).batch(local_batch_size).prefetch(2)
    # The shape of padding for a process without examples of its own.
    template = preprocess.map_examples(elements(0, 1), example, 1).batch(1)

    def failed_batch(number: int) -> tf.data.Dataset:
        start = first + number * local_batch_size
        return elements(start, min(start + local_batch_size, stop))

    batches = _arrays(ds, failed_batch, example, describe)
    return _closed_at_exit(_padded(batches, template, num_batches, local_batch_size, first))


def _check_batch_size(batch_size: int, process_count: int) -> None:
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} is not a positive multiple of {process_count} process(es)")


def _arrays(
    ds: tf.data.Dataset,
    failed_batch: Callable[[int], Iterable],
    example: Callable[..., dict[str, tf.Tensor]],
    describe: Callable[..., str],
) -> Iterator[Batch]:
    """Yields batches as arrays; an error names the example that causes it."""
    batches = ds.as_numpy_iterator()
    explanation = lambda number: broken.explain(failed_batch(number), example, describe)
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

"""Input pipelines: a TFDS data set and a preprocessing string in, batches of numpy arrays out.

Training data is a function of (seed, step): which example comes when, and what the random ops do to
it, is the same in every run, so a run that resumes at step n is the run that never stopped. Nor does
it matter how many processes share a batch: a split is cut into streams (`num_streams`), each of which
fills its place in every batch, and each process reads those that fill its part.

Getting to step n decodes nothing: whole epochs are skipped by counting, the rest as undecoded
records, because the order of things is, in each stream,

    files, shuffled -> records, interleaved -> shuffle -> skip

and over a process's streams, deserialize -> pp -> batch. The shuffle buffers hold encoded records
too, which makes them small.

Arrays are read-only views of TensorFlow's memory. TensorFlow does not show in this module's
signatures, and never takes a GPU.
"""

import atexit
import dataclasses
import itertools
import math
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

import jetformer.data.builders  # noqa: F401 (makes the package's own data sets known to TFDS)
from jetformer.data import preprocess

tf.config.set_visible_devices([], "GPU")

Batch = dict[str, np.ndarray]
FileInstruction = tfds.core.utils.shard_utils.FileInstruction

# How many files a stream reads at the same time. Part of what the order of examples depends on.
_CYCLE_LENGTH = 16
# As many streams as a host commonly has GPUs: for fewer processes the batches are the same.
_NUM_STREAMS = 8


def train_batches(
    name: str,
    split: str,
    pp: str,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    shuffle_buffer_size: int,
    data_dir: str | None = None,
    num_parallel_calls: int = tf.data.AUTOTUNE,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """Endless shuffled batches, the ones from step `start_step` on.

    Each process reads its own part of the split, as `num_streams` streams or some of them; their
    parts differ by one example at most. A stream goes through its part again and again, each time in
    another order, and batches run across the ends.

    Args:
      name: TFDS data set, e.g. `digits`, `imagenet_resized/64x64`, `imagenet2012:5.1.0`. Prepared
        here where there is one process; where there are several, see `prepare`.
      split: TFDS split, e.g. `train`, `train[10000:]`, `train+validation`.
      pp: preprocessing string, see `jetformer.data.preprocess`.
      batch_size: examples of one step over all processes.
      seed: of the order and of the random ops.
      start_step: the first batch is the one a run from step 0 has at this step.
      process_index: this process, of `process_count`.
      process_count: processes that share the batch.
      shuffle_buffer_size: examples, per stream, still encoded.
      data_dir: where TFDS keeps its data; its default where None.
      num_parallel_calls: examples preprocessed at the same time.
      prefetch: batches kept ready.

    Returns:
      Iterator of dicts of what `pp` leaves over, arrays [batch_size / process_count, ...].

    Raises:
      ValueError: no such data set, split or op; not TFRecord; sizes that do not fit.
    """
    local_batch_size = _local_batch_size(batch_size, process_count)
    if shuffle_buffer_size < 1:
        raise ValueError(f"shuffle_buffer_size {shuffle_buffer_size} is not positive: 1 is no shuffle")
    builder = _prepared_builder(name, data_dir, process_count)
    num_total = _num_examples(_file_instructions(builder, split))
    streams = num_streams(batch_size, process_count)
    if num_total < streams:
        raise ValueError(
            f"split {split!r} of {name!r} has {num_total} example(s), too few to train on with {streams} streams and "
            f"{process_count} process(es)"
        )
    parts = tfds.even_splits(split, streams)
    per_stream = batch_size // streams

    # Seeds go from (seed, stream) over the epoch and the example's index in it to the op.
    fold_in = tf.random.experimental.stateless_fold_in

    def stream(index: int) -> tf.data.Dataset:
        shards = _file_instructions(builder, parts[index])
        stream_seed = tf.constant([seed, index], tf.int64)

        def epoch_records(epoch: tf.Tensor) -> tf.data.Dataset:
            epoch_seed = fold_in(stream_seed, epoch)
            records = _read(shards, shuffle_seed=epoch_seed)
            records = records.shuffle(shuffle_buffer_size, seed=epoch_seed[0], reshuffle_each_iteration=False)
            return records.enumerate().map(lambda i, record: (epoch_seed, i, record))

        first_epoch, skip = divmod(start_step * per_stream, _num_examples(shards))
        return tf.data.Dataset.range(first_epoch, tf.int64.max).flat_map(epoch_records).skip(skip)

    run = _deserialize_and_preprocess(builder, pp)

    def example(epoch_seed, index, record):
        return run(record, {"_seed": fold_in(epoch_seed, index)})

    local_streams = streams // process_count
    first_stream = process_index * local_streams
    turns = tf.data.Dataset.range(local_batch_size).map(lambda i: i // per_stream).repeat()
    ds = tf.data.Dataset.choose_from_datasets(
        [stream(i) for i in range(first_stream, first_stream + local_streams)], turns
    )
    ds = _map(ds, example, num_parallel_calls)
    ds = ds.batch(local_batch_size, drop_remainder=True).prefetch(prefetch)
    return _closed_at_exit(_batches(ds))


def num_streams(batch_size: int, process_count: int) -> int:
    """Into how many streams training data are cut: the greatest common divisor of the batch size and 8, so that all
    numbers of processes that divide it see the same batches; for another number, as many as there are processes."""
    streams = math.gcd(batch_size, _NUM_STREAMS)
    return streams if streams % process_count == 0 else process_count


def eval_batches(
    name: str,
    split: str,
    pp: str,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    data_dir: str | None = None,
) -> Iterator[Batch]:
    """One pass in file order: each example once over all processes, equally many batches on each.

    Args: as `train_batches`, but `pp` has no random ops.

    Returns:
      Iterator of dicts of what `pp` leaves over, arrays [batch_size / process_count, ...], with
      `_mask` bool [batch_size / process_count]: True is an example, False is padding (zeros) at
      the end of the last batches; and `_index` int32 [batch_size / process_count], the examples'
      numbers in the split, whichever process reads them.

    Raises:
      ValueError: as `train_batches`.
    """
    local_batch_size = _local_batch_size(batch_size, process_count)
    builder = _prepared_builder(name, data_dir, process_count)
    run = _deserialize_and_preprocess(builder, pp)

    def examples(shards) -> tf.data.Dataset:
        return _map(_read(shards), lambda record: run(record, {}), tf.data.AUTOTUNE)

    everything = _file_instructions(builder, split)
    # (`tfds.even_splits` would cut up each part of a sum like validation+test, and number examples differently then.)
    size, rest = divmod(_num_examples(everything), process_count)
    ends = [i * size + min(i, rest) for i in range(process_count + 1)]
    parts = [_slice(everything, start, stop) for start, stop in itertools.pairwise(ends)]
    num_batches = math.ceil(max(map(_num_examples, parts)) / local_batch_size)
    ds = examples(parts[process_index]).batch(local_batch_size).prefetch(2)
    # What padding looks like where a process has no example of its own.
    template = examples(everything).take(1).batch(1)
    first = sum(map(_num_examples, parts[:process_index]))
    return _closed_at_exit(_padded(ds, template, num_batches, local_batch_size, first))


def examples(name: str, split: str, count: int, data_dir: str | None = None) -> list[dict[str, Any]]:
    """The first `count` examples of a split (or all) as the data set has them, decoded: arrays and bytes by feature.

    Raises:
      ValueError: as `train_batches`.
    """
    builder = _prepared_builder(name, data_dir, process_count=1)
    records = _read(_file_instructions(builder, split)).take(count)
    ds = records.map(builder.info.features.deserialize_example)
    return list(tfds.as_numpy(ds))


def _batches(ds: tf.data.Dataset) -> Iterator[Batch]:
    yield from ds.as_numpy_iterator()


_unfinished = weakref.WeakSet()


def _closed_at_exit(batches: Iterator[Batch]) -> Iterator[Batch]:
    _unfinished.add(batches)
    return batches


@atexit.register
def _close() -> None:
    """Stops the threads that prepare batches.

    One that runs Python (an op that tokenizes) while the interpreter ends can keep the process from ending.
    """
    for batches in list(_unfinished):
        batches.close()


def _padded(ds, template, num_batches: int, size: int, first: int) -> Iterator[Batch]:
    batches = ds.as_numpy_iterator()
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
    """[n, ...] -> [size, ...] with zeros (strings: empty ones) at the end."""
    zero = b"" if array.dtype == object else 0
    padding = np.full((size - len(array), *array.shape[1:]), zero, array.dtype)
    return np.concatenate([array, padding]) if len(padding) else array


def peek(batches: Iterator[Batch], what: str) -> tuple[Batch, Iterator[Batch]]:
    """The first batch, and all batches with it.

    Args:
      batches: of `train_batches` or `eval_batches`.
      what: what they are batches of, for messages.

    Raises:
      ValueError: if there is none, or it cannot be made into numbers of one shape.
    """
    try:
        first = next(batches, None)
    except tf.errors.OpError as e:
        raise ValueError(f"{what} cannot be preprocessed: {_one_line(e)}") from e
    if first is None:
        raise ValueError(f"{what} has no examples: choose another split")
    for key, array in first.items():
        if array.dtype == object:
            raise ValueError(f"{what} has a {key!r} that is no number: end the preprocessing with keep(…) without it")
    return first, itertools.chain([first], batches)


def num_examples(name: str, split: str, data_dir: str | None = None) -> int:
    """How many examples a split of a prepared data set has.

    Raises:
      ValueError: no such data set or split, or it is not prepared.
    """
    builder = _builder(name, data_dir)
    return _num_examples(_file_instructions(builder, split))


def prepare(name: str, data_dir: str | None = None) -> None:
    """Downloads and prepares a data set, where that has not been done yet.

    Where several processes share `data_dir`, one of them calls this before the others go on.

    Raises:
      ValueError: no such data set, or this machine cannot get it.
    """
    builder = _builder(name, data_dir)
    if builder.is_prepared():
        return
    try:
        builder.download_and_prepare()
    # Downloads, checksums, archives, packages, files to be put there by hand: each fails in its own way.
    except Exception as e:
        raise ValueError(
            f"data set {name!r} is not in {builder.data_dir} and cannot be prepared here: prepare "
            f"it elsewhere and copy it there, or set data_dir to where it is ({_one_line(e)})"
        ) from e


def _builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as e:
        raise ValueError(
            f"there is no data set {name!r}: names are those of TFDS, as digits, mnist, "
            "imagenet_resized/64x64 or imagenet2012:5.1.0; a data set of your own is a TFDS "
            "builder in jetformer.data.builders, or a prepared one in data_dir"
        ) from e
    # A name that does not parse, a config or a version that does not exist.
    except (ValueError, AssertionError) as e:
        raise ValueError(f"data set {name!r}: {_one_line(e)}") from e


def _prepared_builder(name, data_dir, process_count: int) -> tfds.core.DatasetBuilder:
    if process_count == 1:
        prepare(name, data_dir)
    builder = _builder(name, data_dir)
    file_format = builder.info.file_format
    if builder.is_prepared() and file_format != tfds.core.FileFormat.TFRECORD:
        raise ValueError(
            f"data set {name!r} is stored as {file_format.value}, and only tfrecord can be read: "
            "prepare it again with tfds build --file_format=tfrecord"
        )
    return builder


def _file_instructions(builder, split) -> list[FileInstruction]:
    """The (filename, skip, take) that make up a split, or a process's part of one."""
    name = builder.info.full_name
    if not builder.is_prepared():
        raise ValueError(
            f"data set {name} is not in {builder.data_dir}: set data_dir to where it is, or call "
            "jetformer.data.pipeline.prepare in one process first"
        )
    try:
        return builder.info.splits[split].file_instructions
    except ValueError as e:
        raise ValueError(
            f"data set {name} has no split {split!r}, it has: {', '.join(builder.info.splits)}, "
            f"and slices and sums of them, as train[:90%] or train+test ({_one_line(e)})"
        ) from e


def _slice(shards: list[FileInstruction], start: int, stop: int) -> list[FileInstruction]:
    """What of the shards holds their examples from number `start` to before `stop`."""
    found = []
    for shard in shards:
        first, last = max(start, 0), min(stop, shard.take)
        if first < last:
            found.append(dataclasses.replace(shard, skip=shard.skip + first, take=last - first))
        start, stop = start - shard.take, stop - shard.take
    return found


def _num_examples(shards: list[FileInstruction]) -> int:
    return sum(shard.take for shard in shards)


def _local_batch_size(batch_size: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} is not a positive multiple of {process_count} process(es)")
    return batch_size // process_count


def _read(shards, shuffle_seed: tf.Tensor | None = None) -> tf.data.Dataset:
    """Serialized records (scalar strings) of the shards: in order, or of shuffled, mixed files."""
    if not shards:
        return tf.data.Dataset.from_tensor_slices(tf.constant([], tf.string))
    filenames = tf.constant([str(shard.filename) for shard in shards])
    skips = tf.constant([shard.skip for shard in shards], tf.int64)
    takes = tf.constant([shard.take for shard in shards], tf.int64)
    order = tf.range(len(shards))
    if shuffle_seed is not None:
        order = tf.random.experimental.stateless_shuffle(order, shuffle_seed)

    def records(i: tf.Tensor) -> tf.data.Dataset:
        return tf.data.TFRecordDataset(filenames[i]).skip(skips[i]).take(takes[i])

    return tf.data.Dataset.from_tensor_slices(order).interleave(
        records,
        cycle_length=1 if shuffle_seed is None else min(_CYCLE_LENGTH, len(shards)),
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )


def _deserialize_and_preprocess(builder: tfds.core.DatasetBuilder, pp: str):
    """Returns run(serialized record, more tensors to add) -> preprocessed example."""
    features = builder.info.features
    encoded = {
        key: tfds.decode.SkipDecoding() for key, feature in features.items() if isinstance(feature, tfds.features.Image)
    }
    apply = preprocess.parse(pp)

    def run(record, extra):
        return apply(features.deserialize_example(record, decoders=encoded) | extra)

    return run


def _map(ds: tf.data.Dataset, function, num_parallel_calls: int) -> tf.data.Dataset:
    # Without AutoGraph, so that an error in the preprocessing string stays the one line it is.
    function = tf.autograph.experimental.do_not_convert(function)
    return ds.map(function, num_parallel_calls=num_parallel_calls, deterministic=True)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]

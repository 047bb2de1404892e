"""Input pipelines: data sets and preprocessing strings in, batches of numpy arrays out.

Training data is a function of (seed, step): which example comes when, and what the random ops do to
it, is the same in every run, so a run that resumes at step n is the run that never stopped. Nor does
it matter how many processes share a batch: a split is cut into streams (`num_streams`), each of which
fills its place in every batch, and each process reads those that fill its part.

Getting to step n decodes nothing: whole epochs are skipped by counting, the rest as undecoded
records, because the order of things is, in each stream,

    files, shuffled -> records, interleaved -> shuffle -> skip

and over a process's streams, deserialize -> pp -> batch. The shuffle buffers hold encoded records
too, which makes them small. What is left out of a data set (`Selection`) is known before anything is
read, and so changes none of this. A mixture does it for each of its data sets; in each stream, which
of them is next is a deck of cards, shuffled anew by the seed each time that all have been dealt.

Arrays are read-only views of TensorFlow's memory. TensorFlow does not show in this module's
signatures, and never takes a GPU.
"""

import ast
import atexit
import collections
import dataclasses
import difflib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from jetformer.data import pp_string, preprocess, sources
from jetformer.data.sources import Shard, one_line

tf.config.set_visible_devices([], "GPU")

Batch = dict[str, np.ndarray]

# As many streams as a host commonly has GPUs: for fewer processes the batches are the same.
_NUM_STREAMS = 8
# How many cards the deck of a mixture has: weights count to one part in so many.
_DECK_SIZE = 1 << 16
# Of how many examples that are left out a log says which, and of how many a file says why.
_NAMED, _EXPLAINED = 10, 1000
# Another number when other images can be decoded than before.
_READS = 2
# How many records are looked at together.
_CHUNK = 256

# Under what name a batch has the shapes of its examples, see `_batches`.
_SHAPE = "_shape of "

_said: set[epath.Path] = set()  # of which examples left out a log says so already


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which examples of a data set are read, and what is made of them.

    Attributes:
      name: TFDS data set, e.g. `digits`, `imagenet_resized/64x64`, `imagenet2012:5.1.0`; `folder:/path` of a folder
        `split/class/image`, see `folder.Folder`; or `huggingface:owner/name`, see `jetformer.data.huggingface`.
      split: TFDS split, e.g. `train`, `train[10000:]`, `train+validation`.
      pp: preprocessing string, see `jetformer.data.preprocess`.
      data_dir: where TFDS keeps its data; its default where None.
      classes: which classes, see `resolve_classes`; their labels become 0, 1, … in this order. None: all.
      max_examples: how many examples at most: the first. None: all.
      skip_broken: leave out what cannot be preprocessed, see `_broken`.
      labels: what the labels 0, 1, … become; None: they stay.
    """

    name: str
    split: str
    pp: str
    data_dir: str | None = None
    classes: tuple[int | str, ...] | None = None
    max_examples: int | None = None
    skip_broken: bool = False
    labels: tuple[int, ...] | None = None


def train_batches(
    name: str, split: str, pp: str, *, shuffle_buffer_size: int, data_dir: str | None = None, **options
) -> Iterator[Batch]:
    """As `mixture_batches`, of one data set."""
    selection = Selection(name, split, pp, data_dir)
    return mixture_batches([selection], [1.0], shuffle_buffer_sizes=[shuffle_buffer_size], **options)


def mixture_batches(
    selections: Sequence[Selection],
    weights: Sequence[float],
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    shuffle_buffer_sizes: Sequence[int],
    num_parallel_calls: int | None = None,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """Endless shuffled batches, the ones from step `start_step` on.

    Each process reads its own part of each split, as `num_streams` streams or some of them; their
    parts differ by one example at most. A stream goes through its part again and again, each time in
    another order, and batches run across the ends.

    Args:
      selections: what is mixed. Prepared here where there is one process; where there are several, see `prepare`.
      weights: how often examples of each come, relative to each other.
      batch_size: examples of one step over all processes.
      seed: of the order and of the random ops.
      start_step: the first batch is the one a run from step 0 has at this step.
      process_index: this process, of `process_count`.
      process_count: processes that share the batch.
      shuffle_buffer_sizes: examples of each, per stream, still encoded. (A folder is shuffled as a whole.)
      num_parallel_calls: examples preprocessed at the same time; None: four for each core.
      prefetch: batches kept ready.

    Returns:
      Iterator of dicts of what `pp` leaves over, arrays [batch_size / process_count, ...].

    Raises:
      ValueError: no such data set, split or op; not TFRecord; sizes that do not fit. The iterator raises it for an
        example that cannot be preprocessed, or gets another shape than others.
    """
    local_batch_size = _local_batch_size(batch_size, process_count)
    for size in shuffle_buffer_sizes:
        if size < 1:
            raise ValueError(f"shuffle_buffer_size {size} is not positive: 1 is no shuffle")
    opened = [_open(selection, process_count) for selection in selections]
    streams = num_streams(batch_size, process_count, min(data.num_examples for data in opened))
    for selection, data in zip(selections, opened, strict=True):
        if data.num_examples < streams:
            raise ValueError(
                f"split {selection.split!r} of {selection.name!r} has {data.num_examples} example(s), too few to train "
                f"on with {process_count} process(es): each needs one"
            )
    parts = [data.even_parts(streams) for data in opened]
    deck = _deck(weights)
    per_stream = batch_size // streams

    # Seeds go from (seed, stream) over the epoch and the example's index in it to the op.
    fold_in = tf.random.experimental.stateless_fold_in

    def examples_of(number: int, stream_seed: tf.Tensor, shards: list[Shard], start: int) -> tf.data.Dataset:
        """What a stream has of a data set, from its example `start` on."""
        data, buffer_size = opened[number], shuffle_buffer_sizes[number]

        def epoch_records(epoch: tf.Tensor) -> tf.data.Dataset:
            epoch_seed = fold_in(stream_seed, epoch)
            records = data.source.read_shuffled(shards, epoch_seed, buffer_size)
            # Zipped and not mapped: calling a function for each would take longer than decoding a small image.
            constants = [epoch_seed] if len(opened) == 1 else [epoch_seed, number]
            first, *more = (tf.data.Dataset.from_tensors(value).repeat() for value in constants)
            return tf.data.Dataset.zip(first, tf.data.Dataset.range(tf.int64.max), records, *more)

        first_epoch, skip = divmod(start, sources.num_examples(shards))
        return tf.data.Dataset.range(first_epoch, tf.int64.max).flat_map(epoch_records).skip(skip)

    def stream(index: int, start: int) -> tf.data.Dataset:
        stream_seed = tf.constant([seed, index], tf.int64)
        if len(opened) == 1:
            return examples_of(0, stream_seed, parts[0][index], start)
        choice_seed = fold_in(stream_seed, len(opened))
        choices, counts = _dealt(deck, choice_seed, start)
        mixed = [
            examples_of(number, fold_in(stream_seed, number), parts[number][index], int(count))
            for number, count in enumerate(counts)
        ]
        return tf.data.Dataset.choose_from_datasets(mixed, choices)

    run = _of_several(opened, in_training=True)

    def example(epoch_seed, index, record, number=0):
        return run(number, record, {"_seed": fold_in(epoch_seed, index)})

    def with_shapes(*element):
        made = example(*element)
        unknown = {key: value for key, value in made.items() if not value.shape.is_fully_defined()}
        return made | {_SHAPE + key: tf.shape(value) for key, value in unknown.items()}

    local_streams = streams // process_count
    first_stream = process_index * local_streams

    def records_from(step: int) -> tf.data.Dataset:
        turns = tf.data.Dataset.from_tensor_slices(np.arange(local_batch_size, dtype=np.int64) // per_stream).repeat()
        of_streams = [stream(i, step * per_stream) for i in range(first_stream, first_stream + local_streams)]
        return tf.data.Dataset.choose_from_datasets(of_streams, turns)

    def examples_of_batch(batch: int) -> Iterator[tuple[_Opened, tf.Tensor, Callable[[], dict]]]:
        for epoch_seed, index, record, *number in records_from(start_step + batch).take(local_batch_size):
            data = opened[int(number[0]) if number else 0]
            yield data, record, functools.partial(example, epoch_seed, index, record, *number)

    ds = _map(records_from(start_step), with_shapes, num_parallel_calls or 4 * os.cpu_count())
    ds = ds.batch(local_batch_size, drop_remainder=True).prefetch(prefetch).with_options(_fast())
    return _closed_at_exit(_batches(ds, examples_of_batch))


def num_streams(batch_size: int, process_count: int, num_examples: int) -> int:
    """Returns into how many streams training data are cut.

    That is the greatest common divisor of the batch size and 8, so that all numbers of processes that divide it see the
    same batches; and of `num_examples`, those of the smallest data set, where these are fewer. Where it does not divide
    among the processes, it is as many as there are processes."""
    streams = math.gcd(batch_size, _NUM_STREAMS)
    if num_examples < streams:
        streams = math.gcd(streams, num_examples)
    return streams if num_examples and streams % process_count == 0 else process_count


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
    """As `batches_in_order`, of one data set."""
    return batches_in_order(
        [Selection(name, split, pp, data_dir)],
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
    )


def batches_in_order(
    selections: Sequence[Selection], *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """One pass in file order, data sets one after the other: each example once over all processes, equally many batches
    on each.

    Args: as `mixture_batches`, but `pp` has no random ops.

    Returns:
      Iterator of dicts of what `pp` leaves over, arrays [batch_size / process_count, ...], with
      `_mask` bool [batch_size / process_count]: True is an example, False is padding (zeros) at
      the end of the last batches; and `_index` int32 [batch_size / process_count], the examples'
      numbers in the split, whichever process reads them.

    Raises:
      ValueError: as `mixture_batches`.
    """
    local_batch_size = _local_batch_size(batch_size, process_count)
    opened = [_open(selection, process_count) for selection in selections]
    run = _of_several(opened, in_training=False)

    def records(parts: list[list[Shard]]) -> tf.data.Dataset:
        found = [data.source.read(shards) for data, shards in zip(opened, parts, strict=True)]
        numbered = (ds.map(lambda record, number=number: (record, number)) for number, ds in enumerate(found))
        return found[0] if len(found) == 1 else functools.reduce(tf.data.Dataset.concatenate, numbered)

    def example(record, number=0):
        return run(number, record, {})

    everything = [data.shards for data in opened]
    # (`tfds.even_splits` would cut up each part of a sum like validation+test, and number examples differently then.)
    ends = _even_ends(sum(data.num_examples for data in opened), process_count)
    first, stop = ends[process_index : process_index + 2]
    num_batches = math.ceil(ends[1] / local_batch_size)  # the first has the most
    mine = _cut(everything, first, stop)

    def examples_of_batch(batch: int) -> Iterator[tuple[_Opened, tf.Tensor, Callable[[], dict]]]:
        start = first + batch * local_batch_size
        for element in records(_cut(everything, start, min(start + local_batch_size, stop))):
            record, number = element if isinstance(element, tuple) else (element, 0)
            yield opened[int(number)], record, functools.partial(example, record, number)

    ds = _map(records(mine), example, tf.data.AUTOTUNE).batch(local_batch_size).prefetch(2)
    # What padding looks like where a process has no example of its own.
    template = _map(records(_cut(everything, 0, 1)), example, 1).batch(1)
    batches = _batches(ds, examples_of_batch)
    return _closed_at_exit(_padded(batches, template, num_batches, local_batch_size, first))


def examples(name: str, split: str, count: int, data_dir: str | None = None) -> list[dict[str, Any]]:
    """As `selected_examples`, of one split."""
    return selected_examples(Selection(name, split, "", data_dir), count)


def selected_examples(selection: Selection, count: int) -> list[dict[str, Any]]:
    """The first `count` examples of a selection (or all) as the data set has them, decoded and not preprocessed: arrays
    and bytes by feature; only labels are those of the selection.

    Raises:
      ValueError: as `mixture_batches`.
    """
    data = _open(selection, process_count=1)
    records = data.source.read(data.shards).take(count)
    ds = records.map(lambda record: data.relabel(data.source.decode(record)))
    return list(tfds.as_numpy(ds))


def _batches(
    ds: tf.data.Dataset, examples_of_batch: Callable[[int], Iterator[tuple["_Opened", tf.Tensor, Callable[[], dict]]]]
) -> Iterator[Batch]:
    batches = ds.as_numpy_iterator()
    for number in itertools.count():
        try:
            batch = next(batches, None)
        except tf.errors.OpError as error:
            raise ValueError(_at_fault(examples_of_batch(number)) or f"cannot be read: {one_line(error)}") from error
        if batch is None:
            return
        shapes = [batch.pop(key) for key in list(batch) if key.startswith(_SHAPE)]
        if any((shape != shape[0]).any() for shape in shapes):
            raise ValueError(_at_fault(examples_of_batch(number)))
        yield batch


def _at_fault(examples: Iterator[tuple["_Opened", tf.Tensor, Callable[[], dict]]]) -> str | None:
    """Which of the examples of a batch is not like the others, and why; None where that cannot be found."""
    remedy = "change Data.pp, mend the example, or set Data.skip_broken = True, which leaves such examples out"
    shapes: dict[str, list[str]] = collections.defaultdict(list)
    try:
        for data, record, run in examples:
            what = f"{data.source.describe(record)} of {data.selection.name!r}"
            try:
                example = run()
            except (tf.errors.OpError, ValueError) as error:
                return f"{what} cannot be preprocessed ({_reason(error)}): {remedy}"
            shape = ", ".join(f"{key} {_dimensions(tf.shape(value).numpy())}" for key, value in example.items())
            shapes[shape].append(what)
    except tf.errors.DataLossError as error:
        return f"a file of the data set is damaged, prepare it again: {one_line(error)}"
    if len(shapes) < 2:
        return None
    (shape, found), (usual, _) = sorted(shapes.items(), key=lambda item: len(item[1]))[:: len(shapes) - 1]
    return (
        f"{found[0]} cannot be preprocessed like others: it comes out as {shape}, they as {usual}. Bring all to one "
        "size in Data.pp, as resize_small(64) | central_crop(64) does, or set Data.skip_broken = True, which skips it"
    )


def _dimensions(shape: np.ndarray) -> str:
    return "×".join(map(str, shape.tolist())) or "scalar"


def _reason(error: BaseException) -> str:
    """What TensorFlow says of an example, without where in a graph it was."""
    message = getattr(error, "message", None) or str(error)
    message = message.partition("Traceback (most recent call last)")[0]  # of an op in Python
    message = re.sub(r"\{\{function_node.*?\}\}|\[Op:\w+\]|name: ?$", "", message)
    if asserted := re.search(r"assertion failed: \[(.*?)\]", message):  # by an op of ours
        message = asserted[1]
    return " ".join(message.partition("Condition x >= y")[0].split())[:200]


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


def _padded(batches, template, num_batches: int, size: int, first: int) -> Iterator[Batch]:
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
        raise ValueError(f"{what} cannot be preprocessed: {one_line(e)}") from e
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
    return num_selected(Selection(name, split, "", data_dir))


def num_selected(selection: Selection) -> int:
    """How many examples of a prepared data set are read.

    Raises:
      ValueError: as `num_examples`; there are no such classes.
    """
    return _open(selection, process_count=2).num_examples


def num_skipped(selection: Selection) -> int:
    """How many examples of a prepared data set are left out because they cannot be preprocessed."""
    return _open(selection, process_count=2).num_skipped


def labels(selection: Selection) -> np.ndarray | None:
    """The labels int64 [n] of all examples of a selection; None where they have none. The first time, all records of a
    TFDS data set are read for it."""
    data = _open(selection, process_count=2)
    if data.source.label_key is None:
        return None
    parts = [data.source.labels(shard)[slice(None) if shard.keep is None else shard.keep] for shard in data.shards]
    found = np.concatenate([np.zeros(0, np.int64), *parts])
    return found if data.table is None else np.where(found < 0, found, data.table[found])


def image_sizes(selection: Selection, count: int) -> list[tuple[int, int]]:
    """Height and width of the first `count` images of a selection as the data set has them. None that is broken."""
    data = _open(selection, process_count=2)
    records = data.source.read(data.shards).take(count)
    if "image" not in _map(records, data.source.deserialize, 1).element_spec:
        return []
    ds = _map(records, lambda record: tf.shape(data.source.decode(record)["image"])[-3:-1], tf.data.AUTOTUNE)
    return [tuple(size.tolist()) for size in ds.ignore_errors().as_numpy_iterator()]


def class_names(
    name: str, data_dir: str | None = None, classes: tuple[int | str, ...] | None = None
) -> tuple[str, ...] | None:
    """The names of the classes by label, of a prepared data set or of the classes chosen from it; None where it has no
    label or no names.

    Raises:
      ValueError: no such data set or classes, or it is not prepared.
    """
    source = sources.open_source(name, data_dir)
    if classes is None:
        return source.class_names
    source.check_labels()
    return tuple(source.class_names[i] for i in resolve_classes(classes, source.class_names, name))


def prepare(name: str, data_dir: str | None = None) -> None:
    """See `sources.prepare`."""
    sources.prepare(name, data_dir)


_builder = sources.builder


# ---- What is read of a data set. -----------------------------------------------------------------


def resolve_classes(classes: Sequence[int | str], names: Sequence[str], data: str) -> list[int]:
    """The labels of the classes chosen, in their order.

    Args:
      classes: each is a name, a number, or a range of numbers as "10:20", which has no 20.
      names: of all classes.
      data: what has them, for messages.

    Raises:
      ValueError: there is no such class, or it is chosen twice, or none is.
    """
    numbers = {name: i for i, name in enumerate(names)}
    labels: list[int] = []
    for chosen in classes:
        if chosen in numbers:
            labels.append(numbers[chosen])
        elif isinstance(chosen, int) and 0 <= chosen < len(names):
            labels.append(chosen)
        elif isinstance(chosen, str) and (found := re.fullmatch(r"(\d*):(\d*)", chosen)):
            start, stop = int(found[1] or 0), int(found[2] or len(names))
            if not start < stop <= len(names):
                raise ValueError(f'Data.classes: {data!r} has no classes {chosen!r}, but those of "0:{len(names)}"')
            labels.extend(range(start, stop))
        else:
            close = difflib.get_close_matches(str(chosen), names, 3) or names[:3]
            raise ValueError(
                f"Data.classes: {data!r} has no class {chosen!r}: it has {len(names)}, numbers from 0 to "
                f"{len(names) - 1}, names such as {', '.join(close)}"
            )
    if not labels:
        raise ValueError("Data.classes is empty: choose a class, or unset it for all")
    for label, count in collections.Counter(labels).items():
        if count > 1:
            raise ValueError(f"Data.classes: class {names[label]!r}, number {label}, is chosen twice: once is enough")
    return labels


class _Opened:
    """A selection that can be read.

    Attributes:
      selection: it.
      source: where it is read from.
      shards: what of the source.
      num_examples: how many examples.
      num_skipped: how many more cannot be preprocessed.
      table: what labels become: int64 [C], -1 for what is not read; None: they stay.
    """

    def __init__(self, selection: Selection):
        self.selection = selection
        self.source = sources.open_source(selection.name, selection.data_dir)
        self._apply = preprocess.parse(selection.pp)
        self.table: np.ndarray | None = None
        shards, labels, table = self.source.shards(selection.split), None, None
        if selection.classes is not None:
            self.source.check_labels()
            labels = resolve_classes(selection.classes, self.source.class_names, selection.name)
            table = np.full(len(self.source.class_names), -1)
            table[labels] = np.arange(len(labels))
            shards = self._of_classes(shards, labels)
        if selection.labels is not None:
            new = np.array(selection.labels)
            table = new if table is None else np.where(table < 0, -1, new[table])
        self.table = table
        self.num_skipped = 0
        if selection.skip_broken:
            shards, self.num_skipped = _without_broken(self, shards, labels)
        if selection.max_examples is not None:
            shards = sources.cut(shards, 0, selection.max_examples)
        self.shards = shards
        self.num_examples = sources.num_examples(shards)
        self._whole = not (selection.classes or selection.skip_broken or selection.max_examples)

    def _of_classes(self, shards: list[Shard], labels: list[int]) -> list[Shard]:
        counts = np.zeros(len(self.source.class_names), np.int64)
        found = []
        for shard in shards:
            labels_here = self.source.labels(shard)
            shard = shard.with_only(np.isin(labels_here, labels))
            if len(shard):
                found.append(shard)
            counts += np.bincount(labels_here[labels_here >= 0], minlength=len(counts))[: len(counts)]
        if missing := [self.source.class_names[i] for i in labels if not counts[i]]:
            logging.warning(
                "Split %r of %s has no example of %d classes chosen: %s",
                *(self.selection.split, self.selection.name, len(missing), ", ".join(missing[:_NAMED])),
            )
        return found

    def even_parts(self, count: int) -> list[list[Shard]]:
        """What is read, in `count` parts of the same size, but for one example."""
        if self._whole:
            return self.source.even_shards(self.selection.split, count)
        ends = _even_ends(self.num_examples, count)
        return [sources.cut(self.shards, start, stop) for start, stop in itertools.pairwise(ends)]

    def relabel(self, example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """An example of the source with the labels of the selection."""
        if self.table is None:
            return example
        label = tf.cast(example[self.source.label_key], tf.int64)
        known = tf.gather(tf.constant(self.table, tf.int64), tf.maximum(label, 0))
        return example | {self.source.label_key: tf.where(label < 0, label, known)}

    def run(self, record: tf.Tensor, extra: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """The preprocessed example of a record; `extra` is added before."""
        example = self._apply(self.relabel(self.source.deserialize(record)) | extra)
        return {key: tf.constant(value) if isinstance(value, list) else value for key, value in example.items()}


def _open(selection: Selection, process_count: int) -> _Opened:
    if process_count == 1:
        sources.prepare(selection.name, selection.data_dir)
    return _Opened(selection)


def _of_several(opened: list[_Opened], in_training: bool):
    """Returns run(number of the data set, record, more tensors to add) -> preprocessed example."""
    if len(opened) == 1:
        return lambda number, record, extra: opened[0].run(record, extra)
    # Without random ops there is no seed, and with one they are random.
    extra = {"_seed": tf.zeros([2], tf.int64)} if in_training else {}
    specs = []
    for data in opened:
        function = lambda record, data=data: data.run(record, extra)
        specs.append(_map(tf.data.Dataset.from_tensors(""), function, 1).element_spec)
    described = [{key: (spec.dtype.name, spec.shape.rank) for key, spec in of_one.items()} for of_one in specs]
    for data, here in zip(opened, described, strict=True):
        if here != described[0]:
            first = opened[0].selection.name
            both = ({k: f"{d}, {r} dimensions" for k, (d, r) in x.items()} for x in (described[0], here))
            says = "; ".join(
                f"{name} has " + ", ".join(f"{k} ({v})" for k, v in x.items())
                for name, x in zip((first, data.selection.name), both, strict=True)
            )
            raise ValueError(
                f"the data sets of a mixture have to give the same: {says}. End their Data.pp with one keep(…)"
            )
    shapes = {
        key: [n if all(s[key].shape[i] == n for s in specs) else None for i, n in enumerate(spec.shape)]
        for key, spec in specs[0].items()
    }

    def run(number, record, extra):
        branches = [functools.partial(data.run, record, extra) for data in opened]
        example = tf.switch_case(tf.cast(number, tf.int32), branches)
        return {key: tf.ensure_shape(value, shapes[key]) for key, value in example.items()}

    return run


def _cut(parts: list[list[Shard]], start: int, stop: int) -> list[list[Shard]]:
    """As `sources.cut`, of several data sets that follow one another."""
    found = []
    for shards in parts:
        found.append(sources.cut(shards, start, stop))
        size = sources.num_examples(shards)
        start, stop = start - size, stop - size
    return found


def _even_ends(total: int, count: int) -> list[int]:
    """Where each of `count` parts begins, and the last ends."""
    size, rest = divmod(total, count)
    return [i * size + min(i, rest) for i in range(count + 1)]


def _deck(weights: Sequence[float]) -> np.ndarray:
    """Numbers of data sets int64 [_DECK_SIZE], as often as their weights say, each at least once."""
    shares = np.array(weights, np.float64) / sum(weights) * _DECK_SIZE
    counts = np.maximum(np.floor(shares), 1).astype(np.int64)
    # What is left goes to those that have lost most by rounding.
    for i in np.argsort(np.floor(shares) - shares, kind="stable")[: max(_DECK_SIZE - counts.sum(), 0)]:
        counts[i] += 1
    counts[counts.argmax()] -= counts.sum() - _DECK_SIZE
    return np.repeat(np.arange(len(counts)), counts)


def _dealt(deck: np.ndarray, seed: tf.Tensor, start: int) -> tuple[tf.data.Dataset, np.ndarray]:
    """Which data sets are next, endlessly, from place `start` on; and how often each has come before."""
    cards = tf.constant(deck)

    def shuffled(deal: tf.Tensor) -> tf.Tensor:
        return tf.random.experimental.stateless_shuffle(cards, tf.random.experimental.stateless_fold_in(seed, deal))

    deals, place = divmod(start, len(deck))
    # (What a seed becomes depends on the type of what is folded in.)
    begun = shuffled(tf.constant(deals, tf.int64)).numpy()[:place]
    counts = deals * np.bincount(deck) + np.bincount(begun, minlength=deck.max() + 1)
    deal = lambda number: tf.data.Dataset.from_tensor_slices(shuffled(number))
    return tf.data.Dataset.range(deals, tf.int64.max).flat_map(deal).skip(place), counts


def _local_batch_size(batch_size: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} is not a positive multiple of {process_count} process(es)")
    return batch_size // process_count


def _map(ds: tf.data.Dataset, function, num_parallel_calls: int) -> tf.data.Dataset:
    # Without AutoGraph, so that an error in the preprocessing string stays the one line it is.
    function = tf.autograph.experimental.do_not_convert(function)
    return ds.map(function, num_parallel_calls=num_parallel_calls, deterministic=True)


def _fast() -> tf.data.Options:
    """Examples are written into their batch as they are made. (TensorFlow then compares how many numbers they have, but
    not their shapes.) And nothing is tuned while it runs: of small images that takes longer than it gains."""
    options = tf.data.Options()
    options.autotune.enabled = False
    options.experimental_optimization.map_and_batch_fusion = True
    return options


# ---- What cannot be preprocessed. ----------------------------------------------------------------


def _without_broken(data: _Opened, shards: list[Shard], labels: list[int] | None) -> tuple[list[Shard], int]:
    """Leaves out examples that cannot be preprocessed, or that get another shape than most: the shards, and how many.

    All are preprocessed once to find out; it is written down beside the data, and read from there afterwards. So which
    examples there are is known before the first batch, and skipping them changes nothing about what a batch is a
    function of. If a file of a folder changes, all are looked at again.

    Raises:
      ValueError: they are more than half of them, so that it is the preprocessing that is wrong.
    """
    selection, source = data.selection, data.source
    # Ops that work on any image change nothing, and would look at training and evaluation data separately.
    ops = [op for op in pp_string.calls(selection.pp) if pp_string.name_of(op) not in ("flip_lr", "value_range")]
    pp = " | ".join(ast.unparse(op) for op in ops)
    checked = [_READS, source.full_name, source.state(), selection.split, pp, labels, selection.max_examples]
    name = f"skipped-{hashlib.sha256(json.dumps(checked).encode()).hexdigest()[:16]}.json"
    path = source.beside(name)
    if path is None:
        looked_at, skipped = _look_for_broken(data, shards)
        names = _names(source, shards, sorted(skipped))
        reasons = _reasons(data, shards, sorted(skipped)[:_EXPLAINED]) | {i: r for i, r in skipped.items() if r}
        found = {
            **{"data": selection.name, "split": selection.split, "pp": pp, "examples": looked_at},
            "skipped": {
                str(i): f"{name}: {reasons.get(i, '')}" for i, name in zip(sorted(skipped), names, strict=True)
            },
        }
        if 2 * len(skipped) > looked_at:
            raise ValueError(
                f"{len(skipped)} of {looked_at} examples of split {selection.split!r} of {selection.name!r} cannot be "
                f"preprocessed, which are too many to skip: look at {selection.pp!r}. The first: "
                f"{next(iter(found['skipped'].values()))}"
            )
        path = source.keep_beside(name, json.dumps(found, indent=1).encode())
        for what in list(found["skipped"].values())[:_NAMED]:
            logging.warning("Skipped: %s", what)
    found = json.loads(path.read_text())
    numbers = np.array(sorted(map(int, found["skipped"])), np.int64)
    if len(numbers) and path not in _said:
        _said.add(path)
        logging.warning(
            "%d of %d examples of split %r of %s cannot be preprocessed and are skipped; %s names them",
            *(len(numbers), found["examples"], selection.split, selection.name, path),
        )
    return sources.without(shards, numbers), len(numbers)


def _look_for_broken(data: _Opened, shards: list[Shard]) -> tuple[int, dict[int, str]]:
    """How many examples were looked at, as many as `max_examples` takes, and which of them are broken, by number, with
    the reason where it is the shape."""
    selection = data.selection
    total = sources.num_examples(shards)
    logging.info("Looking for what cannot be preprocessed in %d examples of %s; once", total, selection.name)
    wanted = total if selection.max_examples is None else selection.max_examples
    sizes: list[int] = []
    failures: list[Exception] = []

    def chunks() -> Iterator[np.ndarray]:
        # What goes wrong here is no example's fault, and would be left out with them for ever.
        try:
            for chunk in data.source.read(shards).batch(_CHUNK).as_numpy_iterator():
                sizes.append(len(chunk))
                yield chunk
        except Exception as error:
            failures.append(error)

    def check(number: tf.Tensor, record: tf.Tensor) -> tuple:
        example = preprocess.flatten()(data.run(record, {"_seed": tf.zeros([2], tf.int64)}))
        example = {key: value for key, value in example.items() if isinstance(value, tf.Tensor)}
        unknown = {key: value for key, value in example.items() if not value.shape.is_fully_defined()}
        shapes = [
            tf.strings.join([key, " ", tf.strings.reduce_join(tf.strings.as_string(tf.shape(value)), separator="×")])
            for key, value in unknown.items()
        ]
        # What is not asked for TensorFlow does not compute.
        firsts = tuple(tf.reshape(value, [-1])[:1] for value in example.values())
        return number, tf.strings.join(shapes, ", ") if shapes else tf.constant(""), firsts

    ds = tf.data.Dataset.from_generator(chunks, output_signature=tf.TensorSpec([None], tf.string)).unbatch()
    ds = _map(ds.enumerate(), lambda i, record: check(i, record), tf.data.AUTOTUNE).ignore_errors()
    shapes: dict[int, str] = {}
    counts: collections.Counter[str] = collections.Counter()
    last = time.monotonic()
    for number, shape, _ in ds.as_numpy_iterator():
        shapes[int(number)] = text = shape.decode()
        counts[text] += 1
        # Enough good ones, whichever shape turns out to be the usual one.
        if counts[text] == wanted and max(counts.values()) == wanted:
            break
        if time.monotonic() - last > 60:
            last = time.monotonic()
            logging.info("Looked at %d of %d examples of %s", len(shapes), total, selection.name)
    if failures:
        raise ValueError(f"{selection.name!r} cannot be read: {one_line(failures[0])}") from failures[0]
    stopped = bool(counts) and max(counts.values()) == wanted and wanted < total
    looked_at = max(shapes) + 1 if stopped else total
    usual = counts.most_common(1)[0][0] if counts else ""
    skipped = {}
    for number in range(looked_at):
        if number not in shapes:
            skipped[number] = ""
        elif shapes[number] != usual:
            skipped[number] = f"comes out as {shapes[number]}, most as {usual}"
    return looked_at, skipped


def _names(source: sources.Source, shards: list[Shard], numbers: list[int]) -> list[str]:
    names, start = [], 0
    for shard in shards:
        here = [number - start for number in numbers if start <= number < start + len(shard)]
        names += source.places(shard, here)
        start += len(shard)
    return names


def _reasons(data: _Opened, shards: list[Shard], numbers: list[int]) -> dict[int, str]:
    """Why examples cannot be preprocessed."""
    reasons = {}
    records = data.source.read(_only(shards, numbers))
    for number, record in zip(numbers, records, strict=True):
        try:
            data.run(record, {"_seed": tf.zeros([2], tf.int64)})
        except (tf.errors.OpError, ValueError) as error:
            reasons[number] = _reason(error)
    return reasons


def _only(shards: list[Shard], numbers: list[int]) -> list[Shard]:
    return [part for number in numbers for part in sources.cut(shards, number, number + 1)]

"""Examples that cannot be preprocessed: finds and skips them (`Data.skip_broken`), or names them in an error."""

import ast
import collections
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import tensorflow as tf
from absl import logging
from etils import epath

from jetformer.data import pp_string, preprocess, sources
from jetformer.data.sources import Shard, Source
from jetformer.errors import one_line

# How many of the skipped examples the log names, and for how many the file gives a reason.
_NAMED, _EXPLAINED = 10, 1000
# Increase it when other images can be decoded than before: all examples are checked again.
_VERSION = 2
_CHUNK = 256  # records read at a time
_SECONDS_BETWEEN_LOGS = 60

_logged: set[epath.Path] = set()


def skip(reader, shards: list[Shard], labels: list[int] | None) -> tuple[list[Shard], int]:
    """Skips examples that cannot be preprocessed, or whose shape differs from that of most.

    The first call preprocesses all examples and writes the result beside the data; later ones read it there. So the set
    of examples is known before the first batch, and batches stay a function of (seed, step). If a file of a folder
    changes, all are checked again.

    Args:
      reader: a `reader.Reader` of the split.
      shards: the examples to check.
      labels: the labels of the classes it reads; None: all.

    Returns:
      The shards without the skipped examples, and how many are skipped.

    Raises:
      ValueError: more than half of the examples are broken, so the preprocessing itself is wrong.
    """
    # These ops work for any image. Without them, training and evaluation share a result.
    ops = [op for op in pp_string.calls(reader.pp) if pp_string.name_of(op) not in ("flip_lr", "value_range")]
    pp = " | ".join(ast.unparse(op) for op in ops)
    source = reader.source
    key = [_VERSION, source.full_name, source.state(), reader.split, pp, labels, reader.data.max_examples]
    name = f"skipped-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    path = source.beside(name)
    if path is None:
        found = _check_all(reader, shards) | {"pp": pp}
        path = source.keep_beside(name, json.dumps(found, indent=1).encode())
        for what in list(found["skipped"].values())[:_NAMED]:
            logging.warning("Skipped: %s", what)
    found = json.loads(path.read_text())
    numbers = np.array(sorted(map(int, found["skipped"])), np.int64)
    if len(numbers) and path not in _logged:
        _logged.add(path)
        logging.warning(
            "%d of %d examples of split %r of %s cannot be preprocessed and are skipped; %s lists them",
            *(len(numbers), found["examples"], reader.split, reader.data.name, path),
        )
    return sources.without(shards, numbers), len(numbers)


def _check_all(reader, shards: list[Shard]) -> dict:
    """Returns what the file beside the data holds: how many examples were checked, and which are broken and why."""
    total = sources.num_examples(shards)
    logging.info("Checking once which of %d examples of %s can be preprocessed", total, reader.data.name)
    num_checked, wrong_shape = _find(reader, shards, total)
    numbers = sorted(wrong_shape)
    reasons = wrong_shape | _reasons(reader, shards, [i for i in numbers if not wrong_shape[i]][:_EXPLAINED])
    names = _names(reader.source, shards, numbers)
    skipped = {str(i): f"{name}: {reasons[i]}" for i, name in zip(numbers, names, strict=True)}
    if 2 * len(skipped) > num_checked:
        raise ValueError(
            f"{len(skipped)} of {num_checked} examples of split {reader.split!r} of {reader.data.name!r} cannot be "
            f"preprocessed, too many to skip: check {reader.pp!r}. The first: {next(iter(skipped.values()))}"
        )
    return {"data": reader.data.name, "split": reader.split, "examples": num_checked, "skipped": skipped}


def _find(reader, shards: list[Shard], total: int) -> tuple[int, dict[int, str]]:
    """Preprocesses examples until there are `max_examples` good ones.

    Returns:
      How many were checked, and the numbers of the broken ones, each with what is wrong with its shape or "".
    """
    wanted = total if reader.data.max_examples is None else reader.data.max_examples
    read_errors: list[Exception] = []

    def chunks() -> Iterator[np.ndarray]:
        # An error here is no example's fault, and must not mark examples as broken for good.
        try:
            yield from reader.source.read(shards).batch(_CHUNK).as_numpy_iterator()
        except Exception as error:
            read_errors.append(error)

    def check(number: tf.Tensor, record: tf.Tensor) -> tuple:
        example = preprocess.flatten()(_example(reader, record))
        example = {key: value for key, value in example.items() if isinstance(value, tf.Tensor)}
        unknown = {key: value for key, value in example.items() if not value.shape.is_fully_defined()}
        shapes = [
            tf.strings.join([key, " ", tf.strings.reduce_join(tf.strings.as_string(tf.shape(value)), separator="×")])
            for key, value in unknown.items()
        ]
        # TensorFlow only computes what is returned.
        firsts = tuple(tf.reshape(value, [-1])[:1] for value in example.values())
        return number, tf.strings.join(shapes, ", ") if shapes else tf.constant(""), firsts

    ds = tf.data.Dataset.from_generator(chunks, output_signature=tf.TensorSpec([None], tf.string)).unbatch()
    ds = preprocess.map_examples(ds.enumerate(), check, tf.data.AUTOTUNE).ignore_errors()
    shapes: dict[int, str] = {}
    counts: collections.Counter[str] = collections.Counter()
    last, enough = time.monotonic(), False
    for number, shape, _ in ds.as_numpy_iterator():
        shapes[int(number)] = text = shape.decode()
        counts[text] += 1
        if enough := counts[text] == wanted and wanted < total:
            break
        if time.monotonic() - last > _SECONDS_BETWEEN_LOGS:
            last = time.monotonic()
            logging.info("Checked %d of %d examples of %s", len(shapes), total, reader.data.name)
    if read_errors:
        raise ValueError(f"cannot read {reader.data.name!r}: {one_line(read_errors[0])}") from read_errors[0]
    num_checked = max(shapes) + 1 if enough else total
    usual = counts.most_common(1)[0][0] if counts else ""
    missing = {i: "" for i in range(num_checked) if i not in shapes}
    return num_checked, missing | {
        i: f"its shape is {shape}, that of most {usual}" for i, shape in shapes.items() if shape != usual
    }


def _names(source: Source, shards: list[Shard], numbers: list[int]) -> list[str]:
    names, start = [], 0
    for shard in shards:
        here = [number - start for number in numbers if start <= number < start + len(shard)]
        names += source.places(shard, here)
        start += len(shard)
    return names


def _reasons(reader, shards: list[Shard], numbers: list[int]) -> dict[int, str]:
    """Returns why examples of these numbers cannot be preprocessed."""
    reasons = {}
    chosen = [part for number in numbers for part in sources.cut(shards, number, number + 1)]
    for number, record in zip(numbers, reader.source.read(chosen), strict=True):
        try:
            _example(reader, record)
        except (tf.errors.OpError, ValueError) as error:
            reasons[number] = _reason(error)
    return reasons


def _example(reader, record: tf.Tensor) -> dict[str, tf.Tensor]:
    """Returns the preprocessed example of a record (scalar string)."""
    return reader.example(record, tf.zeros([2], tf.int64), 0)


def explain(
    elements: Iterable[tuple | tf.Tensor], example: Callable[..., dict], describe: Callable[..., str]
) -> str | None:
    """Returns which element of a failed batch cannot be preprocessed like the others, and why; None if all can.

    Args:
      elements: of the batch, before preprocessing.
      example: preprocesses an element, see `Reader.example`.
      describe: names an element, see `Reader.describe`.
    """
    shapes: dict[str, list[str]] = collections.defaultdict(list)
    try:
        for element in elements:
            element = element if isinstance(element, tuple) else (element,)
            name = describe(*element)
            try:
                made = example(*element)
            except (tf.errors.OpError, ValueError) as error:
                return (
                    f"{name} cannot be preprocessed ({_reason(error)}): change Data.pp, repair the example, or skip "
                    "such examples with Data.skip_broken = True"
                )
            shape = ", ".join(f"{key} {_dimensions(tf.shape(value).numpy())}" for key, value in made.items())
            shapes[shape].append(name)
    except tf.errors.DataLossError as error:
        return f"a file of the dataset is damaged, prepare it again: {one_line(error)}"
    if len(shapes) < 2:
        return None
    (shape, found), (usual, _) = sorted(shapes.items(), key=lambda item: len(item[1]))[:: len(shapes) - 1]
    return (
        f"{found[0]} cannot be batched with others: preprocessed, its shape is {shape}, theirs {usual}. Bring all to "
        "one size in Data.pp, e.g. by resize_small(64) | central_crop(64), or skip such examples with "
        "Data.skip_broken = True"
    )


def _dimensions(shape: np.ndarray) -> str:
    return "×".join(map(str, shape.tolist())) or "scalar"


def _reason(error: BaseException) -> str:
    """Returns TensorFlow's message without the names of graph nodes."""
    message = getattr(error, "message", None) or str(error)
    message = message.partition("Traceback (most recent call last)")[0]  # of an op in Python
    message = re.sub(r"\{\{function_node.*?\}\}|\[Op:\w+\]|name: ?$", "", message)
    if asserted := re.search(r"assertion failed: \[(.*?)\]", message):  # by one of our ops
        message = asserted[1]
    return " ".join(message.partition("Condition x >= y")[0].split())[:200]

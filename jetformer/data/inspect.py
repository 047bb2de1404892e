"""Inspects the data of an experiment.

    python -m jetformer.data.inspect --gin_file=experiments/….gin --out=/tmp/data.png

Prints sizes, shapes, label counts, captions, lengths of texts and examples per second, and writes a picture of training
images.
"""

import collections
import itertools
import time
from collections.abc import Iterator, Sequence

import numpy as np
from absl import flags, logging
from upath import UPath

from jetformer import config, program
from jetformer.data.dataset import Data, MixtureData
from jetformer.data.mixture import MixtureReader
from jetformer.data.pipeline import Batch, peek
from jetformer.data.reader import Reader
from jetformer.experiment import Experiment
from jetformer.sampling.grid import enlarged, labelled, save_png, tile

flags.adopt_module_key_flags(program)
flags.DEFINE_integer("examples", 1000, "Number of training examples to read.", lower_bound=1)
flags.DEFINE_string("out", "data.png", "The picture to write.")
FLAGS = flags.FLAGS

_SHOWN = 12  # classes, sizes
_COLUMNS = 8
_ROWS = 8
_TEXTS = 4
# In larger splits, only the labels of the examples read are counted.
_MAX_COUNTED = 200_000


def report(data: Data | MixtureData, batch_size: int, seed: int, count: int) -> tuple[list[str], np.ndarray | None]:
    """Describes data.

    Args:
      data: prepared.
      batch_size, seed: of training.
      count: number of training examples to read.

    Returns:
      Lines of text, and a picture uint8 `[H, W, C]` of training images; None if there are none.

    Raises:
      ValueError: the data cannot be read or preprocessed.
    """
    names = data.class_names()
    lines = [f"data: {data.name}"]
    if names is not None:
        lines.append(f"classes: {len(names)} ({_several(names)})")
    for title, reader in (("train", data.train_reader()), ("eval", data.reader())):
        for part in reader.readers if isinstance(reader, MixtureReader) else [reader]:
            lines += _about_split(title, part, names, count)
    batches, rate = _timed(data.train_batches(batch_size=batch_size, seed=seed), batch_size, count)
    first = batches[0]
    lines.append("a batch of training:")
    lines += [f"  {name} {array.dtype} {list(array.shape)}" for name, array in first.items()]
    picture = None
    if "image" in first:
        images = np.concatenate([batch["image"] for batch in batches])
        lines.append(f"  values of image from {images.min()} to {images.max()}, mean {images.mean():.4g}")
        picture = _picture(images, _labels(batches), names)
    if data.has_texts():
        lines += _about_texts(data, batches)
    elif (labels := _labels(batches)) is not None:
        lines += _counts(labels, names, f"  labels of {len(labels):,} examples")
    lines.append(f"{rate:,.0f} examples per second")
    return lines, picture


def _about_split(title: str, reader: Reader, names: Sequence[str] | None, count: int) -> list[str]:
    skipped = f", {reader.num_skipped} more skipped" if reader.data.skip_broken else ""
    lines = [f"{title}: {reader.num_examples:,} examples of {reader.data.name}, {reader.split}{skipped}"]
    sizes = collections.Counter(reader.image_sizes(count))
    if sizes:
        shown = ", ".join(f"{h}×{w} ({n})" for (h, w), n in sizes.most_common(_SHOWN))
        if len(sizes) > _SHOWN:
            heights, widths = zip(*sizes, strict=True)
            shown = f"{min(heights)} to {max(heights)} × {min(widths)} to {max(widths)}"
        lines.append(f"  image sizes in the dataset, height × width, of {sizes.total():,}: {shown}")
    lines += [f"  captions in the dataset: {_several(list(map(repr, several)))}" for several in reader.captions(_TEXTS)]
    labels = reader.labels() if reader.num_examples <= _MAX_COUNTED else None
    return lines if labels is None else lines + _counts(labels, names, "  labels")


def _timed(batches: Iterator[Batch], batch_size: int, count: int) -> tuple[list[Batch], float]:
    """Returns batches of `count` examples, and the rate in examples per second."""
    _, batches = peek(batches, "the training split")
    next(batches)
    start = time.perf_counter()
    found = list(itertools.islice(batches, -(-count // batch_size)))
    return found, len(found) * batch_size / (time.perf_counter() - start)


def _labels(batches: Sequence[Batch]) -> np.ndarray | None:
    """Returns the labels of batches, or their texts of one token."""
    first = batches[0]
    if "label" in first:
        return np.concatenate([batch["label"] for batch in batches])
    if "text" in first and first["text"].ndim == 2 and first["text"].shape[1] == 1:
        return np.concatenate([batch["text"][:, 0] for batch in batches])
    return None


def _name(label: int, names: Sequence[str] | None) -> str:
    return names[label] if names is not None and 0 <= label < len(names) else str(label)


def _several(items: Sequence[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (", …" if len(items) > _SHOWN else "")


def _counts(labels: np.ndarray, names: Sequence[str] | None, what: str) -> list[str]:
    counts = collections.Counter(labels.tolist())
    shown = _several([f"{_name(label, names)} {counts[label]:,}" for label in sorted(counts)])
    lines = [f"{what}: {shown}"]
    if len(counts) > 1:
        lines[0] += f" (from {min(counts.values()):,} to {max(counts.values()):,} each)"
    missing = [name for i, name in enumerate(names or ()) if i not in counts]
    if missing:
        lines.append(f"  {len(missing)} classes without examples: {_several(missing)}")
    return lines


def _about_texts(data: Data | MixtureData, batches: Sequence[Batch]) -> list[str]:
    texts = data.texts()
    tokens = np.concatenate([batch["text"] for batch in batches])
    ended = (tokens == texts.tokenizer.eos_id).any(1)
    lengths = np.where(ended, (tokens == texts.tokenizer.eos_id).argmax(1), tokens.shape[1])
    low, middle, high = np.percentile(lengths, (0, 50, 100))
    lines = [
        f"  tokens of a text without its end: {low:.0f} to {high:.0f}, median {middle:.0f}, mean {lengths.mean():.1f}; "
        f"{(~ended).mean():.1%} are truncated at {tokens.shape[1]}"
    ]
    return lines + [f"  text: {text!r}" for text in texts.decode(tokens[:_TEXTS])]


def _picture(images: np.ndarray, labels: np.ndarray | None, names: Sequence[str] | None) -> np.ndarray:
    """Returns a picture of images, with labels a row for each class."""
    if images.dtype != np.uint8:
        low, high = images.min(), images.max()
        images = np.round((images - low) / max(high - low, 1e-9) * 255).astype(np.uint8)
    columns = min(_COLUMNS, len(images))
    if labels is None:
        count = min(len(images) // columns, _ROWS) * columns
        return enlarged(tile(images[:count], columns))
    rows, titles = [], []
    for label in np.unique(labels)[:_ROWS]:
        of_class = images[labels == label][:columns]
        rows.append(np.pad(of_class, [(0, columns - len(of_class)), (0, 0), (0, 0), (0, 0)]))
        titles.append(f"{label}: {_name(label, names)}" if names else str(label))
    return labelled(np.concatenate(rows), columns, titles)


def main() -> None:
    config.parse(FLAGS.gin_file, FLAGS.gin_bindings)
    run = config.call(Experiment)
    run.data.prepare()
    lines, picture = report(run.data, run.batch_size, run.seed, FLAGS.examples)
    print("\n".join(lines))
    if picture is not None:
        save_png(picture, UPath(FLAGS.out))
        logging.set_verbosity(logging.INFO)
        logging.info("Training images: %s", FLAGS.out)


if __name__ == "__main__":
    program.run(main)

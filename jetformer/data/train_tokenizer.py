"""Trains a SentencePiece tokenizer on the texts of a dataset.

    python -m jetformer.data.train_tokenizer --train=coco_captions --key=captions/text --vocab_size=8000 \\
        --output=coco.model
    python -m jetformer.data.train_tokenizer --train=folder:/data/birds --key=captions --lower --vocab_size=1000 \\
        --output=birds.model

The preprocessing ops `tok` and `caption` then use it with `model="coco.model"`.
"""

import hashlib
import itertools
import os
from collections.abc import Iterator

import tensorflow as tf
from absl import flags, logging
from upath import UPath

from jetformer import program
from jetformer.data import preprocess, sources
from jetformer.data.tokenizer import Tokenizer, train
from jetformer.storage import write_whole

flags.DEFINE_string("train", None, "Dataset to train a tokenizer on, as Data.name names it.", required=True)
flags.DEFINE_string("split", "train", "Its split.")
flags.DEFINE_string("key", None, "Its feature that holds the texts, e.g. captions/text.", required=True)
flags.DEFINE_string("data_dir", None, "See Data.data_dir; default: ~/tensorflow_datasets.")
flags.DEFINE_bool("lower", False, "Lower-case the texts, for use after the preprocessing op `lower`.")
flags.DEFINE_integer("texts", 1_000_000, "Maximum number of texts, from the start of the split.", lower_bound=1)
flags.DEFINE_integer("vocab_size", None, "Maximum number of tokens.", required=True, lower_bound=4)
flags.DEFINE_float(
    "character_coverage", 0.9999, "Share of all characters that are known; 0.9995 is common for Chinese and Japanese."
)
flags.DEFINE_string("output", None, "The .model file to write.", required=True)
FLAGS = flags.FLAGS


def read_texts(name: str, split: str, key: str, *, lower: bool = False, data_dir: str | None = None) -> Iterator[bytes]:
    """Returns the texts of a dataset, in file order. Prepares the dataset if that has not been done.

    Args:
      name: of the dataset, see `Data.name`.
      split: TFDS split.
      key: of a feature of strings of any shape: a text, or several. `a/b` is `b` in the feature `a`.
      lower: lower-cases them, as the op `lower` does.
      data_dir: see `Data.data_dir`.

    Raises:
      ValueError: there is no such dataset or split, or no texts under this key.
    """
    sources.prepare(name, data_dir)
    source = sources.open_source(name, data_dir)
    records = source.read(source.shards(split))
    spec = preprocess.map_examples(records, lambda r: preprocess.flatten()(source.decode(r)), 1).element_spec
    with_texts = [k for k, tensor in spec.items() if tensor.dtype.name == "string"]
    if key not in with_texts:
        has = f"it has texts under {', '.join(with_texts)}" if with_texts else "it has no texts"
        raise ValueError(f"dataset {name!r} has no texts under {key!r}: {has}; all its keys: {', '.join(spec)}")

    # Nothing else of an example is decoded: TensorFlow only computes what is returned.
    pp = f"flatten|reshape([-1], inkey={key!r}, outkey='text')" + ("|lower" if lower else "")
    text_of = preprocess.parse(f"{pp}|keep('text')")
    ds = preprocess.map_examples(records, lambda r: text_of(source.deserialize(r)), tf.data.AUTOTUNE)
    return (text for example in ds.as_numpy_iterator() for text in example["text"])


def main() -> None:
    output = UPath(FLAGS.output)
    # Checked first, since training can take long. An object store has no directories.
    if isinstance(output, os.PathLike) and not output.parent.is_dir():
        raise ValueError(f"--output: there is no directory {output.parent}")
    texts = read_texts(FLAGS.train, FLAGS.split, FLAGS.key, lower=FLAGS.lower, data_dir=FLAGS.data_dir)
    texts = itertools.islice(texts, FLAGS.texts)
    model = train(texts, FLAGS.vocab_size, character_coverage=FLAGS.character_coverage)
    write_whole(output, model)
    logging.set_verbosity(logging.INFO)
    logging.info("%s: %d tokens, sha256 %s", output, Tokenizer(model).vocab_size, hashlib.sha256(model).hexdigest())


if __name__ == "__main__":
    program.run(main)

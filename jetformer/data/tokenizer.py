"""SentencePiece tokenizers: loading one, and training one on the texts of a data set.

    python -m jetformer.data.tokenizer --train=coco_captions --key=captions/text --vocab_size=8000 --output=coco.model

The preprocessing ops `tok` and `caption` then use it with `model="coco.model"`.
"""

import functools
import hashlib
import http.client
import io
import itertools
import os
import urllib.request
from collections.abc import Iterable, Iterator

import sentencepiece
from absl import app, flags, logging
from upath import UPath

from jetformer.storage import find, write_whole

# Public models by name: where they are, and the sha256 of the file where it is known. Of c4_en, which the reference
# uses, it is not, and what was downloaded first is what counts from then on.
_HUB = "https://huggingface.co"
PUBLIC: dict[str, tuple[str, str | None]] = {
    "c4_en": ("https://storage.googleapis.com/t5-data/vocabs/cc_en.32000/sentencepiece.model", None),
    "t5": (
        f"{_HUB}/google-t5/t5-small/resolve/df1b051c49625cf57a3d0d8d3863ed4d13564fe4/spiece.model",
        "d60acb128cf7b7f2536e8f38a5b18a05535c9e14c7a355904270e15b0945ea86",
    ),
    "mt5": (
        f"{_HUB}/google/mt5-xl/resolve/63fc6450d80515b48e026b69ef2fbbd426433e84/spiece.model",
        "ef78f86560d809067d12bac6c09f19a462cb3af3f54d2b8acbba26e1433125d6",
    ),
    "gemma": (
        "https://raw.githubusercontent.com/google/gemma_pytorch/33b652c465537c6158f9a472ea5700e5e770ad3f/tokenizer/"
        "tokenizer.model",
        "61a7b147390c64585d6c3543dd6fc636906c9af3865a5548f27f31aee1d4c8e2",
    ),
}
CACHE_DIR = "~/.cache/jetformer/tokenizers"

_TIMEOUT_SECONDS = 60


class Tokenizer:
    """Text to token ids and back.

    Args:
      model: a serialized SentencePiece model, what a .model file holds.

    Attributes:
      vocab_size: how many ids there are; they count from 0.
      eos_id: of the end of a text. `encode` does not append it.
      pad_id: of padding; None where the model has none.

    Raises:
      ValueError: it is no SentencePiece model, or has no end of text.
    """

    def __init__(self, model: bytes):
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError:
            raise ValueError("it is no SentencePiece model") from None
        self.vocab_size: int = self._processor.vocab_size()
        self.eos_id: int = self._processor.eos_id()
        self.pad_id: int | None = self._processor.pad_id() if self._processor.pad_id() >= 0 else None
        if self.eos_id < 0:
            raise ValueError("the SentencePiece model has no end of text: train it with an eos_id")

    def serialized(self) -> bytes:
        """What a .model file holds."""
        return self._processor.serialized_model_proto()

    def encode(self, text: str | bytes) -> list[int]:
        """The ids of a text, without an end. Bytes are UTF-8; what is not becomes a replacement character."""
        return self._processor.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to the first end. Padding, and ids that are not in the vocabulary, are left out."""
        tokens = itertools.takewhile(lambda i: i != self.eos_id, map(int, ids))
        return self._processor.decode([i for i in tokens if 0 <= i < self.vocab_size and i != self.pad_id])


@functools.cache
def load(model: str, *, sha256: str | None = None, cache_dir: str = CACHE_DIR) -> Tokenizer:
    """Loads a tokenizer, once in a process.

    Args:
      model: a name in `PUBLIC`, downloaded when it is first asked for; or the path of a .model file, looked for
        from here and from the project's root; or a URL that fsspec opens (gs://…).
      sha256: of the file, in hexadecimal; None is what `PUBLIC` says, or for a file kept from an earlier download what
        that had, or no check.
      cache_dir: where downloads are kept.

    Raises:
      ValueError: there is no such file or name, it cannot be downloaded, has another checksum, or is no SentencePiece
        model with an end of text.
    """
    url, known = PUBLIC.get(model, (None, None))
    sha256 = sha256 or known
    if url is None:
        return _checked(_read(model), sha256, model)
    cached = UPath(cache_dir).expanduser() / f"{model}.model"
    recorded = cached.with_suffix(".sha256")
    if cached.exists():
        if sha256 is None and recorded.exists():
            sha256 = recorded.read_text()
        return _checked(cached.read_bytes(), sha256, str(cached))
    data = _download(url)
    tokenizer = _checked(data, sha256, url)
    cached.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(data).hexdigest()
    write_whole(recorded, digest.encode())
    write_whole(cached, data)
    logging.info("Tokenizer %s: %s downloaded to %s, sha256 %s", model, url, cached, digest)
    return tokenizer


def _checked(data: bytes, sha256: str | None, where: str) -> Tokenizer:
    actual = hashlib.sha256(data).hexdigest()
    if sha256 is not None and actual != sha256.lower():
        raise ValueError(f"tokenizer {where} has sha256 {actual}, not {sha256}: it is another file, or damaged")
    try:
        return Tokenizer(data)
    except ValueError as e:
        raise ValueError(f"tokenizer {where}: {e}") from e


def _read(model: str) -> bytes:
    if model.startswith(("http://", "https://")):
        return _download(model)
    try:
        return find(model).read_bytes()
    except (FileNotFoundError, IsADirectoryError) as e:
        raise ValueError(
            f"there is no tokenizer {model!r}: give the path or the URL of a SentencePiece .model file, or one of the "
            f"names {', '.join(PUBLIC)}"
        ) from e
    except (OSError, ImportError) as e:
        raise ValueError(f"tokenizer {model!r} cannot be read: {e}") from e


def _download(url: str) -> bytes:
    # Not through fsspec, which needs aiohttp for it.
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            return response.read()
    except (OSError, http.client.HTTPException) as e:
        raise ValueError(
            f"tokenizer {url} cannot be downloaded here ({e}): download it elsewhere and give its path instead"
        ) from e


# ---- Training. -----------------------------------------------------------------------------------


def train(texts: Iterable[str | bytes], vocab_size: int, *, character_coverage: float = 0.9999) -> bytes:
    """Trains a byte-pair encoding with T5's special tokens: 0 is padding, 1 the end of a text, 2 an unknown character.

    The same texts give the same bytes.

    Args:
      texts: in UTF-8. They are held in memory.
      vocab_size: at most how many ids; few texts do not have as many.
      character_coverage: of all characters of the texts, how many are known; the rarest are not.

    Returns:
      The serialized model, for a .model file and for `Tokenizer`.

    Raises:
      ValueError: there are no texts, or `vocab_size` does not even hold their characters.
    """
    # First all of them: the trainer would make what their iterator raises, signals too, an error of its own.
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError("a tokenizer cannot be trained without texts: there are none, or they are all empty")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            normalization_rule_name="nmt_nfkc",
            character_coverage=character_coverage,
            # Bytes. What is longer is left out, by default from 4 KB on.
            max_sentence_length=1 << 20,
            # Sums are over what each thread has, so it is part of what the model depends on.
            num_threads=8,
            minloglevel=2,
        )
    except RuntimeError as e:
        reason = str(e).rpartition("] ")[2]  # without the place in its source
        raise ValueError(f"a tokenizer with vocab_size {vocab_size} cannot be trained on these texts: {reason}") from e
    return model.getvalue()


def read_texts(name: str, split: str, key: str, *, lower: bool = False, data_dir: str | None = None) -> Iterator[bytes]:
    """The texts of a TFDS data set, in the order of its files. Prepares it where that has not been done.

    Args:
      name: of the data set, see `pipeline.train_batches`.
      split: TFDS split.
      key: of a feature of strings of any shape: a text, or several. `a/b` is `b` in the feature `a`.
      lower: makes them lower-case, as the op `lower` does.
      data_dir: where TFDS keeps its data; its default where None.

    Raises:
      ValueError: no such data set or split, or no texts under this key. At once, not when the first is asked for.
    """
    # Loading a tokenizer does without TensorFlow.
    import tensorflow_datasets as tfds

    from jetformer.data import pipeline, preprocess, sources

    pipeline.prepare(name, data_dir)
    pipeline.num_examples(name, split, data_dir)  # which looks that the split exists
    builder = sources.builder(name, data_dir)
    tensors = preprocess.flatten()(builder.info.features.get_tensor_info())
    with_texts = [k for k, tensor in tensors.items() if tensor.tf_dtype.name == "string"]
    if key not in with_texts:
        has = f"it has texts under {', '.join(with_texts)}" if with_texts else "it has no texts"
        raise ValueError(f"data set {name!r} has no texts under {key!r}: {has}; all its keys: {', '.join(tensors)}")

    # Nothing else of an example is decoded.
    partial = functools.reduce(lambda inner, part: {part: inner}, reversed(key.split("/")), True)
    ds = builder.as_dataset(split=split, decoders=tfds.decode.PartialDecoding(partial))
    pp = f"flatten|reshape([-1], inkey={key!r}, outkey='text')" + ("|lower" if lower else "")
    ds = ds.map(preprocess.parse(f"{pp}|keep('text')"))
    return (text for example in ds.as_numpy_iterator() for text in example["text"])


def _define_flags() -> None:
    # Not when this is imported: other programs have flags of these names.
    flags.DEFINE_string("train", None, "TFDS data set to train a tokenizer on.", required=True)
    flags.DEFINE_string("split", "train", "Its split.")
    flags.DEFINE_string("key", None, "Its feature that holds the texts, such as captions/text.", required=True)
    flags.DEFINE_string("data_dir", None, "Where TFDS keeps prepared data; its default by default.")
    flags.DEFINE_bool("lower", False, "Make the texts lower-case, for use after the preprocessing op `lower`.")
    flags.DEFINE_integer("texts", 1_000_000, "How many texts to look at, from the start of the split.", lower_bound=1)
    flags.DEFINE_integer("vocab_size", None, "At most how many tokens.", required=True, lower_bound=4)
    flags.DEFINE_float(
        "character_coverage", 0.9999, "Of all characters, how many are known; 0.9995 is common for Chinese or Japanese."
    )
    flags.DEFINE_string("output", None, "The .model to write.", required=True)


def main(argv: list[str]) -> None:
    from jetformer import program

    f = flags.FLAGS
    program.no_arguments(argv)
    with program.one_line_errors():
        output = UPath(f.output)
        # Training can take long, so it is looked for first. An object store has no directories.
        if isinstance(output, os.PathLike) and not output.parent.is_dir():
            raise ValueError(f"--output: there is no directory {output.parent}")
        texts = read_texts(f.train, f.split, f.key, lower=f.lower, data_dir=f.data_dir)
        texts = itertools.islice(texts, f.texts)
        model = train(texts, f.vocab_size, character_coverage=f.character_coverage)
        write_whole(output, model)
    logging.set_verbosity(logging.INFO)
    logging.info("%s: %d tokens, sha256 %s", output, Tokenizer(model).vocab_size, hashlib.sha256(model).hexdigest())


if __name__ == "__main__":
    _define_flags()
    app.run(main)

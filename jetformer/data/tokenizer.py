"""SentencePiece tokenizers, as the preprocessing ops `tok` and `caption` use them.

`python -m jetformer.data.train_tokenizer` trains one on the texts of a dataset.
"""

import functools
import hashlib
import http.client
import io
import itertools
import sys
import urllib.request
from collections.abc import Iterable

import sentencepiece
from absl import logging
from upath import UPath

from jetformer.storage import find, write_whole

# URLs of public models by name, and the sha256 of the file if it is known. That of c4_en, which the reference uses, is
# not; from the first download on, the downloaded file's is checked.
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
    """Converts texts to token ids and back.

    Args:
      model: a serialized SentencePiece model, the content of a .model file.

    Attributes:
      vocab_size: number of ids, which start at 0.
      eos_id: id of end-of-text. `encode` does not append it.
      pad_id: id of padding; None if the model has none.

    Raises:
      ValueError: it is not a SentencePiece model, or has no end-of-text token.
    """

    def __init__(self, model: bytes):
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError:
            raise ValueError("not a SentencePiece model") from None
        self.vocab_size: int = self._processor.vocab_size()
        self.eos_id: int = self._processor.eos_id()
        self.pad_id: int | None = self._processor.pad_id() if self._processor.pad_id() >= 0 else None
        if self.eos_id < 0:
            raise ValueError("the SentencePiece model has no end-of-text token: train it with an eos_id")

    def serialized(self) -> bytes:
        """Returns the content of a .model file."""
        return self._processor.serialized_model_proto()

    def encode(self, text: str | bytes) -> list[int]:
        """Returns the ids of a text, without end-of-text. Bytes that are not UTF-8 become replacement characters."""
        return self._processor.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text up to the first end-of-text, ignoring padding and ids that are not in the vocabulary."""
        tokens = itertools.takewhile(lambda i: i != self.eos_id, map(int, ids))
        return self._processor.decode([i for i in tokens if 0 <= i < self.vocab_size and i != self.pad_id])


@functools.cache
def load(model: str, *, sha256: str | None = None, cache_dir: str = CACHE_DIR) -> Tokenizer:
    """Loads a tokenizer, once in a process.

    Args:
      model: a name in `PUBLIC`, downloaded on first use; the path of a .model file, see `storage.find`; or a URL that
        fsspec opens (gs://…).
      sha256: expected checksum of the file, in hexadecimal. None: that of `PUBLIC`, or of the first download if it was
        cached, or no check.
      cache_dir: where downloads are kept.

    Raises:
      ValueError: there is no such file or name, it cannot be downloaded, has another checksum, or is not a
        SentencePiece model with an end-of-text token.
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
        raise ValueError(f"tokenizer {where} has sha256 {actual}, expected {sha256}: it is another file, or damaged")
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
            f"there is no tokenizer {model!r}: use the path or URL of a SentencePiece .model file, or one of the names "
            f"{', '.join(PUBLIC)}"
        ) from e
    except (OSError, ImportError) as e:
        raise ValueError(f"cannot read tokenizer {model!r}: {e}") from e


def _download(url: str) -> bytes:
    # Not by fsspec, which needs aiohttp for it.
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            return response.read()
    except (OSError, http.client.HTTPException) as e:
        raise ValueError(
            f"cannot download tokenizer {url} ({e}): download it elsewhere and use its path instead"
        ) from e


def train(texts: Iterable[str | bytes], vocab_size: int, *, character_coverage: float = 0.9999) -> bytes:
    """Trains a byte-pair encoding with T5's special tokens: 0 is padding, 1 end-of-text, 2 an unknown character.

    Training is deterministic.

    Args:
      texts: in UTF-8. They are held in memory.
      vocab_size: maximum number of ids; few texts yield fewer.
      character_coverage: share of all characters of the texts that are known, in [0, 1]; the rarest are not.

    Returns:
      The serialized model, for a .model file and for `Tokenizer`.

    Raises:
      ValueError: there are no texts, or `vocab_size` is smaller than the number of their characters.
    """
    # All texts are read first: the trainer would turn what their iterator raises, also signals, into its own error.
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError("cannot train a tokenizer: there are no texts, or all are empty")
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
            # In bytes; longer texts would be ignored.
            max_sentence_length=1 << 20,
            # The model depends on it, since each thread sums over its own texts.
            num_threads=8,
            minloglevel=2,
        )
    except RuntimeError as e:
        reason = str(e).rpartition("] ")[2]  # without the place in its source
        raise ValueError(f"cannot train a tokenizer with vocab_size {vocab_size} on these texts: {reason}") from e
    return model.getvalue()


if __name__ == "__main__":
    sys.exit("error: this program is now python -m jetformer.data.train_tokenizer; its flags are the same")

"""Texts of users: tokenizes prompts as the experiment's preprocessing string tokenizes the dataset's texts."""

import ast
import functools
from collections.abc import Callable, Sequence

import numpy as np

from jetformer.data import pp_string, tokenizer

# The ops that process a text; the others choose the text, or process the image.
_OPS = ("lower", "setdefault", "masked_concat", "tolen", *pp_string.TOKENIZING)


class Texts:
    """Converts prompts to tokens, and tokens to texts.

    Args:
      pp: the experiment's preprocessing string.
      model: path of the tokenizer; None: that of the string.

    Attributes:
      tokenizer: the tokenizer.
      length: T, the tokens of a text, with its end.

    Raises:
      ValueError: the string tokenizes no text, or there is no such tokenizer.
    """

    def __init__(self, pp: str, model: str | None = None):
        ops = [call for call in pp_string.calls(pp) if pp_string.name_of(call) in _OPS]
        argument = pp_string.tokenizer_in(ops)
        if argument is None:
            raise ValueError(
                "the experiment reads no texts: its preprocessing string has neither caption(…) nor tok(…). If the "
                "model is class-conditional, use classes"
            )
        argument.value = model or argument.value
        self.tokenizer = tokenizer.load(argument.value)
        # The key under which the first of these ops reads the text.
        first = next(call for call in ops if pp_string.name_of(call) in ("lower", *pp_string.TOKENIZING))
        keys = [pp_string.argument(first, name, len(_OPS)) for name in ("inkey", "key")]
        self._key = next((key.value for key in keys if key is not None), "text")
        self._pp = " | ".join(ast.unparse(call) for call in ops)
        self._lowers = any(pp_string.name_of(call) == "lower" for call in ops)
        self.length = pp_string.text_length_of(pp)

    def encode(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns the model's inputs for N texts: text int32 `[N, T]`, text_mask bool `[N, T]`.

        Raises:
          ValueError: a text is empty.
        """
        for text in texts:
            if not text.strip():
                raise ValueError("a prompt is empty: describe the image")
        return self._examples(texts)

    def encode_beginnings(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns the inputs for N beginnings of texts, as `encode`, but without end-of-text; they may be empty."""
        encoded = self._examples(texts)
        ended = (encoded["text"] == self.tokenizer.eos_id).cumsum(1) > 0
        return encoded | {"text_mask": encoded["text_mask"] & ~ended}

    @functools.cached_property
    def _encode(self) -> Callable[[str], dict]:
        # TensorFlow takes seconds to import, and captions of images do without.
        import tensorflow as tf

        from jetformer.data import preprocess

        encode = preprocess.parse(self._pp)
        return lambda text: encode({self._key: tf.constant(text)})

    def _examples(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        examples = [self._encode(text) for text in texts]
        tokens = np.stack([example["text"] for example in examples])
        # Without a mask, all tokens are valid.
        masks = np.stack([example.get("text_mask", np.ones(tokens.shape[1:], bool)) for example in examples])
        return {"text": tokens, "text_mask": masks}

    def cut(self, text: str) -> str:
        """Returns the end of a text that exceeds the model's length; "" if the text fits."""
        (kept,) = self._examples([text])["text"]
        whole = self.tokenizer.encode(text.lower() if self._lowers else text)
        if len(whole) < self.length:
            return ""
        return self.tokenizer.decode(whole).removeprefix(self.tokenizer.decode(kept)).strip()

    def check_whole(self, name: str, texts: Sequence[str]) -> None:
        """Checks that each text fits into the model's length.

        Args:
          name: of the setting that has them, for messages.
          texts: the texts.

        Raises:
          ValueError: a text is too long.
        """
        for text in texts:
            if cut := self.cut(text):
                raise ValueError(
                    f"{name}: {text!r} is too long for the model, without {cut!r} it would fit: shorten it"
                )

    def decode(self, tokens: np.ndarray) -> list[str]:
        """Converts token ids `[N, T]` to N texts, each up to its end."""
        return [self.tokenizer.decode(row.tolist()) for row in tokens]

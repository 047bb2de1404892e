"""Texts that come from a person and not from the data set: prompts in, captions out.

They are tokenized as the experiment's preprocessing string tokenizes those of the data, by the same ops.
"""

import ast
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from jetformer.data import pp_string, preprocess, tokenizer

# The ops that treat a text. What else a string has chooses the text, and treats the image.
_OPS = ("lower", "setdefault", "masked_concat", "tolen", *pp_string.TOKENIZING)


class Texts:
    """Turns prompts into tokens, and tokens into text.

    Args:
      pp: the experiment's preprocessing string.
      model: where the tokenizer is; None: where the string says.

    Attributes:
      tokenizer: the tokenizer.
      length: T, how many tokens a text has, with its end.

    Raises:
      ValueError: if the string tokenizes no text, or there is no such tokenizer.
    """

    def __init__(self, pp: str, model: str | None = None):
        ops = [call for call in pp_string.calls(pp) if pp_string.name_of(call) in _OPS]
        argument = pp_string.tokenizer_in(ops)
        if argument is None:
            raise ValueError(
                "the experiment reads no texts: its preprocessing string has neither caption(…) nor tok(…). If it is "
                "class-conditional, give classes"
            )
        argument.value = model or argument.value
        self.tokenizer = tokenizer.load(argument.value)
        # Where the first op that treats the text looks for it.
        first = next(call for call in ops if pp_string.name_of(call) in ("lower", *pp_string.TOKENIZING))
        keys = [pp_string.argument(first, name, len(_OPS)) for name in ("inkey", "key")]
        self._key = next((key.value for key in keys if key is not None), "text")
        self._encode = preprocess.parse(" | ".join(ast.unparse(call) for call in ops))
        self._lowers = any(pp_string.name_of(call) == "lower" for call in ops)
        self.length = pp_string.text_length_of(pp)

    def encode(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """What the model reads for N texts: text int32 `[N, T]`, text_mask bool `[N, T]`.

        Raises:
          ValueError: for a text that is empty.
        """
        for text in texts:
            if not text.strip():
                raise ValueError("an empty prompt: say what the image is to show")
        return self._examples(texts)

    def encode_beginnings(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """N texts that are to go on: as `encode`, without their end; they may be empty."""
        encoded = self._examples(texts)
        ended = (encoded["text"] == self.tokenizer.eos_id).cumsum(1) > 0
        return encoded | {"text_mask": encoded["text_mask"] & ~ended}

    def _examples(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        examples = [self._encode({self._key: tf.constant(text)}) for text in texts]
        tokens = np.stack([example["text"] for example in examples])
        # Without a mask all are valid.
        masks = np.stack([example.get("text_mask", np.ones(tokens.shape[1:], bool)) for example in examples])
        return {"text": tokens, "text_mask": masks}

    def cut(self, text: str) -> str:
        """What of a text is too long for the model, and is cut off; "" for nothing."""
        (kept,) = self._examples([text])["text"]
        whole = self.tokenizer.encode(text.lower() if self._lowers else text)
        if len(whole) < self.length:
            return ""
        return self.tokenizer.decode(whole).removeprefix(self.tokenizer.decode(kept)).strip()

    def check_whole(self, name: str, texts: Sequence[str]) -> None:
        """Looks whether the model can read all of each text.

        Args:
          name: of the setting that has them, for messages.
          texts: the texts.

        Raises:
          ValueError: if one is too long.
        """
        for text in texts:
            if cut := self.cut(text):
                raise ValueError(f"{name}: {text!r} is too long for the model, by {cut!r}: shorten it")

    def decode(self, tokens: np.ndarray) -> list[str]:
        """Token ids `[N, T]` to N texts, without what comes after their end."""
        return [self.tokenizer.decode(row.tolist()) for row in tokens]

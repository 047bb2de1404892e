"""Texts that come from a person and not from the data set: prompts in, captions out.

They are tokenized as the experiment's preprocessing string tokenizes those of the data, by the same ops.
"""

import ast
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from jetformer.data import preprocess, tokenizer

# The ops that make tokens of a text. What a string has before them chooses the text and treats the image.
_TOKENIZING = ("tok", "caption")
_OPS = ("lower", "setdefault", "masked_concat", "tolen", *_TOKENIZING)


def tokenizer_of(pp: str) -> str | None:
    """Where the tokenizer of a preprocessing string is; None for a string that tokenizes nothing."""
    return next((_model(call).value for call in _tokenizing(preprocess.calls(pp))), None)


def length_of(pp: str) -> int:
    """T, how many tokens the texts have that a preprocessing string makes, with their end; 1 for labels.

    Raises:
      ValueError: if it does not say.
    """
    length = None
    for call in preprocess.calls(pp):
        name = _name(call)
        if name == "label_as_text":
            length = 1
        elif name in ("tolen", *_TOKENIZING):
            argument = _argument(call, "length", 0 if name == "tolen" else 1)
            # A mask that is brought to its length is as long as the text.
            length = length if argument is None else argument.value
    if length is None:
        raise ValueError("the preprocessing string does not say how long texts are: give caption or tok a length")
    return length


def _name(call: ast.expr) -> str:
    return getattr(call, "func", call).id


def _tokenizing(calls: list[ast.expr]) -> list[ast.Call]:
    return [call for call in calls if _name(call) in _TOKENIZING]


def _argument(call: ast.Call, name: str, place: int) -> ast.Constant | None:
    by_name = {keyword.arg: keyword.value for keyword in call.keywords}
    return by_name.get(name, call.args[place] if place < len(call.args) else None)


def _model(call: ast.Call) -> ast.Constant:
    """The argument `model` of an op that tokenizes."""
    return _argument(call, "model", 0)


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
        ops = [call for call in preprocess.calls(pp) if _name(call) in _OPS]
        if not _tokenizing(ops):
            raise ValueError(
                "the experiment reads no texts: its preprocessing string has neither caption(…) nor tok(…). If it is "
                "class-conditional, give classes"
            )
        for call in _tokenizing(ops):
            _model(call).value = model or _model(call).value
            model = _model(call).value
        self.tokenizer = tokenizer.load(model)
        self._encode = preprocess.parse(" | ".join(ast.unparse(call) for call in ops))
        self._lowers = any(_name(call) == "lower" for call in ops)
        self.length = length_of(pp)

    def encode(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """What the model reads for N texts: text int32 `[N, T]`, text_mask bool `[N, T]`.

        Raises:
          ValueError: for a text that is empty.
        """
        for text in texts:
            if not text.strip():
                raise ValueError("an empty prompt: say what the image is to show")
        examples = [self._encode({"text": tf.constant(text)}) for text in texts]
        return {key: np.stack([example[key] for example in examples]) for key in ("text", "text_mask")}

    def encode_beginnings(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """N texts that are to go on: as `encode`, without their end; they may be empty."""
        examples = [self._encode({"text": tf.constant(text)}) for text in texts]
        tokens = np.stack([example["text"] for example in examples])
        valid = np.stack([example["text_mask"] for example in examples])
        return {"text": tokens, "text_mask": valid & ((tokens == self.tokenizer.eos_id).cumsum(1) == 0)}

    def cut(self, text: str) -> str:
        """What of a text is too long for the model, and is cut off; "" for nothing."""
        kept = self.encode([text])["text"][0]
        whole = self.tokenizer.encode(text.lower() if self._lowers else text)
        if len(whole) < self.length:
            return ""
        return self.tokenizer.decode(whole).removeprefix(self.tokenizer.decode(kept)).strip()

    def decode(self, tokens: np.ndarray) -> list[str]:
        """Token ids `[N, T]` to N texts, without what comes after their end."""
        return [self.tokenizer.decode(row.tolist()) for row in tokens]

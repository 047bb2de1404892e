"""The sampler of texts: captions of images by a `JetFormer`, continuations of prompts by a `LanguageModel`.

Dimensions: B batch, T text tokens.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging
from torch import Tensor

from jetformer.models.jetformer import JetFormer
from jetformer.models.language_model import LanguageModel
from jetformer.sampling import decode
from jetformer.sampling.sampler import Request, Sampler


def prompt_requests(texts, prompts: Sequence[str]) -> list[Request]:
    """Returns a request for each prompt; a prompt that is too long is truncated, with a warning.

    Args:
      texts: a `data.texts.Texts`.
      prompts: whole texts.

    Raises:
      ValueError: for an empty prompt.
    """
    return _requests(texts, prompts, texts.encode(prompts))


def continuation_requests(texts, prompts: Sequence[str]) -> tuple[list[Request], int]:
    """Returns a request to continue each prompt, and the maximum number of tokens to sample.

    Args:
      texts: a `data.texts.Texts`.
      prompts: beginnings of texts; "" for a whole text.

    Raises:
      ValueError: for a prompt that leaves no token to sample.
    """
    requests = _requests(texts, prompts, texts.encode_beginnings(prompts))
    lengths = [int(request.text_mask.sum()) for request in requests]
    longest = max(lengths)
    if longest == texts.length:
        raise ValueError(f"a prompt has {longest} tokens, the maximum length of a text: use a shorter one")
    cut = lambda x: x[:longest]
    requests = [dataclasses.replace(r, text=cut(r.text), text_mask=cut(r.text_mask)) for r in requests]
    return requests, texts.length - min(lengths)


def _requests(texts, prompts: Sequence[str], encoded: dict) -> list[Request]:
    for prompt in prompts:
        if cut := texts.cut(prompt):
            logging.warning("The prompt %r is too long for the model and truncated by %r", prompt, cut)
    return [Request(*row) for row in zip(prompts, encoded["text"], encoded["text_mask"], strict=True)]


class TextSampler(Sampler):
    """Samples a caption of each image, or a continuation of each prompt.

    Args:
      experiment: that trained the model.
      model: the model.
      texts: its `data.texts.Texts`.
      num_tokens: maximum number of tokens to sample; None: the length of a text.
      temperature: divides the logits.
      top_k: number of most probable tokens to choose from; None: all.
      top_p: choose from the smallest set of most probable tokens with at least this probability.
      compile: see `Loop.compile`.

    Raises:
      ValueError: if a JetFormer does not learn texts after images.
    """

    def __init__(
        self,
        experiment,
        model: JetFormer | LanguageModel,
        texts,
        *,
        num_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        compile: decode.Compile = lambda function: function,
    ):
        if isinstance(model, JetFormer):
            experiment.objective.check_order(text_first=False)
        self._texts, self._compile = texts, compile
        self.num_tokens = num_tokens or texts.length
        self.settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}

    def __call__(
        self,
        model: JetFormer | LanguageModel,
        batch: dict[str, Tensor],
        keys: Tensor,
        on_token: Callable[[], None],
    ) -> list[dict[str, Any]]:
        image_tokens = lengths = None
        if "image" in batch:
            encode = lambda: decode.encode_images(model, batch["image"], keys).tokens
            image_tokens = self._compile(encode)()
        else:
            lengths = self._texts.length - batch["text_mask"].sum(1)
        tokens, counts, nats = decode.sample_text(
            model,
            keys,
            image_tokens=image_tokens,
            text=batch.get("text"),
            text_mask=batch.get("text_mask"),
            max_length=self.num_tokens,
            lengths=lengths,
            vocab_size=self._texts.tokenizer.vocab_size,
            eos_id=self._texts.tokenizer.eos_id,
            compile=self._compile,
            on_token=on_token,
            **self.settings,
        )
        rows = zip(self._texts.decode(tokens.cpu().numpy()), counts.cpu().tolist(), nats.cpu().tolist(), strict=True)
        samples = [{"text": text, "log_likelihood": x, "bits_per_token": -x / math.log(2) / n} for text, n, x in rows]
        if "image" in batch:
            for sample, image in zip(samples, batch["image"].cpu().numpy(), strict=True):
                sample["image"] = image
        return samples

"""Checks the attributes that captions name, in images sampled from captions and in captions sampled from images."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor, nn

from jetformer.evaluators.base import Evaluator, Results
from jetformer.evaluators.context import Context, prepare
from jetformer.evaluators.samples import sample_images
from jetformer.models.jetformer import JetFormer
from jetformer.ranges import PositiveFloat, PositiveInt
from jetformer.sampling import decode
from jetformer.sampling.guidance import Guidance

_IMAGES_SEED, _CAPTIONS_SEED = 5, 6

# By attribute: the number of correct ones, and the number of named ones.
Score = dict[str, tuple[int, int]]


@runtime_checkable
class Checker(Protocol):
    """Reads attributes of a dataset's images and captions, as `ShapesChecker` does.

    Attributes:
      attributes: their names.
    """

    attributes: tuple[str, ...]

    def caption(self, example: dict[str, Any]) -> str:
        """Returns the caption to sample an image from."""

    def score_image(self, image: np.ndarray, example: dict[str, Any]) -> Score:
        """Scores an image uint8 `[H, W, C]` against the example's caption."""

    def score_caption(self, caption: str, example: dict[str, Any]) -> Score:
        """Scores a caption against the example's image."""


@dataclasses.dataclass(frozen=True)
class ShapesChecker:
    """Checks the dataset `shapes`, see `data/builders/shapes/checker.py`."""

    @property
    def _checker(self):
        from jetformer.data.builders.shapes import checker  # brings TensorFlow, which sampling does without

        return checker

    @property
    def attributes(self) -> tuple[str, ...]:
        return self._checker.ATTRIBUTES

    def caption(self, example: dict[str, Any]) -> str:
        return example["captions"][0].decode()

    def score_image(self, image: np.ndarray, example: dict[str, Any]) -> Score:
        return self._checker.score_image(image, self.caption(example))

    def score_caption(self, caption: str, example: dict[str, Any]) -> Score:
        return self._checker.score_caption(caption, self._checker.scene_of(example))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attributes(Evaluator):
    """Measures the share of named attributes that are correct, over the first examples of a split.

    Metrics in 0..1: images, sampled from captions; captions, sampled from images; real_images, the dataset's own; each
    also by attribute (`images/colour`, …). A modality that the model does not learn after the other is left out.

    Attributes:
      checker: of the dataset.
      split: TFDS split; None: the dataset's `eval_split`.
      num_examples: number of examples.
      guidance: of images, see `Guidance`.
      temperature_scales: of images; multiplies the standard deviations of the tokens' mixtures.
      temperature: of captions; divides the logits.
      top_k: of captions; samples among this many of the most probable tokens; None: among all.
      batch_size: samples at a time, over all processes; None: as in evaluation.
      ema: use the moving average of the parameters, if there is one.
    """

    checker: Checker
    split: str | None = None
    num_examples: PositiveInt = 200
    guidance: Guidance = Guidance()  # noqa: RUF009 (frozen)
    temperature_scales: PositiveFloat = 1.0
    temperature: PositiveFloat = 1.0
    top_k: PositiveInt | None = 1
    batch_size: PositiveInt | None = None
    ema: bool = True

    def check(self, context: Context) -> None:
        model = context.model
        if not isinstance(model, JetFormer) or not context.data.has_texts():
            raise ValueError(
                f"Attributes needs a JetFormer with tokenized texts, not this {type(model).__name__}: unbind it in "
                "train.evaluators"
            )
        self.guidance.check(model.image_head)
        context.objective.check_guidance(self.guidance.mode)
        example = self._examples(context, 1)[0]
        try:
            self.checker.score_image(example["image"], example)
        except KeyError as error:
            raise ValueError(
                f"{type(self.checker).__name__} cannot check {context.data.name!r}: its examples have no {error}"
            ) from error

    def _examples(self, context: Context, count: int) -> list[dict[str, Any]]:
        data = context.data
        prepare(data, context.loop.runtime)
        return data.examples(self.split or data.eval_split, count)

    def __call__(self, context: Context) -> Results:
        examples = self._examples(context, self.num_examples)
        prob = context.objective.text_prefix_prob
        results = Results()
        if prob > 0:
            rows = context.data.texts().encode([self.checker.caption(e) for e in examples])
            images = sample_images(
                context,
                rows,
                seed=_IMAGES_SEED,
                batch_size=self.batch_size,
                averaged=self.ema,
                guidance=self.guidance,
                temperature_scales=self.temperature_scales,
            )
            self._add(
                "images", [self.checker.score_image(*pair) for pair in zip(images, examples, strict=True)], results
            )
        if prob < 1:
            captions = self.captions(context, np.stack([e["image"] for e in examples]))
            pairs = zip(captions, examples, strict=True)
            self._add("captions", [self.checker.score_caption(*pair) for pair in pairs], results)
        self._add("real_images", [self.checker.score_image(e["image"], e) for e in examples], results)
        return results

    def captions(self, context: Context, images: np.ndarray) -> list[str]:
        """Samples captions of images uint8 `[N, H, W, C]`."""
        texts = context.data.texts()

        def write(model: nn.Module, batch: dict[str, Tensor], keys: Tensor) -> dict[str, Tensor]:
            latents = context.loop.compile(lambda: decode.encode_images(model, batch["image"], keys).tokens)()
            tokens, _, _ = decode.sample_text(
                model,
                keys,
                image_tokens=latents,
                max_length=texts.length,
                vocab_size=texts.tokenizer.vocab_size,
                eos_id=texts.tokenizer.eos_id,
                temperature=self.temperature,
                top_k=self.top_k,
                compile=context.loop.compile,
            )
            return {"tokens": tokens}

        batches = context.batches_of({"image": images}, self.batch_size)
        return texts.decode(
            context.per_example(write, batches, seed=_CAPTIONS_SEED, averaged=self.ema, staged=True)["tokens"]
        )

    def _add(self, name: str, scores: list[Score], results: Results) -> None:
        totals = {a: np.sum([score[a] for score in scores], axis=0) for a in self.checker.attributes}
        correct, named = np.sum(list(totals.values()), axis=0)
        results.scalars[name] = float(correct / named)
        results.scalars |= {f"{name}/{a}": float(c / n) for a, (c, n) in totals.items() if n}

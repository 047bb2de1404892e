"""What of the attributes that captions name is right: in images made from captions, in captions made from images."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor, nn

from jetformer.evaluators.base import Context, Evaluator, Results, prepare
from jetformer.evaluators.samples import sample_images
from jetformer.models.jetformer import JetFormer
from jetformer.ranges import PositiveFloat, PositiveInt
from jetformer.sampling import decode
from jetformer.sampling.guidance import Guidance

_IMAGES_SEED, _CAPTIONS_SEED = 5, 6

# By attribute: how many are right, of how many that are named.
Score = dict[str, tuple[int, int]]


@runtime_checkable
class Checker(Protocol):
    """Reads attributes back, of the examples of a dataset. `ShapesChecker` is one.

    attributes: what there are.
    """

    attributes: tuple[str, ...]

    def caption(self, example: dict[str, Any]) -> str:
        """The caption to make an image from."""

    def score_image(self, image: np.ndarray, example: dict[str, Any]) -> Score:
        """What is right in an image uint8 `[H, W, C]` made from the example's caption."""

    def score_caption(self, caption: str, example: dict[str, Any]) -> Score:
        """What is right in a caption made from the example's image."""


@dataclasses.dataclass(frozen=True)
class ShapesChecker:
    """Of `shapes`: see `data/builders/shapes/checker.py`."""

    # Imported when it is used: it brings TensorFlow.
    @property
    def _checker(self):
        from jetformer.data.builders.shapes import checker

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
    """The share of named attributes that is right, over the first examples of a split, by a dataset's checker.

    Figures in 0..1: images, of images sampled from captions, and captions, of captions written for images, each also by
    attribute (`images/colour`, …); real_images, what the checker gives the dataset's own. What the model does not learn
    (images after texts, texts after images) is left out.

    Attributes:
      checker: the dataset's.
      every_steps: run it in training every so many steps, and at the end; None: in evaluation jobs only.
      split: TFDS split; None: the run's `eval_split`.
      num_examples: how many examples.
      guidance: of images, see `Guidance`.
      temperature_scales: of images, multiplies the standard deviations of the tokens' mixtures.
      temperature: of captions, divides the logits.
      top_k: of captions, chooses among so many of the most probable tokens.
      batch_size: how many to sample at a time, over all processes; None: that of evaluation.
      ema: with the moving average of the parameters, if there is one.
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
        run, model = context.run, context.state.model
        if not isinstance(model, JetFormer) or not run.data.has_texts():
            raise ValueError(
                f"Attributes are of a JetFormer that reads texts, not of a {type(model).__name__} like this"
            )
        self.guidance.check(model.image_head)
        run.check_guidance(self.guidance)
        example = self._examples(context, 1)[0]
        try:
            self.checker.score_image(example["image"], example)
        except KeyError as error:
            raise ValueError(
                f"{type(self.checker).__name__} does not know the examples of {run.data.name!r}: they have no {error}"
            ) from error

    def _examples(self, context: Context, count: int) -> list[dict[str, Any]]:
        data = context.run.data
        prepare(data, context.runtime)
        return data.examples(self.split or data.eval_split, count)

    def __call__(self, context: Context) -> Results:
        examples = self._examples(context, self.num_examples)
        prob = context.run.objective.text_prefix_prob
        results = Results()
        if prob > 0:
            rows = context.run.data.texts().encode([self.checker.caption(e) for e in examples])
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
            captions = self._captions(context, np.stack([e["image"] for e in examples]))
            pairs = zip(captions, examples, strict=True)
            self._add("captions", [self.checker.score_caption(*pair) for pair in pairs], results)
        self._add("real_images", [self.checker.score_image(e["image"], e) for e in examples], results)
        return results

    def _captions(self, context: Context, images: np.ndarray) -> list[str]:
        texts = context.run.data.texts()

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
        right, named = np.sum(list(totals.values()), axis=0)
        results.scalars[name] = float(right / named)
        results.scalars |= {f"{name}/{a}": float(r / n) for a, (r, n) in totals.items() if n}

"""Pictures of a model: samples, round trips through its flow, and its latents."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from jetformer import class_names, prng
from jetformer.evaluators.base import Evaluator, Results
from jetformer.evaluators.context import Context
from jetformer.loops.base import Rows
from jetformer.models.jetformer import JetFormer
from jetformer.objectives import check_tokens, to_unit_range
from jetformer.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from jetformer.sampling import decode, grid
from jetformer.sampling.guidance import Guidance

_SEED, _ROUND_TRIP_SEED = 3, 4
_MAX_CLASSES = 10  # to sample by default


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples(Evaluator):
    """Samples images of classes or prompts. The seeds are the same at every step, so the same images improve.

    Pictures:
      grid: a row of samples for each class or prompt and guidance weight;
      round_trip: images of the evaluation split; their reconstructions from all latents; from their tokens alone, with
        0 for the dimensions that are factored out; and the first latent dimensions as pixels.
    Metrics: round_trip_error, the largest difference between a pixel value in 0..255 and its reconstruction;
    latents_mean and latents_std, over all dimensions of these images' latents.

    Attributes:
      num_classes: sample the classes 0 to num_classes - 1; the text of class c is the token c. None: all classes of the
        data, at most 10.
      prompts: instead, sample these.
      num_images: number of samples of each.
      batch_size: samples at a time, over all processes; None: all.
      guidance: see `Guidance`.
      guidance_weights: sample with each of these weights in the place of that of `guidance`; None: with that.
      temperature_scales: multiplies the standard deviations of the tokens' mixtures.
      temperature_probs: multiplies the log-weights of the tokens' mixtures.
      denoise: remove the noise that the model was trained with, see `sampling.denoising.denoise`.
      num_round_trips: number of images to encode and decode; 0 for none.
      ema: use the moving average of the parameters, if there is one.
    """

    num_classes: PositiveInt | None = None
    prompts: tuple[str, ...] | None = None
    num_images: PositiveInt = 8
    batch_size: PositiveInt | None = None
    guidance: Guidance = Guidance()  # noqa: RUF009 (frozen)
    guidance_weights: tuple[NonNegativeFloat, ...] | None = None
    temperature_scales: PositiveFloat = 1.0
    temperature_probs: PositiveFloat = 1.0
    denoise: bool = False
    num_round_trips: NonNegativeInt = 8
    ema: bool = True

    def __post_init__(self):
        if self.num_classes is not None and self.prompts is not None:
            raise ValueError("Samples: give num_classes or prompts, not both")
        if isinstance(self.prompts, str) or self.prompts == ():
            raise ValueError(f"Samples.prompts = {self.prompts!r}: give a tuple of prompts, as ('a cat', 'a dog')")
        if self.guidance_weights == ():
            raise ValueError("Samples.guidance_weights = (): give some weights, or None")
        self.guidances()

    def guidances(self) -> list[Guidance]:
        """Returns the guidance of each row of a class or prompt."""
        if self.guidance_weights is None:
            return [self.guidance]
        return [dataclasses.replace(self.guidance, weight=weight) for weight in self.guidance_weights]

    def classes(self, names: Sequence[str] | None) -> list[int]:
        """Returns the labels of the classes to sample, of which there are none with prompts.

        Args:
          names: of all classes by label; None: unknown.

        Raises:
          ValueError: if their number is unknown.
        """
        if self.prompts is not None:
            return []
        if self.num_classes is None and not names:
            raise ValueError("Samples: the data has no names of classes: give num_classes or prompts")
        return list(range(self.num_classes or min(len(names), _MAX_CLASSES)))

    def conditions(self, context: Context) -> tuple[list[str], dict[str, np.ndarray]]:
        """Returns the R classes or prompts: their labels, and text `[R, T]` with text_mask `[R, T]` unless all of it is
        valid."""
        if self.prompts is None:
            names = context.class_names
            classes = self.classes(names)
            return [class_names.shown(c, names) for c in classes], {"text": np.array(classes, np.int32)[:, None]}
        return list(self.prompts), context.data.texts().encode(self.prompts)

    def check(self, context: Context) -> None:
        model = context.model
        if not isinstance(model, JetFormer):
            raise ValueError(f"Samples needs a JetFormer, not a {type(model).__name__}: bind FlowSamples in its place")
        for guidance in self.guidances():
            guidance.check(model.image_head)
            context.objective.check_guidance(guidance.mode)
        context.objective.check_order(text_first=True)
        context.denoising_std(self.denoise)
        if self.prompts is not None:
            context.data.texts().check_whole("Samples.prompts", self.prompts)
        elif context.data.has_texts():
            raise ValueError("Samples: the model is conditional on texts, not on classes: give prompts")
        _, rows = self.conditions(context)
        check_tokens(rows["text"], model)
        if self.num_round_trips:
            context.check_batch(next(context.batches()))

    def __call__(self, context: Context) -> Results:
        labels, rows = self.conditions(context)
        rows = {name: array.repeat(self.num_images, 0) for name, array in rows.items()}
        pictures = []
        for guidance in self.guidances():
            sampled = sample_images(
                context,
                rows,
                seed=_SEED,
                batch_size=self.batch_size or len(rows["text"]),
                averaged=self.ema,
                guidance=guidance,
                temperature_scales=self.temperature_scales,
                temperature_probs=self.temperature_probs,
                noise_std=context.denoising_std(self.denoise),
            )
            pictures.append(sampled.reshape(len(labels), self.num_images, *sampled.shape[1:]))
        # All rows of a class or prompt, then the next.
        images = np.stack(pictures, axis=1)
        images = images.reshape(-1, *images.shape[3:])
        names = [f"{label}{_weight(g, len(pictures))}" for label in labels for g in self.guidances()]
        results = Results(pictures={"grid": grid.labelled(images, self.num_images, names)})
        if self.num_round_trips:
            self._round_trip(context, results)
        return results

    def _round_trip(self, context: Context, results: Results) -> None:
        def reconstruct(model: nn.Module, batch: dict[str, Tensor], keys: Tensor) -> dict[str, Tensor]:
            pixels = batch["image"].to(model.image_emb.weight.dtype)
            image = to_unit_range(pixels + prng.uniform(keys, pixels.shape[1:]))
            tokens, factored, _, _ = model.encode_image(image)
            back, _ = model.decode_image(tokens, factored)
            coarse, _ = model.decode_image(tokens, torch.zeros_like(factored))
            latents = torch.cat((tokens, factored), dim=-1)
            return round_trip(batch, image, latents, back) | {"coarse": decode.to_uint8(coarse)}

        first = context.first_examples(self.num_round_trips, ("image",))
        rows = context.per_example(reconstruct, context.batches_of(first), seed=_ROUND_TRIP_SEED, averaged=self.ema)
        shown = {"images": rows["image"], "reconstructions": rows["back"], "from tokens alone": rows["coarse"]}
        if not context.model.factored_dim:
            del shown["from tokens alone"]
        add_round_trip(results, rows, shown | {"latents": _tokens_as_images(rows["latents"], context.model)})


def round_trip(batch: dict[str, Tensor], image: Tensor, latents: Tensor, back: Tensor) -> dict[str, Tensor]:
    """Returns what `add_round_trip` reads of images: of the batch; `image` and `back`, before and after, in [-1, 1]."""
    error = (back - image).abs().flatten(1).amax(1) * 127.5
    return {"image": batch["image"], "back": decode.to_uint8(back), "error": error, "latents": latents}


def add_round_trip(results: Results, rows: Rows, shown: dict[str, np.ndarray]) -> None:
    """Adds the metrics and the picture of round trips through a flow.

    Args:
      results: of the evaluator.
      rows: "error" `[N]`, in pixel values, and "latents" `[N, ...]`.
      shown: rows of the picture by label, uint8 `[N, H, W, C]`.
    """
    results.scalars |= {
        "round_trip_error": float(rows["error"].max()),
        "latents_mean": float(rows["latents"].mean()),
        "latents_std": float(rows["latents"].std()),
    }
    images = np.concatenate(list(shown.values()))
    results.pictures["round_trip"] = grid.labelled(images, len(rows["error"]), list(shown))


def to_pixels(latents: np.ndarray) -> np.ndarray:
    """Returns latents as pixel values uint8, from -3 (black) to 3 (white)."""
    return ((latents / 6 + 0.5) * 255).clip(0, 255).astype(np.uint8)


def sample_images(
    context: Context,
    rows: dict[str, np.ndarray],
    *,
    seed: int,
    batch_size: int | None = None,
    averaged: bool = True,
    **options,
) -> np.ndarray:
    """Samples an image for each row. The images do not depend on the number of processes or the batch size.

    Args:
      context: of the evaluator.
      rows: text int32 `[N, T]`, and text_mask bool `[N, T]` unless all of it is valid.
      seed: of the draws.
      batch_size: see `Context.batches_of`.
      averaged: see `Context.per_example`.
      options: of `decode.sample_images`.

    Returns:
      uint8 `[N, H, W, C]`, on every process.
    """
    sampled = context.per_example(
        sampling_function(context, **options),
        context.batches_of(rows, batch_size),
        seed=seed,
        averaged=averaged,
        staged=True,
    )
    return sampled["image"]


def sampling_function(context: Context, **options):
    """Returns a function for `Context.per_example` with staged=True, which samples `image` uint8 `[B, H, W, C]` for a
    batch of text and text_mask; `options` are those of `decode.sample_images`."""

    def function(model: nn.Module, batch: dict[str, Tensor], keys: Tensor) -> dict[str, Tensor]:
        images, _ = decode.sample_images(
            model, batch["text"], keys, text_mask=batch.get("text_mask"), compile=context.loop.compile, **options
        )
        return {"image": images}

    return function


def _weight(guidance: Guidance, count: int) -> str:
    return f", guidance {guidance.weight:g}" if count > 1 else ""


def _tokens_as_images(latents: np.ndarray, model: JetFormer) -> np.ndarray:
    """Returns latents `[N, L, D]` as images uint8 `[N, H, W, C]`. Each token is a square, whose colour is its first
    dimensions."""
    height, width, channels = model.image_shape
    values = latents[..., :channels].reshape(len(latents), *model.patches.grid, -1)
    values = values.repeat(height // values.shape[1], 1).repeat(width // values.shape[2], 2)
    return to_pixels(np.pad(values, ((0, 0), (0, 0), (0, 0), (0, channels - values.shape[-1])), mode="edge"))

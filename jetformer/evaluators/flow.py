"""Pictures of a flow alone: samples by temperature and class, interpolations between images, and round trips."""

import dataclasses

import numpy as np
import torch
from torch import Tensor, nn

from jetformer import class_names, prng
from jetformer.evaluators.base import Evaluator, Results
from jetformer.evaluators.context import Context
from jetformer.evaluators.samples import add_round_trip, round_trip, to_pixels
from jetformer.models.labelled import LabelledFlow
from jetformer.objectives import to_unit_range
from jetformer.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt
from jetformer.runtime import derive_seed
from jetformer.sampling import flows, grid
from jetformer.sampling.decode import to_uint8
from jetformer.sampling.guidance import Guidance

_SEED = 7


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowSamples(Evaluator):
    """Samples and decodes images of a flow alone, with the moving average of the parameters if there is one. The
    latents are the same at every step, so the same images improve.

    Pictures:
      grid: a row of samples for each temperature, with the same latents times the temperature;
      classes: a row of samples for each of the first classes of a `LabelledFlow`, at temperature 1, with the same
        latents (other pictures are without labels);
      interpolation: a row for each pair of images of the evaluation split, with these at its ends, and between them
        images decoded from latents along a great circle, which keeps their length;
      round_trip: images of the evaluation split; their reconstructions; and their latents, from -3 (black) to 3
        (white).
    Metrics: round_trip_error, the largest difference between a pixel value in 0..255 and its reconstruction;
    latents_mean and latents_std, over all dimensions of these images' latents.

    Attributes:
      temperatures: standard deviations of the latents.
      num_images: samples in a row, and images in a row of interpolation.
      num_classes: number of classes to sample.
      guidance: of classes, see `sampling.flows.check_guidance`.
      denoise: remove the noise that the flow was trained with from samples, see `sampling.denoising.denoise`.
      num_interpolations: number of pairs; 0 for none.
      num_round_trips: number of images to encode and decode; 0 for none.
      batch_size: images at a time, over all processes; None: as in evaluation.
    """

    temperatures: tuple[NonNegativeFloat, ...] = (0.5, 0.7, 0.85, 1.0)
    num_images: PositiveInt = 8
    num_classes: PositiveInt = 10
    guidance: Guidance = Guidance()  # noqa: RUF009 (frozen)
    denoise: bool = False
    num_interpolations: NonNegativeInt = 4
    num_round_trips: NonNegativeInt = 8
    batch_size: PositiveInt | None = None

    def __post_init__(self):
        if not self.temperatures or min(self.temperatures) < 0:
            raise ValueError(f"FlowSamples.temperatures = {self.temperatures!r}: give a tuple of numbers, 0 or more")
        if self.num_interpolations and self.num_images < 2:
            raise ValueError(f"FlowSamples.num_images = {self.num_images}: give 2 or more for interpolation")

    def check(self, context: Context) -> None:
        model = context.model
        if not hasattr(model, "inverse"):
            raise ValueError(f"FlowSamples needs a flow alone, not a {type(model).__name__}: bind Samples in its place")
        flows.check_guidance(model, self.guidance)
        if self.guidance.on:
            context.objective.check_guidance(self.guidance.mode)
        context.denoising_std(self.denoise)
        if self.num_interpolations or self.num_round_trips:
            context.check_batch(next(context.batches()))

    def __call__(self, context: Context) -> Results:
        results = Results()
        columns = np.arange(self.num_images, dtype=np.int32)
        temperatures = np.array(self.temperatures, np.float32)
        rows = {
            "temperature": temperatures.repeat(self.num_images),
            "column": np.tile(columns, len(temperatures)),
        }
        labels = [f"temperature {t:g}" for t in self.temperatures]
        results.pictures["grid"] = grid.labelled(self._sample(context, rows, Guidance()), self.num_images, labels)
        if isinstance(context.model, LabelledFlow):
            classes = np.arange(min(self.num_classes, context.model.num_labels), dtype=np.int32)
            rows = {
                "temperature": np.ones(len(classes) * self.num_images, np.float32),
                "column": np.tile(columns, len(classes)),
                "label": classes.repeat(self.num_images),
            }
            labels = [class_names.shown(c, context.class_names) for c in classes.tolist()]
            guided = self._sample(context, rows, self.guidance)
            results.pictures["classes"] = grid.labelled(guided, self.num_images, labels)
        if self.num_interpolations:
            results.pictures["interpolation"] = self._interpolation(context)
        if self.num_round_trips:
            self._round_trip(context, results)
        return results

    def _sample(self, context: Context, rows: dict[str, np.ndarray], guidance: Guidance) -> np.ndarray:
        seed, noise_std = derive_seed(context.seed, _SEED), context.denoising_std(self.denoise)

        def function(model: nn.Module, batch: dict[str, Tensor], keys: Tensor) -> dict[str, Tensor]:
            del keys  # the same latents in every row
            noise = prng.normal(prng.example_keys(seed, batch["column"]), model.image_shape)
            latents = noise * batch["temperature"].view(-1, 1, 1, 1)
            labels = batch["label"].long() if "label" in batch else None
            decode = lambda: flows.decode(model, latents, labels, guidance=guidance, noise_std=noise_std)[0]
            return {"image": to_uint8(context.loop.compile(decode)())}

        batches = context.batches_of(rows, self.batch_size)
        return context.per_example(function, batches, seed=_SEED, staged=True)["image"]

    def _interpolation(self, context: Context) -> np.ndarray:
        def function(model: nn.Module, batch: dict[str, Tensor], keys: Tensor) -> dict[str, Tensor]:
            del keys
            ends = [model(to_unit_range(batch[name] + 0.5))[0] for name in ("first", "second")]
            return {"image": to_uint8(model.inverse(great_circle(*ends, batch["weight"]))[0])}

        images = context.first_examples(2 * self.num_interpolations, ("image",))["image"]
        images = images[: len(images) // 2 * 2]
        pairs = len(images) // 2
        rows = {
            "first": images[::2].repeat(self.num_images, 0),
            "second": images[1::2].repeat(self.num_images, 0),
            "weight": np.tile(np.linspace(0, 1, self.num_images, dtype=np.float32), pairs),
        }
        found = context.per_example(function, context.batches_of(rows, self.batch_size), seed=_SEED)["image"]
        return grid.labelled(found, self.num_images, [f"images {2 * i} to {2 * i + 1}" for i in range(pairs)])

    def _round_trip(self, context: Context, results: Results) -> None:
        def function(model: nn.Module, batch: dict[str, Tensor], keys: Tensor) -> dict[str, Tensor]:
            image = to_unit_range(batch["image"] + prng.uniform(keys, batch["image"].shape[1:]))
            latents, _ = model(image)
            back, _ = model.inverse(latents)
            return round_trip(batch, image, latents, back)

        first = context.first_examples(self.num_round_trips, ("image",))
        rows = context.per_example(function, context.batches_of(first, self.batch_size), seed=_SEED)
        shown = {"images": rows["image"], "reconstructions": rows["back"], "latents": to_pixels(rows["latents"])}
        add_round_trip(results, rows, shown)


def great_circle(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """Interpolates two points along the great circle through them, and their lengths linearly.

    Args:
      first, second: `[B, ...]`.
      weight: `[B]`, from 0 for `first` to 1 for `second`.
    """
    shape = first.shape
    first, second, weight = first.flatten(1), second.flatten(1), weight[:, None]
    lengths = [x.norm(dim=1, keepdim=True).clamp(min=1e-12) for x in (first, second)]
    a, b = first / lengths[0], second / lengths[1]
    angle = torch.acos((a * b).sum(1, keepdim=True).clamp(-1 + 1e-6, 1 - 1e-6))
    direction = (torch.sin((1 - weight) * angle) * a + torch.sin(weight * angle) * b) / torch.sin(angle)
    return (direction * torch.lerp(lengths[0], lengths[1], weight)).view(shape)

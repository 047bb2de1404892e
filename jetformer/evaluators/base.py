"""What an evaluator is, and what it returns.

An evaluator is a frozen dataclass in a file of this directory, which gin then knows by its name:

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class LatentStd(Evaluator):
        split: str | None = None  # in gin: LatentStd.split = "test", and train.evaluators = {"latents": @LatentStd()}

        def __call__(self, context: Context) -> Results:
            def score(model, batch, keys):
                tokens = model.encode_image(to_unit_range(batch["image"].float())).tokens
                return {"std": tokens.flatten(1).std(1)}

            rows = context.per_example(score, context.batches(split=self.split), seed=0)
            return Results(scalars={"std": float(rows["std"].mean())})  # latents/std

`Context.per_example` shards examples over processes and devices. `results.py` describes the files of the results.
"""

import dataclasses

import numpy as np

from jetformer.evaluators.context import Context
from jetformer.ranges import PositiveInt


@dataclasses.dataclass
class Results:
    """What an evaluator returns.

    Attributes:
      scalars: metrics by name.
      ema_scalars: the same metrics with the moving average of the parameters, where both are evaluated.
      pictures: uint8 `[H, W, C]` by name.
    """

    scalars: dict[str, float] = dataclasses.field(default_factory=dict)
    ema_scalars: dict[str, float] = dataclasses.field(default_factory=dict)
    pictures: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def tagged(self, name: str) -> dict[str, float]:
        """Returns all metrics by tag: those of the evaluator `name` are `name/…` and `name_ema/…`."""
        tags = {f"{name}/{key}": value for key, value in self.scalars.items()}
        return tags | {f"{name}_ema/{key}": value for key, value in self.ema_scalars.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Evaluates a model at a step.

    Attributes:
      every_steps: period of its evaluations during training, which also ends with one; None: in evaluation jobs only.
    """

    every_steps: PositiveInt | None = None

    def check(self, context: Context) -> None:
        """Checks, within seconds, that the evaluation is possible. It runs before any training or evaluation.

        Raises:
          ValueError: if not.
        """

    def __call__(self, context: Context) -> Results:
        """Evaluates; every process calls it."""
        raise NotImplementedError

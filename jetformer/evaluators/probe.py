"""Linear probes: how well a linear classifier predicts labels from the model's representations of images."""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from jetformer.data.dataset import Data
from jetformer.evaluators.base import Evaluator, Results
from jetformer.evaluators.context import Context
from jetformer.loops.base import Rows, gather
from jetformer.models.jetformer import JetFormer
from jetformer.objectives import labels_of
from jetformer.ranges import NonNegativeInt, PositiveInt
from jetformer.sampling import decode

_SEED = 8
# Regularization of the ridge regression; leave-one-out cross-validation on the training examples chooses one.
_ALPHAS = tuple(10.0**i for i in range(-3, 6))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe(Evaluator):
    """Measures the accuracy of ridge regression from an image's representations to its label.

    Representations are means over an image's tokens: of its latents, and of each decoder layer's outputs, without a
    text before the image, or with a dropped one if the model learns images only after texts. They are standardized over
    the training examples. As in big_vision's `evaluators/fewshot_lsr.py`, a fixed seed chooses few-shot examples.
    Metrics in 0..1: `accuracy_<k>_shot/latents` and `accuracy_<k>_shot/layer_<i>`; with all examples `accuracy_all/…`.

    Attributes:
      shots: numbers of examples of each class to fit on; None among them: all examples.
      data: the dataset; None: the run's.
      train_split: TFDS split to fit on; None: the dataset's `train_split`.
      split: TFDS split to test on; None: the dataset's `eval_split`.
      pp: preprocessing string that leaves `image` and `label`; None: the dataset's for evaluation, whose texts are then
        the labels.
      seed: of the choice of examples.
      ema: use the moving average of the parameters, if there is one.
    """

    shots: tuple[PositiveInt | None, ...] = (1, 5, 10, None)
    data: Data | None = None
    train_split: str | None = None
    split: str | None = None
    pp: str | None = None
    seed: NonNegativeInt = 0
    ema: bool = True

    def __post_init__(self):
        if (
            not isinstance(self.shots, tuple | list)
            or not self.shots
            or any(k is not None and k < 1 for k in self.shots)
        ):
            raise ValueError(f"Probe.shots = {self.shots}: give a tuple of numbers from 1 on, or None for all examples")

    def check(self, context: Context) -> None:
        model = context.model
        if not isinstance(model, JetFormer):
            raise ValueError(f"Probe needs a JetFormer, not a {type(model).__name__}: unbind it in train.evaluators")
        for split in (self._train_split(context), self.split):
            labels_of(next(context.batches(self.data, split, self.pp)), "Probe.pp")

    def _train_split(self, context: Context) -> str:
        return self.train_split or (self.data or context.data).train_split

    def __call__(self, context: Context) -> Results:
        def labels_alone(batch: Rows) -> Rows:
            return {"_index": batch["_index"], "label": labels_of(batch, "Probe.pp")}

        train_split = self._train_split(context)
        if None in self.shots:
            train = self.represent(context, train_split)
        else:  # embeds only the chosen examples, few of a large split
            train = self._gathered(context, train_split, labels_alone)
        labels = train.pop("label")
        order = np.random.default_rng(self.seed).permutation(len(labels))
        chosen = {
            k: order if k is None else np.concatenate([order[labels[order] == c][:k] for c in np.unique(labels)])
            for k in self.shots
        }
        taken = np.unique(np.concatenate(list(chosen.values())))
        if None not in self.shots:
            train = self.represent(context, train_split, taken)
            labels = train.pop("label")
        test = self.represent(context, self.split)
        wanted = test.pop("label")
        results = Results()
        for k, examples in chosen.items():
            name = "accuracy_all" if k is None else f"accuracy_{k}_shot"
            rows = np.searchsorted(taken, examples)
            for layer in train:
                accuracy = ridge_accuracy(train[layer][rows], labels[rows], test[layer], wanted)
                results.scalars[f"{name}/{layer}"] = accuracy
        return results

    def _gathered(self, context: Context, split: str | None, keep: Callable[[Rows], Rows]) -> Rows:
        """Returns what `keep` returns of the examples of a split, in their order, on every process."""
        parts = []
        for batch in context.batches(self.data, split, self.pp):
            mask = batch.pop("_mask")
            parts.append(keep({name: array[mask] for name, array in batch.items()}))
            context.each_batch()
        return gather(parts, context.loop.runtime)

    def represent(self, context: Context, split: str | None, taken: np.ndarray | None = None) -> Rows:
        """Returns `label` `[N]` and representations `[N, ...]` by name of the examples numbered `taken`; None: of
        all."""
        text_first = context.objective.text_prefix_prob == 1
        text_length = context.data.text_length() if text_first else 0

        def pooled(model: JetFormer, batch: dict[str, Tensor], keys: Tensor) -> dict[str, Tensor]:
            latents = decode.encode_images(model, batch["image"], keys)
            rows = {"label": labels_of(batch, "Probe.pp").long()}
            rows["latents"] = torch.cat(latents, dim=-1).float().mean(1)
            batch_size, count = latents.tokens.shape[:2]
            x, mask, positions = model.embed(
                torch.zeros(batch_size, text_length, dtype=torch.int64, device=keys.device),
                latents.tokens,
                text_first=text_first,
                drop_prefix=torch.ones(batch_size, dtype=torch.bool, device=keys.device) if text_first else None,
                shift=False,
            )
            # With the text first, the image is at the end. Else it follows one token, and precedes the text.
            image = slice(x.shape[1] - count, None) if text_first else slice(1, 1 + count)
            outputs: list[Tensor] = []
            hooks = [
                block.register_forward_hook(lambda m, args, out: outputs.append(out)) for block in model.decoder.blocks
            ]
            model.run_decoder(x, mask=mask, positions=positions)
            for hook in hooks:
                hook.remove()
            return rows | {f"layer_{i:02d}": out[:, image].float().mean(1) for i, out in enumerate(outputs)}

        def function(model: nn.Module, batch: dict[str, Tensor], keys: Tensor) -> dict[str, Tensor]:
            return context.loop.compile(lambda: pooled(model, batch, keys))()

        if taken is None:
            batches = context.batches(self.data, split, self.pp)
        else:

            def some(batch: Rows) -> Rows:
                rows = np.isin(batch["_index"], taken)
                return {name: array[rows] for name, array in batch.items()}

            batches = context.batches_of(self._gathered(context, split, some), numbers=taken)
        return context.per_example(function, batches, seed=_SEED, averaged=self.ema, staged=True)


def ridge_accuracy(
    features: np.ndarray, labels: np.ndarray, test_features: np.ndarray, test_labels: np.ndarray
) -> float:
    """Fits a ridge regression to labels, and returns its accuracy on the test examples.

    Args:
      features, test_features: `[N, F]` and `[M, F]`.
      labels, test_labels: int `[N]` and `[M]`.
    """
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), RidgeClassifierCV(_ALPHAS))
    probe.fit(features.astype(np.float64), labels)
    return float(probe.score(test_features.astype(np.float64), test_labels))

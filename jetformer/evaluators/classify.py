"""Zero-shot classification: predicts the label whose text is the most likely after the image."""

import dataclasses

import numpy as np
import torch
from torch import Tensor, nn

from jetformer.data.dataset import Data
from jetformer.evaluators.base import Evaluator, Results
from jetformer.evaluators.context import Context
from jetformer.models.jetformer import JetFormer
from jetformer.objectives import labels_of
from jetformer.ranges import PositiveInt
from jetformer.sampling import decode

_SEED = 7


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classify(Evaluator):
    """Measures the accuracy of the label whose text is the most likely given the image, over a split.

    The decoder sees an image once, then the text of each label. Metrics in 0..1: accuracy, and accuracy/<label> over
    the images of that label. The model has to learn texts after images.

    Attributes:
      labels: texts of the labels, in the order of their numbers.
      num_classes: instead, if texts are class labels, their number; the text of class c is the token c.
      data: the dataset; None: the run's.
      split: TFDS split; None: the dataset's `eval_split`.
      pp: preprocessing string that leaves `image` and `label`; None: the dataset's for evaluation, whose texts are then
        the labels.
      ema: use the moving average of the parameters, if there is one.
    """

    labels: tuple[str, ...] | None = None
    num_classes: PositiveInt | None = None
    data: Data | None = None
    split: str | None = None
    pp: str | None = None
    ema: bool = True

    def __post_init__(self):
        if (self.labels is None) == (self.num_classes is None):
            raise ValueError("Classify: give labels (texts) or num_classes")
        if self.num_classes is not None and self.num_classes < 2:
            raise ValueError(f"Classify.num_classes = {self.num_classes}: give 2 or more")
        if isinstance(self.labels, str) or (self.labels is not None and len(self.labels) < 2):
            raise ValueError(f"Classify.labels = {self.labels!r}: give a tuple of texts, as ('a cat', 'a dog')")

    def texts(self, context: Context) -> tuple[Tensor, Tensor]:
        """Returns token ids int64 `[C, T]` of the labels, and bool `[C, T]` which of them count."""
        if self.labels is None:
            ids = torch.arange(self.num_classes)[:, None]
            return ids, torch.ones_like(ids, dtype=torch.bool)
        texts = context.data.texts()
        encoded = texts.encode(self.labels)
        ids, mask = (torch.from_numpy(encoded[name]) for name in ("text", "text_mask"))
        # The end of a text counts, padding after it does not.
        ends = ids == texts.tokenizer.eos_id
        number = ends.long().cumsum(1)
        return ids, (mask & (number == 0)) | (ends & (number == 1))

    def check(self, context: Context) -> None:
        model = context.model
        if not isinstance(model, JetFormer):
            raise ValueError(f"Classify needs a JetFormer, not a {type(model).__name__}: unbind it in train.evaluators")
        context.objective.check_order(text_first=False)
        labels_of(next(context.batches(self.data, self.split, self.pp)), "Classify.pp")
        if self.labels is not None:
            context.data.texts().check_whole("Classify.labels", self.labels)
        ids, _ = self.texts(context)
        if ids.max() >= model.vocab_size:
            raise ValueError(f"Classify has {len(ids)} labels, the model's vocabulary {model.vocab_size} tokens")

    def __call__(self, context: Context) -> Results:
        ids, counts = (x.to(context.loop.runtime.device) for x in self.texts(context))

        def score(model: nn.Module, batch: dict[str, Tensor], keys: Tensor) -> dict[str, Tensor]:
            tokens = context.loop.compile(lambda: decode.encode_images(model, batch["image"], keys).tokens)()
            scores = decode.score_texts(model, tokens, ids, counts, compile=context.loop.compile)
            labels = labels_of(batch, "Classify.pp")
            return context.loop.compile(lambda: {"predicted": scores.argmax(1), "label": labels.long()})()

        batches = context.batches(self.data, self.split, self.pp)
        rows = context.per_example(score, batches, seed=_SEED, averaged=self.ema, staged=True)
        names = self.labels or [str(c) for c in range(self.num_classes)]
        if not 0 <= rows["label"].min() <= rows["label"].max() < len(names):
            raise ValueError(f"Classify has {len(names)} labels, but the data has a label {rows['label'].max()}")
        correct = rows["predicted"] == rows["label"]
        scalars = {"accuracy": float(correct.mean())}
        for label in np.unique(rows["label"]):
            scalars[f"accuracy/{names[label]}"] = float(correct[rows["label"] == label].mean())
        return Results(scalars)

"""Likelihoods of a split: bits per dim of images, bits per token and per character of texts, and their terms."""

import dataclasses
import math

import numpy as np
from torch import Tensor, nn

from jetformer import objectives, prng
from jetformer.data.dataset import Data
from jetformer.evaluators.base import Evaluator, Results
from jetformer.evaluators.context import Context
from jetformer.loops.base import Rows
from jetformer.models.mixture import count_components
from jetformer.ranges import PositiveInt, Probability

SEED = 2  # of an evaluation's draws, together with the run's seed
# Folded into an example's key, plus i, for its i-th further draw of dequantization noise.
_DRAW = 1000
_PER_TOKEN = "bits_per_token"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Likelihood(Evaluator):
    """Computes the terms of the run's objective, without training noise, over all examples of a split, with the
    parameters and with their moving average.

    The objective's terms are means over examples. In text_bits_per_token an example counts with the mean over its
    tokens; that of a `TextObjective` is a mean over all tokens. Terms without examples are left out. Further metrics:
      effective_components, distinct_components: number of components of the image head's mixture in use, see
        `mixture.count_components`;
      text_bits_per_token_overall: of tokenized texts, all bits over all tokens, ends included;
      text_bits_per_character: the same bits over all characters. If the objective has both orders of modalities, both
        metrics also for texts that come first (text_prefix_…) and second (text_suffix_…);
      bits_per_dim_importance_weighted: with several draws u of the dequantization noise, -log2 of the mean of p(x + u)
        per dim. It is at most bits_per_dim, the mean over the draws, and nearer to the likelihood of 8-bit images
        (arXiv 1509.00519, section 3; for dequantization arXiv 1902.00275, section 3.2).

    Attributes:
      data: the dataset; None: the run's.
      split: TFDS split; None: the dataset's `eval_split`.
      num_draws: number of draws of dequantization noise for each image.
      text_prefix_prob: probability that the text comes first in an example; None: as in training. 1 scores all images
        given their texts, 0 all texts given their images.
    """

    data: Data | None = None
    split: str | None = None
    num_draws: PositiveInt = 1
    text_prefix_prob: Probability | None = None

    def _objective(self, context: Context):
        objective = context.objective
        if self.text_prefix_prob is not None:
            if not isinstance(objective, objectives.JetFormerObjective):
                raise ValueError(
                    f"Likelihood.text_prefix_prob does not apply to a {type(objective).__name__}: leave it out"
                )
            if self.text_prefix_prob > 0:
                context.objective.check_order(text_first=True)
            if self.text_prefix_prob < 1:
                context.objective.check_order(text_first=False)
            objective = dataclasses.replace(objective, text_prefix_prob=self.text_prefix_prob)
        dequantizes = getattr(objective, "dequantize", False) and not getattr(objective, "noise_std", 0)
        if self.num_draws > 1 and not dequantizes:
            raise ValueError(f"Likelihood.num_draws = {self.num_draws}: without dequantization: leave it at 1")
        return objective

    def check(self, context: Context) -> None:
        self._objective(context)
        context.check_batch(next(context.batches(self.data, self.split)))

    def __call__(self, context: Context) -> Results:
        objective = self._objective(context)
        data = self.data or context.data
        texts = data.has_texts()

        def score(model: nn.Module, batch: dict[str, Tensor], keys: Tensor) -> dict[str, Tensor]:
            rows: dict[str, Tensor] = {}
            first = objective.draw(model, batch, keys, train=False)
            for i in range(self.num_draws):
                draws = first
                if i:  # other draws, as of the order of modalities, are the same
                    again = objective.draw(model, batch, keys_of_draw(keys, i), train=False)
                    draws = first | {"dequant": again["dequant"]}
                _, terms = objective(model, batch, draws, train=False)
                if "responsibilities" in terms:
                    value, counts = terms.pop("responsibilities")
                    rows["responsibilities"] = rows.get("responsibilities", 0) + value.where(counts[:, None], 0.0)
                for name, (value, counts) in terms.items():
                    rows[f"{name}/{i}"] = _by_example(value.where(counts, 0.0))
                    rows[f"{name}/count"] = _by_example(counts)
                for name in [name for name in terms if texts and name.endswith(_PER_TOKEN)]:
                    bits, counts = terms[name]
                    # A JetFormerObjective's are means over the tokens of an example.
                    bits = bits if bits.ndim == 2 else bits[:, None]
                    counts = counts if counts.ndim == 2 else counts[:, None] & batch["text_loss"]
                    rows[f"{name}/bits/{i}"] = bits.where(counts, 0.0).sum(1)
                    rows[f"{name}/tokens"], rows["text"] = counts, batch["text"]
            return rows

        results = Results()
        for averaged, into in ((False, results.scalars), (True, results.ema_scalars)):
            if averaged and context.ema is None:
                continue
            batches = context.batches(self.data, self.split)
            responsibilities: list[np.ndarray] = []  # [K] of each batch: those of all examples would take much memory

            def keep_rest(rows: Rows, sums: list[np.ndarray] = responsibilities) -> Rows:
                if "responsibilities" in rows:
                    sums.append(rows.pop("responsibilities").sum(0, dtype=np.float64))
                return rows

            rows = context.per_example(score, batches, seed=SEED, averaged=averaged, to_rows=keep_rest)
            responsibilities = [total for part in context.loop.runtime.all_gather(responsibilities) for total in part]
            names = [key.removesuffix("/count") for key in rows if key.endswith("/count")]
            counts = {name: int(rows[f"{name}/count"].sum()) for name in names}
            draws = {name: np.stack([rows[f"{name}/{i}"] for i in range(self.num_draws)]) for name in names}
            into |= {
                name: float(values.astype(np.float64).mean(0).sum() / counts[name])
                for name, values in draws.items()
                if counts[name]
            }
            if responsibilities and "responsibility_entropy" in into:
                into |= count_components(sum(responsibilities), into.pop("responsibility_entropy"))
            for name in [name for name in names if f"{name}/tokens" in rows and counts[name]]:
                bits = np.mean([rows[f"{name}/bits/{i}"].astype(np.float64).sum() for i in range(self.num_draws)])
                decode, tokens = data.texts().tokenizer.decode, rows[f"{name}/tokens"]
                pairs = zip(rows["text"], tokens, strict=True)
                num_characters = sum(len(decode(text[counted].tolist())) for text, counted in pairs)
                into[f"{name}_overall"] = float(bits / max(tokens.sum(), 1))
                into[name.replace("token", "character")] = float(bits / max(num_characters, 1))
            if self.num_draws > 1 and counts.get("bits_per_dim"):
                counted = rows["bits_per_dim/count"].astype(bool)
                num_dims = math.prod(context.model.image_shape)
                bound = importance_weighted(draws["bits_per_dim"][:, counted], num_dims)
                into["bits_per_dim_importance_weighted"] = bound
        return results


def keys_of_draw(keys: Tensor, number: int) -> Tensor:
    """Returns the keys int32 `[B, 2]` of examples for draw `number` of their dequantization noise, counted from 0."""
    return prng.fold_in(keys, _DRAW + number) if number else keys


def importance_weighted(bits_per_dim: np.ndarray, num_dims: int) -> float:
    """Returns the mean over N images of -log2 of the mean density of K draws, in bits per dim.

    Args:
      bits_per_dim: `[K, N]`, of each draw.
      num_dims: number of dims of an image.
    """
    log_densities = -bits_per_dim.astype(np.float64) * (num_dims * math.log(2))
    log_means = np.logaddexp.reduce(log_densities, axis=0) - math.log(len(log_densities))
    return float(-log_means.mean() / (num_dims * math.log(2)))


def _by_example(x: Tensor) -> Tensor:
    """Sums `[B, ...]` to `[B]`."""
    return x if x.ndim == 1 else x.flatten(1).sum(1)

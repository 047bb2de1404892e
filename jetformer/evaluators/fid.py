"""Metrics of generated images: FID, Inception Score, KID, precision and recall, by torch-fidelity's functions.

Dimensions: N generated images, M real ones, F features, K classes.
"""

import dataclasses
import functools
import inspect
from typing import Any

import numpy as np
import torch
from absl import logging
from torch import Tensor, nn
from upath import UPath

from jetformer.data.dataset import Data
from jetformer.evaluators.base import Evaluator, Results
from jetformer.evaluators.context import Context
from jetformer.evaluators.features import (
    Extractor,
    Function,
    InceptionFeatures,
    read_arrays,
    torch_fidelity,
    write_arrays,
)
from jetformer.evaluators.samples import sampling_function
from jetformer.loops.base import Rows
from jetformer.models.jetformer import JetFormer
from jetformer.models.labelled import LabelledFlow
from jetformer.objectives import check_tokens, labels_of
from jetformer.ranges import PositiveFloat, PositiveInt
from jetformer.sampling import flows, grid
from jetformer.sampling.decode import Compile
from jetformer.sampling.guidance import Guidance
from jetformer.sampling.images import sample_flow

_SEED = 6
_READ_SEED = 0  # nothing is drawn
METRICS = ("fid", "inception_score", "kid", "precision", "recall", "class_accuracy")
# Need more than mean and covariance.
_OF_FEATURES = ("kid", "precision", "recall")
_COMPARING = ("fid", *_OF_FEATURES)
_MIN_IMAGES = 10  # the Inception Score is a mean over ten parts
_KID_SUBSET_SIZE = 1000
_TEXTS = ("text", "text_mask")

# Texts and features of splits that this process has read: real images are the same at every step.
read_splits: dict[tuple, tuple[Rows, Rows]] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fid(Evaluator):
    """Compares generated images with the real ones of a split, or with statistics of real ones.

    It generates an image for the text (or class) of each example of the split, in order, and repeats the split until
    there are enough. A flow alone generates images of the labels if it is a `LabelledFlow`. The seeds are the same at
    every step. Each process computes features of the images that it has generated; images are not exchanged. Metrics:
      fid: Fréchet distance between Gaussians fitted to the features (arXiv 1706.08500); with other features than
        Inception's, which define FID, it is called frechet_distance;
      inception_score: a mean over ten parts (arXiv 1606.03498); it needs no real images;
      kid: squared maximum mean discrepancy with a cubic kernel (arXiv 1801.01401), a mean over 100 random subsets of
        1000 images, or fewer if there are not as many;
      precision, recall: the share of generated images within the manifold of real ones, and of real ones within that of
        generated ones (arXiv 1904.06991), each the union of balls that reach to the third nearest neighbour;
      class_accuracy: the share of generated images that the extractor's classifier assigns to the given class.
    All but kid and class_accuracy depend on the number of images: compare only metrics of equal numbers. FIDs in papers
    use 50,000.

    Attributes:
      num_images: N.
      data: the dataset of real images and texts; None: the run's.
      split: TFDS split; None: the dataset's `eval_split`.
      statistics: compare instead with an .npz file of mu `[F]` and sigma `[F, F]`, as ADM publishes them, or as
        `save_statistics` writes them; the texts are still those of the split.
      save_statistics: .npz file to write the split's statistics to: mu, sigma, features `[M, F]`.
      metrics: names; None: the distance and, with Inception, inception_score, or, with a classifier that knows the
        run's classes, class_accuracy.
      features: of images, see `evaluators.features`.
      batch_size: images to generate at a time, over all processes; None: as in evaluation.
      guidance: see `Guidance`.
      temperature_scales: multiplies the standard deviations of the tokens' mixtures, or the latents of a flow alone.
      temperature_probs: multiplies the log-weights of the tokens' mixtures.
      denoise: remove the noise that the model was trained with, see `sampling.denoising.denoise`.
      ema: use the moving average of the parameters, if there is one.
      keep_images: also write the images, to `<workdir>/eval_<name>/images/<step>/<number>.png`.
    """

    num_images: PositiveInt = 50_000
    data: Data | None = None
    split: str | None = None
    statistics: str | None = None
    save_statistics: str | None = None
    metrics: tuple[str, ...] | None = None
    features: Extractor = InceptionFeatures()  # noqa: RUF009 (frozen)
    batch_size: PositiveInt | None = None
    guidance: Guidance = Guidance()  # noqa: RUF009 (frozen)
    temperature_scales: PositiveFloat = 1.0
    temperature_probs: PositiveFloat = 1.0
    denoise: bool = False
    keep_images: bool = False
    ema: bool = True

    def __post_init__(self):
        if inspect.isclass(self.features):
            raise ValueError(f"Fid.features is a class: write @{self.features.__name__}(), with parentheses")
        if self.num_images < _MIN_IMAGES:
            raise ValueError(f"Fid.num_images = {self.num_images}: give {_MIN_IMAGES} or more")
        if self.metrics is not None and (isinstance(self.metrics, str) or not self.metrics):
            raise ValueError(f"Fid.metrics = {self.metrics!r}: give a tuple of names, as ('fid', 'kid')")
        if self.statistics is not None and self.save_statistics is not None:
            raise ValueError("Fid: give statistics or save_statistics, not both")

    def check(self, context: Context) -> None:
        model = context.model
        is_flow = not isinstance(model, JetFormer)
        if is_flow and not hasattr(model, "inverse"):
            raise ValueError(
                f"Fid needs a model of images, not a {type(model).__name__}: unbind it in train.evaluators"
            )
        if is_flow and self.temperature_probs != 1:
            raise ValueError("Fid.temperature_probs does not apply to a flow alone: leave it out")
        for name in self.metrics or ():  # not in __post_init__, so that a job's other evaluators still run
            if name not in METRICS:
                raise ValueError(f"Fid.metrics: there is no {name!r}; choose from {', '.join(METRICS)}")
        if is_flow:
            flows.check_guidance(model, self.guidance)
        else:
            self.guidance.check(model.image_head)
            context.objective.check_order(text_first=True)
        if self.guidance.on:
            context.objective.check_guidance(self.guidance.mode)
        context.denoising_std(self.denoise)
        metrics = self.metrics_of(context)
        if metrics != ("class_accuracy",):
            torch_fidelity()
        if "class_accuracy" in metrics:
            if not self.features.knows_labels:
                raise ValueError(
                    "Fid.metrics: class_accuracy needs a classifier of the run's classes, which "
                    f"{type(self.features).__name__} is not: remove it, or bind Fid.features = @ClassifierFeatures()"
                )
            if not self._has_classes(context):
                raise ValueError("Fid.metrics: class_accuracy needs classes, and this model has none: remove it")
        batch = next(context.batches(self.data, self.split))
        context.check_batch(batch)
        if condition := _condition(model, batch):
            check_tokens(condition["text"], model)
        self.features.check(context)
        if self.statistics is not None:
            self._read_statistics(context)
        elif self._data(context).num_examples(self._split(context)) < _MIN_IMAGES:
            raise ValueError(f"Fid: split {self._split(context)!r} has fewer than {_MIN_IMAGES} images: use another")

    def _data(self, context: Context) -> Data:
        return context.data if self.data is None else self.data

    def _split(self, context: Context) -> str:
        return self.split or self._data(context).eval_split

    def _has_classes(self, context: Context) -> bool:
        data = self._data(context)
        if not isinstance(context.model, JetFormer):
            return isinstance(context.model, LabelledFlow)
        return not data.has_texts() and data.text_length() == 1

    def metrics_of(self, context: Context) -> tuple[str, ...]:
        """Returns the names of the metrics."""
        if self.metrics is not None:
            return tuple(self.metrics)
        if not self.features.knows_labels:
            return ("fid", "inception_score")
        return ("fid", "class_accuracy") if self._has_classes(context) else ("fid",)

    def __call__(self, context: Context) -> Results:
        metrics = self.metrics_of(context)
        extract = self.features.load(context)
        texts, real = self._read_split(context, extract, metrics)
        numbers = np.arange(self.num_images, dtype=np.int32)
        rows = {name: array[numbers % len(array)] for name, array in texts.items()}
        generated = self._generate(context, extract, rows | {"number": numbers}, metrics)

        def compare() -> dict[str, float]:
            nonlocal real
            if self.statistics is not None:
                real = self._read_statistics(context)
            elif "features" in real:
                real = real | statistics(real["features"])
            if self.save_statistics is not None:
                saved = {name: real[name] for name in ("mu", "sigma", "features")}
                write_arrays(UPath(self.save_statistics), saved | {"extractor": np.array(self.features.name(context))})
            return self._scalars(metrics, generated, real, rows.get("text"))

        return Results(context.loop.runtime.on_first(compare))  # eigenvalues of large matrices use all cores of a host

    def _read_split(self, context: Context, extract: Function, metrics: tuple[str, ...]) -> tuple[Rows, Rows]:
        """Returns texts `[M, T]` of the split's examples and, if needed, features `[M, F]`; reads a split once."""
        names = []
        if self.statistics is None:
            names += ["features"] * (self.save_statistics is not None or bool(set(_COMPARING) & set(metrics)))
            names += ["logits"] * (self.features.knows_labels and self._has_classes(context))
        process = context.loop.runtime.process_index, context.loop.runtime.process_count
        what = type(context.model), self._data(context), self._split(context), self.features.name(context)
        key = (*what, tuple(names), process)
        if key in read_splits:
            return read_splits[key]

        def copy(model: nn.Module, batch: dict[str, Tensor], keys: Tensor) -> dict[str, Tensor]:
            return {"image": batch["image"]} | _condition(model, batch)

        def to_rows(rows: Rows) -> Rows:
            found = extract(rows["image"]) if names else {}
            return {name: array for name, array in (rows | found).items() if name in (*_TEXTS, *names)}

        batches = context.batches(self.data, self.split)
        rows = context.per_example(copy, batches, seed=_READ_SEED, averaged=False, to_rows=to_rows)
        if "logits" in names:
            where, accuracy = self._data(context).name, class_accuracy(rows["logits"], rows["text"])
            logging.log_first_n(
                *(logging.INFO, "%s, split %r: the classifier's accuracy is %.4f", 1),
                *(where, self._split(context), accuracy),
            )
            del rows["logits"]
        read_splits[key] = {name: rows.pop(name) for name in _TEXTS if name in rows}, rows
        return read_splits[key]

    def _read_statistics(self, context: Context) -> Rows:
        path, size = UPath(self.statistics), self.features.num_features
        otherwise = f"not a file of statistics: give Fid.statistics an .npz of mu [{size}] and sigma [{size}, {size}]"
        real = read_arrays(path, ("mu", "sigma"), otherwise, also=("features", "extractor"))
        for name, shape in (("mu", (size,)), ("sigma", (size, size)), ("features", (None, size))):
            if name not in real:
                continue
            found = real[name]
            fits = found.ndim == len(shape) and all(b in (a, None) for a, b in zip(found.shape, shape, strict=True))
            if not fits or found.dtype.kind != "f" or not np.isfinite(found).all():
                raise ValueError(f"{path} is {otherwise} (its {name} is {found.dtype} {list(found.shape)})")
        ours = self.features.name(context)
        theirs = str(real.pop("extractor", ours))
        if theirs != ours:
            raise ValueError(f"{path} has statistics of the features {theirs}, not of {ours}: save it again")
        if "features" in real and len(real["features"]) < _MIN_IMAGES:
            raise ValueError(f"{path} has statistics of fewer than {_MIN_IMAGES} images: use more")
        if "features" not in real and (cannot := [name for name in self.metrics_of(context) if name in _OF_FEATURES]):
            raise ValueError(
                f"{path} has only mu and sigma, and {', '.join(cannot)} need(s) features: remove them, "
                "or compare with a split"
            )
        return real | {name: real[name].astype(np.float64) for name in ("mu", "sigma")}

    def _generate(self, context: Context, extract: Function, rows: Rows, metrics: tuple[str, ...]) -> Rows:
        """Generates images for texts; returns, as far as needed, their features `[N, F]` and logits `[N, K]`."""
        names = ["features"] * bool(set(_COMPARING) & set(metrics))
        names += ["logits"] * bool({"inception_score", "class_accuracy"} & set(metrics))
        options = {"guidance": self.guidance, "noise_std": context.denoising_std(self.denoise)}
        if isinstance(context.model, JetFormer):
            options |= {"temperature_scales": self.temperature_scales, "temperature_probs": self.temperature_probs}
            sample = sampling_function(context, **options)
        else:
            options |= {"temperature": self.temperature_scales, "compile": context.loop.compile}
            sample = functools.partial(_sample_flow, **options)

        def function(model: nn.Module, batch: dict[str, Tensor], keys: Tensor) -> dict[str, Tensor]:
            return sample(model, batch, keys) | {"number": batch["number"]}

        directory = context.directory / "images" / f"{context.step:09d}"

        def prepare_directory() -> None:
            directory.mkdir(parents=True, exist_ok=True)
            for path in directory.glob("*.png"):  # of an earlier evaluation with more; other files may be another job's
                if path.stem.isdigit() and int(path.stem) >= self.num_images:
                    path.unlink(missing_ok=True)

        if self.keep_images:
            context.loop.runtime.on_first(prepare_directory)

        def to_rows(rows: Rows) -> Rows:
            if self.keep_images:
                for number, image in zip(rows["number"], rows["image"], strict=True):
                    grid.save_png(image, directory / f"{number:06d}.png")
            found = extract(rows["image"])
            return {name: found[name] for name in names}

        batches = context.batches_of(rows, self.batch_size)
        return context.per_example(function, batches, seed=_SEED, averaged=self.ema, staged=True, to_rows=to_rows)

    def _scalars(
        self, metrics: tuple[str, ...], generated: Rows, real: Rows, text: np.ndarray | None
    ) -> dict[str, float]:
        scalars = {}
        if "fid" in metrics:
            scalars[self.features.distance] = frechet_distance(statistics(generated["features"]), real)
        if "inception_score" in metrics:
            scalars["inception_score"] = inception_score(generated["logits"])
        if "kid" in metrics:
            scalars["kid"] = kernel_distance(generated["features"], real["features"])
        if {"precision", "recall"} & set(metrics):
            both = precision_and_recall(generated["features"], real["features"])
            scalars |= {name: both[name] for name in both if name in metrics}
        if "class_accuracy" in metrics:
            scalars["class_accuracy"] = class_accuracy(generated["logits"], text)
        return scalars


def _condition(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """Returns what images are generated for: text `[B, T]`, the label of a flow `[B, 1]`, and text_mask, if any."""
    if isinstance(model, LabelledFlow):
        return {"text": labels_of(batch)[:, None]}
    return {name: batch[name] for name in _TEXTS if name in batch} if isinstance(model, JetFormer) else {}


def _sample_flow(
    flow: nn.Module, batch: dict[str, Tensor], keys: Tensor, compile: Compile, **options: Any
) -> dict[str, Tensor]:
    labels = batch["text"][:, 0].long() if "text" in batch else None
    return {"image": compile(lambda: sample_flow(flow, keys, labels, **options)[0])()}


def statistics(features: np.ndarray) -> Rows:
    """Returns mean mu `[F]` and covariance sigma `[F, F]` of features `[N, F]`, in float64."""
    return torch_fidelity().metric_fid.fid_features_to_statistics(torch.from_numpy(features).double())


def frechet_distance(ours: Rows, theirs: Rows) -> float:
    """Returns the squared 2-Wasserstein distance between the Gaussians of two `statistics`."""
    metric_fid = torch_fidelity().metric_fid
    return metric_fid.fid_statistics_to_metric(ours, theirs, verbose=False)[metric_fid.KEY_METRIC_FID]


def inception_score(logits: np.ndarray) -> float:
    """Returns the Inception Score of logits `[N, K]`."""
    metric_isc = torch_fidelity().metric_isc
    return metric_isc.isc_features_to_metric(torch.from_numpy(logits))[metric_isc.KEY_METRIC_ISC_MEAN]


def kernel_distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Returns the KID of features `[N, F]` and `[M, F]`, in float64."""
    metric_kid = torch_fidelity().metric_kid
    return metric_kid.kid_features_to_metric(
        *(torch.from_numpy(features).double() for features in (ours, theirs)),
        kid_subset_size=min(_KID_SUBSET_SIZE, len(ours), len(theirs)),
        verbose=False,
    )[metric_kid.KEY_METRIC_KID_MEAN]


def precision_and_recall(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Returns `precision` and `recall` of generated features `[N, F]` and real ones `[M, F]`."""
    metric_prc = torch_fidelity().metric_prc
    scalars = metric_prc.prc_features_to_metric(
        torch.from_numpy(ours),
        torch.from_numpy(theirs),
        save_cpu_ram=True,  # the distances of 50,000 images take 10 GB
        verbose=False,
    )
    return {"precision": scalars[metric_prc.KEY_METRIC_PRECISION], "recall": scalars[metric_prc.KEY_METRIC_RECALL]}


def class_accuracy(logits: np.ndarray, text: np.ndarray) -> float:
    """Returns the share of logits `[N, K]` that are largest at the class `[N, 1]`."""
    return float((logits.argmax(1) == text[:, 0]).mean())

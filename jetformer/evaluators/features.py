"""What images are compared by: features of Inception, or of a small classifier that is trained here.

An experiment names an extractor; what `load` makes of it is a function of images. Dimensions: B images, F features,
K classes.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import math
import pickle
import warnings
import zipfile
from collections.abc import Callable
from types import ModuleType
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from absl import logging
from upath import UPath

from jetformer.evaluators.base import Context, prepare
from jetformer.ranges import PositiveInt
from jetformer.storage import arrays_to_bytes, write_whole

# Of images uint8 [B, H, W, C]: "features" float32 [B, F], and "logits" float32 [B, K] of classes.
Function = Callable[[np.ndarray], dict[str, np.ndarray]]

# How many images Inception is given at a time.
_BATCH_SIZE = 64
# What `torch.load` raises for a file that is no checkpoint, and `load_state_dict` for one of something else.
_NO_WEIGHTS = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, AttributeError, KeyError)
# What numpy raises for a file that is no .npz, is cut off, lacks an array, or holds pickled objects.
_NO_ARRAYS = (ValueError, EOFError, KeyError, zipfile.BadZipFile)


@runtime_checkable
class Extractor(Protocol):
    """Attributes:
    num_features: F.
    distance: what the Fréchet distance between such features is called.
    knows_labels: whether its classes are the labels of the run's dataset.
    """

    num_features: int
    distance: str
    knows_labels: bool

    def name(self, context: Context) -> str:
        """Which features these are: statistics of others are not compared with them."""

    def check(self, context: Context) -> None:
        """Looks, within seconds, whether it can be loaded; raises ValueError or ImportError if not."""

    def load(self, context: Context) -> Function:
        """The function of images; every process calls it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InceptionFeatures:
    """The Inception network that FID is defined with, as torch-fidelity has it: TensorFlow's of 2015, its 2048 features
    after the last pooling, and its logits without their biases (which the Inception Score is made of). It resizes
    images itself; grey ones are given to it in three equal channels. On the run's GPU, or else on the CPU.

    Attributes:
      weights_path: its weights, as torch-fidelity publishes them; None: downloaded when first used, to where torch.hub
        keeps such files.
    """

    weights_path: str | None = None

    num_features: ClassVar[int] = 2048
    distance: ClassVar[str] = "fid"
    knows_labels: ClassVar[bool] = False

    def name(self, context: Context) -> str:
        """As in `Extractor`."""
        del context
        return "inception"

    def check(self, context: Context) -> None:
        """As in `Extractor`."""
        self.load(context)

    def load(self, context: Context) -> Function:
        """As in `Extractor`."""
        inception = torch_fidelity().feature_extractor_inceptionv3
        remedy = f"download {inception.URL_INCEPTION_V3} and set InceptionFeatures.weights_path to the file"
        if self.weights_path is None:
            # From the same place to the same place as torch-fidelity does it, but it would unpickle the file.
            fetch = functools.partial(
                torch.hub.load_state_dict_from_url,
                inception.URL_INCEPTION_V3,
                map_location="cpu",
                progress=False,
                check_hash=True,
                weights_only=True,
            )
            where = "torch-fidelity's weights of Inception"
        else:
            fetch = functools.partial(_read_weights, UPath(self.weights_path))
            where = f"InceptionFeatures.weights_path = {self.weights_path!r}"
        weights = {}

        def read() -> None:
            try:
                weights.update(fetch())
            except (OSError, ImportError) as error:
                raise ValueError(f"{where} cannot be had here ({error}): {remedy}") from error
            except _NO_WEIGHTS as error:
                raise ValueError(f"{where} is no file of weights: {remedy}") from error

        context.runtime.first_does(read)  # where processes share the place, one of them downloads
        if not weights:
            read()
        # torch-fidelity reads weights from a file, and unpickles what is in it: it is given one that is written here.
        copy = io.BytesIO()
        torch.save(weights, copy)
        copy.seek(0)
        try:
            network = inception.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=copy
            )
        except _NO_WEIGHTS as error:
            raise ValueError(f"{where} has weights of something else than Inception: {remedy}") from error
        device = context.runtime.device if context.runtime.device.type == "cuda" else torch.device("cpu")
        network.to(device)

        def extract(images: np.ndarray) -> dict[str, np.ndarray]:
            features = np.empty((len(images), self.num_features), np.float32)
            logits = np.empty((len(images), network.fc.out_features), np.float32)
            for start in range(0, len(images), _BATCH_SIZE):
                part = slice(start, start + _BATCH_SIZE)
                pixels = torch.tensor(images[part], device=device).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
                features[part], logits[part] = (values.cpu().numpy() for values in network(pixels))
            return {"features": features, "logits": logits}

        return extract


def _read_weights(path: UPath) -> dict[str, torch.Tensor]:
    with path.open("rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierFeatures:
    """A classifier with one hidden layer, whose activations are the features: for small images, of which Inception has
    seen nothing alike, and for machines without its weights.

    It learns the labels of the run's training split from pixels, once: it is kept beside the dataset, and a classifier
    with other settings in another file there. Its figures compare with those of the same file only.

    Attributes:
      hidden_dim: F.
      max_epochs: how long to train at most; it ends where the loss does not get lower any more.
      pp: preprocessing string that leaves an image of the model's shape and an integer label; None: the dataset's own
        "image" and "label".
      path: file to keep it in; None: beside the dataset.
    """

    hidden_dim: PositiveInt = 64
    max_epochs: PositiveInt = 200
    pp: str | None = None
    path: str | None = None

    distance: ClassVar[str] = "frechet_distance"
    knows_labels: ClassVar[bool] = True

    @property
    def num_features(self) -> int:
        return self.hidden_dim

    def _pp(self, context: Context) -> str:
        return self.pp or f"decode(channels={context.state.model.image_shape[-1]}) | keep('image', 'label')"

    def name(self, context: Context) -> str:
        """As in `Extractor`."""
        data = context.run.data
        settings = data.identity(), data.train_split, self._pp(context)
        settings += context.state.model.image_shape, self.hidden_dim, self.max_epochs
        return f"classifier_{hashlib.sha256(repr(settings).encode()).hexdigest()[:12]}"

    def _path(self, context: Context) -> UPath:
        return UPath(self.path or UPath(context.run.data.directory()) / f"{self.name(context)}.npz")

    def check(self, context: Context) -> None:
        """As in `Extractor`."""
        data, pp, shape = context.run.data, self._pp(context), tuple(context.state.model.image_shape)
        remedy = f"give ClassifierFeatures.pp, which leaves an image {list(shape)} and an integer label"
        try:
            batch = next(context.batches(split=data.train_split, pp=pp))
        except ValueError as error:
            raise ValueError(f"ClassifierFeatures cannot learn from {data.name!r} ({error}): {remedy}") from error
        found = {name: f"{array.dtype} {list(array.shape[1:])}" for name, array in batch.items() if name[0] != "_"}
        if found.get("image") != f"uint8 {list(shape)}" or found.get("label") not in ("int32 []", "int64 []"):
            found = ", ".join(f"{name} {what}" for name, what in found.items())
            raise ValueError(
                f"ClassifierFeatures cannot learn from {data.name!r}, of which {pp!r} is {found}: {remedy}"
            )

    def load(self, context: Context) -> Function:
        """As in `Extractor`."""
        prepare(context.run.data, context.runtime)
        layers = {}

        def read() -> None:
            path = self._path(context)
            if not path.exists():
                write_arrays(path, self._train(context) | {"name": np.array(self.name(context))})
            names = ("name", "hidden_weights", "hidden_biases", "logit_weights", "logit_biases")
            found = read_arrays(path, names, f"no classifier of {type(self).__name__}: delete it, and one is trained")
            if str(found.pop("name")) != self.name(context):
                raise ValueError(f"{path} is a classifier of other data or with other settings: use another file")
            layers.update({name: array.astype(np.float64) for name, array in found.items()})

        # All processes have the classifier of one of them, on hosts that share no files as well.
        context.runtime.first_does(read)
        layers = context.runtime.of_first(layers)

        def extract(images: np.ndarray) -> dict[str, np.ndarray]:
            # In float64, so that the size of a batch shows in no digit that is kept.
            hidden = np.maximum(_pixels(images) @ layers["hidden_weights"] + layers["hidden_biases"], 0)
            logits = hidden @ layers["logit_weights"] + layers["logit_biases"]
            return {"features": hidden.astype(np.float32), "logits": logits.astype(np.float32)}

        return extract

    def _train(self, context: Context) -> dict[str, np.ndarray]:
        """Trains the classifier: the weights `[I, O]` and biases `[O]` of its layers."""
        from sklearn.exceptions import ConvergenceWarning  # slow, and needed to train only
        from sklearn.neural_network import MLPClassifier

        data = context.run.data
        batches = data.eval_batches(batch_size=256, split=data.train_split, pp=self._pp(context))
        parts = [(batch["image"][batch["_mask"]], batch["label"][batch["_mask"]]) for batch in batches]
        images, labels = map(np.concatenate, zip(*parts, strict=True))
        classes = np.unique(labels)
        if len(classes) < 2 or not np.array_equal(classes, np.arange(len(classes))):
            raise ValueError(
                f"the labels in split {data.train_split!r} of {data.name!r} are {_shortened(classes.tolist())}: "
                "ClassifierFeatures needs classes from 0 on, each with an example"
            )
        logging.info("Training %s on %d images of %s", self, len(images), data.name)
        classifier = MLPClassifier((self.hidden_dim,), max_iter=self.max_epochs, random_state=0)
        with warnings.catch_warnings():  # it may end after max_epochs
            warnings.simplefilter("ignore", ConvergenceWarning)
            classifier.fit(_pixels(images).astype(np.float32), labels)
        (hidden_weights, weights), (hidden_biases, biases) = classifier.coefs_, classifier.intercepts_
        if len(classes) == 2:  # scikit-learn has one logit then, of the second class against the first
            weights, biases = (np.concatenate((np.zeros_like(x), x), axis=-1) for x in (weights, biases))
        return {
            "hidden_weights": hidden_weights,
            "hidden_biases": hidden_biases,
            "logit_weights": weights,
            "logit_biases": biases,
        }


def _pixels(images: np.ndarray) -> np.ndarray:
    """Images uint8 `[B, H, W, C]` as float64 `[B, H · W · C]` in [0, 1]."""
    return images.reshape(len(images), math.prod(images.shape[1:])) / 255


def _shortened(values: list) -> str:
    return ", ".join(map(str, values[:5])) + (", …" if len(values) > 5 else "")


def torch_fidelity() -> ModuleType:
    """The package torch_fidelity, which is an extra.

    Raises:
      ImportError: in one line, if it is not installed, or cannot be imported.
    """
    try:
        import torch_fidelity
    except ImportError as error:
        raise ImportError(f"FID and the like need torch-fidelity: pip install -e '.[fid]' ({error})") from error
    except RuntimeError as error:  # which it is when torchvision's operators do not load
        raise ImportError(
            f"torchvision {importlib.metadata.version('torchvision')} does not fit torch {torch.__version__}: install "
            f"both from one index, as pip install torch torchvision --index-url=… does ({error})"
        ) from error
    return torch_fidelity


def read_arrays(path: UPath, names: tuple[str, ...], otherwise: str, also: tuple[str, ...] = ()) -> dict:
    """Arrays of an .npz file by name; nothing in it is unpickled, and others are not read.

    Args:
      path: the file.
      names: of arrays that it has.
      otherwise: what the file is if it is not that, and what to do about it.
      also: of arrays that it may have.

    Raises:
      ValueError: in one line, if it cannot be read, or has no such arrays.
    """
    try:
        with path.open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array")
            return {name: arrays[name] for name in (*names, *(name for name in also if name in arrays))}
    except (OSError, ImportError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except _NO_ARRAYS as error:
        raise ValueError(f"{path} is {otherwise} ({' '.join(str(error).split())})") from error


def write_arrays(path: UPath, arrays: dict[str, np.ndarray]) -> None:
    """Writes an .npz file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, arrays_to_bytes(arrays))

"""Features that images are compared by: Inception's, or those of a small classifier that is trained here.

Dimensions: B images, F features, K classes.
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

from jetformer.evaluators.context import Context, prepare
from jetformer.ranges import PositiveInt
from jetformer.storage import arrays_to_bytes, write_whole

# Maps images uint8 [B, H, W, C] to "features" float32 [B, F] and "logits" float32 [B, K].
Function = Callable[[np.ndarray], dict[str, np.ndarray]]

_BATCH_SIZE = 64  # of Inception
# Raised by `torch.load` for a file that is no checkpoint, and by `load_state_dict` for another model's.
_NO_WEIGHTS = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, AttributeError, KeyError)
# Raised by numpy for a file that is no .npz, is truncated, lacks an array, or holds pickled objects.
_NO_ARRAYS = (ValueError, EOFError, KeyError, zipfile.BadZipFile)


@runtime_checkable
class Extractor(Protocol):
    """Loads a function that computes features of images.

    Attributes:
      num_features: F.
      distance: name of the Fréchet distance between such features.
      knows_labels: whether its classes are the labels of the run's dataset.
    """

    num_features: int
    distance: str
    knows_labels: bool

    def name(self, context: Context) -> str:
        """Returns the name of these features: only statistics of the same features are compared."""

    def check(self, context: Context) -> None:
        """Checks, within seconds, that it can be loaded; raises ValueError or ImportError if not."""

    def load(self, context: Context) -> Function:
        """Returns the function; every process calls it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InceptionFeatures:
    """Loads the Inception network that defines FID, torch-fidelity's port of TensorFlow's of 2015: the 2048 features
    after the last pooling, and the logits without biases, which define the Inception Score. It resizes images itself;
    greyscale images get three equal channels. It runs on the run's GPU, or else on the CPU.

    Attributes:
      weights_path: file of its weights, as torch-fidelity publishes them; None: downloaded at first use, to torch.hub's
        directory.
    """

    weights_path: str | None = None

    num_features: ClassVar[int] = 2048
    distance: ClassVar[str] = "fid"
    knows_labels: ClassVar[bool] = False

    def name(self, context: Context) -> str:
        """See `Extractor`."""
        del context
        return "inception"

    def check(self, context: Context) -> None:
        """See `Extractor`."""
        self.load(context)

    def load(self, context: Context) -> Function:
        """See `Extractor`."""
        inception = torch_fidelity().feature_extractor_inceptionv3
        remedy = f"download {inception.URL_INCEPTION_V3} and set InceptionFeatures.weights_path to the file"
        if self.weights_path is None:
            # As torch-fidelity does, which would unpickle the file.
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
                raise ValueError(f"{where} is not available ({error}): {remedy}") from error
            except _NO_WEIGHTS as error:
                raise ValueError(f"{where} is not a file of weights: {remedy}") from error

        context.loop.runtime.on_first(read)  # one process downloads for all that share the directory
        if not weights:
            read()
        # torch-fidelity unpickles a file of weights: it gets one that is written here.
        copy = io.BytesIO()
        torch.save(weights, copy)
        copy.seek(0)
        try:
            network = inception.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=copy
            )
        except _NO_WEIGHTS as error:
            raise ValueError(f"{where} has weights of another network than Inception: {remedy}") from error
        device = context.loop.runtime.device if context.loop.runtime.device.type == "cuda" else torch.device("cpu")
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
    """Trains or loads a classifier with one hidden layer, whose activations are the features: for small images, which
    are unlike those that Inception was trained on, and for machines without its weights.

    It learns the labels of the run's training split from pixels, once, and is kept beside the dataset, in a file for
    each choice of settings. Metrics are comparable only if they come from the same file.

    Attributes:
      hidden_dim: F.
      max_epochs: largest number of epochs; training ends before if the loss stops falling.
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
        return self.pp or f"decode(channels={context.model.image_shape[-1]}) | keep('image', 'label')"

    def name(self, context: Context) -> str:
        """See `Extractor`."""
        data = context.data
        settings = data.identity(), data.train_split, self._pp(context)
        settings += context.model.image_shape, self.hidden_dim, self.max_epochs
        return f"classifier_{hashlib.sha256(repr(settings).encode()).hexdigest()[:12]}"

    def _path(self, context: Context) -> UPath:
        return UPath(self.path or UPath(context.data.directory()) / f"{self.name(context)}.npz")

    def check(self, context: Context) -> None:
        """See `Extractor`."""
        data, pp, shape = context.data, self._pp(context), tuple(context.model.image_shape)
        remedy = f"bind ClassifierFeatures.pp to leave an image {list(shape)} and an integer label"
        try:
            batch = next(context.batches(split=data.train_split, pp=pp))
        except ValueError as error:
            raise ValueError(f"ClassifierFeatures cannot learn from {data.name!r} ({error}): {remedy}") from error
        found = {name: f"{array.dtype} {list(array.shape[1:])}" for name, array in batch.items() if name[0] != "_"}
        if found.get("image") != f"uint8 {list(shape)}" or found.get("label") not in ("int32 []", "int64 []"):
            found = ", ".join(f"{name} {what}" for name, what in found.items())
            raise ValueError(
                f"ClassifierFeatures cannot learn from {data.name!r}, of which {pp!r} leaves {found}: {remedy}"
            )

    def load(self, context: Context) -> Function:
        """See `Extractor`."""
        prepare(context.data, context.loop.runtime)

        def read() -> dict[str, np.ndarray]:
            path = self._path(context)
            if not path.exists():
                write_arrays(path, self._train(context) | {"name": np.array(self.name(context))})
            names = ("name", "hidden_weights", "hidden_biases", "logit_weights", "logit_biases")
            found = read_arrays(path, names, f"not a classifier of {type(self).__name__}: delete it to train one")
            if str(found.pop("name")) != self.name(context):
                raise ValueError(f"{path} is a classifier for other data or with other settings: use another file")
            return {name: array.astype(np.float64) for name, array in found.items()}

        layers = context.loop.runtime.on_first(read)  # hosts need not share files

        def extract(images: np.ndarray) -> dict[str, np.ndarray]:
            # In float64, so that the float32 results do not depend on the batch size.
            hidden = np.maximum(_pixels(images) @ layers["hidden_weights"] + layers["hidden_biases"], 0)
            logits = hidden @ layers["logit_weights"] + layers["logit_biases"]
            return {"features": hidden.astype(np.float32), "logits": logits.astype(np.float32)}

        return extract

    def _train(self, context: Context) -> dict[str, np.ndarray]:
        """Trains the classifier; returns the weights `[I, O]` and biases `[O]` of its layers."""
        from sklearn.exceptions import ConvergenceWarning  # slow to import, and only training needs it
        from sklearn.neural_network import MLPClassifier

        data = context.data
        batches = data.eval_batches(batch_size=256, split=data.train_split, pp=self._pp(context))
        parts = [(batch["image"][batch["_mask"]], batch["label"][batch["_mask"]]) for batch in batches]
        images, labels = map(np.concatenate, zip(*parts, strict=True))
        classes = np.unique(labels)
        if len(classes) < 2 or not np.array_equal(classes, np.arange(len(classes))):
            raise ValueError(
                f"the labels in split {data.train_split!r} of {data.name!r} are {_shortened(classes.tolist())}: "
                "ClassifierFeatures needs the classes 0, 1, …, each with an example"
            )
        logging.info("Training %s on %d images of %s", self, len(images), data.name)
        classifier = MLPClassifier((self.hidden_dim,), max_iter=self.max_epochs, random_state=0)
        with warnings.catch_warnings():  # that max_epochs ended the training
            warnings.simplefilter("ignore", ConvergenceWarning)
            classifier.fit(_pixels(images).astype(np.float32), labels)
        (hidden_weights, weights), (hidden_biases, biases) = classifier.coefs_, classifier.intercepts_
        if len(classes) == 2:  # then scikit-learn has one logit, of the second class against the first
            weights, biases = (np.concatenate((np.zeros_like(x), x), axis=-1) for x in (weights, biases))
        return {
            "hidden_weights": hidden_weights,
            "hidden_biases": hidden_biases,
            "logit_weights": weights,
            "logit_biases": biases,
        }


def _pixels(images: np.ndarray) -> np.ndarray:
    """Returns images uint8 `[B, H, W, C]` as float64 `[B, H · W · C]` in [0, 1]."""
    return images.reshape(len(images), math.prod(images.shape[1:])) / 255


def _shortened(values: list) -> str:
    return ", ".join(map(str, values[:5])) + (", …" if len(values) > 5 else "")


def torch_fidelity() -> ModuleType:
    """Imports the package torch_fidelity, which is an extra.

    Raises:
      ImportError: if it is not installed, or cannot be imported.
    """
    try:
        import torch_fidelity
    except ImportError as error:
        raise ImportError(f"the metrics of Fid need torch-fidelity: pip install -e '.[fid]' ({error})") from error
    except RuntimeError as error:  # torchvision's operators do not load
        raise ImportError(
            f"torchvision {importlib.metadata.version('torchvision')} does not fit torch {torch.__version__}: install "
            f"both from one index, as pip install torch torchvision --index-url=… does ({error})"
        ) from error
    return torch_fidelity


def read_arrays(path: UPath, names: tuple[str, ...], otherwise: str, also: tuple[str, ...] = ()) -> dict:
    """Returns arrays of an .npz file by name. Nothing is unpickled, and other arrays are not read.

    Args:
      path: of the file.
      names: of arrays that it must have.
      otherwise: ends the message if it has not: what the file is not, and what to do.
      also: of arrays that it may have.

    Raises:
      ValueError: if it cannot be read, or lacks one of the arrays.
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
    """Writes an .npz file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, arrays_to_bytes(arrays))

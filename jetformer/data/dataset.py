"""The data of an experiment: one dataset, or a mixture.

TensorFlow, which reads it, is imported when it is first used: it takes seconds and half a gigabyte, and benchmarks and
sampling do not need it.
"""

import dataclasses
import hashlib
import inspect
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from jetformer.data import pp_string
from jetformer.data.selection import resolve_classes
from jetformer.ranges import NonNegativeInt, PositiveFloat, PositiveInt

if TYPE_CHECKING:
    from jetformer.data.mixture import MixtureReader
    from jetformer.data.reader import Reader
    from jetformer.data.sources import Source
    from jetformer.data.texts import Texts


class _Dataset:
    """What one dataset and a mixture have in common.

    Attributes:
      train_split, eval_split: splits to train and to evaluate on.
    """

    train_split: str
    eval_split: str

    def train_batches(self, *, process_count: int = 1, **kwargs) -> Iterator[dict[str, np.ndarray]]:
        """See `pipeline.train_batches`. A single process prepares the data if that has not been done."""
        from jetformer.data import pipeline

        if process_count == 1:
            self._prepare()
        return pipeline.train_batches(self.train_reader(), process_count=process_count, **kwargs)

    def eval_batches(
        self, *, split: str | None = None, pp: str | None = None, process_count: int = 1, **kwargs
    ) -> Iterator[dict[str, np.ndarray]]:
        """See `pipeline.eval_batches` and `reader`. A single process prepares the data if that has not been done."""
        from jetformer.data import pipeline

        if process_count == 1:
            self._prepare()
        return pipeline.eval_batches(self.reader(split, pp), process_count=process_count, **kwargs)

    def examples(self, split: str, count: int) -> list[dict[str, Any]]:
        """Returns the first examples of a split as the dataset has them; see `reader.Reader.examples`."""
        self._prepare()
        return self.reader(split).examples(count)

    def texts(self, model: str | None = None) -> "Texts":
        """Returns how texts are tokenized; see `texts.Texts`."""
        from jetformer.data.texts import Texts

        return Texts(self._pp_eval(), model)

    def has_texts(self) -> bool:
        """Returns whether texts are tokenized; if not, they are class labels."""
        return pp_string.tokenizer_of(self._pp_eval()) is not None

    def text_length(self) -> int:
        """Returns T, the tokens of a text; see `pp_string.text_length_of`."""
        return pp_string.text_length_of(self._pp_eval())

    def background(self) -> tuple[int, int, int]:
        """Returns the RGB background of transparent pixels; see `pp_string.background_of`."""
        return pp_string.background_of(self._pp_eval())


@dataclasses.dataclass(frozen=True)
class Data(_Dataset):
    """The dataset that an experiment is trained and evaluated on. docs/data.md has examples.

    Attributes:
      name: a TFDS dataset, e.g. `cifar10` or `imagenet_resized/64x64`; `folder:/path` for a folder of images
        `train/class/*`, see `data.folder`; `huggingface:owner/name`, see `data.huggingface`; or
        `webdataset:/path/{000..099}.tar`, see `data.webdataset`.
      pp: preprocessing string of training, see `jetformer.data.preprocess`.
      pp_eval: that of evaluation; None is `pp`.
      train_split: TFDS split to train on.
      eval_split: TFDS split to evaluate on.
      shuffle_buffer_size: how many encoded examples each stream (see `pipeline.num_streams`) shuffles at a time. A
        folder is shuffled as a whole.
      data_dir: where TFDS keeps prepared data, and where indices of folders are kept; None is TFDS's default,
        `~/tensorflow_datasets`.
      classes: which classes to read, e.g. ("cat", 7, "10:20"): names, labels, and ranges of labels. Their labels become
        0, 1, … in this order. None: all, with their own labels. (All records are read for it, but no other image is
        decoded.)
      max_examples: at most so many examples of a split, the first of these classes; None: all.
      skip_broken: skip examples that cannot be preprocessed, such as corrupt images, or whose shape differs from that
        of most. They are searched for once, which takes as long as reading an epoch, and the result is kept. (Greyscale
        and CMYK images are not broken: they become RGB.)
    """

    name: str
    pp: str
    pp_eval: str | None = None
    train_split: str = "train"
    eval_split: str = "validation"
    shuffle_buffer_size: PositiveInt = 4096
    data_dir: str | None = None
    classes: tuple[NonNegativeInt | str, ...] | NonNegativeInt | str | None = None
    max_examples: PositiveInt | None = None
    skip_broken: bool = False

    def __post_init__(self):
        if self.classes is not None:
            one = isinstance(self.classes, (str, int))
            object.__setattr__(self, "classes", (self.classes,) if one else tuple(self.classes))

    def train_reader(self) -> "Reader":
        """Returns what reads the training split. The data must be prepared."""
        return self.reader(self.train_split, self.pp)

    def reader(
        self, split: str | None = None, pp: str | None = None, labels: tuple[int, ...] | None = None
    ) -> "Reader":
        """Returns what reads the examples of a split for evaluation. The data must be prepared.

        Args:
          split: TFDS split, e.g. `train[10000:]` or `train+validation`; None: `eval_split`.
          pp: preprocessing string; None: that of evaluation.
          labels: new values of the labels 0, 1, … (a mixture renumbers them); None: unchanged.
        """
        from jetformer.data.reader import Reader

        return Reader(self, split or self.eval_split, self._pp_eval() if pp is None else pp, labels)

    def _prepare(self) -> None:
        from jetformer.data import sources

        sources.prepare(self.name, self.data_dir)

    def prepare(self) -> None:
        """Prepares the dataset if that has not been done, see `sources.prepare`, and checks that both splits exist."""
        self._prepare()
        self.num_train_examples()
        self.num_examples()

    def num_train_examples(self) -> int:
        """Returns the number of examples of an epoch of training."""
        return self.train_reader().num_examples

    def num_examples(self, split: str | None = None) -> int:
        """Returns the number of examples of a split; None is `eval_split`."""
        return self.reader(split).num_examples

    def class_names(self) -> tuple[str, ...] | None:
        """Returns the names of the classes by label; None if the dataset has no label, or its classes no names."""
        names = self._source().class_names
        if self.classes is None:
            return names
        return tuple(names[label] for label in resolve_classes(self.classes, names, self.name))

    def identity(self) -> str:
        """Returns a string that changes if the examples of a split may change."""
        full_name = self._source().full_name
        chosen = (self.classes, self.max_examples, self.skip_broken)
        return full_name if chosen == (None, None, False) else f"{full_name} {chosen}"

    def directory(self) -> str:
        """Returns a directory for files that belong to the dataset."""
        return str(self._source().directory)

    def _source(self) -> "Source":
        from jetformer.data import sources

        return sources.open_source(self.name, self.data_dir)

    def _pp_eval(self) -> str:
        return self.pp if self.pp_eval is None else self.pp_eval


@dataclasses.dataclass(frozen=True)
class MixtureData(_Dataset):
    """Several datasets, mixed. In gin, each is bound in a scope of its own:

        train.data = @MixtureData()
        MixtureData.datasets = (@photos/Data(), @drawings/Data())
        MixtureData.weights = (3, 1)
        photos/Data.name = "cifar10"
        drawings/Data.name = "folder:/data/drawings"

    Each keeps its own splits, preprocessing, classes and texts; all must have the same keys, in the same shapes.
    Training draws from them by weight, evaluation reads them one after the other. Batches are a function of (seed,
    step), as those of one dataset.

    Attributes:
      datasets: the datasets to mix.
      weights: how often training takes an example of each, relative to each other; None: by their numbers of examples.
      labels: how labels are numbered: "by_name", classes of the same name become one; "apart", each dataset has classes
        of its own; or "as_they_are", labels are unchanged. Numbers start at 0, with those of the first dataset.
    """

    datasets: tuple[Data, ...]
    weights: tuple[PositiveFloat, ...] | None = None
    labels: str = "by_name"

    # As splits of a mixture, these two stand for each dataset's own. Any other split is one of all datasets.
    train_split = "train_split"
    eval_split = "eval_split"

    def __post_init__(self):
        datasets = tuple(self.datasets)
        object.__setattr__(self, "datasets", datasets)
        if not datasets:
            raise ValueError("MixtureData.datasets is empty: set it to (@a/Data(), @b/Data())")
        for data in datasets:
            if inspect.isclass(data) or not isinstance(data, Data):
                raise ValueError(f"MixtureData.datasets has {data!r}: write @scope/Data(), with parentheses")
        if self.labels not in ("by_name", "apart", "as_they_are"):
            raise ValueError(f'MixtureData.labels = {self.labels!r}: use "by_name", "apart" or "as_they_are"')
        if self.weights is not None:
            weights = tuple(self.weights)
            object.__setattr__(self, "weights", weights)
            if len(weights) != len(datasets):
                raise ValueError(f"MixtureData.weights has {len(weights)} numbers for {len(datasets)} datasets")
            for weight, data in zip(weights, datasets, strict=True):
                if not (weight > 0 and math.isfinite(weight)):
                    raise ValueError(
                        f"MixtureData.weights: {data.name!r} has the weight {weight}: use a positive number, or remove "
                        "the dataset from MixtureData.datasets"
                    )
        lengths = {data.name: pp_string.text_length_of(data.pp) for data in datasets if _makes_texts(data.pp)}
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{name!r} {length}" for name, length in lengths.items())
            raise ValueError(f"MixtureData: texts have different lengths: {listed} tokens. Use one in all Data.pp")

    @property
    def name(self) -> str:
        """The names of all datasets."""
        return " + ".join(data.name for data in self.datasets)

    @property
    def pp(self) -> str:
        """The first dataset's: all make the same keys."""
        return self.datasets[0].pp

    def train_reader(self) -> "Reader | MixtureReader":
        """See `Data.train_reader`."""
        return self._reader([(data.train_split, data.pp) for data in self.datasets])

    def reader(self, split: str | None = None, pp: str | None = None) -> "Reader | MixtureReader":
        """See `Data.reader`."""
        return self._reader([(self._own(data, split), pp) for data in self.datasets])

    def _reader(self, chosen: list[tuple[str | None, str | None]]) -> "Reader | MixtureReader":
        """Returns what reads a split, with a preprocessing string, of each dataset."""
        from jetformer.data.mixture import MixtureReader

        triples = zip(self.datasets, chosen, self._labels(), strict=True)
        readers = [data.reader(split, pp, labels) for data, (split, pp), labels in triples]
        return MixtureReader(readers, self.weights) if len(readers) > 1 else readers[0]

    def _prepare(self) -> None:
        for data in self.datasets:
            data._prepare()

    def prepare(self) -> None:
        """See `Data.prepare`."""
        for data in self.datasets:
            data.prepare()

    def num_train_examples(self) -> int:
        """Returns the number of examples of an epoch: of all training splits together."""
        return sum(data.num_train_examples() for data in self.datasets)

    def num_examples(self, split: str | None = None) -> int:
        """Returns the number of examples of a split of all datasets together; None is `eval_split`."""
        return sum(data.num_examples(self._own(data, split)) for data in self.datasets)

    def _own(self, data: Data, split: str | None) -> str | None:
        """Returns the split of a dataset that a split of the mixture stands for."""
        return {self.train_split: data.train_split, self.eval_split: data.eval_split}.get(split, split)

    def _labels(self) -> list[tuple[int, ...] | None]:
        """Returns for each dataset what its labels become; None: unchanged."""
        if self.labels == "as_they_are":
            return [None] * len(self.datasets)
        numbers: dict[tuple[int | None, str], int] = {}
        tables: list[tuple[int, ...] | None] = []
        for i, data in enumerate(self.datasets):
            names = data.class_names()
            owner = i if self.labels == "apart" else None
            keys = [(owner, name) for name in names or ()]
            tables.append(tuple(numbers.setdefault(key, len(numbers)) for key in keys) if names else None)
        return tables

    def class_names(self) -> tuple[str, ...] | None:
        """Returns the names of the classes by label; None if there are none."""
        names: dict[int, str] = {}
        for data, table in zip(self.datasets, self._labels(), strict=True):
            own = data.class_names() or ()
            for label, name in zip(table or range(len(own)), own, strict=False):
                names.setdefault(label, name)
        return tuple(names[label] for label in sorted(names)) or None

    def identity(self) -> str:
        """See `Data.identity`."""
        return f"{[data.identity() for data in self.datasets]} {self.labels}"

    def directory(self) -> str:
        """Returns a directory for files that belong to the mixture, in that of the first dataset."""
        mixed = hashlib.sha256(self.identity().encode()).hexdigest()[:16]
        return f"{self.datasets[0].directory()}/mixture-{mixed}"

    def _pp_eval(self) -> str:
        return self.datasets[0]._pp_eval()


def _makes_texts(pp: str) -> bool:
    try:
        pp_string.text_length_of(pp)
    except ValueError:
        return False
    return True

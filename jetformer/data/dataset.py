"""What an experiment says of its data.

TensorFlow, which reads them, is imported when they are first used: it takes seconds and half a gigabyte, and a
benchmark or a sampler does without.
"""

import dataclasses
import hashlib
import inspect
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jetformer.data import pp_string
from jetformer.ranges import NonNegativeInt, PositiveFloat, PositiveInt

if TYPE_CHECKING:
    from jetformer.data.pipeline import Selection
    from jetformer.data.texts import Texts


class _Texts:
    """What is known of texts from the preprocessing string of evaluation."""

    def _pp_eval(self) -> str:
        raise NotImplementedError

    def texts(self, model: str | None = None) -> "Texts":
        """How the experiment's texts are tokenized; see `texts.Texts`."""
        from jetformer.data.texts import Texts

        return Texts(self._pp_eval(), model)

    def has_texts(self) -> bool:
        """Whether the experiment's texts are tokenized; if not, they are class labels."""
        return pp_string.tokenizer_of(self._pp_eval()) is not None

    def text_length(self) -> int:
        """T, how many tokens the experiment's texts have; see `pp_string.text_length_of`."""
        return pp_string.text_length_of(self._pp_eval())

    def background(self) -> tuple[int, int, int]:
        """RGB of what is behind transparent pixels of the experiment's images; see `pp_string.background_of`."""
        return pp_string.background_of(self._pp_eval())


@dataclasses.dataclass(frozen=True)
class Data(_Texts):
    """What an experiment trains and is evaluated on.

    Attributes:
      name: a TFDS data set, as `cifar10` or `imagenet_resized/64x64`; `folder:/path` for a folder of images
        `train/class/*`, see `data.folder`; or `huggingface:owner/name`, see `data.huggingface`.
      pp: preprocessing string of training, see `jetformer.data.preprocess`.
      pp_eval: of evaluation; None is `pp`.
      train_split: TFDS split to train on.
      eval_split: TFDS split to evaluate on.
      shuffle_buffer_size: how many encoded examples each stream (see `pipeline.num_streams`) shuffles at a time. A
        folder is shuffled as a whole.
      data_dir: where TFDS keeps prepared data, and indices of folders are kept; None is TFDS's default,
        `~/tensorflow_datasets`.
      classes: which classes to read, as ("cat", 7, "10:20"): names, numbers, and ranges of numbers. Their labels become
        0, 1, … in this order. None: all, as they are. (All records are read for it, but no other image is decoded.)
      max_examples: how many examples of a split to read at most, the first of these classes; None: all.
      skip_broken: leave out examples that cannot be preprocessed, as corrupt images, or that get another shape than
        most. They are looked for once, which takes as long as an epoch of reading, and what was found is kept. (Grey
        and CMYK images are none of these: they become RGB.)
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

    def selection(self, split: str | None = None, pp: str | None = None) -> "Selection":
        """What is read of a split (None: of `eval_split`), preprocessed for evaluation unless `pp` says how."""
        from jetformer.data.pipeline import Selection

        return Selection(
            name=self.name,
            split=split or self.eval_split,
            pp=self._pp_eval() if pp is None else pp,
            data_dir=self.data_dir,
            classes=self.classes,
            max_examples=self.max_examples,
            skip_broken=self.skip_broken,
        )

    def prepare(self) -> None:
        """Prepares the data set where that has not been done, and looks that both splits exist; see
        `pipeline.prepare`."""
        from jetformer.data import pipeline

        pipeline.prepare(self.name, self.data_dir)
        self.num_train_examples()
        self.num_examples()

    def num_train_examples(self) -> int:
        """How many examples an epoch of training has."""
        return self.num_examples(self.train_split, self.pp)

    def num_examples(self, split: str | None = None, pp: str | None = None) -> int:
        """How many examples a split has; see `selection`."""
        from jetformer.data import pipeline

        return pipeline.num_selected(self.selection(split, pp))

    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes by label; None where there are none."""
        from jetformer.data import pipeline

        return pipeline.class_names(self.name, self.data_dir, self.classes)

    def identity(self) -> str:
        """Names the examples of a split: another string where they may be others."""
        from jetformer.data import sources

        full_name = sources.open_source(self.name, self.data_dir).full_name
        chosen = (self.classes, self.max_examples, self.skip_broken)
        return full_name if chosen == (None, None, False) else f"{full_name} {chosen}"

    def directory(self) -> str:
        """Where files that belong to the prepared data set may be kept."""
        from jetformer.data import sources

        return str(sources.open_source(self.name, self.data_dir).directory)

    def train_batches(self, **kwargs) -> Iterator[dict[str, np.ndarray]]:
        """See `pipeline.mixture_batches`."""
        from jetformer.data import pipeline

        selection = self.selection(self.train_split, self.pp)
        sizes = [self.shuffle_buffer_size]
        return pipeline.mixture_batches([selection], [1.0], shuffle_buffer_sizes=sizes, **kwargs)

    def eval_batches(
        self, *, split: str | None = None, pp: str | None = None, **kwargs
    ) -> Iterator[dict[str, np.ndarray]]:
        """Of `eval_split` and preprocessed for evaluation, unless another split or string is given; see
        `pipeline.batches_in_order`."""
        from jetformer.data import pipeline

        return pipeline.batches_in_order([self.selection(split, pp)], **kwargs)

    def examples(self, split: str, count: int) -> list[dict[str, Any]]:
        """The first examples of a split as the dataset has them; see `pipeline.selected_examples`."""
        from jetformer.data import pipeline

        return pipeline.selected_examples(self.selection(split), count)

    def _pp_eval(self) -> str:
        return self.pp if self.pp_eval is None else self.pp_eval


@dataclasses.dataclass(frozen=True)
class MixtureData(_Texts):
    """Several datasets, mixed. In gin, each is bound in a scope of its own:

        train.data = @MixtureData()
        MixtureData.datasets = (@photos/Data(), @drawings/Data())
        MixtureData.weights = (3, 1)
        photos/Data.name = "cifar10"
        drawings/Data.name = "folder:/data/drawings"

    Each keeps its own splits, preprocessing, classes and texts; they have to give the same keys, in the same shapes.
    Training draws from them by weights, evaluation reads them one after the other. Batches are a function of (seed,
    step), as those of one dataset.

    Attributes:
      datasets: what is mixed.
      weights: how often training takes an example of each, relative to each other; None: as often as it has examples.
      labels: what a label stands for: "by_name", classes that have the same name are one; "apart", each dataset has its
        own; or "as_they_are", numbers stay. Labels count from 0, those of the first dataset first.
    """

    datasets: tuple[Data, ...]
    weights: tuple[PositiveFloat, ...] | None = None
    labels: str = "by_name"

    # Splits of a mixture: those that each dataset names so. Any other is one of all datasets.
    train_split = "train_split"
    eval_split = "eval_split"

    def __post_init__(self):
        datasets = tuple(self.datasets)
        object.__setattr__(self, "datasets", datasets)
        if not datasets:
            raise ValueError("MixtureData.datasets is empty: give (@a/Data(), @b/Data())")
        for data in datasets:
            if inspect.isclass(data) or not isinstance(data, Data):
                raise ValueError(f"MixtureData.datasets has {data!r}: write @scope/Data(), with parentheses")
        if self.labels not in ("by_name", "apart", "as_they_are"):
            raise ValueError(f'MixtureData.labels = {self.labels!r}: give "by_name", "apart" or "as_they_are"')
        if self.weights is not None:
            weights = tuple(self.weights)
            object.__setattr__(self, "weights", weights)
            if len(weights) != len(datasets):
                raise ValueError(f"MixtureData.weights has {len(weights)} numbers for {len(datasets)} datasets")
            for weight, data in zip(weights, datasets, strict=True):
                if not (weight > 0 and math.isfinite(weight)):
                    raise ValueError(
                        f"MixtureData.weights: {data.name!r} has the weight {weight}: give more than 0, or take it out "
                        "of MixtureData.datasets"
                    )
        lengths = {data.name: pp_string.text_length_of(data.pp) for data in datasets if _makes_texts(data.pp)}
        if len(set(lengths.values())) > 1:
            says = ", ".join(f"{name!r} {length}" for name, length in lengths.items())
            raise ValueError(f"MixtureData: texts have different lengths: {says} tokens. Give all Data.pp the same")

    @property
    def name(self) -> str:
        """The names of all."""
        return " + ".join(data.name for data in self.datasets)

    @property
    def pp(self) -> str:
        """The first dataset's: all give the same."""
        return self.datasets[0].pp

    def selections(self, split: str | None = None, pp: str | None = None) -> list["Selection"]:
        """What is read of each dataset; see `Data.selection`."""
        split = split or self.eval_split
        own = [
            data.train_split if split == self.train_split else data.eval_split if split == self.eval_split else split
            for data in self.datasets
        ]
        return self._relabelled([data.selection(name, pp) for data, name in zip(self.datasets, own, strict=True)])

    def _relabelled(self, selections: Sequence["Selection"]) -> list["Selection"]:
        tables = self._labels()
        return [dataclasses.replace(s, labels=table) for s, table in zip(selections, tables, strict=True)]

    def prepare(self) -> None:
        """See `Data.prepare`."""
        for data in self.datasets:
            data.prepare()

    def _prepare_alone(self, kwargs: dict[str, Any]) -> None:
        """Prepares what is to be read where no other process could do it."""
        from jetformer.data import pipeline

        if kwargs.get("process_count", 1) == 1:
            for data in self.datasets:
                pipeline.prepare(data.name, data.data_dir)

    def num_train_examples(self) -> int:
        """How many examples the training splits have together: so many are an epoch."""
        return sum(data.num_train_examples() for data in self.datasets)

    def num_examples(self, split: str | None = None, pp: str | None = None) -> int:
        """How many examples the splits have together."""
        from jetformer.data import pipeline

        return sum(pipeline.num_selected(selection) for selection in self.selections(split, pp))

    def _labels(self) -> list[tuple[int, ...] | None]:
        """Of each dataset, what its labels become; None: they stay."""
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
        """The names of the classes by label; None where there are none."""
        names: dict[int, str] = {}
        for data, table in zip(self.datasets, self._labels(), strict=True):
            of_one = data.class_names() or ()
            for label, name in zip(table or range(len(of_one)), of_one, strict=False):
                names.setdefault(label, name)
        return tuple(names[label] for label in sorted(names)) or None

    def identity(self) -> str:
        """See `Data.identity`."""
        return f"{[data.identity() for data in self.datasets]} {self.labels}"

    def directory(self) -> str:
        """Beside the first dataset."""
        mixed = hashlib.sha256(self.identity().encode()).hexdigest()[:16]
        return f"{self.datasets[0].directory()}/mixture-{mixed}"

    def train_batches(self, **kwargs) -> Iterator[dict[str, np.ndarray]]:
        """See `pipeline.mixture_batches`."""
        from jetformer.data import pipeline

        self._prepare_alone(kwargs)
        weights = self.weights or [data.num_train_examples() for data in self.datasets]
        selections = self._relabelled([data.selection(data.train_split, data.pp) for data in self.datasets])
        sizes = [data.shuffle_buffer_size for data in self.datasets]
        return pipeline.mixture_batches(selections, weights, shuffle_buffer_sizes=sizes, **kwargs)

    def eval_batches(
        self, *, split: str | None = None, pp: str | None = None, **kwargs
    ) -> Iterator[dict[str, np.ndarray]]:
        """One dataset after the other; see `Data.eval_batches`."""
        from jetformer.data import pipeline

        self._prepare_alone(kwargs)
        return pipeline.batches_in_order(self.selections(split, pp), **kwargs)

    def examples(self, split: str, count: int) -> list[dict[str, Any]]:
        """The first examples, of one dataset after the other; see `Data.examples`."""
        from jetformer.data import pipeline

        found: list[dict[str, Any]] = []
        for selection in self.selections(split):
            found += pipeline.selected_examples(selection, count - len(found))
        return found

    def _pp_eval(self) -> str:
        return self.datasets[0]._pp_eval()


def _makes_texts(pp: str) -> bool:
    try:
        pp_string.text_length_of(pp)
    except ValueError:
        return False
    return True

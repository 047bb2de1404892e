"""What an experiment says of its data.

TensorFlow, which reads them, is imported when they are first used: it takes seconds and half a gigabyte, and a
benchmark or a sampler does without.
"""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from jetformer.data import pp_string

if TYPE_CHECKING:
    from jetformer.data.texts import Texts


@dataclasses.dataclass(frozen=True)
class Data:
    """What an experiment trains and is evaluated on.

    Attributes:
      name: TFDS data set, see `pipeline.train_batches`.
      pp: preprocessing string of training, see `jetformer.data.preprocess`.
      pp_eval: of evaluation; None is `pp`.
      train_split: TFDS split to train on.
      eval_split: TFDS split to evaluate on.
      shuffle_buffer_size: how many encoded examples each stream (see `pipeline.num_streams`) shuffles at a time.
      data_dir: where TFDS keeps prepared data; None is its default, `~/tensorflow_datasets`.
    """

    name: str
    pp: str
    pp_eval: str | None = None
    train_split: str = "train"
    eval_split: str = "validation"
    shuffle_buffer_size: int = 4096
    data_dir: str | None = None

    def prepare(self) -> None:
        """Prepares the data set where that has not been done, and looks that both splits exist; see
        `pipeline.prepare`."""
        from jetformer.data import pipeline

        pipeline.prepare(self.name, self.data_dir)
        for split in (self.train_split, self.eval_split):
            pipeline.num_examples(self.name, split, self.data_dir)

    def num_train_examples(self) -> int:
        """How many examples an epoch of training has; see `pipeline.num_examples`."""
        from jetformer.data import pipeline

        return pipeline.num_examples(self.name, self.train_split, self.data_dir)

    def train_batches(self, **kwargs) -> Iterator[dict[str, np.ndarray]]:
        """See `pipeline.train_batches`."""
        from jetformer.data import pipeline

        return pipeline.train_batches(
            self.name,
            self.train_split,
            self.pp,
            shuffle_buffer_size=self.shuffle_buffer_size,
            data_dir=self.data_dir,
            **kwargs,
        )

    def eval_batches(
        self, *, split: str | None = None, pp: str | None = None, **kwargs
    ) -> Iterator[dict[str, np.ndarray]]:
        """Of `eval_split` and preprocessed for evaluation, unless another split or string is given; see
        `pipeline.eval_batches`."""
        from jetformer.data import pipeline

        return pipeline.eval_batches(
            self.name, split or self.eval_split, pp or self._pp_eval(), data_dir=self.data_dir, **kwargs
        )

    def examples(self, split: str, count: int) -> list[dict[str, Any]]:
        """The first examples of a split as the dataset has them; see `pipeline.examples`."""
        from jetformer.data import pipeline

        return pipeline.examples(self.name, split, count, data_dir=self.data_dir)

    def _pp_eval(self) -> str:
        return self.pp if self.pp_eval is None else self.pp_eval

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

"""What an evaluator is given: a model at a step, on its devices, and the data."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from upath import UPath

from jetformer.data.dataset import Data
from jetformer.loops.base import Function, Loop, Rows, Runner
from jetformer.runtime import Runtime, derive_seed

_prepared: set[Data] = set()  # in this process


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What an evaluator is given.

    Attributes:
      runner: the model, as the loop has placed it.
      ema: moving average of the parameters by name; None for none.
      data: the run's dataset.
      objective: the run's, see `jetformer.objectives`.
      seed: the run's.
      batch_size: examples a step of evaluation, over all processes.
      step: the training step.
      loop: the loop that runs the model; `loop.runtime` has the devices and processes.
      directory: `<workdir>/eval_<name>`, for files of the evaluator's own.
      check_batch: raises a ValueError if a batch does not fit the model; it computes shapes only.
      each_batch: called after every batch of examples.
      class_names: by label; None: unknown.
      noise_min: standard deviation that the RGB noise of training ends with, in 8-bit pixel values.
    """

    runner: Runner
    ema: dict[str, Tensor] | None
    data: Data
    objective: Any
    seed: int
    batch_size: int
    step: int
    loop: Loop
    directory: UPath
    check_batch: Callable[[dict[str, np.ndarray]], None]
    each_batch: Callable[[], None] = lambda: None
    class_names: Sequence[str] | None = None
    noise_min: float = 0.0

    def denoising_std(self, wanted: bool) -> float:
        """Returns the standard deviation of the noise to remove from samples, in units of [-1, 1]; 0 if not wanted.

        Raises:
          ValueError: if the model was trained without noise.
        """
        return self.objective.denoising_std(self.noise_min) if wanted else 0.0

    @property
    def model(self) -> nn.Module:
        return self.runner.model

    def averaged(self) -> contextlib.AbstractContextManager:
        """Returns a context with the moving average in the place of the parameters, if there is one."""
        return self.loop.averaged(self.model, self.ema)

    def per_example(
        self,
        function: Function,
        batches: Iterator[dict[str, np.ndarray]],
        *,
        seed: int,
        averaged: bool = True,
        staged: bool = False,
        to_rows: Callable[[Rows], Rows] = lambda rows: rows,
    ) -> Rows:
        """Returns what a function returns for every example of `batches`, over all processes; see `Loop.per_example`.

        Args:
          function, batches, staged, to_rows: see `Loop.per_example`.
          seed: of the draws, together with the run's seed.
          averaged: with the moving average of the parameters, if there is one.
        """
        with self.averaged() if averaged else contextlib.nullcontext():
            return self.loop.per_example(
                self.runner,
                function,
                batches,
                seed=derive_seed(self.seed, seed),
                staged=staged,
                to_rows=to_rows,
                each_batch=self.each_batch,
            )

    def batches(
        self, data: Data | None = None, split: str | None = None, pp: str | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """Returns this process's part of all examples of a split, each once; reads the first batch to check it.

        Args:
          data: the dataset; None: the run's.
          split: TFDS split; None: the dataset's `eval_split`.
          pp: preprocessing string; None: the dataset's for evaluation.

        Raises:
          ValueError: if there is no such dataset or split, it has no examples, or they cannot be preprocessed.
        """
        from jetformer.data.pipeline import peek  # brings TensorFlow, which sampling does without

        data, runtime = self.data if data is None else data, self.loop.runtime
        prepare(data, runtime)
        batches = data.eval_batches(
            batch_size=self.batch_size,
            process_index=runtime.process_index,
            process_count=runtime.process_count,
            split=split,
            pp=pp,
        )
        _, batches = peek(batches, f"split {split or data.eval_split!r} of {data.name!r}")
        return batches

    def first_examples(self, count: int, names: tuple[str, ...], split: str | None = None) -> Rows:
        """Returns the first `count` examples of a split of the run's dataset, or all if it has fewer, on every process:
        arrays `[N, ...]` by name."""
        prepare(self.data, self.loop.runtime)
        parts, found = [], 0
        with contextlib.closing(self.data.eval_batches(batch_size=min(count, 64), split=split)) as batches:
            for batch in batches:
                parts.append({name: batch[name][batch["_mask"]] for name in names})
                found += int(batch["_mask"].sum())
                if found >= count:
                    break
        return {name: np.concatenate([part[name] for part in parts])[:count] for name in names}

    def batches_of(
        self, rows: Rows, batch_size: int | None = None, numbers: np.ndarray | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields this process's part of batches of examples that every process holds.

        Args:
          rows: arrays `[N, ...]` by name.
          batch_size: over all processes, rounded up to a multiple of the devices; None: that of evaluation.
          numbers: of the examples, int `[N]`, which their draws depend on; None: 0, 1, …
        """
        count, runtime = len(next(iter(rows.values()))), self.loop.runtime
        devices, processes = runtime.device_count, runtime.process_count
        size = min(batch_size or self.batch_size, count)
        local_size = -(-size // devices) * devices // processes
        for start in range(0, count, local_size * processes):
            first = start + runtime.process_index * local_size
            index = np.arange(first, first + local_size, dtype=np.int32)
            batch = {name: array[index.clip(max=count - 1)] for name, array in rows.items()}
            mask = index < count
            if numbers is not None:
                index = numbers[index.clip(max=count - 1)].astype(np.int32)
            yield batch | {"_mask": mask, "_index": index}


def prepare(data: Data, runtime: Runtime) -> None:
    """Prepares a dataset, once in this process; process 0 does so first, for all that share its storage.

    Raises:
      ValueError: on all processes, if it is not available.
    """
    if data not in _prepared:
        runtime.on_first(data.prepare)
        data.prepare()
        _prepared.add(data)

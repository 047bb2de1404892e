"""Draws samples on request, in batches, on one process or several.

`images` and `texts` hold the samplers. Dimensions: B batch, H × W × C image, T text tokens.
"""

import abc
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from jetformer import prng
from jetformer.runtime import Runtime


@dataclasses.dataclass(frozen=True)
class Request:
    """Requests one sample.

    Attributes:
      label: the class, prompt or image path, for people.
      text: int `[T]`, tokens of the prompt, or the class as one token; None for none.
      text_mask: bool `[T]`, valid tokens of `text`; None: all.
      image: uint8 `[H, W, C]`, the image to caption, complete or inpaint; None for none.
      mask: bool `[H, W]`, the pixels of the image to sample; None for none. See `images.inpainting_request`.
      seed: the sample depends on it and on what is given, not on the rest of its batch.
    """

    label: str
    text: np.ndarray | None = None
    text_mask: np.ndarray | None = None
    image: np.ndarray | None = None
    mask: np.ndarray | None = None
    seed: int = 0


def repeated(requests: Sequence[Request], count: int, seed: int) -> list[Request]:
    """Returns each request `count` times, with the seeds `seed`, `seed` + 1, …"""
    return [dataclasses.replace(request, seed=seed + i) for request in requests for i in range(count)]


class Sampler(abc.ABC):
    """Samples batches of requests of one kind from a model.

    Attributes:
      settings: the options that the samples depend on, by name.
      num_tokens: number of tokens of a sample, to report progress.
    """

    settings: dict[str, Any]
    num_tokens: int

    @abc.abstractmethod
    def __call__(
        self, model: nn.Module, batch: dict[str, Tensor], keys: Tensor, on_token: Callable[[], None]
    ) -> list[dict[str, Any]]:
        """Samples a batch.

        Args:
          model: in evaluation mode.
          batch: `text`, `text_mask`, `image` and `mask` of the requests, without those that are None.
          keys: int32 `[B, 2]`, made from the requests' seeds.
          on_token: called after each token of the batch.

        Returns:
          For each request `log_likelihood`, in nats, and: `bits_per_dim`, of a flow of noisy images
          `noisy_bits_per_dim`, and `image` uint8 `[H, W, C]`; or `text`, `bits_per_token`, and `image` if one was
          given.
        """


def draw(
    sampler: Sampler,
    requests: Sequence[Request],
    state,
    runtime: Runtime,
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> Iterator[list[tuple[Request, dict[str, Any]]]]:
    """Draws the requested samples; every process calls this and takes every n-th batch.

    Args:
      sampler: of the model in `state`.
      requests: all of one kind.
      state: a `State`, whose parameters are used as they are. Of several processes each holds the whole model.
      runtime: the processes.
      batch_size: number of samples at a time. A smaller batch is padded.
      progress: show a progress bar, on process 0.

    Yields:
      Requests and their samples, see `Sampler.__call__`, of one batch of each process, on all processes.
    """
    # The size does not depend on the number of processes, so that neither do samples.
    size = min(batch_size, len(requests)) or 1
    batches = [requests[first : first + size] for first in range(0, len(requests), size)]
    rounds = math.ceil(len(batches) / runtime.process_count)
    own = batches[runtime.process_index :: runtime.process_count]
    bar = tqdm(
        total=sum(map(len, own)) * sampler.num_tokens,
        unit="tokens",
        unit_scale=True,
        disable=not progress or not own or runtime.process_index > 0,
    )
    state.runner.eval()
    with state.loop.gathered(state.runner), state.loop.autocast(), bar:
        for batch in itertools.islice(itertools.chain(own, itertools.repeat([])), rounds):
            samples = []
            if batch:
                padded = [*batch, *[batch[-1]] * (size - len(batch))]  # all batches have one shape
                keys = torch.stack([prng.key(request.seed) for request in padded]).to(runtime.device)
                on_token = functools.partial(bar.update, len(batch))
                samples = state.runner(sampler, _stacked(padded, runtime.device), keys, on_token)
            yield from runtime.all_gather(list(zip(batch, samples, strict=False)))


def _stacked(requests: Sequence[Request], device: torch.device) -> dict[str, Tensor]:
    batch = {}
    for name in ("text", "text_mask", "image", "mask"):
        arrays = [getattr(request, name) for request in requests]
        if arrays[0] is not None:
            batch[name] = torch.from_numpy(np.stack(arrays)).to(device)
    return batch

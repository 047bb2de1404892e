"""Which device and how many processes: the one module that knows."""

import dataclasses
import hashlib
import os

import torch


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Where this process runs.

    Attributes:
      device: what the model lives on.
      process_index: which of the processes this one is.
      process_count: how many processes there are.
    """

    device: torch.device
    process_index: int = 0
    process_count: int = 1


def initialize(device: str) -> Runtime:
    """The runtime of this process on `device`: "cpu", "cuda", or "auto" for a GPU where there is one.

    Raises:
      ValueError: if there is no such device, or several processes were started.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("training runs in one process: start it with python, not with torchrun")
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ValueError(
            "--device=cuda, but torch sees no CUDA device: use --device=cpu, or install a CUDA build of torch"
        )
    if device == "auto":
        device = "cuda" if available else "cpu"
    return Runtime(torch.device(device))


def derive_seed(*parts: int) -> int:
    """A 63-bit seed that depends on the integers `parts`, their order and their number."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1

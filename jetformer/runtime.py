"""Which devices and how many processes: the one module that knows. It imports torch_xla, where that is wanted."""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from jetformer.errors import one_line

T = TypeVar("T")

# The only pair of versions that load against each other: torch_xla ended with this release.
XLA_VERSIONS = "torch==2.9.0 and torch_xla==2.9.0"

# How long a process waits for the others to come to the end of what they do together: after an error, and without.
_PATIENCE = datetime.timedelta(seconds=60)
_TIMEOUT = datetime.timedelta(minutes=30)  # as that of collectives

_KINDS = {kind.__name__: kind for kind in (ValueError, OSError, ImportError)}  # of errors that their message tells


class OutOfStep(RuntimeError):
    """Processes are at different places and cannot go on together. The message is one line."""


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Where this process runs.

    Attributes:
      device: what the model lives on; with "xla" it stands for all devices of all processes.
      process_index: which of the processes this one is.
      process_count: how many processes there are.
      device_count: how many devices they have together.
      store: where several processes leave messages for each other.
    """

    device: torch.device
    process_index: int = 0
    process_count: int = 1
    device_count: int = 1
    store: dist.Store | None = dataclasses.field(default=None, repr=False, compare=False)

    def agree_on(self, name: str, value: Any) -> None:
        """Compares a value between processes.

        Raises:
          ValueError: if it is not the same on all.
        """
        values = self.of_all(value)
        if any(other != values[0] for other in values):
            raise ValueError(f"{name} differs between processes: {values}; use a --workdir that all hosts share")

    def first_does(self, action: Callable[[], None]) -> None:
        """Process 0 does something, and the others wait until it is done.

        Raises:
          ValueError, OSError: on all processes, what it raises.
        """
        error = None
        if self.process_index == 0:
            try:
                action()
            except (ValueError, OSError) as raised:
                error = raised
        if (error := self.of_first(error)) is not None:
            raise error

    def together(self, action: Callable[[], T]) -> T:
        """Every process does something, and goes on once all have done it.

        Returns:
          What it gives in this process.

        Raises:
          Exception: on all processes, what it raises in the first of those where it does: there that, in the others the
            same as a ValueError, an OSError, an ImportError or a RuntimeError.
          OutOfStep: if another process does not come to its end within a minute, as it waits for this one in its midst.
        """
        if self.process_count == 1:
            return action()
        result = error = None
        try:
            result = action()
        except Exception as raised:  # whatever it is: the others wait to hear how this process has ended
            error = raised
        if error is not None and are_apart(error):
            raise error
        # Not by a collective: one that is given up keeps its process from ending.
        number = self.store.add(f"together/calls/{self.process_index}", 1)
        keys = [f"together/{number}/{process}" for process in range(self.process_count)]
        self.store.set(keys[self.process_index], json.dumps(error and _described(error)))
        try:
            self.store.wait(keys, _TIMEOUT if error is None else _PATIENCE)
        except dist.DistStoreError:
            if error is None:
                raise
            raise OutOfStep(f"{one_line(error)} (process {self.process_index}; the others wait for it)") from error
        theirs = [json.loads(self.store.get(key)) for key in keys]
        # All are here, so all have read what they left the last time.
        self.store.delete_key(f"together/{number - 1}/{self.process_index}")
        first = next((i for i, described in enumerate(theirs) if described is not None), None)
        try:
            if first == self.process_index:
                raise error
            if first is not None:  # of one kind on all, or each would go on in its own way
                kind, message = theirs[first]
                raise _KINDS.get(kind, RuntimeError)(message) from error
        finally:
            del error  # or it would refer to itself, and keep what the action has taken of the device's memory
        return result

    def of_all(self, value: Any) -> list[Any]:
        """The values of all processes, on all processes."""
        values = [value] * self.process_count
        if self.process_count > 1:
            dist.all_gather_object(values, value)
        return values

    def of_first(self, value: Any) -> Any:
        """Process 0's value, on all processes."""
        return self.of_all(value)[0]

    def describe(self) -> str:
        """The devices in words."""
        processes = f" in each of {self.process_count} processes" if self.process_count > 1 else ""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device) + processes
        if self.device.type == "cpu":
            return f"{torch.get_num_threads()} CPU threads{processes}"
        return f"{self.device_count} XLA device(s) ({os.environ['PJRT_DEVICE']}) of {self.process_count} process(es)"


def are_apart(error: BaseException) -> bool:
    """Whether an error says that processes cannot go on together: `OutOfStep`, or another one has gone."""
    if not isinstance(error, RuntimeError):
        return False
    # Gloo's errors have no type.
    return isinstance(error, OutOfStep | dist.DistError) or re.search(r"\bgloo\b", str(error)) is not None


def _described(error: Exception) -> tuple[str | None, str]:
    """Which of `_KINDS` an error is, and its message."""
    return next((name for name, kind in _KINDS.items() if isinstance(error, kind)), None), one_line(error)


def initialize(device: str) -> Runtime:
    """The runtime of this process.

    Call it before TensorFlow is imported: torch_xla comes first, or LLVM ends the process.

    Args:
      device: "cpu", "cuda", "xla", or "auto" for a TPU or a GPU where there is one.

    Started by torchrun, this process is one of several, each with a device of its own.

    Raises:
      ValueError: if there is no such device, or not one for each process.
      ImportError: for "xla" without a torch_xla that loads.
    """
    by_torchrun = "LOCAL_RANK" in os.environ
    if device == "xla" or (device == "auto" and _on_tpu_host()):
        if by_torchrun:
            raise ValueError("--device=xla drives all devices of a host from one process: use python, not torchrun")
        return _initialize_xla()
    count = torch.cuda.device_count()
    if device == "cuda" and not count:
        raise ValueError(
            "--device=cuda, but torch sees no CUDA device: use --device=cpu, or install a CUDA build of torch"
        )
    if device == "auto":
        device = "cuda" if count else "cpu"
    return _initialize_torchrun(device, count) if by_torchrun else Runtime(torch.device(device))


def _initialize_torchrun(device: str, cuda_count: int) -> Runtime:
    local_rank = int(os.environ["LOCAL_RANK"])
    if device == "cuda" and local_rank >= cuda_count:
        raise ValueError(
            f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes on a host with {cuda_count} CUDA device(s): "
            f"use --nproc-per-node={cuda_count}"
        )
    # Gloo as well: checkpoints and preemption are agreed on by the hosts, beside what the devices do.
    backend, device = ("cpu:gloo,cuda:nccl", f"cuda:{local_rank}") if device == "cuda" else ("gloo", "cpu")
    if device != "cpu":
        torch.cuda.set_device(device)
    # A process that waits here for one that has failed hears of nothing but the signal itself.
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    dist.init_process_group(backend)
    signal.signal(signal.SIGTERM, handler)
    count = dist.get_world_size()
    return Runtime(torch.device(device), dist.get_rank(), count, count, _get_default_store())


def _on_tpu_host() -> bool:
    if "PJRT_DEVICE" in os.environ:
        return os.environ["PJRT_DEVICE"] == "TPU"
    # libtpu comes with the [tpu] extra; without it there is no reason to wait for torch_xla.
    if importlib.util.find_spec("libtpu") is None or importlib.util.find_spec("torch_xla") is None:
        return False
    _import_torch_xla()
    from torch_xla._internal import tpu

    return tpu.num_available_chips() > 0


def _import_torch_xla() -> None:
    if "tensorflow" in sys.modules and "torch_xla" not in sys.modules:
        raise RuntimeError("torch_xla has to be imported before TensorFlow: call runtime.initialize first")
    if importlib.util.find_spec("torch_xla") is None:
        raise ImportError(f"--device=xla needs torch_xla: pip install -e '.[xla]', which brings {XLA_VERSIONS}")
    try:
        import torch_xla  # noqa: F401
    except ImportError as error:
        version = importlib.metadata.version("torch_xla")
        raise ImportError(
            f"torch_xla {version} does not load against torch {torch.__version__}: install {XLA_VERSIONS}, "
            f"as pip install -e '.[xla]' does ({error})"
        ) from error


def _initialize_xla() -> Runtime:
    _import_torch_xla()
    import torch_xla
    import torch_xla.runtime as xr

    xr.use_spmd()
    store = None
    if xr.process_count() > 1:
        # Hosts agree on checkpoints and preemption over their network, beside what the devices do.
        import torch_xla.distributed.xla_backend

        dist.init_process_group("gloo", init_method="xla://")
        store = _get_default_store()
    devices = xr.global_runtime_device_count()
    return Runtime(torch_xla.device(), xr.process_index(), xr.process_count(), devices, store)


def resolve_mesh(mesh: dict[str, int] | None, device_count: int) -> dict[str, int]:
    """The sizes of the mesh's axes, which together make up all devices.

    Args:
      mesh: sizes of "data" and "fsdp"; what is left out is 1, and one of them may be -1: what is left of the devices.
        None: all are "data".
      device_count: how many devices there are.

    Raises:
      ValueError: for another axis, or sizes that do not multiply to the number of devices.
    """
    sizes = {"data": 1, "fsdp": 1} | ({"data": -1} if mesh is None else mesh)
    rest = [name for name, size in sizes.items() if size == -1]
    product = 1
    for size in sizes.values():
        product *= 1 if size == -1 else size
    if set(sizes) != {"data", "fsdp"} or len(rest) > 1 or product < 1:
        raise ValueError(f"train.mesh = {mesh}: give sizes of 'data' and 'fsdp', at most one of them -1, for the rest")
    if rest:
        sizes[rest[0]], remainder = divmod(device_count, product)
    if (rest and remainder) or (not rest and product != device_count):
        raise ValueError(
            f"train.mesh = {mesh} does not fit {device_count} device(s): the sizes have to multiply to their number; "
            "-1 takes the rest"
        )
    return sizes


def derive_seed(*parts: int) -> int:
    """A 63-bit seed that depends on the integers `parts`, their order and their number."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1

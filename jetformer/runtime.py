"""Devices and processes: which there are, and how processes agree. The one module that imports torch_xla first.

(torch_tpu needs no import: torch loads it where it is installed.)
"""

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


@dataclasses.dataclass(frozen=True)
class DeviceType:
    """What the loop in plain PyTorch has to know of a type of devices.

    Attributes:
      distributed: backends of torch.distributed. Gloo is always one of them: checkpoints and preemption synchronize
        hosts, not devices.
      compiler: backend of torch.compile.
    """

    distributed: str
    compiler: str = "inductor"


# The types of devices that the loop in plain PyTorch drives. torch_tpu registers "tpu" and its backends.
DEVICE_TYPES = {
    "cpu": DeviceType("gloo"),
    "cuda": DeviceType("cpu:gloo,cuda:nccl"),
    "tpu": DeviceType("cpu:gloo,tpu:tpu_dist", compiler="tpu"),
}

# How long a process waits for the others at the end of `Runtime.together`: after an error, and without one.
_PATIENCE = datetime.timedelta(seconds=60)
_TIMEOUT = datetime.timedelta(minutes=30)  # also of collectives

_KINDS = {kind.__name__: kind for kind in (ValueError, OSError, ImportError)}  # errors whose message says enough


class OutOfStep(RuntimeError):
    """Processes are at different places in the program and cannot continue. The message is one line."""


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Describes where this process runs.

    Attributes:
      device: of the model; "xla" stands for all devices of all processes.
      process_index: rank of this process.
      process_count: number of processes.
      device_count: number of devices of all processes.
      store: key-value store that several processes share.
      group: what they exchange values through, see `patient_group`; None: the default group.
    """

    device: torch.device
    process_index: int = 0
    process_count: int = 1
    device_count: int = 1
    store: dist.Store | None = dataclasses.field(default=None, repr=False, compare=False)
    group: dist.ProcessGroup | None = dataclasses.field(default=None, repr=False, compare=False)

    def agree_on(self, name: str, value: Any) -> None:
        """Checks that a value is the same on all processes.

        Raises:
          ValueError: if it is not.
        """
        values = self.all_gather(value)
        if any(other != values[0] for other in values):
            raise ValueError(f"{name} differs between processes: {values}; use a --workdir that all hosts share")

    def on_first(self, action: Callable[[], T]) -> T:
        """Calls a function on process 0 only, and returns its value on all processes.

        Raises:
          ValueError, OSError: on all processes, what the function raises.
        """
        value = error = None
        if self.process_index == 0:
            try:
                value = action()
            except (ValueError, OSError) as raised:
                error = raised
        value, error = self.broadcast((value, error))
        if error is not None:
            raise error
        return value

    def together(self, action: Callable[[], T]) -> T:
        """Calls a function on every process and waits until all have returned.

        Returns:
          What the function returns on this process.

        Raises:
          Exception: on all processes, the error of the first process where the function raises; the others raise it
            as a ValueError, OSError, ImportError or RuntimeError with the same message.
          OutOfStep: if the function raises here, and on another process does not return within a minute, because it
            waits for this one.
        """
        if self.process_count == 1:
            return action()
        result = error = None
        try:
            result = action()
        except Exception as raised:  # of any kind: the others wait for the outcome on this process
            error = raised
        if error is not None and are_apart(error):
            raise error
        # Not by a collective: a process that gives one up cannot end.
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
        # All processes are here, so all have read the last outcome.
        self.store.delete_key(f"together/{number - 1}/{self.process_index}")
        first = next((i for i, described in enumerate(theirs) if described is not None), None)
        try:
            if first == self.process_index:
                raise error
            if first is not None:  # of one kind on all, or they would handle it in different ways
                kind, message = theirs[first]
                raise _KINDS.get(kind, RuntimeError)(message) from error
        finally:
            del error  # else its traceback refers to itself and keeps device memory of the action
        return result

    def all_gather(self, value: Any) -> list[Any]:
        """Returns the values of all processes, on all processes."""
        values = [value] * self.process_count
        if self.process_count > 1:
            dist.all_gather_object(values, value, self.group)
        return values

    def broadcast(self, value: Any) -> Any:
        """Returns the value of process 0 on all processes."""
        return self.all_gather(value)[0]

    def describe(self) -> str:
        """Returns the devices in words."""
        processes = f" in each of {self.process_count} processes" if self.process_count > 1 else ""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device) + processes
        if self.device.type == "cpu":
            return f"{torch.get_num_threads()} CPU threads{processes}"
        if self.device.type == "tpu":
            return f"TPU (torch_tpu {importlib.metadata.version('torch_tpu')}){processes}"
        return f"{self.device_count} XLA device(s) ({os.environ['PJRT_DEVICE']}) of {self.process_count} process(es)"


def are_apart(error: BaseException) -> bool:
    """Returns whether an error means that processes cannot continue: `OutOfStep`, or another process has ended."""
    if not isinstance(error, RuntimeError):
        return False
    # Gloo's errors have no type.
    return isinstance(error, OutOfStep | dist.DistError) or re.search(r"\bgloo\b", str(error)) is not None


def _described(error: Exception) -> tuple[str | None, str]:
    """Returns which of `_KINDS` an error is, and its message."""
    return next((name for name, kind in _KINDS.items() if isinstance(error, kind)), None), one_line(error)


def initialize(device: str, alone: bool = False) -> Runtime:
    """Returns the runtime of this process; with torchrun it is one of several, each with its own device.

    Call it before TensorFlow is imported: LLVM aborts the process if torch_xla comes later.

    Args:
      device: "cpu", "cuda", "cuda:1", "tpu" (one of them, through torch_tpu), "xla" (all TPUs, through torch_xla), or
        "auto" for a TPU or a GPU if there is one.
      alone: under torchrun, leave the other processes out.

    Raises:
      ValueError: if there is no such device, or not one for each process.
      ImportError: for "xla" without a torch_xla that loads, and for "tpu" without torch_tpu.
    """
    if not re.fullmatch(r"auto|cpu|tpu|xla|cuda(:\d+)?", device):
        raise ValueError(f"device {device!r}: expected auto, cpu, cuda, cuda:NUMBER, tpu or xla")
    by_torchrun = "LOCAL_RANK" in os.environ and not alone
    if device == "xla" or (device == "auto" and _on_tpu_host()):
        if by_torchrun:
            raise ValueError("--device=xla drives all devices of a host from one process: use python, not torchrun")
        return _initialize_xla()
    found = torch.accelerator.current_accelerator(check_available=True)
    if device == "auto":
        device = found.type if found is not None and found.type in DEVICE_TYPES else "cpu"
    if device == "tpu" and (found is None or found.type != "tpu"):
        raise _missing_tpu()
    count = torch.cuda.device_count()
    if device == "cuda" and not count:
        raise ValueError(
            "--device=cuda, but torch sees no CUDA device: use --device=cpu, or install a CUDA build of torch"
        )
    if device.startswith("cuda:") and int(device.removeprefix("cuda:")) >= count:
        raise ValueError(f"device {device!r}: torch sees {count} CUDA device(s)")
    return _initialize_torchrun(device, count) if by_torchrun else Runtime(torch.device(device))


def _initialize_torchrun(device: str, cuda_count: int) -> Runtime:
    local_rank = int(os.environ["LOCAL_RANK"])
    if device == "cuda" and local_rank >= cuda_count:
        raise ValueError(
            f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes on a host with {cuda_count} CUDA device(s): "
            f"use --nproc-per-node={cuda_count}"
        )
    if device.startswith("cuda:"):
        raise ValueError(f"--device={device} under torchrun, where each process drives its own GPU: use --device=cuda")
    if device == "tpu" and os.environ["WORLD_SIZE"] != "1" and "TORCH_TPU_SLICEBUILDER_ADDRESSES" not in os.environ:
        raise ValueError(
            "--device=tpu in several processes needs the environment that torch_tpu makes for them: start them with "
            "launch/tpu_host.sh"
        )
    gpu = None
    if device == "cuda":
        gpu = torch.device("cuda", local_rank)
        torch.cuda.set_device(gpu)
    # While it waits here for a process that has failed, Python runs no handler: let the signal end it.
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    dist.init_process_group(DEVICE_TYPES[device].distributed, timeout=_TIMEOUT, device_id=gpu)
    signal.signal(signal.SIGTERM, handler)
    count = dist.get_world_size()
    return Runtime(gpu or torch.device(device), dist.get_rank(), count, count, _get_default_store(), patient_group())


def patient_group() -> dist.ProcessGroup:
    """Returns a group of all processes that waits for a process as long as it lives: preparing a dataset takes one of
    them hours, while the others wait for it."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30))


def shut_down() -> None:
    """Ends the communication between processes, if there are several: they all call it when they are done."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _on_tpu_host() -> bool:
    if "PJRT_DEVICE" in os.environ:
        return os.environ["PJRT_DEVICE"] == "TPU"
    # libtpu comes with the [tpu] extra; without it there is no need to import torch_xla, which takes seconds.
    if importlib.util.find_spec("libtpu") is None or importlib.util.find_spec("torch_xla") is None:
        return False
    _import_torch_xla()
    from torch_xla._internal import tpu

    return tpu.num_available_chips() > 0


def _missing_tpu() -> Exception:
    """Returns the error for a process without a device of type "tpu"."""
    if importlib.util.find_spec("torch_tpu") is None:
        return ImportError(
            "--device=tpu needs torch_tpu: pip install -e '.[tpu-native]', with Python 3.11 or newer; or use "
            "--device=xla, which runs on TPUs through torch_xla"
        )
    return ValueError(
        "--device=tpu, but torch_tpu finds no TPU on this host: use another --device; where there is one, unset "
        "TORCH_DEVICE_BACKEND_AUTOLOAD"
    )


def _import_torch_xla() -> None:
    if "tensorflow" in sys.modules and "torch_xla" not in sys.modules:
        raise RuntimeError("torch_xla must be imported before TensorFlow: call runtime.initialize first")
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
    store = group = None
    if xr.process_count() > 1:
        # For checkpoints and preemption, which synchronize hosts, not devices.
        import torch_xla.distributed.xla_backend

        dist.init_process_group("gloo", init_method="xla://", timeout=_TIMEOUT)
        store, group = _get_default_store(), patient_group()
    devices = xr.global_runtime_device_count()
    return Runtime(torch_xla.device(), xr.process_index(), xr.process_count(), devices, store, group)


def resolve_mesh(mesh: dict[str, int] | None, device_count: int) -> dict[str, int]:
    """Returns the sizes of the axes "data" and "fsdp" of the device mesh.

    Args:
      mesh: sizes by axis. A missing axis has size 1; one size may be -1, for the remaining devices. None: all devices
        in "data".
      device_count: number of devices.

    Raises:
      ValueError: for another axis, or sizes whose product is not the number of devices.
    """
    sizes = {"data": 1, "fsdp": 1} | ({"data": -1} if mesh is None else mesh)
    rest = [name for name, size in sizes.items() if size == -1]
    product = 1
    for size in sizes.values():
        product *= 1 if size == -1 else size
    if set(sizes) != {"data", "fsdp"} or len(rest) > 1 or product < 1:
        raise ValueError(f"train.mesh = {mesh}: expected sizes of 'data' and 'fsdp', at most one of them -1")
    if rest:
        sizes[rest[0]], remainder = divmod(device_count, product)
    if (rest and remainder) or (not rest and product != device_count):
        raise ValueError(
            f"train.mesh = {mesh} does not fit {device_count} device(s): the sizes must multiply to their number; "
            "-1 takes the remaining devices"
        )
    return sizes


def derive_seed(*parts: int) -> int:
    """Returns a 63-bit seed that depends on the integers `parts`, their order and their number."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1

"""Plans an experiment: memory and time of its training steps on devices that are not there.

A step of the training loop runs on fake tensors, which have shapes but no values. What each operation allocates, and
what the last reference to a tensor frees, adds up to the peak of memory, as in PyTorch's allocator. An operation takes
as long as its FLOPs or its traffic, whichever is longer: a roofline. Communication takes no time.
"""

import contextlib
import dataclasses
import functools
import re
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # registers those of fake tensors, which torch 2.9 lacks
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from jetformer import objectives
from jetformer.experiment import Experiment
from jetformer.loops.base import Loop, Runner
from jetformer.models import mixture_nll, remat
from jetformer.models.decoder import RMSNorm
from jetformer.models.mixture import MixtureHead
from jetformer.runtime import Runtime, resolve_mesh
from jetformer.state import State, make_loop
from jetformer.trainer import training_of

aten = torch.ops.aten


class Device(NamedTuple):
    """A device by its data sheet: memory in bytes, dense products of bfloat16 in FLOP/s, bandwidth in bytes/s."""

    memory: float
    rate: float
    bandwidth: float
    is_gpu: bool = True


DEVICES = {
    "a100": Device(80e9, 312e12, 2.039e12),
    "h100": Device(80e9, 989e12, 3.35e12),
    "h200": Device(141e9, 989e12, 4.8e12),
    "v5e": Device(16e9, 197e12, 0.819e12, is_gpu=False),
}
# Of a device's memory; the rest is for gaps in the allocator's blocks, the CUDA context, and libraries.
USABLE = 0.9
# Of a device's rate, what large products reach.
REACHED = 0.7
# Examples of two steps: memory and time are linear in between and beyond. With fewer, what does not grow with the batch
# may decide the peak.
SIZES = (32, 64)
# What is recomputed, see `remat.set_policy`.
POLICIES = (("none", 1), ("everything", 4), ("everything", 2), ("blocks", 1), ("couplings", 1), ("everything", 1))


def _attention(q: Tensor, k: Tensor, v: Tensor, *_, **__) -> int:
    return 2 * q[..., 0].numel() * k.shape[2] * (q.shape[3] + v.shape[3])


def _attention_backward(_, q: Tensor, k: Tensor, v: Tensor, *__, **___) -> int:
    return 2 * q[..., 0].numel() * k.shape[2] * (3 * q.shape[3] + 2 * v.shape[3])


# PyTorch does not count these: the image head's products, which add up in place, and a CPU's attention.
PRODUCTS = flop_registry | {
    aten.addmm_: lambda total, a, b, **_: 2 * a.shape[0] * a.shape[1] * b.shape[1],
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class Cost(NamedTuple):
    """Of a training step: the peak of memory in bytes, FLOPs with what is recomputed, and seconds."""

    peak: float
    flops: float
    seconds: float


class Row(NamedTuple):
    """A policy's plan for a device.

    fixed: bytes that do not grow with the batch.
    each: bytes of an example.
    largest: number of examples that fit.
    seconds: of an example in the largest batch, of the products alone and of all operations; None if none fits.
    utilization: FLOPs of the model, without those of recomputation, over those that the device could compute in either
      time; None if none fits.
    """

    policy: str
    every: int
    fixed: float
    each: float
    largest: int
    seconds: tuple[float, float] | None
    utilization: tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """An experiment on `count` devices: number of parameters, bytes on each device by use, and a row for a policy."""

    parameters: int
    bytes: dict[str, int]
    rows: list[Row]


class Ledger(TorchDispatchMode):
    """Adds up what operations on fake tensors allocate, free, read, write and multiply."""

    def __init__(self, device: Device):
        super().__init__()
        self._device = device
        self._held: dict[int, tuple[weakref.ref, int]] = {}  # storages, and their bytes
        self.now = self.peak = self.flops = 0
        self.seconds = 0.0

    def __enter__(self):
        self._resize = resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> None:  # FSDP2 frees gathered parameters by it
            resize(storage, size)
            if storage._cdata in self._held:
                self._hold(storage)

        torch.UntypedStorage.resize_ = resized
        return super().__enter__()

    def __exit__(self, *exception):
        torch.UntypedStorage.resize_ = self._resize
        return super().__exit__(*exception)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local operations come here
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        read, written = ([x for x in tree_leaves(y) if isinstance(x, Tensor)] for y in ((args, kwargs), result))
        is_new = self.hold(written)
        if is_new or function._schema.is_mutable:  # no view
            self._spend(function, args, kwargs, result, read, written)
        return result

    def hold(self, tensors: Iterable[Tensor]) -> bool:
        """Counts tensors until they are freed; returns whether one of them is new."""
        new = {x.untyped_storage()._cdata: x.untyped_storage() for x in tensors}
        new = [storage for key, storage in new.items() if key not in self._held]
        for storage in new:
            self._hold(storage)
        return bool(new)

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        before = self._held[key][1] if key in self._held else 0
        self._held[key] = weakref.ref(storage, lambda _: self._free(key)), size
        self.now += size - before
        self.peak = max(self.peak, self.now)

    def _free(self, key: int) -> None:
        self.now -= self._held.pop(key)[1]

    def _spend(self, function, args, kwargs, result, read: list[Tensor], written: list[Tensor]) -> None:
        if "empty" in function.__name__ or function.namespace == "c10d":
            return
        counts = PRODUCTS.get(function._overloadpacket)
        flops = counts(*args, **kwargs, out_val=result) if counts else 0
        # Updates of lists of tensors return nothing. An expanded tensor is no larger than its storage.
        moved = sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in (*read, *(written or read)))
        self.flops += flops
        self.seconds += max(flops / (REACHED * self._device.rate), moved / self._device.bandwidth)


class _Kernels:
    """Stands in for `mixture_triton`, which needs Triton and a GPU: reads and overwrites the same logits."""

    @staticmethod
    def component_log_densities(means: Tensor, raw_scales: Tensor, tokens: Tensor, _) -> Tensor:
        for logits in (means, raw_scales):
            logits.sum()
        return tokens.new_empty(len(means), means.shape[2])

    @staticmethod
    def differentiate(means: Tensor, raw_scales: Tensor, tokens: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
        for logits in (means, raw_scales):
            logits.neg_()
        return torch.empty_like(tokens), tokens.new_empty(means.shape[:2]), tokens.new_empty(means.shape[:2])


def plan(experiment: Experiment, batches: Sequence[dict[str, np.ndarray]], device: Device, count: int) -> Plan:
    """Plans an experiment on `count` devices, each of which holds its shards by the experiment's mesh.

    Memory is that of PyTorch's loop without `train.compile`, with the image head's Triton kernels; XLA orders and fuses
    operations itself. Products count at the rate of bfloat16, also without `train.autocast`. A device's time lies
    between that of the products alone and that of all operations one by one, the more is fused, the nearer the first.

    Args:
      experiment: what to plan.
      batches: two batches `[B, ...]` of different sizes on a device; memory and time are linear in the size.
      device: each of the devices.
      count: number of devices.

    Raises:
      ValueError: if the mesh does not fit the number of devices.
    """
    shards = resolve_mesh(experiment.mesh, count)["fsdp"]
    experiment = dataclasses.replace(experiment, mesh={"fsdp": shards}, compile=None)
    costs = {}
    with _group(shards), mock.patch.object(mixture_nll, "mixture_triton", _Kernels, create=True):
        loop = make_loop(experiment, Runtime(torch.device("cpu"), 0, shards, shards))
        model = experiment.check_model()
        runner = loop.place(model) if shards > 1 else Runner(model)
        with FakeTensorMode(allow_non_fake_inputs=True):  # it takes the model on the meta device
            state = _build(experiment, loop, runner, device)
            for policy, every in POLICIES:
                remat.set_policy(model, policy, every)
                costs[policy, every] = [_step(experiment, state, batch, device) for batch in batches]
    sizes = [objectives.batch_size(batch) for batch in batches]
    # Each cost is a line: what does not grow with the batch, and what an example adds.
    lines = {policy: Cost(*(_line(sizes, y) for y in zip(*pair, strict=True))) for policy, pair in costs.items()}
    flops = lines["none", 1].flops[1]
    rows = [_row(*policy, line, flops, device) for policy, line in lines.items()]
    return Plan(sum(p.numel() for p in model.parameters()), state.bytes(), rows)


@contextlib.contextmanager
def _group(size: int) -> Iterator[None]:
    """Makes up a group of processes, of which this one is the first."""
    if size == 1:
        yield
        return
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _build(experiment: Experiment, loop: Loop, runner: Runner, device: Device) -> State:
    """Returns a state of fake tensors. Norms and head are as on the device, whatever a CPU has for them."""
    model = runner.model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, RMSNorm):  # fused, it keeps as much as a layer norm
            module.forward = functools.partial(_normalize, module)
        elif isinstance(module, MixtureHead):
            module.backend = "triton"
            memory = int(device.memory) if device.is_gpu else None
            module.block = module.block or mixture_nll.block_for(len(module.linear.bias), memory)
    state = State(loop, runner, experiment.optimizer(model), ema=None)
    if experiment.ema_decay:
        state.ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    return state


def _normalize(norm: RMSNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.weight.shape, 1 + norm.weight)


def _step(experiment: Experiment, state: State, batch: dict[str, np.ndarray], device: Device) -> Cost:
    """Returns the cost of a training step of a batch."""
    training = training_of(experiment, state, 1, schedule=lambda step: 1.0)
    with Ledger(device) as ledger:
        tensors = tree_leaves(state.tensors())
        ledger.hold(state.loop.local(x) for x in tensors if isinstance(x, Tensor))
        for _ in state.loop.train_steps(training, iter([batch])):
            pass
    state.optimizer.zero_grad(set_to_none=True)
    return Cost(ledger.peak, ledger.flops, ledger.seconds)


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Returns value at 0 and slope of the line through two points."""
    slope = (y[1] - y[0]) / (x[1] - x[0])
    return y[0] - slope * x[0], slope


def _row(policy: str, every: int, line: Cost, flops: float, device: Device) -> Row:
    fixed, each = line.peak
    largest = max(int((USABLE * device.memory - fixed) / each), 0)
    if not largest:
        return Row(policy, every, fixed, each, 0, None, None)
    times = line.flops[1] / (REACHED * device.rate), line.seconds[1] + line.seconds[0] / largest
    return Row(policy, every, fixed, each, largest, times, tuple(flops / (time * device.rate) for time in times))


def parse(name: str) -> tuple[Device, int]:
    """Returns a device and a number of devices from a name such as `h100x8`.

    Raises:
      ValueError: if it is none.
    """
    match = re.fullmatch(f"({'|'.join(DEVICES)})x([1-9][0-9]*)", name)
    if match is None:
        raise ValueError(f"--plan={name}: use one of {', '.join(DEVICES)}, and how many, as in h100x8")
    return DEVICES[match[1]], int(match[2])


def report(name: str, found: Plan) -> str:
    """Returns a plan as text."""
    gigabytes = ", ".join(f"{use} {size / 1e9:.2f}" for use, size in found.bytes.items())
    lines = [
        f"{name}, computed, at the rate of bfloat16: no device has run it",
        f"{found.parameters / 1e6:,.1f}M parameters",
        f"{sum(found.bytes.values()) / 1e9:.2f} GB of state on each device: {gigabytes}",
        f"{'recomputed':>18} {'fixed GB':>9} {'GB an example':>14} {'at most':>8} {'ms an example':>15} {'MFU':>11}",
    ]
    for row in found.rows:
        name = row.policy if row.every == 1 else f"{row.policy}, 1 in {row.every}"
        line = f"{name:>18} {row.fixed / 1e9:9.1f} {row.each / 1e9:14.3f} {row.largest:8}"
        if row.seconds is not None:
            least, most = (1e3 * time for time in row.seconds)
            best, worst = row.utilization
            line += f" {f'{least:.2f} to {most:.2f}':>15} {f'{best:.0%} to {worst:.0%}':>11}"
        lines.append(line)
    return "\n".join(lines)

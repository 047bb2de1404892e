"""The training loop through torch_xla: TPU pods, and any other device that XLA compiles for.

One process on each host drives all of its devices (SPMD): a tensor is one tensor over all devices of all hosts, and XLA
cuts the graph up by how batches and parameters are laid out on the mesh. What happens, in order:

  - the feed reads this host's part of a batch and adds the step's numbers (learning-rate factor, noise, keys of the
    examples) as tensors: nothing that changes from step to step is a constant of the graph;
  - MpDeviceLoader's threads move it to the devices ahead of time, each its part;
  - `train_step` is traced: draws, forward and backward, accumulation, clipping, optimizer, moving average;
    `torch_xla.compile` cuts it off there, and runs it, compiled the first time and never again;
  - what was measured is a small tensor that stays on the device until the run logs.

Nothing else touches the device. Dimensions: B batch over all devices.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch_xla
import torch_xla.backends
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as xla_metrics
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from absl import logging
from torch import Tensor, nn
from torch_xla.distributed.parallel_loader import MpDeviceLoader
from torch_xla.experimental.distributed_checkpoint import SPMDLoadPlanner, SPMDSavePlanner
from torch_xla.experimental.distributed_checkpoint._helpers import _sharded_cpu_state_dict

from jetformer import objectives, optim, prng
from jetformer.loops import steps
from jetformer.models.mixture import MixtureHead
from jetformer.runtime import Runtime, derive_seed, resolve_mesh

# Tensors of fewer entries are on every device: to gather them would take longer than to keep them.
_SMALLEST_SHARDED = 4096
# Batches that wait on the host, and on the devices.
_HOST_PREFETCH, _DEVICE_PREFETCH = 4, 2
# The graph of a step is compiled at the first and, with other bookkeeping of torch_xla's, at the second.
_COMPILED_BY = 2


def set_up(mesh: dict[str, int] | None, cache_dir: str | None, matmul_precision: str) -> None:
    """Makes the mesh that everything is laid out on; the first call counts, before anything is on the device.

    Args:
      mesh: see `runtime.resolve_mesh`.
      cache_dir: local directory of compiled graphs, which later processes take from there; None for none.
      matmul_precision: see `train.matmul_precision`. (Left to itself a TPU multiplies float32 in bfloat16.)
    """
    if xs.get_global_mesh() is not None:
        return
    torch_xla.backends.set_mat_mul_precision(matmul_precision)
    if cache_dir is not None:
        # Each host compiles for itself, and where a directory is shared, writes the same.
        xr.initialize_cache(cache_dir)
    count = xr.global_runtime_device_count()
    sizes = resolve_mesh(mesh, count)
    xs.set_global_mesh(xs.Mesh(np.arange(count), tuple(sizes.values()), tuple(sizes)))


def place(model: nn.Module, runtime: Runtime, **how) -> steps.Runner:
    """The model on the mesh: large parameters cut up over the axis fsdp, the rest on every device. How the torch loop
    is to do it does not matter: the mesh is set up, and XLA compiles everything."""
    del how
    model.to(runtime.device)
    place_state(model.parameters())
    for module in model.modules():
        if isinstance(module, MixtureHead):
            module.num_shards = runtime.device_count
        if isinstance(module, nn.ModuleList) and runtime.device_count > 1:
            for block in module:
                block.register_forward_hook(_keep_examples_apart)
    return steps.Runner(model)


@torch.no_grad()
def place_state(tensors: Iterable[Tensor]) -> None:
    """Lays out what belongs to parameters as parameters of its shape are laid out."""
    mesh = xs.get_global_mesh()
    for tensor in tensors:
        xs.mark_sharding(tensor, mesh, partition_spec(tensor.shape, mesh.shape()["fsdp"]))
    torch_xla.sync()


def partition_spec(shape: torch.Size, fsdp: int) -> tuple[str | None, ...]:
    """The axis each dimension of a parameter is cut over: the largest that divides over `fsdp`, or none."""
    spec = [None] * len(shape)
    dims = [i for i, size in enumerate(shape) if size % fsdp == 0]
    if fsdp > 1 and dims and shape.numel() >= _SMALLEST_SHARDED:
        spec[max(dims, key=lambda i: shape[i])] = "fsdp"
    return tuple(spec)


def _keep_examples_apart(module: nn.Module, args, output) -> None:
    """Says that what a block returns `[B, ...]` is cut up by example; left to itself XLA may follow the parameters."""
    del module, args
    mesh = xs.get_global_mesh()
    for tensor in output if isinstance(output, tuple) else (output,):
        if len(tensor) % mesh.size() == 0:  # samples may be fewer
            xs.mark_sharding(tensor, mesh, (("data", "fsdp"), *[None] * (tensor.ndim - 1)))


def local(tensor: Tensor) -> Tensor:
    """A tensor as it is: it stands for all devices."""
    return tensor


def exchange(model: nn.Module, ema: dict[str, Tensor]) -> None:
    """Exchanges the parameters' values and `ema`'s; nothing is computed."""
    for name, parameter in model.named_parameters():
        parameter.data, ema[name] = ema[name], parameter.data


@contextlib.contextmanager
def gathered(runner: steps.Runner) -> Iterator[None]:
    """XLA gathers parameters where it needs them."""
    del runner
    yield


def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all tensors together."""
    return compile(torch.nn.utils.get_total_norm)([x.detach() for x in tensors])


def compile(function: Callable) -> Callable:
    """Traces what `function` does to the device as one graph, and cuts it off at its end; tensors that it returns are
    whole on every device."""

    @functools.wraps(function)
    def whole(*args):
        return torch.utils._pytree.tree_map_only(Tensor, _everywhere, function(*args))

    return torch_xla.compile(whole)


def to_host(values: list[Tensor]) -> np.ndarray:
    """Tensors of one shape `[...]` as one array `[N, ...]`; waits for the device. No graph is made for it."""
    return torch.stack(torch_xla._XLAC._xla_get_cpu_tensors(values)).numpy()


class _SavePlanner(SPMDSavePlanner):
    """torch_xla's, for meshes that hold copies of shards.

    It takes a second copy in one plan for one that another process writes as well, and then drops both.
    """

    def create_local_plan(self):
        plan = super().create_local_plan()
        first_copies = {}
        for item in plan.items:
            first_copies.setdefault(item.index, item)
        return dataclasses.replace(plan, items=list(first_copies.values()))


class _LoadPlanner(SPMDLoadPlanner):
    """torch_xla's, which stops where a step that makes the shards has not ended."""

    def set_up_planner(self, *args, **kwargs) -> None:
        xm.wait_device_ops()
        super().set_up_planner(*args, **kwargs)


def _snapshot(state: dict[str, Any]) -> dict[str, Any]:
    """This host's shards of a state, on the CPU."""
    xm.wait_device_ops()  # torch_xla does not wait for the step that makes them, but stops
    return _sharded_cpu_state_dict(state)


def checkpointing() -> dict[str, Callable]:
    """How a `Checkpointer` copies and writes what lies on the mesh: every host only its own shards."""
    return {"snapshot": _snapshot, "planner": _SavePlanner}


def load_planner() -> SPMDLoadPlanner:
    """How a checkpoint is read onto the mesh: every host reads what its devices hold."""
    return _LoadPlanner()


def counters() -> dict[str, float]:
    """What torch_xla counted in this process: compilations, their seconds, and fall-back operations, each of which
    is also warned of by name."""
    count, nanoseconds, _ = xla_metrics.metric_data("CompileTime") or (0, 0, [])
    fallbacks = {
        name.removeprefix("aten::"): xla_metrics.counter_value(name)
        for name in xla_metrics.counter_names()
        if name.startswith("aten::")
    }
    if fallbacks:
        names = ", ".join(f"{name} ({count} times)" for name, count in sorted(fallbacks.items()))
        logging.warning("XLA has no lowering of, or had to wait for the device in: %s", names)
    return {
        "xla/compilations": float(count),
        "xla/compile_seconds": nanoseconds / 1e9,
        "xla/fallbacks": float(sum(fallbacks.values())),
    }


def autocast(device: torch.device, dtype: str | None) -> contextlib.AbstractContextManager:
    """What the forward pass runs under: "bfloat16" for products in it, None for the parameters' own precision."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, getattr(torch, dtype))


class _Feed:
    """Batches for MpDeviceLoader, whose threads take an error for the end of the data."""

    def __init__(self, inputs: Iterator[dict[str, Tensor]]):
        self._inputs = inputs
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        try:
            yield from self._inputs
        except BaseException as error:
            self.error = error


@contextlib.contextmanager
def _on_device(inputs: Iterator[dict[str, Tensor]], runtime: Runtime) -> Iterator[Iterator[dict[str, Tensor]]]:
    """`inputs` on the devices, moved there ahead of time: tensors `[B / processes, ...]` cut up by example, scalars
    everywhere."""
    mesh = xs.get_global_mesh()
    first = next(inputs)
    shardings = {
        name: xs.ShardingSpec(
            mesh, (("data", "fsdp"), *[None] * (tensor.ndim - 1)), minibatch=runtime.process_count > 1
        )
        if tensor.ndim
        else None
        for name, tensor in first.items()
    }
    feed = _Feed(itertools.chain([first], inputs))
    loader = MpDeviceLoader(
        feed,
        runtime.device,
        input_sharding=shardings,
        loader_prefetch_size=_HOST_PREFETCH,
        device_prefetch_size=_DEVICE_PREFETCH,
        batches_per_execution=sys.maxsize,  # it cuts off no graph: the loop does
    )

    def batches():
        yield from loader
        if feed.error is not None:
            raise feed.error

    try:
        yield batches()
    finally:
        if loader._parallel_loader is not None:  # else nothing was asked for
            loader._parallel_loader.close()


def train_steps(
    *,
    runner: steps.Runner,
    objective,
    optimizer: torch.optim.Optimizer,
    ema: dict[str, Tensor] | None,
    batches: Iterator[dict[str, np.ndarray]],
    start_step: int,
    total_steps: int,
    schedule: Callable[[int], float],
    noise_curriculum: Callable[[int], float],
    runtime: Runtime,
    seed: int,
    grad_clip_norm: float | None,
    grad_accum_steps: int,
    ema_decay: Callable[[int], float],
    autocast_dtype: str | None,
    on_phase: Callable[[str], None] = lambda name: None,
) -> Iterator[steps.Step]:
    """Trains from `start_step` to `total_steps`, yielding after every update; arguments as in
    `torch_loop.train_steps`."""
    if start_step == total_steps:
        return
    model = runner.model
    names: tuple[str, ...] = ()
    max_norm = float("inf") if grad_clip_norm is None else grad_clip_norm

    def inputs() -> Iterator[dict[str, Tensor]]:
        """In the loader's thread: this host's part of each step's batch, and the step's numbers."""
        for step in range(start_step, total_steps):
            batch = next(batches)
            local_size = objectives.batch_size(batch)
            first = runtime.process_index * local_size
            examples = torch.arange(first, first + local_size, dtype=torch.int32)
            # Copies: the arrays are views of memory that TensorFlow takes back.
            yield {name: torch.tensor(array) for name, array in batch.items()} | {
                "_keys": prng.example_keys(derive_seed(seed, step), examples),
                "_learning_rate_factor": torch.tensor(schedule(step), dtype=torch.float32),
                "_noise_scale": torch.tensor(noise_curriculum(step), dtype=torch.float32),
                "_ema_weight": torch.tensor(1 - ema_decay(step), dtype=torch.float32),
            }

    def train_step(batch: dict[str, Tensor]) -> Tensor:
        nonlocal names
        numbers = ("keys", "learning_rate_factor", "noise_scale", "ema_weight")
        keys, factor, noise_scale, ema_weight = (batch.pop(f"_{name}") for name in numbers)
        draws = objective.draw(model, batch, keys, train=True)
        normalizers = objective.normalizers(batch, draws, train=True)

        optimizer.zero_grad(set_to_none=True)
        loss, sums = 0.0, None
        parts = zip(objectives.split(batch, grad_accum_steps), objectives.split(draws, grad_accum_steps), strict=True)
        for part, part_draws in parts:
            with autocast(runtime.device, autocast_dtype):
                part_loss, terms = runner(objective, part, part_draws, noise_scale=noise_scale, normalizers=normalizers)
            part_loss.backward()
            loss = loss + part_loss.detach()
            part_sums = objectives.sum_terms(terms)
            sums = part_sums if sums is None else objectives.add_sums(sums, part_sums)

        optim.set_learning_rate(optimizer, factor)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        if ema is not None:
            optim.update_ema(ema, model, ema_weight)
        # What is left of this step must not be found by the next one, whose graph would be another.
        optimizer.zero_grad(set_to_none=True)
        one = torch.ones_like(loss)
        names, values = steps.pack({"loss": (loss, one), "grad_norm": (grad_norm, one), **sums})
        return _everywhere(values)

    with _on_device(inputs(), runtime) as device_batches:
        for step in range(start_step, total_steps):
            waiting_since = time.perf_counter()
            batch = next(device_batches)
            seconds = {"data_wait": time.perf_counter() - waiting_since}

            model.train()
            compilations = _compilations()
            with torch_xla.compile(full_graph=True, name="train_step"):
                tracing_since = time.perf_counter()
                values = train_step(batch)
                seconds["trace"] = time.perf_counter() - tracing_since
            if _compilations() > compilations and step - start_step >= _COMPILED_BY:
                logging.warning("The graph of step %d is new and had to be compiled: what changed?", step + 1)
            learning_rate = schedule(step) * optimizer.param_groups[0]["base_lr"]
            yield steps.Step(step + 1, names, values, learning_rate, noise_curriculum(step), seconds)


def _everywhere(values: Tensor) -> Tensor:
    """Says that all devices hold all of `values`: to bring them to the host takes no exchange between hosts, which
    torch_xla would compile anew each time."""
    xs.mark_sharding(values, xs.get_global_mesh(), (None,) * values.ndim)
    return values


def _anew(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values as tensors that are laid out nowhere yet: some may be the batch's own."""
    return {name: x | False if x.dtype == torch.bool else x + 0 for name, x in tensors.items()}


def _compilations() -> int:
    return (xla_metrics.metric_data("CompileTime") or (0,))[0]


@torch.no_grad()
def per_example(
    *,
    runner: steps.Runner,
    function: steps.Function,
    batches: Iterator[dict[str, np.ndarray]],
    runtime: Runtime,
    seed: int,
    autocast_dtype: str | None,
    staged: bool = False,
    to_rows: Callable[[steps.Rows], steps.Rows] = lambda rows: rows,
    each_batch: Callable[[], None] = lambda: None,
) -> steps.Rows:
    """What a function gives for every example of `batches`; arguments and results as in `torch_loop.per_example`."""
    own: collections.deque[np.ndarray] = collections.deque()  # of each batch, the numbers of this host's examples

    def inputs() -> Iterator[dict[str, Tensor]]:
        for batch in batches:
            own.append(batch["_index"][batch["_mask"]])
            keys = prng.example_keys(seed, torch.tensor(batch["_index"]))
            yield {name: torch.tensor(array) for name, array in batch.items()} | {"_keys": keys}

    runner.eval()
    parts = []
    call = lambda batch, keys: runner(function, batch, keys)
    with _on_device(inputs(), runtime) as device_batches:
        for batch in device_batches:
            known = {name: batch.pop(name) for name in ("_mask", "_index")}
            keys = batch.pop("_keys")
            with autocast(runtime.device, autocast_dtype):
                if staged:
                    known |= call(batch, keys)
                    values = compile(_anew)(known)
                else:
                    values = compile(lambda batch, keys, known: _anew(known | call(batch, keys)))(batch, keys, known)
            on_host = torch_xla._XLAC._xla_get_cpu_tensors(list(values.values()))
            arrays = {name: value.numpy() for name, value in zip(values, on_host, strict=True)}
            # Every host sees all examples, and keeps its own.
            index = arrays.pop("_index")
            valid = arrays.pop("_mask") & np.isin(index, own.popleft())
            rows = {name: array[valid] for name, array in arrays.items()}
            parts.append({"_index": index[valid], **to_rows(rows)})
            each_batch()
    return steps.gather(parts, runtime)

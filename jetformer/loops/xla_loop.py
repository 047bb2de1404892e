"""The training loop through torch_xla: TPU pods, and any other device that XLA compiles for.

One process on each host drives all of its devices (SPMD): a tensor is one tensor over all devices of all hosts, and XLA
partitions the graph by the shardings of batches and parameters on the mesh. What happens, in order:

  - the feed reads this host's part of a batch and adds the step's numbers (learning-rate factor, noise, keys of the
    examples) as tensors: nothing that changes from step to step is a constant of the graph;
  - MpDeviceLoader's threads move it to the devices ahead of time, each its part;
  - `Loop.step` is traced: draws, forward and backward passes, accumulation, clipping, optimizer, moving average;
    `torch_xla.compile` cuts the graph off there and runs it. It is compiled at the first step and never again;
  - the metrics are a small tensor that stays on the device until the run logs.

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
from torch.utils._pytree import tree_map_only
from torch_xla.distributed.parallel_loader import MpDeviceLoader
from torch_xla.experimental.distributed_checkpoint import SPMDLoadPlanner, SPMDSavePlanner
from torch_xla.experimental.distributed_checkpoint._helpers import _sharded_cpu_state_dict

from jetformer import prng
from jetformer.loops import base
from jetformer.models.mixture import MixtureHead
from jetformer.runtime import Runtime, resolve_mesh

# Smaller tensors are replicated on every device: gathering them would take longer than keeping them.
_SMALLEST_SHARDED = 4096
# Batches that wait on the host, and on the devices.
_HOST_PREFETCH, _DEVICE_PREFETCH = 4, 2
# The graph of a step is compiled at the first and, with other bookkeeping of torch_xla's, at the second.
_COMPILED_BY = 2


class XlaLoop(base.Loop):
    """SPMD over a mesh of all devices, one graph a step; see `base.Loop`. The first one in a process makes the mesh."""

    def set_up(self, matmul_precision: str, cache_dir: str | None) -> None:
        if xs.get_global_mesh() is not None:
            return
        # Left to itself a TPU multiplies float32 in bfloat16.
        torch_xla.backends.set_mat_mul_precision(matmul_precision)
        if cache_dir is not None:
            # Each host compiles for itself; where they share a directory, they write the same.
            xr.initialize_cache(cache_dir)
        count = xr.global_runtime_device_count()
        sizes = resolve_mesh(self.mesh, count)
        xs.set_global_mesh(xs.Mesh(np.arange(count), tuple(sizes.values()), tuple(sizes)))

    def place(self, model: nn.Module, compile: str | None = None) -> base.Runner:
        del compile  # XLA compiles everything
        model.to(self.runtime.device)
        self.place_state(model.parameters())
        blocks = {module for module in model.modules() if getattr(module, "is_block", False)}
        for module in model.modules():
            if isinstance(module, MixtureHead):
                module.num_shards = self.runtime.device_count
            if isinstance(module, nn.ModuleList):
                blocks.update(module)
        if self.runtime.device_count > 1:
            for block in blocks:
                block.register_forward_hook(_shard_by_example)
        return base.Runner(model)

    @torch.no_grad()
    def place_state(self, tensors: Iterable[Tensor]) -> None:
        mesh = xs.get_global_mesh()
        for tensor in tensors:
            xs.mark_sharding(tensor, mesh, partition_spec(tensor.shape, mesh.shape()["fsdp"]))
        torch_xla.sync()

    def swap(self, model: nn.Module, ema: dict[str, Tensor]) -> None:
        for name, parameter in model.named_parameters():  # nothing is computed
            parameter.data, ema[name] = ema[name], parameter.data

    def train_steps(
        self,
        training: base.Training,
        batches: Iterator[base.Rows],
        start_step: int = 0,
        on_phase: Callable[[str], None] = lambda name: None,
    ) -> Iterator[base.Step]:
        if start_step == training.total_steps:
            return

        def inputs() -> Iterator[dict[str, Tensor]]:
            """In the loader's thread: `Loop.inputs`, and the numbers that the torch loop computes on the host."""
            for step, batch in enumerate(self.inputs(training, batches, start_step), start_step):
                yield batch | {
                    "_learning_rate_factor": torch.tensor(training.schedule(step), dtype=torch.float32),
                    "_ema_weight": torch.tensor(1 - training.ema_decay(step), dtype=torch.float32),
                }

        with _on_device(inputs(), self.runtime) as device_batches:
            for step in range(start_step, training.total_steps):
                waiting_since = time.perf_counter()
                batch = next(device_batches)
                seconds = {"data_wait": time.perf_counter() - waiting_since}

                training.runner.train()
                compilations = _compilations()
                with torch_xla.compile(full_graph=True, name="train_step"):
                    tracing_since = time.perf_counter()
                    names, values = self.step(
                        training,
                        training.runner,
                        training.objective,
                        batch,
                        learning_rate_factor=batch.pop("_learning_rate_factor"),
                        ema_weight=batch.pop("_ema_weight"),
                        on_phase=on_phase,
                    )
                    # Gradients that the next step finds would make its graph another one.
                    training.optimizer.zero_grad(set_to_none=True)
                    values = _replicated(values)
                    seconds["trace"] = time.perf_counter() - tracing_since
                if _compilations() > compilations and step - start_step >= _COMPILED_BY:
                    logging.warning("Step %d compiled a new graph: what changed?", step + 1)
                learning_rate = training.schedule(step) * training.optimizer.param_groups[0]["base_lr"]
                yield base.Step(step + 1, names, values, learning_rate, training.noise_curriculum(step), seconds)

    def score(
        self, runner: base.Runner, function: base.Function, batches: Iterator[base.Rows], seed: int, staged: bool
    ) -> Iterator[tuple[np.ndarray, base.Rows]]:
        own: collections.deque[np.ndarray] = collections.deque()  # numbers of this host's examples, by batch

        def inputs() -> Iterator[dict[str, Tensor]]:
            for batch in batches:
                own.append(batch["_index"][batch["_mask"]])
                keys = prng.example_keys(seed, torch.tensor(batch["_index"]))
                yield {name: torch.tensor(array) for name, array in batch.items()} | {"_keys": keys}

        call = lambda batch, keys: runner(function, batch, keys)
        with _on_device(inputs(), self.runtime) as device_batches:
            for batch in device_batches:
                known = {name: batch.pop(name) for name in ("_mask", "_index")}
                keys = batch.pop("_keys")
                with self.autocast():
                    if staged:
                        known |= call(batch, keys)
                        values = self.compile(_copies)(known)
                    else:
                        scored = self.compile(lambda batch, keys, known: _copies(known | call(batch, keys)))
                        values = scored(batch, keys, known)
                on_host = torch_xla._XLAC._xla_get_cpu_tensors(list(values.values()))
                arrays = {name: value.numpy() for name, value in zip(values, on_host, strict=True)}
                # Every host sees all examples, and keeps its own.
                index = arrays.pop("_index")
                valid = arrays.pop("_mask") & np.isin(index, own.popleft())
                yield index[valid], {name: array[valid] for name, array in arrays.items()}

    def compile(self, function: Callable) -> Callable:
        """Traces a call as one graph and cuts it off at its end; tensors that it returns are replicated."""

        @functools.wraps(function)
        def replicated(*args):
            return tree_map_only(Tensor, _replicated, function(*args))

        return torch_xla.compile(replicated)

    def to_host(self, values: list[Tensor]) -> np.ndarray:
        return torch.stack(torch_xla._XLAC._xla_get_cpu_tensors(values)).numpy()  # without a graph

    def global_norm(self, tensors: Iterable[Tensor]) -> Tensor:
        return self.compile(torch.nn.utils.get_total_norm)([x.detach() for x in tensors])

    def checkpointing(self) -> dict[str, Callable]:
        return {"snapshot": _snapshot, "planner": _SavePlanner}

    def load_planner(self) -> SPMDLoadPlanner:
        return _LoadPlanner()

    def counters(self) -> dict[str, float]:
        """Returns torch_xla's counts of compilations, their seconds, and operations that fell back to the CPU; warns of
        these by name."""
        count, nanoseconds, _ = xla_metrics.metric_data("CompileTime") or (0, 0, [])
        fallbacks = {
            name.removeprefix("aten::"): xla_metrics.counter_value(name)
            for name in xla_metrics.counter_names()
            if name.startswith("aten::")
        }
        if fallbacks:
            names = ", ".join(f"{name} ({count} times)" for name, count in sorted(fallbacks.items()))
            logging.warning("XLA has no lowering of these, or waited for the device in them: %s", names)
        return {
            "xla/compilations": float(count),
            "xla/compile_seconds": nanoseconds / 1e9,
            "xla/fallbacks": float(sum(fallbacks.values())),
        }


def partition_spec(shape: torch.Size, fsdp: int) -> tuple[str | None, ...]:
    """Returns the mesh axis that each dimension of a parameter is sharded over: "fsdp" for the largest dimension that
    it divides, None for the others."""
    spec = [None] * len(shape)
    dims = [i for i, size in enumerate(shape) if size % fsdp == 0]
    if fsdp > 1 and dims and shape.numel() >= _SMALLEST_SHARDED:
        spec[max(dims, key=lambda i: shape[i])] = "fsdp"
    return tuple(spec)


def _shard_by_example(module: nn.Module, args, output) -> None:
    """Shards what a block returns `[B, ...]` by example; left to itself XLA may follow the parameters' shardings."""
    del module, args
    mesh = xs.get_global_mesh()
    for tensor in output if isinstance(output, tuple) else (output,):
        if len(tensor) % mesh.size() == 0:  # samples may be fewer
            xs.mark_sharding(tensor, mesh, (("data", "fsdp"), *[None] * (tensor.ndim - 1)))


def _replicated(values: Tensor) -> Tensor:
    """Replicates a tensor on all devices: bringing it to the host then takes no exchange between hosts, which torch_xla
    would compile each time."""
    xs.mark_sharding(values, xs.get_global_mesh(), (None,) * values.ndim)
    return values


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values as new tensors without a sharding: some may be the batch's own."""
    return {name: x | False if x.dtype == torch.bool else x + 0 for name, x in tensors.items()}


def _compilations() -> int:
    return (xla_metrics.metric_data("CompileTime") or (0,))[0]


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
    """Moves `inputs` to the devices ahead of time: tensors `[B / processes, ...]` sharded by example, scalars
    replicated."""
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
        batches_per_execution=sys.maxsize,  # the loop cuts off the graphs, not the loader
    )

    def batches():
        yield from loader
        if feed.error is not None:
            raise feed.error

    try:
        yield batches()
    finally:
        if loader._parallel_loader is not None:  # None until the first batch is asked for
            loader._parallel_loader.close()


class _SavePlanner(SPMDSavePlanner):
    """torch_xla's, for meshes that replicate shards.

    It takes a second copy in one plan for one that another process writes as well, and then drops both.
    """

    def create_local_plan(self):
        plan = super().create_local_plan()
        first_copies = {}
        for item in plan.items:
            first_copies.setdefault(item.index, item)
        return dataclasses.replace(plan, items=list(first_copies.values()))


class _LoadPlanner(SPMDLoadPlanner):
    """torch_xla's, which aborts where a step that computes the shards has not ended."""

    def set_up_planner(self, *args, **kwargs) -> None:
        xm.wait_device_ops()
        super().set_up_planner(*args, **kwargs)


def _snapshot(state: dict[str, Any]) -> dict[str, Any]:
    """Returns this host's shards of a state, on the CPU."""
    xm.wait_device_ops()  # torch_xla does not wait for the step that computes them, but aborts
    return _sharded_cpu_state_dict(state)

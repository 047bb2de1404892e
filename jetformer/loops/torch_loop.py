"""The training loop in plain PyTorch, on CPUs, GPUs, and TPUs through torch_tpu.

What differs between types of devices is in `runtime.DEVICE_TYPES`. Code that names CUDA is for GPUs alone: streams,
pinned memory, graphs, Triton.

One process drives one device. torchrun starts several, and `train.mesh` lays them out: over the axis "data" each
process holds the whole model (DDP); over "fsdp" parameters, gradients and optimizer are sharded (FSDP2); over both each
group of "fsdp" processes shards them, and the groups are replicas. All processes share one batch: what a step computes
depends neither on their number nor on the mesh. Dimensions: B batch of a process.
"""

import collections
import contextlib
import inspect
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only
from torch.utils._triton import has_triton

from jetformer import prng
from jetformer.loops import base
from jetformer.models.mixture import MixtureHead, MultivariateHead
from jetformer.models.mixture_nll import Backend
from jetformer.runtime import DEVICE_TYPES, resolve_mesh

# Eager calls before `Graphed` captures a function: libraries initialize in them, and fewer do not pay for a graph.
CALLS_BEFORE_CAPTURE = 8


class TorchLoop(base.Loop):
    """DDP, FSDP2, torch.compile and CUDA graphs; see `base.Loop`."""

    def set_up(self, matmul_precision: str, cache_dir: str | None) -> None:
        del cache_dir
        torch.set_float32_matmul_precision(matmul_precision)
        self.shares = self.runtime.process_count
        self._compiler = DEVICE_TYPES[self.runtime.device.type].compiler

    def place(self, model: nn.Module, compile: str | None = None) -> base.Runner:
        runner = base.Runner(model, compile)
        blocks = [module for module in model.modules() if getattr(module, "is_block", False)]
        if compile is not None:
            _check_compiler(self.runtime.device)
            if compile == "blocks":
                for block in blocks:
                    block.compile(dynamic=False, backend=self._compiler)
            # A module that reaches its limit of graphs would otherwise train on without them.
            torch._dynamo.config.fail_on_recompile_limit_hit = True
        for module in model.modules():
            if isinstance(module, MixtureHead):
                module.backend = _head_backend(self.runtime.device, compile is not None)
                if compile == "step":  # traced into a graph, its work in place would become copies
                    module.forward = torch.compiler.disable(module.forward)
        sizes = resolve_mesh(self.mesh, self.runtime.device_count)
        if sizes["fsdp"] > 1:
            self._shard(runner, blocks, sizes)
        else:
            model.to(self.runtime.device)
        return runner

    def _shard(self, runner: base.Runner, blocks: list[nn.Module], sizes: dict[str, int]) -> None:
        mesh = init_device_mesh(self.runtime.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        if sizes["data"] == 1:
            mesh = mesh["fsdp"]
        # Parameters are gathered in their own dtype, and autocast casts what it casts in one process. So norms and
        # position embeddings are as exact as there. Inputs are not cast: the flow must stay invertible.
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        # Each call moves one module to the device and keeps its shard: the device never holds the whole model. A block
        # within a block comes first.
        for block in reversed(blocks):
            fully_shard(block, mesh=mesh, mp_policy=policy)
            if hasattr(block, "inverse"):
                register_fsdp_forward_method(block, "inverse")
        for module in runner.modules():
            if isinstance(module, MixtureHead | MultivariateHead):  # the largest single matrix
                fully_shard(module, mesh=mesh, mp_policy=policy)
                register_fsdp_forward_method(module, "logits")
        fully_shard(runner, mesh=mesh, mp_policy=policy)

    @torch.no_grad()
    def swap(self, model: nn.Module, ema: dict[str, Tensor]) -> None:
        # In place: FSDP2 keeps references to its tensors.
        for name, parameter in model.named_parameters():
            ours, theirs = self.local(parameter.detach()), self.local(ema[name])
            kept = ours.clone()
            ours.copy_(theirs)
            theirs.copy_(kept)

    @contextlib.contextmanager
    def gathered(self, runner: base.Runner) -> Iterator[None]:
        with _resharded(runner) as modules:
            for module in modules:
                module.set_reshard_after_forward(False, recurse=False)
                module.set_reshard_after_backward(False, recurse=False)  # of denoising
                module.unshard()
            yield

    def train_steps(
        self,
        training: base.Training,
        batches: Iterator[base.Rows],
        start_step: int = 0,
        on_phase: Callable[[str], None] = lambda name: None,
    ) -> Iterator[base.Step]:
        runner, score = training.runner, training.objective
        if runner.compiled == "step":
            score = torch.compile(score.__call__, dynamic=False, backend=self._compiler)
        if self.runtime.process_count > 1 and not isinstance(runner, FSDPModule):
            # All processes start with the same weights, from the seed or from one checkpoint, and buffers never change.
            # PyTorch 2.13 has renamed the argument, and warns of its old name.
            new, old = "forward_sync_buffers", "broadcast_buffers"
            sync = {new if new in inspect.signature(DistributedDataParallel).parameters else old: False}
            runner = DistributedDataParallel(runner, init_sync=False, gradient_as_bucket_view=True, **sync)

        device_batches = _on_device(self.inputs(training, batches, start_step), self.runtime.device)
        for step in range(start_step, training.total_steps):
            waiting_since = time.perf_counter()
            batch = next(device_batches)
            data_wait = time.perf_counter() - waiting_since
            on_phase("data")
            training.runner.train()
            names, values = self.step(
                training,
                runner,
                score,
                batch,
                learning_rate_factor=training.schedule(step),
                ema_weight=1 - training.ema_decay(step),
                on_phase=on_phase,
            )
            learning_rate = training.optimizer.param_groups[0]["lr"]
            noise_scale = training.noise_curriculum(step)
            yield base.Step(step + 1, names, values, learning_rate, noise_scale, {"data_wait": data_wait})

    def score(
        self, runner: base.Runner, function: base.Function, batches: Iterator[base.Rows], seed: int, staged: bool
    ) -> Iterator[tuple[np.ndarray, base.Rows]]:
        known: collections.deque[tuple[np.ndarray, np.ndarray]] = collections.deque()  # by batch

        def inputs() -> Iterator[dict[str, Tensor]]:
            for batch in batches:
                arrays = {name: torch.tensor(array) for name, array in batch.items()}
                index, valid = arrays.pop("_index"), arrays.pop("_mask")
                known.append((index.numpy(), valid.numpy()))
                yield arrays | {"_keys": prng.example_keys(seed, index)}

        with self.gathered(runner) if staged else _resharded(runner):
            for batch in _on_device(inputs(), self.runtime.device):
                keys = batch.pop("_keys")
                with _eager(runner), self.autocast():
                    values = runner(function, batch, keys)
                index, valid = known.popleft()
                # One wait for all: copies to pinned memory, which `non_blocking` allocates on a GPU, do not block.
                on_host = {name: x.to("cpu", non_blocking=x.is_cuda) for name, x in values.items()}
                if self.runtime.device.type == "cuda":
                    torch.cuda.current_stream(self.runtime.device).synchronize()
                yield index[valid], {name: x.numpy()[valid] for name, x in on_host.items()}

    def compile(self, function: Callable) -> Callable:
        """On a GPU that one process drives alone, replays a CUDA graph, see `Graphed`. Not with several processes,
        which have collectives in the function or beside it, and not with JETFORMER_CUDA_GRAPHS=0 in the environment."""
        wanted = os.environ.get("JETFORMER_CUDA_GRAPHS") != "0"
        if wanted and torch.cuda.is_available() and not dist.is_initialized():
            graphed = Graphed(function)
            return lambda *args: (graphed if args and args[0].is_cuda else function)(*args)
        return function

    def to_host(self, values: list[Tensor]) -> np.ndarray:
        return torch.stack(values).cpu().numpy()

    def global_norm(self, tensors: Iterable[Tensor]) -> Tensor:
        return self.whole(torch.nn.utils.get_total_norm([x.detach() for x in tensors]))

    def local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def sum_over_processes(self, tensor: Tensor) -> Tensor:
        if self.runtime.process_count > 1:
            dist.all_reduce(tensor)
        return tensor

    @contextlib.contextmanager
    def gradient_sync(self, runner: nn.Module, wanted: bool) -> Iterator[None]:
        if isinstance(runner, FSDPModule):
            runner.set_requires_gradient_sync(wanted)
            runner.set_is_last_backward(wanted)
            yield
        elif isinstance(runner, DistributedDataParallel) and not wanted:
            with runner.no_sync():
                yield
        else:
            yield


def _head_backend(device: torch.device, compile: bool) -> Backend:
    """Returns what computes the image head's likelihood: on a GPU Triton, which PyTorch for GPUs brings, unless
    JETFORMER_TRITON=0 is in the environment. On a CPU nothing compiled is as fast as chunks that fit its caches."""
    if device.type != "cuda":
        return "eager"
    if has_triton() and os.environ.get("JETFORMER_TRITON") != "0":
        return "triton"
    return "compiled" if compile else "eager"


def _check_compiler(device: torch.device) -> None:
    if device.type == "cuda":
        if not has_triton():
            raise ValueError("train.compile needs Triton on a GPU, and there is none: pip install triton, or unset it")
    elif device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise ValueError("train.compile needs a C++ compiler on a CPU, and there is none: install g++, or unset it")


def _eager(runner: base.Runner) -> contextlib.AbstractContextManager:
    """Returns a context in which nothing is compiled, from its creation on. Evaluators have other shapes and modes than
    training, and would use up the graphs that torch.compile keeps for a module."""
    return contextlib.nullcontext() if runner.compiled is None else torch.compiler.set_stance("force_eager")


@contextlib.contextmanager
def _resharded(runner: base.Runner) -> Iterator[list[FSDPModule]]:
    """Reshards all FSDP modules on exit, also after an error; yields these modules.

    Without it the root stays gathered until a backward pass, and after an error any module may be. Later code, such as
    swapping the moving average back, expects sharded parameters.
    """
    modules = [module for module in runner.modules() if isinstance(module, FSDPModule)]
    try:
        yield modules
    finally:
        for module in modules:
            module.set_reshard_after_forward(True, recurse=False)  # also where a forward pass failed
            module.reshard()
            module.set_reshard_after_forward(module is not runner, recurse=False)
            module.set_reshard_after_backward(True, recurse=False)


def _on_device(batches: Iterator[dict[str, Tensor]], device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Yields batches on the device, not cast: images stay uint8. A side stream copies each to a GPU while the step
    before it computes."""
    if device.type != "cuda":
        yield from ({name: tensor.to(device) for name, tensor in batch.items()} for batch in batches)
        return
    side = torch.cuda.Stream(device)

    def copied() -> dict[str, Tensor] | None:
        with torch.cuda.stream(side):
            if (batch := next(batches, None)) is None:
                return None
            # From pinned memory a copy does not block the host.
            return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()}

    following = copied()
    while following is not None:
        current = torch.cuda.current_stream(device)
        current.wait_stream(side)
        batch = following
        for tensor in batch.values():
            tensor.record_stream(current)  # allocated on the other stream, which must not reuse its memory too early
        following = copied()
        yield batch


class Graphed:
    """Captures a function of tensors as a CUDA graph when it is called again and again, and replays it from then on:
    in decoding, the host takes longer to launch many small kernels than the GPU to run them.

    The function is called with tensors of the same shapes each time, does not read their values on the host, and
    changes in place what it keeps from call to call. Arguments are copied into the graph's memory, results out of it.
    All calls are made within one autocast context: its cached bfloat16 weights are part of the graph.
    """

    def __init__(self, function: Callable):
        self._function, self._calls, self._graph = function, 0, None

    def __call__(self, *args: Tensor):
        self._calls += 1
        if self._calls <= CALLS_BEFORE_CAPTURE:
            return self._function(*args)
        if self._graph is None:
            self._capture(args)
        for kept, given in zip(self._args, args, strict=True):
            kept.copy_(given)
        self._graph.replay()
        return tree_map_only(Tensor, Tensor.clone, self._results)

    def _capture(self, args: tuple[Tensor, ...]) -> None:
        self._args, graph = [x.clone() for x in args], torch.cuda.CUDAGraph()
        # Other threads, which write checkpoints, may wait for the device at the same time.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._results = self._function(*self._args)
        self._graph = graph

"""The training loop in plain PyTorch, on CPUs and GPUs. Every step of it is here to be read.

One process drives one device. Several, started by torchrun, are laid out as `train.mesh` says: over the axis "data"
each holds the whole model (DDP), over "fsdp" parameters, gradients and optimizer are cut up (FSDP2); over both they are
cut up within a group, and every group holds them. They see one batch: what a step computes depends neither on how many
processes share it, nor on how. Dimensions: B batch of a process.
"""

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

from jetformer import objectives, optim, prng
from jetformer.loops import steps
from jetformer.models.decoder import DecoderBlock
from jetformer.models.jet import Coupling
from jetformer.models.mixture import MixtureHead, MultivariateHead
from jetformer.runtime import Runtime, derive_seed, resolve_mesh


def set_up(mesh: dict[str, int] | None, cache_dir: str | None, matmul_precision: str) -> None:
    """Sets what products of float32 are computed in; see `train.matmul_precision`."""
    del mesh, cache_dir
    torch.set_float32_matmul_precision(matmul_precision)


def place(
    model: nn.Module,
    runtime: Runtime,
    *,
    mesh: dict[str, int] | None,
    compile: str | None,
    autocast_dtype: str | None,
) -> steps.Runner:
    """The model on its device, cut up over the axis "fsdp" of the mesh, and compiled.

    Args:
      model: the model, on the CPU.
      runtime: where to.
      mesh: see `runtime.resolve_mesh`.
      compile: None, "blocks" or "step"; see `train.compile`.
      autocast_dtype: see `autocast`; blocks that are cut up are gathered in it.

    Raises:
      ValueError: if it is to be compiled and what torch.compile needs is missing.
    """
    model.to(runtime.device)
    runner = steps.Runner(model)
    blocks = [module for module in model.modules() if isinstance(module, DecoderBlock | Coupling)]
    if compile is not None:
        _check_compiler(runtime.device)
        for module in model.modules():
            if isinstance(module, MixtureHead):
                module.compiled = True
        if compile == "blocks":
            for block in blocks:
                block.compile(dynamic=False)
        else:
            runner.compiles = True
    sizes = resolve_mesh(mesh, runtime.device_count)
    if sizes["fsdp"] > 1:
        device_mesh = init_device_mesh(runtime.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        if sizes["data"] == 1:
            device_mesh = device_mesh["fsdp"]
        gathered_in = None if autocast_dtype is None else getattr(torch, autocast_dtype)
        # Autocast says what is multiplied in it; inputs stay as they are, for the flow is to be inverted.
        block_policy = MixedPrecisionPolicy(gathered_in, torch.float32, cast_forward_inputs=False)
        exact_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        for block in blocks:
            fully_shard(block, mesh=device_mesh, mp_policy=block_policy)
            if isinstance(block, Coupling):
                register_fsdp_forward_method(block, "inverse")
        for module in model.modules():
            if isinstance(module, MixtureHead | MultivariateHead):  # the largest single matrix
                fully_shard(module, mesh=device_mesh, mp_policy=exact_policy)
                register_fsdp_forward_method(module, "logits")
        fully_shard(runner, mesh=device_mesh, mp_policy=exact_policy)
    return runner


def _check_compiler(device: torch.device) -> None:
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ValueError("train.compile needs Triton on a GPU, and there is none: pip install triton, or unset it")
    elif not (shutil.which("g++") or shutil.which("clang++")):
        raise ValueError("train.compile needs a C++ compiler on a CPU, and there is none: install g++, or unset it")


def place_state(tensors: Iterable[Tensor]) -> None:
    """What belongs to parameters is where these are already."""
    del tensors


@torch.no_grad()
def exchange(model: nn.Module, ema: dict[str, Tensor]) -> None:
    """Exchanges the parameters' values and `ema`'s. (In place: FSDP2 would not notice another tensor.)"""
    for name, parameter in model.named_parameters():
        ours, theirs = local(parameter.detach()), local(ema[name])
        kept = ours.clone()
        ours.copy_(theirs)
        theirs.copy_(kept)


@contextlib.contextmanager
def _resharded(runner: steps.Runner) -> Iterator[list[FSDPModule]]:
    """Leaves to every process its part of the parameters when the context ends, wherever a forward pass has: the root
    waits with that for a backward pass, and after an error any may be gathered. What comes next, as the giving back of
    the moving average, takes them as parts. Gives the modules that FSDP2 cuts up."""
    parts = [module for module in runner.modules() if isinstance(module, FSDPModule)]
    try:
        yield parts
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)  # or one that is in its forward pass would not
            part.reshard()
            part.set_reshard_after_forward(part is not runner, recurse=False)


@contextlib.contextmanager
def gathered(runner: steps.Runner) -> Iterator[None]:
    """While the context lasts every process holds all parameters: decoding uses them at each of its many steps."""
    with _resharded(runner) as parts:
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        yield


# So often a function runs as it is: by then libraries and torch.compile have set up what they set up at first use, and
# what is called no more often is not worth a graph.
CALLS_BEFORE_CAPTURE = 8


class Graphed:
    """A function of tensors that on a GPU is captured as a CUDA graph when it is called again and again, and replayed
    from then on: of decoding a token, the host's launches of many small kernels take longer than the kernels.

    The function is called with tensors of the same shapes each time, does not look at their values from the host, and
    changes in place what it keeps from call to call. Arguments are copied into the graph's memory, results out of it.
    All calls are made within one context of autocast: the weights that it keeps in bfloat16 are the graph's, too.
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
        # Other threads (which write checkpoints) may wait for the device meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._results = self._function(*self._args)
        self._graph = graph


def compile(function: Callable) -> Callable:
    """What decoding does again and again. One process alone on a GPU replays it, see `Graphed`; otherwise it stays as
    it is: with several there are collectives in it, or beside it. JETFORMER_CUDA_GRAPHS=0 in the environment turns this
    off."""
    wanted = os.environ.get("JETFORMER_CUDA_GRAPHS") != "0"
    if wanted and torch.cuda.is_available() and not dist.is_initialized():
        graphed = Graphed(function)
        return lambda *args: (graphed if args and args[0].is_cuda else function)(*args)
    return function


def to_host(values: list[Tensor]) -> np.ndarray:
    """Tensors of one shape `[...]` as one array `[N, ...]`; waits for the device."""
    return torch.stack(values).cpu().numpy()


def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all tensors together, on every process."""
    return _whole(torch.nn.utils.get_total_norm([x.detach() for x in tensors]))


def checkpointing() -> dict[str, Callable]:
    """Nothing but what `Checkpointer` does by itself."""
    return {}


def load_planner() -> None:
    """As DCP does it."""
    return None


def counters() -> dict[str, float]:
    """Nothing is counted."""
    return {}


def local(tensor: Tensor) -> Tensor:
    """This process's part of a parameter, which shares memory with it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _sum_over_processes(tensor: Tensor, runtime: Runtime) -> Tensor:
    if runtime.process_count > 1:
        dist.all_reduce(tensor)
    return tensor


def to_device(batch: dict[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Arrays to tensors on the device, as they are: an image of 8 bits a value travels as such."""
    # A copy: the arrays are views of memory that TensorFlow takes back.
    tensors = {name: torch.tensor(array) for name, array in batch.items()}
    if device.type == "cuda":  # from pinned memory a copy does not hold up the host
        tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


def on_device(batches: Iterator[dict[str, np.ndarray]], device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Batches on the device; to a GPU one ahead, by a stream of its own, while the last step still computes."""
    if device.type != "cuda":
        yield from (to_device(batch, device) for batch in batches)
        return
    side = torch.cuda.Stream(device)

    def copied() -> dict[str, Tensor] | None:
        with torch.cuda.stream(side):
            return None if (batch := next(batches, None)) is None else to_device(batch, device)

    following = copied()
    while following is not None:
        current = torch.cuda.current_stream(device)
        current.wait_stream(side)
        batch = following
        for tensor in batch.values():
            tensor.record_stream(current)  # made on the other stream, which is not to reuse its memory too early
        following = copied()
        yield batch


def autocast(device: torch.device, dtype: str | None) -> contextlib.AbstractContextManager:
    """What the forward pass runs under: "bfloat16" for products in it, None for the parameters' own precision."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, getattr(torch, dtype))


def _scorer(runner: steps.Runner, objective) -> Callable:
    return torch.compile(objective.__call__, dynamic=False) if runner.compiles else objective


@contextlib.contextmanager
def _without_reduction(runner: nn.Module, wanted: bool) -> Iterator[None]:
    """Leaves gradients where they are while the context lasts, if `wanted`: the last part of a batch reduces them."""
    if isinstance(runner, FSDPModule):
        runner.set_requires_gradient_sync(not wanted)
        runner.set_is_last_backward(not wanted)
        yield
    elif isinstance(runner, DistributedDataParallel) and wanted:
        with runner.no_sync():
            yield
    else:
        yield


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
    """Trains from `start_step` to `total_steps`, yielding after every update.

    The draws of a step depend on (seed, step, example) alone, so a resumed run is the same run. Nothing here waits for
    the device.

    Args:
      runner: the model, as `place` returns it.
      objective: see `jetformer.objectives`.
      optimizer: its groups have a `base_lr`, see `optim.make_optimizer`.
      ema: parameters by name, moved along in place; None for none.
      batches: local batches from `start_step` on.
      schedule: learning-rate factor by step.
      noise_curriculum: RGB noise by step.
      grad_clip_norm: largest global norm of the gradients; None for no clipping.
      grad_accum_steps: into how many parts a batch is cut; their gradients add up to the batch's.
      ema_decay: of `ema`, by step.
      autocast_dtype: see `autocast`.
      on_phase: called with what of a step was just done: "data", "forward", "backward" (both for each part of a
        batch), "optimizer".
    """
    device, model = runtime.device, runner.model
    score = _scorer(runner, objective)
    if runtime.process_count > 1 and not isinstance(runner, FSDPModule):
        # Every process has the same weights to begin with: they come from the seed, or from one checkpoint.
        # Buffers never change. PyTorch 2.13 has renamed the argument, and warns of its old name.
        new, old = "forward_sync_buffers", "broadcast_buffers"
        sync = {new if new in inspect.signature(DistributedDataParallel).parameters else old: False}
        runner = DistributedDataParallel(runner, init_sync=False, gradient_as_bucket_view=True, **sync)
    max_norm = float("inf") if grad_clip_norm is None else grad_clip_norm

    def inputs() -> Iterator[dict[str, np.ndarray]]:
        """Each step's batch, and the step's numbers: as tensors, or a compiled step would be compiled for each."""
        for step in range(start_step, total_steps):
            yield next(batches) | {"_noise_scale": np.float32(noise_curriculum(step))}

    device_batches = on_device(inputs(), device)
    for step in range(start_step, total_steps):
        waiting_since = time.perf_counter()
        batch = next(device_batches)
        data_wait = time.perf_counter() - waiting_since
        noise_scale = batch.pop("_noise_scale")
        on_phase("data")

        model.train()
        local_size = objectives.batch_size(batch)
        first = runtime.process_index * local_size
        examples = torch.arange(first, first + local_size, dtype=torch.int32, device=device)
        draws = objective.draw(model, batch, prng.example_keys(derive_seed(seed, step), examples), train=True)
        normalizers = objective.normalizers(batch, draws, train=True)
        counts = _sum_over_processes(torch.stack(list(normalizers.values())), runtime)
        normalizers = dict(zip(normalizers, counts, strict=True))

        optimizer.zero_grad(set_to_none=True)
        loss, sums = 0.0, None
        parts = zip(objectives.split(batch, grad_accum_steps), objectives.split(draws, grad_accum_steps), strict=True)
        for i, (part, part_draws) in enumerate(parts):
            with _without_reduction(runner, wanted=i + 1 < grad_accum_steps):
                with autocast(device, autocast_dtype):
                    part_loss, terms = runner(score, part, part_draws, noise_scale=noise_scale, normalizers=normalizers)
                on_phase("forward")
                # DDP and FSDP2 average the gradients of what are parts of one sum.
                (part_loss * runtime.process_count).backward()
                on_phase("backward")
            loss = loss + part_loss.detach()
            part_sums = objectives.sum_terms(terms)
            sums = part_sums if sums is None else objectives.add_sums(sums, part_sums)

        optim.set_learning_rate(optimizer, schedule(step))
        grad_norm = _whole(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm))
        optimizer.step()
        if ema is not None:
            optim.update_ema(ema, model, 1 - ema_decay(step))
        on_phase("optimizer")
        # All processes have the same norm: each adds its share of it. Loss and terms are theirs to add up.
        share = torch.full_like(loss, 1 / runtime.process_count)
        names, values = steps.pack({"loss": (loss, share), "grad_norm": (grad_norm * share, share), **sums})
        values = _sum_over_processes(values, runtime)
        learning_rate = optimizer.param_groups[0]["lr"]
        yield steps.Step(step + 1, names, values, learning_rate, noise_curriculum(step), {"data_wait": data_wait})


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
    """What a function gives for every example of `batches`, each of which counts once however many processes share
    them.

    Args:
      runner: the model, as `place` returns it.
      function: of the model, a batch and the examples' keys; gives tensors `[B, ...]` by name.
      batches: as many on every process, with a bool `_mask` `[B]` that is false where an example only fills up its
        batch, and the examples' numbers `_index` `[B]`.
      seed: of the examples' keys, which depend on it and their numbers: the same draws each time this is called.
      autocast_dtype: see `autocast`.
      staged: `function` decodes: it runs the model many times, and compiles its parts itself.
      to_rows: called with what each batch has given, arrays of its examples; what this returns is kept instead.
      each_batch: called after every batch.

    Returns:
      Arrays `[N, ...]` by name over the N examples of all processes in the order of their numbers, on every process.
    """
    runner.eval()
    call = torch.compile(function, dynamic=False) if runner.compiles and not staged else function
    parts = []
    with gathered(runner) if staged else _resharded(runner):
        for batch in on_device(batches, runtime.device):
            mask, index = batch.pop("_mask"), batch.pop("_index")
            with autocast(runtime.device, autocast_dtype):
                values = runner(call, batch, prng.example_keys(seed, index))
            valid = mask.cpu().numpy()
            rows = {name: value.cpu().numpy()[valid] for name, value in values.items()}
            parts.append({"_index": index.cpu().numpy()[valid], **to_rows(rows)})
            each_batch()
    return steps.gather(parts, runtime)

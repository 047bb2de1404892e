"""Measure an experiment on synthetic data: training steps, memory, the flow, and sampling.

    python -m jetformer.benchmark --gin_file=experiments/benchmark_cpu.gin
    python -m jetformer.benchmark --gin_file=experiments/benchmark_cpu.gin --json=/tmp/a.json
    python -m jetformer.benchmark --gin_file=experiments/benchmark_cpu.gin --compare=/tmp/a.json

A step is that of the training loop. Products of two matrices run in turn with the steps: machines differ and are
shared, so their ratio says more than seconds. --profile=DIR writes a trace for TensorBoard's profiler (pip install
torch-tb-profiler).
"""

import collections
import contextlib
import itertools
import json
import pathlib
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from absl import flags
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from jetformer import config, objectives, prng, program, runtime
from jetformer.experiment import Experiment
from jetformer.loops.base import Loop
from jetformer.models.jetformer import JetFormer
from jetformer.models.language_model import LanguageModel
from jetformer.models.mixture import MixtureHead
from jetformer.sampling import decode
from jetformer.sampling.guidance import Guidance
from jetformer.sampling.jacobi import Jacobi
from jetformer.state import State, build, make_loop

flags.adopt_module_key_flags(program)
flags.DEFINE_integer("steps", 20, "Number of steps to measure.", lower_bound=1)
flags.DEFINE_integer("warmup", 3, "Number of steps to run before.", lower_bound=1)
flags.DEFINE_integer("samples", 8, "Number of images or texts to sample at a time; 0 for none.", lower_bound=0)
flags.DEFINE_string("json", None, "File to write the measurements to.")
flags.DEFINE_string("compare", None, "File of --json to compare with.")
flags.DEFINE_string("profile", None, "Directory to write a trace of three steps to.")
flags.DEFINE_string("plan", None, "Devices to compute memory and time of a step for, such as h100x8; measures nothing.")
FLAGS = flags.FLAGS

FORMAT = 3  # of the JSON file; files of another format are not compared with
PHASES = ("data", "forward", "backward", "optimizer")


def linear_parameters(model: nn.Module) -> int:
    """Returns the number of weights of all linear layers and convolutions."""
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d))


def count_flops(experiment: Experiment, batch: dict[str, np.ndarray]) -> int:
    """Counts the floating-point operations of the matrix products and convolutions of a training step.

    It counts on the meta device, which computes shapes only. Attention counts all pairs of a query and a key, masked
    ones too. Recomputation by activation checkpointing does not count.

    Args:
      experiment: its model and objective.
      batch: arrays `[B, ...]` by name.
    """
    with torch.device("meta"):
        model = experiment.model()
    # The image head accumulates products in place, which FlopCounterMode does not know.
    in_place = {torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with torch.device("meta"), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        tensors = {name: torch.tensor(array, device="meta") for name, array in batch.items()}
        keys = torch.empty(objectives.batch_size(batch), 2, dtype=torch.int32)
        draws = experiment.objective.draw(model, tensors, keys, train=True)
        loss, _ = experiment.objective(model, tensors, draws, noise_scale=experiment.noise_scale)
        loss.backward()
    return counter.get_total_flops()


def text_length_of(experiment: Experiment, model: nn.Module) -> int:
    """Returns the number of tokens of a text; 0 for a model that reads none."""
    return experiment.data.text_length() if hasattr(model, "first_special") else 0


def tokens_of(model: nn.Module, text_length: int) -> int | None:
    """Returns the number of image tokens of an image, or else of tokens of a text; None if the model does not tell."""
    patchify = getattr(getattr(model, "flow", model), "patchify", None)
    return getattr(model, "num_image_tokens", None) or text_length or getattr(patchify, "num_tokens", None)


def synthetic_batch(model: nn.Module, batch_size: int, text_length: int) -> dict[str, np.ndarray]:
    """Returns a random batch.

    Args:
      model: `image_shape` (H, W, C) says that it reads images, `num_labels` that it reads labels, `first_special` that
        it reads texts.
      batch_size: B.
      text_length: T; 0 for no texts.

    Returns:
      image uint8 `[B, H, W, C]`; label int32 `[B]`; text int32, text_loss bool and, of several tokens, text_mask bool
      `[B, T]`.
    """
    rng = np.random.default_rng(0)
    batch = {}
    if hasattr(model, "image_shape"):
        batch["image"] = rng.integers(0, 256, (batch_size, *model.image_shape), dtype=np.uint8)
    if hasattr(model, "num_labels"):
        batch["label"] = rng.integers(0, model.num_labels, batch_size, dtype=np.int32)
    if text_length:
        shape = batch_size, text_length
        batch["text"] = rng.integers(0, model.first_special(text_length), shape, dtype=np.int32)
        batch["text_loss"] = np.ones(shape, bool)
        if text_length > 1:  # class labels need no mask
            batch["text_mask"] = np.ones(shape, bool)
    return batch


class Clock:
    """Measures seconds by name; waits for the device at each call."""

    def __init__(self, synchronize: Callable[[], None]):
        self._synchronize = synchronize
        self.reset()

    def reset(self) -> None:
        self.seconds = collections.Counter()
        self._last = self._now()

    def __call__(self, name: str) -> None:
        """Adds the time since the last call to `name`."""
        now = self._now()
        self.seconds[name] += now - self._last
        self._last = now

    def _now(self) -> float:
        self._synchronize()
        return time.perf_counter()


class Machine:
    """Measures time and memory of a device.

    Its product of two matrices is large enough for the device's full rate, and has the dtype that the model multiplies
    in (on a CPU float32).
    """

    def __init__(self, where: runtime.Runtime, loop: Loop, autocast_dtype: str | None):
        self.runtime = where
        accelerator = where.device.type == "cuda" or _on_tpu(where)
        self.matmul_size = 8192 if accelerator else 2048
        self.dtype = getattr(torch, autocast_dtype) if accelerator and autocast_dtype else torch.float32
        self._matrix = torch.ones(self.matmul_size, self.matmul_size, dtype=self.dtype, device=where.device)
        self._multiply = loop.compile(lambda: self._matrix @ self._matrix)
        self.time_matmul()

    def synchronize(self) -> None:
        """Waits for the device."""
        device = self.runtime.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "tpu":
            torch.accelerator.synchronize(device)
        elif device.type == "xla":
            import torch_xla.core.xla_model as xm

            xm.wait_device_ops()

    def time(self, function: Callable[[], object]) -> float:
        """Returns the seconds that a call takes, on the host and on the device."""
        self.synchronize()
        start = time.perf_counter()
        function()
        self.synchronize()
        return time.perf_counter() - start

    def time_matmul(self) -> float:
        """Returns the seconds of the product."""
        return self.time(self._multiply)

    def peak_memory(self) -> int:
        """Returns the peak memory in bytes: of this process's tensors on a GPU, elsewhere of the process."""
        if self.runtime.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.runtime.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _on_tpu(where: runtime.Runtime) -> bool:
    if where.device.type != "xla":
        return where.device.type == "tpu"
    import torch_xla.runtime as xr

    return xr.device_type() == "TPU"


def measure(
    experiment: Experiment, where: runtime.Runtime, *, steps: int, warmup: int, samples: int, profile: str | None
) -> dict:
    """Measures an experiment.

    Args:
      experiment: what to measure.
      where: the device. Of several processes each measures itself.
      steps: number of training steps to measure.
      warmup: number of training steps to run before.
      samples: number of images or texts to sample at a time; 0 for none.
      profile: directory for a trace of three more steps; None for none.

    Returns:
      A dictionary for JSON. `seconds` has an entry for each step: `step`, as in training; `matmul`, in turn with the
      steps; and the phases `data`, `forward`, `backward`, `optimizer`, of other steps that wait for the device after
      each phase. `flops` is of the steps of all processes, see `count_flops`; `bytes` is of this process.
    """
    # After `runtime.initialize`: it brings TensorFlow, before which torch_xla has to be imported.
    from jetformer.trainer import training_of

    experiment.check_mesh(where)
    loop = make_loop(experiment, where)
    machine = Machine(where, loop, experiment.autocast)
    state = build(experiment, loop)
    model = state.model
    text_length = text_length_of(experiment, model)
    whole = synthetic_batch(model, experiment.batch_size, text_length)
    size = experiment.batch_size // where.process_count
    local = {name: array[where.process_index * size :][:size] for name, array in whole.items()}
    clock = Clock(machine.synchronize)

    def training(count: int, on_phase: Callable[[str], None]) -> Iterator:
        training = training_of(experiment, state, count, schedule=lambda step: 1e-3)
        return loop.train_steps(training, itertools.repeat(local), on_phase=on_phase)

    seconds = collections.defaultdict(list)
    with contextlib.closing(training(warmup + steps, lambda name: None)) as stepping:
        start = time.perf_counter()
        for number in range(warmup + steps):
            matmul = machine.time_matmul()
            step = machine.time(lambda: next(stepping))
            if number == 0:
                first_step = time.perf_counter() - start
            if number >= warmup:
                seconds["matmul"].append(matmul)
                seconds["step"].append(step)
    peak = machine.peak_memory()
    if where.device.type != "xla":  # there a step is one graph
        with contextlib.closing(training(steps + 1, clock)) as stepping:
            for number in range(steps + 1):
                clock.reset()
                next(stepping)
                if number > 0:  # not the first, which sets up
                    for name in PHASES:
                        seconds[name].append(clock.seconds[name])
    if profile is not None:
        with contextlib.closing(training(3, lambda name: None)) as stepping:
            _profile(stepping, profile, machine)

    results = {
        "format": FORMAT,
        "on": where.describe(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dtype": str(machine.dtype).removeprefix("torch."),
        "processes": where.process_count,
        "batch_size": experiment.batch_size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "linear_parameters": linear_parameters(model),
        "examples": "images" if "image" in whole else "texts",
        "flops": count_flops(experiment, whole),
        "matmul_size": machine.matmul_size,
        "seconds": dict(seconds),
        "first_step_seconds": first_step,
        "counters": loop.counters(),
        "bytes": {"peak": peak} | _bytes_of(state, experiment, local),
    }
    if (tokens := tokens_of(model, text_length)) is not None:
        results["tokens"] = experiment.batch_size * tokens
    model.eval()
    with torch.no_grad(), loop.gathered(state.runner):
        if isinstance(model, JetFormer):
            if model.flow is not None:
                shape = (*model.patches.grid, model.patches.dim)
                results["flow"] = _measure_flow(model.flow, shape, size, machine, loop, steps, warmup)
        elif hasattr(model, "inverse"):
            results["flow"] = _measure_flow(model, model.image_shape, size, machine, loop, steps, warmup)
        if samples and isinstance(model, JetFormer | LanguageModel):
            results["sampling"] = _measure_sampling(model, text_length, samples, machine, loop)
    return results


def _profile(stepping: Iterator, directory: str, machine: Machine) -> None:
    if machine.runtime.device.type == "xla":
        import torch_xla.debug.profiler as xp

        xp.start_trace(directory)
        collections.deque(stepping, maxlen=0)
        machine.synchronize()
        xp.stop_trace()
        return
    writes = torch.profiler.tensorboard_trace_handler(directory)
    with torch.profiler.profile(on_trace_ready=writes, profile_memory=True):
        collections.deque(stepping, maxlen=0)
        machine.synchronize()


def _bytes_of(state: State, experiment: Experiment, batch: dict[str, np.ndarray]) -> dict[str, int]:
    """Returns the bytes that this process keeps: parameters, gradients, optimizer, moving average, and (not under XLA,
    which decides itself) what the forward pass saves for the backward pass."""
    loop, kept = state.loop, state.bytes()
    device = loop.runtime.device
    if device.type == "xla":
        return kept
    saved: dict[int, int] = {}
    own = {loop.local(p).untyped_storage().data_ptr() for p in state.model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = loop.local(tensor).untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    part = {name: array[: len(array) // experiment.grad_accum_steps] for name, array in batch.items()}
    part = {name: torch.tensor(array).to(device) for name, array in part.items()}
    keys = prng.example_keys(0, torch.arange(objectives.batch_size(part), dtype=torch.int32, device=device))
    draws = experiment.objective.draw(state.model, part, keys, train=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), loop.autocast():
        loss, _ = state.runner(experiment.objective, part, draws, noise_scale=experiment.noise_scale)
    loss.backward()  # FSDP2 expects it
    state.optimizer.zero_grad()
    return kept | {"saved_activations": sum(saved.values())}


def _measure_flow(
    flow: nn.Module, shape: tuple[int, ...], batch_size: int, machine: Machine, loop: Loop, steps: int, warmup: int
) -> dict:
    """Measures the flow's two directions in turn, for a batch of inputs of a shape, without gradients.

    With `Jacobi` it also measures the sequential inverse, and counts the iterations of a segment in each block.
    """
    x = torch.rand(batch_size, *shape, device=machine.runtime.device) * 2 - 1
    forward, inverse = loop.compile(lambda: flow(x)[0]), loop.compile(lambda: flow.inverse(x)[0])
    pairs = [(machine.time(forward), machine.time(inverse)) for _ in range(warmup + steps)][warmup:]
    forwards, inverses = map(list, zip(*pairs, strict=True))
    results = {"batch_size": batch_size, "forward_seconds": forwards, "inverse_seconds": inverses}
    blocks = [block for block in flow.modules() if isinstance(getattr(block, "inverse_method", None), Jacobi)]
    if not blocks:
        return results
    iterations = []

    def counting(block: nn.Module, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        tokens, logdet, counts, _ = method.solve(block, z, context)
        iterations.append(statistics.mean(counts))
        return tokens, logdet

    method = blocks[0].inverse_method  # all blocks have the one that the experiment binds
    for block in blocks:
        block.inverse_method = counting
    flow.inverse(x)
    for block in blocks:
        block.inverse_method = None
    sequential = loop.compile(lambda: flow.inverse(x)[0])
    seconds = [machine.time(sequential) for _ in range(warmup + steps)][warmup:]
    for block in blocks:
        block.inverse_method = method
    return results | {"jacobi_iterations": iterations, "sequential_inverse_seconds": seconds}


def _measure_sampling(
    model: JetFormer | LanguageModel, text_length: int, count: int, machine: Machine, loop: Loop
) -> dict:
    """Measures sampling `count` images or texts at once, five times, by guidance: token by token, and for images also
    with the flow's inverse and the likelihood."""
    device = machine.runtime.device
    keys = prng.example_keys(0, torch.arange(count, dtype=torch.int32)).to(device)
    results = {"count": count, "tokens": count * tokens_of(model, text_length)}

    def sample_texts() -> None:
        none = torch.empty(count, 0, dtype=torch.int64, device=device)
        # No token ends a text, so all have full length.
        lengths = {"max_length": text_length, "vocab_size": model.bos_id, "eos_id": model.bos_id}
        decode.sample_text(model, keys, text=none, compile=loop.compile, **lengths)

    if isinstance(model, LanguageModel):
        return results | {"seconds": {"none": {"tokens": _repeated(sample_texts, machine)}}}
    text = torch.zeros(count, text_length, dtype=torch.int64, device=device)
    results["seconds"] = {}
    for guidance in (Guidance(), Guidance("density", 1.0)):
        if guidance.on and not isinstance(model.image_head, MixtureHead):
            continue
        call = lambda sample, guidance=guidance: sample(model, text, keys, guidance=guidance, compile=loop.compile)
        results["seconds"][guidance.mode] = {
            "tokens": _repeated(lambda call=call: call(decode.sample_latents), machine),
            "images": _repeated(lambda call=call: call(decode.sample_images), machine),
        }
    return results


def _repeated(function: Callable[[], object], machine: Machine) -> list[float]:
    """Returns the seconds of five calls, after one that sets up."""
    function()
    return [machine.time(function) for _ in range(5)]


def metrics(results: dict) -> dict[str, float]:
    """Returns the values to compare between two measurements, by name."""
    median = {name: statistics.median(values) for name, values in results["seconds"].items()}
    rate = results["flops"] / median["step"]
    matmul_rate = 2 * results["matmul_size"] ** 3 / median["matmul"] * results["processes"]
    values = {f"{name} s": seconds for name, seconds in median.items()}
    values |= {
        f"{results['examples']}/s": results["batch_size"] / median["step"],
        "model GFLOP/s": rate / 1e9,
        "share of matmul": rate / matmul_rate,
        "peak GB": results["bytes"]["peak"] / 1e9,
    }
    if "tokens" in results:
        simple = 6 * results["linear_parameters"] * results["tokens"] / median["step"]
        values["6PT share of matmul"] = simple / matmul_rate
    if "flow" in results:
        flow = {name: statistics.median(results["flow"][f"{name}_seconds"]) for name in ("forward", "inverse")}
        values |= {f"flow {name} images/s": results["flow"]["batch_size"] / s for name, s in flow.items()}
        if "jacobi_iterations" in results["flow"]:
            values["Jacobi iterations"] = statistics.mean(results["flow"]["jacobi_iterations"])
            sequential = statistics.median(results["flow"]["sequential_inverse_seconds"])
            values["speed-up by Jacobi"] = sequential / flow["inverse"]
    if "sampling" in results:
        sampling = results["sampling"]
        for guidance, seconds in sampling["seconds"].items():
            how = "" if guidance == "none" else f", {guidance} guidance"
            values[f"sampled tokens/s{how}"] = sampling["tokens"] / statistics.median(seconds["tokens"])
            if "images" in seconds:
                values[f"sampled images/s{how}"] = sampling["count"] / statistics.median(seconds["images"])
    return values


def report(results: dict) -> str:
    """Returns a measurement as a table."""
    values, seconds = metrics(results), results["seconds"]

    def spread(name: str) -> str:
        low, median, high = (1e3 * s for s in (min(seconds[name]), values[f"{name} s"], max(seconds[name])))
        return f"{median:.1f} ms (median of {len(seconds[name])}; {low:.1f} to {high:.1f})"

    gigabytes = lambda count: f"{count / 1e9:.3f} GB"
    rows = {
        "on": f"{results['on']}, torch {results['torch']}, Python {results['python']}",
        "parameters": f"{results['parameters']:,}, {results['linear_parameters']:,} of them in matrices (P)",
        "batch": f"{results['batch_size']} {results['examples']}",
        "step": spread("step"),
        "first step": f"{results['first_step_seconds']:.1f} s",
    }
    rows |= {f"  {name}": spread(name) for name in PHASES if name in seconds}
    size = results["matmul_size"]
    rows |= {
        f"{results['examples']}/s": f"{values[results['examples'] + '/s']:.1f}",
        "model FLOPs": f"{results['flops'] / 1e9:.1f} GFLOP a step, {values['model GFLOP/s']:.0f} GFLOP/s",
        f"{size}³ product": f"{2 * size**3 / values['matmul s'] / 1e9:.0f} GFLOP/s in {results['dtype']}",
        "share": f"{values['share of matmul']:.2f} of the product's rate",
    }
    if "tokens" in results:
        rows["batch"] += f" with {results['tokens']:,} tokens (T)"
        rows["share"] += f"; {values['6PT share of matmul']:.2f} counting 6 · P · T only"
    if results["counters"]:
        counters = results["counters"]
        rows["compiled"] = f"{counters['xla/compilations']:.0f} graphs in {counters['xla/compile_seconds']:.1f} s"
    rows |= {f"memory, {name.replace('_', ' ')}": gigabytes(count) for name, count in results["bytes"].items()}
    for direction in ("forward", "inverse") if "flow" in results else ():
        median = statistics.median(results["flow"][f"{direction}_seconds"])
        rows[f"flow {direction}"] = f"{median * 1e3:.1f} ms, {values[f'flow {direction} images/s']:.1f} images/s"
    if "Jacobi iterations" in values:
        iterations = ", ".join(f"{x:.1f}" for x in results["flow"]["jacobi_iterations"])
        rows["Jacobi"] = f"{values['speed-up by Jacobi']:.2f} times as fast as token by token"
        rows["Jacobi"] += f"; iterations of a segment, by block: {iterations}"
    for guidance, taken in results["sampling"]["seconds"].items() if "sampling" in results else ():
        count, tokens = results["sampling"]["count"], results["sampling"]["tokens"]
        how = "sampling" if guidance == "none" else f"{guidance} guidance"
        median = statistics.median(taken["tokens"])
        rows[how] = f"{count} {results['examples']} at a time: {median:.3f} s, {tokens / median:.0f} tokens/s"
        if "images" in taken:
            median = statistics.median(taken["images"])
            rows[how] += f"; with the flow's inverse {median:.3f} s, {count / median:.2f} images/s"
    return _table(rows)


def compare(ours: dict, theirs: dict) -> str:
    """Returns the values of two measurements and their ratios as a table."""
    a, b = metrics(ours), metrics(theirs)
    rows = {"": f"{'this':>12} {'other':>12} {'ratio':>8}"}
    rows |= {name: f"{a[name]:12.4g} {b[name]:12.4g} {a[name] / b[name]:8.3f}" for name in a if name in b}
    return _table(rows)


def _table(rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"{name:>{width}}  {value}" for name, value in rows.items())


def main() -> None:
    if FLAGS.plan is not None:
        from jetformer import plan  # brings TensorFlow, before which torch_xla has to be imported

        device, count = plan.parse(FLAGS.plan)
        config.parse(FLAGS.gin_file, FLAGS.gin_bindings)
        experiment = config.call(Experiment)
        model = experiment.check_model()
        batches = [synthetic_batch(model, size, text_length_of(experiment, model)) for size in plan.SIZES]
        print(plan.report(FLAGS.plan, plan.plan(experiment, batches, device, count)))
        return
    theirs = None if FLAGS.compare is None else json.loads(pathlib.Path(FLAGS.compare).read_text())
    if theirs is not None and theirs.get("format") != FORMAT:
        raise ValueError(f"--compare={FLAGS.compare} has format {theirs.get('format')}, not {FORMAT}: measure again")
    where = runtime.initialize(FLAGS.device)
    config.parse(FLAGS.gin_file, FLAGS.gin_bindings)
    options = {"steps": FLAGS.steps, "warmup": FLAGS.warmup, "samples": FLAGS.samples, "profile": FLAGS.profile}
    results = measure(config.call(Experiment), where, **options)
    if where.process_index > 0:
        return
    if FLAGS.json is not None:
        pathlib.Path(FLAGS.json).write_text(json.dumps(results, indent=2))
    print(report(results))
    if theirs is not None:
        print(f"\ncompared with {FLAGS.compare}, on {theirs['on']}:\n{compare(results, theirs)}")


if __name__ == "__main__":
    program.run(main)

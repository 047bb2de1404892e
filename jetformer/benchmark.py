"""Measure an experiment on made-up data: its training step, where time and memory go, its flow, and sampling.

    python -m jetformer.benchmark --gin_file=experiments/benchmark_cpu.gin

The step is the training loop's own. Beside it, in the same process and in turn with it, runs a matrix product: machines
differ and are shared, a ratio says more than a time. `--json=FILE` keeps the figures, `--compare=FILE` sets them beside
those of another run, `--profile=DIR` writes a trace of some steps, for TensorBoard's profiler (pip install
torch-tb-profiler).
"""

import collections
import contextlib
import itertools
import json
import math
import pathlib
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from absl import app, flags
from torch import Tensor, nn

from jetformer import program, runtime

flags.adopt_module_key_flags(program)
flags.DEFINE_integer("steps", 20, "How many steps to measure.", lower_bound=1)
flags.DEFINE_integer("warmup", 3, "How many steps to run before.", lower_bound=1)
flags.DEFINE_integer("samples", 8, "How many images (or texts) to sample at a time; 0 for no sampling.", lower_bound=0)
flags.DEFINE_string("json", None, "A file to write the figures to.")
flags.DEFINE_string("compare", None, "A file that --json wrote: its figures are set beside these.")
flags.DEFINE_string("profile", None, "A directory to write a trace of three steps to.")
FLAGS = flags.FLAGS

FORMAT = 2  # of the figures' file; another one is not compared with
PHASES = ("data", "forward", "backward", "optimizer")


def linear_parameters(model: nn.Module) -> int:
    """How many parameters the weights of all linear layers and convolutions have."""
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d))


def model_flops(model: nn.Module, batch_size: int, text_length: int) -> int:
    """Floating-point operations of the matrix products of a training step, by formula.

    A forward pass has 2 · P · T for each linear layer of P weights that T tokens go through, and 4 · W · T · S for each
    attention of width W of T queries to S keys (masked ones too). The backward pass has twice as many. What activation
    checkpointing computes twice counts once.
    """
    from jetformer.models.decoder import Decoder
    from jetformer.models.jet import Jet
    from jetformer.models.jetformer import JetFormer
    from jetformer.models.labelled import LabelledFlow
    from jetformer.models.language_model import LanguageModel

    linear = lambda module, tokens: 2 * linear_parameters(module) * tokens
    attention = lambda width, tokens: 4 * width * tokens * tokens

    def of_flow(flow: Jet) -> int:
        if not isinstance(flow, Jet):
            return 0
        total = 0
        for coupling in flow.couplings:
            tokens, dnn = math.prod(coupling.grid), coupling.dnn
            total += linear(coupling, tokens)
            if hasattr(dnn, "vit"):
                total += len(dnn.vit.blocks) * attention(dnn.posemb.shape[-1], tokens)
        return total

    def of_labelled_flow(model: LabelledFlow) -> int:
        total = of_flow(model.flow)
        for coupling in model.flow.couplings:  # whose context is one token
            tokens, key_value = math.prod(coupling.grid), coupling.dnn.cross_attn.key_value
            total += linear(key_value, 1 - tokens) + 2 * key_value.out_features * tokens
        return total

    def of_decoder(decoder: Decoder, tokens: int) -> int:
        widths = (block.attn.num_heads * block.attn.head_dim for block in decoder.blocks)
        return linear(decoder, tokens) + sum(attention(width, tokens) for width in widths)

    def of_jetformer(model: JetFormer) -> int:
        image = model.num_image_tokens
        text = text_length * model.num_vocab_repeats
        sequence = image + text + (1 if model.boi_id is None else 2) - 1
        total = 0 if model.flow is None else of_flow(model.flow)
        total += of_decoder(model.decoder, sequence)
        total += linear(model.image_emb, image) + linear(model.image_head, image)
        return total + 2 * model.text_emb.weight.numel() * text_length

    def of_language_model(model: LanguageModel) -> int:
        return of_decoder(model.decoder, text_length) + linear(model.text_head, text_length)

    of_model = {Jet: of_flow, LabelledFlow: of_labelled_flow, JetFormer: of_jetformer, LanguageModel: of_language_model}
    return 3 * batch_size * of_model[type(model)](model)


def counted_flops(run, batch: dict[str, np.ndarray]) -> int:
    """What torch's FlopCounterMode counts in a training step, on the meta device, where nothing is computed."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = run.model()
    # The head adds up products in place.
    in_place = {torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with torch.device("meta"), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        tensors = {name: torch.tensor(array, device="meta") for name, array in batch.items()}
        draws = run.objective.draw(model, tensors, torch.empty(run.batch_size, 2, dtype=torch.int32), train=True)
        loss, _ = run.objective(model, tensors, draws, noise_scale=run.noise_scale)
        loss.backward()
    return counter.get_total_flops()


def text_length_of(run, model: nn.Module) -> int:
    """How many tokens the experiment's texts have; 0 for a flow alone."""
    return run.data.text_length() if hasattr(model, "bos_id") else 0


def synthetic_batch(model: nn.Module, batch_size: int, text_length: int) -> dict[str, np.ndarray]:
    """A random batch: images uint8 `[B, H, W, C]` and texts of T tokens, whichever of these the model reads."""
    rng = np.random.default_rng(0)
    batch = {}
    if hasattr(model, "image_shape"):
        batch["image"] = rng.integers(0, 256, (batch_size, *model.image_shape), dtype=np.uint8)
    if hasattr(model, "num_labels"):
        batch["label"] = rng.integers(0, model.num_labels, batch_size, dtype=np.int32)
    if text_length:
        shape = batch_size, text_length
        batch["text"] = rng.integers(0, model.bos_id, shape, dtype=np.int32)
        batch |= {name: np.ones(shape, bool) for name in ("text_mask", "text_loss")}
    return batch


class Clock:
    """Seconds by what they were spent on; waits for the device at every look."""

    def __init__(self, synchronize: Callable[[], None]):
        self._synchronize = synchronize
        self.reset()

    def reset(self) -> None:
        self.seconds = collections.Counter()
        self._last = self._now()

    def __call__(self, name: str) -> None:
        """What was done since the last look is `name`."""
        now = self._now()
        self.seconds[name] += now - self._last
        self._last = now

    def _now(self) -> float:
        self._synchronize()
        return time.perf_counter()


class Machine:
    """What is measured of a device, whichever it is: time, memory, and the rate of a product of two matrices, which are
    as large as it takes for the full rate, and of the dtype that the model multiplies in (on a CPU float32)."""

    def __init__(self, where: runtime.Runtime, loop, autocast_dtype: str | None):
        self.runtime = where
        accelerator = where.device.type == "cuda" or _on_tpu(where)
        self.matmul_size = 8192 if accelerator else 2048
        self.dtype = getattr(torch, autocast_dtype) if accelerator and autocast_dtype else torch.float32
        self._matrix = torch.ones(self.matmul_size, self.matmul_size, dtype=self.dtype, device=where.device)
        self._multiply = loop.compile(lambda: self._matrix @ self._matrix)
        self.time_matmul()

    def synchronize(self) -> None:
        """Waits until the device has done what it was given."""
        device = self.runtime.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "xla":
            import torch_xla.core.xla_model as xm

            xm.wait_device_ops()

    def time(self, function: Callable[[], object]) -> float:
        """Seconds that a call takes, with all that it makes the device do."""
        self.synchronize()
        start = time.perf_counter()
        function()
        self.synchronize()
        return time.perf_counter() - start

    def time_matmul(self) -> float:
        """Seconds that the product takes that everything is compared with."""
        return self.time(self._multiply)

    def peak_memory(self) -> int:
        """Bytes: of a GPU's memory by this process's tensors; elsewhere of the process."""
        if self.runtime.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.runtime.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _on_tpu(where: runtime.Runtime) -> bool:
    if where.device.type != "xla":
        return False
    import torch_xla.runtime as xr

    return xr.device_type() == "TPU"


def measure(run, where: runtime.Runtime, *, steps: int, warmup: int, samples: int, profile: str | None) -> dict:
    """Measures a `Experiment`.

    Args:
      run: the experiment.
      where: on which device; every process of several measures itself.
      steps, warmup: how many training steps to measure, and to run before.
      samples: how many images to sample at a time; 0: none.
      profile: a directory for a trace of three more steps; None: none.

    Returns:
      A dictionary for JSON. Seconds are lists with an entry for each step: step (of the loop as it is), matmul (in turn
      with them), and the phases data, forward, backward, optimizer (of other steps, which wait for the device after
      each). flops is of all processes' step, by `model_flops`; bytes are of this process.
    """
    from jetformer.state import build, make_loop
    from jetformer.trainer import training_of

    run.check_mesh(where)
    loop = make_loop(run, where)
    machine = Machine(where, loop, run.autocast)
    state = build(run, loop)
    model = state.model
    text_length = text_length_of(run, model)
    whole = synthetic_batch(model, run.batch_size, text_length)
    size = run.batch_size // where.process_count
    local = {name: array[where.process_index * size :][:size] for name, array in whole.items()}
    clock = Clock(machine.synchronize)

    def training(count: int, on_phase: Callable[[str], None]) -> Iterator:
        training = training_of(run, state, count, schedule=lambda step: 1e-3)
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
    if where.device.type != "xla":  # which runs a step as one graph
        with contextlib.closing(training(steps + 1, clock)) as stepping:
            for number in range(steps + 1):
                clock.reset()
                next(stepping)
                if number > 0:  # the first sets up
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
        "batch_size": run.batch_size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "linear_parameters": linear_parameters(model),
        "examples": "images" if "image" in whole else "texts",
        "tokens": run.batch_size * _num_tokens(model, text_length),
        "flops": model_flops(model, run.batch_size, text_length),
        "counted_flops": counted_flops(run, whole),
        "matmul_size": machine.matmul_size,
        "seconds": dict(seconds),
        "first_step_seconds": first_step,
        "counters": loop.counters(),
        "bytes": {"peak": peak} | _bytes_of(state, run, local, loop, where),
    }
    model.eval()
    flow = getattr(model, "flow", model if not text_length else None)
    with torch.no_grad(), loop.gathered(state.runner):
        if flow is not None:
            results["flow"] = _measure_flow(flow, size, machine, loop, steps, warmup)
        if samples and text_length:
            results["sampling"] = _measure_sampling(model, text_length, samples, machine, loop)
    return results


def _num_tokens(model: nn.Module, text_length: int) -> int:
    """T: image tokens of an image, or tokens of a text."""
    return getattr(model, "num_image_tokens", text_length) or getattr(model, "flow", model).patchify.num_tokens


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


def _bytes_of(state, run, batch: dict[str, np.ndarray], loop, where: runtime.Runtime) -> dict[str, int]:
    """What this process keeps, in bytes: parameters, gradients, optimizer, average, and what the forward pass saves
    for the backward pass (not under XLA, which decides itself)."""
    sizes = lambda tensors: sum(loop.local(x).nbytes for x in tensors)
    kept = {
        "parameters": sizes(state.model.parameters()),
        "gradients": sizes(p for p in state.model.parameters() if p.requires_grad),
        "optimizer": sizes(x for values in state.optimizer.state.values() for x in values.values()),
        "average": sizes(state.ema.values()) if state.ema else 0,
    }
    if where.device.type == "xla":
        return kept
    from jetformer import objectives, prng

    saved: dict[int, int] = {}
    own = {loop.local(p).untyped_storage().data_ptr() for p in state.model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = loop.local(tensor).untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    part = {name: array[: len(array) // run.grad_accum_steps] for name, array in batch.items()}
    part = {name: torch.tensor(array).to(where.device) for name, array in part.items()}
    keys = prng.example_keys(0, torch.arange(objectives.batch_size(part), dtype=torch.int32, device=where.device))
    draws = run.objective.draw(state.model, part, keys, train=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        loop.autocast(),
    ):
        loss, _ = state.runner(run.objective, part, draws, noise_scale=run.noise_scale)
    loss.backward()  # FSDP2 expects it
    state.optimizer.zero_grad()
    return kept | {"saved_activations": sum(saved.values())}


def _measure_flow(flow: nn.Module, batch_size: int, machine: Machine, loop, steps: int, warmup: int) -> dict:
    """Seconds of the flow's two directions, in turn, for a batch, without gradients."""
    x = torch.rand(batch_size, *flow.image_shape, device=machine.runtime.device) * 2 - 1
    forward, inverse = loop.compile(lambda: flow(x)[0]), loop.compile(lambda: flow.inverse(x)[0])
    pairs = [(machine.time(forward), machine.time(inverse)) for _ in range(warmup + steps)][warmup:]
    forwards, inverses = map(list, zip(*pairs, strict=True))
    return {"batch_size": batch_size, "forward_seconds": forwards, "inverse_seconds": inverses}


def _measure_sampling(model: nn.Module, text_length: int, count: int, machine: Machine, loop) -> dict:
    """Seconds of sampling `count` images or texts at once, five times, by guidance: token by token, and of images also
    with the flow's inverse and the likelihood."""
    from jetformer import prng
    from jetformer.models.mixture import MixtureHead
    from jetformer.sampling import decode
    from jetformer.sampling.guidance import Guidance

    device = machine.runtime.device
    keys = prng.example_keys(0, torch.arange(count, dtype=torch.int32)).to(device)
    results = {"count": count, "tokens": count * _num_tokens(model, text_length)}

    def of_texts() -> None:
        none = torch.empty(count, 0, dtype=torch.int64, device=device)
        # No token ends a text: all are of full length.
        lengths = {"max_length": text_length, "vocab_size": model.bos_id, "eos_id": model.bos_id}
        decode.sample_text(model, keys, text=none, compile=loop.compile, **lengths)

    if not hasattr(model, "image_shape"):
        return results | {"seconds": {"none": {"tokens": _repeated(of_texts, machine)}}}
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
    """Seconds of five calls, after one that sets up."""
    function()
    return [machine.time(function) for _ in range(5)]


def figures(results: dict) -> dict[str, float]:
    """What one would compare of two measurements, by name."""
    median = {name: statistics.median(values) for name, values in results["seconds"].items()}
    rate = results["flops"] / median["step"]
    matmul_rate = 2 * results["matmul_size"] ** 3 / median["matmul"] * results["processes"]
    simple = 6 * results["linear_parameters"] * results["tokens"] / median["step"]
    values = {f"{name} s": seconds for name, seconds in median.items()}
    values |= {
        f"{results['examples']}/s": results["batch_size"] / median["step"],
        "model GFLOP/s": rate / 1e9,
        "share of matmul": rate / matmul_rate,
        "6PT share of matmul": simple / matmul_rate,
        "peak GB": results["bytes"]["peak"] / 1e9,
    }
    if "flow" in results:
        flow = {name: statistics.median(results["flow"][f"{name}_seconds"]) for name in ("forward", "inverse")}
        values |= {f"flow {name} images/s": results["flow"]["batch_size"] / s for name, s in flow.items()}
    if "sampling" in results:
        sampling = results["sampling"]
        for guidance, seconds in sampling["seconds"].items():
            how = "" if guidance == "none" else f", {guidance} guidance"
            values[f"sampled tokens/s{how}"] = sampling["tokens"] / statistics.median(seconds["tokens"])
            if "images" in seconds:
                values[f"sampled images/s{how}"] = sampling["count"] / statistics.median(seconds["images"])
    return values


def report(results: dict) -> str:
    """The figures as a table for people."""
    values, seconds = figures(results), results["seconds"]

    def spread(name: str) -> str:
        low, median, high = (1e3 * s for s in (min(seconds[name]), values[f"{name} s"], max(seconds[name])))
        return f"{median:.1f} ms (median of {len(seconds[name])}; {low:.1f} to {high:.1f})"

    gigabytes = lambda count: f"{count / 1e9:.3f} GB"
    rows = {
        "on": f"{results['on']}, torch {results['torch']}, Python {results['python']}",
        "parameters": f"{results['parameters']:,}, {results['linear_parameters']:,} of them in matrices (P)",
        "batch": f"{results['batch_size']} {results['examples']}, {results['tokens']:,} tokens of theirs (T)",
        "step": spread("step"),
        "first step": f"{results['first_step_seconds']:.1f} s",
    }
    rows |= {f"  {name}": spread(name) for name in PHASES if name in seconds}
    size = results["matmul_size"]
    rows |= {
        f"{results['examples']}/s": f"{values[results['examples'] + '/s']:.1f}",
        "model FLOPs": f"{results['flops'] / 1e9:.1f} GFLOP a step ({results['counted_flops'] / 1e9:.1f} counted), "
        f"{values['model GFLOP/s']:.0f} GFLOP/s",
        f"{size}³ product": f"{2 * size**3 / values['matmul s'] / 1e9:.0f} GFLOP/s in {results['dtype']}",
        "share": f"{values['share of matmul']:.2f} of the product's rate; "
        f"{values['6PT share of matmul']:.2f} counting 6 · P · T only",
    }
    if results["counters"]:
        counters = results["counters"]
        rows["compiled"] = f"{counters['xla/compilations']:.0f} graphs in {counters['xla/compile_seconds']:.1f} s"
    rows |= {f"memory, {name.replace('_', ' ')}": gigabytes(count) for name, count in results["bytes"].items()}
    for direction in ("forward", "inverse") if "flow" in results else ():
        median = statistics.median(results["flow"][f"{direction}_seconds"])
        rows[f"flow {direction}"] = f"{median * 1e3:.1f} ms, {values[f'flow {direction} images/s']:.1f} images/s"
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
    """The figures of two measurements and their ratios, as a table."""
    a, b = figures(ours), figures(theirs)
    rows = {"": f"{'this':>12} {'other':>12} {'ratio':>8}"}
    rows |= {name: f"{a[name]:12.4g} {b[name]:12.4g} {a[name] / b[name]:8.3f}" for name in a if name in b}
    return _table(rows)


def _table(rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"{name:>{width}}  {value}" for name, value in rows.items())


def main(argv: list[str]) -> None:
    program.no_arguments(argv)
    with program.one_line_errors():
        theirs = None if FLAGS.compare is None else json.loads(pathlib.Path(FLAGS.compare).read_text())
        if theirs is not None and theirs.get("format") != FORMAT:
            raise ValueError(f"--compare={FLAGS.compare}: another version has written it; measure again")
        where = runtime.initialize(FLAGS.device)
        from jetformer import config
        from jetformer.experiment import Experiment

        config.parse(FLAGS.gin_file, FLAGS.gin_bindings)
        run = config.call(Experiment)
        results = measure(
            run, where, steps=FLAGS.steps, warmup=FLAGS.warmup, samples=FLAGS.samples, profile=FLAGS.profile
        )
        if where.process_index > 0:
            return
        if FLAGS.json is not None:
            pathlib.Path(FLAGS.json).write_text(json.dumps(results, indent=2))
        print(report(results))
        if theirs is not None:
            print(f"\nbeside {FLAGS.compare}, on {theirs['on']}:\n{compare(results, theirs)}")


if __name__ == "__main__":
    app.run(main)

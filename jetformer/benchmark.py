"""Measure the training step of an experiment, on made-up data.

    python -m jetformer.benchmark --gin_file=experiments/cpu_benchmark.gin

The step is the training loop's own. Beside it, in the same process and in turn with it, runs a product of two float32
matrices of 2048 × 2048: machines differ and are shared, the ratio says more than the time.
"""

import contextlib
import itertools
import platform
import statistics
import time

import numpy as np
import torch
from absl import app, flags
from torch import nn

from jetformer import program, runtime

flags.adopt_module_key_flags(program)
flags.DEFINE_integer("steps", 20, "How many steps to measure.", lower_bound=1)
flags.DEFINE_integer("warmup", 3, "How many steps to run before.", lower_bound=1)
FLAGS = flags.FLAGS

MATMUL_SIZE = 2048


def matmul_parameters(model: nn.Module) -> int:
    """How many parameters are multiplied with every token: the weights of all linear layers."""
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


def synthetic_batches(model: nn.Module, batch_size: int):
    """One random batch, for ever: images uint8 `[B, H, W, C]`, texts of one token."""
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (batch_size, *model.image_shape), dtype=np.uint8),
        "text": rng.integers(0, model.bos_id, (batch_size, 1), dtype=np.int32),
        "text_mask": np.ones((batch_size, 1), bool),
        "text_loss": np.ones((batch_size, 1), bool),
    }
    return itertools.repeat(batch)


def measure_matmul(device: torch.device) -> float:
    """Seconds that a float32 product of two 2048 × 2048 matrices takes; under XLA on the host's CPU by PyTorch."""
    a = torch.ones(MATMUL_SIZE, MATMUL_SIZE, device="cpu" if device.type == "xla" else device)
    _synchronize(device)
    start = time.perf_counter()
    a @ a
    _synchronize(device)
    return time.perf_counter() - start


def measure(run, machine: runtime.Runtime, steps: int, warmup: int) -> dict:
    """Times training steps of a `train.Run` and matrix products in turn.

    Returns:
      parameters, matmul_parameters, tokens (image tokens a step), flops (6 · matmul_parameters · tokens: a
      multiplication and an addition, forward once and backward twice), step_seconds and matmul_seconds (lists); under
      XLA also trace_seconds (list), compilations and compile_seconds, the number of graphs and the time for all.
    """
    from jetformer import train

    run.check_mesh(machine)
    device, loop = machine.device, train.loop_of(machine)
    loop.set_up(run.mesh, None)
    state = run.build_state(machine)
    model = state.model
    training = loop.train_steps(
        model=model,
        objective=run.objective,
        optimizer=state.optimizer,
        ema=state.ema,
        batches=synthetic_batches(model, run.batch_size),
        start_step=0,
        total_steps=steps + warmup,
        schedule=lambda step: 1e-3,
        noise_curriculum=lambda step: run.noise_scale,
        runtime=machine,
        seed=run.seed,
        grad_clip_norm=run.grad_clip_norm,
        grad_accum_steps=run.grad_accum_steps,
        ema_decay=run.ema_decay,
        autocast_dtype=run.autocast,
    )
    step_seconds, matmul_seconds, trace_seconds = [], [], []
    with contextlib.closing(training):
        for _ in range(steps + warmup):
            matmul_seconds.append(measure_matmul(device))
            start = time.perf_counter()
            step = next(training)
            loop.to_host([step.values])  # waits for the device
            step_seconds.append(time.perf_counter() - start)
            trace_seconds.append(step.seconds.get("trace", 0.0))
    counters = loop.counters()
    tokens = run.batch_size * model.num_image_tokens
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "matmul_parameters": matmul_parameters(model),
        "tokens": tokens,
        "flops": 6 * matmul_parameters(model) * tokens,
        "step_seconds": step_seconds[warmup:],
        "matmul_seconds": matmul_seconds[warmup:],
    } | (
        {
            "trace_seconds": trace_seconds[warmup:],
            "compilations": counters["xla/compilations"],
            "compile_seconds": counters["xla/compile_seconds"],
        }
        if counters
        else {}
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def report(run, machine: runtime.Runtime, results: dict) -> str:
    """The measurements as text."""
    step, matmul = (statistics.median(results[f"{name}_seconds"]) for name in ("step", "matmul"))
    fastest, slowest = (f(results["step_seconds"]) for f in (min, max))
    step_rate, matmul_rate = results["flops"] / step / 1e9, 2 * MATMUL_SIZE**3 / matmul / 1e9
    rows = {
        "on": f"{machine.describe()}, torch {torch.__version__}, Python {platform.python_version()}",
        "parameters": f"{results['parameters']:,}",
        "of them in matrices": f"{results['matmul_parameters']:,}",
        "image tokens a step": f"{results['tokens']:,}",
        "step": f"{step:.3f} s (median of {len(results['step_seconds'])}; {fastest:.3f} to {slowest:.3f})",
        "images/s": f"{run.batch_size / step:.1f}",
        "6 · matrices · tokens": f"{results['flops'] / 1e9:.1f} GFLOP a step, {step_rate:.0f} GFLOP/s",
        f"{MATMUL_SIZE}³ product": f"{matmul_rate:.0f} GFLOP/s",
        "ratio": f"{step_rate / matmul_rate:.2f}",
    }
    if "trace_seconds" in results:
        trace = statistics.median(results["trace_seconds"])
        rows |= {
            "tracing": f"{trace:.3f} s ({trace / step:.0%} of a step)",
            "compiling": f"{results['compilations']:.0f} graphs in {results['compile_seconds']:.1f} s",
        }
    width = max(map(len, rows))
    return "\n".join(f"{name:>{width}}  {value}" for name, value in rows.items())


def main(argv: list[str]) -> None:
    program.no_arguments(argv)
    with program.one_line_errors():
        machine = runtime.initialize(FLAGS.device)
        from jetformer import config, train

        config.parse(FLAGS.gin_file, FLAGS.gin_bindings)
        run = config.call(train.Run)
        results = measure(run, machine, FLAGS.steps, FLAGS.warmup)
    print(report(run, machine, results))


if __name__ == "__main__":
    app.run(main)

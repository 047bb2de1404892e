"""Measure the training step of an experiment, on made-up data.

    python -m jetformer.benchmark --gin_file=experiments/cpu_benchmark.gin

The step is the training loop's own. Beside it, in the same process and in turn with it, runs a product of two float32
matrices of 2048 × 2048: machines differ and are shared, the ratio says more than the time.
"""

import itertools
import platform
import statistics
import time

import numpy as np
import torch
from absl import app, flags
from torch import nn

from jetformer import config, runtime, train
from jetformer.loops import torch_loop

flags.adopt_module_key_flags(config)
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
    """Seconds that a float32 product of two 2048 × 2048 matrices takes."""
    a = torch.ones(MATMUL_SIZE, MATMUL_SIZE, device=device)
    _synchronize(device)
    start = time.perf_counter()
    a @ a
    _synchronize(device)
    return time.perf_counter() - start


def measure(run: train.Run, device: torch.device, steps: int, warmup: int) -> dict:
    """Times training steps and matrix products in turn.

    Returns:
      parameters, matmul_parameters, tokens (image tokens a step), flops (6 · matmul_parameters · tokens: a
      multiplication and an addition, forward once and backward twice), step_seconds and matmul_seconds (lists).
    """
    state = run.build_state(device)
    model = state.model
    loop = torch_loop.train_steps(
        model=model,
        objective=run.objective,
        optimizer=state.optimizer,
        ema=state.ema,
        batches=synthetic_batches(model, run.batch_size),
        start_step=0,
        total_steps=steps + warmup,
        schedule=lambda step: 1e-3,
        noise_curriculum=lambda step: run.noise_scale,
        device=device,
        seed=run.seed,
        process_index=0,
        grad_clip_norm=run.grad_clip_norm,
        grad_accum_steps=run.grad_accum_steps,
        ema_decay=run.ema_decay,
    )
    step_seconds, matmul_seconds = [], []
    for _ in range(steps + warmup):
        matmul_seconds.append(measure_matmul(device))
        start = time.perf_counter()
        next(loop)
        _synchronize(device)
        step_seconds.append(time.perf_counter() - start)
    tokens = run.batch_size * model.num_image_tokens
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "matmul_parameters": matmul_parameters(model),
        "tokens": tokens,
        "flops": 6 * matmul_parameters(model) * tokens,
        "step_seconds": step_seconds[warmup:],
        "matmul_seconds": matmul_seconds[warmup:],
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def report(run: train.Run, device: torch.device, results: dict) -> str:
    """The measurements as text."""
    step, matmul = (statistics.median(results[f"{name}_seconds"]) for name in ("step", "matmul"))
    fastest, slowest = (f(results["step_seconds"]) for f in (min, max))
    step_rate, matmul_rate = results["flops"] / step / 1e9, 2 * MATMUL_SIZE**3 / matmul / 1e9
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    rows = {
        "on": f"{where}, torch {torch.__version__}, Python {platform.python_version()}",
        "parameters": f"{results['parameters']:,}",
        "of them in matrices": f"{results['matmul_parameters']:,}",
        "image tokens a step": f"{results['tokens']:,}",
        "step": f"{step:.3f} s (median of {len(results['step_seconds'])}; {fastest:.3f} to {slowest:.3f})",
        "images/s": f"{run.batch_size / step:.1f}",
        "6 · matrices · tokens": f"{results['flops'] / 1e9:.1f} GFLOP a step, {step_rate:.0f} GFLOP/s",
        f"{MATMUL_SIZE}³ product": f"{matmul_rate:.0f} GFLOP/s",
        "ratio": f"{step_rate / matmul_rate:.2f}",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:>{width}}  {value}" for name, value in rows.items())


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    with config.one_line_errors():
        config.parse(FLAGS.gin_file, FLAGS.gin_bindings)
        run = config.call(train.Run)
        device = runtime.initialize(FLAGS.device).device
        results = measure(run, device, FLAGS.steps, FLAGS.warmup)
    print(report(run, device, results))


if __name__ == "__main__":
    app.run(main)

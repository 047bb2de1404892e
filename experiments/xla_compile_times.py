"""Measures what tracing and compiling a deep stack costs through torch_xla, unrolled and not.

    PJRT_DEVICE=CPU python experiments/xla_compile_times.py --depths=8,16,32

Runs forward and backward of a stack of decoder blocks, or of couplings, as one graph, in four ways:
  - unrolled: a Python loop over the blocks, as in the models;
  - scan: `torch_xla.experimental.scan` over stacked weights, with one body for all blocks;
  - scan_stacking: the same, with a weight for each block, stacked in every step as `scan_layers` does;
  - assume_pure: a loop over `torch_xla.experimental.assume_pure` of the block, traced once by JAX.

Runs each case in a process of its own and prints a row of a Markdown table:
  - trace: median seconds to build the graph of a compiled step;
  - compile: seconds in XLA's compiler, and the number of graphs in all steps (one is right);
  - first step: seconds of tracing, lowering, compilation and execution;
  - gradients: their largest difference from unrolled's, relative to each weight's largest, and "ok" up to 1e-4;
or the reason why the case did not run.
"""

import functools
import itertools
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from absl import app, flags
from torch.func import functional_call

from jetformer import runtime
from jetformer.models.decoder import DecoderBlock, rope_angles
from jetformer.models.initializers import init_weights
from jetformer.models.jet import Coupling, Predictor

flags.DEFINE_list("depths", ["8", "16", "32"], "Numbers of blocks.")
flags.DEFINE_list("stacks", ["decoder", "couplings"], "What is stacked.")
flags.DEFINE_list(
    "ways",
    ["unrolled", "scan", "scan_stacking", "assume_pure"],
    "How it is run; compared with unrolled, where that ran first.",
)
flags.DEFINE_integer("steps", 8, "Steps of each case; the first three do not count for the trace.", lower_bound=4)
flags.DEFINE_float("timeout", 200, "Seconds a case may take.")
flags.DEFINE_string("only", None, "STACK,WAY,DEPTH,FILE: run this case in this process and write what comes of it.")
FLAGS = flags.FLAGS

BATCH, TOKENS, WIDTH, HEADS = 4, 16, 64, 4
TOLERANCE = 1e-4


def build(stack: str, depth: int):
    """Blocks, what they all take besides their input, and how to call one: input and sum so far to the next ones."""
    if stack == "decoder":
        sizes = (WIDTH, 4 * WIDTH, HEADS, 1, WIDTH // HEADS)
        make = lambda: DecoderBlock(*sizes, dropout=0.0, gelu="tanh", activated="gate")
        shared = rope_angles(torch.arange(TOKENS).expand(BATCH, -1), WIDTH // HEADS)
        call = lambda block, x, total, *angles: (block(x, None, angles), total)
    else:
        predictor = lambda: Predictor(TOKENS, WIDTH // 2, 1, WIDTH, HEADS, context_dim=None)
        make = lambda: Coupling("channels", "random", (4, TOKENS // 4), WIDTH, 2.0, predictor())
        shared = ()

        def call(block, x, total):
            z, logdet = block(x)
            return z, total + logdet

    generator = torch.Generator().manual_seed(0)
    blocks = torch.nn.ModuleList(make() for _ in range(depth))
    init_weights(blocks, generator)
    with torch.no_grad():  # no gradient is to be zero only because a weight starts there
        for weight in blocks.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return blocks, shared, call


def prepare(way: str, blocks, shared, call):
    """The weights to differentiate by, with the stack as a function of its input and the sum's start."""

    def call_with(state, shared, x, total):
        return call(lambda *args: functional_call(blocks[0], state, args), x, total, *shared)

    states = [dict(block.named_parameters()) | dict(block.named_buffers()) for block in blocks]
    if way.startswith("scan"):
        from torch_xla.experimental.scan import scan

        # The body may hold no tensors of its own: what all blocks share is scanned over as well.
        repeated = [t.expand(len(blocks), *t.shape).clone() for t in shared]
        body = lambda carry, layer: (call_with(*layer, *carry), None)
        run = lambda state, x, total: scan(body, (x, total), (state, repeated), is_fn_pure=True)[0]
        stack = lambda: {name: torch.stack([state[name] for state in states]) for name in states[0]}
        if way == "scan_stacking":
            return dict(blocks.named_parameters()), lambda x, total: run(stack(), x, total)
        state = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in stack().items()}
        return {name: t for name, t in state.items() if t.requires_grad}, functools.partial(run, state)

    if way == "assume_pure":
        from torch_xla.experimental.assume_pure import assume_pure

        pure = assume_pure(call_with)
        for state in states:  # JAX has no int64 unless told to
            state.update({name: t.int() for name, t in state.items() if t.dtype == torch.int64})
        layers = [functools.partial(pure, state, shared) for state in states]
    else:
        layers = [lambda x, total, block=block: call(block, x, total, *shared) for block in blocks]

    def run(x, total):
        for layer in layers:
            x, total = layer(x, total)
        return x, total

    return dict(blocks.named_parameters()), run


def measure(stack: str, way: str, depth: int) -> dict:
    """Runs a case; its times, and gradients `[depth, ...]` by name."""
    device = runtime.initialize("xla").device
    import torch_xla
    import torch_xla.core.xla_model as xm
    import torch_xla.debug.metrics as metrics

    def compilations() -> tuple[int, float]:
        count, nanoseconds, _ = metrics.metric_data("CompileTime") or (0, 0, [])
        return count, nanoseconds / 1e9

    blocks, shared, call = build(stack, depth)
    blocks, shared = blocks.to(device), tuple(t.to(device) for t in shared)
    x = torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).to(device)
    start = torch.zeros(BATCH, device=device)
    weights, run = prepare(way, blocks, shared, call)
    torch_xla.sync(wait=True)

    traces, first, before = [], None, compilations()
    for _ in range(FLAGS.steps):
        grads, since = None, time.perf_counter()
        with torch_xla.compile(full_graph=True):
            y, total = run(x, start)
            grads = torch.autograd.grad(y.square().sum() + total.sum(), tuple(weights.values()))
            del y, total
            traces.append(time.perf_counter() - since)
        xm.wait_device_ops()
        if first is None:
            first, compiled = time.perf_counter() - since, compilations()[1] - before[1]
    graphs = compilations()[0] - before[0]
    by_name = dict(zip(weights, (grad.cpu() for grad in grads), strict=True))
    if way != "scan":
        names = dict(blocks[0].named_parameters())
        by_name = {name: torch.stack([by_name[f"{i}.{name}"] for i in range(depth)]) for name in names}
    trace = statistics.median(traces[3:])
    return {"trace": trace, "compile": compiled, "graphs": graphs, "first": first, "gradients": by_name}


def run_alone(stack: str, way: str, depth: int, file: pathlib.Path) -> dict:
    """What `measure` returns in a process of its own, or the "reason" why it does not."""
    command = [sys.executable, __file__, f"--only={stack},{way},{depth},{file}", f"--steps={FLAGS.steps}"]
    try:
        done = subprocess.run(command, stderr=subprocess.DEVNULL, timeout=FLAGS.timeout)
    except subprocess.TimeoutExpired:
        return {"reason": f"not done after {FLAGS.timeout:g} s"}
    return torch.load(file) if file.exists() else {"reason": f"exit status {done.returncode}"}


def row(case: dict, expected: dict[str, torch.Tensor] | None) -> str:
    if "reason" in case:
        return f"– | – | – | {case['reason']}"
    verdict = "–"
    if expected is not None:
        error = max(((case["gradients"][k] - e).abs().max() / e.abs().max()).item() for k, e in expected.items())
        verdict = f"{error:.0e} {'ok' if error <= TOLERANCE else 'DIFFER'}"
    return f"{case['trace']:.3f} | {case['compile']:.1f} ({case['graphs']}) | {case['first']:.1f} | {verdict}"


def main(_):
    if FLAGS.only:
        stack, way, depth, file = FLAGS.only.split(",")
        try:
            case = measure(stack, way, int(depth))
        except Exception as error:
            case = {"reason": " ".join(f"{type(error).__name__}: {error}".split())[:160]}
        torch.save(case, file)
        return
    print("| stack | depth | way | trace, s | compile, s (graphs) | first step, s | gradients |")
    print("|---|---:|---|---:|---:|---:|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for stack, depth in itertools.product(FLAGS.stacks, map(int, FLAGS.depths)):
            expected = None
            for way in FLAGS.ways:
                case = run_alone(stack, way, depth, pathlib.Path(folder) / f"{stack}_{way}_{depth}.pt")
                print(f"| {stack} | {depth} | {way} | {row(case, expected)} |", flush=True)
                if way == "unrolled":
                    expected = case.get("gradients")


if __name__ == "__main__":
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    app.run(main)

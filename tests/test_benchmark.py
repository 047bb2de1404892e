"""The benchmark counts and measures what it says, for models of this package and others."""

import json
import math
import statistics
import sys

import pytest
import torch

from jetformer import benchmark, config
from jetformer.experiment import Experiment
from jetformer.runtime import Runtime
from runs import bindings, start

CPU = Runtime(torch.device("cpu"))


def linear(module, tokens):
    return 2 * benchmark.linear_parameters(module) * tokens


def attention(width, tokens):
    return 4 * width * tokens**2


def flops_of_decoder(decoder, tokens):
    return linear(decoder, tokens) + sum(attention(b.attn.num_heads * b.attn.head_dim, tokens) for b in decoder.blocks)


def flops_of_flow(flow):
    vits = [(coupling, math.prod(coupling.grid)) for coupling in flow.couplings]
    return sum(linear(c, n) + len(c.dnn.vit.blocks) * attention(c.dnn.posemb.shape[-1], n) for c, n in vits)


def flops_of_language_model(model, length):
    return flops_of_decoder(model.decoder, length) + linear(model.text_head, length)


def flops_of_jetformer(model, length):
    image, text = model.num_image_tokens, model.num_vocab_repeats * length
    decoder = flops_of_decoder(model.decoder, image + text + 1)  # with two special tokens, without the last token
    heads = (
        linear(model.image_emb, image) + linear(model.image_head, image) + 2 * model.text_emb.weight.numel() * length
    )
    return decoder + heads + flops_of_flow(model.flow)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("tinystories", flops_of_language_model),
        ("jet_digits", lambda model, length: flops_of_flow(model)),
        ("benchmark_flow", lambda model, length: flops_of_flow(model)),
        ("digits", flops_of_jetformer),
        ("shapes", flops_of_jetformer),
    ],
)
def test_flops_are_those_of_a_formula(name, formula):
    """2 · P for each token and linear layer of P weights, 4 · W · T² for attention, the backward pass twice as many.

    (The first layer's input has no gradient.)
    """
    config.parse([f"experiments/{name}.gin"], ["train.batch_size = 4", "train.activation_checkpointing = 'none'"])
    experiment = config.call(Experiment)
    model = experiment.check_model()
    length = benchmark.text_length_of(experiment, model)
    counted = benchmark.count_flops(experiment, benchmark.synthetic_batch(model, 4, length))
    assert counted == pytest.approx(3 * 4 * formula(model, length), rel=0.01)


MY_FLOW = """
import gin
import torch
from torch import nn


@gin.configurable
class MyFlow(nn.Module):
    def __init__(self, input_shape):
        super().__init__()
        self.image_shape = tuple(input_shape)
        self.mix = nn.Linear(input_shape[1], input_shape[1], bias=False)

    def init_weights(self, generator):
        nn.init.orthogonal_(self.mix.weight, generator=generator)

    def forward(self, x, context=None):
        z = torch.einsum("bhwc,vw->bhvc", x, self.mix.weight)
        logdet = self.image_shape[0] * self.image_shape[2] * torch.linalg.slogdet(self.mix.weight).logabsdet
        return z, logdet.expand(len(x))

    def inverse(self, z, context=None):
        x = torch.einsum("bhvc,wv->bhwc", z, torch.linalg.inv(self.mix.weight))
        logdet = -self.image_shape[0] * self.image_shape[2] * torch.linalg.slogdet(self.mix.weight).logabsdet
        return x, logdet.expand(len(z))
"""


def test_a_flow_that_an_experiment_imports(tmp_path, monkeypatch):
    """It needs nothing but the contract of flows."""
    (tmp_path / "my_flow.py").write_text(MY_FLOW)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.gin").write_text(
        'import my_flow\ninclude "experiments/jet_digits.gin"\n'
        "train.model = @MyFlow\nMyFlow.input_shape = (8, 8, 1)\ntrain.batch_size = 4\n"
    )
    config.parse([str(tmp_path / "mine.gin")], [])
    results = benchmark.measure(config.call(Experiment), CPU, steps=2, warmup=1, samples=2, profile=None)
    # Forward, and backward for the weight alone: the input has no gradient.
    assert results["flops"] == 2 * 2 * 4 * 8 * 8 * 8
    assert len(results["flow"]["inverse_seconds"]) == 2
    assert "images/s" in benchmark.report(results)
    assert benchmark.metrics(results)["flow inverse images/s"] > 0


@pytest.fixture(scope="module")
def results(data_dir):
    config.parse(["experiments/digits.gin"], bindings(data_dir, train__grad_accum_steps=2))
    return benchmark.measure(config.call(Experiment), CPU, steps=3, warmup=1, samples=2, profile=None)


@pytest.mark.slow
def test_measurements(results):
    assert {name: len(values) for name, values in results["seconds"].items()} == {
        **{"step": 3, "matmul": 3},
        **{"data": 3, "forward": 3, "backward": 3, "optimizer": 3},
    }
    medians = {name: statistics.median(values) for name, values in results["seconds"].items()}
    assert sum(medians[name] for name in benchmark.PHASES) > 0.3 * medians["step"]
    assert results["tokens"] == 16 * 16
    sizes = results["bytes"]
    assert sizes["parameters"] == sizes["gradients"] == sizes["average"] == 4 * results["parameters"]
    assert 2 * sizes["parameters"] < sizes["optimizer"] < 2.1 * sizes["parameters"]
    assert 0 < sizes["saved_activations"] < sizes["peak"]
    assert results["sampling"]["tokens"] == 2 * 16
    for guidance in ("none", "density"):
        seconds = results["sampling"]["seconds"][guidance]
        assert 0 < statistics.median(seconds["tokens"]) < 2 * statistics.median(seconds["images"])
    assert results["flow"]["batch_size"] == 16


@pytest.mark.slow
def test_iterations_and_speed_up_of_a_parallel_inverse():
    small = ["TarFlow.depth = 2", "TarFlow.emb_dim = 8", "train.batch_size = 2", "train.ema_decay = 0.0"]
    bound = ["TarFlow.inverse_method = @Jacobi()", "Jacobi.segment = 5", "Jacobi.tolerance = 1e-3"]
    config.parse(["experiments/tarflow_digits.gin"], [*small, *bound])
    results = benchmark.measure(config.call(Experiment), CPU, steps=2, warmup=1, samples=0, profile=None)
    # The new flow is nearly the identity.
    assert results["flow"]["jacobi_iterations"] == [1, 1]
    values = benchmark.metrics(results)
    assert values["Jacobi iterations"] == 1
    sequential, parallel = (results["flow"][name] for name in ("sequential_inverse_seconds", "inverse_seconds"))
    assert values["speed-up by Jacobi"] == statistics.median(sequential) / statistics.median(parallel)
    assert f"{values['speed-up by Jacobi']:.2f} times" in benchmark.report(results)


@pytest.mark.slow
def test_measurements_of_a_language_model():
    small = {"width": 16, "depth": 1, "mlp_dim": 32, "num_heads": 2, "head_dim": 8}
    config.parse(
        ["experiments/tinystories.gin"],
        ["train.batch_size = 2", "train.autocast = None", *(f"Decoder.{name} = {x}" for name, x in small.items())],
    )
    results = benchmark.measure(config.call(Experiment), CPU, steps=1, warmup=1, samples=2, profile=None)
    assert results["tokens"] == results["sampling"]["tokens"] == 2 * 512
    assert "flow" not in results
    assert "sampled tokens/s" in benchmark.metrics(results)
    assert "texts/s" in benchmark.report(results)


@pytest.mark.slow
def test_metrics(results):
    seconds = {"step": [2.0, 1.0, 3.0], "matmul": [0.5, 0.5, 0.5]}
    made_up = json.loads(json.dumps(results)) | {"seconds": seconds, "flops": 10_000_000_000}
    metrics = benchmark.metrics(made_up)
    assert metrics["model GFLOP/s"] == 5
    assert metrics["share of matmul"] == pytest.approx(5 / (2 * 2048**3 / 0.5 / 1e9))
    assert metrics["images/s"] == 8
    assert "2000.0 ms (median of 3; 1000.0 to 3000.0)" in benchmark.report(made_up)
    slower = made_up | {"seconds": seconds | {"step": [4.0]}}
    line = next(line for line in benchmark.compare(slower, made_up).splitlines() if "step s" in line)
    assert line.split() == ["step", "s", "4", "2", "2.000"]


@pytest.mark.slow
def test_program(tmp_path, data_dir):
    args = [sys.executable, "-m", "jetformer.benchmark", "--device=cpu", "--gin_file=experiments/digits.gin"]
    args += [f"--gin_bindings={binding}" for binding in bindings(data_dir)]
    args += ["--steps=1", "--warmup=1", "--samples=1", f"--json={tmp_path}/a.json", f"--profile={tmp_path}/trace"]
    for more in ([], [f"--compare={tmp_path}/a.json"]):
        process = start([*args, *more])
        output, log = process.communicate(timeout=200)
        assert process.returncode == 0, log
    assert f"{tmp_path}/a.json" in output
    assert "share of matmul" in output
    (trace, _) = sorted((tmp_path / "trace").iterdir())
    assert "traceEvents" in json.loads(trace.read_text())

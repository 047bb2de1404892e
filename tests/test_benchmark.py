"""The benchmark measures what it says."""

import json
import statistics
import sys

import pytest
import torch

from jetformer import benchmark, config
from jetformer.experiment import Experiment
from jetformer.runtime import Runtime
from runs import bindings, start

EXPERIMENTS = (
    *("digits", "cifar10", "imagenet64", "imagenet256", "shapes", "coco_captions", "tinystories"),
    *("benchmark_cpu", "benchmark_head", "benchmark_flow", "benchmark_sampling"),
    *("jet_digits", "jet_digits_labelled", "ablations/cnn", "ablations/levels", "ablations/masking"),
)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_formula_is_what_torch_counts(name):
    """All products of a step, forward and backward. (The first layer's input has no gradient.)"""
    config.parse([f"experiments/{name}.gin"], ["train.batch_size = 4", "train.activation_checkpointing = 'none'"])
    run = config.call(Experiment)
    with torch.device("meta"):
        model = run.model()
    text_length = benchmark.text_length_of(run, model)
    counted = benchmark.counted_flops(run, benchmark.synthetic_batch(model, 4, text_length))
    assert benchmark.model_flops(model, 4, text_length) == pytest.approx(counted, rel=0.01)


@pytest.fixture(scope="module")
def results(data_dir):
    config.parse(["experiments/digits.gin"], bindings(data_dir, train__grad_accum_steps=2))
    run = config.call(Experiment)
    return benchmark.measure(run, Runtime(torch.device("cpu")), steps=3, warmup=1, samples=2, profile=None)


@pytest.mark.slow
def test_what_is_measured(results):
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
def test_what_is_measured_of_a_language_model():
    small = {"width": 16, "depth": 1, "mlp_dim": 32, "num_heads": 2, "head_dim": 8}
    config.parse(
        ["experiments/tinystories.gin"],
        ["train.batch_size = 2", "train.autocast = None", *(f"Decoder.{name} = {x}" for name, x in small.items())],
    )
    run = config.call(Experiment)
    results = benchmark.measure(run, Runtime(torch.device("cpu")), steps=1, warmup=1, samples=2, profile=None)
    assert results["tokens"] == results["sampling"]["tokens"] == 2 * 512
    assert "flow" not in results
    assert "sampled tokens/s" in benchmark.figures(results)
    assert "texts/s" in benchmark.report(results)


@pytest.mark.slow
def test_figures(results):
    seconds = {"step": [2.0, 1.0, 3.0], "matmul": [0.5, 0.5, 0.5]}
    made_up = json.loads(json.dumps(results)) | {"seconds": seconds, "flops": 10_000_000_000}
    figures = benchmark.figures(made_up)
    assert figures["model GFLOP/s"] == 5
    assert figures["share of matmul"] == pytest.approx(5 / (2 * 2048**3 / 0.5 / 1e9))
    assert figures["images/s"] == 8
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
    assert "of the product's rate" in output
    assert f"beside {tmp_path}/a.json" in output
    (trace, _) = sorted((tmp_path / "trace").iterdir())
    assert "traceEvents" in json.loads(trace.read_text())

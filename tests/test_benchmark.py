"""The benchmark measures what it says."""

import pytest
import torch

from jetformer import benchmark, config, train
from jetformer.runtime import Runtime
from runs import bindings


@pytest.mark.slow
def test_benchmark(data_dir):
    config.parse(["experiments/digits.gin"], bindings(data_dir))
    run = config.call(train.Run)
    results = benchmark.measure(run, Runtime(torch.device("cpu")), steps=3, warmup=1)
    assert len(results["step_seconds"]) == len(results["matmul_seconds"]) == 3
    assert results["tokens"] == 16 * 16
    model = run.build_model()
    matrices = sum(p.numel() for name, p in model.named_parameters() if name.endswith("weight") and p.ndim == 2)
    assert results["matmul_parameters"] == matrices - model.text_emb.weight.numel()
    assert results["flops"] == 6 * results["matmul_parameters"] * results["tokens"]

    seconds = {"step_seconds": [2.0, 1.0, 3.0], "matmul_seconds": [0.5, 0.5, 0.5]}
    text = benchmark.report(run, Runtime(torch.device("cpu")), results | seconds | {"flops": 10e9})
    assert "2.000 s (median of 3; 1.000 to 3.000)" in text
    assert "10.0 GFLOP a step, 5 GFLOP/s" in text
    ratio = 5 / (2 * 2048**3 / 0.5 / 1e9)
    assert text.endswith(f"{ratio:.2f}")

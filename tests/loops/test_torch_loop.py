"""The torch loop: what it refuses, and examples that count once."""

import numpy as np
import pytest
import torch
import torch.utils._triton
from torch import nn

from jetformer import prng
from jetformer.loops import steps, torch_loop
from jetformer.runtime import Runtime

CPU = Runtime(torch.device("cpu"))


def place(device, compile):
    # `device` is only asked for its type: there is none to place the model on.
    model = nn.Linear(2, 2)
    model.to = lambda device: model
    return torch_loop.place(model, Runtime(torch.device(device)), mesh=None, compile=compile, autocast_dtype=None)


@pytest.mark.parametrize("compile", ["blocks", "step"])
def test_compiling_on_a_gpu_without_triton_is_refused(monkeypatch, compile):
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: False)
    with pytest.raises(
        ValueError, match=r"train\.compile needs Triton on a GPU, and there is none: pip install triton"
    ):
        place("cuda", compile)
    assert isinstance(place("cuda", None), steps.Runner)


def test_compiling_on_a_cpu_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setattr(torch_loop.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler on a CPU, and there is none"):
        place("cpu", "blocks")


def test_rows_are_of_examples_in_their_order():
    """Padding is left out, batches in any order come into that of the examples' numbers, and keys are the examples'."""
    model = nn.Linear(1, 1)
    batches = [
        {
            "x": np.array([[3.0], [4.0]], np.float32),
            "_mask": np.array([True, True]),
            "_index": np.array([3, 4], np.int32),
        },
        {
            "x": np.array([[1.0], [9.0]], np.float32),
            "_mask": np.array([True, False]),
            "_index": np.array([1, 2], np.int32),
        },
    ]
    seen, calls = [], []

    def function(model, batch, keys):
        return {"x": batch["x"][:, 0], "draw": prng.uniform(keys, (2,))}

    def to_rows(rows):
        seen.append(rows["x"].tolist())
        return rows | {"twice": 2 * rows["x"]}

    rows = torch_loop.per_example(
        runner=steps.Runner(model),
        function=function,
        batches=iter(batches),
        runtime=CPU,
        seed=5,
        autocast_dtype=None,
        to_rows=to_rows,
        each_batch=lambda: calls.append(1),
    )
    assert rows["x"].tolist() == [1.0, 3.0, 4.0]
    assert rows["twice"].tolist() == [2.0, 6.0, 8.0]
    assert seen == [[3.0, 4.0], [1.0]]
    assert len(calls) == 2
    keys = prng.example_keys(5, torch.tensor([1, 3, 4], dtype=torch.int32))
    assert np.array_equal(rows["draw"], prng.uniform(keys, (2,)).numpy())

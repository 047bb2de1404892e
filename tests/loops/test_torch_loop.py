"""The torch loop: what it refuses, examples that count once, and decoding by graphs."""

import numpy as np
import pytest
import torch
import torch.utils._triton
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jetformer import prng
from jetformer.loops import steps, torch_loop
from jetformer.runtime import Runtime
from jetformer.sampling import decode
from jetformer.sampling.guidance import Guidance
from small_models import inputs, small_model

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


class Graph:
    """What a CUDA graph is, on the CPU: operations as they were called, on the memory that they were called with."""

    def __init__(self):
        self.calls = []

    def replay(self):
        for function, args, kwargs, results in self.calls:
            again = tree_leaves(function(*args, **kwargs))
            for kept, new in zip(results, again, strict=True):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


class Capture(TorchDispatchMode):
    """Stands in for `torch.cuda.graph`: as there, nothing may look at values from the host. (It does run what it
    captures; what was changed in place is changed back.)"""

    LOOKS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.is_nonzero)

    def __init__(self, graph, capture_error_mode):
        super().__init__()
        self.graph, self.before = graph, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in self.LOOKS, f"{function} in a graph"
        changed = [a for a, schema in zip(args, function._schema.arguments, strict=False) if schema.alias_info]
        if function._schema.is_mutable:
            self.before += [(x, x.clone()) for x in changed]
        results = function(*args, **(kwargs or {}))
        self.graph.calls.append((function, args, kwargs or {}, tree_leaves(results)))
        return results

    def __exit__(self, *exception):
        super().__exit__(*exception)
        for x, value in reversed(self.before):
            x.copy_(value)


@pytest.fixture
def graphs(monkeypatch):
    made = []

    def capture(graph, **kwargs):
        made.append(graph)
        return Capture(graph, **kwargs)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return made


def test_a_graph_is_captured_once_and_replayed(graphs):
    state, calls = torch.zeros(2), []

    def function(x):
        calls.append(1)
        state.add_(x)
        return {"sum": state + 0.0}

    graphed = torch_loop.Graphed(function)
    sums = [graphed(torch.tensor([float(i), 1.0]))["sum"] for i in range(6)]
    # Results are the caller's: the next replay leaves them alone.
    assert [x.tolist() for x in sums] == [[0, 1], [1, 2], [3, 3], [6, 4], [10, 5], [15, 6]]
    assert len(calls) == 3
    assert len(graphs) == 1


def test_a_look_from_the_host_is_no_graph(graphs):
    graphed = torch_loop.Graphed(lambda x: x + 1 if x.any() else x)
    for _ in range(2):
        graphed(torch.ones(2))
    with pytest.raises(AssertionError, match="in a graph"):
        graphed(torch.ones(2))


def graphed(function):
    """As `torch_loop.compile` does it on a GPU."""
    replayed = torch_loop.Graphed(function)
    return lambda *args: (replayed if args else function)(*args)


@pytest.mark.parametrize("guidance", [Guidance(), Guidance("density", 4.0, "linear"), Guidance("interp", 2.0)])
@torch.no_grad()
def test_images_sampled_by_graphs(graphs, guidance):
    model = small_model().eval()
    text, _ = inputs(model, batch=3)
    keys = prng.example_keys(0, torch.arange(3, dtype=torch.int32))
    expected = decode.sample_latents(model, text, keys, guidance=guidance)
    sampled = decode.sample_latents(model, text, keys, guidance=guidance, compile=graphed)
    torch.testing.assert_close(sampled, expected)
    assert len(graphs) == 1


@torch.no_grad()
def test_texts_sampled_and_scored_by_graphs(graphs):
    model = small_model().eval()
    _, image = inputs(model, batch=3)
    keys = prng.example_keys(0, torch.arange(3, dtype=torch.int32))
    options = {"image_tokens": image, "max_length": 12, "vocab_size": 4, "eos_id": 1, "top_k": 3, "top_p": 0.9}
    expected = decode.sample_text(model, keys, **options)
    torch.testing.assert_close(decode.sample_text(model, keys, **options, compile=graphed), expected)
    texts = torch.arange(15).view(5, 3) % 4
    counts = torch.ones(5, 3, dtype=torch.bool)
    expected = decode.score_texts(model, image, texts, counts)
    torch.testing.assert_close(decode.score_texts(model, image, texts, counts, compile=graphed), expected)
    assert len(graphs) == 2

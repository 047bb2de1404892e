"""The torch loop: what it refuses, examples that count once, and decoding by graphs."""

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jetformer import prng
from jetformer.loops import torch_loop
from jetformer.loops.base import Runner
from jetformer.loops.torch_loop import TorchLoop
from jetformer.models.mixture import MixtureHead
from jetformer.runtime import Runtime
from jetformer.sampling import decode
from jetformer.sampling.guidance import Guidance
from small_models import inputs, small_model

CPU = Runtime(torch.device("cpu"))


def place(device, compile, model=None):
    # `device` is only asked for its type: there is none to place the model on.
    model = model or nn.Linear(2, 2)
    model.to = lambda device: model
    return TorchLoop(Runtime(torch.device(device))).place(model, compile)


@pytest.mark.parametrize("compile", ["blocks", "step"])
def test_compiling_on_a_gpu_without_triton_is_refused(monkeypatch, compile):
    monkeypatch.setattr(torch_loop, "has_triton", lambda: False)
    with pytest.raises(
        ValueError, match=r"train\.compile needs Triton on a GPU, and there is none: pip install triton"
    ):
        place("cuda", compile)
    assert isinstance(place("cuda", None), Runner)


def test_compiling_on_a_cpu_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setattr(torch_loop.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler on a CPU, and there is none"):
        place("cpu", "blocks")


@pytest.mark.parametrize(
    ("device", "triton", "switch", "compile", "backend"),
    [
        ("cpu", True, None, None, "eager"),
        ("cpu", True, None, "blocks", "eager"),
        ("cuda", True, None, None, "triton"),
        ("cuda", True, None, "step", "triton"),
        ("cuda", True, "0", None, "eager"),
        ("cuda", True, "0", "blocks", "compiled"),
        ("cuda", False, None, None, "eager"),
    ],
)
def test_the_device_chooses_the_backend_of_the_head(monkeypatch, device, triton, switch, compile, backend):
    monkeypatch.setattr(torch_loop, "has_triton", lambda: triton)
    monkeypatch.delenv("JETFORMER_TRITON", raising=False)
    if switch is not None:
        monkeypatch.setenv("JETFORMER_TRITON", switch)
    head = MixtureHead(2, 2, 2)
    place(device, compile, nn.Sequential(head))
    assert head.backend == backend


def test_shards_are_the_models_parameters():
    """To the bit; so are buffers, and the processes need not exist."""
    model = small_model()
    shards = []
    for rank in range(3):
        dist.init_process_group("fake", rank=rank, world_size=3, store=FakeStore())
        loop = TorchLoop(Runtime(torch.device("cpu"), rank, 3, 3), {"fsdp": -1})
        placed = loop.place(copy.deepcopy(model)).model
        shards.append([loop.local(p) for p in placed.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(placed.buffers(), model.buffers(), strict=True))
        dist.destroy_process_group()
    for parameter, *parts in zip(model.parameters(), *shards, strict=True):
        assert len(parts[0]) < len(parameter) or len(parameter) == 1
        assert torch.equal(torch.cat(parts), parameter)


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

    rows = TorchLoop(CPU).per_example(
        Runner(model),
        function,
        iter(batches),
        seed=5,
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
        self.calls, self.replays = [], 0

    def replay(self):
        self.replays += 1
        for function, args, kwargs, results in self.calls:
            again = tree_leaves(function(*args, **kwargs))
            for kept, new in zip(results, again, strict=True):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


class Capture(TorchDispatchMode):
    """Stands in for `torch.cuda.graph`: as there, nothing may look at values from the host. (It does run what it
    captures; what was changed in place is changed back.)"""

    # Their results' sizes depend on values, or they bring values from the host.
    LOOKS = (
        *("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "_unique2", "unique_consecutive"),
        *("unique_dim", "repeat_interleave", "lift_fresh", "lift_fresh_copy", "equal", "bincount"),
    )

    def __init__(self, graph, capture_error_mode):
        super().__init__()
        self.graph, self.before = graph, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = tree_leaves(args[1]) if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        by_mask = any(x is not None and x.dtype == torch.bool for x in indices)
        looks = by_mask or name in self.LOOKS
        assert not looks, f"{function} in a graph"
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
    sums = [graphed(torch.tensor([float(i), 1.0]))["sum"] for i in range(12)]
    # Results are the caller's: the next replay leaves them alone.
    assert [x.tolist() for x in sums] == [[i * (i + 1) / 2, i + 1] for i in range(12)]
    assert len(calls) == 9
    assert [graph.replays for graph in graphs] == [4]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + 1 if x.any() else x,
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x + torch.tensor([1.0, 2.0]),
    ],
)
def test_what_cannot_be_a_graph(graphs, function):
    graphed = torch_loop.Graphed(function)
    for _ in range(torch_loop.CALLS_BEFORE_CAPTURE):
        graphed(torch.ones(2))
    with pytest.raises(AssertionError, match="in a graph"):
        graphed(torch.ones(2))


def test_graphs_are_for_one_process_on_a_gpu(graphs, monkeypatch):
    def run():
        function = TorchLoop(CPU).compile(lambda *args: len(args))
        assert function() == 0
        return [function(torch.ones(2)) for _ in range(20)]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert run() == [1] * 20  # of tensors on the CPU
    assert not graphs
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    run()
    assert len(graphs) == 1
    monkeypatch.setenv("JETFORMER_CUDA_GRAPHS", "0")
    run()
    monkeypatch.delenv("JETFORMER_CUDA_GRAPHS")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    run()
    assert len(graphs) == 1


def graphed(function):
    """As `TorchLoop.compile` does it on a GPU."""
    replayed = torch_loop.Graphed(function)
    return lambda *args: (replayed if args else function)(*args)


@pytest.mark.parametrize("guidance", [Guidance(), Guidance("density", 4.0, "linear"), Guidance("interp", 2.0)])
@torch.no_grad()
def test_images_sampled_by_graphs(graphs, guidance):
    model = small_model(image_shape=(8, 8, 3)).eval()
    text, _ = inputs(model, batch=3)
    keys = prng.example_keys(0, torch.arange(3, dtype=torch.int32))
    expected = decode.sample_latents(model, text, keys, guidance=guidance)
    sampled = decode.sample_latents(model, text, keys, guidance=guidance, compile=graphed)
    torch.testing.assert_close(sampled, expected)
    assert [graph.replays for graph in graphs] == [15 - torch_loop.CALLS_BEFORE_CAPTURE]


@torch.no_grad()
def test_texts_sampled_and_scored_by_graphs(graphs):
    model = small_model().eval()
    _, image = inputs(model, batch=3)
    keys = prng.example_keys(0, torch.arange(3, dtype=torch.int32))
    options = {"image_tokens": image, "max_length": 24, "vocab_size": 4, "top_k": 3, "top_p": 0.9}
    for eos_id in (1, 4):  # 4 is none of the texts' tokens: they do not end
        expected = decode.sample_text(model, keys, **options, eos_id=eos_id)
        sampled = decode.sample_text(model, keys, **options, eos_id=eos_id, compile=graphed)
        torch.testing.assert_close(sampled, expected)
    assert graphs[-1].replays == 23 - torch_loop.CALLS_BEFORE_CAPTURE
    del graphs[:]
    texts = torch.arange(36).view(12, 3) % 5 % 4
    counts = torch.ones(12, 3, dtype=torch.bool)
    expected = decode.score_texts(model, image, texts, counts)
    torch.testing.assert_close(decode.score_texts(model, image, texts, counts, compile=graphed), expected)
    assert [graph.replays for graph in graphs] == [12 - torch_loop.CALLS_BEFORE_CAPTURE]

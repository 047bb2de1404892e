"""A run on the device from its first step to its samples: checkpoints, evaluators, resuming, loading."""

import torch
from torch._dynamo.utils import counters
from upath import UPath

import jetformer
from jetformer import checkpoint, config
from jetformer.evaluators.results import evaluated_steps
from jetformer.experiment import Experiment
from jetformer.runtime import Runtime
from jetformer.trainer import train
from runs import bindings


def test_a_run(tmp_path, data_dir, seen):
    workdir = UPath(tmp_path / "run")
    for total_steps in (6, 12):
        config.parse(["experiments/digits.gin"], bindings(data_dir, train__total_steps=total_steps))
        train(config.call(Experiment), workdir, Runtime(torch.device("cuda:0")))
    assert checkpoint.latest(workdir) == 12
    assert evaluated_steps(workdir, "val") == {6, 12}
    saves = [
        count for place, count in seen.places.items() if place.startswith("cudaDeviceSynchronize at checkpoint.py")
    ]
    assert saves == [4]  # at 4, 6, 8 and 12: one wait for all tensors
    model = jetformer.load(workdir, device="cuda")
    assert model.sample(classes=[3], num_images=2).shape == (2, 8, 8, 1)


def test_compiled_blocks(tmp_path, data_dir):
    """Nothing is compiled after the first step: neither by evaluators, nor when a run resumes with evaluations."""
    workdir = UPath(tmp_path / "run")
    graphs = []
    for total_steps in (6, 12):
        torch.compiler.reset()
        overrides = {"train__total_steps": total_steps, "train__compile": '"blocks"', "train__autocast": '"bfloat16"'}
        config.parse(["experiments/digits.gin"], bindings(data_dir, **overrides))
        before = counters["stats"]["unique_graphs"]
        train(config.call(Experiment), workdir, Runtime(torch.device("cuda:0")))
        graphs.append(counters["stats"]["unique_graphs"] - before)
    # The decoder's block, and the coupling twice: the first one's input needs no gradient.
    assert graphs == [3, 3]

"""Devices and seeds."""

import pytest
import torch

from jetformer import runtime


def test_auto_is_a_gpu_where_there_is_one():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert runtime.initialize("auto").device.type == expected


def test_a_device_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        runtime.initialize("cuda")


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="runs in one process"):
        runtime.initialize("cpu")


def test_seeds_differ_by_every_part():
    parts = [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 0, 0), (2**32,), (0, 2**32), (2**64 + 1,)]
    seeds = {runtime.derive_seed(*p) for p in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert runtime.derive_seed(1, 2) == runtime.derive_seed(1, 2)

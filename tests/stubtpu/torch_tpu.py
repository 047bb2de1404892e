"""Stands in for Google's torch_tpu: registers with PyTorch what that does, over the device of `device.cpp`."""

import os
import sys
import types

import torch
import torch.distributed as dist
from torch._dynamo import register_backend


def load() -> None:
    """Registers everything. torch calls it at the end of its own import: the entry point is of `torch.backends`."""
    import _device  # links against torch

    module = types.ModuleType("torch.tpu")
    module.is_available = lambda: "STUB_NO_TPU" not in os.environ
    module.is_initialized = lambda: True
    module.device_count = lambda: 1  # each process has one
    module.current_device = lambda: 0
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    module.manual_seed_all = lambda seed: None
    module._is_in_bad_fork = lambda: False
    torch.utils.rename_privateuse1_backend("tpu")
    torch._register_device_module("tpu", module)
    sys.modules["torch.tpu"] = module

    def collectives(store, rank, size, timeout):
        return _device.collectives(dist.ProcessGroupGloo(store, rank, size, timeout))

    dist.Backend.register_backend("tpu_dist", collectives, devices=["tpu"])

    @register_backend(name="tpu")
    def compiler(graph, inputs):
        print("compiled a graph for", *{x.device.type for x in inputs if isinstance(x, torch.Tensor)})
        return graph.forward

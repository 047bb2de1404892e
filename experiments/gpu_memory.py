"""Prints the GPU memory that training steps of an experiment allocate, by what is recomputed, and the largest batch.

    tests/nullcuda/run.sh python experiments/gpu_memory.py --gin_file=experiments/imagenet256.gin

There PyTorch's real allocator counts, and kernels compute nothing. It also runs on a GPU. With --devices=8 a device
holds its share of the model by FSDP; the other processes are made up.
"""

import itertools

import torch
import torch.distributed as dist
from absl import app, flags
from torch.testing._internal.distributed.fake_pg import FakeStore

from jetformer import benchmark, config, program
from jetformer.experiment import Experiment
from jetformer.models import remat
from jetformer.runtime import Runtime
from jetformer.state import State, make_loop
from jetformer.trainer import training_of

flags.adopt_module_key_flags(program)
DEVICES = flags.DEFINE_integer("devices", 1, "Number of devices.")
MEMORY_GB = flags.DEFINE_float("memory_gb", 80.0, "Memory of a device in 10⁹ bytes.")

# Of a device's memory; the rest is for gaps in the allocator's blocks, the CUDA context, and libraries.
USABLE = 0.9
POLICIES = [("none", 1), ("couplings", 1), ("blocks", 1), ("everything", 4), ("everything", 2), ("everything", 1)]
SIZES = (32, 64)  # images or texts a device: with fewer the optimizer may take more than the backward pass


def main(_) -> None:
    torch.Tensor.erfinv = torch.Tensor.tan  # of the same memory; the real one needs a driver
    torch.backends.cudnn.enabled = False
    if DEVICES.value > 1:
        dist.init_process_group("fake", rank=0, world_size=DEVICES.value, store=FakeStore())
    runtime = Runtime(torch.device("cuda:0"), 0, DEVICES.value, DEVICES.value)
    mesh = "train.mesh = {'fsdp': -1}"
    config.parse(flags.FLAGS.gin_file, [mesh, "train.compile = None", *flags.FLAGS.gin_bindings])
    experiment = config.call(Experiment)
    loop = make_loop(experiment, runtime)
    model = experiment.check_model().to_empty(device="cuda")
    state = State(loop, loop.place(model), experiment.optimizer(model), ema=None)
    if experiment.ema_decay:
        state.ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    length = benchmark.text_length_of(experiment, model)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {DEVICES.value} device(s)")
    for policy, every in POLICIES:
        remat.set_policy(model, policy, every)
        peaks = []
        for size in SIZES:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            batch = benchmark.synthetic_batch(model, size, length)
            training = training_of(experiment, state, 2, schedule=lambda step: 1e-3)
            for _ in loop.train_steps(training, itertools.repeat(batch)):
                pass
            state.optimizer.zero_grad(set_to_none=True)
            peaks.append(torch.cuda.max_memory_allocated() / 1e9)
        each = (peaks[1] - peaks[0]) / (SIZES[1] - SIZES[0])
        fixed = peaks[0] - SIZES[0] * each
        largest = int((USABLE * MEMORY_GB.value - fixed) / each)
        print(f"{policy}, every {every}: {fixed:.1f} GB and {each:.3f} GB an example; at most {largest} a device")


if __name__ == "__main__":
    app.run(main)

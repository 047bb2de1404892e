"""Prints the memory traffic of an experiment's compiled blocks, from what torch.compile makes of them.

    tests/nullcuda/run.sh python experiments/compiled_traffic.py --gin_file=experiments/imagenet256.gin

It compiles a training step of three couplings and three decoder blocks in bfloat16, on a CUDA runtime that computes
nothing, and adds up the bytes that the kernels of each graph read and write: those that torch.compile has fused, and
those of libraries (products, attention). A coupling's backward graphs differ: the first one's input needs no gradient.
"""

import torch
from absl import app, flags
from torch._inductor.graph import GraphLowering

from jetformer import config
from jetformer.benchmark import synthetic_batch
from jetformer.experiment import Experiment
from jetformer.runtime import Runtime
from jetformer.state import build, make_loop
from jetformer.trainer import training_of

IMAGES = flags.DEFINE_integer("images", 16, "Images of a step.")
BINDINGS = (
    *("Jet.depth = 3", "Decoder.depth = 3", "JetFormer.num_mixtures = 8", "JetFormer.kmeans_init = False"),
    *("train.autocast = 'bfloat16'", "train.compile = 'blocks'", "train.activation_checkpointing = 'none'"),
    *("train.mesh = {'data': -1}", "train.evaluators = {}"),
)


def main(_) -> None:
    # The runtime has no NVRTC, which compiles the real one.
    torch.Tensor.erfinv = torch.Tensor.tan
    torch._inductor.config.force_disable_caches = True  # graphs from a cache are not generated
    generate = GraphLowering.codegen

    def counted(graph: GraphLowering):
        code = generate(graph)
        traffic = {True: 0, False: 0}
        for node in graph.scheduler.nodes:
            traffic[node.is_extern()] += node.get_read_write_buffers_sizes()
        libraries, fused = (traffic[extern] / IMAGES.value / 1e6 for extern in (True, False))
        where = "backward" if graph.is_backward else "forward"
        print(f"{where}: fused kernels {fused:.1f} MB an image, libraries {libraries:.1f}", flush=True)
        return code

    GraphLowering.codegen = counted
    config.parse(flags.FLAGS.gin_file, [*BINDINGS, f"train.batch_size = {IMAGES.value}"])
    experiment = config.call(Experiment)
    state = build(experiment, make_loop(experiment, Runtime(torch.device("cuda:0"))))
    batch = synthetic_batch(state.model, IMAGES.value, 1)
    for _ in state.loop.train_steps(training_of(experiment, state, 1, lambda step: 1.0), iter([batch])):
        pass


if __name__ == "__main__":
    app.run(main)

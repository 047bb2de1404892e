"""Times the inverse of a trained TarFlow token by token and by Jacobi iteration, in turn, and prints the error.

    python experiments/check_jacobi.py --workdir=/tmp/tarflow_digits

It inverts the latents of validation images. The error is the largest difference of a pixel to the inverse token by
token, in grey levels of 256; half a level is lost in an 8-bit image.
"""

import statistics
import time

import numpy as np
import torch
from absl import app, flags

import jetformer
from jetformer.models.tarflow import TarFlowBlock
from jetformer.objectives import to_unit_range
from jetformer.sampling.jacobi import Jacobi

WORKDIR = flags.DEFINE_string("workdir", None, "Run of a TarFlow.", required=True)
COUNTS = flags.DEFINE_multi_integer("count", [1, 8], "Numbers of images at a time.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Number of times to measure each.", lower_bound=1)
TOLERANCE = flags.DEFINE_float("tolerance", 1e-5, "See Jacobi.")
SEGMENTS = (None, 64, 32)


def main(_) -> None:
    model = jetformer.load(WORKDIR.value, device="cpu")
    blocks = [module for module in model.module.modules() if isinstance(module, TarFlowBlock)]
    pixels = next(model.experiment.data.eval_batches(batch_size=max(COUNTS.value)))["image"]
    with torch.no_grad():
        latents, _ = model.module(to_unit_range(torch.from_numpy(np.array(pixels)) + 0.5))
    methods = [None, *(Jacobi(TOLERANCE.value, segment) for segment in SEGMENTS)]
    for count in COUNTS.value:
        seconds, images = {method: [] for method in methods}, {}
        for _ in range(REPEATS.value):
            for method in methods:
                for block in blocks:
                    block.inverse_method = method
                start = time.perf_counter()
                with torch.no_grad():
                    images[method], _ = model.module.inverse(latents[:count])
                seconds[method].append(time.perf_counter() - start)
        medians = {method: statistics.median(values) for method, values in seconds.items()}
        print(f"{count} image(s), {blocks[0].posemb.shape[0]} tokens: token by token {medians[None]:.3f} s")
        for method in methods[1:]:
            error = (images[method] - images[None]).abs().max().item() * 127.5
            name = "all at once" if method.segment is None else f"{method.segment} at a time"
            ratio = medians[None] / medians[method]
            print(f"  {name}: {medians[method]:.3f} s, {ratio:.2f} times as fast, error {error:.2f}")


if __name__ == "__main__":
    app.run(main)

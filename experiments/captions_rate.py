"""Measures how many captions a second the input pipeline of shapes.gin tokenizes, beside images alone.

    OMP_NUM_THREADS=2 python experiments/captions_rate.py

Prints examples a second of `caption`, of the whole preprocessing string with it, and of the string without it, in turn,
each the median of five times 200 batches of 64.
"""

import dataclasses
import statistics
import time

from absl import app, flags

from jetformer import config
from jetformer.experiment import Experiment

flags.DEFINE_string("data_dir", None, "Where TFDS keeps prepared data; its default by default.")
BATCH_SIZE, BATCHES, REPETITIONS = 64, 200, 5


def main(_):
    config.parse(["experiments/shapes.gin"], [])
    data = config.call(Experiment).data
    captions = " | ".join(data.pp.split(" | ")[1:-1])
    strings = {
        "captions alone": f"{captions} | keep('text')",
        "images and captions": data.pp,
        "images alone": "decode | keep('image')",
    }
    rates = {what: [] for what in strings}
    for _ in range(REPETITIONS):
        for what, pp in strings.items():
            part = dataclasses.replace(data, pp=pp, data_dir=flags.FLAGS.data_dir)
            batches = part.train_batches(batch_size=BATCH_SIZE, seed=0)
            next(batches)  # which fills the shuffle buffers
            start = time.perf_counter()
            for _ in range(BATCHES):
                next(batches)
            rates[what].append(BATCHES * BATCH_SIZE / (time.perf_counter() - start))
            batches.close()
    for what, values in rates.items():
        print(f"{what}: {statistics.median(values):,.0f} examples/s ({min(values):,.0f} to {max(values):,.0f})")


if __name__ == "__main__":
    app.run(main)

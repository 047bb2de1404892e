"""Compares a run of jet_digits.gin with mixtures of Gaussians.

    python experiments/check_jet_digits.py --workdir=/tmp/jet_digits

Prints the bits per dim of the test split under the flow and under two mixtures of 10 Gaussians with full covariance,
fitted by scikit-learn to the training split: one with default regularization, one with the best on the validation
split. All are densities of the same pixels, with the same dequantization noise. Exits with 1 if the flow is not better
than both.
"""

import math
import sys

import numpy as np
import tensorflow_datasets as tfds
import torch
from absl import app, flags
from sklearn.mixture import GaussianMixture
from upath import UPath

from jetformer import prng, runtime
from jetformer.objectives import JetObjective, to_unit_range
from jetformer.state import load

flags.DEFINE_string("workdir", None, "The run's.", required=True)
flags.DEFINE_integer("step", None, "Which checkpoint; default: the newest.")
FLAGS = flags.FLAGS
COMPONENTS = 10
DEFAULT, CHOICES = 1e-6, (1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2)


def main(_):
    machine = runtime.initialize("cpu")
    run, state, step = load(UPath(FLAGS.workdir), [], [], machine, FLAGS.step)

    def dequantized(split: str, seed: int) -> torch.Tensor:
        images = tfds.load(run.data.name, split=split, batch_size=-1, data_dir=run.data.data_dir)["image"].numpy()
        keys = prng.example_keys(seed, torch.arange(len(images), dtype=torch.int32))
        return to_unit_range(torch.tensor(images) + prng.uniform(keys, images.shape[1:]))

    training, validation, test = (dequantized(split, i) for i, split in enumerate(("train", "validation", "test")))

    def fitted(regularization: float) -> GaussianMixture:
        mixture = GaussianMixture(COMPONENTS, covariance_type="full", reg_covar=regularization, random_state=0)
        return mixture.fit(training.flatten(1).numpy())

    def bits_under(mixture: GaussianMixture, x: torch.Tensor) -> float:
        nats = -mixture.score_samples(x.flatten(1).numpy()).mean()
        return nats / (x[0].numel() * math.log(2)) + math.log2(127.5)

    state.model.eval()
    with state.averaged(), torch.no_grad():
        flow = np.mean([JetObjective.score(state.model, x)["bits_per_dim"][0].mean() for x in test.split(225)])
    mixtures = {regularization: fitted(regularization) for regularization in CHOICES}
    chosen = min(CHOICES, key=lambda regularization: bits_under(mixtures[regularization], validation))
    default, best = bits_under(mixtures[DEFAULT], test), bits_under(mixtures[chosen], test)
    print(f"step {step}, {len(test)} test images, 8-bit pixels")
    print(f"  flow: {flow:.3f} bits per dim")
    print(f"  {COMPONENTS} Gaussians, full covariance: {default:.3f} bits per dim")
    print(f"  the same with reg_covar = {chosen:g}, the best on the validation split: {best:.3f} bits per dim")
    sys.exit(0 if flow < min(default, best) else 1)


if __name__ == "__main__":
    app.run(main)

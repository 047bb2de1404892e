"""Compares a run of digits.gin with a histogram of grey levels, and its samples with a classifier.

    python experiments/check_digits.py --workdir=/tmp/digits

Prints the bits per dim of the validation split and those of a histogram of the 17 grey levels at each pixel, and the
share of 500 class-conditional samples that a logistic regression, fitted to the real training digits, assigns to their
class. Exits with 1 if the run is not better than the histogram, or fewer than 85% are recognised.
"""

import sys

import numpy as np
import tensorflow_datasets as tfds
import torch
from absl import app, flags
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from upath import UPath

from jetformer import prng, runtime
from jetformer.data.builders.digits import histogram_bits_per_dim
from jetformer.evaluators.likelihood import Likelihood
from jetformer.sampling.decode import sample_images
from jetformer.state import evaluator_context, load

flags.DEFINE_string("workdir", None, "Workdir of the run.", required=True)
FLAGS = flags.FLAGS
SAMPLES_PER_CLASS = 50


def main(_):
    workdir = UPath(FLAGS.workdir)
    run, state, step = load(workdir, [], [], runtime.initialize("cpu"))

    read = lambda split: tfds.as_numpy(tfds.load(run.data.name, split=split, batch_size=-1, data_dir=run.data.data_dir))
    real, validation = read(run.data.train_split), read(run.data.eval_split)
    histogram = histogram_bits_per_dim(real["image"], validation["image"])
    results = Likelihood()(evaluator_context(run, state, step, "check", workdir))
    scores = results.ema_scalars or results.scalars
    bits = scores["bits_per_dim"]
    print(f"step {step}, {len(validation['image'])} validation images, 8-bit pixels")
    print(f"  JetFormer: {bits:.3f} bits per dim")
    used, distinct = scores["effective_components"], scores["distinct_components"]
    print(f"  components: {state.model.image_head.num_mixtures}, of which {used:.1f} are used, {distinct:.1f} distinct")
    print(f"  histogram of levels at each pixel: {histogram:.3f} bits per dim")

    flatten = lambda images: images.reshape(len(images), -1) / 255
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    classifier.fit(flatten(real["image"]), real["label"])
    accuracy = classifier.score(flatten(validation["image"]), validation["label"])
    labels = torch.arange(10).repeat_interleave(SAMPLES_PER_CLASS)
    state.model.eval()
    with state.averaged():
        samples, _ = sample_images(
            state.model, labels[:, None], prng.example_keys(0, torch.arange(len(labels), dtype=torch.int32))
        )
    predicted = classifier.predict(flatten(samples.numpy()))
    recognised = np.mean(predicted == labels.numpy())
    print(f"logistic regression recognises {accuracy:.1%} of the validation digits,")
    print(f"  and {recognised:.1%} of {len(labels)} samples as their class")
    sys.exit(0 if bits < histogram and recognised >= 0.85 else 1)


if __name__ == "__main__":
    app.run(main)

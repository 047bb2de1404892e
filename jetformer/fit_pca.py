"""Fits the PCA of `PatchPCA` to the training split of an experiment.

    python -m jetformer.fit_pca --gin_file=experiments/….gin --patch_size=4 --output=pca.npz

The experiment then uses it with `JetFormer.patches = @PatchPCA` and `PatchPCA.path = "pca.npz"`.
"""

import itertools

from absl import flags, logging

from jetformer import config, program
from jetformer.experiment import Experiment
from jetformer.models.patches import fit_pca, save_pca

flags.adopt_module_key_flags(program)
flags.DEFINE_integer("patch_size", None, "Side of a patch in pixels.", required=True, lower_bound=1)
flags.DEFINE_integer("num_components", None, "Number of components to keep; default: all.", lower_bound=1)
flags.DEFINE_integer("examples", 100_000, "Maximum number of training examples to read.", lower_bound=1)
flags.DEFINE_string("output", None, "The .npz file to write.", required=True)
FLAGS = flags.FLAGS


def main() -> None:
    config.parse(FLAGS.gin_file, FLAGS.gin_bindings)
    run = config.call(Experiment)
    run.data.prepare()
    batches = run.data.train_batches(batch_size=run.batch_size, seed=run.seed)
    count = -(-min(FLAGS.examples, run.data.num_train_examples()) // run.batch_size)
    images = (batch["image"] for batch in itertools.islice(batches, count))
    pca = fit_pca(images, FLAGS.patch_size, FLAGS.num_components)
    save_pca(pca, FLAGS.output)
    logging.set_verbosity(logging.INFO)
    kept = pca.explained_variance_ratio_.sum()
    logging.info("%s: %d components, which explain %.4f of the variance", FLAGS.output, len(pca.components_), kept)


if __name__ == "__main__":
    program.run(main)

"""Train an experiment.

    python -m jetformer.main --gin_file=experiments/digits.gin --workdir=/tmp/digits

The same command resumes a run that was interrupted.
"""

from absl import app, flags, logging
from upath import UPath

from jetformer import config, runtime, train

flags.adopt_module_key_flags(config)
flags.DEFINE_string("workdir", None, "Where the run is written to and resumed from.", required=True)
FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.INFO)
    with config.one_line_errors():
        config.parse(FLAGS.gin_file, FLAGS.gin_bindings)
        run = config.call(train.Run)
        train.train(run, UPath(FLAGS.workdir), runtime.initialize(FLAGS.device))


if __name__ == "__main__":
    app.run(main)

"""Train an experiment.

    python -m jetformer.main --gin_file=experiments/digits.gin --workdir=/tmp/digits

The same command resumes an interrupted run. On SIGTERM and SIGHUP it saves and exits with code 75, on Ctrl-C with code
130; a second Ctrl-C ends it at once. --gin_bindings changes settings: --gin_bindings='train.total_steps = 100'.
"""

from absl import flags
from upath import UPath

from jetformer import program

flags.adopt_module_key_flags(program)
flags.DEFINE_string("workdir", None, "Directory or URL where the run is saved, and resumed from.", required=True)
flags.DEFINE_boolean("allow_changes", False, "Resume also with another seed or batch size than before.")
FLAGS = flags.FLAGS


def main() -> None:
    machine = program.initialize()
    from jetformer import config
    from jetformer.experiment import Experiment
    from jetformer.trainer import train

    config.parse(FLAGS.gin_file, FLAGS.gin_bindings)
    train(config.call(Experiment), UPath(FLAGS.workdir), machine, FLAGS.allow_changes, FLAGS.verify)


if __name__ == "__main__":
    program.run(main)

"""Train an experiment.

    python -m jetformer.main --gin_file=experiments/digits.gin --workdir=/tmp/digits

The same command resumes a run that was interrupted. On SIGTERM and SIGHUP
it saves, and exits with code 75; on Ctrl-C it saves, and exits with code 130. A second Ctrl-C ends it at once.
"""

from absl import app, flags, logging
from upath import UPath

from jetformer import program, runtime

flags.adopt_module_key_flags(program)
flags.DEFINE_string("workdir", None, "Where the run is written to and resumed from.", required=True)
flags.DEFINE_boolean("allow_changes", False, "Resume also with another seed or batch size than the run's so far.")
FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    program.no_arguments(argv)
    with program.one_line_errors():
        machine = runtime.initialize(FLAGS.device)
        if not FLAGS["verbosity"].present:  # of several processes one says how it goes
            logging.set_verbosity(logging.INFO if machine.process_index == 0 else logging.WARNING)
        from jetformer import config
        from jetformer.experiment import Experiment
        from jetformer.trainer import train

        config.parse(FLAGS.gin_file, FLAGS.gin_bindings)
        train(config.call(Experiment), UPath(FLAGS.workdir), machine, FLAGS.allow_changes, FLAGS.verify)


if __name__ == "__main__":
    app.run(main)

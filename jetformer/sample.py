"""Sample from a run: the picture that its experiment asks for, from its newest checkpoint.

    python -m jetformer.sample --workdir=/tmp/digits --output=/tmp/digits.png

Reads what the run has saved, whichever devices that was on. `--gin_bindings` change the picture, for example
`--gin_bindings='ClassGrid.per_class = 4'`.
"""

from absl import app, flags, logging
from upath import UPath

from jetformer import program, runtime

flags.adopt_module_key_flags(program)
flags.DEFINE_string("workdir", None, "The run's.", required=True)
flags.DEFINE_string("output", None, "The PNG to write.", required=True)
flags.DEFINE_integer("seed", 0, "Another seed, other samples.")
FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    program.no_arguments(argv)
    with program.one_line_errors():
        machine = runtime.initialize(FLAGS.device)
        from jetformer import train
        from jetformer.sampling.grid import save_png

        run, state, step = train.load(UPath(FLAGS.workdir), FLAGS.gin_file, FLAGS.gin_bindings, machine)
        picture = train.sample(run, state, FLAGS.seed, machine)
        if machine.process_index == 0:
            save_png(picture, UPath(FLAGS.output))
    logging.set_verbosity(logging.INFO)
    logging.info("Samples of step %d written to %s", step, FLAGS.output)


if __name__ == "__main__":
    app.run(main)

"""Writes the page of a run, or of several side by side: a single HTML file that loads nothing else.

    python -m jetformer.report --workdir=/tmp/digits
    python -m jetformer.report --compare=/tmp/digits,/tmp/digits_long --out=/tmp/digits.html

The run may still be training. Workdirs may be URLs.
"""

from absl import flags, logging

from jetformer import program
from jetformer.report import page

FLAGS = flags.FLAGS

flags.DEFINE_string("workdir", None, "A run's workdir.")
flags.DEFINE_list("compare", None, "The workdirs of several runs, to show side by side.")
flags.DEFINE_string("out", None, "The page to write; default: report.html in the --workdir.")
flags.DEFINE_list("metrics", None, "The metrics to draw, as train/loss,val/bits_per_dim; default: all.")


def main() -> None:
    if (FLAGS.workdir is None) == (FLAGS.compare is None):
        raise ValueError("give one of --workdir and --compare")
    if FLAGS.compare is not None and len(FLAGS.compare) < 2:
        raise ValueError("--compare: give two workdirs or more, as DIR1,DIR2")
    if FLAGS.compare is not None and FLAGS.out is None:
        raise ValueError("--compare needs an --out, the page to write")
    logging.info("Open %s", page.write(FLAGS.compare or [FLAGS.workdir], FLAGS.out, FLAGS.metrics))


if __name__ == "__main__":
    program.run(main, verbose=True)

"""Evaluate the checkpoints of a run, while it trains or afterwards.

    python -m jetformer.evaluate --workdir=/tmp/digits
    python -m jetformer.evaluate --workdir=/tmp/digits --step=best --evaluators=val

The first command follows a run: it runs the evaluators of `train.evaluators` on each complete checkpoint, the oldest
first, until that of the last step. Results are in `<workdir>/eval_<name>/results.jsonl`; `<workdir>/best.json` ranks
the steps by `train.keep_best`. --gin_file and --gin_bindings come on top of the run's configuration.

Training does not wait for evaluations, and may delete a checkpoint at any time, except the best. The same command does
what is still missing; several can run at once, with different --evaluators so that they share the work. If an
evaluator fails, an error is logged, the others still run, and the exit code is 1.
"""

import contextlib

from absl import flags, logging
from upath import UPath

from jetformer import program

flags.adopt_module_key_flags(program)
flags.DEFINE_list(*program.TRUST_IMPORTS)
flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
flags.DEFINE_list("evaluators", None, "Names of evaluators to run, of train.evaluators; default: all.")
flags.DEFINE(program.StepParser(), "step", None, "Evaluate only this checkpoint, even if it was evaluated.")
flags.DEFINE_bool("once", False, "Evaluate only the newest checkpoint, even if it was evaluated.")
flags.DEFINE_integer(
    "every",
    1,
    "Evaluate only checkpoints at multiples of this many times train.checkpoint_steps, and the last; 1: all, also "
    "those saved between, as on SIGTERM.",
    lower_bound=1,
)
flags.DEFINE_bool("newest", False, "If several checkpoints wait, evaluate the newest only.")
flags.DEFINE_float("wait_seconds", 60.0, "How long to wait for a run that has not started.", lower_bound=0.0)
flags.DEFINE_float("poll_seconds", 1.0, "How often to look for a new checkpoint.", lower_bound=0.0)
flags.DEFINE_float(
    "timeout_seconds",
    None,
    "End with an error if no checkpoint appears for this long, as when the run has failed; default: wait forever.",
    lower_bound=0.0,
)
FLAGS = flags.FLAGS


def main() -> None:
    check_flags()
    from jetformer import runtime

    machine = runtime.initialize(FLAGS.device)
    if machine.process_index > 0 and not FLAGS["verbosity"].present:  # process 0 alone reports progress
        logging.set_verbosity(logging.ERROR)
    from jetformer import evaluation  # brings TensorFlow, before which torch_xla has to be imported

    workdir, once = UPath(FLAGS.workdir), FLAGS.once or FLAGS.step is not None
    if not once:
        evaluation.wait_for_run(workdir, FLAGS.wait_seconds, FLAGS.poll_seconds)
    job = evaluation.Job(
        *(workdir, FLAGS.gin_file, FLAGS.gin_bindings, machine, FLAGS.evaluators),
        *(FLAGS.trust_imports, FLAGS.verify),
    )
    with contextlib.closing(job):
        if once:
            job.once(FLAGS.step)
        else:
            job.follow(FLAGS.poll_seconds, FLAGS.every, FLAGS.newest, FLAGS.timeout_seconds)
    if job.evaluations.failures:
        # All processes finish writing first: when one ends with an error, its launcher stops the others.
        machine.all_gather(None)
        raise ValueError(job.evaluations.summary())


def check_flags() -> None:
    """Checks that the flags fit together.

    Raises:
      ValueError: if they do not.
    """
    if FLAGS.once and FLAGS.step is not None:
        raise ValueError("give --once or --step, not both")
    following = [name for name in ("every", "newest", "timeout_seconds") if FLAGS[name].present]
    if following and (FLAGS.once or FLAGS.step is not None):
        raise ValueError(f"--{following[0]} does not apply to --once and --step: leave it out")
    if FLAGS.evaluators == []:
        raise ValueError("--evaluators is empty: give names of train.evaluators, or leave it out for all")


if __name__ == "__main__":
    program.run(main, verbose=True)

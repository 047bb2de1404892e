"""Evaluate a run's checkpoints as they come, as a job of its own.

    python -m jetformer.evaluate --workdir=/tmp/digits

Reads the configuration that the run has saved, waits for its checkpoints, scores the evaluation split with each that it
finds (the newest, where several have come meanwhile), and ends after that of the last step. Metrics go to
`<workdir>/eval`, at the checkpoint's step; started again it goes on after the last step that is there. Training is not
held up, and may delete a checkpoint at any time.
"""

import json
import time

from absl import app, flags, logging
from upath import UPath

from jetformer import program, runtime

flags.adopt_module_key_flags(program)
flags.DEFINE_string("workdir", None, "The run's.", required=True)
flags.DEFINE_float("poll_seconds", 30.0, "How often to look for a new checkpoint.", lower_bound=0.0)
flags.DEFINE_bool("once", False, "Evaluate the newest checkpoint there is, and end.")
FLAGS = flags.FLAGS

RESULTS_FILE = "results.jsonl"  # in <workdir>/eval: a line for each step


def evaluated_steps(directory: UPath) -> list[int]:
    """The steps that have been evaluated."""
    file = directory / RESULTS_FILE
    if not file.exists():
        return []
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


def evaluate_newest(
    workdir: UPath, gin_files: list[str], gin_bindings: list[str], machine: runtime.Runtime
) -> tuple[int, dict[str, float]]:
    """Evaluates the newest complete checkpoint, and writes down the result; returns its step and the figures."""
    from jetformer import metrics, train

    run, state, step = train.load(workdir, gin_files, gin_bindings, machine)
    run.check_eval_batch_size(machine)
    scalars = train.evaluate(run, state, machine)
    directory = workdir / "eval"
    directory.mkdir(parents=True, exist_ok=True)
    written = metrics.Metrics(directory, process_index=0)
    written.writer.write_scalars(step, scalars)
    written.close()
    file = directory / RESULTS_FILE
    lines = file.read_text() if file.exists() else ""
    file.write_text(lines + json.dumps({"step": step} | scalars) + "\n")
    logging.info("Step %d: %s", step, ", ".join(f"{name} {value:.4f}" for name, value in scalars.items()))
    return step, scalars


def follow(
    workdir: UPath,
    gin_files: list[str],
    gin_bindings: list[str],
    machine: runtime.Runtime,
    poll_seconds: float,
    once: bool,
) -> None:
    """Evaluates checkpoints until that of the run's last step.

    Args:
      workdir: the run's.
      gin_files, gin_bindings: on top of the run's configuration.
      machine: where to evaluate.
      poll_seconds: how long to wait between two looks.
      once: evaluate the newest checkpoint only, whether it has been or not.

    Raises:
      ValueError: with `once`, if there is no checkpoint; in several processes.
    """
    from jetformer import checkpoint, train

    if machine.process_count > 1:
        raise ValueError("jetformer.evaluate is one process: start it with python, on one host")
    while True:
        newest = checkpoint.latest(workdir)
        if newest is None and once:
            raise ValueError(f"{workdir} has no complete checkpoint")
        new = newest is not None and (once or newest not in evaluated_steps(workdir / "eval"))
        if new:
            try:
                newest, _ = evaluate_newest(workdir, gin_files, gin_bindings, machine)
            except (ValueError, OSError):
                if newest in checkpoint.steps(workdir):
                    raise
                continue  # training has deleted it, as there is a newer one
        if once or (newest is not None and newest >= train.configured(workdir, gin_files, gin_bindings).steps()):
            return
        if not new:
            time.sleep(poll_seconds)


def main(argv: list[str]) -> None:
    program.no_arguments(argv)
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.INFO)
    with program.one_line_errors():
        machine = runtime.initialize(FLAGS.device)
        follow(UPath(FLAGS.workdir), FLAGS.gin_file, FLAGS.gin_bindings, machine, FLAGS.poll_seconds, FLAGS.once)


if __name__ == "__main__":
    app.run(main)

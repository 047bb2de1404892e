"""Kill a run, and the evaluation job that follows it, at random moments, and restart them until both are done.

    python tests/kills.py --kills=50 --workdir=/tmp/kills
    python tests/kills.py --kills=20 --processes=2 --workdir=/tmp/kills2

Afterwards the workdir must equal that of an uninterrupted run: parameters, moments and moving average of the last
checkpoint, every logged value and every evaluation, bit for bit and each once, and no other files.
"""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import torch
from absl import app, flags
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from jetformer import checkpoint
from runs import bindings, checkpoint_tensors, command, results, start, torchrun

FLAGS = flags.FLAGS

STEPS = 40
OVERRIDES = {
    "train__total_steps": STEPS,
    "train__checkpoint_steps": 4,
    "train__keep_last": 99,
    "train__evaluators": '{"val": @Likelihood(), "own": @own/Likelihood()}',
    "Likelihood__every_steps": None,
    "own/Likelihood.every_steps": 4,
}
# Parts of the tags of timings and memory.
NOT_COMPARED = ("_per_sec", "seconds", "wait", "uptime", "memory", "flops")


def start_training(workdir: pathlib.Path, gin: list[str], processes: int) -> subprocess.Popen:
    args = command(workdir, gin)
    # The same number of threads each time: another one adds up in another order.
    return start(
        args if processes == 1 else torchrun(args, processes), OMP_NUM_THREADS="1", TORCH_CPP_LOG_LEVEL="ERROR"
    )


def start_job(workdir: pathlib.Path) -> subprocess.Popen:
    job = '--gin_bindings=train.evaluators = {"val": @Likelihood()}'
    args = [
        sys.executable,
        "-m",
        "jetformer.evaluate",
        f"--workdir={workdir}",
        "--device=cpu",
        "--poll_seconds=0.1",
        "--wait_seconds=600",  # for a run that is killed before it has begun
        job,
    ]
    return start(args, OMP_NUM_THREADS="1")


def finish(process: subprocess.Popen) -> None:
    _, log = process.communicate()
    assert process.returncode == 0, log[-3000:]


def kill(process: subprocess.Popen, processes: int, chance: random.Random) -> None:
    """Kills a program, or one of the processes that torchrun started for it; torchrun then ends the others."""
    children = []
    if processes > 1:
        children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(chance.choice(children)) if children else process.pid, signal.SIGKILL)
    process.communicate()


def train_amid_kills(workdir: pathlib.Path, gin: list[str], kills: int, processes: int, seed: int) -> int:
    """Trains beside a job, kills both at random, and returns the number of kills; the run may end before `kills`.

    In three of four cases a program is killed only after it has made progress since its start; in the fourth at any
    moment."""
    chance = random.Random(seed)
    starts = {"train": lambda: start_training(workdir, gin, processes), "job": lambda: start_job(workdir)}
    progress = {"train": lambda: checkpoint.steps(workdir), "job": lambda: evaluated(workdir, "val")}
    running = {name: begin() for name, begin in starts.items()}
    killed = 0
    while running:
        name = chance.choice(list(running))
        process = running[name]
        if killed < kills:
            before, at_any_moment = progress[name](), chance.random() < 0.25
            deadline = time.monotonic() + (chance.uniform(0, 10) if at_any_moment else 300)
            while process.poll() is None and progress[name]() == before and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.5))
            if process.poll() is None:
                kill(process, processes if name == "train" else 1, chance)
                killed += 1
                running[name] = starts[name]()
                continue
        finish(process)
        del running[name]
    return killed


def evaluated(workdir: pathlib.Path, name: str) -> list[int]:
    file = workdir / f"eval_{name}" / "results.jsonl"
    return [line["step"] for line in results(workdir, name)] if file.exists() else []


def logged(directory: pathlib.Path) -> dict[str, list[tuple[int, bytes]]]:
    """Returns what is compared of TensorBoard's files: by tag, steps and values in the order written."""
    accumulator = EventAccumulator(str(directory), size_guidance={"tensors": 0})
    accumulator.Reload()
    return {
        tag: [(event.step, make_ndarray(event.tensor_proto).tobytes()) for event in accumulator.Tensors(tag)]
        for tag in accumulator.Tags()["tensors"]
        if tag != "config" and not any(name in tag for name in NOT_COMPARED)
    }


def files(workdir: pathlib.Path) -> set[str]:
    """Returns the files of a workdir, except those that each start adds."""
    paths = (path.relative_to(workdir) for path in workdir.rglob("*") if path.is_file())
    return {str(path) for path in paths if not path.name.startswith("events.") and path.parts[0] != "configs"}


def compare(workdir: pathlib.Path, whole: pathlib.Path) -> None:
    """Compares a workdir with that of an uninterrupted run.

    Raises:
      AssertionError: if they differ.
    """
    assert checkpoint.steps(workdir) == checkpoint.steps(whole)
    expected, actual = (checkpoint_tensors(directory, STEPS) for directory in (whole, workdir))
    assert expected.keys() == actual.keys()
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []
    for name in "val", "own":
        lines = [[{**line, "seconds": 0} for line in results(directory, name)] for directory in (whole, workdir)]
        assert lines[0] == lines[1], name
    for part in ".", "eval_val":
        expected, actual = logged(whole / part), logged(workdir / part)
        assert expected.keys() == actual.keys()
        assert [tag for tag in expected if expected[tag] != actual[tag]] == []
    assert files(workdir) == files(whole)


def check(directory: pathlib.Path, data_dir: pathlib.Path, kills: int, processes: int, seed: int) -> int:
    """Makes both runs in a directory, compares them, and returns the number of kills."""
    gin = bindings(data_dir, **OVERRIDES)
    finish(start_training(directory / "whole", gin, processes))
    finish(start_job(directory / "whole"))
    killed = train_amid_kills(directory / "killed", gin, kills, processes, seed)
    compare(directory / "killed", directory / "whole")
    return killed


def main(argv: list[str]) -> None:
    del argv
    directory = pathlib.Path(FLAGS.workdir)
    total = number = 0
    while total < FLAGS.kills:
        number += 1
        kills, seed = FLAGS.kills - total, FLAGS.seed + number
        total += check(directory / str(number), directory / "data", kills, FLAGS.processes, seed)
        print(f"{total} kills, {number} runs equal to uninterrupted ones", flush=True)


if __name__ == "__main__":
    flags.DEFINE_integer("kills", 50, "Number of kills.")
    flags.DEFINE_integer("processes", 1, "Number of processes of the run.")
    flags.DEFINE_integer("seed", 0, "Of the moments of the kills.")
    flags.DEFINE_string("workdir", None, "Directory of the runs.", required=True)
    app.run(main)

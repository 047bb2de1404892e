"""launch/sweep.sh: one run for each argument, which resumes where it stopped, by any launcher."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from runs import preloaded

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = ROOT / "launch/sweep.sh"
BASE = "experiments/jet_digits.gin"

# What starts a run here: writes down what it is given, and ends as the file `plan` in its directory says.
LAUNCHER = """
import json, os, pathlib, signal, sys, time
here = pathlib.Path(__file__).parent
args = sys.argv[1:]
with (here / "calls").open("a") as file:
    print(json.dumps([args, os.environ["WORKDIR"]]), file=file)
print("working")
name = os.path.basename(os.environ["WORKDIR"])
plan = json.loads((here / "plan").read_text()) if (here / "plan").exists() else {}
if plan.get(name) == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (here / "waiting").touch()
    time.sleep(60)
sys.exit(plan.get(name, 0))
"""


class Sweep:
    """The script with a launcher that only writes down what it is given."""

    def __init__(self, path):
        self.path = path
        (path / "launcher.py").write_text(LAUNCHER)
        launcher = f"{sys.executable} {path / 'launcher.py'}"
        programs = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
        self.environ = {**os.environ, "LAUNCHER": launcher, "WORKDIR": str(path / "runs"), "GIN_FILE": BASE}
        self.environ["PATH"] = programs  # `python` is this one

    def start(self, *args, **environ):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        # A shell's background jobs, of which the tests may be one, ignore Ctrl-C, and bash then cannot trap it.
        heeding = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen([SCRIPT, *args], cwd=ROOT, env=self.environ | environ, preexec_fn=heeding, **pipes)

    def __call__(self, *args, returncode=0, **environ):
        process = self.start(*args, **environ)
        out, err = process.communicate(timeout=60)
        assert process.returncode == returncode, out + err
        return out, err

    def plan(self, **codes):
        (self.path / "plan").write_text(json.dumps(codes))

    def calls(self):
        file = self.path / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def names(self):
        return [os.path.basename(workdir) for _, workdir in self.calls()]


@pytest.fixture
def sweep(tmp_path):
    return Sweep(tmp_path)


def test_a_run_for_each_file_and_binding(sweep):
    sweep(
        "experiments/ablations/cnn.gin",
        "Jet.depth = 2; Jet.kinds = ('channels', 'spatial')",
        "deep: Jet.depth = 64",
        "--",
        "--gin_bindings=TOTAL_STEPS = 3",
        "--device=cpu",
    )
    runs = sweep.path / "runs"
    common = ["--gin_bindings=TOTAL_STEPS = 3", "--device=cpu"]
    names = ["cnn", "Jet.depth=2_Jet.kinds=_channels_spatial", "deep"]
    expected = [
        ["--gin_file=experiments/ablations/cnn.gin"],
        [f"--gin_file={BASE}", "--gin_bindings=Jet.depth = 2", "--gin_bindings=Jet.kinds = ('channels', 'spatial')"],
        [f"--gin_file={BASE}", "--gin_bindings=Jet.depth = 64"],
    ]
    assert sweep.calls() == [
        [[f"--workdir={runs / name}", *args, *common], str(runs / name)]
        for name, args in zip(names, expected, strict=True)
    ]
    assert (runs / "logs" / "deep.log").read_text() == "working\n"


def test_a_list_in_a_file(sweep):
    file = sweep.path / "list"
    file.write_text("# rates\n\nlow: make_optimizer.lr = 1e-4\n  \nhigh: make_optimizer.lr = 1e-2")
    sweep(f"@{file}", "Jet.depth = 1")
    assert sweep.names() == ["low", "high", "Jet.depth=1"]


def test_what_has_ended_is_left_out_and_what_has_failed_is_not(sweep):
    runs = ["a: Jet.depth = 1", "b: Jet.depth = 2", "c: Jet.depth = 3"]
    sweep.plan(b=1)
    _, err = sweep(*runs, returncode=1)
    assert sweep.names() == ["a", "b", "c"]
    assert err.splitlines()[-1] == "error: 1 of 3 runs failed: b"
    assert "logs/b.log" in err
    sweep.plan()
    out, _ = sweep(*runs)
    assert sweep.names() == ["a", "b", "c", "b"]
    assert "a: finished already" in out
    # With other arguments it is not what has ended.
    sweep(*runs, "--", "--gin_bindings=TOTAL_STEPS = 9")
    assert sweep.names()[4:] == ["a", "b", "c"]


def test_an_interrupted_run_ends_the_sweep_and_is_resumed_by_the_next(sweep):
    runs = ["a: Jet.depth = 1", "b: Jet.depth = 2"]
    sweep.plan(a=75)
    out, _ = sweep(*runs, returncode=75)
    assert sweep.names() == ["a"]
    assert "a: interrupted" in out
    sweep.plan()
    sweep(*runs)
    assert sweep.names() == ["a", "a", "b"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_run_which_saves(sweep, signum):
    sweep.plan(a="wait")
    process = sweep.start("a: Jet.depth = 1", "b: Jet.depth = 2")
    deadline = time.monotonic() + 30
    while not (sweep.path / "waiting").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signum)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "a: interrupted" in out
    assert sweep.names() == ["a"]


def test_dry_run(sweep):
    out, _ = sweep("--dry_run", "experiments/ablations/cnn.gin", "a: Jet.depth = 1", WORKDIR="gs://bucket/sweep/")
    assert [line.split()[2:] for line in out.splitlines()] == [
        ["--workdir=gs://bucket/sweep/cnn", "--gin_file=experiments/ablations/cnn.gin"],
        ["--workdir=gs://bucket/sweep/a", f"--gin_file={BASE}", "--gin_bindings=Jet.depth\\", "=\\", "1"],
    ]
    assert not sweep.calls()


@pytest.mark.parametrize(
    ("args", "environ", "message"),
    [
        ([], {}, "no runs"),
        (["Jet.depth = 1"], {"WORKDIR": ""}, "WORKDIR is not set"),
        (["Jet.depth = 1"], {"GIN_FILE": ""}, "GIN_FILE is not set"),
        (["nowhere.gin"], {}, "file nowhere.gin"),
        (["@nowhere"], {}, "file nowhere"),
        (["Jet.depth = 1", "--gin_bindings=TOTAL_STEPS = 3"], {}, "--gin_bindings=TOTAL_STEPS = 3"),
        (["Jet.depth = 1", "Jet.depth=1"], {}, "two runs are named Jet.depth=1"),
    ],
)
def test_mistakes_are_found_before_anything_runs(sweep, args, environ, message):
    _, err = sweep(*args, returncode=2, **environ)
    assert err.startswith(f"error: {message}") or message in err
    assert err.count("\n") == 1
    assert not sweep.calls()


@pytest.mark.slow
def test_with_the_training_program(sweep, data_dir):
    """Two runs of two steps, with a table and a page of both; the second time nothing is trained."""
    common = [
        "--device=cpu",
        f'--gin_bindings=Data.data_dir = "{data_dir}"',
        "--gin_bindings=TOTAL_STEPS = 2",
        "--gin_bindings=Jet.depth = 1",
        "--gin_bindings=train.evaluators = {}",
    ]
    launcher = {"LAUNCHER": " ".join(preloaded([sys.executable, "-m", "jetformer.main"]))}
    runs = ["experiments/ablations/cnn.gin", "wide: Jet.emb_dim = 128"]
    out, err = sweep(*runs, "--", *common, **launcher)
    assert f"--out={sweep.path}/runs/report.html" in out
    assert [line.split()[:2] for line in err.splitlines() if line.startswith(("cnn ", "wide "))] == [
        ["cnn", "2"],
        ["wide", "2"],
    ]
    assert (sweep.path / "runs" / "report.html").exists()
    for name in ("cnn", "wide"):
        assert (sweep.path / "runs" / name / "checkpoints" / "000000002" / "COMPLETE").exists()
    out, _ = sweep(*runs, "--", *common, **launcher)
    assert out.count("finished already") == 2


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck():
    subprocess.run(["shellcheck", "-x", SCRIPT], cwd=ROOT, check=True)


def test_lines_are_at_most_120_characters():
    assert max(map(len, SCRIPT.read_text().splitlines())) <= 120

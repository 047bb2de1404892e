"""`--device=tpu`, with a device that stands in for Google's torch_tpu, see `stubtpu/device.cpp`.

It computes on the CPU. What it shows is what this project asks of a TPU: device, dtypes, backends. No test imports
torch_tpu itself, which looks for TPUs and for Google Cloud.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch
from torch.utils import cpp_extension

from jetformer import checkpoint
from runs import bindings, command, run, scalars, start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.__version__ < (2, 11), reason="torch_tpu needs torch 2.11"),
]

STUB = pathlib.Path(__file__).parent / "stubtpu"
SIZES = {
    "train__total_steps": 8,
    "train__keep_last": 9,
    "train__autocast": '"bfloat16"',
    "Likelihood__every_steps": 4,
    "Samples__every_steps": 8,
    "Data__eval_split": '"validation[:41]"',  # the last batch is not full
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A directory of Python packages with the stand-in; torch loads it as it loads the real one, by its entry point."""
    directory = tmp_path_factory.mktemp("site")
    shutil.copy(STUB / "torch_tpu.py", directory)
    info = directory / "torch_tpu-0.2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: torch_tpu\nVersion: 0.2.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_tpu = torch_tpu:load\n")
    output = directory / f"_device{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = ["-std=c++20", "-O0", "-w", "-shared", "-fPIC", "-DTORCH_EXTENSION_NAME=_device"]
    flags += [f"-I{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_path("include"))]
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10", "-ltorch_python"]
    paths = [f"-L{path}" for path in cpp_extension.library_paths()]
    subprocess.run(["g++", *flags, STUB / "device.cpp", "-o", output, *paths, *libraries], check=True)
    return directory


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory, data_dir):
    """A run on the CPU."""
    workdir = tmp_path_factory.mktemp("on_cpu")
    run(workdir, data_dir, **SIZES)
    return workdir


def output_of(site, args, returncode=0, **environment):
    """What `python …` prints where the stand-in is installed."""
    path = os.pathsep.join((str(site), *sys.path))
    process = start(args, fresh=True, **{"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment)
    out, log = process.communicate(timeout=500)
    assert process.returncode == returncode, log[-8000:]
    return out + log


def train(site, workdir, data_dir, processes=1, **overrides):
    args = command(workdir, bindings(data_dir, **SIZES | overrides), "experiments/digits.gin", "--device=tpu")
    if processes > 1:
        args[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return output_of(site, args, TORCH_TPU_SLICEBUILDER_ADDRESSES="localhost:8070,localhost:8071")


def assert_equal_from(first, expected, workdir):
    expected, actual = scalars(expected), scalars(workdir)
    # Without autocast they differ by more than 1e-4.
    for name in ("train/loss", "param_norm", "val/bits_per_dim", "val_ema/bits_per_dim"):
        steps = [step for step in expected[name] if step >= first]
        assert steps
        assert [actual[name][step] for step in steps] == pytest.approx([expected[name][s] for s in steps], rel=1e-5)


def half_of(workdir, to):
    """A workdir at step 4 of another one."""
    shutil.copytree(workdir / "checkpoints" / "000000004", to / "checkpoints" / "000000004")
    return to


def test_a_run_is_that_of_the_cpu(site, on_cpu, tmp_path, data_dir):
    """With blocks that torch_tpu's backend compiles. The CPU resumes from its checkpoints."""
    log = train(site, tmp_path / "tpu", data_dir, train__compile='"blocks"')
    assert "compiled a graph for tpu" in log
    assert_equal_from(1, on_cpu, tmp_path / "tpu")
    facts = json.loads((tmp_path / "tpu" / "run.json").read_text())
    assert facts["device"] == "TPU (torch_tpu 0.2.0)"
    assert facts["versions"]["torch_tpu"] == "0.2.0"
    run(half_of(tmp_path / "tpu", tmp_path / "cpu"), data_dir, **SIZES)
    assert min(scalars(tmp_path / "cpu")["train/loss"]) == 5
    assert_equal_from(5, on_cpu, tmp_path / "cpu")


def test_two_processes_resume_from_the_cpu(site, on_cpu, tmp_path, data_dir):
    log = train(site, half_of(on_cpu, tmp_path), data_dir, processes=2)
    assert "from step 4" in log
    assert min(scalars(tmp_path)["train/loss"]) == 5
    assert_equal_from(5, on_cpu, tmp_path)
    assert checkpoint.latest(tmp_path) == 8


CHECK = """
import torch
from jetformer import config, runtime
from jetformer.experiment import Experiment

print("auto:", runtime.initialize("auto").device)
config.parse(["experiments/digits.gin"], ["train.mesh = {'data': 1, 'fsdp': 2}"])
try:
    config.call(Experiment).check_mesh(runtime.Runtime(torch.device("tpu"), device_count=2, process_count=2))
except ValueError as error:
    print("mesh:", error)
"""


def test_auto_and_a_mesh_that_shards(site):
    auto, mesh = output_of(site, [sys.executable, "-c", CHECK]).splitlines()[-2:]
    assert auto == "auto: tpu"
    for word in ("train.mesh = {'data': 1, 'fsdp': 2}", "--device=tpu", "--device=xla"):
        assert word in mesh


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"STUB_NO_TPU": "1"}, ("--device=tpu", "torch_tpu finds no TPU")),
        ({"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, ("--device=tpu", "TORCH_DEVICE_BACKEND_AUTOLOAD")),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, ("--device=tpu", "launch/tpu_host.sh")),
    ],
)
def test_what_is_missing_is_said_in_one_line(site, tmp_path, environment, words):
    args = command(tmp_path / "run", [], "experiments/digits.gin", "--device=tpu")
    lines = output_of(site, args, returncode=1, **environment).splitlines()
    (error,) = [line for line in lines if line.startswith("error: ")]
    assert lines[-1] == error
    assert all(word in error for word in words)
    assert not (tmp_path / "run").exists()

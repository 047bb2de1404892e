"""Several processes equal one: DDP, FSDP2 and both have the losses of one process, and read each other's checkpoints;
if one process fails, all end."""

import os
import re
import shutil
import signal
import socket
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from jetformer import checkpoint, load
from runs import bindings, command, run, scalars, start, torchrun

pytestmark = pytest.mark.slow

# The last batch of evaluation is not full, and process 1 has the smaller part of it. Part of the model is frozen, and
# DDP and FSDP2 must not wait for its gradients.
SIZES = {
    "train__total_steps": 8,
    "Likelihood__every_steps": 4,
    "Samples__every_steps": 8,
    "train__keep_last": 9,
    "Data__eval_split": '"validation[:41]"',
    "make_optimizer__frozen": '("flow.*posemb", "text_emb.weight")',  # all couplings are compiled alike
}
DDP, FSDP, BOTH = "{'data': -1}", "{'fsdp': -1}", "{'data': 2, 'fsdp': 2}"


def start_several(workdir, gin_bindings, processes=2, gin_file="experiments/digits.gin", **environment):
    args = torchrun(command(workdir, gin_bindings, gin_file), processes)
    return start(args, **{"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"} | environment)


def run_several(workdir, gin_bindings, processes=2, returncode=0, gin_file="experiments/digits.gin"):
    process = start_several(workdir, gin_bindings, processes, gin_file)
    _, log = process.communicate(timeout=900)
    assert process.returncode == returncode, log[-8000:]
    return log


@pytest.fixture(scope="module")
def one(tmp_path_factory, data_dir):
    """A run in one process."""
    workdir = tmp_path_factory.mktemp("one")
    run(workdir, data_dir, **SIZES)
    return workdir


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, data_dir):
    """The same run in two processes, by FSDP2."""
    workdir = tmp_path_factory.mktemp("sharded")
    run_several(workdir, bindings(data_dir, **SIZES, train__mesh=FSDP))
    return workdir


def assert_equal_from(first, expected, workdir, rel=1e-5):
    expected, actual = scalars(expected), scalars(workdir)
    # All processes start from the same components, so their use is the same.
    components = [f"{where}/{kind}_components" for where in ("train", "val") for kind in ("effective", "distinct")]
    for name in ("train/loss", "grad_norm", "param_norm", "val/bits_per_dim", "val_ema/bits_per_dim", *components):
        for step in expected[name]:
            if step >= first:
                assert actual[name][step] == pytest.approx(expected[name][step], rel=rel), (name, step)


@pytest.mark.parametrize(
    ("processes", "mesh", "overrides"),
    [
        (2, DDP, {}),
        (4, BOTH, {}),
        (2, DDP, {"train__grad_accum_steps": 4}),
        (2, FSDP, {"train__grad_accum_steps": 2, "train__activation_checkpointing": '"everything"'}),
    ],
    ids=["ddp", "both", "ddp accumulation", "fsdp accumulation checkpointing"],
)
def test_losses_are_those_of_one_process(one, tmp_path, data_dir, processes, mesh, overrides):
    log = run_several(tmp_path, bindings(data_dir, **SIZES, train__mesh=mesh, **overrides), processes)
    assert_equal_from(1, one, tmp_path)
    drawn = [np.asarray(Image.open(w / "eval_samples" / "grid" / "000000008.png")).astype(int) for w in (tmp_path, one)]
    assert np.abs(drawn[0] - drawn[1]).max() <= 1
    assert len(re.findall("step 8: .*val/bits_per_dim ", log)) == 1, "one process logs"
    assert "FutureWarning" not in log


def test_fsdp_is_one_process(one, sharded):
    assert_equal_from(1, one, sharded)


def test_a_flow_of_noisy_images_under_fsdp(tmp_path, data_dir):
    """Losses, and samples, from which a gradient through the flow removes the noise."""
    small = {"train__total_steps": 4, "train__noise_scale": 0.0, "TarFlow__depth": 2, "TarFlow__emb_dim": 16}
    small |= {"Likelihood__every_steps": 4, "FlowSamples__every_steps": 4, "FlowSamples__batch_size": 8}
    small |= {"train__evaluators": '{"val": @Likelihood(), "samples": @FlowSamples()}'}
    for name, processes in (("one", 1), ("two", 2)):
        gin_bindings = bindings(data_dir, **small, train__mesh=FSDP)
        run_several(tmp_path / name, gin_bindings, processes, gin_file="experiments/tarflow_digits_noisy.gin")
    expected, actual = scalars(tmp_path / "one"), scalars(tmp_path / "two")
    for name in ("train/loss", "val/noisy_bits_per_dim", "val_ema/noisy_bits_per_dim", "samples/latents_std"):
        assert actual[name] == pytest.approx(expected[name], rel=1e-5)
    for name in ("grid", "classes"):
        paths = [tmp_path / run / "eval_samples" / name / "000000004.png" for run in ("one", "two")]
        one, two = (np.asarray(Image.open(path)).astype(int) for path in paths)
        assert np.abs(one - two).max() <= 1


def test_students_under_fsdp(tmp_path, data_dir):
    """They start from a run without them, whose flow stays as it is, and sample by any number of processes."""
    small = {"train__total_steps": 4, "train__noise_scale": 0.0, "TarFlow__depth": 2, "TarFlow__emb_dim": 16}
    small |= {"Student__emb_dim": 16, "Likelihood__every_steps": 4, "FlowSamples__every_steps": 4}
    small |= {"train__evaluators": '{"val": @Likelihood(), "samples": @FlowSamples()}'}
    student = "tarflow_digits_student", f"'{tmp_path}/flow'"
    for name, (gin_file, init_from), processes in (
        ("flow", ("tarflow_digits", None), 1),
        ("one", student, 1),
        ("two", student, 2),
    ):
        gin_bindings = bindings(data_dir, **small, train__mesh=FSDP, train__init_from=init_from)
        run_several(tmp_path / name, gin_bindings, processes, gin_file=f"experiments/{gin_file}.gin")
    expected, actual = scalars(tmp_path / "one"), scalars(tmp_path / "two")
    for name in ("train/student_loss", "val/student_error", "val_ema/student_loss", "param_norm"):
        assert actual[name] == pytest.approx(expected[name], rel=1e-5)
    paths = [tmp_path / run / "eval_samples" / "grid" / "000000004.png" for run in ("one", "two")]
    one, two = (np.asarray(Image.open(path)).astype(int) for path in paths)
    assert np.abs(one - two).max() <= 1
    flow, student = (load(tmp_path / name, device="cpu").module for name in ("flow", "one"))
    theirs = student.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in flow.state_dict().items())


def test_compiled_blocks_under_fsdp(one, tmp_path, data_dir):
    """Without sampling, whose graphs Inductor compiles for minutes."""
    overrides = {"train__compile": '"blocks"', "train__evaluators": '{"val": @Likelihood()}'}
    run_several(tmp_path, bindings(data_dir, **SIZES, **overrides, train__mesh=FSDP))
    assert_equal_from(1, one, tmp_path)


def test_bfloat16_under_fsdp(one, tmp_path, data_dir):
    """It rounds what one process rounds; how gradients are summed differs by bfloat16's precision."""
    overrides = {"train__autocast": '"bfloat16"', "JetFormer__head_dtype": '"bfloat16"'}
    run(tmp_path / "one", data_dir, **SIZES, **overrides)
    run_several(tmp_path / "two", bindings(data_dir, **SIZES, train__mesh=FSDP, **overrides))
    exact, expected, actual = scalars(one), scalars(tmp_path / "one"), scalars(tmp_path / "two")
    for name in ("train/loss", "val/bits_per_dim"):
        assert expected[name] == pytest.approx(exact[name], rel=1e-2)
        assert actual[name] == pytest.approx(expected[name], rel=3e-5)
    assert actual["train/loss"][1] == pytest.approx(expected["train/loss"][1], rel=1e-6)


def test_muon_and_early_stopping_under_fsdp(tmp_path, data_dir):
    """Muon needs whole matrices, of which each process keeps a shard; all processes stop at the same step. The prior of
    factored-out dimensions has a head of its own to shard."""
    sizes = {
        "make_optimizer__muon": True,
        "make_optimizer__frozen": '("flow.couplings.0.*",)',
        # Bits per dim fall: the run stops at step 4, and step 2 is the best.
        "train__keep_best": '"val/bits_per_dim"',
        "train__keep_best_mode": '"higher"',
        "train__patience": 1,
        "train__evaluators": '{"val": @Likelihood()}',
        "Likelihood__every_steps": 2,
        "JetFormer__out_dim": 2,
        "JetFormer__factored_prior": "@FactoredPrior",
    }
    run(tmp_path / "one", data_dir, **sizes)
    run_several(tmp_path / "two", bindings(data_dir, **sizes, train__mesh=FSDP))
    assert checkpoint.steps(tmp_path / "one") == checkpoint.steps(tmp_path / "two") == [2, 4]
    assert checkpoint.best(tmp_path / "one") == checkpoint.best(tmp_path / "two") == 2
    expected, actual = scalars(tmp_path / "one"), scalars(tmp_path / "two")
    for name in ("train/loss", "param_norm"):
        assert actual[name] == pytest.approx(expected[name], rel=1e-5), name


def half_of(workdir, to):
    """A workdir at step 4 of another one."""
    shutil.copytree(workdir / "checkpoints" / "000000004", to / "checkpoints" / "000000004")
    return to


@pytest.mark.parametrize(("written_by", "mesh"), [("one", FSDP), ("sharded", DDP), ("sharded", None)])
def test_checkpoints_move(one, tmp_path, data_dir, request, written_by, mesh):
    """From one process to FSDP2, from FSDP2 to DDP and to one process."""
    half_of(request.getfixturevalue(written_by), tmp_path)
    if mesh is None:
        run(tmp_path, data_dir, **SIZES)
    else:
        log = run_several(tmp_path, bindings(data_dir, **SIZES, train__mesh=mesh))
        assert "from step 4" in log
    assert min(scalars(tmp_path)["train/loss"]) == 5
    assert_equal_from(5, one, tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch_size = 17", r"train\.batch_size = 17\b.* 2 devices"),
        ("train.mesh = {'fspd': -1}", r"train\.mesh = {'fspd': -1}.*'data'.*'fsdp'"),
        ("train.mesh = {'fsdp': 3}", r"train\.mesh = {'fsdp': 3}.* 2 device"),
        ("train.compile = 'triton'", r"train\.compile = 'triton'.*'blocks'"),
    ],
)
def test_a_mistake_ends_all_in_one_line(tmp_path, data_dir, override, message):
    log = run_several(tmp_path / "run", [*bindings(data_dir), override], returncode=1)
    lines = [line for line in log.splitlines() if "error: " in line]
    assert len(lines) == 1, log
    assert re.search(message, lines[0])
    assert not (tmp_path / "run").exists()


def children(process):
    return [int(pid) for pid in open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()]


def wait_for_checkpoint(process, workdir):
    deadline = time.monotonic() + 200
    while not checkpoint.steps(workdir):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("mesh", [DDP, FSDP])
def test_all_end_when_one_is_killed(tmp_path, data_dir, mesh):
    overrides = {"train__total_steps": 100_000, "train__checkpoint_steps": 2, "Likelihood__every_steps": None}
    process = start_several(tmp_path, bindings(data_dir, **overrides, train__mesh=mesh))
    wait_for_checkpoint(process, tmp_path)
    both = children(process)
    os.kill(both[1], signal.SIGKILL)
    _, log = process.communicate(timeout=100)
    assert process.returncode != 0
    assert not any(os.path.exists(f"/proc/{pid}") for pid in both)
    # Either the signal or the lost connection comes first.
    assert "another process of this run has ended" in log or "SIGTERM" in log


def test_a_host_that_fails_to_start_stops_the_other(tmp_path, data_dir):
    """Two hosts with one process each; the experiment of one does not exist."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    hosts = []
    for gin_file in ("experiments/digits.gin", "experiments/missing.gin"):
        args = ["launch/gpu.sh", f"--gin_file={gin_file}", f"--workdir={tmp_path}/run", "--device=cpu"]
        args += [f"--gin_bindings={binding}" for binding in bindings(data_dir)]
        environment = {"NPROC": "1", "NNODES": "2", "RDZV_ENDPOINT": f"localhost:{port}", "PYTHON": sys.executable}
        hosts.append(start(args, OMP_NUM_THREADS="1", RDZV_ID=f"test{port}", **environment))
    logs = [host.communicate(timeout=120)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [1, 1], logs
    assert sum("missing.gin" in line for line in logs[1].splitlines() if line.startswith("error: ")) == 1, logs[1]
    assert not (tmp_path / "run").exists()


def test_gpu_sh_saves_on_sigterm(tmp_path, data_dir):
    args = ["launch/gpu.sh", *command(tmp_path, bindings(data_dir, train__total_steps=100_000))[3:]]
    process = start(args, NPROC="2", OMP_NUM_THREADS="1", PYTHON=sys.executable)
    wait_for_checkpoint(process, tmp_path)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=100)
    assert process.returncode == 75, log[-5000:]
    assert f"Stopped on SIGTERM after step {checkpoint.latest(tmp_path)}, which is saved" in log


def test_gpu_sh_without_a_rendezvous():
    process = start(["launch/gpu.sh", "--workdir=x"], NNODES="2")
    _, log = process.communicate(timeout=20)
    assert process.returncode == 2
    assert re.fullmatch(r"error: NNODES=2\b.*RDZV_ENDPOINT=HOST:PORT.*\n", log)


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (75, True)])
def test_gpu_slurm(tmp_path, code, requeued):
    """With stand-ins for Slurm's programs."""
    for name, script in (
        ("srun", f'echo "srun $* $NNODES $RDZV_ENDPOINT" >> {tmp_path}/calls; exit {code}'),
        ("scontrol", f'[[ $1 == show ]] && printf "node3\\nnode7\\n"; echo "scontrol $*" >> {tmp_path}/calls'),
    ):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[3,7]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "123456"}
    process = start(["bash", "launch/gpu.slurm", "--workdir=x"], PATH=f"{tmp_path}:{os.environ['PATH']}", **slurm)
    process.communicate(timeout=20)
    assert process.returncode == code
    calls = (tmp_path / "calls").read_text().splitlines()
    assert "srun --kill-on-bad-exit=0 launch/gpu.sh --workdir=x 2 node3:23456" in calls
    assert ("scontrol requeue 123456" in calls) == requeued


# Process 0 fails at once; process 1 fails after it has checked once more for a signal.
FAILING = """
import datetime
import sys
from jetformer import main, program, runtime
from jetformer.evaluators.likelihood import Likelihood
from jetformer.loops.torch_loop import TorchLoop

def fail(*args):
    raise OSError("no space left in a block")

per_example, calls = TorchLoop.per_example, []

def fails_in_a_block(loop, runner, *args, **kwargs):
    calls.append(kwargs)
    hooks = []
    if failing == "in a block" and len(calls) == 2:  # with the moving average
        hooks = [runner.model.decoder.blocks[0].register_forward_hook(fail)]
    try:
        return per_example(loop, runner, *args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()

TorchLoop.per_example = fails_in_a_block
call, failing = Likelihood.__call__, sys.argv.pop(1)
runtime._PATIENCE = datetime.timedelta(seconds=3)

def fails(self, context):
    rank = context.loop.runtime.process_index
    if context.step == 4 and str(rank) in failing:
        if rank == 1:
            context.each_batch()
        raise OSError(f"no space left for {rank}")
    return call(self, context)

Likelihood.__call__ = fails
program.run(main.main)
"""


def run_failing(tmp_path, data_dir, failing, **overrides):
    (tmp_path / "failing.py").write_text(FAILING)
    flags = command(tmp_path / "run", bindings(data_dir, **SIZES, **overrides))[3:]
    args = torchrun([sys.executable, str(tmp_path / "failing.py"), failing, *flags], 2)
    process = start(args, OMP_NUM_THREADS="1", TORCH_CPP_LOG_LEVEL="ERROR", PYTHONPATH=".")
    _, log = process.communicate(timeout=200)
    assert process.returncode == 1, log
    return log


def test_an_evaluator_that_fails_in_all_processes_leaves_the_run(one, tmp_path, data_dir):
    log = run_failing(tmp_path, data_dir, "0 and 1")
    assert log.count("val at step 4: no space left for 0") == 1
    assert log.count("error: the run is complete, but 1 evaluation(s) failed, see the errors above: val at step 4") == 1
    assert sorted(scalars(tmp_path / "run")["val/bits_per_dim"]) == [8]
    assert_equal_from(8, one, tmp_path / "run")


def test_an_evaluator_that_fails_under_fsdp_leaves_the_parameters(sharded, tmp_path, data_dir):
    """It fails in a forward pass, with some parameters gathered, and the moving average in their place."""
    log = run_failing(tmp_path, data_dir, "in a block", train__mesh=FSDP)
    assert log.count("val at step 4: no space left in a block") == 1
    assert_equal_from(5, sharded, tmp_path / "run", rel=1e-9)


def test_an_evaluator_that_fails_in_one_process_ends_the_run(tmp_path, data_dir):
    log = run_failing(tmp_path, data_dir, "1")
    assert log.count("error: no space left for 1 (process 1; the others wait for it)") == 1
    assert checkpoint.latest(tmp_path / "run") == 4

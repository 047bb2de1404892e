"""Devices and seeds."""

import datetime
import importlib.util
import os
import socket
import sys
import time
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.distributed_c10d import _get_default_store

from jetformer import runtime
from runs import start


def test_auto_is_a_gpu_if_there_is_one():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert runtime.initialize("auto").device.type == expected


def test_no_cuda_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="--device=cuda"):
        runtime.initialize("cuda")


def test_more_processes_than_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"4 processes.* 2 CUDA device.*--nproc-per-node=2"):
        runtime.initialize("cuda")


def test_torchrun_chooses_the_number_of_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match=r"--device=cuda:1\b.*torchrun.*--device=cuda$"):
        runtime.initialize("cuda:1")


def test_xla_refuses_torchrun(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match=r"--device=xla.*torchrun"):
        runtime.initialize("xla")


def test_xla_without_torch_xla(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch_xla" else find_spec(name))
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    with pytest.raises(ImportError, match=r"torch_xla.*pip install -e '\.\[xla\]'.*torch==2\.9\.0"):
        runtime.initialize("xla")


def test_tpu_without_torch_tpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"--device=tpu.*torch_tpu.*pip install -e '\.\[tpu-native\]'.*--device=xla"):
        runtime.initialize("tpu")


def test_torch_xla_of_another_torch(tmp_path):
    """A torch_xla whose import fails as with the C++ symbols of another torch."""
    (tmp_path / "torch_xla").mkdir()
    (tmp_path / "torch_xla" / "__init__.py").write_text("raise ImportError('_XLAC.so: undefined symbol: _ZN5torch')")
    (tmp_path / "torch_xla-2.8.0.dist-info").mkdir()
    (tmp_path / "torch_xla-2.8.0.dist-info" / "METADATA").write_text("Name: torch_xla\nVersion: 2.8.0\n")
    args = [sys.executable, "-m", "jetformer.main", "--device=xla", "--gin_file=x", f"--workdir={tmp_path}/run"]
    process = start(args, fresh=True, PYTHONPATH=os.pathsep.join((str(tmp_path), *sys.path)))
    _, log = process.communicate(timeout=100)
    assert process.returncode == 1
    lines = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, log
    for name in ("torch_xla 2.8.0", f"torch {torch.__version__}", "torch==2.9.0", "torch_xla==2.9.0"):
        assert name in lines[0]


def test_triton_comes_before_tensorflow(tmp_path):
    """A stand-in for Triton 3.7, which ends the process if TensorFlow has been imported before."""
    for name, text in (("triton", "import os, sys\n'tensorflow' in sys.modules and os.abort()"), ("tensorflow", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    (tmp_path / "triton-3.10.1.dist-info").mkdir()
    (tmp_path / "triton-3.10.1.dist-info" / "METADATA").write_text("Name: triton\nVersion: 3.10.1\n")
    run = lambda code: start(
        [sys.executable, "-c", code], fresh=True, PYTHONPATH=os.pathsep.join((str(tmp_path), *sys.path))
    )
    process = run("import jetformer, tensorflow, triton")
    _, log = process.communicate(timeout=100)
    assert process.returncode == 0, log
    process = run("import tensorflow, jetformer")
    _, log = process.communicate(timeout=100)
    assert process.returncode == 1
    assert log.endswith("ImportError: Triton must be imported before TensorFlow: import jetformer first\n")


@pytest.mark.parametrize(
    ("mesh", "devices", "sizes"),
    [
        (None, 8, (8, 1)),
        ({"data": -1}, 8, (8, 1)),
        ({"fsdp": -1}, 8, (1, 8)),
        ({"data": 2, "fsdp": -1}, 8, (2, 4)),
        ({"data": -1, "fsdp": 8}, 8, (1, 8)),
        ({"data": 2, "fsdp": 4}, 8, (2, 4)),
        ({}, 1, (1, 1)),
        ({"data": -1, "fsdp": 1}, 1, (1, 1)),
    ],
)
def test_mesh(mesh, devices, sizes):
    assert runtime.resolve_mesh(mesh, devices) == dict(zip(("data", "fsdp"), sizes, strict=True))


@pytest.mark.parametrize("mesh", [{"data": 3}, {"data": 3, "fsdp": -1}, {"fsdp": 16, "data": -1}, {}])
def test_a_mesh_that_does_not_fit(mesh):
    with pytest.raises(ValueError, match=r"train\.mesh = .* 8 device"):
        runtime.resolve_mesh(mesh, 8)


@pytest.mark.parametrize("mesh", [{"model": 8}, {"data": -1, "fsdp": -1}, {"data": 0}, {"data": -2}])
def test_an_invalid_mesh(mesh):
    with pytest.raises(ValueError, match=r"train\.mesh = .*'data'.*'fsdp'"):
        runtime.resolve_mesh(mesh, 8)


def test_seeds_differ_by_every_part():
    parts = [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 0, 0), (2**32,), (0, 2**32), (2**64 + 1,)]
    seeds = {runtime.derive_seed(*p) for p in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert runtime.derive_seed(1, 2) == runtime.derive_seed(1, 2)


def _together(rank, port, results):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
    runtime._PATIENCE = datetime.timedelta(seconds=3)
    machine = runtime.Runtime(torch.device("cpu"), rank, 3, 3, _get_default_store())
    kept = []

    def act(*errors):
        held = torch.zeros(1)
        kept.append(weakref.ref(held))
        if errors[rank] is not None:
            kind, message = errors[rank]
            raise kind(message)
        return rank

    ended = []
    for errors in (
        (None, None, None),
        (None, (OSError, "disk"), (ValueError, "file")),
        ((KeyError, "k"), None, None),
        (None, None, None),
    ):
        try:
            ended.append(machine.together(lambda errors=errors: act(*errors)))
        except Exception as error:
            ended.append((type(error).__name__, str(error)))
    alive = [held() is not None for held in kept]  # memory that a failed action held
    try:
        if rank == 1:  # the others do not call it
            machine.together(lambda: act(None, (ValueError, "alone"), None))
    except runtime.OutOfStep as error:
        ended.append(str(error))
    results[rank] = ended, alive
    dist.barrier()
    dist.destroy_process_group()


def _spawned(function, nprocs):
    """Results by rank of processes that share a port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(function, (port, results), nprocs=nprocs)
        return dict(results)


def _wait_long(rank, port, results):
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0)  # waits until both have started
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=2))
    machine = runtime.Runtime(torch.device("cpu"), rank, 2, 2, store, runtime.patient_group())
    results[rank] = [machine.on_first(lambda: time.sleep(3) or "done") for _ in range(2)]
    runtime.shut_down()


@pytest.mark.slow
def test_the_first_may_take_longer_than_a_collective():
    assert _spawned(_wait_long, 2) == {0: ["done", "done"], 1: ["done", "done"]}


@pytest.mark.slow
def test_an_error_of_one_process_is_raised_by_all():
    """They raise the first one's, of the same type, stay in step, and keep no memory of the failed action."""
    results = _spawned(_together, 3)
    for rank, (ended, alive) in results.items():
        kind = "KeyError" if rank == 0 else "RuntimeError"  # its message alone would not tell
        assert ended[:4] == [rank, ("OSError", "disk"), (kind, "'k'"), rank]
        assert alive == [False] * 4
    assert results[1][0][4:] == ["alone (process 1; the others wait for it)"]

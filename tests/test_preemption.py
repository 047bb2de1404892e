"""Preemption: processes that receive a signal at different moments, or not at all, stop at the same step."""

import os
import signal
import subprocess
import sys

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from jetformer.preemption import Preempted, Preemption


@pytest.mark.parametrize(("signum", "exit_code"), [(signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)])
def test_a_single_process_stops_at_once(signum, exit_code):
    before = signal.getsignal(signum)
    with Preemption() as preemption:
        preemption.check()
        os.kill(os.getpid(), signum)
        with pytest.raises(Preempted) as stopped:
            preemption.check()
    assert stopped.value.exit_code == exit_code
    assert signal.getsignal(signum) == before


def test_an_ignored_signal_stays_ignored():
    """As SIGHUP under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Preemption() as preemption:
            os.kill(os.getpid(), signal.SIGHUP)
            preemption.check()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_does_not_interrupt_the_save():
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Preempted):
            preemption.check()
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_second_interrupt_ends_the_process():
    code = """
import os, signal
from jetformer.preemption import Preemption
with Preemption():
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("not any more")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 130
    assert ended.stdout == "still here\n"
    assert len(ended.stderr.splitlines()) == 1


def _steps_until_preempted(rank, rendezvous, received_after, results):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    with Preemption() as preemption:
        for step in range(20):
            if received_after[rank] == step:
                os.kill(os.getpid(), signal.SIGTERM)
            try:
                preemption.check()
                if step == 1:  # an evaluation fails, on one process a batch earlier
                    if rank == 0:
                        preemption.check()
                    preemption.catch_up()
            except Preempted:
                results[rank] = step
                break
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("received_after", [(None, 3), (2, 7), (5, 5), (None, None)])
def test_processes_stop_together(tmp_path, received_after):
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(_steps_until_preempted, (tmp_path / "rendezvous", received_after, results), nprocs=2)
        results = dict(results)
    received = [step for step in received_after if step is not None]
    assert results == ({0: min(received) + 1, 1: min(received) + 1} if received else {})


@pytest.mark.slow
@pytest.mark.parametrize("program", ["main", "sample", "evaluate"])
def test_an_interrupt_during_imports_is_one_line(program, tmp_path):
    args = [sys.executable, "-X", "importtime", "-m", f"jetformer.{program}", f"--workdir={tmp_path}"]
    process = subprocess.Popen(args, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.endswith(" absl.app\n"):  # before torch, which takes a second once the flags are parsed
            process.send_signal(signal.SIGINT)
            break
    said = [line for line in process.stderr if not line.startswith("import time:")]
    assert process.wait() == 130
    assert len(said) == 1, said

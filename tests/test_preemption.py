"""Preemption: processes that are told at different moments, or not at all, stop at the same step."""

import os
import signal

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from jetformer.preemption import Preempted, Preemption


def test_one_process_stops_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as preemption:
        preemption.check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Preempted):
            preemption.check()
    assert signal.getsignal(signal.SIGTERM) == before


def _steps_until_preempted(rank, rendezvous, told_after, results):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    with Preemption() as preemption:
        for step in range(20):
            if told_after[rank] == step:
                os.kill(os.getpid(), signal.SIGTERM)
            try:
                preemption.check()
                if step == 1:  # an evaluation ends in an error, in one of them a batch earlier
                    if rank == 0:
                        preemption.check()
                    preemption.catch_up()
            except Preempted:
                results[rank] = step
                break
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("told_after", [(None, 3), (2, 7), (5, 5), (None, None)])
def test_processes_stop_together(tmp_path, told_after):
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(_steps_until_preempted, (tmp_path / "rendezvous", told_after, results), nprocs=2)
        results = dict(results)
    told = [step for step in told_after if step is not None]
    assert results == ({0: min(told) + 1, 1: min(told) + 1} if told else {})

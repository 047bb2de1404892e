"""Preemption: a SIGTERM, as a maintenance event or a scheduler sends it, ends a run after it has saved."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

# sysexits.h's EX_TEMPFAIL, "try again": what the launcher restarts on.
EXIT_CODE = 75


class Preempted(BaseException):
    """The run was asked to stop. What it had done is saved. It is no error, as KeyboardInterrupt is none: what handles
    errors lets it pass."""


class Preemption:
    """Watches for SIGTERM while its context lasts.

    Of several processes each may be told at another moment, or only some are; they agree on stopping after the same
    step, by an exchange that is awaited one call later, so that no step waits for it.
    """

    def __init__(self):
        self._told = False
        self._several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        # A group of its own: other exchanges may go on in other threads.
        self._group = dist.new_group(backend="gloo") if self._several else None
        self._asked: tuple[torch.Tensor, dist.Work] | None = None
        self._calls = 0

    def __enter__(self) -> "Preemption":
        self._previous = signal.signal(signal.SIGTERM, self._tell)
        return self

    def __exit__(self, *exception) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _tell(self, signum: int, frame: FrameType | None) -> None:
        del signum, frame
        self._told = True

    def check(self) -> None:
        """Call it equally often on all processes.

        Raises:
          Preempted: if one of them was told to stop; of several processes, at the call after the one that noticed.
        """
        told = self._told
        self._calls += 1
        if self._several:
            told = False
            if self._asked is not None:
                answer, work = self._asked
                work.wait()
                told = bool(answer.item())
            question = torch.tensor([int(self._told)])
            self._asked = question, dist.all_reduce(question, dist.ReduceOp.MAX, self._group, async_op=True)
        if told:
            raise Preempted

    def catch_up(self) -> None:
        """Makes up for a call of `check` that some processes have left out, as where an error ended an evaluation; all
        processes call it.

        Raises:
          Preempted: as `check`.
        """
        if not self._several:
            return
        calls = [0] * dist.get_world_size()
        dist.all_gather_object(calls, self._calls)
        if self._calls < max(calls):  # by one: the call after it would have waited
            self.check()

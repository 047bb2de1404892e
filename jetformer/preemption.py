"""Stops a run on SIGTERM (a maintenance event, a scheduler), SIGINT (Ctrl-C) or SIGHUP (a closed terminal), so that it
can save first."""

import os
import signal
from types import FrameType

import torch
import torch.distributed as dist

EXIT_CODE = 75  # sysexits.h's EX_TEMPFAIL, "try again": the launcher restarts the run
INTERRUPTED_EXIT_CODE = 128 + signal.SIGINT  # as a shell's; the launcher does not restart what a user has ended


class Preempted(BaseException):
    """Says that the run was asked to stop. Like KeyboardInterrupt it is not an error: `except Exception` lets it pass.

    Args:
      signum: the signal.
    """

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signal = signal.Signals(signum)

    @property
    def exit_code(self) -> int:
        return INTERRUPTED_EXIT_CODE if self.signal == signal.SIGINT else EXIT_CODE


class Preemption:
    """Handles SIGTERM, SIGINT and SIGHUP while its context lasts, except ignored ones (as SIGHUP under nohup). A second
    SIGINT ends the process at once.

    Several processes may get the signal at different moments, or only some of them get it. An all-reduce, which is
    awaited one call later so that no step waits for it, makes all stop after the same step.
    """

    def __init__(self):
        self._received = 0  # the highest signal
        self._several = dist.is_initialized() and dist.get_world_size() > 1
        # Its own group: other threads may run collectives at the same time.
        self._group = dist.new_group(backend="gloo") if self._several else None
        self._pending: tuple[torch.Tensor, dist.Work] | None = None
        self._calls = 0
        self._interrupted = False

    def __enter__(self) -> "Preemption":
        handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        self._previous = {signum: handler for signum, handler in handlers.items() if handler != signal.SIG_IGN}
        for signum in self._previous:
            signal.signal(signum, self._receive)
        return self

    def __exit__(self, *exception) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        del frame
        if signum == signal.SIGINT:
            if self._interrupted:
                os.write(2, b"interrupted twice: ended without waiting for the checkpoint that is being saved\n")
                os._exit(INTERRUPTED_EXIT_CODE)
            self._interrupted = True
        self._received = max(self._received, signum)

    def check(self) -> None:
        """Raises if the run was asked to stop. All processes call it equally often.

        Raises:
          Preempted: if any process has received a signal; with several processes, one call later.
        """
        signum = self._received
        self._calls += 1
        if self._several:
            signum = 0
            if self._pending is not None:
                highest, work = self._pending
                work.wait()
                signum = int(highest.item())
            highest = torch.tensor([self._received])
            self._pending = highest, dist.all_reduce(highest, dist.ReduceOp.MAX, self._group, async_op=True)
        if signum:
            raise Preempted(signum)

    def catch_up(self) -> None:
        """Makes up for a call of `check` that some processes have missed, as after an error in an evaluation; all
        processes call it.

        Raises:
          Preempted: as `check`.
        """
        if not self._several:
            return
        calls = [0] * dist.get_world_size()
        dist.all_gather_object(calls, self._calls)
        if self._calls < max(calls):  # by one: the call after that would have waited for this process
            self.check()

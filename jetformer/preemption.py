"""Preemption: a run that is asked to stop saves first: by SIGTERM, as a maintenance event or a scheduler sends it, by
SIGINT (Ctrl-C), or by SIGHUP (a closed terminal)."""

import os
import signal
from types import FrameType

import torch
import torch.distributed as dist

# sysexits.h's EX_TEMPFAIL, "try again": what the launcher restarts on.
EXIT_CODE = 75
INTERRUPTED_EXIT_CODE = 128 + signal.SIGINT  # as a shell has it; nobody restarts what a user has ended


class Preempted(BaseException):
    """The run was asked to stop. What it had done is saved. It is no error, as KeyboardInterrupt is none: what handles
    errors lets it pass.

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
    """Watches for SIGTERM, SIGINT and SIGHUP while its context lasts, but for those that are ignored (as SIGHUP under
    nohup). A second SIGINT ends the process at once.

    Of several processes each may be told at another moment, or only some are; they agree on stopping after the same
    step, by an exchange that is awaited one call later, so that no step waits for it.
    """

    def __init__(self):
        self._told = 0  # the highest signal
        self._several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        # A group of its own: other exchanges may go on in other threads.
        self._group = dist.new_group(backend="gloo") if self._several else None
        self._asked: tuple[torch.Tensor, dist.Work] | None = None
        self._calls = 0
        self._interrupted = False

    def __enter__(self) -> "Preemption":
        handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        self._previous = {signum: handler for signum, handler in handlers.items() if handler != signal.SIG_IGN}
        for signum in self._previous:
            signal.signal(signum, self._tell)
        return self

    def __exit__(self, *exception) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _tell(self, signum: int, frame: FrameType | None) -> None:
        del frame
        if signum == signal.SIGINT:
            if self._interrupted:
                os.write(2, b"interrupted twice: ended without waiting for what is being saved\n")
                os._exit(INTERRUPTED_EXIT_CODE)
            self._interrupted = True
        self._told = max(self._told, signum)

    def check(self) -> None:
        """Call it equally often on all processes.

        Raises:
          Preempted: if one of them was told to stop; of several processes, at the call after the one that noticed.
        """
        told = self._told
        self._calls += 1
        if self._several:
            told = 0
            if self._asked is not None:
                answer, work = self._asked
                work.wait()
                told = int(answer.item())
            question = torch.tensor([self._told])
            self._asked = question, dist.all_reduce(question, dist.ReduceOp.MAX, self._group, async_op=True)
        if told:
            raise Preempted(told)

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

"""What all programs share: flags, and how they end.

Programs import this and `runtime` first, and the rest of the package after `runtime.initialize`: the rest brings
TensorFlow, before which torch_xla has to be imported.
"""

import datetime
import logging as std_logging
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from absl import app, flags, logging
from clu import asynclib

from jetformer import preemption, runtime

flags.DEFINE_multi_string("gin_file", [], "A gin file; may be given several times, later ones win.")
flags.DEFINE_multi_string("gin_bindings", [], "A gin binding such as 'train.total_steps = 100'.")
flags.DEFINE_enum(
    "device",
    "auto",
    ["auto", "cpu", "cuda", "xla"],
    "What to run on; xla is all TPUs, or what PJRT_DEVICE says; auto is a TPU or a GPU where there is one.",
)
flags.DEFINE_list(
    "trust_imports",
    [],
    "Modules that a configuration of a workdir, a directory or the Hub may import, which runs them.",
)
flags.DEFINE_boolean("verify", True, "Compare the checksums of a checkpoint's files before it is loaded.")

_STORE_TIMEOUT = datetime.timedelta(seconds=5)


class StepParser(flags.ArgumentParser):
    """Parses a flag that says which checkpoint: the number of a step, or "best"."""

    syntactic_help = "a step, or best"

    def parse(self, argument: str) -> int | str:
        """Raises a ValueError for anything else."""
        return argument if argument == "best" else int(argument)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program in one line for a user's mistake, a place that cannot be read or written, a diverged run, a
    process lost, or one that was asked to stop, with a code of its own. What all processes of a run would say one of
    them says.

    --verbosity=1 shows where it came from.
    """
    # Training, which has something to save, takes it over while it lasts (`preemption.Preemption`).
    for signum in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, _stop)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # during the imports it is `jetformer`'s own
    logging.get_absl_logger().addFilter(_is_not_raised_again)
    try:
        yield
    except KeyboardInterrupt:
        _say("interrupted: start the same command again to go on")
        sys.exit(preemption.INTERRUPTED_EXIT_CODE)
    except preemption.Preempted as stopped:
        _say(f"stopped by {stopped.signal.name}: start the same command again to go on")
        sys.exit(stopped.exit_code)
    except (ValueError, OSError, ImportError, FloatingPointError, runtime.OutOfStep) as error:
        logging.debug("", exc_info=True)
        _say(f"error: {' '.join(str(error).split())}")
        sys.exit(1)
    except asynclib.AsyncError as error:  # of the writers of metrics
        import tensorflow as tf  # which they have brought

        if not isinstance(error.__cause__, tf.errors.OpError):
            raise
        logging.debug("", exc_info=True)
        _say(f"error: metrics cannot be written: {re.sub(r'{{.*?}} *', '', error.__cause__.message.splitlines()[0])}")
        sys.exit(1)
    except RuntimeError as error:
        if not runtime.are_apart(error):
            raise
        logging.debug("", exc_info=True)
        _say("error: another process of this run has ended; what it said before tells why")
        sys.exit(1)


def _is_not_raised_again(record: std_logging.LogRecord) -> bool:
    """False for the tracebacks that CLU's writers log of errors that they raise afterwards."""
    return not str(record.msg).startswith("Error in producer thread")


def _say(message: str) -> None:
    """Prints a line, unless another process that torchrun started has printed the same."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            # torchrun's own store, which outlives the processes of its host; another host's may be gone.
            store = dist.TCPStore(*address, is_master=False, timeout=_STORE_TIMEOUT)
            if store.add(f"jetformer/{os.environ['TORCHELASTIC_RESTART_COUNT']}/{message}", 1) > 1:
                return
        except dist.DistError:
            logging.debug("", exc_info=True)
    print(message, file=sys.stderr, flush=True)


def _stop(signum: int, frame) -> None:
    del frame
    raise preemption.Preempted(signum)


def no_arguments(argv: list[str]) -> None:
    """Programs take flags only.

    Raises:
      UsageError: for anything else.
    """
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")

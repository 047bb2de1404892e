"""Flags and error handling that all programs share.

A program imports this first, and the rest of the package after `runtime.initialize`: torch_xla must be imported before
TensorFlow, which the rest brings. Nothing here imports torch before the flags are parsed: it takes seconds, which
--help need not wait for.
"""

import datetime
import logging as std_logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from absl import app, flags, logging
from clu import asynclib

if TYPE_CHECKING:
    from jetformer.runtime import Runtime

flags.DEFINE_multi_string("gin_file", [], "A gin file; can be given several times, later files override earlier ones.")
flags.DEFINE_multi_string("gin_bindings", [], "A gin binding such as 'train.total_steps = 100'.")
flags.DEFINE_enum(
    "device",
    "auto",
    ["auto", "cpu", "cuda", "tpu", "xla"],
    "Device to run on: xla is all TPUs of a host through torch_xla, or what PJRT_DEVICE names; tpu is one TPU through "
    "torch_tpu; auto is a TPU or a GPU if there is one.",
)
flags.DEFINE_boolean("verify", True, "Compare the checksums of a checkpoint's files before loading it.")

# Arguments of `flags.DEFINE_list`, for programs that read a configuration of others.
TRUST_IMPORTS = (
    "trust_imports",
    [],
    "Modules that the configuration of a workdir, a directory or the Hub may import, which runs their code.",
)
_PACKAGE = os.path.dirname(__file__) + os.sep
_STORE_TIMEOUT = datetime.timedelta(seconds=5)
FLAGS = flags.FLAGS


class StepParser(flags.ArgumentParser):
    """Parses a flag that names a checkpoint: the number of a step, or "best"."""

    syntactic_help = "a step, or best"

    def parse(self, argument: str) -> int | str:
        """Returns the value of the flag.

        Raises:
          ValueError: for anything else.
        """
        return argument if argument == "best" else int(argument)


def run(main: Callable[[], None], verbose: bool = False) -> None:
    """Parses the flags, runs a program, and ends the process; see `one_line_errors`.

    Args:
      main: the program.
      verbose: log at INFO, unless --verbosity sets another level.

    Raises:
      UsageError: if the command line has more than flags.
    """

    def run_main(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]!r}")
        if verbose and not FLAGS["verbosity"].present:
            logging.set_verbosity(logging.INFO)
        with one_line_errors():
            main()

    app.run(run_main)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with one line and an exit code for errors that a user can cause or has to know: a mistake, a
    file that cannot be read or written, a diverged run, a lost process, or a signal. Of several processes one prints
    it. --verbosity=1 shows the traceback.
    """
    from jetformer import preemption, runtime

    # While it trains, `preemption.Preemption` handles signals, and saves first.
    for signum in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, _stop)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # `jetformer/__init__.py` has set its own for the imports
    logging.get_absl_logger().addFilter(_is_not_raised_again)
    try:
        yield
        runtime.shut_down()
    except KeyboardInterrupt:
        _say("interrupted: run the same command again to resume")
        sys.exit(preemption.INTERRUPTED_EXIT_CODE)
    except preemption.Preempted as stopped:
        _say(f"stopped by {stopped.signal.name}: run the same command again to resume")
        sys.exit(stopped.exit_code)
    except (ValueError, OSError, ImportError, FloatingPointError, runtime.OutOfStep) as error:
        logging.debug("", exc_info=True)
        _say(f"error: {' '.join(str(error).split())}")
        sys.exit(1)
    except asynclib.AsyncError as error:  # from CLU's metric writers
        import tensorflow as tf  # they have imported it already

        if not isinstance(error.__cause__, tf.errors.OpError):
            raise
        logging.debug("", exc_info=True)
        _say(f"error: metrics cannot be written: {re.sub(r'{{.*?}} *', '', error.__cause__.message.splitlines()[0])}")
        sys.exit(1)
    except RuntimeError as error:
        if not runtime.are_apart(error):
            raise
        logging.debug("", exc_info=True)
        _say("error: another process of this run has ended; its own error message says why")
        sys.exit(1)


def initialize(device: str | None = None) -> "Runtime":
    """Returns the runtime of this process, and sets up logging.

    Without --verbosity, process 0 logs what this package says at INFO, the other processes errors; libraries are heard
    from WARNING on.

    Args:
      device: see `runtime.initialize`; None: --device.
    """
    from jetformer import runtime

    chosen = FLAGS["verbosity"].present
    if not chosen:
        logging.set_verbosity(logging.INFO)
        logging.get_absl_handler().addFilter(_is_of_this_package_or_serious)
    machine = runtime.initialize(device or FLAGS.device)
    if not chosen and machine.process_index > 0:
        logging.set_verbosity(logging.ERROR)
    return machine


def _is_of_this_package_or_serious(record: std_logging.LogRecord) -> bool:
    return record.levelno >= std_logging.WARNING or record.pathname.startswith(_PACKAGE)


def _is_not_raised_again(record: std_logging.LogRecord) -> bool:
    """Returns False for tracebacks that CLU's writers log before they raise the error."""
    return not str(record.msg).startswith("Error in producer thread")


def _say(message: str) -> None:
    """Prints a line, unless another process of the same torchrun has printed it."""
    import torch.distributed as dist

    for signum in (signal.SIGTERM, signal.SIGHUP):  # torchrun ends the others when the first has ended
        signal.signal(signum, signal.SIG_IGN)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            # torchrun's own store. It outlives the processes of its host; another host's may be gone.
            store = dist.TCPStore(*address, is_master=False, timeout=_STORE_TIMEOUT)
            if store.add(f"jetformer/{os.environ['TORCHELASTIC_RESTART_COUNT']}/{message}", 1) > 1:
                return
        except dist.DistError:
            logging.debug("", exc_info=True)
    print(message, file=sys.stderr, flush=True)


def _stop(signum: int, frame) -> None:
    from jetformer import preemption

    del frame
    raise preemption.Preempted(signum)

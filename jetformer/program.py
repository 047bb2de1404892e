"""What all programs share: flags, and how they end.

Programs import this and `runtime` first, and the rest of the package after `runtime.initialize`: the rest brings
TensorFlow, before which torch_xla has to be imported.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from absl import app, flags, logging

from jetformer import preemption

flags.DEFINE_multi_string("gin_file", [], "A gin file; may be given several times, later ones win.")
flags.DEFINE_multi_string("gin_bindings", [], "A gin binding such as 'train.total_steps = 100'.")
flags.DEFINE_enum(
    "device",
    "auto",
    ["auto", "cpu", "cuda", "xla"],
    "What to run on; xla is all TPUs, or what PJRT_DEVICE says; auto is a TPU or a GPU where there is one.",
)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program in one line for a user's mistake, a place that cannot be read or written, a diverged run, or
    one that was asked to stop, with a code of its own.

    --verbosity=1 shows where it came from.
    """
    # Training, which has something to save, takes it over while it lasts (`preemption.Preemption`).
    signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    except preemption.Preempted:
        print("stopped: start the same command again to go on", file=sys.stderr)
        sys.exit(preemption.EXIT_CODE)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        logging.debug("", exc_info=True)
        sys.exit(f"error: {' '.join(str(error).split())}")


def _stop(signum: int, frame) -> None:
    del signum, frame
    raise preemption.Preempted


def no_arguments(argv: list[str]) -> None:
    """Programs take flags only.

    Raises:
      UsageError: for anything else.
    """
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")

"""JetFormer (arXiv 2411.19722) and Jet (arXiv 2412.15129) in PyTorch."""

import importlib.metadata
import importlib.util
import os
import signal
import sys

__version__ = "0.1.0"


def _interrupted(signum: int, frame) -> None:
    del signum, frame
    os.write(sys.stderr.fileno(), b"interrupted before it began\n")
    os._exit(128 + signal.SIGINT)


# A program of ours (`python -m jetformer.…`) imports for seconds. Until it handles Ctrl-C itself, see
# `program.one_line_errors`, there is nothing to lose: no traceback out of an import.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _interrupted)

# torch for GPUs brings Triton, and imports it when it is first needed. From 3.7 on that ends the process with a
# segmentation fault where TensorFlow is there already, for both have an LLVM.
_triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "0.0"
if tuple(map(int, _triton.split(".")[:2])) >= (3, 7):
    if "tensorflow" in sys.modules and "triton" not in sys.modules:
        raise ImportError("Triton has to be imported before TensorFlow: import jetformer first")
    import triton  # noqa: F401

# TensorFlow only reads data here: its start-up notices about compute say nothing about a run. Nor do XLA's warnings,
# with every graph, that a part of its compiler will be replaced one day.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

"""JetFormer (arXiv 2411.19722) and Jet (arXiv 2412.15129) in PyTorch."""

import importlib.metadata
import importlib.util
import os
import signal
import sys

__version__ = "0.1.0"


def _interrupted(signum: int, frame) -> None:
    del signum, frame
    os.write(sys.stderr.fileno(), b"interrupted before it started\n")
    os._exit(128 + signal.SIGINT)


# Programs take seconds to import. Until `program.one_line_errors` handles Ctrl-C, there is nothing to lose: it ends
# them in one line, without a traceback from an import.
_is_program = sys.argv and os.path.basename(sys.argv[0]) in ("-m", "jetformer")  # python -m jetformer.…, jetformer …
if _is_program and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _interrupted)

# torch for GPUs imports Triton when it first needs it. From Triton 3.7 on that is a segmentation fault if TensorFlow
# has been imported before: both contain an LLVM.
_triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "0.0"
if tuple(map(int, _triton.split(".")[:2])) >= (3, 7):
    if "tensorflow" in sys.modules and "triton" not in sys.modules:
        raise ImportError("Triton must be imported before TensorFlow: import jetformer first")
    import triton  # noqa: F401

# TensorFlow only reads data here, so its start-up notices about compute do not concern a run. Nor do XLA's warnings,
# with every graph, that a part of its compiler will be replaced.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

"""JetFormer (arXiv 2411.19722) and Jet (arXiv 2412.15129) in PyTorch.

`jetformer.load` loads a trained model, `jetformer.train` trains one; see docs/python.md. `__init__.pyi` declares both.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import signal
import sys
from typing import Any

__version__ = "0.1.0"
__all__ = ["Trained", "__version__", "load", "train"]


def __getattr__(name: str) -> Any:
    """Imports what is offered when it is first used: programs import this package, and need not wait for torch."""
    if name in ("Trained", "load", "train"):
        return getattr(importlib.import_module("jetformer.trained"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


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

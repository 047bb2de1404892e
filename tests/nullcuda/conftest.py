"""What tests on the CUDA runtime that computes nothing share: see `runtime.c`.

    tests/nullcuda/run.sh python -m pytest tests/nullcuda

Results mean nothing. What a test can see is that nothing is on the wrong device, how many kernels are launched, where
the host waits for the device, how much memory is allocated, and which kernels PyTorch chooses.
"""

import collections
import ctypes
import os
import traceback

import pytest
import torch

_LIBRARY = ctypes.CDLL(None)
_HOOK = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


@pytest.fixture(autouse=True)
def null_device(monkeypatch):
    """Skips the tests without the runtime, and frees what a test has left."""
    # Only a process that starts with the runtime has it. run.sh, which CI calls, asks for it: then its absence fails.
    if "libnullcuda.so" not in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("needs the CUDA runtime of tests/nullcuda/run.sh")
    assert hasattr(_LIBRARY, "nullcuda_counts")
    # The real one is compiled by NVRTC, for a driver that can load it.
    monkeypatch.setattr(torch.Tensor, "erfinv", torch.Tensor.tan)
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


class Seen:
    """What happened since it was made, or last reset.

    places: how often the host waited, by the innermost lines of this project.
    """

    def __init__(self):
        _LIBRARY.nullcuda_names.restype = ctypes.c_char_p
        self._names = _LIBRARY.nullcuda_names().decode().split()
        self.places = collections.Counter()
        self.reset()

    def reset(self) -> None:
        self._before = self._totals()
        self.places.clear()

    def __getitem__(self, name: str) -> int:
        """A count of `runtime.c`, by its name there."""
        return self._totals()[name] - self._before[name]

    def _totals(self) -> dict[str, int]:
        values = (ctypes.c_long * len(self._names))()
        _LIBRARY.nullcuda_counts(values)
        return dict(zip(self._names, values, strict=True))


@pytest.fixture
def seen():
    """Counts what happens on the device, on all threads."""
    seen = Seen()

    def wait(function: bytes) -> None:
        ours = [frame for frame in traceback.extract_stack() if f"{os.sep}jetformer{os.sep}" in frame.filename][-3:]
        lines = " < ".join(f"{os.path.basename(frame.filename)}:{frame.lineno}" for frame in reversed(ours))
        seen.places[f"{function.decode()} at {lines}"] += 1

    hook = _HOOK(wait)
    _LIBRARY.nullcuda_set_wait_hook(hook)
    yield seen
    _LIBRARY.nullcuda_set_wait_hook(_HOOK())

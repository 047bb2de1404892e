"""The two forms of GELU."""

from torch import nn

_APPROXIMATE = {"tanh": "tanh", "exact": "none"}


def gelu(form: str) -> nn.GELU:
    """Returns a GELU: "tanh", the approximation that is flax's default, or "exact", PyTorch's default.

    Raises:
      ValueError: if the form is unknown.
    """
    if form not in _APPROXIMATE:
        raise ValueError(f"unknown form of GELU {form!r}: use {' or '.join(_APPROXIMATE)}")
    return nn.GELU(approximate=_APPROXIMATE[form])

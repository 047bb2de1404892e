"""GELU in its two forms."""

from torch import nn

_APPROXIMATE = {"tanh": "tanh", "exact": "none"}


def gelu(form: str) -> nn.GELU:
    """GELU in a form: "tanh", the approximation that flax takes where nothing is said, or "exact", PyTorch's default.

    Raises:
      ValueError: for another form.
    """
    if form not in _APPROXIMATE:
        raise ValueError(f"unknown form of GELU {form!r}: one of {', '.join(_APPROXIMATE)}")
    return nn.GELU(approximate=_APPROXIMATE[form])

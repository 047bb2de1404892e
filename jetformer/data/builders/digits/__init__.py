"""`digits`: 8×8 greyscale handwritten digits, the smallest real dataset."""

from jetformer.data.builders.digits.digits import (
    Digits,
    histogram_bits_per_dim,
    level,
    level_widths,
)

__all__ = ["Digits", "histogram_bits_per_dim", "level", "level_widths"]

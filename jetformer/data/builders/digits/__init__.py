"""`digits`: 8×8 grey handwritten digits, the smallest real data set."""

from jetformer.data.builders.digits.digits import (
    Digits,
    histogram_bits_per_dim,
    level,
    level_widths,
)

__all__ = ["Digits", "histogram_bits_per_dim", "level", "level_widths"]

"""Types that annotate the range of an argument; `config.parse` checks all values that gin binds against them."""

from typing import Annotated

from annotated_types import Ge, Gt, Interval

PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Probability = Annotated[float, Interval(ge=0, le=1)]
# A decay or a dropout rate, which leaves nothing at 1.
BelowOne = Annotated[float, Interval(ge=0, lt=1)]

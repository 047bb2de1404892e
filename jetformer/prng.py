"""Counter-based random numbers: Threefry-2x32 with 20 rounds, the generator of JAX, in plain tensor operations.

(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.) A number is a function of a key and of where it
stands, and of nothing else: neither of the device, nor of how many processes or devices share a batch, nor of what was
drawn before. So every example has a key of its own, which travels with it; a batch can be cut up and put together
anyhow; and a compiler sees neither state nor constants that change.

A key is two words, int32 `[..., 2]`. Words are int32 everywhere, and wrap around as unsigned ones do.
"""

import math

import torch
from torch import Tensor

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
# The second word of a counter says what the numbers are for, so that no key is ever also a random number.
_BITS, _FOLD = 0, 1


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shifts zeros in from the left."""
    # Not x >> bits: torch_xla 2.9 lowers that to a division, which rounds negative words up; nor a Python number of
    # bits, which it makes an int64 of. The mask takes away the sign, which is shifted in.
    by = torch.full((), bits, dtype=torch.int32, device=x.device)
    return torch.bitwise_right_shift(x, by) & ((1 << (32 - bits)) - 1)


def _rotate_left(x: Tensor, bits: int) -> Tensor:
    return (x << bits) | _shift_right(x, 32 - bits)


def threefry(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two random words for each counter of two words; all four tensors int32, of shapes that broadcast."""
    # Not in place, which torch_xla takes ten times as long to trace.
    k = (*key, key[0] ^ key[1] ^ _PARITY)
    x0, x1 = counter[0] + k[0], counter[1] + k[1]
    for i in range(5):
        for rotation in _ROTATIONS[i % 2]:
            x0 = x0 + x1
            x1 = _rotate_left(x1, rotation) ^ x0
        x0 = x0 + k[(i + 1) % 3]
        x1 = x1 + (k[(i + 2) % 3] + (i + 1))
    return x0, x1


def key(seed: int) -> Tensor:
    """The key int32 `[2]`, on the CPU, of a seed of up to 64 bits."""
    words = torch.tensor([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF])
    return (words - (words >> 31 << 32)).int()


def fold_in(keys: Tensor, number: Tensor | int) -> Tensor:
    """Other keys `[..., 2]`, made of `keys` `[..., 2]` and an integer, or int32 integers `[...]`."""
    if not isinstance(number, Tensor):
        number = torch.full((), number, dtype=torch.int32, device=keys.device)
    purpose = torch.full_like(number, _FOLD)
    return torch.stack(threefry(keys.unbind(-1), (number, purpose)), dim=-1)


def example_keys(seed: int, examples: Tensor) -> Tensor:
    """The keys int32 `[B, 2]` of examples with the given numbers, int32 `[B]`."""
    return fold_in(key(seed).to(examples.device), examples)


def bits(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Random words, int32 `[..., *shape]`, for each of `keys` `[..., 2]`."""
    size = math.prod(shape)
    half = (size + 1) // 2  # a counter gives two words
    counter = torch.arange(half, dtype=torch.int32, device=keys.device)
    words = torch.cat(threefry(keys[..., None, :].unbind(-1), (counter, torch.full_like(counter, _BITS))), dim=-1)
    if words.device.type == "xla":
        # XLA would compute the rounds anew, fused into each use of the words, and take minutes to compile that.
        import torch_xla.core.xla_model as xm

        xm.optimization_barrier_([words])
    return words[..., :size].reshape((*keys.shape[:-1], *shape))


def uniform(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uniform in [0, 1), float32 `[..., *shape]`, for each of `keys` `[..., 2]`: multiples of 2⁻²⁴, all exact."""
    return _shift_right(bits(keys, shape), 8) * 2.0**-24


def normal(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal, float32 `[..., *shape]`, for each of `keys` `[..., 2]`; within ±5.3."""
    # The middles of 2²³ intervals of (-1, 1): symmetric, and neither end is among them.
    middles = _shift_right(bits(keys, shape), 9) * 2.0**-22 + (2.0**-23 - 1)
    return middles.erfinv() * math.sqrt(2)


def dropout(x: Tensor, probability: float, keys: Tensor | None) -> Tensor:
    """Drops entries of `x` `[B, ...]` with a probability, and scales up the others; `keys` `[B, 2]`, or None for no
    dropout."""
    if keys is None or not probability:
        return x
    keep = uniform(keys, x.shape[1:]) >= probability
    return x * keep * (1 / (1 - probability))

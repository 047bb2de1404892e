"""Counter-based random numbers: Threefry-2x32 with 20 rounds, JAX's generator, in plain tensor operations.

(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.) A number is a function of a key and of its
position, and of nothing else: not of the device, of how many processes share a batch, or of earlier draws. Every
example has its own key, which travels with it, so a batch can be split and joined in any way, and a compiler sees
neither state nor changing constants.

A key is two words, int32 `[..., 2]`. Words are int32 everywhere, and wrap around like unsigned words.
"""

import math

import torch
from torch import Tensor

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
# The second word of a counter: random numbers or a new key, so that no key is also a random number.
_BITS, _FOLD = 0, 1


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shifts right and fills with zeros."""
    # Not x >> bits, which torch_xla 2.9 lowers to a division that rounds negative words up; and there bits as a tensor,
    # for it converts a Python number to int64. The mask removes the sign bits that the shift fills with.
    by = torch.full((), bits, dtype=torch.int32, device=x.device) if x.device.type == "xla" else bits
    return torch.bitwise_right_shift(x, by) & ((1 << (32 - bits)) - 1)


def _rotate_left(x: Tensor, bits: int) -> Tensor:
    return (x << bits) | _shift_right(x, 32 - bits)


def threefry(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns two random words for each counter of two words; all four tensors are int32, of shapes that broadcast."""
    # Not in place, which takes torch_xla ten times as long to trace.
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
    """Returns the key int32 `[2]`, on the CPU, of a seed of up to 64 bits."""
    words = torch.tensor([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF])
    return (words - (words >> 31 << 32)).int()


def fold_in(keys: Tensor, number: Tensor | int) -> Tensor:
    """Returns new keys `[..., 2]` from `keys` `[..., 2]` and an integer, or int32 integers `[...]`."""
    if not isinstance(number, Tensor):
        number = torch.full((), number, dtype=torch.int32, device=keys.device)
    purpose = torch.full_like(number, _FOLD)
    return torch.stack(threefry(keys.unbind(-1), (number, purpose)), dim=-1)


def example_keys(seed: int, examples: Tensor) -> Tensor:
    """Returns the keys int32 `[B, 2]` of the examples of given numbers, int32 `[B]`."""
    return fold_in(key(seed).to(examples.device), examples)


def bits(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns random words, int32 `[..., *shape]`, for `keys` `[..., 2]`."""
    size = math.prod(shape)
    half = (size + 1) // 2  # each counter yields two words
    counter = torch.arange(half, dtype=torch.int32, device=keys.device)
    words = torch.cat(threefry(keys[..., None, :].unbind(-1), (counter, torch.full_like(counter, _BITS))), dim=-1)
    if words.device.type == "xla":
        # Otherwise XLA fuses the rounds into each use of the words, which takes minutes to compile.
        import torch_xla.core.xla_model as xm

        xm.optimization_barrier_([words])
    return words[..., :size].reshape((*keys.shape[:-1], *shape))


def uniform(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns uniform numbers in [0, 1), float32 `[..., *shape]`, for `keys` `[..., 2]`: exact multiples of 2⁻²⁴."""
    return _shift_right(bits(keys, shape), 8) * 2.0**-24


def normal(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns standard normal numbers, float32 `[..., *shape]`, for `keys` `[..., 2]`; all are within ±5.3."""
    # The centres of 2²³ intervals of (-1, 1): symmetric, without the ends.
    centres = _shift_right(bits(keys, shape), 9) * 2.0**-22 + (2.0**-23 - 1)
    return centres.erfinv() * math.sqrt(2)


def dropout(x: Tensor, probability: float, keys: Tensor | None) -> Tensor:
    """Drops entries of `x` `[B, ...]` at random and scales up the others; `keys` `[B, 2]` of None drop nothing."""
    if keys is None or not probability:
        return x
    keep = uniform(keys, x.shape[1:]) >= probability
    return x * keep * (1 / (1 - probability))

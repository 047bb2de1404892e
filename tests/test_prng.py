"""Random numbers have Threefry's published values and the right distributions, and are independent between keys."""

import pytest
import torch
from scipy import stats

from jetformer import prng


def words(*values):
    """Returns unsigned words as int32."""
    x = torch.tensor(values)
    return (x - (x >> 31 << 32)).int()


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [  # of Random123's tests/kat_vectors, threefry2x32 with 20 rounds
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_known_answers(key, counter, expected):
    actual = prng.threefry(tuple(words(*key)), tuple(words(*counter)))
    assert torch.stack(actual).tolist() == words(*expected).tolist()


def test_distributions():
    keys = prng.example_keys(0, torch.arange(1000, dtype=torch.int32))
    uniform, normal = prng.uniform(keys, (200,)), prng.normal(keys, (10, 20))
    assert uniform.dtype == normal.dtype == torch.float32
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert stats.kstest(uniform.flatten().numpy(), stats.uniform.cdf).pvalue > 1e-3
    assert stats.kstest(normal.flatten().numpy(), stats.norm.cdf).pvalue > 1e-3


def test_neighbours_are_independent():
    """Numbers of one key, of neighbouring keys, and of one key for several purposes are uncorrelated."""
    keys = prng.example_keys(0, torch.arange(400, dtype=torch.int32))
    x = prng.normal(keys, (400,))
    other = prng.normal(prng.fold_in(keys, 1), (400,))
    for a, b in ((x[:, 1:], x[:, :-1]), (x[1:], x[:-1]), (x, other), (x[:, :200], x[:, 200:])):
        correlation = torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]
        assert abs(correlation) < 4 / a.numel() ** 0.5


def test_keys_are_all_different():
    seeds = [0, 1, 2**31, 2**32, 2**62 + 1]
    examples = torch.arange(-2, 1000, dtype=torch.int32)
    keys = [prng.example_keys(seed, examples) for seed in seeds]
    keys += [prng.fold_in(keys[0], number) for number in range(3)]
    seen = {tuple(key) for part in keys for key in part.tolist()}
    assert len(seen) == len(keys) * len(examples)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (5,)])
def test_an_example_draws_the_same_alone(shape):
    keys = prng.example_keys(7, torch.arange(6, dtype=torch.int32))
    together = prng.bits(keys, shape)
    assert together.shape == (6, *shape)
    assert torch.equal(together[2], prng.bits(keys[2], shape))
    assert torch.equal(together.view(2, 3, *shape), prng.bits(keys.view(2, 3, 2), shape))


def test_dropout():
    keys = prng.example_keys(0, torch.arange(50, dtype=torch.int32))
    x = torch.ones(50, 40, 30, requires_grad=True)
    y = prng.dropout(x, 0.25, keys)
    assert y.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert (y == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert prng.dropout(x, 0.25, None) is x
    assert prng.dropout(x, 0.0, keys) is x

"""The decoder is causal, decodes with a KV cache as without, and depends on relative positions only."""

import pytest
import torch

from jetformer import prng
from jetformer.models import remat
from jetformer.models.decoder import Decoder, KVCache, RMSNorm, apply_rope, rope_angles
from jetformer.models.initializers import init_weights


def decoder(num_kv_heads=1, dropout=0.0, policy="none"):
    model = Decoder(
        width=16,
        depth=2,
        mlp_dim=32,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        head_dim=8,
        dropout=dropout,
    )
    init_weights(model, torch.Generator().manual_seed(0))
    remat.set_policy(model, policy)
    return model.double()


KEYS = prng.example_keys(5, torch.arange(3, dtype=torch.int32))


def sequence(length=7, batch=3):
    x = torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(1)).double()
    return x, torch.arange(length).expand(batch, length)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_no_mask_equals_a_causal_mask(num_kv_heads):
    model = decoder(num_kv_heads)
    x, positions = sequence()
    mask = torch.ones(7, 7, dtype=torch.bool).tril().expand(3, 7, 7)
    torch.testing.assert_close(model(x, mask=None, positions=positions), model(x, mask=mask, positions=positions))


def test_no_token_sees_the_future():
    model = decoder()
    x, positions = sequence()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(model(x, mask=None, positions=positions)[:, 3].sum(), x)
    assert (gradient[:, 4:] == 0).all()
    assert (gradient[:, :4] != 0).any(dim=-1).all()


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("prefill", [1, 4])
def test_cached_equals_uncached(num_kv_heads, prefill):
    model = decoder(num_kv_heads)
    x, positions = sequence()
    expected = model(x, mask=None, positions=positions)
    cache = [torch.zeros(2, 3, num_kv_heads, 7, 8).double() for _ in range(2)]
    outputs, start = [], 0
    with torch.no_grad():
        while start < 7:
            end = start + prefill if not start else start + 1
            mask = (torch.arange(start, end)[:, None] >= torch.arange(7)).expand(3, -1, -1)
            y = model(
                x[:, start:end],
                mask=mask,
                positions=positions[:, start:end],
                caches=[KVCache(k, v, torch.arange(start, end)) for k, v in cache],
            )
            outputs.append(y)
            start = end
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected)


def test_only_relative_positions_matter():
    model = decoder()
    x, positions = sequence()
    y, shifted = (model(x, mask=None, positions=positions + shift) for shift in (0, 100))
    torch.testing.assert_close(y, shifted, rtol=0, atol=1e-5)  # angles are float32


def test_rope_rotates_halves():
    x = torch.randn(2, 3, 5, 8)
    rotated = apply_rope(x, rope_angles(torch.arange(5).expand(2, 5), 8))
    pairs = lambda y: torch.complex(*y.chunk(2, dim=-1))
    torch.testing.assert_close(pairs(rotated).abs(), pairs(x).abs())
    torch.testing.assert_close(rotated[:, :, 0], x[:, :, 0])
    turn = (pairs(rotated) / pairs(x)).angle()[0, 0, 1]
    torch.testing.assert_close(turn, 10_000 ** (-torch.arange(4) / 4))


def test_rms_norm_scales_by_one_plus_weight():
    norm = RMSNorm(4)
    torch.nn.init.constant_(norm.weight, 0.5)
    x = torch.tensor([[3.0, -3.0, 3.0, -3.0]])
    torch.testing.assert_close(norm(x), 1.5 * x.sign())


def test_activation_checkpointing_repeats_dropout():
    """A recomputed block drops the same entries again, so gradients agree."""
    gradients = []
    for policy in ("couplings", "blocks"):
        model = decoder(dropout=0.3, policy=policy)
        assert all(block.recompute == (policy == "blocks") for block in model.blocks)
        x, positions = sequence()
        x.requires_grad_()
        y = model(x, mask=None, positions=positions, dropout_keys=KEYS)
        gradients.append(torch.autograd.grad(y.square().sum(), x)[0])
    torch.testing.assert_close(*gradients)


def test_dropout_is_a_function_of_the_examples_key():
    model = decoder(dropout=0.3)
    x, positions = sequence()
    run = lambda rows, keys: model(x[rows], mask=None, positions=positions[rows], dropout_keys=keys)
    everything = slice(None)
    y = run(everything, KEYS)
    for rows in ([0], [2, 1]):  # alone or in another batch
        torch.testing.assert_close(run(rows, KEYS[rows]), y[rows])
    assert not torch.allclose(run(everything, prng.fold_in(KEYS, 1)), y)
    undropped = decoder()(x, mask=None, positions=positions)
    torch.testing.assert_close(run(everything, None), undropped)
    assert not torch.allclose(y, undropped)


def test_impossible_sizes_are_named():
    sizes = {"width": 8, "depth": 1, "mlp_dim": 8, "num_heads": 3, "num_kv_heads": 2, "head_dim": 4}
    with pytest.raises(ValueError, match=r"num_kv_heads 2 .*num_heads 3"):
        Decoder(**sizes)
    with pytest.raises(ValueError, match="head_dim 3"):
        Decoder(**sizes | {"num_kv_heads": 1, "head_dim": 3})

"""TarFlow: each block is autoregressive in its own order, and decoding with the KV cache equals encoding."""

import functools

import pytest
import torch

from flows import assert_invertible, randomized
from jetformer.models.tarflow import CachedBlock, TarFlow
from jetformer.optim import block_matrices

SMALL = {"depth": 2, "block_depth": 2, "emb_dim": 8, "num_heads": 2, "ps": 2}


def small(shape=(4, 6, 3), **kwargs):
    return randomized(TarFlow(shape, **SMALL | kwargs))


def test_a_new_flow_is_the_identity():
    x = torch.randn(2, 4, 6, 3)
    z, logdet = TarFlow((4, 6, 3), **SMALL)(x)
    assert torch.equal(z, x)
    assert torch.equal(logdet, torch.zeros(2))


@pytest.mark.parametrize("number", [0, 1])
def test_a_token_depends_on_those_before_it(number):
    """The second block counts from the end. A block maps each token by an elementwise function of itself."""
    block = small().blocks[number]
    x = torch.randn(6, 12, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda tokens: block(tokens[None])[0][0], x)
    depends = jacobian.abs().amax((1, 3)) > 0
    earlier = torch.ones(6, 6, dtype=torch.bool).tril()
    assert torch.equal(depends, earlier if number == 0 else earlier.T)
    first = 0 if number == 0 else 5
    assert torch.equal(block(x[None])[0][0, first], x[first])
    for i in range(6):
        own = jacobian[i, :, i]
        assert torch.equal(own, own.diagonal().diag())


@pytest.mark.parametrize("number", [0, 1])
def test_cached_predictions_equal_uncached_ones(number):
    block = small(context_dim=3).blocks[number]
    x, context = torch.randn(2, 6, 12, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    with torch.no_grad():
        expected = block.predict(x, block.condition(context))
        cached = CachedBlock(block, x, context)
        steps = [cached.step(token) for token in x.split(1, dim=1)]
    for actual, whole in zip(zip(*steps, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(actual, dim=1), whole)


def test_it_is_invertible_given_a_context():
    flow = small(context_dim=3)
    x, context = torch.randn(1, 4, 6, 3, dtype=torch.float64), torch.randn(1, 4, 3, dtype=torch.float64)
    forward, inverse = (functools.partial(f, context=context) for f in (flow, flow.inverse))
    assert_invertible(forward, inverse, x)
    assert not torch.allclose(flow(x, context)[0], flow(x, -context)[0])


@pytest.mark.parametrize("shape", [(2, 2, 3), (2, 4, 1)])
def test_few_tokens(shape):
    flow = small(shape)
    x = torch.randn(1, *shape, dtype=torch.float64)
    assert_invertible(flow, flow.inverse, x)


def test_tokens_are_ordered_as_by_unfold():
    x = torch.randn(1, 4, 6, 3)
    tokens, _ = TarFlow((4, 6, 3), **SMALL).patchify(x)
    unfolded = torch.nn.functional.unfold(x.permute(0, 3, 1, 2), 2, stride=2)
    assert torch.equal(tokens, unfolded.transpose(1, 2))


def test_muon_updates_the_matrices_of_layers():
    flow = TarFlow((4, 6, 3), **SMALL)
    assert len(block_matrices(flow)) == 2 * 2 * 4


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"num_heads 3 .* 8"):
        TarFlow((4, 6, 3), **SMALL | {"num_heads": 3})
    with pytest.raises(ValueError, match=r"4 × 6 .* patches of 4"):
        TarFlow((4, 6, 3), **SMALL | {"ps": 4})
    with pytest.raises(ValueError, match=r"\(6, 4, 3\).*\(4, 6, 3\)"):
        small()(torch.zeros(1, 6, 4, 3, dtype=torch.float64))

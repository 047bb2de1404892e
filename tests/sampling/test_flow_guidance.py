"""Guidance of TarFlow and denoising; tests/test_golden.py compares them with the authors' code."""

import pytest
import torch

from flows import randomized
from jetformer.models.invertible import IdentityFlow
from jetformer.models.tarflow import TarFlow
from jetformer.sampling.flows import denoise, guided_inverse

SHAPE = (4, 4, 1)


@pytest.fixture
def flow():
    torch.manual_seed(0)
    flow = randomized(TarFlow(SHAPE, depth=2, block_depth=1, emb_dim=8, num_heads=2, ps=2, context_dim=3))
    # Log-scales that grow with a token would make the tokens after it ever larger.
    for block in flow.blocks:
        block.final_proj.weight.data *= 0.1
    return flow


def test_guidance_extrapolates(flow):
    """Weight 0 samples given the context, weight -1 without it; both equal makes any weight the same."""
    z = torch.randn(2, *SHAPE, dtype=torch.float64)
    context, without = torch.randn(2, 2, 1, 3, dtype=torch.float64)
    with torch.no_grad():
        expected, unconditional = flow.inverse(z, context)[0], flow.inverse(z, without)[0]
    guided = lambda weight, *contexts: guided_inverse(flow, z, *contexts, torch.full((4,), weight, dtype=z.dtype))
    torch.testing.assert_close(guided(0.0, context, without), expected)
    torch.testing.assert_close(guided(-1.0, context, without), unconditional)
    torch.testing.assert_close(guided(2.0, context, context), expected)
    assert not torch.allclose(guided(2.0, context, without), expected)


def test_denoising_is_the_posterior_mean_of_a_gaussian():
    """If x = y + noise is standard normal, then y given x has mean (1 - noise_std²) x."""
    x = torch.randn(3, *SHAPE)
    torch.testing.assert_close(denoise(IdentityFlow(SHAPE), x, None, 0.6), (1 - 0.36) * x)


def test_denoising_works_without_gradients(flow):
    x = torch.randn(2, *SHAPE, dtype=torch.float64)
    context = torch.randn(2, 1, 3, dtype=torch.float64)
    with torch.no_grad():
        result = denoise(flow, x, context, 0.1)
    assert not result.requires_grad
    torch.testing.assert_close(result, denoise(flow, x, context, 0.1))

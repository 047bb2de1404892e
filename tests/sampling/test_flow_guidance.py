"""Guidance of TarFlow, and denoising; tests/test_golden.py compares them with the authors' code."""

import functools

import pytest
import torch

from flows import randomized
from jetformer.models.invertible import IdentityFlow
from jetformer.models.labelled import LabelledFlow
from jetformer.models.tarflow import TarFlow
from jetformer.objectives import standard_normal_nll
from jetformer.sampling.denoising import denoise
from jetformer.sampling.flows import check_guidance, decode, guided_inverse, log_density
from jetformer.sampling.guidance import Guidance

SHAPE = (4, 4, 1)


small_flow = functools.partial(TarFlow, SHAPE, depth=2, block_depth=1, emb_dim=8, num_heads=2, ps=2)


def prepared(model, flow):
    """Random parameters. Log-scales that grow with a token would make the tokens after it ever larger."""
    torch.manual_seed(0)
    randomized(model)
    for block in flow.blocks:
        block.final_proj.weight.data *= 0.1
    return model.double()


@pytest.fixture
def flow():
    flow = small_flow(context_dim=3)
    return prepared(flow, flow)


@pytest.fixture
def labelled():
    model = LabelledFlow(small_flow, num_labels=3, context_dim=5)
    return prepared(model, model.flow)


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


@pytest.mark.parametrize("schedule", ["constant", "linear"])
@torch.no_grad()
def test_guided_images_are_scored_without_guidance(labelled, schedule):
    """Each token is extrapolated by its weight; log-densities are those of the images given the labels."""
    z, labels, guidance = torch.randn(2, *SHAPE).double(), torch.tensor([2, 0]), Guidance("interp", 1.5, schedule)
    x, nats = decode(labelled, z, labels, guidance=guidance)
    context, without = labelled.context(labels), labelled.context(labels, torch.tensor([True, True]))
    expected = guided_inverse(labelled.flow, z, context, without, guidance.weights(4).double())
    torch.testing.assert_close(x, expected)
    torch.testing.assert_close(nats, log_density(labelled, x, context))
    plain, _ = decode(labelled, z, labels)
    torch.testing.assert_close(plain, labelled.inverse(z, context)[0])
    assert not torch.allclose(x, plain)


def test_what_cannot_be_guided(flow, labelled):
    check_guidance(labelled, Guidance("interp", 1.0))
    check_guidance(flow, Guidance())
    with pytest.raises(ValueError, match=r"LabelledFlow of a TarFlow, not a TarFlow"):
        check_guidance(flow, Guidance("interp", 1.0))
    with pytest.raises(ValueError, match=r"guidance density .* interp"):
        check_guidance(labelled, Guidance("density", 1.0))


def test_denoising_is_the_posterior_mean_of_a_gaussian():
    """If x = y + noise is standard normal, then y given x has mean (1 - noise_std²) x."""
    x = torch.randn(3, *SHAPE)
    for options in ({}, {"noise_std": 0.6}):
        denoised, nats = decode(IdentityFlow(SHAPE), x, **options)
        torch.testing.assert_close(denoised, (1 - options.get("noise_std", 0) ** 2) * x)
        torch.testing.assert_close(nats, -standard_normal_nll(x))


def test_denoising_finds_the_images_of_a_mixture():
    """The density of two images with noise: what lies near one of them is moved to it, what lies between stays."""
    images, noise_std = torch.tensor([[-1.0, 0.5], [1.0, -0.5]], dtype=torch.float64), 0.3

    def log_density(x):
        return (-0.5 * ((x[:, None] - images) / noise_std).square().sum(-1)).logsumexp(1)

    x = torch.cat((images, torch.zeros(1, 2))) + torch.tensor([0.05, 0.1], dtype=torch.float64)
    weights = (-0.5 * ((x[:, None] - images) / noise_std).square().sum(-1)).softmax(1)
    denoised = denoise(log_density, x, noise_std)
    torch.testing.assert_close(denoised, weights @ images)
    torch.testing.assert_close(denoised[:2], images, rtol=0, atol=1e-6)
    assert not denoised.requires_grad

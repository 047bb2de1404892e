"""Steps other than couplings are invertible, ActNorm initializes itself from data, and autocast costs no precision."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flows import assert_invertible, randomized
from jetformer.models import invertible
from jetformer.models.flow_ablations import make_jet
from jetformer.models.initializers import init_weights
from jetformer.models.invertible import ActNorm, LUDense, PCAProjection, PlainDense
from jetformer.models.jet import Jet
from jetformer.models.patches import Patchify, PatchPCA, fit_pca, save_pca

MODULES = {"actnorm": ActNorm, "lu": LUDense, "plain": PlainDense}


def moved(model, seed=0):
    """The model with weights other than its initial ones."""
    randomized(model, seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(seed))
    return model


@settings(max_examples=30, deadline=None)
@given(
    module=st.sampled_from(sorted(MODULES)),
    dim=st.integers(1, 6),
    num_tokens=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
def test_module_is_invertible(module, dim, num_tokens, seed):
    model = moved(MODULES[module](dim), seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, num_tokens, dim, dtype=torch.float64, generator=generator)
    assert_invertible(model, model.inverse, x)


@pytest.fixture(scope="module")
def pca(tmp_path_factory):
    """A PCA of patches of 2 × 2 pixels of 3 channels."""
    path = str(tmp_path_factory.mktemp("pca") / "pca.npz")
    images = np.random.default_rng(0).normal(128, 40, (64, 8, 8, 3)).clip(0, 255).astype(np.uint8)
    save_pca(fit_pca([images], 2), path)
    return path


def test_the_pca_of_patches_is_patch_pca(pca):
    image = torch.rand(2, 8, 8, 3) * 2 - 1
    expected, known = PatchPCA((8, 8, 3), 2, pca, whiten=True), PCAProjection((4, 4, 12), pca, whiten=True)
    for model in (expected, known):
        init_weights(model, torch.Generator())
    tokens, _ = Patchify((8, 8, 3), 2)(image)
    for ours, theirs in zip(known(tokens.view(2, 4, 4, 12)), expected(image), strict=True):
        torch.testing.assert_close(ours.reshape(theirs.shape), theirs)


def test_a_projection_without_its_pca_is_named():
    with pytest.raises(ValueError, match="PCAProjection has no path"):
        init_weights(PCAProjection((2, 2, 12)), torch.Generator())


@pytest.mark.parametrize("dense", [LUDense, PlainDense])
def test_a_dense_layer_starts_as_a_rotation(dense):
    model = dense(7)
    init_weights(model, torch.Generator().manual_seed(0))
    z, logdet = model(torch.eye(7)[None])
    torch.testing.assert_close(z[0] @ z[0].T, torch.eye(7))
    torch.testing.assert_close(logdet, torch.zeros(1), atol=1e-5, rtol=0)
    assert not torch.allclose(z[0].abs().amax(1), torch.ones(7))


def test_lu_is_the_matrix_of_its_factors():
    model = LUDense(5)
    init_weights(model, torch.Generator().manual_seed(0))
    p = torch.zeros(5, 5)
    p[torch.arange(5), model.permutation] = 1
    lower = model.lower.tril(-1) + torch.eye(5)
    upper = model.upper.triu(1) + torch.diag(model.sign * model.log_scale.exp())
    torch.testing.assert_close(model(torch.eye(5)[None])[0][0].T, p @ lower @ upper)


@pytest.mark.parametrize("dense", [LUDense, PlainDense])
def test_autocast_costs_no_precision(dense):
    model = dense(16)
    init_weights(model, torch.Generator().manual_seed(0))
    x = torch.randn(2, 3, 16)
    expected, expected_logdet = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        z, logdet = model(x)
        back, _ = model.inverse(z)
    assert torch.equal(z, expected)
    assert torch.equal(logdet, expected_logdet)
    torch.testing.assert_close(back, x)


# ActNorm


def test_actnorm_initializes_itself_from_data():
    model = ActNorm(3)
    init_weights(model, torch.Generator())
    x = torch.randn(50, 4, 3) * torch.tensor([0.1, 1.0, 20.0]) + torch.tensor([0.0, 1.0, -5.0])
    assert torch.equal(model(x)[0], x)
    with invertible.initializing(model):
        z, logdet = model(x)
    torch.testing.assert_close(z.mean((0, 1)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std((0, 1), correction=0), torch.ones(3), atol=1e-4, rtol=0)
    expected = -4 * x.std((0, 1), correction=0).log().sum()
    torch.testing.assert_close(logdet, expected.expand(50), atol=1e-4, rtol=0)
    # Later it does not change.
    torch.testing.assert_close(model(x)[0], z)
    assert not torch.allclose(model(2 * x)[0], z)


def test_a_constant_dimension_does_not_become_infinite():
    model = ActNorm(2)
    init_weights(model, torch.Generator())
    with invertible.initializing(model):
        z, logdet = model(torch.ones(4, 2, 2))
    assert z.isfinite().all()
    assert logdet.isfinite().all()


def test_one_pass_initializes_all_of_a_flow():
    """Every dimension of each ActNorm's outputs then has mean 0 and variance 1."""
    model = make_jet(
        (8, 8, 1), depth=4, emb_dim=8, num_heads=2, ps=2, actnorm=True, invertible_dense="lu", num_levels=2
    )
    assert len(invertible.parameters_from_data(model)) == 8
    assert not invertible.parameters_from_data(Jet((8, 8, 1), depth=1, emb_dim=8, num_heads=2))
    init_weights(model, torch.Generator().manual_seed(0))
    seen = []
    for actnorm in model.actnorms:
        actnorm.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    x = torch.rand(64, 8, 8, 1) ** 3
    with invertible.initializing(model):
        model(x)
    for z in seen:
        torch.testing.assert_close(z.mean((0, 1)), torch.zeros(z.shape[-1]), atol=1e-4, rtol=0)
        torch.testing.assert_close(z.std((0, 1), correction=0), torch.ones(z.shape[-1]), atol=1e-3, rtol=0)
    assert [z.shape[-1] for z in seen] == [4, 4, 8, 8]
    again = [p.clone() for p in model.parameters()]
    model(x)
    assert all(torch.equal(*pair) for pair in itertools.zip_longest(again, model.parameters()))
    assert all(p.requires_grad for p in model.parameters())

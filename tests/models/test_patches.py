"""Patches and their PCA are invertible, with the Jacobian's log-determinant; the PCA equals scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from upath import UPath

from flows import assert_invertible
from jetformer.models.initializers import init_weights
from jetformer.models.patches import Patchify, PatchPCA, fit_pca, save_pca


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    smooth = rng.normal(128, 40, (64, 1, 1, 3)) + rng.normal(0, 15, (64, 8, 8, 3))
    return smooth.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_patches_in_order(channels):
    """Token (i, j) is the pixel block at row i, column j, rows first, channels last."""
    x = torch.arange(4 * 6 * channels, dtype=torch.float64).view(1, 4, 6, channels)
    patchify = Patchify((4, 6, channels), 2)
    tokens, _ = patchify(x)
    assert tokens.shape == (1, 6, 4 * channels)
    torch.testing.assert_close(tokens[0, 4], x[0, 2:4, 2:4].flatten())
    assert_invertible(patchify, patchify.inverse, x)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("depth_to_seq", [1, 2])
def test_pca_is_invertible(images, tmp_path, whiten, depth_to_seq):
    path = str(tmp_path / "pca.npz")
    save_pca(fit_pca([images], 2), path)
    model = PatchPCA((8, 8, 3), 2, path, whiten=whiten, depth_to_seq=depth_to_seq)
    init_weights(model, torch.Generator())
    x = torch.from_numpy(images[:1]).double() / 127.5 - 1
    # The components on file are float32: orthonormal to that.
    model.double()
    z, logdet = model(x)
    assert z.shape == (1, 16 * depth_to_seq, 12 // depth_to_seq)
    y, inverse_logdet = model.inverse(z)
    torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inverse_logdet, -logdet)
    jacobian = torch.autograd.functional.jacobian(lambda e: model(e[None])[0].flatten(), x[0])
    expected = torch.linalg.slogdet(jacobian.view(192, 192)).logabsdet
    torch.testing.assert_close(logdet[0], expected, rtol=1e-4, atol=1e-4)


def test_fit_equals_scikit_learns(images, tmp_path):
    pca = fit_pca(np.split(images, 8), 2)
    patches, _ = Patchify((8, 8, 3), 2)(torch.from_numpy(images).double() / 127.5 - 1)
    expected = PCA(whiten=True).fit(patches.flatten(0, 1).numpy())
    np.testing.assert_allclose(pca.explained_variance_, expected.explained_variance_, rtol=1e-6)

    path = str(tmp_path / "pca.npz")
    save_pca(pca, path)
    model = PatchPCA((8, 8, 3), 2, path)
    init_weights(model, torch.Generator())
    codes, _ = model(torch.from_numpy(images).float() / 127.5 - 1)
    codes = codes.flatten(0, 1)
    # Components are unique up to their sign.
    torch.testing.assert_close(codes.T.cov(), torch.eye(12), rtol=0, atol=1e-3)
    theirs = torch.from_numpy(expected.transform(patches.flatten(0, 1).numpy())).float()
    torch.testing.assert_close(codes.abs(), theirs.abs(), rtol=1e-2, atol=1e-2)


def test_a_pca_is_found_from_anywhere(images, tmp_path, monkeypatch):
    """By a path relative to the project's root, as in experiments, and by a URL."""
    monkeypatch.chdir(tmp_path)
    model = PatchPCA((32, 32, 3), 4, "experiments/shapes_pca.npz")
    init_weights(model, torch.Generator())
    basis = model.components
    torch.testing.assert_close(basis @ basis.T, torch.eye(48), rtol=0, atol=1e-5)
    save_pca(fit_pca([images], 2), tmp_path / "pca.npz")
    UPath("memory://found/pca.npz").write_bytes((tmp_path / "pca.npz").read_bytes())
    init_weights(PatchPCA((8, 8, 3), 2, "memory://found/pca.npz"), torch.Generator())


def test_a_pca_of_another_size_is_named(images, tmp_path):
    path = str(tmp_path / "pca.npz")
    save_pca(fit_pca([images], 2), path)
    with pytest.raises(ValueError, match="patches of 4 pixels"):
        init_weights(PatchPCA((8, 8, 3), 4, path), torch.Generator())
    with pytest.raises(ValueError, match="has no path"):
        init_weights(PatchPCA((8, 8, 3), 4), torch.Generator())


def test_an_image_that_does_not_divide_is_named():
    with pytest.raises(ValueError, match=r"9 × 8 .* 2"):
        Patchify((9, 8, 3), 2)
